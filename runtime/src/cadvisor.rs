//! What a cAdvisor asks CRI-O, answered for Berth's containers: an opt-in socket (`[compat]
//! cadvisor`).
//!
//! The cAdvisor in a kubelet can interpret cgroups only of the runtimes it was written for. With
//! any other runtime, the metrics at `/metrics/cadvisor` lack the names of pods and containers, and
//! pods have no network metrics. Its protocol for CRI-O is the smallest: HTTP/1.1 on the fixed path
//! `/var/run/crio/crio.sock` (cAdvisor 0.56, `container/crio/client.go`), two requests:
//!
//! ```text
//! GET /info               {"storage_driver", "storage_root"}
//! GET /containers/<id>    {"name", "pid", "image", "created_time", "labels", "annotations",
//!                          "log_path", "root", "ip_address", "ip_addresses"}
//! ```
//!
//! It asks for each cgroup whose name begins with `crio` and has an id in it. So with this option
//! containers' cgroups are called `crio-<id>.scope` ([`berth_cgroup::Naming`]), and a pod with its
//! own network gets an empty cgroup named after the sandbox, [`show`]: network is measured for the
//! "container" whose label `io.kubernetes.container.name` is `POD`, in the network namespace of its
//! pid, and the the the the the the kubelet takes a pod's network from the entry whose cgroup has
//! the sandbox's id.
//!
//! Nothing else of CRI-O is implemented, and nothing here can keep the daemon from serving pods:
//! failures are logged. A request is answered from memory and a few files of procfs; connections,
//! their length and their duration are limited.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_cgroup::Cgroup;
use berth_cri::labels::{CONTAINER_NAME, POD_NAME, POD_NAMESPACE, POD_UID};
use berth_model::id::{ContainerId, SandboxId};
use berth_model::security::NamespaceMode;
use berth_model::{container, sandbox};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use crate::container::Container;
use crate::file_error::FileError;
use crate::listener::{self, Knock};
use crate::node::Node;
use crate::registry::Found;
use crate::sandbox::Sandbox;

/// Connections at a time. A cAdvisor has one for each cgroup that it is examining.
const MAX_CONNECTIONS: usize = 32;

/// The longest head of a request (real ones have 100 bytes): the least that hyper can be set
/// to.
const MAX_REQUEST_BYTES: usize = 8192;

/// How long a connection may take to send its request, and in all.
const HEAD: Duration = Duration::from_secs(5);
const CONNECTION: Duration = Duration::from_secs(30);

/// How long an answer waits for a container that is being created: its cgroup, which cAdvisor has
/// seen, exists before the container is. cAdvisor looks again only after minutes.
const BEING_MADE: Duration = Duration::from_secs(10);
const BEING_MADE_LOOK: Duration = Duration::from_millis(10);

/// The mode of the socket file.
const MODE: u32 = 0o600;

/// The container name that means "the pod itself" to cAdvisor and the kubelet.
const POD: &str = "POD";

/// Why the socket is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    /// Another runtime serves it already.
    #[error(
        "another program is listening on {path}: CRI-O, or another berthd with compat.cadvisor; stop it, or turn this option off"
    )]
    Taken {
        /// The file or directory.
        path: PathBuf,
    },
    /// Something other than the socket of a crashed daemon.
    #[error("{path} exists and is not a socket")]
    NoSocket {
        /// The file or directory.
        path: PathBuf,
    },
    /// An error of the file or its directory.
    #[error(transparent)]
    File(#[from] FileError),
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ListenError {
    let error = FileError::of(action, path);
    move |source| error(source).into()
}

/// A socket that is open and not served yet.
#[derive(Debug)]
struct Bound {
    listener: UnixListener,
    /// The directory, if it was made for the socket.
    made: Option<PathBuf>,
    /// Device and inode of the file.
    identity: (u64, u64),
}

/// The open socket. [`Socket::close`] removes its file.
#[derive(Debug)]
pub(crate) struct Socket {
    path: PathBuf,
    /// The directory, if it was made for the socket.
    made: Option<PathBuf>,
    /// Device and inode of the file, so that only our own is removed.
    identity: (u64, u64),
    task: tokio::task::JoinHandle<()>,
}

impl Socket {
    /// Stops listening and removes the file, and the directory if it was made for it and is empty.
    pub(crate) fn close(self) {
        self.task.abort();
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // What cannot be removed is replaced by the next daemon.
            let _ = std::fs::remove_file(&self.path);
            let _ = self.made.map(std::fs::remove_dir);
        }
    }
}

