//! The OCI runtime spec of a container, from the request and the image.
//!
//! [`build`] is pure: anything that has to be looked up on the host is looked up by its caller,
//! with [`devices::resolve_devices`] and [`mounts::find_source`] among others. The request is
//! checked at the edge as far as the message alone allows, and here for what depends on the image
//! or the sandbox; the image's configuration is hostile text throughout.
//!
//! The spec is everything that the container may have: [`crate::plan`] adds nothing to it, and a
//! verbose `ContainerStatus` shows it as `runtimeSpec`. Done elsewhere: the user of the process
//! (the shim reads the passwd and group files of the root), compiling seccomp profiles, creating
//! the directories that mounts come from.
//!
//! Facts: OCI runtime-spec 1.2 (`config.md`, `config-linux.md`), the CRI messages `ContainerConfig`
//! and `LinuxContainerSecurityContext`.

mod capabilities;
pub mod devices;
mod environment;
pub mod mounts;
mod process;
mod resources;
pub mod stop_signal;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use berth_image::ImageConfig;
use berth_model::id::{ContainerId, SandboxId};
use berth_model::layout::{ContainerFiles, SandboxFiles};
use berth_model::limit::MAX_MOUNTS;
use berth_model::security::NamespaceMode;
use berth_model::{container, sandbox};
use berth_sys::credentials::CapabilityBits;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, PosixRlimit, Root, Spec};

pub use capabilities::granted_capabilities;
pub use devices::{ResolvedDevice, device_policy};
pub use mounts::{CgroupDirectory, ResolvedMount};
pub use process::set_user;
pub use resources::{in_force, limits, of_cgroup, resources};

/// The version of the OCI runtime spec that is written: the newest needed for the properties used
/// here.
const OCI_VERSION: &str = "1.2.0";

/// The host's `/dev/shm`, for pods that share the host's IPC namespace.
const HOST_SHM: &str = "/dev/shm";

/// The input of the spec of a container. Paths are absolute.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The container's id.
    pub container_id: &'a ContainerId,
    /// The requested configuration.
    pub config: &'a container::Config,
    /// Where its files are.
    pub files: &'a ContainerFiles,
    /// The sandbox's id.
    pub sandbox_id: &'a SandboxId,
    /// The sandbox's configuration. Network and IPC namespaces are the sandbox's, whatever the
    /// container's request says.
    pub sandbox: &'a sandbox::Config,
    /// Where the sandbox's files are.
    pub sandbox_files: &'a SandboxFiles,
    /// The hostname of the sandbox: the requested one or the host's.
    pub hostname: &'a str,
    /// The image's configuration.
    pub image: &'a ImageConfig,
    /// A name of the image, for an annotation.
    pub image_name: &'a str,
    /// The requested mounts with resolved sources, in the order of the request:
    /// [`mounts::resolve_mounts`].
    pub mounts: &'a [ResolvedMount],
    /// The requested devices: [`devices::resolve_devices`].
    pub devices: &'a [ResolvedDevice],
    /// Every device node of the host: [`devices::host_devices`]. Only used for a privileged
    /// container.
    pub host_devices: &'a [ResolvedDevice],
    /// Berth's own AppArmor profile, if it is loaded.
    pub default_apparmor_profile: Option<&'a str>,
    /// The container's cgroup, relative to the roots of the hierarchies.
    pub cgroup_path: &'a str,
    /// The container's own directory in each v1 hierarchy; not used on v2.
    pub cgroup_directories: &'a [CgroupDirectory],
    /// The pid namespace to join when the request says [`NamespaceMode::Target`], as
    /// `/proc/<pid>/ns/pid`.
    pub target_pid_namespace: Option<&'a Path>,
    /// The seccomp profile; `None` for none. A privileged container never gets one.
    pub seccomp: Option<&'a LinuxSeccomp>,
    /// The resource limits of the program.
    pub rlimits: &'a [PosixRlimit],
    /// Facts about the host.
    pub host: &'a HostFacts,
}

/// Facts about the host and the daemon, from the start.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// The daemon's bounding set, which limits every container.
    pub bounding: CapabilityBits,
    /// Controllers are on cgroup v2.
    pub unified_cgroups: bool,
    /// The kernel enforces AppArmor profiles.
    pub apparmor: bool,
    /// Whether SELinux is enabled.
    pub selinux_is_on: bool,
    /// Major and minor version of the kernel.
    pub kernel: (u32, u32),
}

