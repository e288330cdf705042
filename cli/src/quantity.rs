//! Parses and formats amounts: `64Mi` of memory, `0.5` CPUs, `1.2 GB` in a table.
//!
//! Memory follows the notation of Kubernetes quantities: `Ki`, `Mi`, `Gi`, `Ti` are powers of 1024,
//! `k`, `M`, `G`, `T` powers of 1000. Pure functions; what a limit means is the daemon's business.

use std::time::Duration;

/// The period of the CPU quota: the kernel's default, 100 ms (cgroups(7),
/// `cpu.max`).
pub(crate) const CPU_PERIOD: Duration = Duration::from_millis(100);

/// The smallest quota that the kernel accepts, 1 ms per period: `min_cfs_quota_period` in
/// kernel/sched/core.c.
const SHORTEST_QUOTA_US: f64 = 1000.0;

/// More CPUs than any machine has. Keeps the product with the period far from the limits of an
/// `i64`.
const MOST_CPUS: f64 = 1_000_000.0;

/// Suffixes of memory amounts and their factors.
const MEMORY_UNITS: [(&str, f64); 8] = [
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
];

/// The largest amount of memory that is accepted, 2^53 bytes: a float is exact up to here.
const MOST_BYTES: f64 = 9_007_199_254_740_992.0;

/// Why a text is not an amount.
#[derive(Debug, thiserror::Error, PartialEq)]
pub(crate) enum QuantityError {
    /// The text is not a number with a known unit.
    #[error(
        "`{0}` is not an amount of memory; use bytes, or a number with Ki, Mi, Gi, k, M or G, such as 64Mi"
    )]
    Memory(String),
    /// The amount is zero, negative, or more than any machine has.
    #[error("`{0}` is out of range: use more than 0 and at most 8Pi")]
    MemoryRange(String),
    /// The text is not a number.
    #[error("`{0}` is not a number of CPUs; use a number such as 0.5 or 2")]
    Cpus(String),
    /// Below the kernel's minimum, or more than any machine has.
    #[error("`{0}` is out of range: the smallest limit is 0.01 CPUs")]
    CpusRange(String),
}

/// Parses an amount of memory into bytes, at least 1.
///
/// # Errors
/// When the text has no number, an unknown unit, or a value out of range.
pub(crate) fn parse_memory(text: &str) -> Result<i64, QuantityError> {
    let unit = MEMORY_UNITS.iter().find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)));
    let (digits, factor) = unit.unwrap_or((text, 1.0));
    let number = parse_decimal(digits).ok_or_else(|| QuantityError::Memory(text.to_owned()))?;
    let bytes = (number * factor).floor();
    if !(1.0..=MOST_BYTES).contains(&bytes) {
        return Err(QuantityError::MemoryRange(text.to_owned()));
    }
    #[expect(clippy::cast_possible_truncation, reason = "checked to be a whole number between 1 and 2^53")]
    Ok(bytes as i64)
}

/// Parses a number of CPUs into the quota per [`CPU_PERIOD`], in microseconds.
///
/// # Errors
/// When the text is not a number, or a value out of range.
pub(crate) fn parse_cpu_quota_us(text: &str) -> Result<i64, QuantityError> {
    let cpus = parse_decimal(text).ok_or_else(|| QuantityError::Cpus(text.to_owned()))?;
    let quota_us = (cpus * CPU_PERIOD.as_secs_f64() * 1e6).round();
    if quota_us < SHORTEST_QUOTA_US || cpus > MOST_CPUS {
        return Err(QuantityError::CpusRange(text.to_owned()));
    }
    #[expect(clippy::cast_possible_truncation, reason = "checked to lie between 1000 and 10^11")]
    Ok(quota_us as i64)
}

/// Parses a plain decimal number. `f64::from_str` would also accept `inf`, `nan`, `1e9` and signs.
fn parse_decimal(text: &str) -> Option<f64> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if plain { text.parse().ok() } else { None }
}

/// Formats a number of bytes for a table: three digits and a unit, in powers of 1024.
pub(crate) fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "three figures are shown")]
    let mut amount = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        // 1023.95 would be shown as 1024.0.
        if amount < 1023.95 {
            break;
        }
        amount /= 1024.0;
        unit = next;
    }
    if amount < 99.95 { format!("{amount:.1} {unit}") } else { format!("{amount:.0} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_binary_and_decimal_units() {
        for (text, bytes) in [
            ("1", 1),
            ("1024", 1024),
            ("64Mi", 64 << 20),
            ("1.5Gi", 3 << 29),
            ("2Ki", 2048),
            ("1Ti", 1 << 40),
            ("1k", 1000),
            ("1.5M", 1_500_000),
            ("3G", 3_000_000_000),
            ("0.5Ki", 512),
            ("1.9", 1),
        ] {
            assert_eq!(parse_memory(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        for text in [
            "", "Mi", "64 Mi", " 64Mi", "64mi", "64MB", "-1", "+1", "1e3", "inf", "nan", "1.2.3", "٣", "1\0",
            ".",
        ] {
            assert_eq!(parse_memory(text), Err(QuantityError::Memory(text.to_owned())), "{text:?}");
        }
        for text in ["0", "0Mi", "0.1", "99999999Ti", &"9".repeat(400)] {
            assert_eq!(parse_memory(text), Err(QuantityError::MemoryRange(text.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn processors_become_microseconds_of_each_period() {
        for (text, quota_us) in
            [("1", 100_000), ("0.5", 50_000), (".25", 25_000), ("0.01", 1000), ("2.", 200_000)]
        {
            assert_eq!(parse_cpu_quota_us(text), Ok(quota_us), "{text}");
        }
    }

    #[test]
    fn what_is_no_number_of_processors_is_refused() {
        for text in ["", "half", "-1", "1,5", "500m", "inf", "NaN", " 1"] {
            assert_eq!(parse_cpu_quota_us(text), Err(QuantityError::Cpus(text.to_owned())), "{text:?}");
        }
        for text in ["0", "0.001", "1000001", &"9".repeat(400)] {
            assert_eq!(parse_cpu_quota_us(text), Err(QuantityError::CpusRange(text.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn bytes_are_shown_with_few_figures() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (102_349, "100 KiB"),
            (1_048_575, "1.0 MiB"),
            (64 << 20, "64.0 MiB"),
            (3 << 40, "3.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes_text(bytes), text, "{bytes}");
        }
    }
}
