//! `runtime.v1.RuntimeService`.
//!
//! Each call converts, asks the part that owns the object, and converts back. What changes something runs in
//! a task of its own: when a client goes away its request is finished all the same, and nothing is left half
//! done.

use super::convert::{self, ContainerFilter, ContainerView, Field, SandboxFilter, SandboxView};
use super::status::{CallError, failed};
use super::{info, metrics, stats};
use crate::container::{self, Container, ContainerError};
use crate::handlers::Handler;
use crate::node::Node;
use crate::registry::Found;
use crate::sandbox::{self, Sandbox};
use crate::streaming::Streaming;
use crate::usage::Samples;
use berth_cri::v1;
use berth_model::container::Config as ContainerConfig;
use berth_model::state::{ContainerState, SandboxState};
use berth_streaming::command::Wanted;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

/// What kubelets take for the version of the CRI's users; both peers say this.
const KUBELET_API_VERSION: &str = "0.1.0";

/// Items in one message of a streaming list. A container with its labels and annotations has some kilobytes,
/// a message 16 MiB.
const PAGE: usize = 500;

/// The same for metrics of pods. A container has some 60 of them, each with its labels: about 25 KB.
const METRICS_PAGE: usize = 50;

/// The stream of a streaming list.
pub(crate) type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A list in messages of [`PAGE`] items; no message at all for an empty one.
pub(super) fn pages<T: Clone + Send + 'static, M: Send + 'static>(
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> M + Send + 'static,
) -> Response<Items<M>> {
    pages_of(PAGE, items, message)
}

/// The same with another number of items in each.
fn pages_of<T: Clone + Send + 'static, M: Send + 'static>(
    page: usize,
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> M + Send + 'static,
) -> Response<Items<M>> {
    let messages: Vec<Result<M, Status>> =
        items.chunks(page).map(|page| Ok(message(page.to_vec()))).collect();
    Response::new(Box::pin(tokio_stream::iter(messages)))
}

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct RuntimeService {
    node: Arc<Node>,
    samples: Arc<Samples>,
    streaming: Arc<Streaming>,
}

impl RuntimeService {
    pub(crate) fn new(node: Arc<Node>, streaming: Streaming) -> Self {
        Self { node, samples: Arc::default(), streaming: Arc::new(streaming) }
    }

    fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, CallError> {
        found("sandbox", id, self.node.registry.find_sandbox(id))
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, CallError> {
        found("container", id, self.node.registry.find_container(id))
    }

    async fn run_sandbox(
        &self,
        request: v1::RunPodSandboxRequest,
    ) -> Result<v1::RunPodSandboxResponse, CallError> {
        let message = request.config.ok_or(CallError::Missing("config"))?;
        let config =
            convert::sandbox_config(message, &request.runtime_handler, &self.node.handlers, self.selinux())?;
        let node = self.node.clone();
        let sandbox = apart(async move { Ok(sandbox::create::create(node, config).await?) }).await?;
        Ok(v1::RunPodSandboxResponse { pod_sandbox_id: sandbox.id().to_string() })
    }

    async fn stop_sandbox(&self, id: &str) -> Result<(), CallError> {
        let Some(sandbox) = absent_is_none(self.sandbox(id))? else { return Ok(()) };
        let node = self.node.clone();
        apart(async move { Ok(sandbox::stop::stop(&node, &sandbox).await?) }).await
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), CallError> {
        let Some(sandbox) = absent_is_none(self.sandbox(id))? else { return Ok(()) };
        let (node, samples) = (self.node.clone(), self.samples.clone());
        apart(async move {
            sandbox::stop::remove(&node, &sandbox).await?;
            samples.forget(sandbox.id().as_str());
            Ok(())
        })
        .await
    }

    fn sandbox_status(
        &self,
        request: &v1::PodSandboxStatusRequest,
    ) -> Result<v1::PodSandboxStatusResponse, CallError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        Ok(v1::PodSandboxStatusResponse {
            status: Some(convert::sandbox_status(&view_of_sandbox(&sandbox))),
            info: if request.verbose { info::sandbox(&sandbox) } else { BTreeMap::new() },
            ..v1::PodSandboxStatusResponse::default()
        })
    }

