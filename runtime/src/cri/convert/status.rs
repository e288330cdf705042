//! Sandboxes and containers for lists and statuses.

use berth_cri::v1;
use berth_model::container;
use berth_model::id::{ContainerId, SandboxId};
use berth_model::sandbox;
use berth_model::security::NamespaceMode;
use berth_model::state::{ContainerState, SandboxState};

use super::{namespace_options, resources_message, signal_message};

/// A sandbox, for a list or status.
#[derive(Debug, Clone, Copy)]
pub struct SandboxView<'a> {
    /// Its id.
    pub id: &'a SandboxId,
    /// The requested configuration.
    pub config: &'a sandbox::Config,
    /// Nanoseconds since the epoch; not 0, or the kubelet drops the status.
    pub created_at_unix_ns: i64,
    /// Its state.
    pub state: SandboxState,
    /// Its addresses as text, the primary one first; empty on the host's network.
    pub addresses: &'a [String],
}

/// A container, for a list or status.
#[derive(Debug, Clone, Copy)]
pub struct ContainerView<'a> {
    /// Its id.
    pub id: &'a ContainerId,
    /// Its sandbox.
    pub sandbox_id: &'a SandboxId,
    /// Its configuration, with the resources of the last update.
    pub config: &'a container::Config,
    /// The id of its image, `sha256:...`, byte for byte as `Image.id`: the kubelet's garbage
    /// collection compares the two.
    pub image_id: &'a str,
    /// A name of its image; empty if there is none.
    pub image_name: &'a str,
    /// A reference of its image by digest; empty if there is none.
    pub image_ref: &'a str,
    /// Nanoseconds since the epoch, more than 0.
    pub created_at_unix_ns: i64,
    /// Its state.
    pub state: &'a ContainerState,
    /// Absolute; empty for none.
    pub log_path: &'a str,
    /// Its user.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
    /// Its supplementary groups, as applied.
    pub groups: &'a [u32],
    /// The number of the signal that Stop sends.
    pub stop_signal: i32,
}

/// Converts back to `PodSandboxMetadata`.
#[must_use]
pub fn sandbox_metadata(metadata: &sandbox::Metadata) -> v1::PodSandboxMetadata {
    v1::PodSandboxMetadata {
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        namespace: metadata.namespace.clone(),
        attempt: metadata.attempt,
    }
}

/// The sandbox for a list.
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
                // The kubelet recreates the sandbox when these are not what it asked for.
                options: Some(namespace_options(&view.config.namespaces)),
            }),
        }),
        labels: view.config.labels.clone(),
        annotations: view.config.annotations.clone(),
        runtime_handler: view.config.runtime_handler.clone(),
    }
}

/// A message with an empty address means "on the host's network"; for any other sandbox, it makes
/// the kubelet replace it again and again. A sandbox without addresses therefore has no message.
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

/// Converts back to `ContainerMetadata`.
#[must_use]
pub fn container_metadata(metadata: &container::Metadata) -> v1::ContainerMetadata {
    v1::ContainerMetadata { name: metadata.name.clone(), attempt: metadata.attempt }
}

/// The container for a list.
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

/// Converts back to `Mount`s: all requested ones, because the kubelet finds the termination message
/// by them.
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

/// The number of a sandbox's state.
pub(super) fn sandbox_state(state: SandboxState) -> v1::PodSandboxState {
    match state {
        SandboxState::Ready => v1::PodSandboxState::SandboxReady,
        SandboxState::NotReady => v1::PodSandboxState::SandboxNotready,
    }
}

