//! Noticing that a peer has closed its connection while what it has sent is not read.
//!
//! A command that does not read its input holds up the reading of its connection, and a read is how an end
//! is found otherwise.
//!
//! An end that is behind more than the socket's buffers hold is seen only when they empty: TCP delivers it
//! after the data.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Watches a socket for the peer's end, beside its reader.
#[derive(Debug)]
pub struct Hangup(std::net::TcpStream);

impl Hangup {
    /// Of a connected socket.
    ///
    /// # Errors
    /// When its descriptor cannot be duplicated.
    pub fn of(socket: &TcpStream) -> io::Result<Self> {
        socket.as_fd().try_clone_to_owned().map(|copy| Self(copy.into()))
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
        // One that is over already is what is wanted.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }

    /// Resolves when the peer has shut down its side of the connection, or it was reset: `EPOLLRDHUP` of
    /// epoll_ctl(2).
    async fn wait(&self) -> io::Result<()> {
        let watched = TcpStream::from_std(self.0.try_clone()?)?;
        while !watched.ready(Interest::READABLE).await?.is_read_closed() {
            // Nothing is read here; each further event on the socket looks again.
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
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn an_end_behind_unread_data_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        client.write_all(b"unread").await.unwrap();
        let hangup = Hangup::of(&server).unwrap();
        let gone = tokio::spawn(async move { of(Some(&hangup)).await });
        client.write_all(b"more").await.unwrap();
        tokio::task::yield_now().await;
        assert!(!gone.is_finished());
        drop(client);
        gone.await.unwrap();
    }
}
