//! `runtime.v1.RuntimeService`: its calls, and where each is.
//!
//! Each call converts the request, calls the owner of the object, and converts the result. Changes
//! run in their own task ([`apart`]): if a client goes away its request is still finished, and
//! nothing is left half done.

use std::future::Future;
use std::sync::Arc;

use berth_cri::v1;

use super::error::CallError;
use super::table::service;
use crate::container::Container;
use crate::node::Node;
use crate::registry::Found;
use crate::sandbox::Sandbox;
use crate::streaming::Streaming;
use crate::usage::Samples;

/// The service. Its calls are methods, in the file of the object that they are about.
#[derive(Debug, Clone)]
pub(crate) struct RuntimeService {
    pub(super) node: Arc<Node>,
    pub(super) samples: Arc<Samples>,
    pub(super) streaming: Arc<Streaming>,
}

service! {
    impl v1::runtime_service_server::RuntimeService as RuntimeService;
    calls {
        // `runtime`
        Version: version(VersionRequest) -> VersionResponse;
        Status: status(StatusRequest) -> StatusResponse;
        RuntimeConfig: runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
        UpdateRuntimeConfig: update_runtime_config(UpdateRuntimeConfigRequest)
            -> UpdateRuntimeConfigResponse, await;

        // `sandbox`
        RunPodSandbox: run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse, await;
        StopPodSandbox: stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse, await;
        RemovePodSandbox: remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse, await;
        PodSandboxStatus: pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
        ListPodSandbox: list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
        UpdatePodSandboxResources: update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest)
            -> UpdatePodSandboxResourcesResponse;

        // `container`
        CreateContainer: create_container(CreateContainerRequest) -> CreateContainerResponse, await;
        StartContainer: start_container(StartContainerRequest) -> StartContainerResponse, await;
        StopContainer: stop_container(StopContainerRequest) -> StopContainerResponse, await;
        RemoveContainer: remove_container(RemoveContainerRequest) -> RemoveContainerResponse, await;
        ContainerStatus: container_status(ContainerStatusRequest) -> ContainerStatusResponse;
        ListContainers: list_containers(ListContainersRequest) -> ListContainersResponse;
        UpdateContainerResources: update_container_resources(UpdateContainerResourcesRequest)
            -> UpdateContainerResourcesResponse, await;
        ReopenContainerLog: reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse, await;

        // `exec`
        ExecSync: exec_sync(ExecSyncRequest) -> ExecSyncResponse, await;

        // `stats`
        ContainerStats: container_stats(ContainerStatsRequest) -> ContainerStatsResponse, await;
        ListContainerStats: list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse, await;
        PodSandboxStats: pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse, await;
        ListPodSandboxStats: list_pod_sandbox_stats(ListPodSandboxStatsRequest)
            -> ListPodSandboxStatsResponse, await;

        // `metrics`
        ListMetricDescriptors: list_metric_descriptors(ListMetricDescriptorsRequest)
            -> ListMetricDescriptorsResponse;
        ListPodSandboxMetrics: list_pod_sandbox_metrics(ListPodSandboxMetricsRequest)
            -> ListPodSandboxMetricsResponse, await;

        // `not_offered`
        CheckpointContainer: checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
        CheckpointPod: checkpoint_pod(CheckpointPodRequest) -> CheckpointPodResponse;
        RestorePod: restore_pod(RestorePodRequest) -> RestorePodResponse;
    }
    urls {
        // `exec`
        Exec: exec(ExecRequest) -> ExecResponse;
        Attach: attach(AttachRequest) -> AttachResponse, await;
        PortForward: port_forward(PortForwardRequest) -> PortForwardResponse;
    }
    streams {
        StreamPodSandboxes: stream_pod_sandboxes(StreamPodSandboxesRequest)
            -> StreamPodSandboxesStream = StreamPodSandboxesResponse;
        StreamContainers: stream_containers(StreamContainersRequest)
            -> StreamContainersStream = StreamContainersResponse;
        StreamContainerStats: stream_container_stats(StreamContainerStatsRequest)
            -> StreamContainerStatsStream = StreamContainerStatsResponse, await;
        StreamPodSandboxStats: stream_pod_sandbox_stats(StreamPodSandboxStatsRequest)
            -> StreamPodSandboxStatsStream = StreamPodSandboxStatsResponse, await;
        StreamPodSandboxMetrics: stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest)
            -> StreamPodSandboxMetricsStream = StreamPodSandboxMetricsResponse, await;

        // `events`
        GetContainerEvents: get_container_events(GetEventsRequest)
            -> GetContainerEventsStream = ContainerEventResponse;
    }
}

impl RuntimeService {
    pub(crate) fn new(node: Arc<Node>, streaming: Streaming) -> Self {
        Self { node, samples: Arc::default(), streaming: Arc::new(streaming) }
    }

    /// The sandbox that a request names by its id or a prefix of it.
    pub(super) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, CallError> {
        found("sandbox", id, self.node.registry.find_sandbox(id))
    }

    /// The same for a container.
    pub(super) fn container(&self, id: &str) -> Result<Arc<Container>, CallError> {
        found("container", id, self.node.registry.find_container(id))
    }

    /// Runs a blocking look at the node on another thread.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Node, &Samples) -> T + Send + 'static,
    ) -> Result<T, CallError> {
        let (node, samples) = (self.node.clone(), self.samples.clone());
        tokio::task::spawn_blocking(move || look(&node, &samples)).await.map_err(|_| CallError::Stopping)
    }
}

/// Runs a task to its end, even if the client goes away.
pub(super) async fn apart<T: Send + 'static>(
    work: impl Future<Output = Result<T, CallError>> + Send + 'static,
) -> Result<T, CallError> {
    tokio::spawn(work).await.map_err(|_| CallError::Stopping)?
}

fn found<T>(kind: &'static str, id: &str, found: Found<T>) -> Result<T, CallError> {
    // A client's text goes into a message; an id is never longer than this.
    let shown = || id.chars().take(128).collect();
    match found {
        Found::One(one) => Ok(one),
        Found::Nothing => Err(CallError::NotFound { kind, id: shown() }),
        Found::Ambiguous => Err(CallError::Ambiguous { kind, id: shown() }),
    }
}

/// Stop and remove succeed on absent objects.
pub(super) fn absent_is_none<T>(result: Result<T, CallError>) -> Result<Option<T>, CallError> {
    match result {
        Ok(one) => Ok(Some(one)),
        Err(CallError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