/// The number of a container's state.
pub(super) fn container_state(state: &ContainerState) -> v1::ContainerState {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => v1::ContainerState::ContainerRunning,
        ContainerState::Exited(_) => v1::ContainerState::ContainerExited,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use berth_model::security::Namespaces;
    use berth_model::state::{Exit, ExitReason};

    use super::*;

    fn sandbox_config(network: NamespaceMode) -> sandbox::Config {
        sandbox::Config {
            metadata: sandbox::Metadata {
                name: "n".into(),
                uid: "u".into(),
                namespace: "s".into(),
                attempt: 1,
            },
            labels: BTreeMap::from([("l".into(), "\u{1}".into())]),
            annotations: BTreeMap::from([("a".into(), String::new())]),
            namespaces: Namespaces { network, pid: NamespaceMode::Container, ..Namespaces::default() },
            runtime_handler: "berth".into(),
            ..sandbox::Config::default()
        }
    }

    #[test]
    fn a_sandbox_shows_what_a_kubelet_compares() {
        let id = SandboxId::from_bytes([0xab; 32]);
        let config = sandbox_config(NamespaceMode::Pod);
        let addresses = ["10.0.0.2".to_owned(), "fd00::2".to_owned()];
        let view = SandboxView {
            id: &id,
            config: &config,
            created_at_unix_ns: 7,
            state: SandboxState::NotReady,
            addresses: &addresses,
        };
        let status = sandbox_status(&view);
        let listed = sandbox(&view);
        assert_eq!(status.id, "ab".repeat(32));
        assert_eq!(status.state, 1);
        assert_eq!(status.created_at, 7);
        let metadata =
            v1::PodSandboxMetadata { name: "n".into(), uid: "u".into(), namespace: "s".into(), attempt: 1 };
        assert_eq!(status.metadata, Some(metadata));
        let network = status.network.clone().unwrap();
        assert_eq!(network.ip, "10.0.0.2");
        assert_eq!(network.additional_ips, [v1::PodIp { ip: "fd00::2".into() }]);
        let options = status.linux.clone().unwrap().namespaces.unwrap().options.unwrap();
        assert_eq!((options.network, options.pid, options.ipc), (0, 1, 0));
        assert_eq!((&status.labels, &status.annotations), (&config.labels, &config.annotations));
        assert_eq!(status.runtime_handler, "berth");
        assert_eq!(
            (listed.id, listed.metadata, listed.state, listed.created_at, listed.labels, listed.annotations),
            (status.id, status.metadata, 1, 7, status.labels, status.annotations)
        );
        assert_eq!(listed.runtime_handler, "berth");
    }

    #[test]
    fn an_empty_address_is_shown_on_the_hosts_network_alone() {
        let id = SandboxId::from_bytes([1; 32]);
        for (network, addresses, expected) in [
            (NamespaceMode::Node, vec![], Some("")),
            (NamespaceMode::Node, vec!["10.0.0.1".to_owned()], Some("")),
            (NamespaceMode::Pod, vec![], None),
            (NamespaceMode::Pod, vec!["10.0.0.2".to_owned()], Some("10.0.0.2")),
        ] {
            let config = sandbox_config(network);
            let view = SandboxView {
                id: &id,
                config: &config,
                created_at_unix_ns: 1,
                state: SandboxState::Ready,
                addresses: &addresses,
            };
            let shown = sandbox_status(&view).network;
            assert_eq!(
                shown.as_ref().map(|network| network.ip.as_str()),
                expected,
                "{network:?} {addresses:?}"
            );
        }
    }

    fn with_container(
        state: &ContainerState,
        name: &str,
        by_digest: &str,
    ) -> (v1::ContainerStatus, v1::Container) {
        let config = container::Config {
            metadata: container::Metadata { name: "web".into(), attempt: 2 },
            image: "nginx".into(),
            user_specified_image: "nginx:latest".into(),
            labels: BTreeMap::from([("l".into(), "v".into())]),
            annotations: BTreeMap::from([("a".into(), "w".into())]),
            mounts: vec![container::Mount {
                container_path: "/dev/termination-log".into(),
                host_path: "/var/x".into(),
                readonly: true,
                recursive_read_only: true,
                propagation: container::Propagation::Bidirectional,
            }],
            resources: container::Resources { cpu_shares: 5, ..Default::default() },
            ..container::Config::default()
        };
        let (id, sandbox_id) = (ContainerId::from_bytes([2; 32]), SandboxId::from_bytes([1; 32]));
        let view = ContainerView {
            id: &id,
            sandbox_id: &sandbox_id,
            config: &config,
            image_id: "sha256:id",
            image_name: name,
            image_ref: by_digest,
            created_at_unix_ns: 7,
            state,
            log_path: "/var/log/pods/x/web/2.log",
            uid: u32::MAX,
            gid: 5,
            groups: &[5, 6],
            stop_signal: 3,
        };
        (container_status(&view), container(&view))
    }

    #[test]
    fn a_container_shows_what_a_kubelet_needs() {
        let (status, listed) =
            with_container(&ContainerState::Created, "docker.io/library/nginx:latest", "nginx@x");
        assert_eq!(status.id, "02".repeat(32));
        assert_eq!(listed.pod_sandbox_id, "01".repeat(32));
        assert_eq!(status.metadata, Some(v1::ContainerMetadata { name: "web".into(), attempt: 2 }));
        assert_eq!(status.image.as_ref().unwrap().image, "docker.io/library/nginx:latest");
        assert_eq!(status.image.as_ref().unwrap().user_specified_image, "nginx:latest");
        assert_eq!((status.image_ref.as_str(), status.image_id.as_str()), ("nginx@x", "sha256:id"));
        assert_eq!(listed.image.as_ref().unwrap().image, "nginx", "as asked at creation");
        assert_eq!((listed.image_ref.as_str(), listed.image_id.as_str()), ("sha256:id", "sha256:id"));
        assert_eq!((status.created_at, listed.created_at), (7, 7));
        assert_eq!((&status.labels, &status.annotations), (&listed.labels, &listed.annotations));
        let mount = &status.mounts[0];
        assert_eq!(
            (mount.container_path.as_str(), mount.host_path.as_str()),
            ("/dev/termination-log", "/var/x")
        );
        assert!(mount.readonly && mount.recursive_read_only);
        assert_eq!(mount.propagation, 2);
        assert_eq!(status.log_path, "/var/log/pods/x/web/2.log");
        assert_eq!(status.resources.unwrap().linux.unwrap().cpu_shares, 5);
        let user = status.user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid), (4_294_967_295, 5));
        assert_eq!(user.supplemental_groups, [5, 6]);
        assert_eq!(status.stop_signal, i32::from(v1::Signal::Sigquit));
    }

    #[test]
    fn an_image_is_never_nameless() {
        for (name, by_digest, shown, reference) in [
            ("", "nginx@x", "nginx@x", "nginx@x"),
            ("", "", "sha256:id", "sha256:id"),
            ("nginx:1", "", "nginx:1", "sha256:id"),
        ] {
            let (status, _) = with_container(&ContainerState::Created, name, by_digest);
            assert_eq!(status.image.unwrap().image, shown);
            assert_eq!(status.image_ref, reference);
        }
    }

    #[test]
    fn each_state_fills_its_fields() {
        let exit = Exit {
            code: 137,
            started_at_unix_ns: 8,
            finished_at_unix_ns: 9,
            reason: ExitReason::OomKilled,
            message: "m".into(),
        };
        let cases = [
            (ContainerState::Created, 0, (0, 0, 0, "", "")),
            (ContainerState::Running { started_at_unix_ns: 8 }, 1, (8, 0, 0, "", "")),
            (ContainerState::Exited(exit), 2, (8, 9, 137, "OOMKilled", "m")),
        ];
        for (state, number, expected) in cases {
            let (status, listed) = with_container(&state, "", "");
            assert_eq!((status.state, listed.state), (number, number));
            let found = (
                status.started_at,
                status.finished_at,
                status.exit_code,
                status.reason.as_str(),
                status.message.as_str(),
            );
            assert_eq!(found, expected, "{state:?}");
        }
    }
}
