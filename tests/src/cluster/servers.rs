//! The programs of a cluster: each with a log, and ended on drop.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deadline::within;
use crate::host::Host;

/// Time for one answer of a server, on a machine that is busy with other things.
pub(super) const ANSWER: Duration = Duration::from_secs(20);

/// Time for a server to serve after its start (the API server takes about ten seconds), and to end.
const START_OR_END: Duration = Duration::from_secs(120);

/// How much of each log a failed test shows.
const LAST_LINES: usize = 12;

/// The running servers of one host.
#[derive(Debug)]
pub(super) struct Servers {
    dir: PathBuf,
    /// In the order of their start.
    running: Vec<Server>,
}

#[derive(Debug)]
struct Server {
    name: &'static str,
    process: Child,
}

impl Servers {
    /// None, with a directory for their logs.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, running: Vec::new() }
    }

    /// The directory with their logs.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts `program` on `host`.
    pub(super) fn start(
        &mut self,
        host: &Host,
        name: &'static str,
        program: &Path,
        arguments: &[String],
    ) -> Result<()> {
        ensure!(program.exists(), "no {}: scripts/build-peer builds it", program.display());
        let log = File::options().create(true).append(true).open(self.log(name));
        let log = log.with_context(|| format!("making the log of {name}"))?;
        let process = host
            .command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        self.running.push(Server { name, process });
        Ok(())
    }

    /// Waits for an answer, or until a server has ended.
    pub(super) fn answers<T>(
        &mut self,
        what: &str,
        mut look: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let mut ended = None;
        let answer = within(START_OR_END, what, || {
            for server in &mut self.running {
                if let Some(status) = server.process.try_wait().context("looking after a server")? {
                    ended = Some(format!("{} ended by itself: {status}", server.name));
                    return Ok(None);
                }
            }
            Ok(look()?.map(Some))
        });
        match (answer, ended) {
            (Ok(Some(answer)), _) => Ok(answer),
            (Err(error), Some(ended)) => Err(error).context(ended),
            (Err(error), None) => Err(error),
            (Ok(None), _) => bail!("{what}: no answer"),
        }
    }

    /// Their process ids.
    pub(super) fn pids(&self) -> impl Iterator<Item = u32> + '_ {
        self.running.iter().map(|server| server.process.id())
    }

    /// Ends all without a warning, the last one first.
    pub(super) fn kill(&mut self) {
        while let Some(mut server) = self.running.pop() {
            let _ = server.process.kill();
            let _ = server.process.wait();
        }
    }

    /// Asks each to end, and kills it if it does not. The kubelet first, or it would see the others
    /// vanish.
    pub(super) fn end(&mut self) {
        while let Some(mut server) = self.running.pop() {
            if let Ok(pid) = i32::try_from(server.process.id()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            // Only the kubelet has something to clean up; the API server would wait for its
            // clients.
            let patience = if server.name == "kubelet" { ANSWER } else { Duration::from_secs(1) };
            if within(patience, "a server ends", || Ok(server.process.try_wait()?)).is_err() {
                let _ = server.process.kill();
                let _ = server.process.wait();
            }
        }
    }

    /// The last lines of each. Copies of the whole logs are left in `kept`.
    pub(super) fn last_words(&self, kept: &Path) -> String {
        let _ = fs::create_dir_all(kept);
        let mut words = String::new();
        for server in &self.running {
            let log = fs::read(self.log(server.name)).unwrap_or_default();
            let _ = fs::write(kept.join(format!("{}.log", server.name)), &log);
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default();
            words += &format!("the last lines of {}:\n{}\n", server.name, last.join("\n"));
        }
        words
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.end();
    }
}
