//! Removes what belongs to no object: shims whose containers were never recorded, namespaces and
//! mounts of sandboxes that were never finished, cgroups, addresses. What only takes disk space is
//! left to `housekeeping`.
//!
//! Remains are found before the socket opens and removed after that, by name: objects created
//! meanwhile have different names, since ids are random, and are not touched.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_cgroup::Parent;
use berth_model::id::ContainerId;
use berth_model::state::ContainerState;
use berth_sys::ns;
use futures_util::StreamExt;
use tokio::sync::Semaphore;

use super::{RecoveryError, names, unread};
use crate::container::{self, Container};
use crate::network::Dead;
use crate::node::Node;
use crate::record_files::Patience;
use crate::shim_client::{ConnectError, ShimClient};
use crate::trash;

/// Waits in parallel.
const AT_ONCE: usize = 8;

/// How long an orphaned cgroup may take to be empty, and to be removed.
const ORPHAN_GONE: Duration = Duration::from_secs(5);

/// How often an unreachable shim is tried, and the pause in between.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// The longest pause before another attempt to detach pods that are gone.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What to remove, and what to retry.
#[derive(Debug)]
pub(crate) struct Remains {
    /// Durable directories of unfinished objects.
    directories: Vec<PathBuf>,
    container_states: Vec<PathBuf>,
    sandbox_states: Vec<PathBuf>,
    /// Orphaned cgroups.
    cgroups: Vec<(Parent, String)>,
    network: Option<Dead>,
    /// Containers that ended while there was no daemon: their cgroups may remain.
    ended: Vec<Arc<Container>>,
    room: Arc<Semaphore>,
}

impl Remains {
    /// Finds what the registry does not know. Blocking.
    pub(super) fn find(node: &Node, patience: &Patience) -> Result<Self, RecoveryError> {
        let unknown = |directory: &Path| -> Result<Vec<PathBuf>, RecoveryError> {
            let names = names(directory, patience)?;
            Ok(names
                .iter()
                .filter(|name| !node.registry.has(name))
                .map(|name| directory.join(name))
                .collect())
        };
        let layout = &node.layout;
        // Names other than ids in the durable directories are not this daemon's.
        let is_id = |path: &PathBuf| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.parse::<ContainerId>().is_ok())
        };
        let mut directories = unknown(&layout.containers())?;
        directories.extend(unknown(&layout.sandboxes())?);
        directories.retain(is_id);
        let cgroups = node.cgroups.orphans(|id| node.registry.has(id));
        let living: Vec<String> = node
            .registry
            .sandboxes()
            .iter()
            // A stopped one was released, whether or not its addresses were free yet.
            .filter(|sandbox| !sandbox.is_torn_down())
            .map(|sandbox| sandbox.id().to_string())
            .chain(node.registry.unread())
            .collect();
        let network =
            node.network.dead(&living.iter().map(String::as_str).collect::<Vec<_>>()).inspect_err(|error| {
                tracing::warn!(error = %crate::chain(error), "cannot look for orphaned interfaces");
            });
        let mut ended = node.registry.containers();
        ended.retain(|container| {
            matches!(container.state(), ContainerState::Exited(_)) && container.cgroup().is_there()
        });
        Ok(Self {
            directories,
            container_states: unknown(&layout.container_states())?,
            sandbox_states: unknown(&layout.sandbox_states())?,
            cgroups,
            network: network.ok(),
            ended,
            room: Arc::new(Semaphore::new(0)),
        })
    }

    pub(super) fn with_room(self, room: Arc<Semaphore>) -> Self {
        Self { room, ..self }
    }

    /// Removes everything. Failures are logged; the next start finds them again.
    pub(crate) async fn clear(self, node: Arc<Node>) {
        tokio::spawn(unread::try_again(node.clone(), self.room.clone()));
        let shims = futures_util::stream::iter(self.container_states.clone());
        // In parallel, as some may hang.
        let reached: Vec<bool> =
            shims.map(|state| async move { end_shim(&state).await }).buffered(AT_ONCE).collect().await;
        let kept: Vec<String> = self
            .container_states
            .iter()
            .zip(reached)
            .filter(|(_, reached)| !reached)
            .filter_map(|(state, _)| Some(state.file_name()?.to_str()?.to_owned()))
            .collect();
        // A panic in there is a bug, which is logged.
        let clearing = node.clone();
        let _ = tokio::task::spawn_blocking(move || self.clear_the_rest(&clearing, &kept)).await;
        tokio::spawn(detach_dead(node.clone()));
        node.collect_images();
    }

    /// `kept`: containers whose shims cannot be reached. Blocking.
    fn clear_the_rest(self, node: &Node, kept: &[String]) {
        let is_kept = |path: &Path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| kept.iter().any(|kept| kept == name))
        };
        for container in self.ended {
            container::recover::clean(&container);
        }
        for (parent, name) in self.cgroups.iter().filter(|(_, name)| !kept.contains(name)) {
            let gone = node.cgroups.open(parent, name).and_then(|cgroup| {
                if node.cgroups.is_anothers(&cgroup) {
                    return Ok(());
                }
                let gone = cgroup.kill(ORPHAN_GONE).and_then(|()| cgroup.remove(ORPHAN_GONE));
                gone.inspect_err(|_| node.cgroups.keep_left(&cgroup))
            });
            if let Err(error) = gone {
                tracing::warn!(cgroup = name, parent = parent.path(), error = %crate::chain(&error), "cannot remove an orphaned cgroup; trying again");
            }
        }
        for path in self.container_states.iter().filter(|path| !is_kept(path)) {
            if let Err(error) = std::fs::remove_dir_all(path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove the remains of a container");
            }
        }
        for path in &self.sandbox_states {
            remove_sandbox_state(path);
        }
        for path in self.directories.iter().filter(|path| !is_kept(path)) {
            if let Err(error) = trash::discard(&node.layout, path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove an unfinished container or sandbox");
            }
        }
        if let Some(dead) = &self.network
            && let Err(error) = node.network.remove_dead(dead)
        {
            tracing::warn!(error = %crate::chain(&error), "cannot free orphaned addresses");
        }
    }
}

