//! How often a test repeats what is tried many times.

use anyhow::{Context as _, Result, ensure};

/// As many of `times` as `BERTH_TEST_REPEATS` says, in percent, and at least one; all of them where
/// it says nothing. For machines whose processor is emulated.
///
/// # Errors
/// When `BERTH_TEST_REPEATS` is no number from 1 to 100.
pub fn repeats(times: usize) -> Result<usize> {
    let percent: usize = match std::env::var("BERTH_TEST_REPEATS") {
        Ok(percent) => percent.parse().context("BERTH_TEST_REPEATS is no number")?,
        Err(_) => 100,
    };
    ensure!((1..=100).contains(&percent), "BERTH_TEST_REPEATS is no percentage: {percent}");
    Ok((times * percent / 100).max(1))
}
