//! A worker as the daemon has it: a process, and a connection on which it is asked and answers.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_shim_proto::frame;
use berth_sys::ending::{Ending, ending};
use berth_sys::process::{Program, SIGKILL};
use berth_sys::{process, socket};

use super::message::{Answer, At, Tell, path_of};
use super::worker;

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) pid: i32,
    pub(super) connection: OwnedFd,
    /// What it has said and nobody has heard.
    pub(super) received: Vec<u8>,
}

impl Worker {
    pub(super) fn start() -> io::Result<Self> {
        let (connection, theirs) = socket::stream_pair()?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let (null, theirs) = (null.as_fd(), theirs.as_fd());
        let args = [c"berthd".to_owned(), CString::new(worker::WORD)?];
        // This program, whatever is in its file by now.
        let program = Program {
            path: c"/proc/self/exe",
            args: &args,
            env: &[],
            descriptors: &[null, null, null, theirs],
        };
        Ok(Self::new(process::spawn(&program)?, connection))
    }

    pub(super) fn new(pid: i32, connection: OwnedFd) -> Self {
        Self { pid, connection, received: Vec::new() }
    }

    /// Puts a question, and listens until it is answered. Where the worker is in between goes to
    /// `is_at`, and its `patience` begins again from there.
    pub(super) fn converse(
        &mut self,
        frame: &[u8],
        patience: Duration,
        is_at: impl FnMut(&At),
    ) -> io::Result<Heard> {
        let connection = self.connection.as_fd();
        // It reads what it is sent, unless it was stopped.
        socket::limit_sends(connection, patience)?;
        match worker::send_all(connection, frame, &[]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Heard::Silence(patience, None)),
            sent => sent.and_then(|()| self.listen(patience, is_at)),
        }
    }

    /// Listens for an answer.
    pub(super) fn listen(&mut self, patience: Duration, mut is_at: impl FnMut(&At)) -> io::Result<Heard> {
        let connection = self.connection.as_fd();
        let (mut limit, mut at) = (patience, None);
        let mut end = Instant::now() + limit;
        let (mut descriptors, mut buffer) = (Vec::new(), [0; 16 * 1024]);
        loop {
            while let Some(answer) = frame::take::<Answer>(&mut self.received).map_err(io::Error::other)? {
                match answer.tell {
                    Some(Tell::At(now)) => {
                        is_at(&now);
                        limit = patience + Duration::from_millis(now.milliseconds.unwrap_or(0));
                        end = Instant::now() + limit;
                        at = Some(path_of(&now.path).to_owned());
                    }
                    Some(tell) => return Ok(Heard::Answer(tell, descriptors)),
                    None => return Err(io::ErrorKind::InvalidData.into()),
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if left < Duration::from_millis(1) {
                return Ok(Heard::Silence(limit, at));
            }
            socket::limit_waits(connection, left)?;
            match socket::receive(connection, &mut buffer) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((length, more)) => {
                    self.received.extend_from_slice(buffer.get(..length).unwrap_or_default());
                    descriptors.extend(more);
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What a worker has said.
#[derive(Debug)]
pub(super) enum Heard {
    /// With descriptors.
    Answer(Tell, Vec<OwnedFd>),
    /// Nothing more for so long, and where it was, if it has said.
    Silence(Duration, Option<PathBuf>),
}

/// Processes that were started by a worker.
#[derive(Debug, Default)]
pub(super) struct Started(pub(super) Vec<OwnedFd>);

impl Started {
    /// By the worker `pid`, and there still.
    pub(super) fn all(pid: i32) -> Self {
        Self(process::children(pid).into_iter().filter_map(|child| process::open_pidfd(child).ok()).collect())
    }

    /// Those of them that were killed and cannot end.
    pub(super) fn killed(pid: i32) -> Self {
        let was_killed = |child: &i32| matches!(ending(*child), Ok(Ending::Killed | Ending::Over));
        let killed = process::children(pid).into_iter().filter(was_killed);
        let mut killed = Self(killed.filter_map(|child| process::open_pidfd(child).ok()).collect());
        killed.forget_ended();
        killed
    }

    pub(super) fn kill(&self) {
        for process in &self.0 {
            let _ = process::signal_pidfd(process.as_fd(), SIGKILL);
        }
    }

    /// Whether there is one left.
    pub(super) fn forget_ended(&mut self) -> bool {
        self.0.retain(|process| !process::has_ended(process.as_fd()).unwrap_or(false));
        !self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_reads_nothing_is_given_up() {
        let (connection, _kept) = socket::stream_pair().unwrap();
        let mut worker = Worker::new(0, connection);
        let heard = worker.converse(&vec![0; 4 << 20], Duration::from_millis(50), |_| {}).unwrap();
        assert!(matches!(heard, Heard::Silence(_, None)), "{heard:?}");
    }

    #[test]
    fn each_step_of_a_worker_has_its_own_time() {
        let (connection, theirs) = socket::stream_pair().unwrap();
        let mut worker = Worker::new(0, connection);
        let at = |path: &str, milliseconds| {
            let at = At { path: path.as_bytes().to_vec(), milliseconds };
            let frame = frame::encode(&Answer::from(Tell::At(at))).unwrap();
            worker::send_all(theirs.as_fd(), &frame, &[]).unwrap();
        };
        at("/held", None);
        at("/plugin", Some(30));
        let mut seen = Vec::new();
        let heard = worker.converse(&[], Duration::from_millis(20), |at| seen.push(at.clone())).unwrap();
        let Heard::Silence(limit, Some(path)) = heard else { panic!("{heard:?}") };
        assert_eq!((limit, path), (Duration::from_millis(50), PathBuf::from("/plugin")));
        assert_eq!(seen.len(), 2);
    }
}