    fn sandboxes(&self, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
        let filter = SandboxFilter::new(filter);
        let mut sandboxes = self.node.registry.sandboxes();
        sandboxes.sort_by_key(|sandbox| std::cmp::Reverse(sandbox.created_at_unix_ns()));
        let views = sandboxes.iter().map(|sandbox| view_of_sandbox(sandbox));
        views.filter(|view| filter.matches(view)).map(|view| convert::sandbox(&view)).collect()
    }

    async fn make_container(
        &self,
        request: v1::CreateContainerRequest,
    ) -> Result<v1::CreateContainerResponse, CallError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        let message = request.config.ok_or(CallError::Missing("config"))?;
        let config = convert::container_config(message, sandbox.config(), self.selinux())?;
        let node = self.node.clone();
        let container =
            apart(async move { Ok(container::create::create(node, sandbox, config).await?) }).await?;
        Ok(v1::CreateContainerResponse { container_id: container.id().to_string() })
    }

    async fn start(&self, id: &str) -> Result<(), CallError> {
        let container = self.container(id)?;
        apart(async move { Ok(container::start::start(&container).await?) }).await
    }

    async fn stop(&self, id: &str, seconds: i64) -> Result<(), CallError> {
        let Some(container) = absent_is_none(self.container(id))? else { return Ok(()) };
        // Negative is "at once". A grace beyond a year is one that nobody waits for.
        let grace = Duration::from_secs(u64::try_from(seconds).unwrap_or(0).min(365 * 24 * 3600));
        apart(async move { Ok(container::stop::stop(&container, grace).await?) }).await
    }

    async fn remove(&self, id: &str) -> Result<(), CallError> {
        let Some(container) = absent_is_none(self.container(id))? else { return Ok(()) };
        let (node, samples) = (self.node.clone(), self.samples.clone());
        apart(async move {
            container::remove::remove(&node, &container).await?;
            samples.forget(container.id().as_str());
            Ok(())
        })
        .await
    }

    fn containers(&self, filter: &ContainerFilter) -> Vec<Arc<Container>> {
        let mut containers = self.node.registry.containers();
        containers.sort_by_key(|container| std::cmp::Reverse(container.record().created_at_unix_ns));
        containers.retain(|container| Seen::now(container).with_view(|view| filter.matches(view)));
        containers
    }

    fn container_messages(&self, filter: Option<v1::ContainerFilter>) -> Vec<v1::Container> {
        let containers = self.containers(&ContainerFilter::new(filter));
        containers.iter().map(|container| Seen::now(container).with_view(convert::container)).collect()
    }

    fn container_status(
        &self,
        request: &v1::ContainerStatusRequest,
    ) -> Result<v1::ContainerStatusResponse, CallError> {
        let container = self.container(&request.container_id)?;
        Ok(v1::ContainerStatusResponse {
            status: Some(Seen::now(&container).with_view(convert::container_status)),
            info: if request.verbose { info::container(&container) } else { BTreeMap::new() },
        })
    }

    async fn update(&self, request: v1::UpdateContainerResourcesRequest) -> Result<(), CallError> {
        let container = self.container(&request.container_id)?;
        let linux = request.linux.ok_or(CallError::Missing("linux"))?;
        apart(async move {
            container::update::resources(&container, |current| {
                Ok(convert::updated_resources(&Field::root("linux"), current, &linux)?)
            })
            .await
        })
        .await
    }

    fn selinux(&self) -> convert::SeLinux {
        if self.node.facts.selinux_is_on { convert::SeLinux::On } else { convert::SeLinux::Off }
    }

    async fn run_command(&self, request: v1::ExecSyncRequest) -> Result<v1::ExecSyncResponse, CallError> {
        let container = self.container(&request.container_id)?;
        if request.cmd.is_empty() {
            return Err(CallError::Missing("cmd"));
        }
        let limit =
            u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
        // Not apart: a caller that goes away takes this future along, and with it the program.
        let output =
            container::exec::exec_sync(&container, &self.node.output_room, request.cmd, limit).await?;
        let (stdout, stderr) = fitting(output.stdout, output.stderr);
        Ok(v1::ExecSyncResponse { stdout, stderr, exit_code: output.exit_code })
    }

    fn exec_url(&self, request: v1::ExecRequest) -> Result<v1::ExecResponse, CallError> {
        let container = self.container(&request.container_id)?;
        if request.cmd.is_empty() {
            return Err(CallError::Missing("cmd"));
        }
        let wanted = wanted_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        container.running_shim()?;
        Ok(v1::ExecResponse { url: self.streaming.exec(container, request.cmd, wanted)? })
    }

    fn port_forward_url(
        &self,
        request: &v1::PortForwardRequest,
    ) -> Result<v1::PortForwardResponse, CallError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        if let Some(port) = request.port.iter().find(|port| !(1..=65535).contains(*port)) {
            return Err(CallError::Argument(format!("port {port} is not from 1 to 65535")));
        }
        if sandbox.state() != SandboxState::Ready {
            return Err(ContainerError::SandboxNotReady { id: sandbox.id().clone() }.into());
        }
        Ok(v1::PortForwardResponse { url: self.streaming.port_forward(sandbox)? })
    }

    async fn stats(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>, CallError> {
        let containers = self.containers(&ContainerFilter::of_stats(filter));
        let (node, samples) = (self.node.clone(), self.samples.clone());
        tokio::task::spawn_blocking(move || {
            // One that vanishes or cannot be read does not spoil the list.
            let usages = containers.iter().filter_map(|container| samples.container(container).ok());
            Ok(usages.map(|usage| stats::container(&node, &usage)).collect())
        })
        .await
        .map_err(|_| CallError::Stopping)?
    }

    async fn stats_of(&self, id: &str) -> Result<v1::ContainerStatsResponse, CallError> {
        let container = self.container(id)?;
        let usage = self.blocking(move |_, samples| samples.container(&container)).await??;
        Ok(v1::ContainerStatsResponse { stats: Some(stats::container(&self.node, &usage)) })
    }

    async fn pod_stats(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>, CallError> {
        let filter = SandboxFilter::of_stats(filter);
        let mut sandboxes = self.node.registry.sandboxes();
        sandboxes.retain(|sandbox| filter.matches(&view_of_sandbox(sandbox)));
        let look = move |node: &Node, samples: &Samples| {
            samples.pods(node, sandboxes).iter().map(|usage| stats::pod(node, usage)).collect()
        };
        self.blocking(look).await
    }

    async fn stats_of_pod(&self, id: &str) -> Result<v1::PodSandboxStatsResponse, CallError> {
        let sandbox = self.sandbox(id)?;
        let usage = self.blocking(move |node, samples| samples.pods(node, vec![sandbox])).await?;
        Ok(v1::PodSandboxStatsResponse { stats: usage.first().map(|usage| stats::pod(&self.node, usage)) })
    }

    async fn pod_metrics(&self) -> Result<Vec<v1::PodSandboxMetrics>, CallError> {
        let sandboxes = self.node.registry.sandboxes();
        self.blocking(move |node, samples| metrics::of_pods(node, samples, sandboxes)).await
    }

    /// Looks at the node on a thread that may wait for files.
    async fn blocking<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Node, &Samples) -> T + Send + 'static,
    ) -> Result<T, CallError> {
        let (node, samples) = (self.node.clone(), self.samples.clone());
        tokio::task::spawn_blocking(move || look(&node, &samples)).await.map_err(|_| CallError::Stopping)
    }

    fn health(&self, verbose: bool) -> v1::StatusResponse {
        let condition = |kind: &str, state: Result<(), (&str, String)>| v1::RuntimeCondition {
            r#type: kind.to_owned(),
            status: state.is_ok(),
            reason: state.as_ref().err().map(|(reason, _)| (*reason).to_owned()).unwrap_or_default(),
            message: state.err().map(|(_, message)| message).unwrap_or_default(),
        };
        let network = self.node.network().map_err(|message| ("NetworkPluginNotReady", message));
        let handler = |handler: &Handler| v1::RuntimeHandler {
            name: handler.name.clone(),
            features: Some(v1::RuntimeHandlerFeatures {
                recursive_read_only_mounts: handler.features.recursive_read_only_mounts,
                user_namespaces: handler.features.user_namespaces,
            }),
        };
        v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![condition("RuntimeReady", Ok(())), condition("NetworkReady", network)],
            }),
            info: if verbose { info::node(&self.node) } else { BTreeMap::new() },
            runtime_handlers: self.node.handlers.iter().map(handler).collect(),
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..v1::RuntimeFeatures::default()
            }),
        }
    }
}

