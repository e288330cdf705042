//! StopPodSandbox and RemovePodSandbox, and the release of what a sandbox holds.
//!
//! Everything here may be repeated, and looks at what exists: a stop that failed half-way is
//! finished by the next.

use std::sync::Arc;
use std::time::Duration;

use berth_cgroup::Cgroup;
use berth_model::security::NamespaceMode;
use berth_sys::mount;

use super::{Sandbox, SandboxError, lock, namespaces};
use crate::container;
use crate::node::Node;
use crate::trash;

/// How long the cgroup named after the pod may stay busy after its processes have ended.
const CGROUP_BUSY: Duration = Duration::from_secs(2);

/// How long creations may take to finish, or to stop after being cancelled, before they are
/// abandoned.
const BEING_MADE: Duration = Duration::from_secs(5);

/// Kills every process of the sandbox, and releases its network and the rest. Idempotent.
pub(crate) async fn stop(node: &Arc<Node>, sandbox: &Arc<Sandbox>) -> Result<(), SandboxError> {
    sandbox.begin_stop();
    let given_up = sandbox.creations.close(BEING_MADE).await;
    let _alone = sandbox.stopping.lock().await;
    let ended = end_containers(node, sandbox).await;
    sandbox.report_stop();
    ended?;
    if *lock(&sandbox.torn_down) {
        return Ok(());
    }
    if given_up {
        tracing::warn!(
            sandbox = %sandbox.id, pod = %sandbox.config.metadata,
            "stopping a sandbox in which the creation of a container hangs; what it creates is removed when it continues"
        );
    }
    let (node, sandbox) = (node.clone(), sandbox.clone());
    tokio::task::spawn_blocking(move || {
        sandbox.forget_untold();
        release(&node, &sandbox)?;
        *lock(&sandbox.torn_down) = true;
        if let Err(error) = sandbox.write_record() {
            // The next stop repeats all of this, and records it.
            *lock(&sandbox.torn_down) = false;
            return Err(error);
        }
        sandbox.report_stopped();
        Ok(())
    })
    .await
    .map_err(|_| SandboxError::Stopping)?
}

async fn end_containers(node: &Arc<Node>, sandbox: &Sandbox) -> Result<(), SandboxError> {
    let mut ends = tokio::task::JoinSet::new();
    for container in node.registry.containers_of(&sandbox.id) {
        ends.spawn(async move { container::stop::stop(&container, Duration::ZERO).await });
    }
    let mut first = None;
    while let Some(end) = ends.join_next().await {
        if let Ok(Err(error)) = end {
            first.get_or_insert(error);
        }
    }
    match first {
        None => Ok(()),
        Some(source) => Err(SandboxError::Containers { id: sandbox.id.clone(), source: Box::new(source) }),
    }
}

/// Stops it if needed, and removes it with all its containers. Log files stay: they are the
/// kubelet's.
pub(crate) async fn remove(node: &Arc<Node>, sandbox: &Arc<Sandbox>) -> Result<(), SandboxError> {
    stop(node, sandbox).await?;
    for container in node.registry.containers_of(&sandbox.id) {
        container::remove::remove(node, &container).await.map_err(|source| SandboxError::Containers {
            id: sandbox.id.clone(),
            source: Box::new(source),
        })?;
    }
    let (removing, files_of) = (node.clone(), sandbox.clone());
    tokio::task::spawn_blocking(move || remove_files(&removing, &files_of))
        .await
        .map_err(|_| SandboxError::Stopping)??;
    // Another removal may have been first.
    sandbox.disappear(|| node.registry.remove_sandbox(sandbox));
    Ok(())
}

/// Releases processes, namespaces, network, mounts and cgroup. Blocking.
pub(super) fn release(node: &Node, sandbox: &Sandbox) -> Result<(), SandboxError> {
    let process = lock(&sandbox.process).take();
    if let Some(process) = &process {
        process.kill();
    }
    let has_network = sandbox.config.namespaces.network != NamespaceMode::Node;
    let left = |source| SandboxError::NetworkLeft { id: sandbox.id.clone(), source };
    if has_network && sandbox.has_plugins {
        node.network.detach(&sandbox.id).map_err(left)?;
    }
    namespaces::unpin(&sandbox.files)?;
    if has_network {
        node.network.release(&sandbox.id).map_err(left)?;
    }
    let tmpfs = sandbox.files.tmpfs();
    match mount::detach(&tmpfs) {
        Err(error)
            if error.kind() != std::io::ErrorKind::NotFound
                && error.kind() != std::io::ErrorKind::InvalidInput =>
        {
            return Err(SandboxError::file("unmount", &tmpfs)(error));
        }
        _ => {}
    }
    let id = sandbox.id.as_str();
    if sandbox.config.namespaces.pid == NamespaceMode::Pod {
        let cgroup = node.cgroups.open(&sandbox.cgroup_parent, id)?;
        if process.is_none() {
            // Its cgroup is unknown: the record was lost, or this is done for the second time.
            cgroup.kill(CGROUP_BUSY)?;
        }
        cgroup.remove(CGROUP_BUSY)?;
    } else {
        // The cgroup for cAdvisor, whichever daemon created it; not a unit. A process that was
        // moved there does not keep the pod.
        let shown = Cgroup::open(&node.cgroups.hierarchy, &sandbox.cgroup_parent, id)?;
        if let Err(error) = shown.remove(CGROUP_BUSY) {
            tracing::warn!(sandbox = id, error = %crate::chain(&error), "cannot remove the cgroup by which cAdvisor finds the pod");
        }
    }
    Ok(())
}

/// Removes its files, the copy of the record first. Blocking.
pub(super) fn remove_files(node: &Node, sandbox: &Sandbox) -> Result<(), SandboxError> {
    let files = sandbox.record_files();
    files.remove_copy().map_err(SandboxError::file("remove", &files.copy))?;
    trash::discard(&node.layout, &sandbox.files.durable)
        .map_err(SandboxError::file("remove", &sandbox.files.durable))?;
    match std::fs::remove_dir_all(&sandbox.files.state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(SandboxError::file("remove", &sandbox.files.state)(error))
        }
        _ => Ok(()),
    }
}
