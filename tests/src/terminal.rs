//! A pseudo-terminal with a program on it, as a user has it: input, output, the size, and the
//! settings that the program leaves behind.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::{Pid, ttyname};

use crate::daemon::SOON;
use crate::deadline::within;
use crate::program::output;

/// A terminal whose user is the test. It outlives the programs on it.
#[derive(Debug)]
pub struct Terminal {
    keyboard: File,
    terminal: OwnedFd,
    path: PathBuf,
    shown: Arc<Mutex<Vec<u8>>>,
}

/// A program that has the terminal as its controlling one. It is killed when this is dropped.
#[derive(Debug)]
pub struct OnTerminal(Child);

impl Terminal {
    /// Creates one of this size.
    ///
    /// # Errors
    /// When the kernel does not provide one.
    pub fn open(columns: u16, rows: u16) -> Result<Self> {
        let pair = openpty(None, None).context("opening a terminal")?;
        let (screen, keyboard) = (File::from(pair.master.try_clone()?), File::from(pair.master));
        let path = ttyname(&pair.slave).context("naming the terminal")?;
        let shown = Arc::new(Mutex::new(Vec::new()));
        let collected = shown.clone();
        // Ends when the terminal is closed everywhere.
        std::thread::spawn(move || {
            let (mut screen, mut buffer) = (screen, [0; 4096]);
            while let Ok(length @ 1..) = screen.read(&mut buffer) {
                collected.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..length]);
            }
        });
        let terminal = Self { keyboard, terminal: pair.slave, path, shown };
        terminal.resize(columns, rows)?;
        Ok(terminal)
    }

    /// Runs a program on it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, command: &Command) -> Result<OnTerminal> {
        let mut on_terminal = Command::new("setsid");
        on_terminal.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                on_terminal.env(name, value);
            }
        }
        let end = || self.terminal.try_clone();
        on_terminal.stdin(end()?).stdout(end()?).stderr(end()?);
        Ok(OnTerminal(on_terminal.spawn().context("starting a program on the terminal")?))
    }

    /// Types text.
    ///
    /// # Errors
    /// When the terminal accepts no more.
    pub fn types(&self, keys: &str) -> Result<()> {
        Ok((&self.keyboard).write_all(keys.as_bytes())?)
    }

    /// Waits until this text is shown, and returns everything shown so far.
    ///
    /// # Errors
    /// When it is not shown in time.
    pub fn shows(&self, text: &str) -> Result<String> {
        let shown = || {
            String::from_utf8_lossy(&self.shown.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
        };
        within(SOON, "the text is shown", || Ok(shown().contains(text).then(shown)))
            .with_context(|| format!("{text:?} is not in {:?}", shown()))
    }

    /// Changes its size.
    ///
    /// # Errors
    /// When stty(1) cannot.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        output(Command::new("stty").arg("-F").arg(&self.path).args(["cols", &columns, "rows", &rows]))?;
        Ok(())
    }

    /// Its settings.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn settings(&self) -> Result<Termios> {
        Ok(tcgetattr(self.terminal.as_fd())?)
    }

    /// Waits until the terminal is in raw mode: no echo, no line editing, no signals.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn becomes_raw(&self) -> Result<()> {
        let cooked = LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG;
        within(SOON, "the terminal is raw", || {
            Ok((!self.settings()?.local_flags.intersects(cooked)).then_some(()))
        })
    }
}

impl OnTerminal {
    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.0.id().try_into()?), signal)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn ended(mut self) -> Result<ExitStatus> {
        within(SOON, "the program on the terminal has ended", || Ok(self.0.try_wait()?))
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
