//! `berth.v1.Berth`: what the `berth` command needs and the CRI has no call for. The only module
//! that uses its messages.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use berth_api::v1::{self, import_event, import_request, import_start, pull_event};
use berth_image::{Credentials, Image, ImportSource, LayerPhase, LayerProgress, Progress, Reference, Secret};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use crate::chain;
use crate::cri::error::{CallError, failed};
use crate::host_paths::HostPathError;
use crate::node::Node;

/// Events in order; the last one is the result.
type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The largest archive that can be uploaded. One on the node is passed by its path.
const MAX_UPLOAD_BYTES: u64 = 64 << 30;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    node: Arc<Node>,
}

impl Service {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

/// Sends the progress of a pull to its client. The channel has no bound, but there is one message
/// for each piece of each layer at most, and a reader that has gone ends the pull.
struct Reports(mpsc::UnboundedSender<Result<v1::PullEvent, Status>>);

impl Progress for Reports {
    fn layer(&self, report: LayerProgress) {
        let phase = match report.phase {
            LayerPhase::Waiting => v1::LayerPhase::Waiting,
            LayerPhase::Present => v1::LayerPhase::Exists,
            LayerPhase::Fetching if report.done_bytes >= report.total_bytes => v1::LayerPhase::Unpacking,
            LayerPhase::Fetching => v1::LayerPhase::Downloading,
            LayerPhase::Unpacked => v1::LayerPhase::Done,
        };
        let layer = v1::LayerProgress {
            digest: report.digest.to_string(),
            phase: phase.into(),
            bytes_done: report.done_bytes,
            bytes_total: report.total_bytes,
        };
        // The pull itself notices when its caller has gone.
        let _ = self.0.send(Ok(v1::PullEvent { event: Some(pull_event::Event::Layer(layer)) }));
    }
}

/// An import reports only its total bytes; its caller did not ask about layers.
struct Quiet;

impl Progress for Quiet {
    fn layer(&self, _report: LayerProgress) {}
}

fn credentials(request: &v1::PullRequest) -> Credentials {
    if !request.identity_token.is_empty() {
        Credentials::IdentityToken(Secret::new(request.identity_token.clone()))
    } else if request.username.is_empty() {
        Credentials::Anonymous
    } else {
        Credentials::Basic {
            username: request.username.clone(),
            password: Secret::new(request.password.clone()),
        }
    }
}

async fn pull(
    node: &Node,
    request: &v1::PullRequest,
    events: mpsc::UnboundedSender<Result<v1::PullEvent, Status>>,
) -> Result<String, CallError> {
    let reference = Reference::parse(&request.image)?;
    let credentials = credentials(request);
    let gone = events.clone();
    let resolved = v1::PullResolved { reference: reference.to_string(), layers: Vec::new() };
    let _ = events.send(Ok(v1::PullEvent { event: Some(pull_event::Event::Resolved(resolved)) }));
    tokio::select! {
        image = node.images.pull(&reference, &credentials, Arc::new(Reports(events))) => {
            let image = image?;
            tracing::info!(image = request.image, id = %image.id(), "image pulled");
            Ok(image.id().to_string())
        }
        // Dropping the pull cancels it.
        () = gone.closed() => Err(CallError::Cancelled),
    }
}

/// The source of an import.
async fn source(
    node: &Arc<Node>,
    start: &v1::ImportStart,
    requests: &mut Streaming<v1::ImportRequest>,
) -> Result<ImportSource, CallError> {
    match &start.source {
        None => Err(CallError::Missing("start.source")),
        Some(import_start::Source::Path(path)) => {
            let path = PathBuf::from(path);
            if !path.is_absolute() {
                return Err(CallError::Argument(format!("start.path: {} is not absolute", path.display())));
            }
            let node = node.clone();
            tokio::task::spawn_blocking(move || open(&node, &path)).await.map_err(|_| CallError::Stopping)?
        }
        Some(import_start::Source::Upload(_)) => upload(node, requests).await.map(ImportSource::archive),
    }
}

fn open(node: &Node, path: &Path) -> Result<ImportSource, CallError> {
    node.imports.import(path).map_err(|error| match error {
        HostPathError::Failed(failed) => {
            CallError::Argument(format!("start.path: {}: {failed}", path.display()))
        }
        error => error.into(),
    })
}

/// Collects the chunks in an unnamed file, which vanishes with its descriptor.
async fn upload(node: &Node, requests: &mut Streaming<v1::ImportRequest>) -> Result<File, CallError> {
    let failed = |action| move |source| CallError::File { action, source };
    let mut file =
        berth_sys::file::unnamed(&node.layout.trash()).map_err(failed("create a file for the upload"))?;
    let mut total = 0_u64;
    while let Some(request) = requests.next().await {
        let request = request.map_err(|status| {
            CallError::Argument(format!("the upload was interrupted: {}", status.message()))
        })?;
        let Some(import_request::Step::Chunk(chunk)) = request.step else {
            return Err(CallError::Argument("step: not a chunk".to_owned()));
        };
        if chunk.len() > berth_api::MAX_CHUNK_BYTES {
            return Err(CallError::Argument(format!(
                "chunk: longer than {} bytes",
                berth_api::MAX_CHUNK_BYTES
            )));
        }
        total += chunk.len() as u64;
        if total > MAX_UPLOAD_BYTES {
            return Err(CallError::Argument(format!("the archive is larger than {MAX_UPLOAD_BYTES} bytes")));
        }
        file = tokio::task::spawn_blocking(move || file.write_all(&chunk).map(|()| file))
            .await
            .map_err(|_| CallError::Stopping)?
            .map_err(failed("write the upload"))?;
    }
    file.rewind().map_err(failed("read the upload"))?;
    Ok(file)
}

async fn import(
    node: &Arc<Node>,
    mut requests: Streaming<v1::ImportRequest>,
) -> Result<Vec<Image>, CallError> {
    let first = requests.next().await.transpose().map_err(|status| {
        CallError::Argument(format!("the request was interrupted: {}", status.message()))
    })?;
    let Some(import_request::Step::Start(start)) = first.and_then(|request| request.step) else {
        return Err(CallError::Argument("step: the first request must be a start".to_owned()));
    };
    let name = if start.name.is_empty() { None } else { Some(Reference::parse(&start.name)?) };
    let source = source(node, &start, &mut requests).await?;
    let images = node.images.import(source, name.as_ref(), Arc::new(Quiet)).await?;
    for image in &images {
        tracing::info!(id = %image.id(), names = ?image.repo_tags(), "image imported");
    }
    Ok(images)
}

/// Memory of one process; zeros when it has ended meanwhile.
fn memory(pid: i32) -> v1::ProcessMemory {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let (pss_bytes, rss_bytes) = pss_and_rss(&text);
    v1::ProcessMemory { pid: pid.unsigned_abs(), pss_bytes, rss_bytes }
}

/// Memory of a shim with the process that writes its log; its other children are the container's.
fn with_writer(shim: i32) -> v1::ProcessMemory {
    let mut all = memory(shim);
    let children = format!("/proc/{shim}/task/{shim}/children");
    let children = std::fs::read_to_string(children).unwrap_or_default();
    for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
        let name = std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
        if name.trim_end() == berth_shim_proto::LOG_WRITER {
            let memory = memory(child);
            all.pss_bytes += memory.pss_bytes;
            all.rss_bytes += memory.rss_bytes;
        }
    }
    all
}

