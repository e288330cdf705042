//! `berth ps` and `berth pods`: tables of containers and pods.

use std::collections::HashMap;

use berth_cri::v1::{Container, ContainerState, PodSandbox, PodSandboxState};
use futures_util::future::join_all;
use tonic::Code;

use crate::args::{PodsArgs, PsArgs};
use crate::clock::{age_text, now_unix_ns};
use crate::daemon::{CallError, Daemon};
use crate::error::Error;
use crate::names::{Inventory, pod_name, pod_namespace, short_id};
use crate::output;
use crate::table::Table;

/// Lists containers.
///
/// # Errors
/// When a call to the daemon fails.
pub(crate) async fn containers(daemon: &Daemon, args: &PsArgs) -> Result<(), Error> {
    let mut inventory = daemon.inventory().await?;
    inventory.containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    let wanted = |container: &&Container| args.all || container.state() == ContainerState::ContainerRunning;
    let shown: Vec<_> = inventory.containers.iter().filter(wanted).collect();
    if args.quiet {
        let ids: String = shown.iter().map(|container| format!("{}\n", container.id)).collect();
        return Ok(output::text(&ids)?);
    }
    let (addresses, exit_codes) = (addresses(daemon, &inventory).await?, exit_codes(daemon, &shown).await?);
    let now = now_unix_ns();
    let mut table = Table::new(["CONTAINER", "IMAGE", "POD", "STATE", "AGE", "IP"]);
    for container in shown {
        table.row([
            short_id(&container.id).to_owned(),
            image_text(container),
            inventory.label(container),
            state_text(container.state(), exit_codes.get(container.id.as_str()).copied()),
            age_text(container.created_at, now),
            addresses.get(container.pod_sandbox_id.as_str()).cloned().unwrap_or_default(),
        ]);
    }
    let empty = |pod: &&PodSandbox| args.all && inventory.containers_of(&pod.id).next().is_none();
    for pod in inventory.pods.iter().filter(empty) {
        table.row([
            String::new(),
            String::new(),
            pod_name(pod).to_owned(),
            pod_state_text(pod.state()).to_owned(),
            age_text(pod.created_at, now),
            addresses.get(pod.id.as_str()).cloned().unwrap_or_default(),
        ]);
    }
    Ok(output::text(&table.render())?)
}

/// Lists pods.
///
/// # Errors
/// When a call to the daemon fails.
pub(crate) async fn pods(daemon: &Daemon, args: &PodsArgs) -> Result<(), Error> {
    let mut inventory = daemon.inventory().await?;
    inventory.pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    if args.quiet {
        let ids: String = inventory.pods.iter().map(|pod| format!("{}\n", pod.id)).collect();
        return Ok(output::text(&ids)?);
    }
    let addresses = addresses(daemon, &inventory).await?;
    let now = now_unix_ns();
    let mut table = Table::new(["POD", "NAME", "NAMESPACE", "STATE", "RUNNING", "AGE", "IP"]);
    for pod in &inventory.pods {
        let all: Vec<_> = inventory.containers_of(&pod.id).collect();
        let running =
            all.iter().filter(|container| container.state() == ContainerState::ContainerRunning).count();
        table.row([
            short_id(&pod.id).to_owned(),
            pod_name(pod).to_owned(),
            pod_namespace(pod).to_owned(),
            pod_state_text(pod.state()).to_owned(),
            format!("{running}/{}", all.len()),
            age_text(pod.created_at, now),
            addresses.get(pod.id.as_str()).cloned().unwrap_or_default(),
        ]);
    }
    Ok(output::text(&table.render())?)
}

/// The first address of each pod that has one, by the pod's id.
async fn addresses<'a>(
    daemon: &Daemon,
    inventory: &'a Inventory,
) -> Result<HashMap<&'a str, String>, CallError> {
    let ready = inventory.pods.iter().filter(|pod| pod.state() == PodSandboxState::SandboxReady);
    let asked = ready.map(|pod| async move { (pod.id.as_str(), daemon.pod_status(&pod.id).await) });
    let mut addresses = HashMap::new();
    for (id, status) in join_all(asked).await {
        let Some(status) = unless_gone(status)? else { continue };
        if let Some(network) = status.network {
            addresses.insert(id, network.ip);
        }
    }
    Ok(addresses)
}

/// The exit code of each container that has ended, by its id.
async fn exit_codes<'a>(
    daemon: &Daemon,
    containers: &[&'a Container],
) -> Result<HashMap<&'a str, i32>, CallError> {
    let ended = containers.iter().filter(|container| container.state() == ContainerState::ContainerExited);
    let asked = ended.map(|container| async move {
        let id = container.id.as_str();
        (id, daemon.container_status(id).await)
    });
    let mut codes = HashMap::new();
    for (id, status) in join_all(asked).await {
        if let Some(status) = unless_gone(status)? {
            codes.insert(id, status.exit_code);
        }
    }
    Ok(codes)
}

/// Objects may vanish between the list and the request for details; that is not an error.
fn unless_gone<T>(status: Result<T, CallError>) -> Result<Option<T>, CallError> {
    match status {
        Ok(status) => Ok(Some(status)),
        Err(error) if error.refusal.code == Code::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The image as requested, else the start of its id.
fn image_text(container: &Container) -> String {
    let Some(image) = &container.image else { return short_id(&container.image_id).to_owned() };
    let asked =
        if image.user_specified_image.is_empty() { &image.image } else { &image.user_specified_image };
    let is_id = *asked == container.image_id || asked.starts_with("sha256:");
    if is_id { short_id(asked).to_owned() } else { asked.clone() }
}

fn state_text(state: ContainerState, exit_code: Option<i32>) -> String {
    match (state, exit_code) {
        (ContainerState::ContainerCreated, _) => "created".into(),
        (ContainerState::ContainerRunning, _) => "running".into(),
        (ContainerState::ContainerExited, Some(code)) => format!("exited ({code})"),
        (ContainerState::ContainerExited, None) => "exited".into(),
        (ContainerState::ContainerUnknown, _) => "unknown".into(),
    }
}

fn pod_state_text(state: PodSandboxState) -> &'static str {
    match state {
        PodSandboxState::SandboxReady => "ready",
        PodSandboxState::SandboxNotready => "not ready",
    }
}

#[cfg(test)]
mod tests {
    use berth_cri::v1::ImageSpec;

    use super::*;

    #[test]
    fn images_are_shown_as_they_were_asked_for() {
        for (user, image, text) in [
            ("busybox", "sha256:0123456789abcdef", "busybox"),
            ("", "docker.io/library/busybox:latest", "docker.io/library/busybox:latest"),
            ("", "sha256:0123456789abcdef", "0123456789ab"),
            ("", "0123456789abcdef", "0123456789ab"),
        ] {
            let spec =
                ImageSpec { image: image.into(), user_specified_image: user.into(), ..Default::default() };
            let image_id = "0123456789abcdef".into();
            assert_eq!(image_text(&Container { image: Some(spec), image_id, ..Default::default() }), text);
        }
        assert_eq!(
            image_text(&Container { image_id: "0123456789abcdef".into(), ..Default::default() }),
            "0123456789ab"
        );
    }

    #[test]
    fn an_ended_container_shows_its_exit_code() {
        assert_eq!(state_text(ContainerState::ContainerExited, Some(137)), "exited (137)");
        assert_eq!(state_text(ContainerState::ContainerExited, None), "exited");
        assert_eq!(state_text(ContainerState::ContainerRunning, None), "running");
    }
}