/// Has CNI's plugins give back what they have of pods that no longer exist, as soon as the
/// directories that this needs answer.
async fn detach_dead(node: Arc<Node>) {
    let mut pause = PAUSE;
    loop {
        let detaching = node.clone();
        let detached = tokio::task::spawn_blocking(move || {
            // In this order: what is made meanwhile is complete once it is not being made.
            let exists = |id: &str| detaching.registry.is_being_made(id) || detaching.registry.has(id);
            detaching.network.detach_dead(&exists)
        });
        let again = match detached.await {
            Ok(Err(error)) => {
                tracing::warn!(error = %crate::chain(&error), "cannot give back what pods that are gone have of CNI networks");
                error.is_silence()
            }
            _ => false,
        };
        if !again {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

/// Ends a shim that belongs to no container. `false` if there may be one that cannot be reached.
async fn end_shim(state: &Path) -> bool {
    for attempt in 1..=ATTEMPTS {
        match ShimClient::connect(state) {
            Ok(shim) => {
                shim.discard().await;
                return true;
            }
            Err(ConnectError::Gone | ConnectError::NoSocket) => return true,
            Err(ConnectError::NotNow(_)) if attempt < ATTEMPTS => tokio::time::sleep(PAUSE).await,
            Err(ConnectError::NotNow(error)) => {
                tracing::warn!(path = %state.display(), %error, "cannot end an orphaned shim");
            }
        }
    }
    false
}

fn remove_sandbox_state(path: &Path) {
    for kind in [ns::Kind::Network, ns::Kind::Ipc, ns::Kind::Uts, ns::Kind::Pid] {
        // Usually absent; errors show up when the directory cannot be removed.
        let _ = ns::unpin(&path.join(kind.file_name()));
    }
    let _ = berth_sys::mount::detach(&path.join("shm"));
    if let Err(error) = std::fs::remove_dir_all(path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove the remains of a sandbox");
    }
}
