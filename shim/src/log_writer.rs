//! The process that has a container's log open: any process that may read a file can hold its lock,
//! as `O_DIRECT` reads into a page that never arrives do on ext4, and a network disk may be gone.
//! Then this process waits in the kernel and cannot be killed, and the shim does not.
//!
//! It is a process and not a thread: the shim creates children, which is sound only for a program
//! with one thread, and a thread that waits in the kernel would keep the whole program, with
//! everything that it has open, from ending. It shares nothing with the shim but one socket, and is
//! created before the shim has anything.
//!
//! ```text
//!  shim -> writer  O path     open the log            o errno words
//!                  W entries  write them              -
//!                  R number   reopen it by its path   r number errno words
//!                  E count    so many more bytes are lost; write the rest, and end
//!                                                     e bytes lost in all
//! ```
//! Packets wait in the socket, which is a queue of limited length. When the shim is gone, the rest
//! of the queue is still written.
//!
//! A packet is taken from the queue once it is done, and the shim keeps both ends. So nothing is
//! lost with a writer that is killed: the next one continues with the packet that it was at.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_sys::poll::{Interest, Poll};
use berth_sys::process::{self, Cloned};
use berth_sys::{file, socket};

use crate::cri_log::LogFile;

pub(crate) const OPEN: u8 = b'O';
pub(crate) const WRITE: u8 = b'W';
pub(crate) const REOPEN: u8 = b'R';
pub(crate) const END: u8 = b'E';

/// The longest packet.
pub(crate) const MAX_PACKET: usize = 64 * 1024;

/// What may wait in the socket, as the kernel counts it: twice this, with its own bookkeeping,
/// socket(7).
const QUEUE_BYTES: usize = 128 * 1024;

/// How long the memory for the next packet is kept after a packet.
const IDLE: Duration = Duration::from_millis(10);

/// The process, and the queue to it, which outlasts it.
#[derive(Debug)]
pub(crate) struct Writer {
    ours: OwnedFd,
    theirs: OwnedFd,
    /// `None` when it has ended.
    pid: Option<i32>,
    since: Instant,
}

impl Writer {
    /// Creates the process.
    ///
    /// # Errors
    /// When there are no processes or descriptors left.
    pub(crate) fn spawn() -> io::Result<Self> {
        let (ours, theirs) = socket::packet_pair()?;
        file::set_nonblocking(ours.as_fd())?;
        file::set_nonblocking(theirs.as_fd())?;
        socket::set_send_room(ours.as_fd(), QUEUE_BYTES)?;
        let mut writer = Self { ours, theirs, pid: None, since: Instant::now() };
        writer.run(None)?;
        Ok(writer)
    }

    /// Creates a process to replace one that has ended. With a directory and a name, it continues
    /// that log.
    ///
    /// # Errors
    /// When there are no processes left.
    pub(crate) fn replace(&mut self, log: Option<(PathBuf, PathBuf)>) -> io::Result<()> {
        self.since = Instant::now();
        self.run(log)
    }

    fn run(&mut self, log: Option<(PathBuf, PathBuf)>) -> io::Result<()> {
        match process::clone_process(0, None)? {
            Cloned::Child => process::exit_now(i32::from(serve(&self.theirs, log).is_err())),
            Cloned::Parent { pid, .. } => self.pid = Some(pid),
        }
        Ok(())
    }

    /// The shim's end of the queue.
    pub(crate) fn queue(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }

    /// The process, until it is reaped.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// When the last process was created.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// Notes that a child was reaped; returns whether it was this one.
    pub(crate) fn reaped(&mut self, pid: i32) -> bool {
        self.pid.take_if(|own| *own == pid).is_some()
    }

    /// A writer that is the calling test itself, which gets its end of the socket.
    #[cfg(test)]
    pub(crate) fn of_test() -> (Self, OwnedFd) {
        let (ours, theirs) = socket::packet_pair().unwrap();
        file::set_nonblocking(ours.as_fd()).unwrap();
        file::set_nonblocking(theirs.as_fd()).unwrap();
        let end = theirs.try_clone().unwrap();
        (Self { ours, theirs, pid: Some(0), since: Instant::now() }, end)
    }
}

