//! The limits of a pod's traffic, from its annotations: Kubernetes, "Network Plugins", "Support
//! traffic shaping".

use berth_model::sandbox;
use berth_network::Bandwidth;

use super::NetworkError;

/// The annotations, in bits per second.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// The limits that the bandwidth plugin takes: 1 kbit/s to 1 Pbit/s.
const BANDWIDTH: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// What a pod asks for.
///
/// # Errors
/// [`NetworkError::Bandwidth`].
pub(super) fn of(config: &sandbox::Config) -> Result<Bandwidth, NetworkError> {
    let limit = |annotation: &'static str| match config.annotations.get(annotation) {
        None => Ok(None),
        Some(value) => {
            bits(value).map(Some).ok_or_else(|| NetworkError::Bandwidth { annotation, value: value.clone() })
        }
    };
    Ok(Bandwidth { ingress: limit(INGRESS)?, egress: limit(EGRESS)? })
}

/// A quantity of Kubernetes, as it is used for bandwidth: digits and a decimal or binary suffix.
fn bits(quantity: &str) -> Option<u64> {
    let end = quantity.find(|character: char| !character.is_ascii_digit()).unwrap_or(quantity.len());
    let (digits, suffix) = quantity.split_at(end);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor).filter(|bits| BANDWIDTH.contains(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_is_a_quantity_in_the_plugins_range() {
        for (quantity, expected) in [
            ("1M", Some(1_000_000)),
            ("1000", Some(1_000)),
            ("10Mi", Some(10 << 20)),
            ("1P", Some(1_000_000_000_000_000)),
            ("999", None),
            ("2P", None),
            ("", None),
            ("M", None),
            ("1m", None),
            ("-1M", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(bits(quantity), expected, "{quantity}");
        }
    }
}
