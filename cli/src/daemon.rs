//! The connection to the daemon, and the calls that more than one command makes.
//!
//! One connection over the Unix socket carries CRI's two services and Berth's own. A failed call
//! becomes a [`CallError`] that says what was tried; commands add nothing to it.

use std::error::Error as _;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_api::v1::berth_client::BerthClient;
use berth_cri::MAX_MESSAGE_BYTES;
use berth_cri::v1::image_service_client::ImageServiceClient;
use berth_cri::v1::runtime_service_client::RuntimeServiceClient;
use berth_cri::v1::{
    ContainerStatus, ContainerStatusRequest, Image, ImageSpec, ImageStatusRequest, ListContainersRequest,
    ListPodSandboxRequest, PodSandboxStatus, PodSandboxStatusRequest, RemoveContainerRequest,
    RemovePodSandboxRequest, StopContainerRequest, StopPodSandboxRequest,
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::names::{Inventory, short_id};

/// How long a daemon may take for an answer that changes nothing. It waits for half a minute at
/// most for anything on the node.
const ASK_LIMIT: Duration = Duration::from_secs(60);

/// Why there is no connection to the daemon.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// There is no socket at the path.
    #[error("no socket at {0}: is berthd running? Start it, or set its socket with --socket or BERTH_SOCKET")]
    NoSocket(PathBuf),
    /// No process is listening on the socket.
    #[error("nothing is listening on {0}: is berthd running? Start it")]
    NotListening(PathBuf),
    /// The caller may not use the socket.
    #[error("no permission to use {0}: run this command as root, for example with sudo")]
    Denied(PathBuf),
    /// Any other error.
    #[error("cannot connect to {path}")]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The gRPC handshake failed.
    #[error("cannot talk to a daemon on {path}; is it berthd's socket?")]
    Handshake {
        /// Path of the socket.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: tonic::transport::Error,
    },
}

/// A call that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {act}")]
pub(crate) struct CallError {
    /// What was tried, such as "stop container 0123456789ab".
    pub(crate) act: String,
    /// What the daemon says.
    #[source]
    pub(crate) refusal: Refusal,
}

/// The daemon's answer to a call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    /// The kind of failure.
    pub(crate) code: Code,
    /// The daemon's message, or a description of the code.
    message: String,
    /// Whether there was no answer, or it was lost with the connection.
    lost: bool,
}

impl Refusal {
    fn silence(limit: Duration) -> Self {
        let seconds = limit.as_secs();
        let message = format!(
            "the daemon has accepted the call and not answered within {seconds} s; see its log, and restart it if it hangs"
        );
        Self { code: Code::DeadlineExceeded, message, lost: true }
    }

    /// Whether the daemon gave no answer or is not ready yet, as during a restart: a retry may
    /// work.
    pub(crate) fn daemon_is_away(&self) -> bool {
        self.lost || self.code == Code::Unavailable
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let code = status.code();
        // A status with a source was made on this side, from a lost connection.
        let message = match (status.source(), status.message()) {
            (Some(_), text) => {
                format!("lost the connection to the daemon ({text}); is berthd still running?")
            }
            (None, "") => code.description().to_owned(),
            (None, text) if code == Code::Unimplemented => format!("not supported by this daemon: {text}"),
            (None, text) => text.to_owned(),
        };
        Self { code, message, lost: status.source().is_some() }
    }
}

