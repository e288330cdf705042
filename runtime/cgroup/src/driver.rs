//! The cgroup driver of the node.

use std::fmt;

/// The cgroup driver of this node: CRI `LinuxRuntimeConfiguration.cgroup_driver`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// Directories are created and removed directly.
    Cgroupfs,
    /// Parents are slices and leaves are scopes, both created by systemd, which is process 1.
    Systemd,
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroupfs => f.write_str("cgroupfs"),
            Self::Systemd => f.write_str("systemd"),
        }
    }
}
