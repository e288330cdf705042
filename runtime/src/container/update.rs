//! UpdateContainerResources and ReopenContainerLog: changes to a container that is there.

use super::{Container, ContainerError, lock};
use berth_model::container::Resources;
use berth_model::state::ContainerState;
use std::sync::Arc;

/// Changes the limits of a container that has not ended to what `change` makes of those in force. When the kernel refuses one, all stay
/// as they were.
pub(crate) async fn resources<E: From<ContainerError>>(
    container: &Arc<Container>,
    change: impl FnOnce(&Resources) -> Result<Resources, E>,
) -> Result<(), E> {
    let _alone = container.operation.lock().await;
    if let state @ ContainerState::Exited(_) = container.state() {
        return Err(ContainerError::WrongState { id: container.id().clone(), state: state.name() }.into());
    }
    let next = change(&container.resources())?;
    let updating = container.clone();
    let update = move || {
        updating.cgroup.update(&crate::oci_spec::limits(&next))?;
        *lock(&updating.resources) = next;
        updating.write_record()
    };
    tokio::task::spawn_blocking(update).await.map_err(|_| ContainerError::Stopping)?.map_err(E::from)
}

/// Lets the shim write to the log path anew.
pub(crate) async fn reopen_log(container: &Arc<Container>) -> Result<(), ContainerError> {
    let state = container.state();
    match (&state, container.shim()) {
        (ContainerState::Running { .. }, Some(shim)) => Ok(shim.reopen_log().await?),
        _ => Err(ContainerError::WrongState { id: container.id().clone(), state: state.name() }),
    }
}
