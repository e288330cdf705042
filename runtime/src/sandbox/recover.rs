//! Sandboxes of the daemon before this one.

use super::{PodProcess, Sandbox, SandboxError, lock, namespaces};
use crate::node::Node;
use berth_model::id::SandboxId;
use berth_model::layout::Shared;
use berth_model::record::{self, SandboxRecord};
use berth_model::security::NamespaceMode;
use berth_model::state::SandboxState;
use berth_sys::ns::Kind;
use std::sync::{Arc, Mutex};

/// Makes the sandbox that the record of `id` describes. It is ready only if everything that its containers need is there still; after a
/// reboot nothing is. Blocking.
pub(crate) fn recover(node: &Node, id: &SandboxId) -> Result<Arc<Sandbox>, SandboxError> {
    let mut files = node.layout.sandbox(id);
    let path = files.record();
    let bytes = std::fs::read(&path).map_err(SandboxError::file("read", &path))?;
    let record: SandboxRecord =
        record::decode(&bytes).map_err(|source| SandboxError::Record { id: id.clone(), source })?;
    if !record.shared_in_tmpfs {
        files.shared = Shared::Beside;
    }
    let cgroup_parent = node.recorded_cgroup_parent(&record.config.cgroup_parent)?;
    let same_boot = record.boot_id == node.boot_id;
    let process = record.process.filter(|_| same_boot).and_then(PodProcess::find);
    let mut needed = Vec::new();
    if record.config.namespaces.network != NamespaceMode::Node {
        needed.extend([Kind::Network, Kind::Uts]);
    }
    if record.config.namespaces.ipc != NamespaceMode::Node {
        needed.push(Kind::Ipc);
    }
    if record.config.namespaces.pid == NamespaceMode::Pod {
        needed.push(Kind::Pid);
    }
    let whole = same_boot
        && !record.stopped
        && namespaces::all_pinned(&files, &needed)
        && (record.process.is_none() || process.is_some());
    let sandbox = Sandbox {
        id: record.id,
        config: record.config,
        created_at_unix_ns: record.created_at_unix_ns,
        boot_id: record.boot_id,
        hostname: record.hostname,
        addresses: record.addresses,
        files,
        cgroup_parent,
        state: Mutex::new(if whole { SandboxState::Ready } else { SandboxState::NotReady }),
        process: Mutex::new(process),
        gate: tokio::sync::RwLock::new(()),
        torn_down: Mutex::new(record.stopped),
    };
    if !whole && !*lock(&sandbox.torn_down) {
        tracing::warn!(sandbox = %sandbox.id, pod = %sandbox.config.metadata, "sandbox has lost what it needs and is not ready");
    }
    Ok(Arc::new(sandbox))
}
