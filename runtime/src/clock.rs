//! The time of day.

use std::time::{SystemTime, UNIX_EPOCH};

/// The time now, in nanoseconds since the epoch.
pub(crate) fn unix_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(1)
}
