//! The signals that ask the command to end, counted instead of fatal while there is something to
//! undo at the end.
//!
//! SIGHUP is among them: it is sent when the terminal or the connection goes away. A signal that
//! was ignored when the command started stays ignored, as nohup(1) and background jobs of shells
//! require.

use std::future::Future;
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask us to end.
#[derive(Debug)]
pub(crate) struct Interrupts {
    listening: [Option<Signal>; 4],
    /// How many have arrived.
    count: u32,
}

/// In the order of [`Interrupts::listening`].
const KINDS: [fn() -> SignalKind; 4] =
    [SignalKind::interrupt, SignalKind::terminate, SignalKind::hangup, SignalKind::quit];

/// A second interrupt arrived during cleanup.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; `berth ps -a` shows what is left, `berth rm -f` removes it")]
pub(crate) struct GivenUp;

/// One of the signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupt {
    /// How many have arrived, including this one.
    pub(crate) count: u32,
    /// Its number.
    number: i32,
}

impl Interrupt {
    /// The exit code of a program killed by it, as in shells.
    pub(crate) fn exit_code(self) -> u8 {
        u8::try_from(128 + self.number).unwrap_or(u8::MAX)
    }
}

impl Interrupts {
    /// Installs the handlers; the signals no longer end the process.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub(crate) fn listen() -> io::Result<Self> {
        let ignored = ignored(&std::fs::read_to_string("/proc/self/status")?);
        let mut listening = [const { None }; 4];
        for (place, kind) in listening.iter_mut().zip(KINDS) {
            if ignored & (1 << (kind().as_raw_value() - 1)) == 0 {
                *place = Some(signal(kind())?);
            }
        }
        Ok(Self { listening, count: 0 })
    }

    /// Waits for the next one. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> Interrupt {
        let [interrupt, terminate, hangup, quit] = &mut self.listening;
        let number = tokio::select! {
            () = receive(interrupt) => SignalKind::interrupt(),
            () = receive(terminate) => SignalKind::terminate(),
            () = receive(hangup) => SignalKind::hangup(),
            () = receive(quit) => SignalKind::quit(),
        };
        self.count += 1;
        Interrupt { count: self.count, number: number.as_raw_value() }
    }

    /// How many have arrived.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Waits for work that should be completed; a second interrupt abandons it.
    ///
    /// # Errors
    /// On a second interrupt.
    pub(crate) async fn shield<T>(&mut self, work: impl Future<Output = T>) -> Result<T, GivenUp> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                interrupt = self.next() => if interrupt.count >= 2 { return Err(GivenUp) },
            }
        }
    }
}

async fn receive(signal: &mut Option<Signal>) {
    match signal {
        // Never `None`: the process ends with the runtime.
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// The signals that are ignored, one bit each, from the text of `/proc/self/status`.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read() {
        assert_eq!(ignored("Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001005\n"), 0x1005);
        assert_eq!(ignored("Name:\tx\n"), 0);
        assert_eq!(ignored("SigIgn:\tlots\n"), 0);
    }

    #[test]
    fn a_signal_is_told_as_shells_do() {
        for (kind, code) in KINDS.iter().zip([130, 143, 129, 131]) {
            assert_eq!(Interrupt { count: 1, number: kind().as_raw_value() }.exit_code(), code);
        }
    }
}
