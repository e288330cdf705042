//! UpdateContainerResources and ReopenContainerLog: changes to a container that is there.

use super::{Container, ContainerError, lock};
use crate::oci_spec;
use berth_model::container::Resources;
use berth_model::state::ContainerState;
use std::sync::Arc;

/// Changes the limits of a container that has not ended to what `change` makes of those in force. When the
/// kernel refuses one, or they cannot be recorded, all stay as they were. Once they are in force this does
/// not fail any more.
pub(crate) async fn resources<E: From<ContainerError>>(
    container: &Arc<Container>,
    change: impl FnOnce(&Resources) -> Result<Resources, E>,
) -> Result<(), E> {
    let _alone = container.operation.lock().await;
    if let state @ ContainerState::Exited(_) = container.state() {
        return Err(ContainerError::WrongState { id: container.id().clone(), state: state.name() }.into());
    }
    if container.keeps_record {
        return Err(ContainerError::RecordKept { id: container.id().clone() }.into());
    }
    let next = change(&container.resources())?;
    let updating = container.clone();
    tokio::task::spawn_blocking(move || update(&updating, next))
        .await
        .map_err(|_| ContainerError::Stopping)?
        .map_err(E::from)
}

/// Blocking.
fn update(container: &Container, next: Resources) -> Result<(), ContainerError> {
    let limits = oci_spec::limits(&oci_spec::resources(&next)?)?;
    let mut content = container.record.clone();
    content.config.resources = next.clone();
    let files = container.record_files();
    // The room on the disk first: what is left to do for the record afterwards is a rename.
    let record = files
        .prepare(&content)
        .map_err(|source| ContainerError::Record { id: container.id().clone(), source })?;
    container.cgroup.update(&limits)?;
    *lock(&container.resources) = next;
    if let Err(error) = record.commit() {
        tracing::error!(
            container = %container.id(), path = %files.record.display(), %error,
            "the new limits are in force but cannot be recorded; after a restart berthd will report the old ones"
        );
    }
    Ok(())
}

/// Lets the shim write to the log path anew.
pub(crate) async fn reopen_log(container: &Arc<Container>) -> Result<(), ContainerError> {
    let state = container.state();
    match (&state, container.shim()) {
        (ContainerState::Running { .. }, Some(shim)) => Ok(shim.reopen_log().await?),
        (ContainerState::Running { .. }, None) => {
            Err(ContainerError::ShimUnreached { id: container.id().clone() })
        }
        _ => Err(ContainerError::WrongState { id: container.id().clone(), state: state.name() }),
    }
}
