//! The configuration of a container: `ContainerConfig` of the CRI, checked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::security::ContainerSecurity;

/// The identity of a container in its sandbox: `ContainerMetadata`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Metadata {
    /// The name in the pod.
    pub name: String,
    /// Raised by the kubelet each time it recreates the container.
    pub attempt: u32,
}

/// Mount propagation: `MountPropagation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Propagation {
    /// Not at all.
    #[default]
    Private,
    /// From the host into the container.
    HostToContainer,
    /// Both ways.
    Bidirectional,
}

/// A directory or file of the host in the container: `Mount`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute.
    pub container_path: String,
    /// Absolute, as asked.
    pub host_path: String,
    /// Read-only.
    pub readonly: bool,
    /// Read-only, and everything mounted below it too.
    pub recursive_read_only: bool,
    /// Propagation.
    pub propagation: Propagation,
}

/// A device of the host in the container: `Device`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Absolute.
    pub container_path: String,
    /// Absolute.
    pub host_path: String,
    /// Of `r`, `w`, `m`.
    pub permissions: String,
}

/// Limits: `LinuxContainerResources`. Zero and empty mean "not set", as in the CRI.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resources {
    /// `cpu_period`, in microseconds.
    pub cpu_period_us: i64,
    /// `cpu_quota`, in microseconds; negative for none.
    pub cpu_quota_us: i64,
    /// `cpu_shares`, relative, 1024 for one core's worth.
    pub cpu_shares: i64,
    /// `memory_limit_in_bytes`.
    pub memory_limit_bytes: i64,
    /// `memory_swap_limit_in_bytes`: memory and swap together; negative for no limit.
    pub memory_swap_limit_bytes: i64,
    /// `oom_score_adj`, -1000 to 1000.
    pub oom_score_adj: i64,
    /// `cpuset_cpus`, as "0-3,7".
    pub cpuset_cpus: String,
    /// `cpuset_mems`.
    pub cpuset_mems: String,
    /// `hugepage_limits`: page size ("2MB") and bytes.
    pub hugepage_limits: Vec<(String, u64)>,
    /// `unified`: files of cgroup v2 and their content.
    pub unified: BTreeMap<String, String>,
}

/// Everything about a container that does not change, except for its resources.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Config {
    /// Its identity.
    pub metadata: Metadata,
    /// `ImageSpec.image` of the request.
    pub image: String,
    /// `ImageSpec.user_specified_image`, for display.
    pub user_specified_image: String,
    /// In place of the image's entrypoint.
    pub command: Vec<String>,
    /// In place of the image's command.
    pub args: Vec<String>,
    /// Empty for the image's.
    pub working_dir: String,
    /// Names and values, later ones win.
    pub envs: Vec<(String, String)>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Returned verbatim.
    pub labels: BTreeMap<String, String>,
    /// Returned verbatim.
    pub annotations: BTreeMap<String, String>,
    /// Relative to the sandbox's log directory; empty for no log.
    pub log_path: String,
    /// Standard input is kept open.
    pub stdin: bool,
    /// It is closed with the first session that used it.
    pub stdin_once: bool,
    /// A terminal.
    pub tty: bool,
    /// The signal that Stop sends: `None` for the image's.
    pub stop_signal: Option<i32>,
    /// Limits.
    pub resources: Resources,
    /// Security context.
    pub security: ContainerSecurity,
}
