//! RemoveContainer: kills the container and removes its files. The log stays: it is the kubelet's.

use std::sync::Arc;
use std::time::Duration;

use berth_model::state::ContainerState;

use super::{Container, ContainerError, end, stop};
use crate::node::Node;
use crate::trash;

/// How long a start or an update may take to finish once the container has ended: nothing that they
/// wait for is left.
const OTHERS: Duration = Duration::from_secs(30);

/// Removes it. A second call during the first waits for it and finds nothing left to do.
pub(crate) async fn remove(node: &Arc<Node>, container: &Arc<Container>) -> Result<(), ContainerError> {
    // Not under the lock: a hanging start holds it, and this ends the start.
    if !matches!(container.state(), ContainerState::Exited(_)) {
        stop::kill(container).await?;
    }
    container.cleared().await;
    let alone = tokio::time::timeout(OTHERS, container.operation.lock()).await;
    let _alone = alone.map_err(|_| ContainerError::Busy { id: container.id().clone() })?;
    let (removing, files_of) = (node.clone(), container.clone());
    tokio::task::spawn_blocking(move || remove_files(&removing, &files_of))
        .await
        .map_err(|_| ContainerError::Stopping)??;
    // Another removal may have been first.
    container.disappear(|| node.registry.remove_container(container));
    node.collect_images();
    Ok(())
}

/// Removes its files; the copy of the record goes first, then the record, with the directory that
/// it is in. Blocking.
fn remove_files(node: &Node, container: &Container) -> Result<(), ContainerError> {
    // A container that ended while there was no daemon may not have been cleaned up yet.
    end::clean(container);
    if container.cgroup.is_there() {
        node.cgroups.keep_left(&container.cgroup);
    }
    let (files, records) = (&container.files, container.record_files());
    records.remove_copy().map_err(ContainerError::file("remove", &records.copy))?;
    trash::discard(&node.layout, &files.durable).map_err(ContainerError::file("remove", &files.durable))?;
    match std::fs::remove_dir_all(&files.state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(ContainerError::file("remove", &files.state)(error))
        }
        _ => Ok(()),
    }
}
