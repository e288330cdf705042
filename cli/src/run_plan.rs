//! Turns the arguments of `berth run` into CRI requests: the configurations of a pod and of a
//! container in it.
//!
//! Pure functions. Where the CRI leaves a choice to its caller, the container gets the defaults of
//! Kubernetes: the default seccomp filter, its own pid namespace, and the usual paths of /proc and
//! /sys hidden or read-only. Those lists have to be sent: an empty list in the CRI means that
//! nothing is hidden.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use berth_cri::labels;
use berth_cri::v1::security_profile::ProfileType;
use berth_cri::v1::{
    ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    PodSandboxStatus, SecurityProfile,
};

use crate::mount_spec::MountSpec;
use crate::quantity::CPU_PERIOD;
use crate::user_spec::UserSpec;

/// Kubernetes namespace of the pods that the command creates.
pub(crate) const NAMESPACE: &str = "default";

/// Name of the container if none is given.
pub(crate) const DEFAULT_CONTAINER: &str = "main";

/// Annotation with the log directory of a pod that the command created; `berth rm` removes it.
pub(crate) const LOG_DIRECTORY_ANNOTATION: &str = "berth.log-folder";

/// Annotation with the size at which the daemon rotates a pod's logs, in bytes.
const LOG_BYTES_ANNOTATION: &str = "berth.log-bytes";

/// Kernel files and directories that reveal or change the host: those that Kubernetes hides for the
/// default `procMount` (pod.spec.containers.securityContext).
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Paths that are read-only, for the same reason.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The network of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Network {
    /// Its own.
    Pod,
    /// The host's, with its hostname.
    Host,
}

/// A pod to create.
#[derive(Debug)]
pub(crate) struct PodPlan {
    /// Name, also the host name.
    pub(crate) name: String,
    /// Unique among pods of that name.
    pub(crate) uid: String,
    /// Its network.
    pub(crate) network: Network,
    /// Absolute path of this pod's own log directory.
    pub(crate) log_directory: String,
    /// Size at which a log is rotated, in bytes; 0 for never.
    pub(crate) log_bytes: i64,
}

/// What a container inherits from its pod.
#[derive(Debug)]
pub(crate) struct Home {
    namespaces: NamespaceOption,
    labels: BTreeMap<String, String>,
}

/// A container to create.
#[derive(Debug)]
pub(crate) struct ContainerPlan {
    /// Name within the pod.
    pub(crate) name: String,
    /// The image's id.
    pub(crate) image_id: String,
    /// The image as requested.
    pub(crate) image_name: String,
    /// Arguments in place of the image's, if any.
    pub(crate) command: Vec<String>,
    /// Additions to the image's environment.
    pub(crate) envs: Vec<KeyValue>,
    /// Mounts, their sources absolute.
    pub(crate) mounts: Vec<MountSpec>,
    /// The user, if not the image's.
    pub(crate) user: Option<UserSpec>,
    /// Memory limit.
    pub(crate) memory_limit_bytes: Option<i64>,
    /// CPU quota per [`CPU_PERIOD`].
    pub(crate) cpu_quota_us: Option<i64>,
    /// The program gets input, until the end of the first input that is attached.
    pub(crate) stdin: bool,
    /// The program gets a terminal.
    pub(crate) terminal: bool,
}

/// Directory for the logs of one pod.
pub(crate) fn log_directory(below: &Path, pod_name: &str, uid: &str) -> PathBuf {
    below.join(format!("{pod_name}_{uid}"))
}

/// The log directory of a pod, if the command created it.
///
/// Trusts the annotation only if the last component of the path belongs to this pod, so that a
/// foreign annotation cannot have any other directory removed.
pub(crate) fn log_directory_of(
    metadata: Option<&PodSandboxMetadata>,
    annotations: &BTreeMap<String, String>,
) -> Option<PathBuf> {
    let metadata = metadata?;
    let directory = Path::new(annotations.get(LOG_DIRECTORY_ANNOTATION)?);
    let below = directory.parent()?;
    let plain = directory.is_absolute() && directory.components().all(|part| part.as_os_str() != "..");
    let owned = !metadata.uid.is_empty() && log_directory(below, &metadata.name, &metadata.uid) == directory;
    if plain && owned { Some(directory.to_owned()) } else { None }
}

