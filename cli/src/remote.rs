//! Connections to the daemon's streaming server, for the URLs that the daemon returns.
//!
//! They go through the server's socket in the file system and not to the address in the URL, which
//! is for a kubelet: that works in every network namespace and chroot, and whether or not the
//! address wants TLS.

use std::io;
use std::path::{Path, PathBuf};

use berth_streaming::client::{self, ClientError, Command, Forwarded, Target};
use berth_streaming::command::Wanted;
use tokio::net::UnixStream;

use crate::daemon::Daemon;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteError {
    /// There is no socket.
    #[error(
        "there is no streaming socket {0}; the daemon's log says why, or the daemon is older than this \
         command and has to be restarted"
    )]
    NoSocket(PathBuf),
    /// Nobody answers.
    #[error("cannot connect to the daemon's streaming socket {path}: {error}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The server, or the connection, failed.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Connects to the command of a URL.
///
/// # Errors
/// [`RemoteError`].
pub(crate) async fn command(daemon: &Daemon, url: &str, wanted: Wanted) -> Result<Command, RemoteError> {
    let target = Target::of_url(url)?;
    let io = connect(&daemon.streams).await?;
    Ok(client::command(io, &target, wanted).await?)
}

/// Opens a connection to a port of a pod by a URL.
///
/// # Errors
/// [`RemoteError`].
pub(crate) async fn forward(daemon: &Daemon, url: &str, port: u16) -> Result<Forwarded, RemoteError> {
    let target = Target::of_url(url)?;
    let io = connect(&daemon.streams).await?;
    Ok(client::forward(io, &target, port).await?)
}

async fn connect(path: &Path) -> Result<UnixStream, RemoteError> {
    UnixStream::connect(path).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => RemoteError::NoSocket(path.to_owned()),
        _ => RemoteError::Connect { path: path.to_owned(), error },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("berth.sock.streams");
        assert!(matches!(connect(&path).await, Err(RemoteError::NoSocket(told)) if told == path));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(matches!(connect(&path).await, Err(RemoteError::Connect { .. })));
    }
}