fn serve(socket: &OwnedFd, log: Option<(PathBuf, PathBuf)>) -> io::Result<()> {
    process::close_all_but(&[socket.as_fd()])?;
    process::set_name(&CString::new(berth_shim_proto::LOG_WRITER)?)?;
    let poll = Poll::new()?;
    poll.watch(socket.as_fd(), 0, Interest::Input)?;
    let mut log = log.map(LogFile::go_on);
    let mut packet = Vec::new();
    loop {
        // Kept as long as more comes soon.
        if packet.is_empty() || poll.wait(Some(IDLE))?.is_empty() {
            packet = Vec::new();
            poll.wait(None)?;
        }
        packet.resize(MAX_PACKET, 0);
        loop {
            match socket::peek(socket.as_fd(), &mut packet) {
                Ok(length) => match packet.get(..length).and_then(<[u8]>::split_first) {
                    Some((kind, content)) => {
                        if let Some(answer) = obey(*kind, content, &mut log) {
                            // A shim that is gone does not need it.
                            let _ = socket::send(socket.as_fd(), &answer, &[]);
                        }
                        if *kind == END {
                            return Ok(());
                        }
                        socket::drop_packet(socket.as_fd())?;
                    }
                    // The shim is gone.
                    None => return Ok(()),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Handles a packet; returns the answer, if it has one.
fn obey(kind: u8, content: &[u8], log: &mut Option<LogFile>) -> Option<Vec<u8>> {
    match kind {
        OPEN => {
            let result = LogFile::open(path(content)).map(|opened| *log = Some(opened));
            Some(outcome(b"o", result))
        }
        REOPEN => {
            let result = log.as_mut().map_or(Err(io::ErrorKind::NotFound.into()), LogFile::reopen);
            Some(outcome(&[b"r", content].concat(), result))
        }
        WRITE => {
            if let Some(log) = log {
                log.write(content);
            }
            None
        }
        _ => {
            let more = content.try_into().map_or(0, u64::from_le_bytes);
            let lost = log.as_mut().map_or(more, |log| log.end(more));
            Some([b"e", lost.to_le_bytes().as_slice()].concat())
        }
    }
}

/// A directory and a name in it, separated by a byte that neither contains.
pub(crate) fn path_of(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, b"\0", name].concat()
}

/// Splits it into these two parts.
pub(crate) fn path(content: &[u8]) -> (PathBuf, PathBuf) {
    let mut parts = content.splitn(2, |byte| *byte == 0).map(|part| Path::new(OsStr::from_bytes(part)));
    let mut next = || parts.next().unwrap_or(Path::new("")).to_owned();
    (next(), next())
}

fn outcome(head: &[u8], result: io::Result<()>) -> Vec<u8> {
    let (errno, words) = match result {
        Ok(()) => (0, String::new()),
        Err(error) => match error.raw_os_error() {
            Some(errno) => (errno, String::new()),
            None => (NOT_THE_KERNELS, error.to_string()),
        },
    };
    [head, &i32::to_le_bytes(errno), words.as_bytes()].concat()
}

/// In place of an error number, for an error that is described in words only.
const NOT_THE_KERNELS: i32 = -1;

/// A message of the writer.
#[derive(Debug)]
pub(crate) enum Answer {
    Opened(io::Result<()>),
    /// The answer to the request with this number.
    Reopened(u32, io::Result<()>),
    /// Everything is written, except for this many bytes.
    Ended(u64),
}

/// Parses an answer; `None` for anything else.
pub(crate) fn answer(packet: &[u8]) -> Option<Answer> {
    let (kind, content) = packet.split_first()?;
    if *kind == b'e' {
        return content.try_into().ok().map(|bytes| Answer::Ended(u64::from_le_bytes(bytes)));
    }
    match kind {
        b'o' => Some(Answer::Opened(result(content)?)),
        b'r' => {
            let (number, content) = content.split_first_chunk()?;
            Some(Answer::Reopened(u32::from_le_bytes(*number), result(content)?))
        }
        _ => None,
    }
}

fn result(content: &[u8]) -> Option<io::Result<()>> {
    let (errno, words) = content.split_first_chunk()?;
    Some(match i32::from_le_bytes(*errno) {
        0 => Ok(()),
        NOT_THE_KERNELS => Err(io::Error::other(String::from_utf8_lossy(words).into_owned())),
        errno => Err(io::Error::from_raw_os_error(errno)),
    })
}