fn namespaces(network: NamespaceMode, ipc: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        network: network.into(),
        pid: NamespaceMode::Container.into(),
        ipc: ipc.into(),
        ..NamespaceOption::default()
    }
}

impl PodPlan {
    /// What its containers inherit.
    pub(crate) fn home(&self) -> Home {
        let network = match self.network {
            Network::Pod => NamespaceMode::Pod,
            Network::Host => NamespaceMode::Node,
        };
        let namespaces = namespaces(network, NamespaceMode::Pod);
        Home { namespaces, labels: pod_labels(&self.name, NAMESPACE, &self.uid) }
    }
}

/// What containers inherit from an existing pod, however it was created.
///
/// Network and IPC have to be the pod's; the container always gets its own pid namespace.
pub(crate) fn home_of(status: &PodSandboxStatus) -> Home {
    let linux = status.linux.as_ref();
    let options = linux.and_then(|linux| linux.namespaces.as_ref()?.options.clone()).unwrap_or_default();
    let metadata = status.metadata.clone().unwrap_or_default();
    let mut namespaces = namespaces(options.network(), options.ipc());
    namespaces.userns_options = options.userns_options;
    Home { namespaces, labels: pod_labels(&metadata.name, &metadata.namespace, &metadata.uid) }
}

/// The known part of the configuration of an existing pod. The daemon has all of it.
pub(crate) fn known_config(status: &PodSandboxStatus) -> PodSandboxConfig {
    let log_directory = log_directory_of(status.metadata.as_ref(), &status.annotations);
    PodSandboxConfig {
        metadata: status.metadata.clone(),
        log_directory: log_directory
            .map(|directory| directory.to_string_lossy().into_owned())
            .unwrap_or_default(),
        labels: status.labels.clone(),
        annotations: status.annotations.clone(),
        ..PodSandboxConfig::default()
    }
}

fn default_seccomp() -> SecurityProfile {
    SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), localhost_ref: String::new() }
}

