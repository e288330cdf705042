//! CreateContainer: everything up to the exec of the program.
//!
//! Step by step: `resolve` looks up what the request names, `spec` says what the container is,
//! `cgroup` sets the limits and devices of the finished spec, `plan` says what the shim does,
//! `launch` starts it. Up to `launch` all of it is on a blocking thread. On success the record is
//! written last: it is what makes the container exist. On failure everything is cleaned up
//! (`files`); what a crash leaves behind is found by the next start, by the missing record.

mod cgroup;
mod files;
mod launch;
mod plan;
mod profiles;
mod resolve;
mod spec;

use std::sync::Arc;

use ::oci_spec::runtime::Spec;
use berth_cgroup::Cgroup;
use berth_image::Lease;
use berth_model::container::Config;
use berth_model::id::ContainerId;
use berth_model::layout::ContainerFiles;
use berth_model::record::ContainerRecord;
use berth_shim_proto::launch::Launch;

use super::target::Target;
use super::{Container, ContainerError, follow};
use crate::clock::unix_ns;
use crate::names::Name;
use crate::node::Node;
use crate::random::random_bytes;
use crate::sandbox::{Creation, Sandbox};
use crate::shim_client::Holder;
use files::Made;

/// Creates a container, which is CREATED on return. On an error nothing of it is left.
pub(crate) async fn create(
    node: Arc<Node>,
    sandbox: Arc<Sandbox>,
    config: Config,
) -> Result<Arc<Container>, ContainerError> {
    let stopped = ContainerError::SandboxNotReady { id: sandbox.id().clone() };
    let Some(creation) = sandbox.begin_creation().map(Arc::new) else { return Err(stopped) };
    // In its own task, which takes back what it has made whenever it comes to its end: paths of the
    // host and the shim take their time.
    let making = tokio::spawn(make(node, sandbox, config, creation.clone()));
    tokio::select! {
        made = making => made.map_err(|_| ContainerError::Stopping)?,
        () = creation.given_up() => Err(stopped),
    }
}

async fn make(
    node: Arc<Node>,
    sandbox: Arc<Sandbox>,
    config: Config,
    creation: Arc<Creation>,
) -> Result<Arc<Container>, ContainerError> {
    let name = &sandbox.config().runtime_handler;
    let handler = node.handlers.find(name).ok_or_else(|| ContainerError::NoHandler { name: name.clone() })?;
    let kind = handler.kind;
    let id = ContainerId::from_bytes(random_bytes().map_err(ContainerError::Id)?);
    let name = Name::Container(sandbox.id().clone(), config.metadata.clone());
    let reservation = node.registry.reserve(name, id.as_str())?;

    // Its layers stay, even if it is removed, until the registry says that a container uses it.
    let image = node.images.lease(&config.image).map(Arc::new);
    let image = image.ok_or_else(|| ContainerError::NoImage { image: config.image.clone() })?;
    let order = Order {
        node: node.clone(),
        sandbox: sandbox.clone(),
        lease: image.clone(),
        id,
        config,
        creation: creation.clone(),
    };
    let making = async {
        let prepared = tokio::task::spawn_blocking(move || order.prepare());
        let prepared = prepared.await.map_err(|_| ContainerError::Stopping)??;
        let show = |container: &Arc<Container>| {
            creation
                .finish(|| container.appear(|| node.registry.add_container(container.clone(), reservation)))
        };
        launch::launch(&node, kind, prepared, &creation, show).await
    };
    let made = making.await;
    let container = match made {
        Ok(container) => container,
        Err(error) => {
            drop(image);
            node.collect_images();
            return Err(error);
        }
    };
    drop(image);
    follow::watch(&container);
    Ok(container)
}

/// A container that is ready for its shim.
struct Prepared {
    record: ContainerRecord,
    files: ContainerFiles,
    cgroup: Cgroup,
    /// In the cgroup until the container's process is in it.
    holder: Option<Holder>,
    target: Option<Target>,
    spec: Spec,
    plan: Launch,
}

/// The input of a creation.
struct Order {
    node: Arc<Node>,
    sandbox: Arc<Sandbox>,
    lease: Arc<Lease>,
    id: ContainerId,
    config: Config,
    creation: Arc<Creation>,
}

impl Order {
    /// Creates everything that the shim gets; on an error nothing of it is left. Blocking.
    fn prepare(self) -> Result<Prepared, ContainerError> {
        let node = self.node.clone();
        let mut made = Made { files: node.layout.container(&self.id), cgroup: None };
        self.prepare_in(&mut made).inspect_err(|_| files::undo(&node, &made))
    }

    fn prepare_in(self, made: &mut Made) -> Result<Prepared, ContainerError> {
        let Self { node, sandbox, lease, id, config, creation } = self;
        let resolved = resolve::resolve(&node, &sandbox, &lease, &config)?;
        // What comes before this waits for paths of the host.
        if creation.is_given_up() {
            return Err(ContainerError::SandboxNotReady { id: sandbox.id().clone() });
        }
        let planned = Cgroup::planned(&node.cgroups.hierarchy, sandbox.cgroup_parent(), id.as_str())?;
        let image = lease.image();
        let subject = spec::Subject { node: &node, sandbox: &sandbox, image, id: &id, config: &config };
        let spec = spec::build(&subject, &resolved, &made.files, &planned)?;

        files::make_directories(&made.files, &resolved.layers)?;
        let (cgroup, holder) = cgroup::make(&subject, &spec, resolved.stop_signal, &mut made.cgroup)?;
        let (plan, log_path) = plan::launch(&subject, &spec, &resolved, &made.files, &cgroup)?;
        let record = ContainerRecord {
            sandbox_id: sandbox.id().clone(),
            image_id: image.id().to_string(),
            image_name: image.repo_tags().first().cloned().unwrap_or_default(),
            image_ref: image.repo_digests().first().cloned().unwrap_or_default(),
            created_at_unix_ns: unix_ns(),
            stop_signal: resolved.stop_signal,
            log_path,
            cgroup: cgroup.path().to_owned(),
            id,
            config,
            ..ContainerRecord::default()
        };
        let files = made.files.clone();
        Ok(Prepared { record, files, cgroup, holder, target: resolved.target, spec, plan })
    }
}