/// The streams of a request for them.
fn wanted_streams(stdin: bool, stdout: bool, stderr: bool, terminal: bool) -> Result<Wanted, CallError> {
    if terminal && stderr {
        return Err(CallError::Argument(
            "tty and stderr exclude each other: a terminal has one output".into(),
        ));
    }
    if !(stdin || stdout || stderr) {
        return Err(CallError::Argument(
            "at least one of stdin, stdout and stderr has to be asked for".into(),
        ));
    }
    Ok(Wanted { stdin, stdout, stderr, terminal })
}

/// Cuts the two streams so that their message is one that clients accept; each may be as long as a message
/// by itself. What is cut is the end of the longer one, and as little as possible.
fn fitting(mut stdout: Vec<u8>, mut stderr: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    // Tags, lengths and the exit code take less than this.
    const ENVELOPE: usize = 64;
    let room = berth_cri::MAX_MESSAGE_BYTES - ENVELOPE;
    if stdout.len() + stderr.len() > room {
        let half = room / 2;
        if stderr.len() <= half {
            stdout.truncate(room - stderr.len());
        } else if stdout.len() <= half {
            stderr.truncate(room - stdout.len());
        } else {
            stdout.truncate(half);
            stderr.truncate(half);
        }
    }
    (stdout, stderr)
}

