//! Sandboxes of a previous daemon.

use std::sync::{Arc, Mutex};

use berth_cgroup::Parent;
use berth_model::id::SandboxId;
use berth_model::layout::{Layout, SandboxFiles, Shared};
use berth_model::record::SandboxRecord;
use berth_model::security::NamespaceMode;
use berth_model::state::SandboxState;
use berth_network::Known;
use berth_sys::ns::Kind;

use super::creations::Creations;
use super::{PodProcess, Sandbox, SandboxError, namespaces, watch};
use crate::events::Events;
use crate::network::host_ports;
use crate::node::Node;
use crate::record_files::{self, Fault, Found, Health, Patience, RecordFiles};

/// What exists of a sandbox.
#[derive(Debug)]
pub(crate) enum Recovered {
    /// It is complete.
    Sandbox(Arc<Sandbox>),
    /// Its creation was never finished, or its removal was.
    Remains,
    /// There is a record that cannot be used.
    Unusable {
        /// What is wrong with it.
        fault: Fault,
        /// Whether it is proven damaged.
        damaged: bool,
    },
}

/// Creates the sandbox from the record of `id`. It is ready only if everything that its containers
/// need still exists; after a reboot nothing does. Blocking.
///
/// # Errors
/// When its record is valid but the sandbox cannot be created from it.
pub(crate) fn recover(node: &Node, id: &SandboxId, patience: &Patience) -> Result<Recovered, SandboxError> {
    let mut files = node.layout.sandbox(id);
    let record_files = RecordFiles { record: files.record(), copy: files.record_copy() };
    let (record, health) = match record_files.read(patience, |record: &SandboxRecord| record.id == *id) {
        Found::Absent => return Ok(Recovered::Remains),
        Found::Unusable { fault, damaged } => return Ok(Recovered::Unusable { fault, damaged }),
        Found::Whole { content, health } => (content, health),
    };
    if !record.shared_in_tmpfs {
        files.shared = Shared::Beside;
    }
    let cgroup_parent = node.cgroups.recorded_parent(&record.config.cgroup_parent)?;
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
        && (record.process.is_none() || process.as_ref().is_some_and(|process| !process.has_ended()));
    let kept = matches!(health, Health::Newer(_));
    record_files::mend(&node.layout, "sandbox", id.as_str(), &record_files, &health, &record);
    let sandbox = of_record(record, files, cgroup_parent, process, whole, kept, node.events.clone());
    Ok(Recovered::Sandbox(Arc::new(sandbox)))
}

/// The addresses and host ports in the record of `id`; none if there is no readable record, `None`
/// if it was stopped. Blocking.
pub(crate) fn network(layout: &Layout, id: &SandboxId, patience: &Patience) -> Option<Known> {
    let files = layout.sandbox(id);
    let record_files = RecordFiles { record: files.record(), copy: files.record_copy() };
    match record_files.read(patience, |record: &SandboxRecord| record.id == *id) {
        Found::Whole { content, .. } => (!content.stopped).then(|| Known {
            addresses: content.addresses.iter().filter_map(|text| text.parse().ok()).collect(),
            host_ports: host_ports(&content.config),
        }),
        // It may have an interface, whose address is unknown.
        Found::Unusable { .. } => Some(Known::default()),
        Found::Absent => files.state.exists().then(Known::default),
    }
}

/// Makes a sandbox of a previous daemon visible. Blocking.
pub(crate) fn adopt(node: &Node, sandbox: Arc<Sandbox>) {
    node.registry.adopt_sandbox(sandbox.clone());
    sandbox.report_lost();
    // After that, since it reports an end itself.
    watch::watch(&sandbox);
}

/// The sandbox of a record.
pub(super) fn of_record(
    record: SandboxRecord,
    files: SandboxFiles,
    cgroup_parent: Parent,
    process: Option<PodProcess>,
    ready: bool,
    keeps_record: bool,
    events: Events,
) -> Sandbox {
    Sandbox {
        id: record.id,
        config: Arc::new(record.config),
        created_at_unix_ns: record.created_at_unix_ns,
        boot_id: record.boot_id,
        hostname: record.hostname,
        addresses: record.addresses.into(),
        has_plugins: !record.without_plugins,
        files,
        cgroup_parent,
        state: Mutex::new(if ready { SandboxState::Ready } else { SandboxState::NotReady }),
        events,
        reporting: Mutex::default(),
        process: Mutex::new(process),
        creations: Creations::default(),
        stopping: tokio::sync::Mutex::default(),
        torn_down: Mutex::new(record.stopped),
        keeps_record,
    }
}