/// Why a spec cannot be built from a request and an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// `command` and `args` of the request and `Entrypoint` and `Cmd` of the image are all empty.
    #[error("no command specified")]
    NoCommand,
    /// Text that cannot be passed to a program.
    #[error("{origin} has a NUL byte: {text:?}")]
    NulByte {
        /// Its origin.
        origin: &'static str,
        /// The text.
        text: String,
    },
    /// One argument or variable is too long for execve(2).
    #[error("{origin} has an entry of {length} bytes; the kernel's limit is {}", environment::MAX_TEXT_BYTES)]
    TextTooLong {
        /// Its origin.
        origin: &'static str,
        /// Its length in bytes.
        length: usize,
    },
    /// Arguments and environment together are too long.
    #[error("arguments and environment have {length} bytes; the limit is {}", environment::MAX_TOTAL_BYTES)]
    TooMuchText {
        /// Their length in bytes.
        length: usize,
    },
    /// A path is not absolute, or contains something invalid.
    #[error("{origin}: {path:?} is not an absolute path")]
    Path {
        /// Its origin.
        origin: &'static str,
        /// The path.
        path: String,
    },
    /// A path that is too long for the kernel.
    #[error("{origin}: the path is too long ({length} bytes)")]
    PathTooLong {
        /// Its origin.
        origin: &'static str,
        /// Its length.
        length: usize,
    },
    /// A mount on the root itself.
    #[error("mounts: container_path {0:?} is the root directory of the container")]
    MountOnRoot(String),
    /// A `Volumes` key of the image that is not a path in the container.
    #[error("the image's Volumes: {0:?} is not a path in the container")]
    Volume(String),
    /// Too many mounts.
    #[error("{found} mounts and volumes; the limit is {MAX_MOUNTS}")]
    TooManyMounts {
        /// The number of mounts and volumes.
        found: usize,
    },
    /// Not the name of a capability.
    #[error("{field}: {name:?} is not a capability")]
    Capability {
        /// The field of the request.
        field: &'static str,
        /// The name.
        name: String,
    },
    /// `privileged` in a sandbox that is not.
    #[error("privileged: the sandbox does not allow privileged containers")]
    PrivilegedSandbox,
    /// `Device.container_path` below a mount without such a node.
    #[error("devices: {0:?} is at or below a mount, which has no such device")]
    DeviceOnMount(PathBuf),
    /// [`NamespaceMode::Target`] without a target.
    #[error("namespace_options.target_id: no container to share the pid namespace with")]
    NoTarget,
    /// [`NamespaceMode::Pod`] in a sandbox without a shared pid namespace.
    #[error("namespace_options.pid: the sandbox was created without a shared pid namespace")]
    NoSharedPid,
    /// An invalid mode for this kind of namespace.
    #[error("namespace_options.{kind}: the mode {mode:?} is not supported")]
    NamespaceMode {
        /// The kind of namespace.
        kind: &'static str,
        /// The requested mode.
        mode: NamespaceMode,
    },
    /// A profile was named on a kernel without AppArmor.
    #[error("apparmor: the profile {0:?} cannot be applied, because AppArmor is not enabled")]
    NoAppArmor(String),
    /// The kernel enforces AppArmor, and Berth's own profile is not loaded.
    #[error("apparmor: the kernel enforces AppArmor, and the profile of RuntimeDefault is not loaded")]
    NoDefaultAppArmor,
    /// Not a valid profile name.
    #[error("apparmor: {0:?} is not the name of a profile")]
    AppArmorProfile(String),
    /// A property of the spec that the cgroup cannot enforce.
    #[error("cannot apply linux.resources.{property}")]
    Unsupported {
        /// The property of the spec.
        property: &'static str,
    },
    /// A limit that is out of range for the spec.
    #[error("resources.{field}: {value} is out of range")]
    Resource {
        /// The field.
        field: &'static str,
        /// The value.
        value: i128,
    },
}

/// The spec of a container.
///
/// # Errors
/// [`SpecError`].
pub fn build(inputs: &Inputs<'_>) -> Result<Spec, SpecError> {
    let security = &inputs.config.security;
    if security.privileged && !inputs.sandbox.privileged {
        return Err(SpecError::PrivilegedSandbox);
    }
    let mounts = mounts::of_container(inputs)?;

    let mut root = Root::default();
    root.set_path(inputs.files.rootfs()).set_readonly(Some(security.readonly_rootfs));

    let mut linux = Linux::default();
    linux
        .set_namespaces(Some(namespaces(inputs)?))
        .set_cgroups_path(Some(PathBuf::from("/").join(inputs.cgroup_path.trim_start_matches('/'))))
        .set_devices(Some(devices::nodes(inputs, &mounts)?))
        .set_resources(Some(resources::of_spec(
            &inputs.config.resources,
            &device_policy(security.privileged, inputs.devices),
        )?))
        .set_rootfs_propagation(Some(mounts::root_propagation(inputs.mounts).to_owned()))
        .set_masked_paths(Some(covered(security.privileged, &security.masked_paths)))
        .set_readonly_paths(Some(covered(security.privileged, &security.readonly_paths)))
        .set_seccomp(if security.privileged { None } else { inputs.seccomp.cloned() });

    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts))
        .set_process(Some(process::of_container(inputs)?))
        .set_hostname(has_own_uts(inputs.sandbox)?.then(|| inputs.hostname.to_owned()))
        .set_annotations(Some(annotations(inputs)))
        .set_linux(Some(linux));
    Ok(spec)
}

