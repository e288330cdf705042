//! RemoveContainer: kills what runs, takes the files away. The log stays: it is the kubelet's.

use super::{Container, ContainerError, stop};
use crate::node::Node;
use crate::trash;
use berth_model::state::ContainerState;
use std::sync::Arc;

/// Removes it. A second call while the first is under way waits for it and finds nothing left to do.
pub(crate) async fn remove(node: &Arc<Node>, container: &Arc<Container>) -> Result<(), ContainerError> {
    let _alone = container.operation.lock().await;
    if !matches!(container.state(), ContainerState::Exited(_)) {
        stop::kill(container).await?;
    }
    let (removing, files_of) = (node.clone(), container.clone());
    tokio::task::spawn_blocking(move || remove_files(&removing, &files_of))
        .await
        .map_err(|_| ContainerError::Stopping)??;
    node.registry.remove_container(container);
    node.collect_images();
    tracing::info!(container = %container.id(), name = %container.config().metadata.name, "container is removed");
    Ok(())
}

/// Takes its files away; the record goes first, with the directory that it is in. Blocking.
pub(super) fn remove_files(node: &Node, container: &Container) -> Result<(), ContainerError> {
    let files = &container.files;
    trash::discard(&node.layout, &files.durable).map_err(ContainerError::file("remove", &files.durable))?;
    match std::fs::remove_dir_all(&files.state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(ContainerError::file("remove", &files.state)(error))
        }
        _ => Ok(()),
    }
}
