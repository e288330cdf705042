//! Running a program of the system to its end.
//!
//! It gets nothing from the caller but its arguments, an environment and a text on its standard
//! input. It leads a process group, has a deadline and a limit on how much of its output is kept,
//! and nothing of its group is left when it has ended.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::process;

/// How long its streams are read after its end, and how long a killed program may take to
/// disappear. The streams stay open longer only if a process that has left the group holds them,
/// and a killed program stays only if it sleeps in the kernel.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The program to run.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a, A> {
    /// The file.
    pub program: &'a Path,
    /// Without the program's name.
    pub arguments: &'a [A],
    /// All of its environment.
    pub environment: &'a [(&'a str, &'a OsStr)],
    /// All of its standard input.
    pub stdin: &'a [u8],
    /// From the start to the end.
    pub deadline: Duration,
    /// How many bytes of its standard output to keep. A program that writes more is killed. With
    /// `None`, all of it is read and dropped.
    pub max_output: Option<usize>,
    /// Bytes kept of its standard error; the rest is read and dropped.
    pub max_message: usize,
    /// A connection to who wants the program: when the other end is closed, it is killed.
    pub caller: Option<BorrowedFd<'a>>,
}

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub output: Vec<u8>,
    /// It wrote more than was kept, and was killed.
    pub flooded: bool,
    /// What it wrote to standard error.
    pub message: Vec<u8>,
}

impl<A: AsRef<OsStr>> Run<'_, A> {
    /// Runs it in the root directory. `None` when it did not end in time; it was then killed.
    /// Blocking, at most a few seconds longer than the deadline.
    ///
    /// # Errors
    /// When it cannot be started or waited for, or its caller has gone away.
    pub fn to_end(&self) -> io::Result<Option<Ended>> {
        let deadline = Instant::now() + self.deadline;
        let mut child = Command::new(self.program)
            .args(self.arguments)
            .env_clear()
            .envs(self.environment.iter().copied())
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let conversation = self.converse(&mut child, deadline);
        let in_time =
            conversation.as_ref().is_ok_and(|conversation| conversation.ended || self.floods(conversation));
        // Before it is reaped, after which its number may be reused.
        kill_group(&child);
        let mut conversation = match conversation {
            Ok(conversation) => conversation,
            Err(error) => {
                thread::Builder::new().spawn(move || child.wait())?;
                return Err(error);
            }
        };
        let soon = Instant::now() + LAST_WORDS;
        conversation.go_on(soon, |conversation| conversation.ended && conversation.is_over())?;
        if !conversation.ended {
            // It sleeps in the kernel, and disappears when the kernel lets it go.
            thread::Builder::new().spawn(move || child.wait())?;
            return Ok(None);
        }
        let status = child.wait()?;
        let flooded = self.floods(&conversation);
        let Conversation { output, message, .. } = conversation;
        Ok(in_time.then_some(Ended { status, output: output.kept, flooded, message: message.kept }))
    }

    fn floods(&self, conversation: &Conversation<'_>) -> bool {
        self.max_output.is_some() && conversation.output.overflowed
    }

    /// Serves its streams until it has ended, its time is over or it has written too much.
    fn converse<'run>(&'run self, child: &mut Child, deadline: Instant) -> io::Result<Conversation<'run>> {
        let number = i32::try_from(child.id()).map_err(io::Error::other)?;
        let mut conversation = Conversation {
            process: process::open_pidfd(number)?,
            ended: false,
            input: child.stdin.take().map(|stdin| nonblocking(stdin.into())).transpose()?,
            unwritten: self.stdin,
            output: Reader::new(child.stdout.take().map(Into::into), self.max_output.unwrap_or(0))?,
            message: Reader::new(child.stderr.take().map(Into::into), self.max_message)?,
            caller: self.caller,
        };
        conversation.go_on(deadline, |conversation| conversation.ended || self.floods(conversation))?;
        Ok(conversation)
    }
}

fn kill_group(child: &Child) {
    if let Ok(group) = i32::try_from(child.id()) {
        let _ = process::signal_group(group, process::SIGKILL);
    }
}

/// A running program and its streams.
struct Conversation<'run> {
    process: OwnedFd,
    ended: bool,
    /// `None` when all is written or the program has closed its end.
    input: Option<std::fs::File>,
    unwritten: &'run [u8],
    output: Reader,
    message: Reader,
    caller: Option<BorrowedFd<'run>>,
}

