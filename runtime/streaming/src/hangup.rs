//! Noticing that a peer has closed its connection while its data is not being read.
//!
//! A command that does not read its input holds up the reading of its connection, and normally only
//! a read finds the end.
//!
//! TCP delivers an end only after the data before it, which may be more than the socket's buffers
//! hold. So a reader that is held up sends pings ([`crate::PROBE`]): a peer that has closed answers
//! with a reset, which comes at once.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Watches a socket for the peer's end, beside its reader.
#[derive(Debug)]
pub struct Hangup(OwnedFd);

impl Hangup {
    /// Of a connected socket.
    ///
    /// # Errors
    /// When its descriptor cannot be duplicated.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        socket.as_fd().try_clone_to_owned().map(Self)
    }

    /// The socket.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Another one for the same socket.
    pub(crate) fn again(&self) -> Option<Self> {
        self.0.try_clone().ok().map(Self)
    }

    /// Ends the connection in both directions, for all its users.
    pub(crate) fn shut_down(&self) {
        // If it has ended already, that is what was wanted.
        let _ = SockRef::from(&self.0).shutdown(Shutdown::Both);
    }

    /// Resolves when the peer has shut down its side of the connection, or it was reset:
    /// `EPOLLRDHUP` of epoll_ctl(2).
    async fn wait(&self) -> io::Result<()> {
        // TCP by type only: epoll reports the same for a Unix socket.
        let watched = TcpStream::from_std(std::net::TcpStream::from(self.0.try_clone()?))?;
        while !watched.ready(Interest::READABLE).await?.is_read_closed() {
            // Nothing is read here; each further event on the socket causes another look.
            let nothing: io::Result<()> =
                watched.try_io(Interest::READABLE, || Err(io::ErrorKind::WouldBlock.into()));
            drop(nothing);
        }
        Ok(())
    }
}

/// Resolves when the peer of `hangup` is gone; never when there is nothing to watch.
pub(crate) async fn of(hangup: Option<&Hangup>) {
    match hangup {
        Some(hangup) if hangup.wait().await.is_ok() => {}
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWrite, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    async fn is_noticed(mut client: impl AsyncWrite + Unpin, server: impl AsFd) {
        client.write_all(b"unread").await.unwrap();
        let hangup = Hangup::of(&server).unwrap();
        let gone = tokio::spawn(async move { of(Some(&hangup)).await });
        client.write_all(b"more").await.unwrap();
        tokio::task::yield_now().await;
        assert!(!gone.is_finished());
        drop(client);
        gone.await.unwrap();
    }

    #[tokio::test]
    async fn an_end_behind_unread_data_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        is_noticed(client, listener.accept().await.unwrap().0).await;
        let (client, server) = UnixStream::pair().unwrap();
        is_noticed(client, server).await;
    }
}
