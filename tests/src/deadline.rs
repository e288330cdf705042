//! Waiting for something that another process brings about: never for a time, always for a
//! condition, and never for ever.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How long to wait between two looks. Short against everything that is waited for, long against
/// what a look costs.
const PAUSE: Duration = Duration::from_millis(50);

/// What `limit` is on this machine: `BERTH_TEST_PATIENCE` times as long, once where it is not set.
/// For machines whose processor is emulated.
///
/// # Panics
/// When `BERTH_TEST_PATIENCE` is not a whole number above 0.
pub fn patience(limit: Duration) -> Duration {
    let Ok(factor) = std::env::var("BERTH_TEST_PATIENCE") else { return limit };
    let factor = factor.parse().ok().filter(|factor| *factor > 0);
    limit * factor.expect("BERTH_TEST_PATIENCE is a whole number above 0")
}

/// Looks again and again until `look` has something, for at most `limit`, with this machine's
/// [`patience`].
///
/// A look that fails is not the end: a daemon that is just starting refuses connections. The last
/// failure is reported when time runs out.
///
/// # Errors
/// When `limit` has passed; the message names `what`.
pub fn within<T>(limit: Duration, what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    within_looks(limit, PAUSE, what, look)
}

/// [`within`] with another pause between two looks, for those that cost a lot.
///
/// # Errors
/// When `limit` has passed; the message names `what`.
pub fn within_looks<T>(
    limit: Duration,
    pause: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let limit = patience(limit);
    let end = Instant::now() + limit;
    loop {
        let seen = look();
        match seen {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() < end => {}
            Ok(None) => bail!("{what}: not within {limit:?}"),
            Err(_) if Instant::now() < end => {}
            Err(error) => return Err(error).with_context(|| format!("{what}: not within {limit:?}")),
        }
        sleep(pause);
    }
}
