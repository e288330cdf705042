//! The host of a daemon under test: a private network namespace, with nothing but loopback in it.
//!
//! Bridges, addresses, firewall rules and registries of tests are in there, beside those of other
//! tests and apart from those of the machine.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};

use crate::program::output;

/// A network namespace, pinned as a file because it has to outlive the daemons in it.
#[derive(Debug)]
pub struct Host {
    file: PathBuf,
}

impl Host {
    /// Creates one, pinned as the new file `file`, with loopback up.
    ///
    /// # Errors
    /// When the file or the namespace cannot be made.
    pub fn create(file: PathBuf) -> Result<Self> {
        fs::write(&file, "").context("making a file for the network namespace")?;
        let host = Self { file };
        output(Command::new("unshare").arg(host.option()).args(["ip", "link", "set", "lo", "up"]))?;
        Ok(host)
    }

    /// A program that will run in it: an `nsenter` that becomes the program, with the same process
    /// id.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(self.option()).arg("--").arg(program);
        command
    }

    /// Runs a program in it to its end and returns what it prints.
    ///
    /// # Errors
    /// When it cannot be started or does not end with success.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        output(self.command(program).args(arguments))
    }

    /// Calls `work` on a thread that is in it. Its sockets stay in the namespace wherever they are
    /// used afterwards.
    ///
    /// # Errors
    /// What `work` returns; and when the namespace cannot be entered.
    ///
    /// # Panics
    /// When `work` does.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            // A separate thread, since there is no sure way back out of a namespace.
            let thread = scope.spawn(|| {
                let file = fs::File::open(&self.file).context("opening the network namespace")?;
                setns(file, CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
                work()
            });
            thread.join().map_err(|_| anyhow!("the work inside of the test host panicked"))?
        })
    }

    /// The number that the kernel gave the namespace: what `/proc/PID/ns/net` names for every
    /// process in it (`namespaces(7)`).
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn number(&self) -> Result<u64> {
        Ok(fs::metadata(&self.file).context("looking at the network namespace")?.ino())
    }

    /// Names it to unshare(1) and nsenter(1).
    fn option(&self) -> String {
        format!("--net={}", self.file.display())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = umount2(&self.file, MntFlags::MNT_DETACH);
    }
}