fn pod_labels(name: &str, namespace: &str, uid: &str) -> BTreeMap<String, String> {
    [(labels::POD_NAME, name), (labels::POD_NAMESPACE, namespace), (labels::POD_UID, uid)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

/// The sandbox's configuration.
pub(crate) fn sandbox_config(pod: &PodPlan) -> PodSandboxConfig {
    let Home { namespaces, labels } = pod.home();
    let hostname = match pod.network {
        Network::Pod => pod.name.clone(),
        Network::Host => String::new(),
    };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            namespace: NAMESPACE.into(),
            attempt: 0,
        }),
        hostname,
        log_directory: pod.log_directory.clone(),
        labels,
        annotations: [
            (LOG_DIRECTORY_ANNOTATION.to_owned(), pod.log_directory.clone()),
            (LOG_BYTES_ANNOTATION.to_owned(), pod.log_bytes.to_string()),
        ]
        .into(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                seccomp: Some(default_seccomp()),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// The container's configuration. The sources of the mounts must be UTF-8, as in the CRI.
pub(crate) fn container_config(home: Home, container: ContainerPlan) -> ContainerConfig {
    let Home { namespaces, mut labels } = home;
    labels.insert(labels::CONTAINER_NAME.into(), container.name.clone());
    let mut security_context = LinuxContainerSecurityContext {
        namespace_options: Some(namespaces),
        seccomp: Some(default_seccomp()),
        masked_paths: MASKED_PATHS.map(str::to_owned).into(),
        readonly_paths: READONLY_PATHS.map(str::to_owned).into(),
        ..LinuxContainerSecurityContext::default()
    };
    let gid = match container.user {
        None => None,
        Some(UserSpec::Id { uid, gid }) => {
            security_context.run_as_user = Some(Int64Value { value: uid.into() });
            gid
        }
        Some(UserSpec::Name { name, gid }) => {
            security_context.run_as_username = name;
            gid
        }
    };
    security_context.run_as_group = gid.map(|gid| Int64Value { value: gid.into() });
    ContainerConfig {
        log_path: format!("{}.log", container.name),
        metadata: Some(ContainerMetadata { name: container.name, attempt: 0 }),
        image: Some(ImageSpec {
            image: container.image_id,
            user_specified_image: container.image_name,
            ..ImageSpec::default()
        }),
        args: container.command,
        envs: container.envs,
        mounts: container.mounts.into_iter().map(mount).collect(),
        labels,
        stdin: container.stdin,
        stdin_once: container.stdin && !container.terminal,
        tty: container.terminal,
        linux: Some(LinuxContainerConfig {
            resources: Some(resources(container.memory_limit_bytes, container.cpu_quota_us)),
            security_context: Some(security_context),
        }),
        ..ContainerConfig::default()
    }
}

fn mount(mount: MountSpec) -> Mount {
    Mount {
        host_path: mount.source.to_string_lossy().into_owned(),
        container_path: mount.target,
        readonly: mount.readonly,
        propagation: mount.propagation.into(),
        ..Mount::default()
    }
}

fn resources(memory_limit_bytes: Option<i64>, cpu_quota_us: Option<i64>) -> LinuxContainerResources {
    let cpu_period = match cpu_quota_us {
        Some(_) => i64::try_from(CPU_PERIOD.as_micros()).unwrap_or(i64::MAX),
        None => 0,
    };
    LinuxContainerResources {
        memory_limit_in_bytes: memory_limit_bytes.unwrap_or(0),
        cpu_quota: cpu_quota_us.unwrap_or(0),
        cpu_period,
        ..LinuxContainerResources::default()
    }
}

#[cfg(test)]
mod tests {
    use berth_cri::v1::{LinuxPodSandboxStatus, Namespace};

    use super::*;

    fn pod(network: Network) -> PodPlan {
        PodPlan {
            name: "web".into(),
            uid: "u-1".into(),
            network,
            log_directory: "/logs/web_u-1".into(),
            log_bytes: 10 << 20,
        }
    }

    fn container() -> ContainerPlan {
        ContainerPlan {
            name: DEFAULT_CONTAINER.into(),
            image_id: "sha256:1".into(),
            image_name: "busybox".into(),
            command: vec!["ls".into()],
            envs: Vec::new(),
            mounts: Vec::new(),
            user: None,
            memory_limit_bytes: None,
            cpu_quota_us: None,
            stdin: false,
            terminal: false,
        }
    }

    fn security(config: &ContainerConfig) -> &LinuxContainerSecurityContext {
        config.linux.as_ref().unwrap().security_context.as_ref().unwrap()
    }

    #[test]
    fn a_pod_has_its_own_network_and_name_unless_it_uses_the_hosts() {
        for (network, mode, hostname) in
            [(Network::Pod, NamespaceMode::Pod, "web"), (Network::Host, NamespaceMode::Node, "")]
        {
            let sandbox = sandbox_config(&pod(network));
            let linux = sandbox.linux.unwrap().security_context.unwrap();
            assert_eq!(linux.namespace_options.unwrap().network(), mode);
            assert_eq!(sandbox.hostname, hostname);
            let options = security(&container_config(pod(network).home(), container()))
                .namespace_options
                .clone()
                .unwrap();
            assert_eq!((options.network(), options.pid()), (mode, NamespaceMode::Container));
        }
    }

    #[test]
    fn a_container_that_asks_for_nothing_is_confined() {
        let config = container_config(pod(Network::Pod).home(), container());
        let security = security(&config);
        assert_eq!(security.seccomp.as_ref().unwrap().profile_type(), ProfileType::RuntimeDefault);
        assert!(security.masked_paths.contains(&"/proc/kcore".to_owned()));
        assert!(security.readonly_paths.contains(&"/proc/sys".to_owned()));
        assert!(!security.privileged);
        let resources = config.linux.as_ref().unwrap().resources.as_ref().unwrap();
        assert_eq!(*resources, LinuxContainerResources::default());
    }

    #[test]
    fn the_image_is_asked_for_by_id_and_its_arguments_are_replaced() {
        let config = container_config(pod(Network::Pod).home(), container());
        let image = config.image.unwrap();
        assert_eq!((image.image.as_str(), image.user_specified_image.as_str()), ("sha256:1", "busybox"));
        assert_eq!((config.command.len(), config.args.as_slice()), (0, &["ls".to_owned()][..]));
    }

    #[test]
    fn limits_go_with_their_period() {
        let plan = ContainerPlan { memory_limit_bytes: Some(7), cpu_quota_us: Some(50_000), ..container() };
        let resources = container_config(pod(Network::Pod).home(), plan).linux.unwrap().resources.unwrap();
        assert_eq!(
            (resources.memory_limit_in_bytes, resources.cpu_quota, resources.cpu_period),
            (7, 50_000, 100_000)
        );
    }

    #[test]
    fn users_go_into_the_field_of_their_kind() {
        for (user, uid, name, gid) in [
            (UserSpec::Id { uid: 5, gid: Some(6) }, Some(5), "", Some(6)),
            (UserSpec::Id { uid: 0, gid: None }, Some(0), "", None),
            (UserSpec::Name { name: "www".into(), gid: Some(6) }, None, "www", Some(6)),
        ] {
            let config =
                container_config(pod(Network::Pod).home(), ContainerPlan { user: Some(user), ..container() });
            let security = security(&config);
            assert_eq!(security.run_as_user.map(|uid| uid.value), uid);
            assert_eq!(security.run_as_username, name);
            assert_eq!(security.run_as_group.map(|gid| gid.value), gid);
        }
    }

    #[test]
    fn a_container_in_a_pod_that_is_there_shares_what_the_pod_shares() {
        let config = sandbox_config(&pod(Network::Host));
        let asked = config.linux.unwrap().security_context.unwrap().namespace_options.unwrap();
        let shared_pids = NamespaceOption { pid: NamespaceMode::Pod.into(), ..asked };
        let namespaces = Namespace { options: Some(shared_pids) };
        let status = PodSandboxStatus {
            metadata: config.metadata,
            linux: Some(LinuxPodSandboxStatus { namespaces: Some(namespaces) }),
            annotations: config.annotations,
            ..PodSandboxStatus::default()
        };
        let plan = ContainerPlan { name: "client".into(), ..container() };
        let joined = container_config(home_of(&status), plan);
        let options = security(&joined).namespace_options.clone().unwrap();
        assert_eq!((options.network(), options.pid()), (NamespaceMode::Node, NamespaceMode::Container));
        assert_eq!(joined.labels.get(labels::POD_UID).map(String::as_str), Some("u-1"));
        assert_eq!(joined.log_path, "client.log");
        assert_eq!(known_config(&status).log_directory, "/logs/web_u-1");
    }

    #[test]
    fn the_log_directory_of_an_own_pod_is_known_again() {
        let config = sandbox_config(&pod(Network::Pod));
        let found = log_directory_of(config.metadata.as_ref(), &config.annotations);
        assert_eq!(found.as_deref(), Some(Path::new("/logs/web_u-1")));
    }

    #[test]
    fn no_foreign_directory_passes_for_a_log_directory() {
        let metadata = sandbox_config(&pod(Network::Pod)).metadata.unwrap();
        for directory in [
            "",
            "/",
            "/etc",
            "web_u-1",
            "/logs/web_u-1/..",
            "/logs/../web_u-1",
            "/logs/web_u-2",
            "/logs/web_u-1/x",
        ] {
            let annotations = [(LOG_DIRECTORY_ANNOTATION.to_owned(), directory.to_owned())].into();
            assert_eq!(log_directory_of(Some(&metadata), &annotations), None, "{directory}");
        }
        assert_eq!(log_directory_of(Some(&metadata), &BTreeMap::new()), None);
        let annotations = [(LOG_DIRECTORY_ANNOTATION.to_owned(), "/logs/_".to_owned())].into();
        assert_eq!(
            log_directory_of(Some(&PodSandboxMetadata::default()), &annotations),
            None,
            "no name and no uid"
        );
    }
}
