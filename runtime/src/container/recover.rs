//! Containers of the daemon before this one.
//!
//! A record says that there was a container; its exit record says how it ended; without one its shim is asked. When there is neither, its
//! processes are killed and its end is written down as unknown: a container without a shim has nobody to keep its output or see it end.

use super::{Container, ContainerError, end, lock};
use crate::node::Node;
use crate::shim_client::ShimClient;
use berth_cgroup::{Cgroup, Parent};
use berth_model::id::ContainerId;
use berth_model::record::{self, ContainerRecord};
use berth_model::state::{ContainerEvent, ContainerState};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// Makes the container that the record of `id` describes, in the state in which it is now.
pub(crate) async fn recover(node: &Node, id: &ContainerId) -> Result<Arc<Container>, ContainerError> {
    let files = node.layout.container(id);
    let path = files.record();
    let bytes = std::fs::read(&path).map_err(ContainerError::file("read", &path))?;
    let record: ContainerRecord =
        record::decode(&bytes).map_err(|source| ContainerError::Record { id: id.clone(), source })?;
    let cgroup = open_cgroup(node, &record)?;
    let container = Arc::new(Container {
        files,
        cgroup,
        resources: Mutex::new(record.config.resources.clone()),
        state: watch::Sender::new(ContainerState::Created),
        shim: Mutex::new(None),
        operation: tokio::sync::Mutex::default(),
        kill_at: watch::Sender::new(None),
        record,
    });
    if let Some(record) = end::read_record(&container) {
        // Its shim wrote that and ended, or the daemon did; what the daemon would have cleaned up after it may be there still.
        let _ = container.apply(ContainerEvent::Ended(end::exit(&record)));
        let settled = container.clone();
        tokio::task::spawn_blocking(move || end::settle(&settled))
            .await
            .map_err(|_| ContainerError::Stopping)?;
        return Ok(container);
    }
    match adopt(&container).await {
        Some(()) => end::watch(container.clone()),
        None => {
            let lost = container.clone();
            let exit = tokio::task::spawn_blocking(move || end::settle(&lost))
                .await
                .map_err(|_| ContainerError::Stopping)?;
            let _ = container.apply(ContainerEvent::Ended(exit));
        }
    }
    Ok(container)
}

fn open_cgroup(node: &Node, record: &ContainerRecord) -> Result<Cgroup, ContainerError> {
    // From the path, not the configuration: the daemon that made it may have had another.
    Ok(node.open_cgroup(&Parent::of(&record.cgroup)?, record.id.as_str())?)
}

/// Finds its shim and takes over its state. One that does not answer is killed: it could neither be told anything nor tell an end.
async fn adopt(container: &Arc<Container>) -> Option<()> {
    let shim = ShimClient::connect(&container.files.state).ok()?;
    let phase = match shim.phase().await {
        Ok(phase) => phase,
        Err(error) => {
            tracing::warn!(container = %container.id(), %error, "the container is lost with its shim");
            shim.kill();
            return None;
        }
    };
    let created = phase.created?;
    if container.record.process.is_none_or(|process| process.pid != created.pid) {
        return None;
    }
    if let Some(started) = phase.started {
        // From Created, which every recovered container is at first.
        let _ = container.apply(ContainerEvent::Started { at_unix_ns: started.at_unix_ns });
    }
    *lock(&container.shim) = Some(Arc::new(shim));
    Some(())
}
