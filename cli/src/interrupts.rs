//! Ctrl-C and SIGTERM, counted instead of fatal: for the time in which something has to be undone at the end.

use std::future::Future;
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask us to end.
#[derive(Debug)]
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    /// How many have come.
    count: u32,
}

/// Two interrupts came while something had to be waited for.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; `berth ps -a` shows what is left, `berth rm -f` removes it")]
pub(crate) struct GivenUp;

impl Interrupts {
    /// Listens from now on; the signals end the process no longer.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub(crate) fn listen() -> io::Result<Self> {
        let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        Ok(Self { interrupt, terminate, count: 0 })
    }

    /// Waits for the next one and returns how many have come. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> u32 {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
        self.count += 1;
        self.count
    }

    /// How many have come.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Waits for work that is better not left half; a second interrupt leaves it all the same.
    ///
    /// # Errors
    /// When a second interrupt came.
    pub(crate) async fn shield<T>(&mut self, work: impl Future<Output = T>) -> Result<T, GivenUp> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                count = self.next() => if count >= 2 { return Err(GivenUp) },
            }
        }
    }
}
