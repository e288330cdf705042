//! `berthd --reload PID`: a running daemon reads its configuration again, and the caller learns
//! whether it did.
//!
//! A signal has no answer. So the daemon keeps a file in its runtime state open, `FILE`, and writes
//! its progress into it; a process that may read `/proc/PID/fd` finds it there, whatever the
//! daemon's flags and configuration are.
//!
//! The file has a line with three numbers, and then a text: how many times the daemon has started
//! to read its configuration, the number of the last completed time, the length of the text in
//! bytes; the text says what was wrong that time, and is empty if nothing was.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_sys::errno::ESRCH;
use berth_sys::process;
use berth_sys::process::SIGHUP;

/// Its name, in the runtime state.
const FILE: &str = "reload";

/// How often the file is polled.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// How long a daemon may take. It reads a few small files, but the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// The daemon's side.
#[derive(Debug)]
pub(crate) struct Progress {
    file: File,
    begun: u64,
    done: u64,
    mistakes: String,
}

impl Progress {
    /// Creates the file in the runtime state.
    ///
    /// # Errors
    /// When it cannot be created.
    pub(crate) fn create(state: &Path) -> io::Result<Self> {
        let file = File::options().write(true).create(true).truncate(true).open(state.join(FILE))?;
        let progress = Self { file, begun: 0, done: 0, mistakes: String::new() };
        progress.write()?;
        Ok(progress)
    }

    /// The configuration is about to be read.
    pub(crate) fn begin(&mut self) {
        self.begun += 1;
        self.tell();
    }

    /// It was read, with these mistakes, or none.
    pub(crate) fn finish(&mut self, mistakes: &str) {
        self.done = self.begun;
        mistakes.clone_into(&mut self.mistakes);
        self.tell();
    }

    fn tell(&self) {
        if let Err(error) = self.write() {
            tracing::warn!(%error, "cannot report that the configuration was reloaded");
        }
    }

    fn write(&self) -> io::Result<()> {
        let Self { file, begun, done, mistakes } = self;
        file.write_all_at(format!("{begun} {done} {}\n{mistakes}", mistakes.len()).as_bytes(), 0)
    }
}

/// Why a daemon did not reload its configuration.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// It found mistakes and kept its configuration.
    #[error("{0}")]
    Mistakes(String),
    /// The process is not a daemon that can reload.
    #[error("process {pid} is not a berthd that can reload its configuration")]
    NoDaemon {
        /// Its number.
        pid: i32,
    },
    /// The request failed.
    #[error("cannot {action} process {pid}")]
    Ask {
        /// The operation.
        action: &'static str,
        /// Its number.
        pid: i32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It has ended.
    #[error("process {pid} ended before it reloaded its configuration")]
    Ended {
        /// Its number.
        pid: i32,
    },
    /// It did not answer.
    #[error("process {pid} did not reload its configuration within {LIMIT:?}")]
    Late {
        /// Its number.
        pid: i32,
    },
}

/// Makes the daemon with this process id reload its configuration, and waits until the new values
/// are in force. Blocking.
///
/// # Errors
/// [`ReloadError`].
pub fn reload(pid: i32) -> Result<(), ReloadError> {
    let ask = |action| move |source| ReloadError::Ask { action, pid, source };
    let pidfd = process::open_pidfd(pid).map_err(ask("open"))?;
    let file = find(pid).map_err(ask("find the progress file of"))?.ok_or(ReloadError::NoDaemon { pid })?;
    let begun = read(&file).map_err(ask("read the progress of"))?.begun;
    process::signal_pidfd(pidfd.as_fd(), SIGHUP).map_err(ask("signal"))?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let seen = read(&file).map_err(ask("read the progress of"))?;
        // A reload in progress may have read the files before they were changed.
        if seen.done > begun {
            return if seen.mistakes.is_empty() { Ok(()) } else { Err(ReloadError::Mistakes(seen.mistakes)) };
        }
        // Signal 0 only checks that it exists.
        match process::signal_pidfd(pidfd.as_fd(), 0) {
            Err(error) if error.raw_os_error() == Some(ESRCH) => return Err(ReloadError::Ended { pid }),
            _ => {}
        }
        if Instant::now() > deadline {
            return Err(ReloadError::Late { pid });
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The file among those that the process has open.
fn find(pid: i32) -> io::Result<Option<File>> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let link: PathBuf = entry?.path();
        // One that was closed meanwhile is not the file.
        let Ok(target) = std::fs::read_link(&link) else { continue };
        if target.file_name().is_some_and(|name| name == FILE) {
            return File::open(link).map(Some);
        }
    }
    Ok(None)
}

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    begun: u64,
    done: u64,
    mistakes: String,
}

fn read(file: &File) -> io::Result<Seen> {
    let mut tries = 0;
    loop {
        let mut bytes = vec![0; 1 << 16];
        let length = file.read_at(&mut bytes, 0)?;
        bytes.truncate(length);
        match parse(&bytes) {
            Some(seen) => return Ok(seen),
            // It is being written.
            None if tries < 100 => tries += 1,
            None => return Err(io::ErrorKind::InvalidData.into()),
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn parse(bytes: &[u8]) -> Option<Seen> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let mut numbers = std::str::from_utf8(bytes.get(..end)?).ok()?.split(' ').map(str::parse::<u64>);
    let (begun, done) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    let length = usize::try_from(numbers.next()?.ok()?).ok()?;
    // An earlier text may have been longer.
    let text = bytes.get(end + 1..)?.get(..length)?;
    Some(Seen { begun, done, mistakes: String::from_utf8_lossy(text).into_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_whatever_was_there_before() {
        let directory = tempfile::tempdir().unwrap();
        let mut progress = Progress::create(directory.path()).unwrap();
        let file = File::open(directory.path().join(FILE)).unwrap();
        let seen = |begun, done, mistakes: &str| Seen { begun, done, mistakes: mistakes.to_owned() };
        assert_eq!(read(&file).unwrap(), seen(0, 0, ""));
        progress.begin();
        assert_eq!(read(&file).unwrap(), seen(1, 0, ""));
        progress.finish("two lines\nof mistakes");
        assert_eq!(read(&file).unwrap(), seen(1, 1, "two lines\nof mistakes"));
        progress.begin();
        progress.finish("");
        assert_eq!(read(&file).unwrap(), seen(2, 2, ""));
        assert_eq!(find(i32::try_from(std::process::id()).unwrap()).unwrap().map(|_| ()), Some(()));
    }

    #[test]
    fn what_is_half_written_is_not_taken() {
        for bytes in [&b""[..], b"1 1", b"1 1 5\nshor", b"1 x 0\n", b"1 1\n", b"-1 1 0\n"] {
            assert_eq!(parse(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn a_process_that_is_no_daemon_is_not_signalled() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(matches!(reload(pid), Err(ReloadError::NoDaemon { .. })));
        assert!(child.try_wait().unwrap().is_none(), "it runs still");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(reload(pid), Err(ReloadError::Ask { .. })));
    }
}
