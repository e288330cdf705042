//! Starts the shim, which creates the container; then the record is written and the container
//! becomes visible.

use std::sync::Arc;

use berth_model::record::ProcessRecord;

use super::Prepared;
use super::files::{self, Made};
use crate::container::target::Target;
use crate::container::{Container, ContainerError, lock};
use crate::handlers::Kind;
use crate::node::Node;
use crate::oci_spec;
use crate::sandbox::Creation;
use crate::shim_client::ShimClient;

/// Starts the shim, lets it create the container, records it, and makes it visible by `show`, which
/// says whether it is still wanted.
pub(super) async fn launch(
    node: &Arc<Node>,
    kind: Kind,
    prepared: Prepared,
    creation: &Creation,
    show: impl FnOnce(&Arc<Container>) -> bool,
) -> Result<Arc<Container>, ContainerError> {
    let Prepared { mut record, files, cgroup, holder, target, mut spec, plan } = prepared;
    let made = Made { files: files.clone(), cgroup: Some(cgroup.clone()) };
    // Not owned by the block: its reservation of the name lasts until everything is cleaned up.
    let mut show = Some(show);
    let result = async {
        let shim = Arc::new(match kind {
            Kind::Shim => ShimClient::spawn(&node.shim, &files.state)?,
        });
        let made = tokio::select! {
            made = shim.create(plan, target.map(Target::into_descriptors)) => made.map_err(ContainerError::from),
            () = creation.given_up() => Err(ContainerError::SandboxNotReady { id: record.sandbox_id.clone() }),
        };
        let created = match made {
            Ok(created) => {
                if let Some(holder) = holder {
                    // It is killed and waited for. A task that cannot run any more drops it, too.
                    let _ = tokio::task::spawn_blocking(move || drop(holder)).await;
                }
                created
            }
            Err(error) => {
                shim.discard().await;
                return Err(error);
            }
        };
        for note in &created.notes {
            if node.is_new(note) {
                tracing::warn!(note, "applied with a weaker setting, for this container and others like it");
            } else {
                tracing::debug!(container = %record.id, note, "applied with a weaker setting");
            }
        }
        record.process = Some(ProcessRecord { pid: created.pid, start_time: created.start_time });
        (record.uid, record.gid, record.groups) = (created.uid, created.gid, created.groups);
        oci_spec::set_user(&mut spec, record.uid, record.gid, &record.groups);
        let container = Arc::new(Container::new(record, files, cgroup, node.cgroups.left(), node.events.clone()));
        *lock(&container.shim) = Some(shim.clone());
        if let Err(error) = files::write_files(&container, &spec) {
            shim.discard().await;
            return Err(error);
        }
        if !show.take().is_some_and(|show| show(&container)) {
            shim.discard().await;
            return Err(ContainerError::SandboxNotReady { id: container.sandbox_id().clone() });
        }
        Ok(container)
    }
    .await;
    if result.is_err() {
        let node = node.clone();
        // The error is reported in any case; if the task cannot run, the next start cleans up.
        let _ = tokio::task::spawn_blocking(move || files::undo(&node, &made)).await;
    }
    result
}
