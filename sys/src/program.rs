//! Running a program of the system to its end.
//!
//! It gets nothing of the caller's but a text on its standard input, has a process group, a deadline and a
//! bound on what it may say, and nothing of its group is left when it has ended. Takes threads, unlike the
//! rest of this crate.

use crate::process;
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(2);

/// How long what was said may take to be read after the end. Longer only if a process that has left the group
/// holds the pipe.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What is run.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a, A> {
    /// The file.
    pub program: &'a Path,
    /// Without the program's name.
    pub arguments: &'a [A],
    /// All of its standard input.
    pub stdin: &'a [u8],
    /// From the start to the end.
    pub deadline: Duration,
    /// Bytes kept of what it writes to standard error; the rest is read and dropped. Standard output goes
    /// nowhere.
    pub max_message: u64,
}

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// What it wrote to standard error.
    pub message: Vec<u8>,
}

impl<A: AsRef<OsStr>> Run<'_, A> {
    /// Runs it, in the root directory and without an environment. `None` when it did not end in time; it was
    /// killed then. Blocking.
    ///
    /// # Errors
    /// When it cannot be started or waited for.
    pub fn to_end(&self) -> io::Result<Option<Ended>> {
        let end = Instant::now() + self.deadline;
        let mut child = Command::new(self.program)
            .args(self.arguments)
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let conversation = self.converse(&mut child);
        let in_time = conversation.as_ref().is_ok_and(|_| has_ended(&child, end));
        // Before it is reaped, which is what lets its number become another's.
        if let Ok(group) = i32::try_from(child.id()) {
            let _ = process::signal_group(group, process::SIGKILL);
        }
        let status = child.wait()?;
        let message = conversation?.recv_timeout(LAST_WORDS).unwrap_or_default();
        Ok(in_time.then_some(Ended { status, message }))
    }

    /// On threads, so that a program that reads nothing or says too much cannot hold this one beyond the
    /// deadline. They end when the pipes close.
    fn converse(&self, child: &mut Child) -> io::Result<Receiver<Vec<u8>>> {
        if let Some(mut stdin) = child.stdin.take() {
            let text = self.stdin.to_owned();
            // A program that stops reading early says why in its message and status.
            thread::Builder::new().spawn(move || stdin.write_all(&text).unwrap_or_default())?;
        }
        let (said, message) = mpsc::channel();
        if let Some(stderr) = child.stderr.take() {
            let most = self.max_message;
            thread::Builder::new().spawn(move || said.send(read(stderr, most)).unwrap_or_default())?;
        }
        Ok(message)
    }
}

fn read(mut stderr: ChildStderr, most: u64) -> Vec<u8> {
    let mut message = Vec::new();
    let kept = stderr.by_ref().take(most).read_to_end(&mut message);
    // A full pipe would stop the program.
    kept.and_then(|_| io::copy(&mut stderr, &mut io::sink())).unwrap_or_default();
    message
}

/// Waits without reaping it; no, when the time is over.
fn has_ended(child: &Child, end: Instant) -> bool {
    let Ok(pid) = i32::try_from(child.id()) else { return false };
    loop {
        match process::ended_child(Some(pid)) {
            Ok(None) if Instant::now() < end => thread::sleep(POLL),
            Ok(None) => return false,
            // An error here comes again, and is told, when it is waited for.
            Ok(Some(_)) | Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn shell(script: &str, deadline: Duration) -> Option<Ended> {
        let arguments = ["-c", script];
        let stdin = b"input\n";
        Run { program: Path::new("/bin/sh"), arguments: &arguments, stdin, deadline, max_message: 4096 }
            .to_end()
            .unwrap()
    }

    fn runs(pid: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    }

    #[test]
    fn the_input_arrives_and_the_environment_does_not() {
        let ended = shell("read line && [ \"$line\" = input ] && [ -z \"$HOME$CARGO\" ]", PATIENCE).unwrap();
        assert!(ended.status.success());
    }

    #[test]
    fn what_it_says_is_kept_up_to_a_bound() {
        let ended = shell("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 3", PATIENCE).unwrap();
        assert_eq!((ended.status.code(), ended.message.len()), (Some(3), 4096));
    }

    #[test]
    fn nothing_of_its_group_is_left() {
        let begin = Instant::now();
        let ended = shell("sleep 1000 & echo $! >&2", PATIENCE).unwrap();
        let left = String::from_utf8(ended.message).unwrap();
        // Killed already, it may take a moment to be gone.
        while runs(left.trim()) {
            assert!(begin.elapsed() < PATIENCE, "{left} goes on");
            thread::sleep(POLL);
        }
        assert!(shell("sleep 1000 & wait", Duration::from_millis(50)).is_none());
        assert!(begin.elapsed() < PATIENCE);
    }

    #[test]
    fn one_that_is_not_there_is_an_error() {
        let program = Path::new("/nonexistent/program");
        let run = Run { program, arguments: &["-v"], stdin: b"", deadline: PATIENCE, max_message: 0 };
        assert_eq!(run.to_end().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