/// Runs what must be finished, whatever becomes of the client.
async fn apart<T: Send + 'static>(
    work: impl Future<Output = Result<T, CallError>> + Send + 'static,
) -> Result<T, CallError> {
    tokio::spawn(work).await.map_err(|_| CallError::Stopping)?
}

fn found<T>(kind: &'static str, id: &str, found: Found<T>) -> Result<T, CallError> {
    // A text from a client goes into a message; an id is never longer than this.
    let shown = || id.chars().take(128).collect();
    match found {
        Found::One(one) => Ok(one),
        Found::Nothing => Err(CallError::NotFound { kind, id: shown() }),
        Found::Ambiguous => Err(CallError::Ambiguous { kind, id: shown() }),
    }
}

/// Stop and remove succeed on what is not there.
fn absent_is_none<T>(result: Result<T, CallError>) -> Result<Option<T>, CallError> {
    match result {
        Ok(one) => Ok(Some(one)),
        Err(CallError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn view_of_sandbox(sandbox: &Sandbox) -> SandboxView<'_> {
    SandboxView {
        id: sandbox.id(),
        config: sandbox.config(),
        created_at_unix_ns: sandbox.created_at_unix_ns(),
        state: sandbox.state(),
        addresses: sandbox.addresses(),
    }
}

/// A container at one moment.
struct Seen<'a> {
    container: &'a Container,
    state: ContainerState,
    /// With the limits in force, where they are not those of the request.
    config: Option<ContainerConfig>,
}

impl<'a> Seen<'a> {
    fn now(container: &'a Container) -> Self {
        let resources = container.resources();
        let config = (resources != container.config().resources)
            .then(|| ContainerConfig { resources, ..container.config().clone() });
        Self { container, state: container.state(), config }
    }

    fn with_view<T>(&self, look: impl FnOnce(&ContainerView<'_>) -> T) -> T {
        let record = self.container.record();
        look(&ContainerView {
            id: &record.id,
            sandbox_id: &record.sandbox_id,
            config: self.config.as_ref().unwrap_or(&record.config),
            image_id: &record.image_id,
            image_name: &record.image_name,
            image_ref: &record.image_ref,
            created_at_unix_ns: record.created_at_unix_ns,
            state: &self.state,
            log_path: &record.log_path,
            uid: record.uid,
            gid: record.gid,
            groups: &record.groups,
            stop_signal: record.stop_signal,
        })
    }
}

const ATTACH: &str = "attach is not offered yet; exec is";
const EVENTS: &str = "container events are not offered yet; lists are";
const CHECKPOINT: &str = "checkpoint and restore are not offered yet";

fn not_offered<T>(call: &'static str, what: &'static str) -> Result<T, Status> {
    Err(failed(call, &CallError::NotOffered(what)))
}

macro_rules! answer {
    ($call:literal, $result:expr) => {
        $result.map(Response::new).map_err(|error| failed($call, &error))
    };
}

#[tonic::async_trait]
impl v1::runtime_service_server::RuntimeService for RuntimeService {
    async fn version(
        &self,
        _request: Request<v1::VersionRequest>,
    ) -> Result<Response<v1::VersionResponse>, Status> {
        Ok(Response::new(v1::VersionResponse {
            version: KUBELET_API_VERSION.to_owned(),
            runtime_name: "berth".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Result<Response<v1::RunPodSandboxResponse>, Status> {
        answer!("RunPodSandbox", self.run_sandbox(request.into_inner()).await)
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Result<Response<v1::StopPodSandboxResponse>, Status> {
        let stopped = self.stop_sandbox(&request.into_inner().pod_sandbox_id).await;
        answer!("StopPodSandbox", stopped.map(|()| v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Result<Response<v1::RemovePodSandboxResponse>, Status> {
        let removed = self.remove_sandbox(&request.into_inner().pod_sandbox_id).await;
        answer!("RemovePodSandbox", removed.map(|()| v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Result<Response<v1::PodSandboxStatusResponse>, Status> {
        answer!("PodSandboxStatus", self.sandbox_status(&request.into_inner()))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Result<Response<v1::ListPodSandboxResponse>, Status> {
        Ok(Response::new(v1::ListPodSandboxResponse { items: self.sandboxes(request.into_inner().filter) }))
    }

    type StreamPodSandboxesStream = Items<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let sandboxes = self.sandboxes(request.into_inner().filter);
        Ok(pages(sandboxes, |pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Result<Response<v1::CreateContainerResponse>, Status> {
        answer!("CreateContainer", self.make_container(request.into_inner()).await)
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Result<Response<v1::StartContainerResponse>, Status> {
        let started = self.start(&request.into_inner().container_id).await;
        answer!("StartContainer", started.map(|()| v1::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Result<Response<v1::StopContainerResponse>, Status> {
        let request = request.into_inner();
        let stopped = self.stop(&request.container_id, request.timeout).await;
        answer!("StopContainer", stopped.map(|()| v1::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Result<Response<v1::RemoveContainerResponse>, Status> {
        let removed = self.remove(&request.into_inner().container_id).await;
        answer!("RemoveContainer", removed.map(|()| v1::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        let containers = self.container_messages(request.into_inner().filter);
        Ok(Response::new(v1::ListContainersResponse { containers }))
    }

    type StreamContainersStream = Items<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let containers = self.container_messages(request.into_inner().filter);
        Ok(pages(containers, |containers| v1::StreamContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Result<Response<v1::ContainerStatusResponse>, Status> {
        answer!("ContainerStatus", RuntimeService::container_status(self, &request.into_inner()))
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Result<Response<v1::UpdateContainerResourcesResponse>, Status> {
        let updated = self.update(request.into_inner()).await;
        answer!("UpdateContainerResources", updated.map(|()| v1::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Result<Response<v1::ReopenContainerLogResponse>, Status> {
        let reopened = async {
            let container = self.container(&request.into_inner().container_id)?;
            container::update::reopen_log(&container).await?;
            Ok::<_, CallError>(v1::ReopenContainerLogResponse {})
        };
        answer!("ReopenContainerLog", reopened.await)
    }

    async fn exec_sync(
        &self,
        request: Request<v1::ExecSyncRequest>,
    ) -> Result<Response<v1::ExecSyncResponse>, Status> {
        answer!("ExecSync", self.run_command(request.into_inner()).await)
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Result<Response<v1::ExecResponse>, Status> {
        answer!("Exec", self.exec_url(request.into_inner()))
    }

    async fn attach(
        &self,
        _request: Request<v1::AttachRequest>,
    ) -> Result<Response<v1::AttachResponse>, Status> {
        not_offered("Attach", ATTACH)
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Result<Response<v1::PortForwardResponse>, Status> {
        answer!("PortForward", self.port_forward_url(request.get_ref()))
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Result<Response<v1::ContainerStatsResponse>, Status> {
        answer!("ContainerStats", self.stats_of(&request.into_inner().container_id).await)
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Result<Response<v1::ListContainerStatsResponse>, Status> {
        let stats = self.stats(request.into_inner().filter).await;
        answer!("ListContainerStats", stats.map(|stats| v1::ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = Items<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let stats = self.stats(request.into_inner().filter).await;
        let stats = stats.map_err(|error| failed("StreamContainerStats", &error))?;
        Ok(pages(stats, |container_stats| v1::StreamContainerStatsResponse { container_stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Result<Response<v1::PodSandboxStatsResponse>, Status> {
        answer!("PodSandboxStats", self.stats_of_pod(&request.into_inner().pod_sandbox_id).await)
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Result<Response<v1::ListPodSandboxStatsResponse>, Status> {
        let stats = self.pod_stats(request.into_inner().filter).await;
        answer!("ListPodSandboxStats", stats.map(|stats| v1::ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = Items<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let stats = self.pod_stats(request.into_inner().filter).await;
        let stats = stats.map_err(|error| failed("StreamPodSandboxStats", &error))?;
        Ok(pages(stats, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Result<Response<v1::UpdateRuntimeConfigResponse>, Status> {
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config);
        if let Some(cidr) = network.map(|network| network.pod_cidr).filter(|cidr| !cidr.is_empty()) {
            tracing::info!(
                cidr, ipv4 = %self.node.bridge.config().ipv4,
                "the kubelet names a pod network; the built-in bridge keeps the one of the configuration"
            );
        }
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new(self.health(request.into_inner().verbose)))
    }

    async fn checkpoint_container(
        &self,
        _request: Request<v1::CheckpointContainerRequest>,
    ) -> Result<Response<v1::CheckpointContainerResponse>, Status> {
        not_offered("CheckpointContainer", CHECKPOINT)
    }

    async fn checkpoint_pod(
        &self,
        _request: Request<v1::CheckpointPodRequest>,
    ) -> Result<Response<v1::CheckpointPodResponse>, Status> {
        not_offered("CheckpointPod", CHECKPOINT)
    }

    async fn restore_pod(
        &self,
        _request: Request<v1::RestorePodRequest>,
    ) -> Result<Response<v1::RestorePodResponse>, Status> {
        not_offered("RestorePod", CHECKPOINT)
    }

    type GetContainerEventsStream = Items<v1::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _request: Request<v1::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        not_offered("GetContainerEvents", EVENTS)
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Result<Response<v1::ListMetricDescriptorsResponse>, Status> {
        Ok(Response::new(v1::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Result<Response<v1::ListPodSandboxMetricsResponse>, Status> {
        let pods = self.pod_metrics().await;
        answer!(
            "ListPodSandboxMetrics",
            pods.map(|pod_metrics| v1::ListPodSandboxMetricsResponse { pod_metrics })
        )
    }

    type StreamPodSandboxMetricsStream = Items<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let pods = self.pod_metrics().await;
        let pods = pods.map_err(|error| failed("StreamPodSandboxMetrics", &error))?;
        Ok(pages_of(METRICS_PAGE, pods, |pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        }))
    }

    async fn runtime_config(
        &self,
        _request: Request<v1::RuntimeConfigRequest>,
    ) -> Result<Response<v1::RuntimeConfigResponse>, Status> {
        let driver = match self.node.cgroup_driver {
            berth_cgroup::Driver::Cgroupfs => v1::CgroupDriver::Cgroupfs,
            berth_cgroup::Driver::Systemd => v1::CgroupDriver::Systemd,
        };
        let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        Ok(Response::new(v1::RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<v1::UpdatePodSandboxResourcesResponse>, Status> {
        // The kubelet has changed the pod's cgroup itself; it tells, and nothing here depends on it.
        let known = self.sandbox(&request.into_inner().pod_sandbox_id);
        answer!("UpdatePodSandboxResources", known.map(|_| v1::UpdatePodSandboxResourcesResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn a_request_for_streams_names_some_and_no_second_output_of_a_terminal() {
        let all = [false, true];
        for (stdin, stdout, stderr, terminal) in all.into_iter().flat_map(|stdin| {
            all.into_iter().flat_map(move |stdout| {
                all.into_iter().flat_map(move |stderr| all.map(|terminal| (stdin, stdout, stderr, terminal)))
            })
        }) {
            let wanted = wanted_streams(stdin, stdout, stderr, terminal);
            assert_eq!(wanted.is_ok(), (stdin || stdout || stderr) && !(terminal && stderr));
        }
    }

    #[test]
    fn the_output_of_a_command_fits_into_a_message_and_is_cut_no_more_than_needed() {
        const MIB: usize = 1024 * 1024;
        for (out, err) in [
            (0, 0),
            (5, 7),
            (16 * MIB, 0),
            (0, 16 * MIB),
            (16 * MIB, 16 * MIB),
            (15 * MIB, 2 * MIB),
            (MIB, 16 * MIB),
        ] {
            let (stdout, stderr) = fitting(vec![0; out], vec![0; err]);
            let length = stdout.len() + stderr.len();
            assert!(length == out + err || length > 16 * MIB - 100, "{out} {err}");
            let message = v1::ExecSyncResponse { stdout, stderr, exit_code: i32::MIN };
            assert!(message.encoded_len() <= berth_cri::MAX_MESSAGE_BYTES, "{out} {err}");
        }
    }
}
