//! The start of a daemon: what the one before it left, whole objects and remains.
//!
//! Order matters. First the sandboxes and containers that have records; then everything without one goes:
//! shims whose containers were never recorded, namespaces and mounts of sandboxes that were never finished,
//! cgroups, addresses. One object that cannot be read does not stop the start: its record is put into
//! quarantine, and what it owned is collected like any other remains. What only takes room on the disk waits
//! until the daemon serves: `housekeeping`.

use crate::cadvisor;
use crate::container::{self, ContainerError};
use crate::node::Node;
use crate::registry::Name;
use crate::sandbox::{self, SandboxError};
use crate::shim_client::ShimClient;
use crate::trash;
use berth_model::id::{ContainerId, SandboxId};
use berth_sys::ns;
use futures_util::StreamExt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Containers that are asked for at the same time.
const AT_ONCE: usize = 32;

/// How long remains of a cgroup may take to go.
const CGROUP_GONE: Duration = Duration::from_secs(5);

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// One of the daemon's own folders.
    #[error("list {path}")]
    List {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Brings back what was, and clears away what is nobody's.
///
/// # Errors
/// When the daemon's own folders cannot be read; a single object is never a reason.
pub(crate) async fn run(node: &Arc<Node>) -> Result<(), RecoveryError> {
    let (mut sandboxes, mut containers) = (0, 0);
    for id in names(&node.layout.sandboxes())?.iter().filter_map(|name| name.parse::<SandboxId>().ok()) {
        let found = match sandbox::recover::recover(node, &id) {
            Ok(found) => found,
            Err(error) => {
                set_aside(node, &node.layout.sandbox(&id).durable, is_bad_record(&error), &error);
                continue;
            }
        };
        match node.registry.reserve(Name::Sandbox(found.config().metadata.clone()), id.as_str()) {
            Ok(reservation) => {
                node.registry.add_sandbox(found.clone(), reservation);
                cadvisor::show(node, &found).await;
            }
            Err(error) => tracing::error!(sandbox = %id, %error, "two records of one sandbox"),
        }
        sandboxes += 1;
    }
    let ids: Vec<ContainerId> =
        names(&node.layout.containers())?.iter().filter_map(|name| name.parse().ok()).collect();
    // Side by side, for the sake of shims that hang: each takes its time until it is given up.
    let mut recovered = futures_util::stream::iter(ids)
        .map(|id| async move {
            let found = container::recover::recover(node, &id).await;
            (id, found)
        })
        .buffer_unordered(AT_ONCE);
    while let Some((id, found)) = recovered.next().await {
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                let bad = matches!(error, ContainerError::Record { .. });
                set_aside(node, &node.layout.container(&id).durable, bad, &error);
                continue;
            }
        };
        match node.registry.reserve(found.name(), id.as_str()) {
            Ok(reservation) => node.registry.add_container(found, reservation),
            Err(error) => tracing::error!(container = %id, %error, "two records of one container"),
        }
        containers += 1;
    }
    collect(node).await?;
    if sandboxes + containers > 0 {
        tracing::info!(sandboxes, containers, "recovered");
    }
    Ok(())
}

fn is_bad_record(error: &SandboxError) -> bool {
    matches!(error, SandboxError::Record { .. })
}

/// Puts what cannot be read where a person can look at it, and out of the way of everybody else.
fn set_aside(node: &Node, durable: &Path, bad_record: bool, error: &dyn std::error::Error) {
    if !bad_record && !durable.join("record").exists() {
        // Never finished: the record is the last thing written.
        if let Err(error) = trash::discard(&node.layout, durable) {
            tracing::warn!(path = %durable.display(), %error, "could not remove what was never finished");
        }
        return;
    }
    let name = durable.file_name().unwrap_or_default();
    let target = node.layout.quarantine().join(name);
    tracing::error!(
        path = %durable.display(), quarantine = %target.display(), error = %crate::chain(error),
        "a record cannot be read and is set aside"
    );
    if let Err(error) = std::fs::rename(durable, &target) {
        tracing::warn!(path = %durable.display(), %error, "could not set it aside");
    }
}

/// Takes away everything that belongs to no object.
async fn collect(node: &Arc<Node>) -> Result<(), RecoveryError> {
    for name in names(&node.layout.container_states())? {
        let known = name.parse::<ContainerId>().is_ok_and(|id| node.layout.container(&id).record().exists());
        if known {
            continue;
        }
        let path = node.layout.container_states().join(&name);
        if let Ok(shim) = ShimClient::connect(&path) {
            shim.discard().await;
        }
        if let Err(error) = std::fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), %error, "could not remove the remains of a container");
        }
    }
    let collecting = node.clone();
    // A panic in there is a bug that is logged; what was not collected is tried again at the next start.
    let collected = tokio::task::spawn_blocking(move || collect_blocking(&collecting)).await;
    collected.unwrap_or(Ok(()))
}

fn collect_blocking(node: &Node) -> Result<(), RecoveryError> {
    for name in names(&node.layout.sandbox_states())? {
        if name.parse::<SandboxId>().is_ok_and(|id| node.layout.sandbox(&id).record().exists()) {
            continue;
        }
        remove_sandbox_state(&node.layout.sandbox_states().join(&name));
    }
    match berth_cgroup::leftovers(&node.hierarchy, &node.default_cgroup_parent) {
        Ok(names) => {
            for name in names {
                let known = name
                    .parse::<ContainerId>()
                    .is_ok_and(|id| node.layout.container(&id).record().exists())
                    || name.parse::<SandboxId>().is_ok_and(|id| node.layout.sandbox(&id).record().exists());
                if known || name.parse::<ContainerId>().is_err() {
                    continue;
                }
                let gone = node.open_cgroup(&node.default_cgroup_parent, &name).and_then(|cgroup| {
                    if node.is_anothers(&cgroup) {
                        return Ok(());
                    }
                    cgroup.kill(CGROUP_GONE).and_then(|()| cgroup.remove(CGROUP_GONE))
                });
                if let Err(error) = gone {
                    tracing::warn!(cgroup = name, error = %crate::chain(&error), "could not remove a cgroup that is nobody's");
                }
            }
        }
        Err(error) => {
            tracing::warn!(error = %crate::chain(&error), "could not look for cgroups that are nobody's")
        }
    }
    let living = node.registry.sandboxes();
    if let Err(error) = node.bridge.reconcile(living.iter().map(|sandbox| sandbox.id().as_str())) {
        tracing::warn!(error = %crate::chain(&error), "could not free the addresses that are nobody's");
    }
    Ok(())
}

fn remove_sandbox_state(path: &Path) {
    for kind in [ns::Kind::Network, ns::Kind::Ipc, ns::Kind::Uts, ns::Kind::Pid] {
        // Absent is the rule here; what fails is seen when the folder cannot be removed.
        let _ = ns::unpin(&path.join(kind.file_name()));
    }
    let _ = berth_sys::mount::detach(&path.join("shm"));
    if let Err(error) = std::fs::remove_dir_all(path) {
        tracing::warn!(path = %path.display(), %error, "could not remove the remains of a sandbox");
    }
}

fn names(path: &Path) -> Result<Vec<String>, RecoveryError> {
    let failed = |source| RecoveryError::List { path: path.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
