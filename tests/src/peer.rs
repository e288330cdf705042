//! containerd with runc, started by `scripts/peer-containerd`: to check one of our tests on an
//! established runtime.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// A private containerd with the demo image in it; stopped and removed on drop.
#[derive(Debug)]
pub struct Containerd {
    dir: PathBuf,
    socket: PathBuf,
}

impl Containerd {
    /// Starts it with everything below `dir` and the bridge `bridge`. The first time, this builds
    /// it, which takes minutes.
    ///
    /// # Errors
    /// When the script fails; its message is on standard error.
    pub fn start(dir: &Path, bridge: &str) -> Result<Self> {
        let output = script("start", dir)
            .env("PEER_BRIDGE", bridge)
            .stderr(Stdio::inherit())
            .output()
            .context("running scripts/peer-containerd")?;
        if !output.status.success() {
            bail!("scripts/peer-containerd start: {}", output.status);
        }
        let socket = String::from_utf8(output.stdout).context("reading the socket's path")?;
        Ok(Self { dir: dir.to_owned(), socket: socket.trim_end().into() })
    }

    /// Kills containerd itself with SIGKILL; the containers go on running.
    ///
    /// # Errors
    /// When the script fails; its message is on standard error.
    pub fn kill(&self) -> Result<()> {
        self.run("kill")
    }

    /// Starts containerd again after a [`kill`](Self::kill).
    ///
    /// # Errors
    /// When the script fails; its message is on standard error.
    pub fn start_again(&self) -> Result<()> {
        self.run("start")
    }

    fn run(&self, verb: &str) -> Result<()> {
        let status = script(verb, &self.dir)
            .stdout(Stdio::null())
            .status()
            .context("running scripts/peer-containerd")?;
        if !status.success() {
            bail!("scripts/peer-containerd {verb}: {status}");
        }
        Ok(())
    }

    /// Its CRI socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Its failure is on standard error; a panic here would hide the test's own.
        let _ = script("stop", &self.dir).status();
    }
}

fn script(verb: &str, dir: &Path) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/peer-containerd"));
    command.arg(verb).arg(dir).stdin(Stdio::null());
    command
}
