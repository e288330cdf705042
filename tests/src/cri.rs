//! A client of the daemon's socket that tests call without `await`: CRI's two services and Berth's
//! own.
//!
//! Answers are those of the wire; a refused call gives its [`Status`], which tests look into.
//! Clones share a connection and may be used on other threads at the same time.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use berth_api::v1::berth_client::BerthClient;
use berth_api::v1::import_event::Event;
use berth_api::v1::import_request::Step;
use berth_api::v1::import_start::Source;
use berth_api::v1::{ImportRequest, ImportStart, ImportedImage};
use berth_cri::MAX_MESSAGE_BYTES;
use berth_cri::v1;
use berth_cri::v1::image_service_client::ImageServiceClient;
use berth_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// A connection, established by the first call, and again after it broke.
#[derive(Debug, Clone)]
pub struct Client {
    tokio: Arc<Runtime>,
    runtime: RuntimeServiceClient<Channel>,
    image: ImageServiceClient<Channel>,
    berth: BerthClient<Channel>,
}

impl Client {
    /// A client of the socket at this path, which takes answers of the same length as a kubelet.
    ///
    /// # Errors
    /// When the path cannot be written as an address; nothing is connected yet.
    pub fn new(socket: &Path) -> Result<Self> {
        // A worker keeps the connection alive between calls.
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("starting the async runtime")?;
        let channel = {
            let _inside = tokio.enter();
            let uri = format!("unix://{}", socket.display());
            Endpoint::from_shared(uri).context("naming the socket")?.connect_lazy()
        };
        Ok(Self {
            tokio: Arc::new(tokio),
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            image: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            berth: BerthClient::new(channel),
        })
    }

    fn wait<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
        self.tokio.block_on(call).map(Response::into_inner)
    }

    /// Imports the image in this archive or layout directory.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn import(&self, path: &Path) -> Result<Vec<ImportedImage>, Status> {
        let start = ImportStart {
            name: String::new(),
            source: Some(Source::Path(path.to_string_lossy().into_owned())),
        };
        let requests = tokio_stream::once(ImportRequest { step: Some(Step::Start(start)) });
        let mut client = self.berth.clone();
        self.tokio.block_on(async {
            let mut events = client.import(requests).await?.into_inner();
            let mut imported = Vec::new();
            while let Some(event) = events.message().await? {
                if let Some(Event::Images(images)) = event.event {
                    imported = images.images;
                }
            }
            Ok(imported)
        })
    }

    /// `ExecSync` that is abandoned when `enough` returns: the call is cancelled, and the
    /// connection closed with the last clone of the client. Returns `None` then, or the answer if
    /// it comes first.
    ///
    /// # Errors
    /// The daemon's refusal, and that of `enough`.
    pub fn exec_sync_until(
        &self,
        request: v1::ExecSyncRequest,
        enough: impl FnOnce() -> Result<()>,
    ) -> Result<Option<v1::ExecSyncResponse>> {
        let mut client = self.runtime.clone();
        let call = self.tokio.spawn(async move { client.exec_sync(request).await });
        let outcome = enough();
        if call.is_finished() {
            return Ok(Some(self.tokio.block_on(call).context("the call")??.into_inner()));
        }
        call.abort();
        outcome.map(|()| None)
    }

    /// `PullImage` of a reference without credentials; returns the image's id.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn pull(&self, image: &str) -> Result<String, Status> {
        let request = v1::PullImageRequest { image: Some(image_spec(image)), ..Default::default() };
        Ok(self.pull_image(request)?.image_ref)
    }

    /// `ImageStatus`; `None` for an absent image.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn image(&self, image: &str) -> Result<Option<v1::Image>, Status> {
        let request = v1::ImageStatusRequest { image: Some(image_spec(image)), verbose: false };
        Ok(self.image_status(request)?.image)
    }

    /// `ListImages` without a filter.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn images(&self) -> Result<Vec<v1::Image>, Status> {
        Ok(self.list_images(v1::ListImagesRequest::default())?.images)
    }

    /// `RemoveImage`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn remove_image_of(&self, image: &str) -> Result<(), Status> {
        self.remove_image(v1::RemoveImageRequest { image: Some(image_spec(image)) }).map(drop)
    }

    /// `PodSandboxStatus`, its `status`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn sandbox(&self, id: &str) -> Result<v1::PodSandboxStatus, Status> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        Ok(self.pod_sandbox_status(request)?.status.unwrap_or_default())
    }

    /// `ListPodSandbox` with a filter.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn sandboxes(&self, filter: v1::PodSandboxFilter) -> Result<Vec<v1::PodSandbox>, Status> {
        Ok(self.list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) })?.items)
    }

    /// `ContainerStatus`, its `status`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn container(&self, id: &str) -> Result<v1::ContainerStatus, Status> {
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        Ok(self.container_status(request)?.status.unwrap_or_default())
    }

    /// `ListContainers` with a filter.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn containers(&self, filter: v1::ContainerFilter) -> Result<Vec<v1::Container>, Status> {
        Ok(self.list_containers(v1::ListContainersRequest { filter: Some(filter) })?.containers)
    }

    /// `RunPodSandbox` by a client that waits only this long and then resets the call, which is
    /// `None`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn run_pod_sandbox_or_give_up(
        &self,
        request: v1::RunPodSandboxRequest,
        patience: Duration,
    ) -> Result<Option<v1::RunPodSandboxResponse>, Status> {
        let mut client = self.runtime.clone();
        let call = async { tokio::time::timeout(patience, client.run_pod_sandbox(request)).await };
        self.tokio.block_on(call).ok().transpose().map(|answer| answer.map(Response::into_inner))
    }

    /// `CreateContainer` by a client that waits only this long and then resets the call, which is
    /// `None`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn create_container_or_give_up(
        &self,
        request: v1::CreateContainerRequest,
        patience: Duration,
    ) -> Result<Option<v1::CreateContainerResponse>, Status> {
        let mut client = self.runtime.clone();
        let call = async { tokio::time::timeout(patience, client.create_container(request)).await };
        self.tokio.block_on(call).ok().transpose().map(|answer| answer.map(Response::into_inner))
    }

    /// `StopContainer`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn stop(&self, id: &str, grace_seconds: i64) -> Result<(), Status> {
        let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout: grace_seconds };
        self.stop_container(request).map(drop)
    }

    /// `RemoveContainer`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn remove(&self, id: &str) -> Result<(), Status> {
        self.remove_container(v1::RemoveContainerRequest { container_id: id.to_owned() }).map(drop)
    }

    /// `StopPodSandbox`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn stop_sandbox(&self, id: &str) -> Result<(), Status> {
        self.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() }).map(drop)
    }

    /// `RemovePodSandbox`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn remove_sandbox(&self, id: &str) -> Result<(), Status> {
        self.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() }).map(drop)
    }
}

