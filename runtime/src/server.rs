//! The socket and the gRPC server on it.

use crate::api;
use crate::cri::{ImageService, RuntimeService};
use crate::http2;
use berth_api::v1::berth_server::BerthServer;
use berth_cri::MAX_MESSAGE_BYTES;
use berth_cri::v1::image_service_server::ImageServiceServer;
use berth_cri::v1::runtime_service_server::RuntimeServiceServer;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;

/// How long calls may go on after the daemon was told to end. Pods do not depend on it.
const LAST_CALLS: Duration = Duration::from_secs(3);

/// How long somebody who listens may take to take a connection.
const ANSWER: Duration = Duration::from_secs(1);

/// How long to wait when a connection cannot be accepted: without descriptors the next try fails like the last, and connections wait in the
/// socket's queue.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket's file.
    #[error("listen on {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else listens on the socket.
    #[error("another process serves {path}; end it, or give this one its own --socket")]
    Served {
        /// Where.
        path: PathBuf,
    },
    /// The server.
    #[error("the server ended")]
    Server(#[source] tonic::transport::Error),
}

/// What is served.
#[derive(Debug)]
pub(crate) struct Services {
    pub(crate) runtime: RuntimeService,
    pub(crate) image: ImageService,
    pub(crate) berth: api::Service,
}

/// Serves on the socket at `path` until `stop` resolves, and then removes the socket's file. Calls `listening` once connections
/// are accepted.
///
/// # Errors
/// [`ServeError`].
pub(crate) async fn serve(
    path: &Path,
    services: Services,
    listening: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    if is_served(path).await {
        return Err(ServeError::Served { path: path.to_owned() });
    }
    let listener = listen(path).map_err(|source| ServeError::Listen { path: path.to_owned(), source })?;
    listening();
    let connections = UnixListenerStream::new(listener).then(async |connection| {
        if connection.is_err() {
            tokio::time::sleep(ACCEPT_AGAIN).await;
        }
        connection
    });
    let connections = connections.filter(|connection| match connection {
        // The file's mode keeps others out; this is the second lock. Errors (no descriptors left for a moment) pass: the server goes on.
        Ok(stream) => is_root(stream),
        Err(_) => true,
    });
    let connections = connections.map(|connection| connection.map(http2::Connection::new));
    let (close, closing) = oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .http2_max_header_list_size(http2::MAX_HEADER_LIST)
        .max_frame_size(http2::MAX_FRAME)
        .add_service(
            RuntimeServiceServer::new(services.runtime)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            ImageServiceServer::new(services.image)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            BerthServer::new(services.berth)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        )
        .serve_with_incoming_shutdown(connections, async {
            // A sender that has gone means the same as one that spoke.
            let _ = closing.await;
        });
    let ending = async {
        stop.await;
        let _ = close.send(());
        tokio::time::sleep(LAST_CALLS).await;
    };
    let result = tokio::select! {
        result = server => result.map_err(ServeError::Server),
        // A pull or a command that still runs; whoever waits for it sees the connection end and asks again.
        () = ending => Ok(()),
    };
    // A client that sees no file knows at once that nobody listens.
    let _ = std::fs::remove_file(path);
    result
}

fn is_root(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0)
}

/// Whether somebody listens there: a file that a crash left refuses the connection. One who has no room for more is there as well.
async fn is_served(path: &Path) -> bool {
    !matches!(tokio::time::timeout(ANSWER, UnixStream::connect(path)).await, Ok(Err(_)))
}

/// Binds under another name and renames, so that the socket appears with its mode, over whatever a crash left.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(parent)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o660))?;
    std::fs::rename(&temporary, path)?;
    Ok(listener)
}
