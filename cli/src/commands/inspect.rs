//! `berth inspect`: everything that the CRI reports about a pod, container or image, as JSON.
//!
//! The names of the keys are those of the CRI messages, in the camel case that protobuf's JSON form
//! has, so that they can be looked up in the proto file. Times are dates. The daemon's free-form
//! details are under `info`.

use std::collections::BTreeMap;

use berth_cri::v1::{
    ContainerStatus, ContainerStatusRequest, Image, ImageStatusRequest, LinuxContainerResources, Mount,
    PodSandboxStatus, PodSandboxStatusRequest,
};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::clock::rfc3339;
use crate::daemon::{Daemon, ask, image_spec};
use crate::error::Error;
use crate::names::{NameError, Target, short_id};
use crate::output;

/// Prints a JSON array with an object for each name.
///
/// # Errors
/// When a name is unknown, or a call to the daemon fails.
pub(crate) async fn inspect(daemon: &Daemon, args: &InspectArgs) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let mut objects = Vec::with_capacity(args.names.len());
    for name in &args.names {
        objects.push(match inventory.target(name) {
            Ok(Target::Container(container)) => container_object(daemon, &container.id).await?,
            Ok(Target::Pod(pod)) => pod_object(daemon, &pod.id).await?,
            // References of images look like names in pods: `library/busybox`.
            Err(NameError::Unknown(_)) => image_object(daemon, name).await?,
            Err(error) => return Err(error.into()),
        });
    }
    Ok(output::line(format_args!("{:#}", Value::Array(objects)))?)
}

async fn container_object(daemon: &Daemon, id: &str) -> Result<Value, Error> {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
    let act = format!("inspect container {}", short_id(id));
    let response = ask(act, daemon.runtime.clone().container_status(request)).await?;
    let status = response.status.unwrap_or_default();
    Ok(json!({ "kind": "container", "status": container_status(&status), "info": details(&response.info) }))
}

async fn pod_object(daemon: &Daemon, id: &str) -> Result<Value, Error> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
    let act = format!("inspect pod {}", short_id(id));
    let response = ask(act, daemon.runtime.clone().pod_sandbox_status(request)).await?;
    let status = response.status.unwrap_or_default();
    Ok(json!({ "kind": "pod", "status": pod_status(&status), "info": details(&response.info) }))
}

async fn image_object(daemon: &Daemon, name: &str) -> Result<Value, Error> {
    let request = ImageStatusRequest { image: Some(image_spec(name)), verbose: true };
    let call = ask(format!("inspect image {name}"), daemon.images.clone().image_status(request)).await;
    let response = call?;
    let image = response.image.ok_or_else(|| Error::Nothing(name.to_owned()))?;
    Ok(json!({ "kind": "image", "status": image_status(&image), "info": details(&response.info) }))
}

/// The daemon's details: values are usually JSON, and shown as such if they are.
fn details(info: &BTreeMap<String, String>) -> Value {
    let parsed = |text: &String| serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone()));
    info.iter().map(|(key, value)| (key.clone(), parsed(value))).collect()
}

fn container_status(status: &ContainerStatus) -> Value {
    let metadata = status.metadata.clone().unwrap_or_default();
    let image = status.image.clone().unwrap_or_default();
    let user = status.user.as_ref().and_then(|user| user.linux.as_ref());
    let resources = status.resources.as_ref().and_then(|resources| resources.linux.as_ref());
    json!({
        "id": status.id,
        "metadata": { "name": metadata.name, "attempt": metadata.attempt },
        "state": status.state().as_str_name(),
        "createdAt": rfc3339(status.created_at),
        "startedAt": rfc3339(status.started_at),
        "finishedAt": rfc3339(status.finished_at),
        "exitCode": status.exit_code,
        "reason": status.reason,
        "message": status.message,
        "image": { "image": image.image, "userSpecifiedImage": image.user_specified_image },
        "imageRef": status.image_ref,
        "imageId": status.image_id,
        "logPath": status.log_path,
        "stopSignal": status.stop_signal().as_str_name(),
        "user": user.map(|user| json!({
            "uid": user.uid,
            "gid": user.gid,
            "supplementalGroups": user.supplemental_groups,
        })),
        "resources": resources.map(container_resources),
        "mounts": status.mounts.iter().map(container_mount).collect::<Vec<_>>(),
        "labels": status.labels,
        "annotations": status.annotations,
    })
}

