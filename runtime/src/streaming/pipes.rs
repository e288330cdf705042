//! Pipes between the daemon and a shim, and a client's streams: what exec and attach have in
//! common.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use berth_streaming::command::Input;
use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

/// Bytes read at a time.
const READ_BYTES: usize = 32 * 1024;

/// How a client's input came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputEnd {
    /// The client has ended it.
    Client,
    /// It is not read any more.
    Program,
}

/// A pipe whose output is read here; the second end is the shim's.
pub(super) fn output() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = berth_sys::file::pipe()?;
    berth_sys::file::set_nonblocking(read.as_fd())?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

/// A pipe for input that is written here; the second end is the shim's.
pub(super) fn input() -> io::Result<(pipe::Sender, OwnedFd)> {
    let (read, write) = berth_sys::file::pipe()?;
    berth_sys::file::set_nonblocking(write.as_fd())?;
    Ok((pipe::Sender::from_owned_fd(write)?, read))
}

/// Reads what is there, once something is. The buffer takes room only then: most streams are silent
/// most of the time.
pub(super) async fn read(from: &pipe::Receiver, buffer: &mut BytesMut) -> io::Result<usize> {
    loop {
        from.readable().await?;
        buffer.reserve(READ_BYTES);
        match from.try_read_buf(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => *buffer = BytesMut::new(),
            read => return read,
        }
    }
}

/// Copies a client's input; its end is passed on by closing the pipe.
pub(super) async fn copy_in(mut from: Input, mut to: pipe::Sender) -> InputEnd {
    while let Some(bytes) = from.receive().await {
        if to.write_all(&bytes).await.is_err() {
            return InputEnd::Program;
        }
    }
    InputEnd::Client
}
