//! A running container that has lost its record: it gets an owner that a kubelet can list, stop and
//! remove.
//!
//! Its data comes from its OCI spec, which exists for other tools, and finally from its shim.
//! Without a spec it is put into its own pod.

use std::sync::Arc;

use ::oci_spec::runtime::Spec;
use berth_cri::labels::{CONTAINER_NAME, POD_NAME, POD_NAMESPACE, POD_UID};
use berth_model::container::{Config, Metadata};
use berth_model::id::{ContainerId, SandboxId};
use berth_model::layout::ContainerFiles;
use berth_model::record::ContainerRecord;
use berth_model::security::NamespaceMode;

use super::{Container, ContainerError, recover};
use crate::node::Node;
use crate::shim_client::{ConnectError, ShimClient};

/// The annotations of [`crate::oci_spec`], and the kubelet's labels that say the same.
const LABELS: [(&str, &str); 4] = [
    ("io.kubernetes.cri.container-name", CONTAINER_NAME),
    ("io.kubernetes.cri.sandbox-name", POD_NAME),
    ("io.kubernetes.cri.sandbox-namespace", POD_NAMESPACE),
    ("io.kubernetes.cri.sandbox-uid", POD_UID),
];
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Whether its shim is there, as far as can be known: only a socket without a listener says that it
/// is not. Must be called within the async runtime.
pub(crate) fn may_run(files: &ContainerFiles) -> bool {
    !matches!(ShimClient::connect(&files.state), Err(ConnectError::Gone | ConnectError::NoSocket))
}

/// Creates the container `id` without its record. `keeps_record` if that exists and may become
/// readable later. Blocking.
///
/// # Errors
/// When its cgroup cannot be named.
pub(crate) fn make(
    node: &Node,
    id: &ContainerId,
    keeps_record: bool,
) -> Result<Arc<Container>, ContainerError> {
    let files = node.layout.container(id);
    let spec = Spec::load(files.spec()).ok();
    let container = recover::of_record(node, record(id, spec.as_ref()), keeps_record)?;
    if !keeps_record {
        let written = std::fs::create_dir_all(&files.durable)
            .map_err(ContainerError::file("create", &files.durable))
            .and_then(|()| {
                let failed = |source| ContainerError::Record { id: id.clone(), source };
                container.record_files().write(container.record()).map_err(failed)
            });
        if let Err(error) = written {
            tracing::warn!(container = %id, error = %crate::chain(&error), "cannot write the restored record of a container");
        }
    }
    Ok(Arc::new(container))
}

fn record(id: &ContainerId, spec: Option<&Spec>) -> ContainerRecord {
    let annotation = |name: &str| {
        spec.and_then(|spec| spec.annotations().as_ref()?.get(name)).filter(|text| !text.is_empty())
    };
    let sandbox_id = annotation(SANDBOX_ID).and_then(|text| text.parse().ok());
    let (name, _) = LABELS[0];
    let cgroup =
        spec.and_then(|spec| spec.linux().as_ref()?.cgroups_path().as_ref()?.to_str()).unwrap_or_default();
    let mut config = Config {
        metadata: Metadata {
            name: annotation(name).cloned().unwrap_or_else(|| "lost".to_owned()),
            attempt: 0,
        },
        labels: LABELS
            .into_iter()
            .filter_map(|(from, to)| Some((to.to_owned(), annotation(from)?.clone())))
            .collect(),
        ..Config::default()
    };
    config.security.namespaces.pid = NamespaceMode::Container;
    ContainerRecord {
        id: id.clone(),
        // Unique: ids are random.
        sandbox_id: sandbox_id
            .or_else(|| id.as_str().parse().ok())
            .unwrap_or_else(|| SandboxId::from_bytes([0; 32])),
        config,
        created_at_unix_ns: crate::clock::unix_ns(),
        cgroup: cgroup.to_owned(),
        ..ContainerRecord::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_spec_says_is_taken_and_without_one_it_has_a_pod_of_its_own() {
        let id = ContainerId::from_bytes([0xcd; 32]);
        let sandbox = SandboxId::from_bytes([1; 32]);
        let text = format!(
            r#"{{"ociVersion":"1.2.0","annotations":{{"{SANDBOX_ID}":"{sandbox}","io.kubernetes.cri.container-name":"web",
                "io.kubernetes.cri.sandbox-uid":"1-2","io.kubernetes.cri.sandbox-name":""}},
                "linux":{{"cgroupsPath":"/kubepods/pod1/{id}"}}}}"#
        );
        let found = record(&id, Some(&serde_json::from_str(&text).unwrap()));
        assert_eq!((found.sandbox_id, found.config.metadata.name.as_str()), (sandbox, "web"));
        let labels: Vec<_> =
            found.config.labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(labels, [("io.kubernetes.container.name", "web"), ("io.kubernetes.pod.uid", "1-2")]);
        assert_eq!(found.cgroup, format!("/kubepods/pod1/{id}"));
        let nothing = record(&id, None);
        assert_eq!((nothing.id.as_str(), nothing.sandbox_id.as_str()), (id.as_str(), id.as_str()));
    }
}
