//! The process that has a container's log open: whoever may read a file can hold its lock, as
//! `O_DIRECT` reads into a page that never comes do on ext4, and a disk on the network may be gone.
//! Then it is this process that waits in the kernel and cannot be killed, not the shim.
//!
//! A process and not a thread: the shim makes children, which is sound for a program with one
//! thread only, and a thread that waits in the kernel would keep the whole program, with all that
//! it has open, from ending. It shares nothing with the shim but one socket, and is made before the
//! shim has anything.
//!
//! ```text
//!  shim -> writer  O path     open the log            o errno words
//!                  W entries  write them              -
//!                  R          open its path anew      r errno words
//!                  E count    so many bytes more are lost; write what is there, and end
//!                                                     e bytes lost in all
//! ```
//! Packets wait in the socket, which is a queue of limited length. When the shim is gone, what is
//! in there is still written.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// How long after a packet the room for the next one is kept.
const IDLE: Duration = Duration::from_millis(10);

/// Makes the process; the socket to it.
///
/// # Errors
/// When there is no process or no descriptor to be had.
pub(crate) fn spawn() -> io::Result<OwnedFd> {
    let (ours, theirs) = socket::packet_pair()?;
    file::set_nonblocking(ours.as_fd())?;
    file::set_nonblocking(theirs.as_fd())?;
    socket::set_send_room(ours.as_fd(), QUEUE_BYTES)?;
    match process::clone_process(0, None)? {
        Cloned::Child => {
            drop(ours);
            process::exit_now(i32::from(serve(&theirs).is_err()))
        }
        Cloned::Parent { .. } => Ok(ours),
    }
}

fn serve(socket: &OwnedFd) -> io::Result<()> {
    process::close_all_but(&[socket.as_fd()])?;
    process::set_name(&CString::new(berth_shim_proto::LOG_WRITER)?)?;
    let poll = Poll::new()?;
    poll.watch(socket.as_fd(), 0, Interest::Input)?;
    let mut log = None;
    let mut packet = Vec::new();
    loop {
        // Kept as long as more comes soon.
        if packet.is_empty() || poll.wait(Some(IDLE))?.is_empty() {
            packet = Vec::new();
            poll.wait(None)?;
        }
        packet.resize(MAX_PACKET, 0);
        loop {
            match socket::receive(socket.as_fd(), &mut packet) {
                Ok((length, _)) => match packet.get(..length).and_then(<[u8]>::split_first) {
                    Some((kind, content)) => {
                        if let Some(answer) = obey(*kind, content, &mut log) {
                            // A shim that is gone does not need it.
                            let _ = socket::send(socket.as_fd(), &answer, &[]);
                        }
                        if *kind == END {
                            return Ok(());
                        }
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

/// Does what a packet says; the answer, if there is one.
fn obey(kind: u8, content: &[u8], log: &mut Option<LogFile>) -> Option<Vec<u8>> {
    match kind {
        OPEN => {
            let result = LogFile::open(path(content)).map(|opened| *log = Some(opened));
            Some(outcome(b'o', result))
        }
        REOPEN => {
            let result = log.as_mut().map_or(Err(io::ErrorKind::NotFound.into()), LogFile::reopen);
            Some(outcome(b'r', result))
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

/// A directory and a name in it, between which there is a byte that is in neither.
pub(crate) fn path_of(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, b"\0", name].concat()
}

fn path(content: &[u8]) -> (PathBuf, PathBuf) {
    let mut parts = content.splitn(2, |byte| *byte == 0).map(|part| Path::new(OsStr::from_bytes(part)));
    let mut next = || parts.next().unwrap_or(Path::new("")).to_owned();
    (next(), next())
}

fn outcome(kind: u8, result: io::Result<()>) -> Vec<u8> {
    let (errno, words) = match result {
        Ok(()) => (0, String::new()),
        Err(error) => match error.raw_os_error() {
            Some(errno) => (errno, String::new()),
            None => (NOT_THE_KERNELS, error.to_string()),
        },
    };
    [[kind].as_slice(), &i32::to_le_bytes(errno), words.as_bytes()].concat()
}

/// Instead of an error number, for an error that is told in words.
const NOT_THE_KERNELS: i32 = -1;

/// What the writer has said.
#[derive(Debug)]
pub(crate) enum Answer {
    Opened(io::Result<()>),
    Reopened(io::Result<()>),
    /// Everything is written, but for so many bytes.
    Ended(u64),
}

/// Reads an answer; `None` for none of ours.
pub(crate) fn answer(packet: &[u8]) -> Option<Answer> {
    let (kind, content) = packet.split_first()?;
    if *kind == b'e' {
        return content.try_into().ok().map(|bytes| Answer::Ended(u64::from_le_bytes(bytes)));
    }
    let (errno, words) = content.split_first_chunk()?;
    let result = match i32::from_le_bytes(*errno) {
        0 => Ok(()),
        NOT_THE_KERNELS => Err(io::Error::other(String::from_utf8_lossy(words).into_owned())),
        errno => Err(io::Error::from_raw_os_error(errno)),
    };
    match kind {
        b'o' => Some(Answer::Opened(result)),
        b'r' => Some(Answer::Reopened(result)),
        _ => None,
    }
}