/// `Pss:` and `Rss:` of proc_pid_smaps(5), in bytes.
fn pss_and_rss(text: &str) -> (u64, u64) {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .map_or(0, |kilobytes| kilobytes * 1024)
    };
    (field("Pss:"), field("Rss:"))
}

fn usage(node: &Node) -> v1::UsageResponse {
    let mut containers: Vec<v1::ContainerUsage> = node
        .registry
        .containers()
        .iter()
        .filter_map(|container| {
            Some(v1::ContainerUsage {
                container_id: container.id().to_string(),
                pod_sandbox_id: container.sandbox_id().to_string(),
                pid: container.pid()?.unsigned_abs(),
                shim: Some(with_writer(container.shim_pid()?)),
            })
        })
        .collect();
    containers.sort_by(|left, right| left.container_id.cmp(&right.container_id));
    let mut sandboxes: Vec<v1::SandboxUsage> = node
        .registry
        .sandboxes()
        .iter()
        .filter_map(|sandbox| {
            Some(v1::SandboxUsage {
                pod_sandbox_id: sandbox.id().to_string(),
                init: Some(memory(sandbox.pid()?)),
            })
        })
        .collect();
    sandboxes.sort_by(|left, right| left.pod_sandbox_id.cmp(&right.pod_sandbox_id));
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    v1::UsageResponse { daemon: Some(memory(own)), containers, sandboxes }
}

