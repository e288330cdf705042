//! The socket and the gRPC server on it.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_api::v1::berth_server::BerthServer;
use berth_cri::MAX_MESSAGE_BYTES;
use berth_cri::v1::image_service_server::ImageServiceServer;
use berth_cri::v1::runtime_service_server::RuntimeServiceServer;
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;

use crate::api;
use crate::call_deadline::CallDeadline;
use crate::cri::{ImageService, RuntimeService};
use crate::file_error::FileError;
use crate::http2;
use crate::listener::{self, Knock};
use crate::streaming::LocalStreaming;

/// How long calls may continue after the daemon was asked to stop. Pods do not depend on it.
const LAST_CALLS: Duration = Duration::from_secs(3);

/// The mode of the socket file.
const MODE: u32 = 0o660;

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket's file.
    #[error(transparent)]
    Listen(#[from] FileError),
    /// Another process listens on the socket.
    #[error("another process is listening on {path}; stop it, or give this one its own --socket")]
    Served {
        /// The file or directory.
        path: PathBuf,
    },
    /// The server failed.
    #[error("the server failed")]
    Server(#[source] tonic::transport::Error),
}

/// What is served.
#[derive(Debug)]
pub(crate) struct Services {
    pub(crate) runtime: RuntimeService,
    pub(crate) image: ImageService,
    pub(crate) berth: api::Service,
    pub(crate) streams: LocalStreaming,
}

/// Serves on the socket at `path` until `stop` resolves, and then removes the socket's file. Calls
/// `listening` once connections are accepted.
///
/// # Errors
/// [`ServeError`].
pub(crate) async fn serve(
    path: &Path,
    services: Services,
    listening: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    if matches!(listener::knock(path).await, Knock::Served) {
        return Err(ServeError::Served { path: path.to_owned() });
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent).map_err(FileError::of("create", parent))?;
    let streams = berth_api::streams_socket(path);
    // Kubernetes does not need it.
    let _streams = services.streams.listen(&streams).inspect_err(|error| {
        let error = crate::chain(error);
        tracing::error!(path = %streams.display(), error, "cannot listen on the socket of the berth command's streams; berth exec, attach, run, cp and port-forward fail");
    });
    let listener = listener::bind(path, MODE)?;
    listening();
    let connections = UnixListenerStream::new(listener).then(async |connection| {
        if connection.is_err() {
            tokio::time::sleep(listener::ACCEPT_AGAIN).await;
        }
        connection
    });
    let connections = connections.filter(|connection| match connection {
        // Errors (no descriptors left for a moment) are temporary: the server continues.
        Ok(stream) => listener::is_root(stream),
        Err(_) => true,
    });
    let connections = connections.map(|connection| connection.map(http2::Connection::new));
    let (close, closing) = oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .http2_max_header_list_size(http2::MAX_HEADER_LIST)
        .max_frame_size(http2::MAX_FRAME)
        .layer(CallDeadline)
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
            // A dropped sender means the same as a message.
            let _ = closing.await;
        });
    let ending = async {
        stop.await;
        let _ = close.send(());
        tokio::time::sleep(LAST_CALLS).await;
    };
    let result = tokio::select! {
        result = server => result.map_err(ServeError::Server),
        // A pull or a command that still runs; its client sees the connection end and retries.
        () = ending => Ok(()),
    };
    // A client that sees no file knows at once that there is no daemon.
    let _ = std::fs::remove_file(path);
    result
}
