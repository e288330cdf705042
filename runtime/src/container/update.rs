//! UpdateContainerResources and ReopenContainerLog: changes to an existing container.

use std::sync::Arc;

use berth_cgroup::Limits;
use berth_model::container::Resources;
use berth_model::state::ContainerState;

use super::{Container, ContainerError, lock};
use crate::oci_spec;

/// Changes the limits of a container that has not ended by `change`. If the kernel refuses one, or
/// they cannot be recorded, all stay as they were; if it refuses the rollback too, the actual
/// limits are reported and recorded. Once they are in force this no longer fails.
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
    let mut content = container.record().clone();
    content.config.resources = next.clone();
    let files = container.record_files();
    // Disk space first: afterwards, the record only needs a rename.
    let record = files
        .prepare(&content)
        .map_err(|source| ContainerError::Record { id: container.id().clone(), source })?;
    if let Err(error) = container.cgroup.update(&limits) {
        if matches!(error, berth_cgroup::Error::NotRolledBack { .. }) {
            drop(record);
            tell_what_is_in_force(container, &limits);
        }
        return Err(error.into());
    }
    *lock(&container.resources) = next;
    if let Err(error) = record.commit() {
        tracing::error!(
            container = %container.id(), path = %files.record.display(), %error,
            "the new limits are in force but cannot be recorded; after a restart berthd will report the old ones"
        );
    }
    Ok(())
}

/// Some limits are the requested ones, and some the earlier ones: the report is what the
/// kernel says. Blocking.
fn tell_what_is_in_force(container: &Container, limits: &Limits) {
    let earlier = oci_spec::resources(&container.resources()).and_then(|earlier| oci_spec::limits(&earlier));
    // They were in force, so they are valid.
    let now = container.cgroup.read_back(limits, &earlier.unwrap_or_default());
    let resources = oci_spec::in_force(container.resources(), now);
    *lock(&container.resources) = resources.clone();
    let mut content = container.record().clone();
    content.config.resources = resources;
    if let Err(error) = container.record_files().write(&content) {
        tracing::error!(
            container = %container.id(), error = %crate::chain(&error),
            "the limits are partly changed, which cannot be recorded; after a restart berthd will report the old ones"
        );
    }
}

/// Lets the shim reopen the log path.
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