/// Starts to serve, if the configuration asks for it. If the socket cannot be opened, that is
/// logged and the daemon continues without it.
pub(crate) async fn start(node: &Arc<Node>) -> Option<Socket> {
    let config = node.config();
    let path = config.cadvisor_socket.as_deref()?;
    match listen(path).await {
        Ok(Bound { listener, made, identity }) => {
            tracing::info!(socket = %path.display(), "serving cAdvisor");
            let task = tokio::spawn(serve(listener, node.clone()));
            Some(Socket { path: path.to_owned(), made, identity, task })
        }
        Err(error) => {
            tracing::warn!(
                error = %crate::chain(&error),
                "cannot serve cAdvisor: metrics of this node will lack the names of pods and containers"
            );
            None
        }
    }
}

/// Creates the socket, replacing one without a listener.
async fn listen(path: &Path) -> Result<Bound, ListenError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(file("examine", path)(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NoSocket { path: path.to_owned() });
        }
        Ok(_) => match listener::knock(path).await {
            // unix(7): a socket file without a listener refuses connections.
            Knock::Unserved(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Knock::Unserved(error) => return Err(file("connect to", path)(error)),
            Knock::Served => return Err(ListenError::Taken { path: path.to_owned() }),
        },
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    let made = if directory.is_dir() {
        None
    } else {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(file("create", directory))?;
        // The daemon's umask may have removed more bits.
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))
            .map_err(file("set the mode of", directory))?;
        Some(directory.to_owned())
    };
    let listener = listener::bind(path, MODE)?;
    let identity = identity(path).map_err(file("examine", path))?;
    Ok(Bound { listener, made, identity })
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Accepts connections forever.
async fn serve(listener: UnixListener, node: Arc<Node>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Never closed. Without a permit, connections wait in the kernel's queue.
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection from cAdvisor");
                tokio::time::sleep(listener::ACCEPT_AGAIN).await;
                continue;
            }
        };
        if !listener::is_root(&stream) {
            continue;
        }
        let node = node.clone();
        tokio::spawn(async move {
            let _slot = slot;
            let service = service_fn(move |request| answer(node.clone(), request));
            let connection = http1::Builder::new()
                // One request per connection: an idle one would hold a slot.
                .keep_alive(false)
                .max_buf_size(MAX_REQUEST_BYTES)
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(stream), service);
            // A peer that disconnected knows; one that took too long is disconnected.
            let _ = tokio::time::timeout(CONNECTION, connection).await;
        });
    }
}

async fn answer(node: Arc<Node>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/info") => (StatusCode::OK, info(&node)),
        (&Method::GET, path) => match path.strip_prefix("/containers/") {
            Some(id) => match described(&node, id).await {
                Some(body) => (StatusCode::OK, body),
                None => (StatusCode::NOT_FOUND, json!({ "error": "no such container" })),
            },
            None => (StatusCode::NOT_FOUND, json!({ "error": "only /info and /containers/<id> exist" })),
        },
        _ => (StatusCode::METHOD_NOT_ALLOWED, json!({ "error": "only GET is supported" })),
    };
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    Ok(response)
}

/// With "overlay" for the driver, cAdvisor would look for the writable layer in a directory `diff`
/// of the container's root, as in CRI-O's storage, and drop all metrics of a container without it.
/// An unknown name makes it skip the disk.
fn info(node: &Node) -> Value {
    json!({ "storage_driver": "berth", "storage_root": node.layout.root() })
}

/// The answer for a container or sandbox by its full id; waits for one that is being created.
async fn described(node: &Arc<Node>, id: &str) -> Option<Value> {
    let end = tokio::time::Instant::now() + BEING_MADE;
    loop {
        // In this order: it is registered before it stops being counted as in creation.
        let being_made = node.registry.is_being_made(id);
        let looking = node.clone();
        let wanted = id.to_owned();
        // Files of procfs do not block for long, but reading them is blocking I/O.
        let found = tokio::task::spawn_blocking(move || find(&looking, &wanted)).await.ok()?;
        if found.is_some() || !being_made || tokio::time::Instant::now() >= end {
            return found;
        }
        tokio::time::sleep(BEING_MADE_LOOK).await;
    }
}

