//! Sandboxes and containers for lists and statuses.

use super::filter::{container_state, sandbox_state};
use super::{namespace_options, resources_message, signal_message};
use berth_cri::v1;
use berth_model::container;
use berth_model::id::{ContainerId, SandboxId};
use berth_model::sandbox;
use berth_model::security::NamespaceMode;
use berth_model::state::{ContainerState, SandboxState};

/// What is known of a sandbox.
#[derive(Debug, Clone, Copy)]
pub struct SandboxView<'a> {
    /// Its id.
    pub id: &'a SandboxId,
    /// What was asked for.
    pub config: &'a sandbox::Config,
    /// Nanoseconds since the epoch, more than 0: the kubelet drops the status otherwise.
    pub created_at_unix_ns: i64,
    /// Its state.
    pub state: SandboxState,
    /// Its addresses as text, the primary one first; empty on the host's network.
    pub addresses: &'a [String],
}

/// What is known of a container.
#[derive(Debug, Clone, Copy)]
pub struct ContainerView<'a> {
    /// Its id.
    pub id: &'a ContainerId,
    /// Its sandbox.
    pub sandbox_id: &'a SandboxId,
    /// What was asked for, with the resources of the last update.
    pub config: &'a container::Config,
    /// The id of its image, `sha256:...`, byte for byte as `Image.id`: the kubelet's garbage collection compares the two.
    pub image_id: &'a str,
    /// A name of its image; empty if it has none.
    pub image_name: &'a str,
    /// A reference of its image by digest; empty if it has none.
    pub image_ref: &'a str,
    /// Nanoseconds since the epoch, more than 0.
    pub created_at_unix_ns: i64,
    /// Its state.
    pub state: &'a ContainerState,
    /// Absolute; empty for none.
    pub log_path: &'a str,
    /// Who it runs as.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
    /// Its supplementary groups, as applied.
    pub groups: &'a [u32],
    /// The number of the signal that Stop sends.
    pub stop_signal: i32,
}

/// `PodSandboxMetadata` again.
#[must_use]
pub fn sandbox_metadata(metadata: &sandbox::Metadata) -> v1::PodSandboxMetadata {
    v1::PodSandboxMetadata {
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        namespace: metadata.namespace.clone(),
        attempt: metadata.attempt,
    }
}

/// The sandbox in a list.
#[must_use]
pub fn sandbox(view: &SandboxView<'_>) -> v1::PodSandbox {
    v1::PodSandbox {
        id: view.id.to_string(),
        metadata: Some(sandbox_metadata(&view.config.metadata)),
        state: sandbox_state(view.state).into(),
        created_at: view.created_at_unix_ns,
        labels: view.config.labels.clone(),
        annotations: view.config.annotations.clone(),
        runtime_handler: view.config.runtime_handler.clone(),
    }
}

/// The status of the sandbox.
#[must_use]
pub fn sandbox_status(view: &SandboxView<'_>) -> v1::PodSandboxStatus {
    v1::PodSandboxStatus {
        id: view.id.to_string(),
        metadata: Some(sandbox_metadata(&view.config.metadata)),
        state: sandbox_state(view.state).into(),
        created_at: view.created_at_unix_ns,
        network: sandbox_network(view),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace {
                // The kubelet makes the sandbox anew when these are not what it asked for.
                options: Some(namespace_options(&view.config.namespaces)),
            }),
        }),
        labels: view.config.labels.clone(),
        annotations: view.config.annotations.clone(),
        runtime_handler: view.config.runtime_handler.clone(),
    }
}

/// An empty address in a message that is there means "on the host's network"; said of another sandbox, it makes the kubelet replace it, again
/// and again. One without addresses therefore has no message.
fn sandbox_network(view: &SandboxView<'_>) -> Option<v1::PodSandboxNetworkStatus> {
    if view.config.namespaces.network == NamespaceMode::Node {
        return Some(v1::PodSandboxNetworkStatus::default());
    }
    let (primary, others) = view.addresses.split_first()?;
    Some(v1::PodSandboxNetworkStatus {
        ip: primary.clone(),
        additional_ips: others.iter().map(|ip| v1::PodIp { ip: ip.clone() }).collect(),
    })
}