impl Conversation<'_> {
    /// Whether both of its output streams are closed.
    fn is_over(&self) -> bool {
        self.output.stream.is_none() && self.message.stream.is_none()
    }

    /// Reads, writes and watches for its end until `done`, or until the deadline.
    fn go_on(&mut self, deadline: Instant, done: impl Fn(&Self) -> bool) -> io::Result<()> {
        while !done(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let [process, input, output, message, abandoned] = self.ready(left)?;
            if abandoned {
                self.caller = None;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            self.ended |= process;
            if input {
                self.write();
            }
            if output {
                self.output.read();
            }
            if message {
                self.message.read();
            }
        }
        Ok(())
    }

    /// Waits until something can be done, and returns which of process, input, output and message
    /// are ready, and whether the caller has gone away.
    fn ready(&self, left: Duration) -> io::Result<[bool; 5]> {
        let process = (!self.ended).then(|| self.process.as_fd());
        let input = self.input.as_ref().map(AsFd::as_fd);
        let output = self.output.stream.as_ref().map(AsFd::as_fd);
        let message = self.message.stream.as_ref().map(AsFd::as_fd);
        let (indices, mut watched): (Vec<_>, Vec<_>) = [process, input, output, message, self.caller]
            .into_iter()
            .enumerate()
            .filter_map(|(index, descriptor)| {
                let interest = match index {
                    1 => PollFlags::POLLOUT,
                    // A hang-up is always told.
                    4 => PollFlags::empty(),
                    _ => PollFlags::POLLIN,
                };
                descriptor.map(|descriptor| (index, PollFd::new(descriptor, interest)))
            })
            .unzip();
        // Rounded up to the next millisecond, so that a fraction of one does not spin.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut watched, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = [false; 5];
        for (index, watched) in indices.into_iter().zip(watched) {
            ready[index] = watched.any().unwrap_or(true);
        }
        Ok(ready)
    }

    fn write(&mut self) {
        let Some(input) = &mut self.input else { return };
        match input.write(self.unwritten) {
            Ok(written) => self.unwritten = &self.unwritten[written..],
            Err(error) if is_passing(&error) => {}
            // A program that stops reading early explains that in its message and status.
            Err(_) => self.unwritten = &[],
        }
        if self.unwritten.is_empty() {
            self.input = None;
        }
    }
}

/// The output of a program on one of its streams.
struct Reader {
    /// `None` when it is closed.
    stream: Option<std::fs::File>,
    kept: Vec<u8>,
    most: usize,
    overflowed: bool,
}

impl Reader {
    fn new(stream: Option<OwnedFd>, most: usize) -> io::Result<Self> {
        Ok(Self { stream: stream.map(nonblocking).transpose()?, kept: Vec::new(), most, overflowed: false })
    }

