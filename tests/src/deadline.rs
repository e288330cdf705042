//! Waiting for the effect of another process: never for a time, always for a condition, and never
//! forever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The pause between two attempts. Short compared with everything that is waited for, long compared
/// with the cost of an attempt.
const PAUSE: Duration = Duration::from_millis(50);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Has every wait of this process fail from now on, so that a test that is interrupted cleans up
/// after itself.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Whether [`interrupt`] was called.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// `limit` for this machine: multiplied by `BERTH_TEST_PATIENCE`, if that is set. For machines with
/// an emulated processor.
///
/// # Panics
/// When `BERTH_TEST_PATIENCE` is not a whole number above 0.
pub fn patience(limit: Duration) -> Duration {
    let Ok(factor) = std::env::var("BERTH_TEST_PATIENCE") else { return limit };
    let factor = factor.parse().ok().filter(|factor| *factor > 0);
    limit * factor.expect("BERTH_TEST_PATIENCE is a whole number above 0")
}

/// Calls `look` until it returns something, for at most `limit`, with this machine's [`patience`].
///
/// An attempt that fails does not end the wait: a daemon that is just starting refuses connections.
/// The last failure is reported when time runs out.
///
/// # Errors
/// When `limit` has passed; the message names `what`.
pub fn within<T>(limit: Duration, what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    within_looks(limit, PAUSE, what, look)
}

/// [`within`] with another pause between two attempts, for those that are expensive.
///
/// # Errors
/// When `limit` has passed; the message names `what`. When the process is [interrupted].
///
/// [interrupted]: interrupt
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
            _ if interrupted() => bail!("{what}: interrupted"),
            Ok(None) if Instant::now() < end => {}
            Ok(None) => bail!("{what}: not within {limit:?}"),
            Err(_) if Instant::now() < end => {}
            Err(error) => return Err(error).with_context(|| format!("{what}: not within {limit:?}")),
        }
        sleep(pause);
    }
}