fn find(node: &Node, id: &str) -> Option<Value> {
    if id.parse::<ContainerId>().is_ok()
        && let Found::One(container) = node.registry.find_container(id)
    {
        let Found::One(sandbox) = node.registry.find_sandbox(container.sandbox_id().as_str()) else {
            return None;
        };
        return Some(of_container(&container, &sandbox));
    }
    if id.parse::<SandboxId>().is_ok()
        && let Found::One(sandbox) = node.registry.find_sandbox(id)
    {
        return Some(of_sandbox(node, &sandbox));
    }
    None
}

fn of_container(container: &Container, sandbox: &Sandbox) -> Value {
    let (record, pod) = (container.record(), sandbox.config());
    json!({
        "name": container_name(&record.config.metadata, &pod.metadata),
        "pid": container.pid().unwrap_or(0),
        "image": record.image_name,
        "created_time": record.created_at_unix_ns,
        "labels": labels(&record.config.labels, &pod.metadata, &record.config.metadata.name),
        "annotations": record.config.annotations,
        "log_path": record.log_path,
        "root": container.files().durable,
        "ip_address": sandbox.addresses().first().map_or("", String::as_str),
        "ip_addresses": sandbox.addresses(),
    })
}

fn of_sandbox(node: &Node, sandbox: &Sandbox) -> Value {
    let pod = sandbox.config();
    json!({
        "name": pod_name(&pod.metadata),
        "pid": pid_in_network(node, sandbox).unwrap_or(0),
        // A sandbox needs no image.
        "image": "",
        "created_time": sandbox.created_at_unix_ns(),
        "labels": labels(&pod.labels, &pod.metadata, POD),
        "annotations": pod.annotations,
        "log_path": "",
        "root": sandbox.files().durable,
        "ip_address": sandbox.addresses().first().map_or("", String::as_str),
        "ip_addresses": sandbox.addresses(),
    })
}

/// A process in the pod's own network namespace: a container's, since a pod has none of its own, or
/// process 1 of a shared pid namespace. None on the host's network, whose metrics are not the
/// pod's. cAdvisor asks again while it gets none, and when the process has ended.
fn pid_in_network(node: &Node, sandbox: &Sandbox) -> Option<i32> {
    if sandbox.config().namespaces.network == NamespaceMode::Node {
        return None;
    }
    // A file of nsfs has the namespace's number for its inode, also where it is pinned:
    // namespaces(7).
    let namespace = number(&sandbox.files().namespace("net"))?;
    let containers = node.registry.containers_of(sandbox.id());
    let mut pids = containers.iter().filter_map(|container| container.pid()).chain(sandbox.pid());
    pids.find(|pid| number(Path::new(&format!("/proc/{pid}/ns/net"))) == Some(namespace))
}

fn number(namespace: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(namespace).ok().map(|found| (found.dev(), found.ino()))
}

/// The request's labels, and those that the kubelet looks for if a client other than a kubelet left
/// them out.
fn labels(given: &BTreeMap<String, String>, pod: &sandbox::Metadata, container: &str) -> Value {
    let mut labels = given.clone();
    for (key, value) in [(POD_NAME, &pod.name), (POD_NAMESPACE, &pod.namespace), (POD_UID, &pod.uid)] {
        labels.entry(key.to_owned()).or_insert_with(|| value.clone());
    }
    if container == POD {
        labels.insert(CONTAINER_NAME.to_owned(), POD.to_owned());
    } else {
        labels.entry(CONTAINER_NAME.to_owned()).or_insert_with(|| container.to_owned());
        // A container named POD would have its network counted again, as the pod's.
        if labels.get(CONTAINER_NAME).is_some_and(|name| name == POD) {
            labels.insert(CONTAINER_NAME.to_owned(), String::new());
        }
    }
    json!(labels)
}

