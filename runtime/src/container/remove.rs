//! RemoveContainer: kills what runs, takes the files away. The log stays: it is the kubelet's.

use super::{Container, ContainerError, end, stop};
use crate::node::Node;
use crate::trash;
use berth_model::state::ContainerState;
use std::sync::Arc;
use std::time::Duration;

/// How long a start or an update may take to come to its end once the container has ended: nothing that they
/// wait for is left.
const OTHERS: Duration = Duration::from_secs(30);

/// Removes it. A second call while the first is under way waits for it and finds nothing left to do.
pub(crate) async fn remove(node: &Arc<Node>, container: &Arc<Container>) -> Result<(), ContainerError> {
    // Not under the lock: a start that hangs has it, and comes to its end by this.
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
    if node.registry.remove_container(container) {
        container.disappeared();
    }
    node.collect_images();
    Ok(())
}

/// Takes its files away; the copy of the record goes first, and the record second, with the directory that it
/// is in. Blocking.
fn remove_files(node: &Node, container: &Container) -> Result<(), ContainerError> {
    // What ended while no daemon was there may not have been cleaned up after yet.
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
