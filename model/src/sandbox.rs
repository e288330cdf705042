//! The configuration of a pod sandbox: `PodSandboxConfig` of the CRI, checked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::security::{Namespaces, Profile};

/// The identity of a sandbox among those that exist: `PodSandboxMetadata`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Metadata {
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// The pod's namespace.
    pub namespace: String,
    /// Raised by the kubelet each time it recreates the sandbox.
    pub attempt: u32,
}

impl std::fmt::Display for Metadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} (uid {}, attempt {})", self.namespace, self.name, self.uid, self.attempt)
    }
}

/// The lines of the pod's `resolv.conf`: `DNSConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Dns {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// A container port that the pod names: `PortMapping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// The port in the pod.
    pub container_port: u16,
    /// The port on the host, 0 for none.
    pub host_port: u16,
    /// The host's address, empty for all.
    pub host_ip: String,
}

/// Everything about a sandbox that does not change.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Config {
    /// Its identity.
    pub metadata: Metadata,
    /// The hostname asked for; empty for the host's.
    pub hostname: String,
    /// Absolute; empty for no logs.
    pub log_directory: String,
    /// `None` for the host's file.
    pub dns: Option<Dns>,
    /// Ports of the pod.
    pub port_mappings: Vec<PortMapping>,
    /// Returned verbatim.
    pub labels: BTreeMap<String, String>,
    /// Returned verbatim.
    pub annotations: BTreeMap<String, String>,
    /// The cgroup that the containers' go into; empty for the daemon's own parent.
    pub cgroup_parent: String,
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// Privileged containers are allowed.
    pub privileged: bool,
    /// The AppArmor profile of the pod. Records of earlier versions do not have it; it matters
    /// while the sandbox is made.
    #[serde(default)]
    pub apparmor: Profile,
    /// Kernel parameters of its namespaces, checked: sysctl(8) names with dots.
    pub sysctls: BTreeMap<String, String>,
    /// The handler's name in the request; empty for the default.
    pub runtime_handler: String,
}
