//! The JSON in the `info` maps of verbose answers, with the keys that node tools read: `pid`,
//! `sandboxID`, `runtimeSpec`, `config.sandboxImage`.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::container::Container;
use crate::node::Node;
use crate::sandbox::Sandbox;

fn one(key: &str, value: &Value) -> BTreeMap<String, String> {
    BTreeMap::from([(key.to_owned(), value.to_string())])
}

/// Of `Status`.
pub(super) fn node(node: &Node) -> BTreeMap<String, String> {
    let written = serde_json::to_value(node.config().written()).unwrap_or(Value::Null);
    one(
        "config",
        &json!({
            // kubeadm compares it with its own; Berth's sandboxes need no image.
            "sandboxImage": "",
            "stateDir": node.layout.root(),
            "berth": written,
        }),
    )
}

/// Of `PodSandboxStatus`.
pub(super) fn sandbox(sandbox: &Sandbox) -> BTreeMap<String, String> {
    let config = sandbox.config();
    one(
        "info",
        &json!({
            "pid": sandbox.pid().unwrap_or(0),
            "netns": sandbox.files().namespace("net"),
            "config": serde_json::to_value(config).unwrap_or(Value::Null),
        }),
    )
}

/// Of `ContainerStatus`. Reads the spec from its file.
pub(super) fn container(container: &Container) -> BTreeMap<String, String> {
    let spec = std::fs::read(container.files().spec())
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok())
        .unwrap_or(Value::Null);
    one(
        "info",
        &json!({
            "sandboxID": container.sandbox_id().as_str(),
            "pid": container.pid().unwrap_or(0),
            "privileged": container.config().security.privileged,
            "config": serde_json::to_value(container.config()).unwrap_or(Value::Null),
            "runtimeSpec": spec,
        }),
    )
}

/// Of `ImageStatus`.
pub(super) fn image(image: &berth_image::Image) -> BTreeMap<String, String> {
    let spec = serde_json::from_slice::<Value>(image.raw_config()).unwrap_or(Value::Null);
    let layers: Vec<String> = image.layers().iter().map(ToString::to_string).collect();
    one("info", &json!({ "imageSpec": spec, "layers": layers }))
}
