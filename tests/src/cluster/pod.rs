//! Pods as the API server reports them.

use std::collections::BTreeMap;

use serde_json::Value;

/// A pod as the API server reports it: the parts of `v1.Pod` (Kubernetes API reference) that the
/// tests look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its uid, which is in the names of its cgroups.
    pub uid: String,
    /// The name of its node; empty before it has one.
    pub node: String,
    /// Its address; empty before it has one.
    pub address: String,
    /// Whether its condition `Ready` is true and it is not being deleted.
    pub ready: bool,
    /// The ids of its containers by their names, without the prefix that names the runtime.
    /// Containers without an id are left out.
    pub container_ids: BTreeMap<String, String>,
    /// How often its first container was restarted.
    pub restart_count: u64,
    /// Why its first container waits, if it does.
    pub waiting: String,
    /// Exit code of the previous instance of the first container, if there was one.
    pub previous_exit_code: Option<i64>,
}

impl Pod {
    pub(super) fn read(pod: &Value) -> Self {
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let ready = conditions.into_iter().flatten().find(|condition| text(condition, "/type") == "Ready");
        let ready = ready.is_some_and(|condition| text(condition, "/status") == "True");
        let container = |field: &str| pod.pointer(&format!("/status/containerStatuses/0{field}"));
        Self {
            name: text(pod, "/metadata/name"),
            uid: text(pod, "/metadata/uid"),
            node: text(pod, "/spec/nodeName"),
            address: text(pod, "/status/podIP"),
            ready: ready && pod.pointer("/metadata/deletionTimestamp").is_none(),
            container_ids: pod
                .pointer("/status/containerStatuses")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(|status| {
                    let (_, id) = status.get("containerID")?.as_str()?.split_once("://")?;
                    Some((text(status, "/name"), id.to_owned()))
                })
                .collect(),
            restart_count: container("/restartCount").and_then(Value::as_u64).unwrap_or_default(),
            waiting: container("/state/waiting/reason")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
            previous_exit_code: container("/lastState/terminated/exitCode").and_then(Value::as_i64),
        }
    }
}

/// The string at `pointer`, empty when there is none.
fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_read_however_little_is_known_of_it() {
        let fresh =
            Pod::read(&json!({"metadata": {"name": "a", "uid": "1"}, "status": {"phase": "Pending"}}));
        assert_eq!((fresh.name.as_str(), fresh.uid.as_str(), fresh.address.as_str()), ("a", "1", ""));
        assert_eq!((fresh.ready, fresh.restart_count, fresh.previous_exit_code), (false, 0, None));

        let ready = json!([{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}]);
        let mut pod =
            json!({"metadata": {"name": "b"}, "status": {"podIP": "10.88.0.2", "conditions": ready}});
        assert!(Pod::read(&pod).ready);
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(!Pod::read(&pod).ready, "a pod that is to end is not counted any more");

        let crashing = json!({"status": {"containerStatuses": [{
            "name": "main",
            "containerID": "berth://0a",
            "restartCount": 2,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 7}},
        }]}});
        let crashing = Pod::read(&crashing);
        assert_eq!((crashing.restart_count, crashing.waiting.as_str()), (2, "CrashLoopBackOff"));
        assert_eq!(crashing.previous_exit_code, Some(7));
        assert_eq!(crashing.container_ids, BTreeMap::from([("main".to_owned(), "0a".to_owned())]));
    }
}
