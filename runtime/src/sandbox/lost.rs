//! Sandboxes for containers whose own has lost its record, so that a kubelet can list, stop and
//! remove them.
//!
//! Its data comes from the containers' records and from the runtime directory. It is NotReady: a
//! kubelet creates another for the pod, and removes this one with everything in it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use berth_cgroup::{Driver, Parent};
use berth_cri::labels::{POD_NAME, POD_NAMESPACE, POD_UID};
use berth_model::id::SandboxId;
use berth_model::record::{ContainerRecord, SandboxRecord};
use berth_model::sandbox::{Config, Metadata};
use berth_model::security::{NamespaceMode, Namespaces};
use berth_sys::ns::Kind;

use super::{Sandbox, recover};
use crate::container::Container;
use crate::node::Node;

/// Reconstructs the sandbox `id` from its containers, of which there is at least one.
/// `keeps_record` if its record is there and may become readable later. Blocking.
pub(crate) fn make(
    node: &Node,
    id: &SandboxId,
    containers: &[Arc<Container>],
    keeps_record: bool,
) -> Arc<Sandbox> {
    let files = node.layout.sandbox(id);
    let records: Vec<&ContainerRecord> = containers.iter().map(|container| container.record()).collect();
    let cgroup_parent = records
        .iter()
        .find_map(|record| Parent::of(&record.cgroup).ok().filter(|_| !record.cgroup.is_empty()))
        .unwrap_or_else(|| node.cgroups.default_parent.clone());
    let own_pid = berth_sys::ns::is_pinned(&files.namespace(Kind::Pid.file_name())).unwrap_or(true);
    let mut config = config(id, &records, own_pid);
    if cgroup_parent.path() != node.cgroups.default_parent.path() {
        config.cgroup_parent = named(&cgroup_parent);
    }
    let record = SandboxRecord {
        id: id.clone(),
        config,
        created_at_unix_ns: records.iter().map(|record| record.created_at_unix_ns).min().unwrap_or(1),
        boot_id: node.boot_id.clone(),
        addresses: node.network.addresses_of(id).iter().map(ToString::to_string).collect(),
        ..SandboxRecord::default()
    };
    let sandbox =
        recover::of_record(record, files, cgroup_parent, None, false, keeps_record, node.events.clone());
    tracing::error!(
        sandbox = %id, pod = %sandbox.config.metadata, containers = containers.len(),
        "cannot read the record of a sandbox; restoring it from its containers, not ready"
    );
    if let Err(error) = std::fs::create_dir_all(&sandbox.files.durable)
        .map_err(super::SandboxError::file("create", &sandbox.files.durable))
        .and_then(|()| sandbox.write_record())
    {
        tracing::warn!(sandbox = %id, error = %crate::chain(&error), "cannot write the restored record of a sandbox");
    }
    Arc::new(sandbox)
}

/// The parent as a pod would name it.
fn named(parent: &Parent) -> String {
    match parent.driver() {
        Driver::Cgroupfs => parent.path().to_owned(),
        Driver::Systemd => parent.path().rsplit('/').next().unwrap_or_default().to_owned(),
    }
}

fn config(id: &SandboxId, records: &[&ContainerRecord], own_pid: bool) -> Config {
    let label = |name: &str| {
        let found = records.iter().find_map(|record| record.config.labels.get(name));
        found.filter(|value| !value.is_empty()).cloned()
    };
    let labels: BTreeMap<String, String> = [POD_NAME, POD_NAMESPACE, POD_UID]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), label(name)?)))
        .collect();
    let short = id.as_str().get(..12).unwrap_or_default();
    let asked = records.first().map(|record| record.config.security.namespaces.clone()).unwrap_or_default();
    let shares_pid = records.iter().any(|record| record.config.security.namespaces.pid == NamespaceMode::Pod);
    Config {
        metadata: Metadata {
            name: label(POD_NAME).unwrap_or_else(|| format!("lost-{short}")),
            uid: label(POD_UID).unwrap_or_else(|| id.to_string()),
            namespace: label(POD_NAMESPACE).unwrap_or_default(),
            attempt: 0,
        },
        labels,
        log_directory: records.iter().find_map(|record| log_directory(record)).unwrap_or_default(),
        privileged: records.iter().any(|record| record.config.security.privileged),
        namespaces: Namespaces {
            network: asked.network,
            ipc: asked.ipc,
            pid: if shares_pid || own_pid { NamespaceMode::Pod } else { NamespaceMode::Container },
            target_id: String::new(),
        },
        ..Config::default()
    }
}

/// A container's log path is its sandbox's log directory plus the path in its configuration.
fn log_directory(record: &ContainerRecord) -> Option<String> {
    let (path, below) = (Path::new(&record.log_path), Path::new(&record.config.log_path));
    if record.config.log_path.is_empty() || !path.ends_with(below) {
        return None;
    }
    Some(path.ancestors().nth(below.components().count())?.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_the_one_that_the_containers_say() {
        let id = SandboxId::from_bytes([0xab; 32]);
        let mut record =
            ContainerRecord { log_path: "/logs/pod/web/0.log".to_owned(), ..ContainerRecord::default() };
        record.config.log_path = "web/0.log".to_owned();
        record.config.security.namespaces.network = NamespaceMode::Node;
        for (name, value) in
            [(POD_NAME, "web-1"), (POD_NAMESPACE, "shop"), (POD_UID, "1-2-3"), ("other", "x")]
        {
            record.config.labels.insert(name.to_owned(), value.to_owned());
        }
        let config = config(&id, &[&ContainerRecord::default(), &record], false);
        assert_eq!(config.metadata.to_string(), "shop/web-1 (uid 1-2-3, attempt 0)");
        assert_eq!((config.labels.len(), config.log_directory.as_str()), (3, "/logs/pod"));
        assert_eq!(config.namespaces.pid, NamespaceMode::Pod, "the default of the first record");
    }

    #[test]
    fn containers_of_others_than_a_kubelet_have_a_pod_too() {
        let id = SandboxId::from_bytes([0xab; 32]);
        let mut record = ContainerRecord::default();
        record.config.security.namespaces.pid = NamespaceMode::Container;
        let config = config(&id, &[&record], false);
        assert_eq!(
            (config.metadata.name.as_str(), config.metadata.uid.as_str()),
            ("lost-abababababab", id.as_str())
        );
        assert_eq!((config.namespaces.pid, config.log_directory.as_str()), (NamespaceMode::Container, ""));
    }
}
