//! Recovery at the start of a daemon: the objects and remains of the previous one.
//!
//! Before the socket opens, everything is read and made visible; no shim is waited for longer than
//! a moment. After that, while requests are served, shims that have not answered are asked again
//! ([`crate::container::follow`]), unreadable records are retried ([`unread`]), and what belongs to
//! nothing is removed ([`remains`]).
//!
//! Nothing that may be running is killed, and nothing loses its owner, because something could not
//! be read. What becomes of an object:
//!
//! | its record | it is running, or contains containers | it is not running |
//! |---|---|---|
//! | can be read, or its copy | it is recovered | it is recovered |
//! | cannot be read (an error, a newer version) | it is reconstructed, its record left alone | reading is retried |
//! | is proven damaged | it is reconstructed, its record goes to quarantine | it goes to quarantine with its files |
//! | is gone, and its copy too | a sandbox is reconstructed, a container is removed | it was never finished and is removed |
//!
//! "Reconstructed": from its OCI spec, its containers and its shim ([`crate::container::lost`],
//! [`crate::sandbox::lost`]).

mod remains;
mod unread;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use berth_model::id::{ContainerId, SandboxId};
use berth_model::state::ContainerState;
use tokio::sync::Semaphore;

use crate::container::{self, Container, follow};
use crate::node::Node;
use crate::record_files::{self, Fault, Patience, patiently};
use crate::sandbox::{self, Sandbox};
use crate::{cadvisor, container::lost};

pub(crate) use remains::Remains;

/// How long shims may take to answer before the socket opens. Normally they take milliseconds.
const ANSWERS: Duration = Duration::from_secs(1);

/// How long failed reads may be retried, in total, before the socket opens.
const PATIENCE: Duration = Duration::from_secs(2);

/// Descriptors reserved for everything but connections to shims: clients, files, programs.
const RESERVED_DESCRIPTORS: u64 = 20;

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// One of the daemon's own directories.
    #[error("cannot list {path}")]
    List {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The daemon's task ended early.
    #[error("the daemon is stopping")]
    Stopping,
}

/// Recovers all objects. The result is the work to do once the socket is open.
///
/// # Errors
/// When the daemon's own directories cannot be read; a single object is never an error.
pub(crate) async fn run(node: &Arc<Node>) -> Result<Remains, RecoveryError> {
    let reading = node.clone();
    let remains =
        tokio::task::spawn_blocking(move || read(&reading)).await.map_err(|_| RecoveryError::Stopping)??;
    let (sandboxes, containers) = (node.registry.sandboxes(), node.registry.containers());
    for sandbox in &sandboxes {
        cadvisor::show(node, sandbox).await;
    }
    let room = room();
    let answers: Vec<_> = containers
        .iter()
        .filter(|container| !matches!(container.state(), ContainerState::Exited(_)))
        .map(|container| follow::find(container, &room))
        .collect();
    let all = futures_util::future::join_all(answers);
    // The rest continues in the background.
    let _ = tokio::time::timeout(ANSWERS, all).await;
    if !sandboxes.is_empty() || !containers.is_empty() {
        tracing::info!(sandboxes = sandboxes.len(), containers = containers.len(), "recovered");
    }
    Ok(remains.with_room(room))
}

/// The number of connections to shims that there is room for.
fn room() -> Arc<Semaphore> {
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let limit =
        berth_sys::process::rlimit(berth_sys::process::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let left = limit.saturating_sub(RESERVED_DESCRIPTORS).saturating_sub(u64::try_from(open).unwrap_or(0));
    Arc::new(Semaphore::new(usize::try_from(left).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)))
}

/// Reads everything and makes it visible. Blocking.
fn read(node: &Arc<Node>) -> Result<Remains, RecoveryError> {
    let patience = Patience::of(PATIENCE);
    let layout = &node.layout;
    let mut container_ids: BTreeSet<ContainerId> = ids(&layout.containers(), &patience)?;
    container_ids.extend(ids::<ContainerId>(&layout.container_states(), &patience)?);
    for id in &container_ids {
        match container_of(node, id, &patience) {
            Verdict::Is(container) => node.registry.adopt_container(container),
            Verdict::Unread => node.registry.keep_unread(id.as_str()),
            Verdict::Nothing => {}
        }
    }
    let mut sandbox_ids: BTreeSet<SandboxId> = ids(&layout.sandboxes(), &patience)?;
    sandbox_ids.extend(ids::<SandboxId>(&layout.sandbox_states(), &patience)?);
    sandbox_ids.extend(node.registry.containers().iter().map(|container| container.sandbox_id().clone()));
    for id in &sandbox_ids {
        match sandbox_of(node, id, &patience) {
            Verdict::Is(sandbox) => sandbox::recover::adopt(node, sandbox),
            Verdict::Unread => node.registry.keep_unread(id.as_str()),
            Verdict::Nothing => {}
        }
    }
    for container in node.registry.containers() {
        container::recover::report_end(&container);
    }
    Remains::find(node, &patience)
}

