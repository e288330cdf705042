//! How often a test repeats an operation that it tries many times.

use anyhow::{Context as _, Result, ensure};

/// `BERTH_TEST_REPEATS` percent of `times`, and at least one; all of them if it is not set. For
/// machines with an emulated processor.
///
/// # Errors
/// When `BERTH_TEST_REPEATS` is not a number from 1 to 100.
pub fn repeats(times: usize) -> Result<usize> {
    let percent: usize = match std::env::var("BERTH_TEST_REPEATS") {
        Ok(percent) => percent.parse().context("BERTH_TEST_REPEATS is no number")?,
        Err(_) => 100,
    };
    ensure!((1..=100).contains(&percent), "BERTH_TEST_REPEATS is no percentage: {percent}");
    Ok((times * percent / 100).max(1))
}
