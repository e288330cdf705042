//! The host of a daemon under test: a private network namespace, with nothing but loopback in it.
//!
//! Bridges, addresses, firewall rules and registries of tests are in there, beside those of other
//! tests and apart from those of the machine. A host that is one of several nodes has a mount
//! namespace as well, with an empty `/var/lib` and `/var/log`.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

use crate::program::output;

/// A network namespace, pinned as a file because it has to outlive the daemons in it, and maybe a
/// mount namespace.
#[derive(Debug)]
pub struct Host {
    file: PathBuf,
    /// The directory with the file of the mount namespace, a mount of its own.
    mounts: Option<PathBuf>,
}

/// The file of a mount namespace in the directory of [`Host::mounts`].
const MOUNTS: &str = "mounts";

impl Host {
    /// Creates one, pinned as the new file `file`, with loopback up.
    ///
    /// # Errors
    /// When the file or the namespace cannot be made.
    pub fn create(file: PathBuf) -> Result<Self> {
        fs::write(&file, "").context("making a file for the network namespace")?;
        let host = Self { file, mounts: None };
        output(Command::new("unshare").args(host.options()).args(["ip", "link", "set", "lo", "up"]))?;
        Ok(host)
    }

    /// [`create`](Self::create) with a mount namespace, which is pinned in the new directory
    /// `directory`. What is mounted there is not mounted elsewhere.
    ///
    /// # Errors
    /// When a file or a namespace cannot be made.
    pub fn create_with_mounts(file: PathBuf, directory: PathBuf) -> Result<Self> {
        fs::create_dir(&directory).context("making a directory for the mount namespace")?;
        // A mount namespace can be pinned on a private mount only (unshare(1)).
        mount(Some("namespaces"), &directory, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .context("mounting the directory of the mount namespace")?;
        let host = Self { file, mounts: Some(directory.clone()) };
        mount(None::<&str>, &directory, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)
            .context("making it private")?;
        for file in [&host.file, &directory.join(MOUNTS)] {
            fs::write(file, "").context("making a file for a namespace")?;
        }
        let script =
            "ip link set lo up && for at in /var/lib /var/log; do mount -t tmpfs node $at || exit; done";
        output(Command::new("unshare").args(host.options()).args(["sh", "-c", script]))?;
        Ok(host)
    }

    /// A program that will run in it: an `nsenter` that becomes the program, with the same process
    /// id.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(self.options()).arg("--").arg(program);
        command
    }

    /// Runs a program in it to its end and returns what it prints.
    ///
    /// # Errors
    /// When it cannot be started or does not end with success.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        output(self.command(program).args(arguments))
    }

    /// Calls `work` on a thread that is in its network. Its sockets stay in the namespace wherever
    /// they are used afterwards.
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

    /// The file that pins its network namespace.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Name it to unshare(1) and nsenter(1).
    fn options(&self) -> Vec<String> {
        let mut options = vec![format!("--net={}", self.file.display())];
        options.extend(self.mounts.iter().map(|mounts| format!("--mount={}", mounts.join(MOUNTS).display())));
        options
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = umount2(&self.file, MntFlags::MNT_DETACH);
        if let Some(mounts) = &self.mounts {
            let _ = umount2(&mounts.join(MOUNTS), MntFlags::MNT_DETACH);
            let _ = umount2(mounts, MntFlags::MNT_DETACH);
        }
    }
}