fn info(node: &Node) -> v1::InfoResponse {
    let network = node.network.description();
    let config = node.config();
    v1::InfoResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        root: node.layout.root().display().to_string(),
        state: node.layout.state().display().to_string(),
        cgroup: Some(v1::CgroupInfo {
            driver: node.cgroups.driver.to_string(),
            version: if node.cgroups.hierarchy.is_unified() { 2 } else { 1 },
        }),
        network: Some(v1::NetworkInfo {
            kind: network.kind.to_owned(),
            name: network.name,
            subnets: network.subnets,
            cni_config_directory: config.network.cni.config_directory.display().to_string(),
            cni_plugin_directories: config
                .network
                .cni
                .plugin_directories
                .iter()
                .map(|directory| directory.display().to_string())
                .collect(),
        }),
        min_free_bytes: config.images.min_free_bytes,
        min_free_percent: config.images.min_free_percent.into(),
        cadvisor_socket: config
            .cadvisor_socket
            .as_ref()
            .map(|path| path.display().to_string())
            .unwrap_or_default(),
        faults: node.images.faults(),
    }
}

#[tonic::async_trait]
impl v1::berth_server::Berth for Service {
    type ImportStream = Events<v1::ImportEvent>;

    async fn import(
        &self,
        request: Request<Streaming<v1::ImportRequest>>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        let node = self.node.clone();
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let result = import(&node, request.into_inner()).await;
            let event = match result {
                Ok(images) => {
                    let images = images
                        .iter()
                        .map(|image| v1::ImportedImage {
                            id: image.id().to_string(),
                            names: image.repo_tags().to_vec(),
                        })
                        .collect();
                    let event = import_event::Event::Images(v1::ImportedImages { images });
                    Ok(v1::ImportEvent { event: Some(event) })
                }
                Err(error) => Err(failed("Import", &error)),
            };
            // The caller has gone.
            let _ = sender.send(event);
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(receiver))))
    }

    type PullStream = Events<v1::PullEvent>;

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let (node, request) = (self.node.clone(), request.into_inner());
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let event = match pull(&node, &request, sender.clone()).await {
                Ok(id) => Ok(v1::PullEvent { event: Some(pull_event::Event::Image(v1::PulledImage { id })) }),
                Err(error) => Err(failed("Pull", &error)),
            };
            let _ = sender.send(event);
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(receiver))))
    }

    async fn usage(
        &self,
        _request: Request<v1::UsageRequest>,
    ) -> Result<Response<v1::UsageResponse>, Status> {
        let node = self.node.clone();
        // Reading smaps walks page tables, which takes long for a large process.
        let usage = tokio::task::spawn_blocking(move || usage(&node)).await;
        usage.map(Response::new).map_err(|error| Status::unavailable(chain(&error)))
    }

    async fn info(&self, _request: Request<v1::InfoRequest>) -> Result<Response<v1::InfoResponse>, Status> {
        Ok(Response::new(info(&self.node)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_what_the_kernel_writes() {
        let text = "00400000-7fff [rollup]\nRss:                 640 kB\nPss:                 320 kB\nPss_Anon:  24 kB\n";
        assert_eq!(pss_and_rss(text), (320 * 1024, 640 * 1024));
        for odd in ["", "Pss:", "Pss: kB", "Pss: -1 kB", "Pss: 1 MB"] {
            assert_eq!(pss_and_rss(odd).0, 0, "{odd:?}");
        }
        let own = memory(i32::try_from(std::process::id()).unwrap());
        assert!(own.pss_bytes > 0 && own.rss_bytes >= own.pss_bytes);
    }
}