/// The name of a container in monitoring, since dockershim:
/// `k8s_<container>_<pod>_<namespace>_<uid>_<attempt>`.
pub(crate) fn container_name(container: &container::Metadata, pod: &sandbox::Metadata) -> String {
    format!("k8s_{}_{}_{}_{}_{}", container.name, pod.name, pod.namespace, pod.uid, container.attempt)
}

/// The name of a pod in monitoring.
pub(crate) fn pod_name(pod: &sandbox::Metadata) -> String {
    format!("k8s_{POD}_{}_{}_{}_{}", pod.name, pod.namespace, pod.uid, pod.attempt)
}

/// Creates the empty cgroup by which cAdvisor finds the pod, if configured and missing: after the
/// pod is in the registry, so that the request that follows has an answer. A pod with its own
/// process has such a cgroup, and on the host's network there is nothing to find.
pub(crate) async fn show(node: &Arc<Node>, sandbox: &Arc<Sandbox>) {
    let namespaces = &sandbox.config().namespaces;
    if node.config().cadvisor_socket.is_none()
        || namespaces.network == NamespaceMode::Node
        || namespaces.pid == NamespaceMode::Pod
    {
        return;
    }
    // Held until it is created: a stop of the sandbox waits for it, and then removes it.
    let Some(_making) = sandbox.begin_creation() else { return };
    let (making, pod) = (node.clone(), sandbox.clone());
    let made = tokio::task::spawn_blocking(move || {
        Cgroup::create_empty(&making.cgroups.hierarchy, pod.cgroup_parent(), pod.id().as_str())
    });
    match made.await {
        Ok(Err(berth_cgroup::Error::AlreadyExists { .. })) | Ok(Ok(_)) | Err(_) => {}
        Ok(Err(error)) => tracing::warn!(
            sandbox = %sandbox.id(), error = %crate::chain(&error), "cAdvisor cannot find the network of this pod"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> sandbox::Metadata {
        sandbox::Metadata { name: "web".into(), uid: "u1".into(), namespace: "default".into(), attempt: 2 }
    }

    #[test]
    fn names_are_those_that_dashboards_look_for() {
        let container = container::Metadata { name: "main".into(), attempt: 7 };
        assert_eq!(container_name(&container, &pod()), "k8s_main_web_default_u1_7");
        assert_eq!(pod_name(&pod()), "k8s_POD_web_default_u1_2");
    }

    #[test]
    fn only_a_pod_is_labelled_as_one() {
        let given = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        for (labels_given, container, expected) in [
            (given(&[]), "main", "main"),
            (given(&[(CONTAINER_NAME, "other")]), "main", "other"),
            (given(&[(CONTAINER_NAME, "POD")]), "main", ""),
            (given(&[]), "POD", "POD"),
            (given(&[(CONTAINER_NAME, "x")]), "POD", "POD"),
        ] {
            let found = labels(&labels_given, &pod(), container);
            assert_eq!(found[CONTAINER_NAME], expected, "{labels_given:?}");
            assert_eq!(found[POD_NAME], "web");
        }
        assert_eq!(labels(&given(&[(POD_NAME, "given")]), &pod(), "main")[POD_NAME], "given");
    }

    fn listening(path: &Path) -> Result<Bound, ListenError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(listen(path))
    }

    #[test]
    fn the_socket_is_for_root_and_its_directory_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("crio/crio.sock");
        let bound = listening(&path).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o755));
        assert_eq!(bound.made.as_deref(), path.parent());
        assert_eq!(identity(&path).unwrap(), bound.identity);
    }

    #[test]
    fn a_socket_that_is_served_stays_and_one_that_is_not_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("crio.sock");
        let foreign = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let before = identity(&path).unwrap();
        assert!(matches!(listening(&path), Err(ListenError::Taken { .. })));
        assert_eq!(identity(&path).unwrap(), before);
        drop(foreign);
        let bound = listening(&path).unwrap();
        assert_eq!(bound.made, None);
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("crio.sock");
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(listening(&path), Err(ListenError::NoSocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(listening(&link), Err(ListenError::NoSocket { .. })));
        let under_a_file = path.join("crio.sock");
        assert!(matches!(listening(&under_a_file), Err(ListenError::File(_))));
    }
}
