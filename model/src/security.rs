//! The isolation settings of a sandbox or a container.

use serde::{Deserialize, Serialize};

/// The scope of a namespace: `NamespaceMode` of the CRI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum NamespaceMode {
    /// One for the whole pod.
    #[default]
    Pod,
    /// One for the container alone.
    Container,
    /// The node's.
    Node,
    /// That of another container of the pod.
    Target,
}

/// `NamespaceOption` of the CRI. User namespaces are not offered yet, so a request that has one is
/// refused at the edge.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Namespaces {
    /// Network: pod or node.
    pub network: NamespaceMode,
    /// Process ids: all four.
    pub pid: NamespaceMode,
    /// IPC: pod or node.
    pub ipc: NamespaceMode,
    /// The container whose pid namespace is joined, for [`NamespaceMode::Target`]; else empty.
    pub target_id: String,
}

/// A seccomp or AppArmor profile: `SecurityProfile` of the CRI.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Profile {
    /// None. The default, because the CRI means that by an absent message.
    #[default]
    Unconfined,
    /// Berth's own.
    RuntimeDefault,
    /// The file (seccomp) or the loaded profile (AppArmor) of this name.
    Localhost(String),
}

/// Who a container runs as: `LinuxContainerSecurityContext` of the CRI.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct User {
    /// A number or name that the request names; `None` means what the image says.
    pub user: Option<String>,
    /// The primary group.
    pub group: Option<u32>,
    /// Supplementary groups.
    pub supplementary_groups: Vec<u32>,
    /// Add the groups of the image's group file (policy `Merge`), or only the ones above
    /// (`Strict`).
    pub merge_groups: bool,
}

/// Security context of a container: `LinuxContainerSecurityContext` of the CRI.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ContainerSecurity {
    /// Everything that can be allowed is allowed.
    pub privileged: bool,
    /// Namespaces; network and IPC are the sandbox's.
    pub namespaces: Namespaces,
    /// Who it runs as.
    pub user: User,
    /// Capabilities added to the default ones, without `CAP_`, upper case; `ALL` for all.
    pub add_capabilities: Vec<String>,
    /// Capabilities taken out of the default ones; `ALL` for all.
    pub drop_capabilities: Vec<String>,
    /// Capabilities added to the ambient set too.
    pub add_ambient_capabilities: Vec<String>,
    /// The root is read-only.
    pub readonly_rootfs: bool,
    /// Exec gains no privileges.
    pub no_new_privileges: bool,
    /// The seccomp profile.
    pub seccomp: Profile,
    /// The AppArmor profile.
    pub apparmor: Profile,
    /// Hidden paths.
    pub masked_paths: Vec<String>,
    /// Read-only paths.
    pub readonly_paths: Vec<String>,
}
