//! Rotates the logs of pods that ask for it by an annotation: those of `berth run`, which no
//! kubelet takes care of. after. It happens here, and not in the command, because such a pod runs
//! without one when it is detached. As with a kubelet, sizes are checked periodically: a log may
//! exceed its limit for [`LOOK`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use berth_model::state::ContainerState;

use crate::container::{self, Container};
use crate::node::Node;
use crate::sandbox::Sandbox;

/// Annotation of a sandbox: the size limit of its containers' logs, in bytes.
const ANNOTATION: &str = "berth.log-bytes";

/// On every sandbox of a kubelet: where it has the pod from (Kubernetes, `pkg/kubelet/types`,
/// `ConfigSourceAnnotationKey`). A pod's author can neither remove nor set it.
const OF_A_KUBELET: &str = "kubernetes.io/config.source";

/// The smallest limit: smaller logs would be rotated all the time.
const LEAST_BYTES: u64 = 4096;

/// How often logs are checked: as often as by a kubelet.
const LOOK: Duration = Duration::from_secs(10);

/// Rotates logs until the daemon ends.
pub(crate) async fn keep(node: Arc<Node>) {
    loop {
        tokio::time::sleep(LOOK).await;
        for sandbox in node.registry.sandboxes() {
            let Some(limit) = limit(&sandbox.config().annotations) else { continue };
            for container in node.registry.containers_of(sandbox.id()) {
                look_after(&node, &sandbox, &container, limit).await;
            }
        }
    }
}

/// The limit of a sandbox that asks for one. One of a kubelet never does: its annotations are the
/// pod author's, and its logs the kubelet's to rotate.
fn limit(annotations: &BTreeMap<String, String>) -> Option<u64> {
    if annotations.contains_key(OF_A_KUBELET) {
        return None;
    }
    let bytes = annotations.get(ANNOTATION)?.parse::<u64>().ok()?;
    (bytes > 0).then_some(bytes.max(LEAST_BYTES))
}

async fn look_after(node: &Arc<Node>, sandbox: &Sandbox, container: &Arc<Container>, limit: u64) {
    let (directory, name) = (sandbox.config().log_directory.clone(), container.config().log_path.clone());
    let runs = matches!(container.state(), ContainerState::Running { .. });
    if !runs || directory.is_empty() || name.is_empty() {
        return;
    }
    let node = node.clone();
    let rotating = tokio::task::spawn_blocking(move || {
        node.host_paths.rotate(Path::new(&directory), Path::new(&name), limit)
    });
    let outcome = match rotating.await {
        Ok(Ok(false)) | Err(_) => return,
        Ok(Ok(true)) => container::update::reopen_log(container).await.map_err(|error| crate::chain(&error)),
        Ok(Err(error)) => Err(crate::chain(&error)),
    };
    if let Err(error) = outcome {
        // Retried at the next check: a missing log is reopened.
        tracing::warn!(container = %container.id(), error, "could not rotate the log");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_of_pods_of_a_kubelet_ask_for_nothing() {
        let mut annotations = BTreeMap::from([(ANNOTATION.to_owned(), "1".to_owned())]);
        assert_eq!(limit(&annotations), Some(LEAST_BYTES));
        annotations.insert(OF_A_KUBELET.to_owned(), "api".to_owned());
        assert_eq!(limit(&annotations), None);
        assert_eq!(limit(&BTreeMap::from([(ANNOTATION.to_owned(), "0".to_owned())])), None);
    }
}