/// `ContainerMetadata` again.
#[must_use]
pub fn container_metadata(metadata: &container::Metadata) -> v1::ContainerMetadata {
    v1::ContainerMetadata { name: metadata.name.clone(), attempt: metadata.attempt }
}

/// The container in a list.
#[must_use]
pub fn container(view: &ContainerView<'_>) -> v1::Container {
    v1::Container {
        id: view.id.to_string(),
        pod_sandbox_id: view.sandbox_id.to_string(),
        metadata: Some(container_metadata(&view.config.metadata)),
        image: Some(image_spec(view, &view.config.image)),
        image_ref: view.image_id.to_owned(),
        state: container_state(view.state).into(),
        created_at: view.created_at_unix_ns,
        labels: view.config.labels.clone(),
        annotations: view.config.annotations.clone(),
        image_id: view.image_id.to_owned(),
    }
}

/// The status of the container.
#[must_use]
pub fn container_status(view: &ContainerView<'_>) -> v1::ContainerStatus {
    let mut status = v1::ContainerStatus {
        id: view.id.to_string(),
        metadata: Some(container_metadata(&view.config.metadata)),
        state: container_state(view.state).into(),
        created_at: view.created_at_unix_ns,
        image: Some(image_spec(view, first_set(&[view.image_name, view.image_ref, view.image_id]))),
        image_ref: first_set(&[view.image_ref, view.image_id]).to_owned(),
        labels: view.config.labels.clone(),
        annotations: view.config.annotations.clone(),
        mounts: container_mounts(&view.config.mounts),
        log_path: view.log_path.to_owned(),
        resources: Some(v1::ContainerResources {
            linux: Some(resources_message(&view.config.resources)),
            windows: None,
        }),
        image_id: view.image_id.to_owned(),
        user: Some(v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: view.uid.into(),
                gid: view.gid.into(),
                supplemental_groups: view.groups.iter().copied().map(i64::from).collect(),
            }),
        }),
        stop_signal: signal_message(view.stop_signal).into(),
        ..v1::ContainerStatus::default()
    };
    match view.state {
        ContainerState::Created => {}
        ContainerState::Running { started_at_unix_ns } => status.started_at = *started_at_unix_ns,
        ContainerState::Exited(exit) => {
            status.started_at = exit.started_at_unix_ns;
            status.finished_at = exit.finished_at_unix_ns;
            status.exit_code = exit.code;
            status.reason = exit.reason.as_str().to_owned();
            status.message.clone_from(&exit.message);
        }
    }
    status
}

/// `Mount`s again: all of those asked for, because the kubelet finds the termination message by them.
#[must_use]
pub fn container_mounts(mounts: &[container::Mount]) -> Vec<v1::Mount> {
    mounts
        .iter()
        .map(|mount| v1::Mount {
            container_path: mount.container_path.clone(),
            host_path: mount.host_path.clone(),
            readonly: mount.readonly,
            recursive_read_only: mount.recursive_read_only,
            propagation: match mount.propagation {
                container::Propagation::Private => v1::MountPropagation::PropagationPrivate,
                container::Propagation::HostToContainer => v1::MountPropagation::PropagationHostToContainer,
                container::Propagation::Bidirectional => v1::MountPropagation::PropagationBidirectional,
            }
            .into(),
            ..v1::Mount::default()
        })
        .collect()
}

fn image_spec(view: &ContainerView<'_>, text: &str) -> v1::ImageSpec {
    v1::ImageSpec {
        image: text.to_owned(),
        user_specified_image: view.config.user_specified_image.clone(),
        ..v1::ImageSpec::default()
    }
}

fn first_set<'a>(texts: &[&'a str]) -> &'a str {
    texts.iter().copied().find(|text| !text.is_empty()).unwrap_or_default()
}
