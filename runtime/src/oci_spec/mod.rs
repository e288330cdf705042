//! The OCI runtime spec of a container, from what was asked for and what the image says.
//!
//! [`build`] is pure: whatever has to be looked up on the host is looked up by its caller and handed in, by
//! [`devices::resolve_devices`] and [`mounts::find_source`] among others. The request is checked at the
//! edge for what its own message tells, and here for what depends on the image or the sandbox; the image's
//! configuration is hostile text throughout.
//!
//! The spec is the whole of what the container may have: [`crate::plan`] adds nothing to it, and it is what a
//! verbose `ContainerStatus` shows as `runtimeSpec`. Left to others: who the process runs as (the shim reads
//! the passwd and group files of the root), compiling seccomp profiles, making the directories that mounts
//! come from.
//!
//! Facts: OCI runtime-spec 1.2 (`config.md`, `config-linux.md`), the CRI messages `ContainerConfig` and
//! `LinuxContainerSecurityContext`.

mod capabilities;
pub mod devices;
mod environment;
pub mod mounts;
mod process;
mod resources;
pub mod stop_signal;

pub use capabilities::granted_capabilities;
pub use devices::{ResolvedDevice, device_policy};
pub use mounts::{CgroupDirectory, ResolvedMount};
pub use process::set_user;
pub use resources::{in_force, limits, of_cgroup, resources};

use berth_image::ImageConfig;
use berth_model::id::{ContainerId, SandboxId};
use berth_model::layout::{ContainerFiles, SandboxFiles};
use berth_model::limit::MAX_MOUNTS;
use berth_model::security::NamespaceMode;
use berth_model::{container, sandbox};
use berth_sys::credentials::CapabilityBits;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, PosixRlimit, Root, Spec};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The version of the OCI runtime spec that is written: the newest whose every property that is used here
/// exists.
const OCI_VERSION: &str = "1.2.0";

/// The host's `/dev/shm`, for pods that share the host's IPC namespace.
const HOST_SHM: &str = "/dev/shm";

/// What the spec of a container is made from. Paths are absolute.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The container's id.
    pub container_id: &'a ContainerId,
    /// The requested configuration.
    pub config: &'a container::Config,
    /// Where its files lie.
    pub files: &'a ContainerFiles,
    /// The sandbox's id.
    pub sandbox_id: &'a SandboxId,
    /// What was asked for about the sandbox. Network and IPC namespaces are the sandbox's, whatever the
    /// container's request says.
    pub sandbox: &'a sandbox::Config,
    /// Where the sandbox's files lie.
    pub sandbox_files: &'a SandboxFiles,
    /// The hostname that the sandbox has: the one asked for or the host's.
    pub hostname: &'a str,
    /// What the image says.
    pub image: &'a ImageConfig,
    /// A name of the image, for an annotation.
    pub image_name: &'a str,
    /// The mounts asked for with their sources looked up, in the order of the request:
    /// [`mounts::resolve_mounts`].
    pub mounts: &'a [ResolvedMount],
    /// The devices asked for: [`devices::resolve_devices`].
    pub devices: &'a [ResolvedDevice],
    /// Every device node of the host: [`devices::host_devices`]. Only looked at for a privileged container.
    pub host_devices: &'a [ResolvedDevice],
    /// Berth's own AppArmor profile, when it is loaded.
    pub default_apparmor_profile: Option<&'a str>,
    /// The container's cgroup, relative to the roots of the hierarchies.
    pub cgroup_path: &'a str,
    /// The container's own directory in each v1 hierarchy; not used on v2.
    pub cgroup_directories: &'a [CgroupDirectory],
    /// The pid namespace to join when the request says [`NamespaceMode::Target`], as `/proc/<pid>/ns/pid`.
    pub target_pid_namespace: Option<&'a Path>,
    /// The seccomp profile chosen; `None` for none. A privileged container gets none whatever this is.
    pub seccomp: Option<&'a LinuxSeccomp>,
    /// The resource limits of the program.
    pub rlimits: &'a [PosixRlimit],
    /// About the host.
    pub host: &'a HostFacts,
}

/// What the daemon found out about the host and itself at its start.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// The daemon's bounding set: no container gets what is not in it.
    pub bounding: CapabilityBits,
    /// Controllers are on cgroup v2.
    pub unified_cgroups: bool,
    /// The kernel enforces AppArmor profiles.
    pub apparmor: bool,
    /// Whether the kernel has SELinux on.
    pub selinux_is_on: bool,
    /// Major and minor version of the kernel.
    pub kernel: (u32, u32),
}