/// Waits for the answer to a call; an error begins with "cannot `act`".
///
/// # Errors
/// When the call failed.
pub(crate) async fn answer<T>(
    act: impl Into<String>,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CallError> {
    match call.await {
        Ok(response) => Ok(response.into_inner()),
        Err(status) => Err(CallError { act: act.into(), refusal: status.into() }),
    }
}

/// Waits for the answer to a call that changes nothing. A daemon that hangs, or was killed and
/// cannot end, keeps its connections and never answers.
///
/// # Errors
/// When the call failed, or was not answered in time.
pub(crate) async fn ask<T>(
    act: impl Into<String>,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CallError> {
    ask_within(ASK_LIMIT, act, call).await
}

async fn ask_within<T>(
    limit: Duration,
    act: impl Into<String>,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CallError> {
    let act = act.into();
    match tokio::time::timeout(limit, answer(act.as_str(), call)).await {
        Ok(answered) => answered,
        Err(_) => Err(CallError { act, refusal: Refusal::silence(limit) }),
    }
}

/// A request for a URL that will be asked for on the daemon's streaming socket: [`crate::remote`].
pub(crate) fn for_streams<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(berth_api::STREAMS, MetadataValue::from_static(berth_api::STREAMS_SOCKET));
    request
}

/// A connected daemon. Clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct Daemon {
    /// The CRI's runtime service.
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    /// The CRI's image service.
    pub(crate) images: ImageServiceClient<Channel>,
    /// Berth's own service.
    pub(crate) own: BerthClient<Channel>,
    /// The socket of the streams that calls answer with URLs for.
    pub(crate) streams: PathBuf,
}

impl Daemon {
    /// Connects to the socket.
    ///
    /// # Errors
    /// When there is no daemon at the path, or it may not be used.
    pub(crate) async fn connect(socket: &Path) -> Result<Self, ConnectError> {
        // Tried first on its own, because a failure inside the channel loses its kind on the way.
        UnixStream::connect(socket).await.map_err(|source| connect_error(socket, source))?;
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is never looked up; it becomes the `:authority` that CRI clients are expected
        // to send.
        let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await;
        let channel =
            channel.map_err(|source| ConnectError::Handshake { path: socket.to_owned(), source })?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            images: ImageServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            own: BerthClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            streams: berth_api::streams_socket(socket),
        })
    }

    /// Lists all pods and containers.
    ///
    /// # Errors
    /// When a list call fails.
    pub(crate) async fn inventory(&self) -> Result<Inventory, CallError> {
        let (mut for_pods, mut for_containers) = (self.runtime.clone(), self.runtime.clone());
        let pods = ask("list pods", for_pods.list_pod_sandbox(ListPodSandboxRequest::default()));
        let containers =
            ask("list containers", for_containers.list_containers(ListContainersRequest::default()));
        let (pods, containers) = tokio::try_join!(pods, containers)?;
        Ok(Inventory { pods: pods.items, containers: containers.containers })
    }

    /// The status of a container, with the free-form details if `verbose`.
    ///
    /// # Errors
    /// When the call fails, or the container is gone.
    pub(crate) async fn container_status(&self, id: &str) -> Result<ContainerStatus, CallError> {
        let act = format!("inspect container {}", short_id(id));
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let response = ask(act.as_str(), self.runtime.clone().container_status(request)).await?;
        response.status.ok_or_else(|| empty_answer(act))
    }

    /// The daemon's details about a container beyond the CRI: its pid, and its configuration.
    ///
    /// # Errors
    /// When the call fails, or the container is gone.
    pub(crate) async fn container_details(&self, id: &str) -> Result<Value, CallError> {
        let act = format!("inspect container {}", short_id(id));
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        let response = ask(act.as_str(), self.runtime.clone().container_status(request)).await?;
        let details = response.info.get("info").and_then(|text| serde_json::from_str(text).ok());
        details.ok_or_else(|| empty_answer(act))
    }

    /// The status of a pod.
    ///
    /// # Errors
    /// When the call fails, or the pod is gone.
    pub(crate) async fn pod_status(&self, id: &str) -> Result<PodSandboxStatus, CallError> {
        let act = format!("inspect pod {}", short_id(id));
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let response = ask(act.as_str(), self.runtime.clone().pod_sandbox_status(request)).await?;
        response.status.ok_or_else(|| empty_answer(act))
    }

    /// The image of a reference, if it is on the node.
    ///
    /// # Errors
    /// When the call fails; an absent image is not an error.
    pub(crate) async fn image(&self, reference: &str) -> Result<Option<Image>, CallError> {
        let request = ImageStatusRequest { image: Some(image_spec(reference)), verbose: false };
        let act = format!("inspect image {reference}");
        Ok(ask(act, self.images.clone().image_status(request)).await?.image)
    }

    /// Stops a container: its stop signal, then SIGKILL after `grace_seconds`.
    ///
    /// # Errors
    /// When the container did not end.
    pub(crate) async fn stop_container(&self, id: &str, grace_seconds: i64) -> Result<(), CallError> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: grace_seconds };
        let act = format!("stop container {}", short_id(id));
        answer(act, self.runtime.clone().stop_container(request)).await.map(|_| ())
    }

    /// Removes a container, killing it if it is running.
    ///
    /// # Errors
    /// When it could not be removed.
    pub(crate) async fn remove_container(&self, id: &str) -> Result<(), CallError> {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        let act = format!("remove container {}", short_id(id));
        answer(act, self.runtime.clone().remove_container(request)).await.map(|_| ())
    }

    /// Kills everything in a pod, and takes down its network.
    ///
    /// # Errors
    /// When part of it is left.
    pub(crate) async fn stop_pod(&self, id: &str) -> Result<(), CallError> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        answer(format!("stop pod {}", short_id(id)), self.runtime.clone().stop_pod_sandbox(request))
            .await
            .map(|_| ())
    }

    /// Removes a pod and its containers.
    ///
    /// # Errors
    /// When it could not be removed.
    pub(crate) async fn remove_pod(&self, id: &str) -> Result<(), CallError> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let act = format!("remove pod {}", short_id(id));
        answer(act, self.runtime.clone().remove_pod_sandbox(request)).await.map(|_| ())
    }
}

