//! The command's terminal: raw mode while a program in a container has it, and its
//! size.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};

use berth_streaming::command::{Size, Wanted};
use berth_sys::tty::{self, RawMode};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::output;

/// The terminal, for a program that has one in its container.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// Restored when this is dropped, at every end of the command but SIGKILL.
    raw: Option<RawMode>,
    resized: Signal,
    continued: Signal,
}

impl Terminal {
    /// The terminal, for a program that has one: in raw mode from now on if input goes to the
    /// program.
    ///
    /// # Errors
    /// When signal handlers or raw mode cannot be set up.
    pub(crate) fn of_program(wanted: Wanted) -> io::Result<Option<Self>> {
        if !wanted.terminal {
            return Ok(None);
        }
        let (resized, continued) =
            (signal(SignalKind::window_change())?, signal(SignalKind::from_raw(tty::SIGCONT))?);
        let stdin = io::stdin();
        let raw = match (wanted.stdin, stdin.is_terminal()) {
            (true, true) => Some(RawMode::enter(stdin.as_fd())?),
            (true, false) => {
                output::remark("standard input is not a terminal; the program will not see where it ends");
                None
            }
            (false, _) => None,
        };
        Ok(Some(Self { raw, resized, continued }))
    }

    /// Whether it takes input: standard input is a terminal in raw mode.
    pub(crate) fn is_raw(&self) -> bool {
        self.raw.is_some()
    }

    /// The size of the terminal now; `None` without one.
    pub(crate) fn size() -> Option<Size> {
        let of = |terminal: BorrowedFd<'_>| match tty::size(terminal) {
            Ok((width, height)) if width > 0 && height > 0 => Some(Size { width, height }),
            _ => None,
        };
        let (stdin, stdout) = (io::stdin(), io::stdout());
        of(stdin.as_fd()).or_else(|| of(stdout.as_fd()))
    }

    /// Waits until the size may have changed. May be dropped and called again.
    pub(crate) async fn changed(&mut self) {
        tokio::select! {
            _ = self.resized.recv() => {}
            _ = self.continued.recv() => {
                if let Some(raw) = &self.raw {
                    // The shell that had the terminal meanwhile has changed its settings. A
                    // terminal that is gone will be noticed when reading its input.
                    let _ = raw.apply();
                }
            }
        }
    }
}
