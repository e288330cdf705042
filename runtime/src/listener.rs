//! Sockets on which the daemon listens: for root only, and visible only once they answer.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_sys::ending::{Ending, ending};
use tokio::net::{UnixListener, UnixStream};

use crate::file_error::FileError;

/// How long a listener may take to accept a connection.
const ANSWER: Duration = Duration::from_secs(1);

/// How long to wait when a connection cannot be accepted: without descriptors the next attempt
/// fails like the last, and connections wait in the socket's queue.
pub(crate) const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Binds under another name and renames, so that the socket appears with its mode, replacing any
/// file there.
pub(crate) fn bind(path: &Path, mode: u32) -> Result<UnixListener, FileError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(FileError::of("remove", &temporary)(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&temporary).map_err(FileError::of("listen on", &temporary))?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode))
        .map_err(FileError::of("set the mode of", &temporary))?;
    std::fs::rename(&temporary, path).map_err(FileError::of("rename the new socket to", path))?;
    Ok(listener)
}

/// The outcome of an attempt to connect to a socket.
#[derive(Debug)]
pub(crate) enum Knock {
    /// There is a listener, though its backlog may be full.
    Served,
    /// There is none: `ECONNREFUSED` for a file that a crash has left.
    Unserved(io::Error),
}

/// Whether a process listens on the socket at `path`.
pub(crate) async fn knock(path: &Path) -> Knock {
    match tokio::time::timeout(ANSWER, UnixStream::connect(path)).await {
        Ok(Err(error)) => Knock::Unserved(error),
        // The kernel connects to the socket of a process that was killed and cannot end.
        Ok(Ok(stream)) if listener_is_over(&stream) => {
            Knock::Unserved(io::ErrorKind::ConnectionRefused.into())
        }
        Ok(Ok(_)) | Err(_) => Knock::Served,
    }
}

/// Whether the listener was killed. A Unix socket's peer is the process as of its listen.
fn listener_is_over(stream: &UnixStream) -> bool {
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
    pid.is_some_and(|pid| matches!(ending(pid), Ok(Ending::Over | Ending::Killed)))
}

/// Whether the client is root. The file's mode keeps others out; this is a second check.
pub(crate) fn is_root(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_takes_the_place_of_one_that_nobody_serves() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        assert!(
            matches!(knock(&path).await, Knock::Unserved(error) if error.kind() == io::ErrorKind::NotFound)
        );
        drop(bind(&path, 0o600).unwrap());
        assert!(
            matches!(knock(&path).await, Knock::Unserved(error) if error.kind() == io::ErrorKind::ConnectionRefused)
        );
        let listener = bind(&path, 0o660).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(knock(&path).await, Knock::Served));
        let (stream, _) = listener.accept().await.unwrap();
        assert!(is_root(&stream), "tests run as root");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
        let absent = bind(&directory.path().join("absent/socket"), 0o600).unwrap_err();
        assert_eq!(absent.action, "listen on");
    }
}