/// A reference as a CRI message.
pub(crate) fn image_spec(reference: &str) -> ImageSpec {
    ImageSpec { image: reference.to_owned(), ..ImageSpec::default() }
}

/// The error for an empty answer.
fn empty_answer(act: String) -> CallError {
    CallError { act, refusal: Status::internal("the daemon's answer is empty").into() }
}

fn connect_error(socket: &Path, source: io::Error) -> ConnectError {
    let path = socket.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => ConnectError::NoSocket(path),
        io::ErrorKind::ConnectionRefused => ConnectError::NotListening(path),
        io::ErrorKind::PermissionDenied => ConnectError::Denied(path),
        _ => ConnectError::Connect { path, source },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_missing_daemon_is_told_in_words() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("berth.sock");
        assert!(
            matches!(Daemon::connect(&socket).await, Err(ConnectError::NoSocket(path)) if path == socket)
        );
        drop(UnixListener::bind(&socket).unwrap());
        assert!(
            matches!(Daemon::connect(&socket).await, Err(ConnectError::NotListening(path)) if path == socket)
        );
        let far = directory.path().join("x".repeat(200));
        assert!(matches!(Daemon::connect(&far).await, Err(ConnectError::Connect { .. })));
    }

    #[tokio::test]
    async fn a_daemon_that_never_answers_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("berth.sock");
        // The kernel accepts connections for it.
        let _silent = UnixListener::bind(&socket).unwrap();
        let daemon = Daemon::connect(&socket).await.unwrap();
        let call = daemon.own.clone();
        let call = async move { { call }.info(berth_api::v1::InfoRequest {}).await };
        let error = ask_within(Duration::from_millis(10), "get information", call).await.unwrap_err();
        assert_eq!(
            (error.to_string(), error.refusal.code),
            ("cannot get information".into(), Code::DeadlineExceeded)
        );
        assert!(error.refusal.daemon_is_away() && error.refusal.to_string().contains("not answered within"));
    }

    #[test]
    fn a_refusal_is_told_in_the_daemons_words() {
        for (status, message) in [
            (Status::not_found("no container abc"), "no container abc"),
            (Status::new(Code::Internal, ""), "Internal error"),
            (Status::unimplemented("attach comes later"), "not supported by this daemon: attach comes later"),
        ] {
            assert_eq!(Refusal::from(status).to_string(), message);
        }
    }
}