/// A shared network namespace usually implies the host's name, too, since a container that sees the
/// host's interfaces under another hostname confuses programs that register themselves.
fn has_own_uts(sandbox: &sandbox::Config) -> Result<bool, SpecError> {
    is_pods("network", sandbox.namespaces.network)
}

/// Whether the namespace is the pod's own, for kinds that can only be the pod's or the node's.
fn is_pods(kind: &'static str, mode: NamespaceMode) -> Result<bool, SpecError> {
    match mode {
        NamespaceMode::Pod => Ok(true),
        NamespaceMode::Node => Ok(false),
        NamespaceMode::Container | NamespaceMode::Target => Err(SpecError::NamespaceMode { kind, mode }),
    }
}

fn namespaces(inputs: &Inputs<'_>) -> Result<Vec<LinuxNamespace>, SpecError> {
    let sandbox = inputs.sandbox;
    let pinned = |name: &str| Some(inputs.sandbox_files.namespace(name));
    let mut namespaces = vec![namespace(LinuxNamespaceType::Mount, None)];
    if is_pods("network", sandbox.namespaces.network)? {
        namespaces.push(namespace(LinuxNamespaceType::Network, pinned("net")));
    }
    if is_pods("ipc", sandbox.namespaces.ipc)? {
        namespaces.push(namespace(LinuxNamespaceType::Ipc, pinned("ipc")));
    }
    if has_own_uts(sandbox)? {
        namespaces.push(namespace(LinuxNamespaceType::Uts, pinned("uts")));
    }
    match (inputs.config.security.namespaces.pid, sandbox.namespaces.pid) {
        (NamespaceMode::Container, _) => namespaces.push(namespace(LinuxNamespaceType::Pid, None)),
        (NamespaceMode::Pod, NamespaceMode::Pod) => {
            namespaces.push(namespace(LinuxNamespaceType::Pid, pinned("pid")))
        }
        // The pod's is the node's.
        (NamespaceMode::Node, _) | (NamespaceMode::Pod, NamespaceMode::Node) => {}
        (NamespaceMode::Pod, NamespaceMode::Container | NamespaceMode::Target) => {
            return Err(SpecError::NoSharedPid);
        }
        (NamespaceMode::Target, _) => {
            let path = inputs.target_pid_namespace.ok_or(SpecError::NoTarget)?;
            namespaces.push(namespace(LinuxNamespaceType::Pid, Some(path.to_owned())));
        }
    }
    if own_cgroup_namespace(inputs) {
        namespaces.push(namespace(LinuxNamespaceType::Cgroup, None));
    }
    Ok(namespaces)
}

/// On v2, so that the mount of the hierarchy shows only the container's part. On v1 that is done by
/// the mounts, and a namespace would only hide from tools such as cAdvisor which cgroup they are
/// in. A privileged container sees the host's, as under other runtimes.
fn own_cgroup_namespace(inputs: &Inputs<'_>) -> bool {
    inputs.host.unified_cgroups && !inputs.config.security.privileged
}

fn namespace(kind: LinuxNamespaceType, path: Option<PathBuf>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(path);
    namespace
}

/// Masked or read-only paths: exactly the requested ones, because an empty list is how `procMount:
/// Unmasked` arrives.
fn covered(privileged: bool, paths: &[String]) -> Vec<String> {
    if privileged { Vec::new() } else { paths.to_vec() }
}

/// The annotations by which node tools (tracers, runtime security, NRI-like plugins) recognise a
/// Kubernetes container. None of the request's: they are the pod author's text, and some tools
/// treat OCI annotations as commands (CVE-2026-44210, CVE-2024-3154).
fn annotations(inputs: &Inputs<'_>) -> HashMap<String, String> {
    let pod = &inputs.sandbox.metadata;
    [
        ("container-type", "container"),
        ("container-name", &inputs.config.metadata.name),
        ("image-name", inputs.image_name),
        ("sandbox-id", inputs.sandbox_id.as_str()),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
        ("sandbox-log-directory", &inputs.sandbox.log_directory),
    ]
    .into_iter()
    .map(|(name, value)| (format!("io.kubernetes.cri.{name}"), value.to_owned()))
    .collect()
}

#[cfg(test)]
pub(crate) mod tests;