    /// Reads once. A full pipe would stop the program, so a message that is too long is read to its
    /// end.
    fn read(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        let mut buffer = [0; 16 << 10];
        match stream.read(&mut buffer) {
            Ok(0) => self.stream = None,
            Ok(length) => {
                let room = self.most.saturating_sub(self.kept.len());
                self.kept.extend_from_slice(&buffer[..length.min(room)]);
                self.overflowed |= length > room;
            }
            Err(error) if is_passing(&error) => {}
            Err(_) => self.stream = None,
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn nonblocking(stream: OwnedFd) -> io::Result<std::fs::File> {
    let stream = std::fs::File::from(stream);
    crate::file::set_nonblocking(stream.as_fd())?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn shell(script: &str, deadline: Duration) -> Option<Ended> {
        Run {
            program: Path::new("/bin/sh"),
            arguments: &["-c", script],
            environment: &[("PATH", "/usr/bin:/bin".as_ref())],
            stdin: b"input\n",
            deadline,
            max_output: Some(1024),
            max_message: 4096,
            caller: None,
        }
        .to_end()
        .unwrap()
    }

    fn runs(pid: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    }

    #[test]
    fn the_input_and_the_environment_arrive_and_nothing_else() {
        let ended = shell("read line; echo \"$line\"; env | grep -v -e ^PWD= -e ^_=", PATIENCE).unwrap();
        assert!(ended.status.success());
        let output = String::from_utf8(ended.output).unwrap();
        let mut lines: Vec<&str> = output.lines().filter(|line| !line.starts_with("SHLVL=")).collect();
        lines.sort_unstable();
        assert_eq!(lines, ["PATH=/usr/bin:/bin", "input"]);
    }

    #[test]
    fn a_program_whose_caller_goes_away_is_killed() {
        let file = std::env::temp_dir().join(format!("berth-program-{}", std::process::id()));
        let script =
            format!("trap '' TERM; echo $$ >{0}.new; mv {0}.new {0}; sleep 1000 & wait", file.display());
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let pid = thread::scope(|scope| {
            let running = scope.spawn(|| {
                Run {
                    program: Path::new("/bin/sh"),
                    arguments: &["-c", &script],
                    environment: &[("PATH", "/usr/bin:/bin".as_ref())],
                    stdin: b"",
                    deadline: 10 * PATIENCE,
                    max_output: None,
                    max_message: 0,
                    caller: Some(ours.as_fd()),
                }
                .to_end()
                .map(drop)
            });
            while !file.exists() {
                thread::sleep(Duration::from_millis(5));
            }
            drop(theirs);
            let error = running.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
            let pid = std::fs::read_to_string(&file).unwrap();
            std::fs::remove_file(&file).unwrap();
            pid
        });
        let end = Instant::now() + PATIENCE;
        while runs(pid.trim()) {
            assert!(Instant::now() < end, "it runs on");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn both_outputs_are_kept_up_to_a_bound() {
        let script = "head -c 1000000 /dev/zero | tr '\\0' x >&2; head -c 1024 /dev/zero; exit 3";
        let ended = shell(script, PATIENCE).unwrap();
        assert_eq!((ended.status.code(), ended.message.len()), (Some(3), 4096));
        assert_eq!((ended.output.as_slice(), ended.flooded), (&[0; 1024][..], false));
    }

    #[test]
    fn one_that_floods_its_output_is_killed_with_its_group() {
        let begin = Instant::now();
        let ended = shell("sleep 1000 & echo $! >&2; yes", Duration::from_secs(1000)).unwrap();
        assert!(ended.flooded && ended.output.len() == 1024, "{ended:?}");
        let left = String::from_utf8(ended.message).unwrap();
        while runs(left.trim()) {
            assert!(begin.elapsed() < PATIENCE, "{left} goes on");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn an_input_that_is_not_read_holds_nothing_up() {
        let stdin = vec![b'x'; 1 << 20];
        let run = Run {
            program: Path::new("/bin/sh"),
            arguments: &["-c", "echo done"],
            environment: &[],
            stdin: &stdin,
            deadline: PATIENCE,
            max_output: Some(1024),
            max_message: 0,
            caller: None,
        };
        assert_eq!(run.to_end().unwrap().unwrap().output, b"done\n");
    }

    #[test]
    fn nothing_of_its_group_is_left() {
        let begin = Instant::now();
        let ended = shell("sleep 1000 & echo $! >&2", PATIENCE).unwrap();
        let left = String::from_utf8(ended.message).unwrap();
        // Already killed, it may take a moment to disappear.
        while runs(left.trim()) {
            assert!(begin.elapsed() < PATIENCE, "{left} goes on");
            thread::sleep(Duration::from_millis(2));
        }
        assert!(shell("sleep 1000 & wait", Duration::from_millis(50)).is_none());
        assert!(begin.elapsed() < PATIENCE);
    }

    #[test]
    fn one_that_has_left_its_group_cannot_hold_the_result_back() {
        let script = "trap 'echo $!; echo result; exit' USR1
            setsid sh -c \"kill -USR1 $$; exec sleep 1000\" &
            wait";
        let ended = shell(script, PATIENCE).unwrap();
        let output = String::from_utf8(ended.output).unwrap();
        let Some((pid, "result\n")) = output.split_once('\n') else { panic!("{output}") };
        process::signal_pidfd(process::open_pidfd(pid.parse().unwrap()).unwrap().as_fd(), process::SIGKILL)
            .unwrap();
    }

    #[test]
    fn one_that_is_not_there_is_an_error() {
        let run = Run {
            program: Path::new("/nonexistent/program"),
            arguments: &["-v"],
            environment: &[],
            stdin: b"",
            deadline: PATIENCE,
            max_output: None,
            max_message: 0,
            caller: None,
        };
        assert_eq!(run.to_end().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