/// A request or an image from which no container can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// `command` and `args` of the request and `Entrypoint` and `Cmd` of the image are all empty.
    #[error("no command specified")]
    NoCommand,
    /// Text that cannot be passed to a program.
    #[error("{origin} has a NUL byte: {text:?}")]
    NulByte {
        /// Where it is from.
        origin: &'static str,
        /// The text.
        text: String,
    },
    /// One argument or variable is too long for execve(2).
    #[error("{origin} has an entry of {length} bytes; the kernel's limit is {}", environment::MAX_TEXT_BYTES)]
    TextTooLong {
        /// Where it is from.
        origin: &'static str,
        /// Its length in bytes.
        length: usize,
    },
    /// Arguments and environment are too long in sum.
    #[error("arguments and environment have {length} bytes; the limit is {}", environment::MAX_TOTAL_BYTES)]
    TooMuchText {
        /// Their length in bytes.
        length: usize,
    },
    /// A path that has to be absolute is not, or has something in it that a path cannot have.
    #[error("{origin}: {path:?} is not an absolute path")]
    Path {
        /// Where it is from.
        origin: &'static str,
        /// The path.
        path: String,
    },
    /// A path that the kernel would not take.
    #[error("{origin}: the path is too long ({length} bytes)")]
    PathTooLong {
        /// Where it is from.
        origin: &'static str,
        /// Its length.
        length: usize,
    },
    /// A mount on the root itself.
    #[error("mounts: container_path {0:?} is the root directory of the container")]
    MountOnRoot(String),
    /// A `Volumes` key of the image that is no path inside the container.
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
    /// `Device.container_path` where something is mounted that has no such node.
    #[error("devices: {0:?} is at or below a mount, which has no such device")]
    DeviceOnMount(PathBuf),
    /// [`NamespaceMode::Target`] without a target.
    #[error("namespace_options.target_id: no container to share the pid namespace with")]
    NoTarget,
    /// [`NamespaceMode::Pod`] in a sandbox that was made without a pid namespace to share.
    #[error("namespace_options.pid: the sandbox was created without a shared pid namespace")]
    NoSharedPid,
    /// A namespace mode that its kind does not have.
    #[error("namespace_options.{kind}: the mode {mode:?} is not supported")]
    NamespaceMode {
        /// Which namespace.
        kind: &'static str,
        /// The requested mode.
        mode: NamespaceMode,
    },
    /// A profile was named on a kernel that enforces none.
    #[error("apparmor: the profile {0:?} cannot be applied, because AppArmor is not enabled")]
    NoAppArmor(String),
    /// The kernel enforces AppArmor, and Berth's own profile is not in it.
    #[error("apparmor: the kernel enforces AppArmor, and the profile of RuntimeDefault is not loaded")]
    NoDefaultAppArmor,
    /// Not the name of a loaded profile, whatever is loaded.
    #[error("apparmor: {0:?} is not the name of a profile")]
    AppArmorProfile(String),
    /// A property of the spec that the cgroup would not keep.
    #[error("cannot apply linux.resources.{property}")]
    Unsupported {
        /// The property of the spec.
        property: &'static str,
    },
    /// A limit that does not fit the spec.
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
/// [`SpecError`], each variant by its cause; nothing has been made by then.
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
        .set_masked_paths(Some(covered(security.privileged, "masked_paths", &security.masked_paths)?))
        .set_readonly_paths(Some(covered(security.privileged, "readonly_paths", &security.readonly_paths)?))
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

/// What a shared network namespace is by custom: the host's name too, since a container that sees the host's
/// interfaces under another name confuses everything that registers itself.
fn has_own_uts(sandbox: &sandbox::Config) -> Result<bool, SpecError> {
    is_pods("network", sandbox.namespaces.network)
}

/// Whether the namespace is the pod's own, of the kinds that are the pod's or the node's and nothing else.
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

/// On v2, so that the mount of the hierarchy shows the container's part and no more. On v1 that is done by
/// what is mounted, and a namespace would only hide from cAdvisor-like tools inside which cgroup they are in.
/// A privileged container sees the host's, as under other runtimes.
fn own_cgroup_namespace(inputs: &Inputs<'_>) -> bool {
    inputs.host.unified_cgroups && !inputs.config.security.privileged
}

fn namespace(kind: LinuxNamespaceType, path: Option<PathBuf>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(path);
    namespace
}

/// Masked or read-only paths: exactly those asked for, because an empty list is how `procMount: Unmasked`
/// arrives.
fn covered(privileged: bool, origin: &'static str, paths: &[String]) -> Result<Vec<String>, SpecError> {
    if privileged {
        return Ok(Vec::new());
    }
    for path in paths {
        if !path.starts_with('/') || path.contains('\0') {
            return Err(SpecError::Path { origin, path: path.clone() });
        }
    }
    Ok(paths.to_vec())
}

/// The annotations by which node tools (tracers, runtime security, NRI-like plugins) recognise a Kubernetes
/// container. None of the request's: they are the pod author's text, and some tools take OCI annotations as
/// orders (CVE-2026-44210, CVE-2024-3154).
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