/// The outcome for an object.
enum Verdict<T> {
    /// It was recovered.
    Is(Arc<T>),
    /// Its record cannot be read, and nothing of it is running.
    Unread,
    /// It does not exist; its files are remains.
    Nothing,
}

fn container_of(node: &Arc<Node>, id: &ContainerId, patience: &Patience) -> Verdict<Container> {
    use container::recover::{Recovered, recover};
    let files = node.layout.container(id);
    let keeps_record = match recover(node, id, patience) {
        Ok(Recovered::Container(container)) => return Verdict::Is(container),
        Ok(Recovered::Remains) => return Verdict::Nothing,
        Ok(Recovered::Unusable { fault, damaged }) => {
            say("container", id.as_str(), &fault, damaged);
            !damaged
        }
        Err(error) => {
            tracing::error!(container = %id, error = %crate::chain(&error), "cannot restore a container from its record");
            true
        }
    };
    if lost::may_run(&files) {
        if !keeps_record {
            record_files::set_aside(&node.layout, "container", id.as_str(), &files.record());
        }
        match lost::make(node, id, keeps_record) {
            Ok(container) => return Verdict::Is(container),
            Err(error) => {
                tracing::error!(container = %id, error = %crate::chain(&error), "a running container has no usable record")
            }
        }
        return Verdict::Unread;
    }
    if keeps_record {
        return Verdict::Unread;
    }
    set_aside(node, &files.durable);
    Verdict::Nothing
}

fn sandbox_of(node: &Arc<Node>, id: &SandboxId, patience: &Patience) -> Verdict<Sandbox> {
    use sandbox::recover::{Recovered, recover};
    let files = node.layout.sandbox(id);
    let containers = node.registry.containers_of(id);
    // `None`: there is no record.
    let keeps_record = match recover(node, id, patience) {
        Ok(Recovered::Sandbox(sandbox)) => return Verdict::Is(sandbox),
        Ok(Recovered::Remains) => None,
        Ok(Recovered::Unusable { fault, damaged }) => {
            say("sandbox", id.as_str(), &fault, damaged);
            Some(!damaged)
        }
        Err(error) => {
            tracing::error!(sandbox = %id, error = %crate::chain(&error), "cannot restore a sandbox from its record");
            Some(true)
        }
    };
    match (keeps_record, containers.is_empty()) {
        (_, false) => {
            if keeps_record == Some(false) {
                record_files::set_aside(&node.layout, "sandbox", id.as_str(), &files.record());
            }
            Verdict::Is(sandbox::lost::make(node, id, &containers, keeps_record == Some(true)))
        }
        (Some(true), true) => Verdict::Unread,
        (Some(false), true) => {
            set_aside(node, &files.durable);
            Verdict::Nothing
        }
        (None, true) => Verdict::Nothing,
    }
}

fn say(kind: &'static str, id: &str, fault: &Fault, damaged: bool) {
    let error = crate::chain(fault);
    if damaged {
        tracing::error!(kind, id, error, "a record is damaged and has no copy");
    } else {
        tracing::error!(
            kind,
            id,
            error,
            "cannot read a record, which has no copy; leaving it alone and trying again"
        );
    }
}

/// Moves a proven damaged object to quarantine.
fn set_aside(node: &Node, durable: &Path) {
    let target = node.layout.quarantine().join(durable.file_name().unwrap_or_default());
    tracing::error!(path = %durable.display(), quarantine = %target.display(), "moving a damaged record to quarantine");
    if let Err(error) = std::fs::rename(durable, &target)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %durable.display(), %error, "cannot move a damaged record to quarantine");
    }
}

/// The names in a directory that are ids.
fn ids<T: FromStr + Ord>(directory: &Path, patience: &Patience) -> Result<BTreeSet<T>, RecoveryError> {
    Ok(names(directory, patience)?.iter().filter_map(|name| name.parse().ok()).collect())
}

fn names(path: &Path, patience: &Patience) -> Result<Vec<String>, RecoveryError> {
    let list = || {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path)? {
            // Not UTF-8, so not an id.
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    };
    patiently(patience, list).map_err(|source| RecoveryError::List { path: path.to_owned(), source })
}

/// The addresses and host ports of the sandboxes that may have an interface, from their records.
/// Blocking.
pub(crate) fn known_networks(
    layout: &berth_model::layout::Layout,
) -> std::collections::BTreeMap<String, berth_network::Known> {
    let patience = Patience::of(Duration::ZERO);
    let durable = ids::<SandboxId>(&layout.sandboxes(), &patience).unwrap_or_default();
    let state = ids::<SandboxId>(&layout.sandbox_states(), &patience).unwrap_or_default();
    let known = |id: SandboxId| {
        let known = sandbox::recover::network(layout, &id, &patience)?;
        Some((id.to_string(), known))
    };
    durable.union(&state).cloned().filter_map(known).collect()
}
