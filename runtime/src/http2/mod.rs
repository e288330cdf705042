//! Sits between a client's socket and the HTTP/2 server, so that any `:authority` is accepted.
//!
//! On a Unix socket the `:authority` of a request says nothing, and gRPC clients disagree on what
//! to send: grpc-go sends `localhost`, C-core (Python, C++, Ruby) the percent-escaped path of the
//! socket, Java and older grpc-go the plain path, some an empty string. The HTTP/2 server resets
//! every stream whose `:authority` is not one of a URI (RFC 3986 section 3.2). [`Connection`]
//! therefore gives each request the same valid one before the server sees it.
//!
//! `frames` finds the header blocks in what a client sends, `header_block` rewrites them, and
//! `resets` watches the server's answers, so that refused requests are logged. None of the three
//! does I/O; this file connects them to the socket.

mod frames;
mod header_block;
mod huffman;
mod resets;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

use frames::Frames;
use resets::{Reset, Resets};

/// The largest list of headers that a request may have, in bytes as RFC 9113 section 6.5.2 counts
/// them. The HTTP/2 server has the same limit and answers 431.
pub(crate) const MAX_HEADER_LIST: u32 = 16 * 1024;

/// The largest payload of a frame, in bytes: the initial value, and the least that may be
/// announced (RFC 9113 section 6.5.2).
pub(crate) const MAX_FRAME: u32 = 16 * 1024;

/// The most memory that an idle connection keeps for its next request, in bytes.
const KEEP: usize = 4 * 1024;

/// A client's connection, as the HTTP/2 server reads and writes it.
#[derive(Debug)]
pub(crate) struct Connection<S> {
    stream: S,
    /// The pid of the client, for the log; 0 if unknown.
    pid: i32,
    frames: Frames,
    /// How much of the output of `frames` the server has read.
    taken: usize,
    resets: Resets,
}

impl Connection<UnixStream> {
    pub(crate) fn new(stream: UnixStream) -> Self {
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or_default();
        Self::of(stream, pid)
    }
}

impl<S> Connection<S> {
    fn of(stream: S, pid: i32) -> Self {
        Self { stream, pid, frames: Frames::default(), taken: 0, resets: Resets::default() }
    }

    /// Passes on the rewritten data, as far as it fits.
    fn hand_over(&mut self, into: &mut ReadBuf<'_>) {
        let rest = self.frames.output.get(self.taken..).unwrap_or_default();
        let part = rest.get(..rest.len().min(into.remaining())).unwrap_or_default();
        into.put_slice(part);
        self.taken += part.len();
        if self.taken == self.frames.output.len() {
            self.frames.output.clear();
            self.frames.output.shrink_to(KEEP);
            self.taken = 0;
        }
    }

    /// Reads `input`, which begins with data that has to be rewritten.
    fn feed(&mut self, input: &[u8]) {
        self.frames.feed(input);
        if let Some(stream) = self.frames.take_too_large() {
            let pid = self.pid;
            tracing::warn!(
                pid,
                stream,
                "refused a request: its headers have more than {MAX_HEADER_LIST} bytes"
            );
        }
    }

    /// Examines `sent`, which went to the client.
    fn watch(&mut self, sent: &[u8]) {
        let (pid, end) = (self.pid, self.frames.end());
        self.resets.watch(sent, |reset| match (reset, end) {
            (Reset::Stream { stream, code }, _) => tracing::warn!(
                pid,
                stream,
                code,
                "refused a request: its headers or frames are invalid (log level h2=debug has details)"
            ),
            (Reset::Connection { code }, Some(why)) => {
                tracing::warn!(pid, code, "closed a connection: {why}");
            }
            (Reset::Connection { code }, None) => tracing::warn!(
                pid,
                code,
                "closed a connection: its frames are invalid (log level h2=debug has details)"
            ),
        });
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.frames.output.is_empty() {
                this.hand_over(into);
                return Poll::Ready(Ok(()));
            }
            if this.frames.end().is_some() {
                // The rest can no longer be parsed; the server has got a block that makes it close
                // the connection.
                return Poll::Ready(Ok(()));
            }
            let before = into.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(context, into))?;
            let read = into.filled().get(before..).unwrap_or_default();
            let passed = this.frames.pass(read);
            if passed == read.len() {
                return Poll::Ready(Ok(()));
            }
            this.feed(read.get(passed..).unwrap_or_default());
            into.set_filled(before + passed);
            if passed > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let length = ready!(Pin::new(&mut this.stream).poll_write(context, from))?;
        this.watch(from.get(..length).unwrap_or_default());
        Poll::Ready(Ok(length))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let length = ready!(Pin::new(&mut this.stream).poll_write_vectored(context, from))?;
        let mut left = length;
        for slice in from {
            let part = slice.get(..slice.len().min(left)).unwrap_or_default();
            this.watch(part);
            left -= part.len();
        }
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

impl<S: Connected> Connected for Connection<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> S::ConnectInfo {
        self.stream.connect_info()
    }
}