fn container_resources(resources: &LinuxContainerResources) -> Value {
    json!({
        "cpuPeriod": resources.cpu_period,
        "cpuQuota": resources.cpu_quota,
        "cpuShares": resources.cpu_shares,
        "cpusetCpus": resources.cpuset_cpus,
        "cpusetMems": resources.cpuset_mems,
        "memoryLimitInBytes": resources.memory_limit_in_bytes,
        "memorySwapLimitInBytes": resources.memory_swap_limit_in_bytes,
        "oomScoreAdj": resources.oom_score_adj,
        "unified": resources.unified,
    })
}

fn container_mount(mount: &Mount) -> Value {
    json!({
        "containerPath": mount.container_path,
        "hostPath": mount.host_path,
        "readonly": mount.readonly,
        "propagation": mount.propagation().as_str_name(),
        "image": mount.image.as_ref().map(|image| &image.image),
    })
}

fn pod_status(status: &PodSandboxStatus) -> Value {
    let metadata = status.metadata.clone().unwrap_or_default();
    let network = status.network.as_ref().map(|network| {
        let additional: Vec<_> = network.additional_ips.iter().map(|address| &address.ip).collect();
        json!({ "ip": network.ip, "additionalIps": additional })
    });
    let options = status.linux.as_ref().and_then(|linux| linux.namespaces.as_ref()?.options.as_ref());
    json!({
        "id": status.id,
        "metadata": {
            "name": metadata.name,
            "namespace": metadata.namespace,
            "uid": metadata.uid,
            "attempt": metadata.attempt,
        },
        "state": status.state().as_str_name(),
        "createdAt": rfc3339(status.created_at),
        "network": network,
        "namespaces": options.map(|options| json!({
            "network": options.network().as_str_name(),
            "pid": options.pid().as_str_name(),
            "ipc": options.ipc().as_str_name(),
        })),
        "runtimeHandler": status.runtime_handler,
        "labels": status.labels,
        "annotations": status.annotations,
    })
}

fn image_status(image: &Image) -> Value {
    json!({
        "id": image.id,
        "repoTags": image.repo_tags,
        "repoDigests": image.repo_digests,
        "size": image.size,
        "uid": image.uid.map(|uid| uid.value),
        "username": image.username,
        "pinned": image.pinned,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_that_are_json_are_shown_as_json() {
        let info = [("info", "{\"pid\": 7}"), ("note", "just text"), ("empty", "")];
        let info = info.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        assert_eq!(details(&info), json!({ "info": { "pid": 7 }, "note": "just text", "empty": "" }));
    }

    #[test]
    fn an_empty_status_is_shown_without_inventing_anything() {
        let shown = container_status(&ContainerStatus::default());
        assert_eq!(shown["startedAt"], "");
        assert_eq!(shown["user"], Value::Null);
        let shown = pod_status(&PodSandboxStatus::default());
        assert_eq!((&shown["network"], &shown["namespaces"]), (&Value::Null, &Value::Null));
        assert_eq!(image_status(&Image::default())["uid"], Value::Null);
    }

    #[test]
    fn states_have_the_names_of_the_protocol() {
        let status = ContainerStatus { state: 2, created_at: 1, ..ContainerStatus::default() };
        let shown = container_status(&status);
        assert_eq!(shown["state"], "CONTAINER_EXITED");
        assert_eq!(shown["createdAt"], "1970-01-01T00:00:00.000000001Z");
    }
}