impl Client {
    /// `StreamPodSandboxStats`, all messages.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn stream_pod_sandbox_stats(
        &self,
        request: v1::StreamPodSandboxStatsRequest,
    ) -> Result<Vec<v1::PodSandboxStats>, Status> {
        let mut client = self.runtime.clone();
        self.tokio.block_on(async {
            let mut messages = client.stream_pod_sandbox_stats(request).await?.into_inner();
            let mut all = Vec::new();
            while let Some(message) = messages.message().await? {
                all.extend(message.pod_sandbox_stats);
            }
            Ok(all)
        })
    }

    /// `StreamPodSandboxMetrics`, all messages.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn stream_pod_sandbox_metrics(&self) -> Result<Vec<v1::PodSandboxMetrics>, Status> {
        let mut client = self.runtime.clone();
        self.tokio.block_on(async {
            let request = v1::StreamPodSandboxMetricsRequest::default();
            let mut messages = client.stream_pod_sandbox_metrics(request).await?.into_inner();
            let mut all = Vec::new();
            while let Some(message) = messages.message().await? {
                all.extend(message.pod_sandbox_metrics);
            }
            Ok(all)
        })
    }
}

macro_rules! calls {
    ($service:ident: $($call:ident($request:ident) -> $answer:ident;)*) => {
        impl Client {
            $(
                #[doc = concat!("The call with [`", stringify!($request), "`](v1::", stringify!($request), ").")]
                ///
                /// # Errors
                /// The daemon's refusal.
                pub fn $call(&self, request: v1::$request) -> Result<v1::$answer, Status> {
                    self.wait(self.$service.clone().$call(request))
                }
            )*
        }
    };
}

calls! { runtime:
    version(VersionRequest) -> VersionResponse;
    status(StatusRequest) -> StatusResponse;
    runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
    update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
    run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
    stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
    remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
    pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
    list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
    create_container(CreateContainerRequest) -> CreateContainerResponse;
    start_container(StartContainerRequest) -> StartContainerResponse;
    stop_container(StopContainerRequest) -> StopContainerResponse;
    remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
    list_containers(ListContainersRequest) -> ListContainersResponse;
    container_status(ContainerStatusRequest) -> ContainerStatusResponse;
    container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
    list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
    pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
    list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
    list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
    list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
    update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
    reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
    exec_sync(ExecSyncRequest) -> ExecSyncResponse;
    attach(AttachRequest) -> AttachResponse;
    checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
    exec(ExecRequest) -> ExecResponse;
    port_forward(PortForwardRequest) -> PortForwardResponse;
}

calls! { image:
    pull_image(PullImageRequest) -> PullImageResponse;
    image_status(ImageStatusRequest) -> ImageStatusResponse;
    list_images(ListImagesRequest) -> ListImagesResponse;
    remove_image(RemoveImageRequest) -> RemoveImageResponse;
    image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
}

/// An image by name, in the form that CRI wants.
#[must_use]
pub fn image_spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: image.to_owned(), ..Default::default() }
}
