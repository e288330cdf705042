//! Decimal numbers, as the records of archives have them.

/// Digits only, at most what fits an `i64`: sizes beyond that do not exist, and other readers call
/// them negative.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok().filter(|&n| i64::try_from(n).is_ok())
}
