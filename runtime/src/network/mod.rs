//! Where the pods of this node get their network from: the built-in bridge ([`berth_network`]) or
//! the CNI plugins that the node has configured ([`berth_cni`]).
//!
//! Nothing outside this module knows which kind a pod has. What a kind has to do:
//!
//! - *attach*: from inside a pod's new namespace or from the node, make interfaces and say which
//!   addresses they have;
//! - *detach* and *release*: give back what a pod has, before and after its namespace is let go of,
//!   from its id alone, so that it can be done by another daemon, for the second time, and with the
//!   namespace gone;
//! - *dead*: find and remove what belongs to missing sandboxes;
//! - *look*: report whether pods can be attached and if not, why; repair or reread what can be.

mod bridge;
mod cni;
mod error;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use berth_model::id::SandboxId;
use berth_model::layout::Layout;
use berth_network::{Bridge, BridgeConfig, Netlink};

use crate::config::{Config, NetworkKind};
use crate::{chain, lock};
use cni::{Cni, not_ready};

pub(crate) use error::NetworkError;

/// What the main interface of a pod is called, whichever kind made it.
pub(crate) const MAIN_INTERFACE: &str = berth_network::bridge::POD_INTERFACE;

/// The network of the pods that do not use the node's.
#[derive(Debug)]
pub(crate) struct Network {
    kind: NetworkKind,
    /// Set up when it is first needed: a node with CNI has no bridge of ours.
    bridge: OnceLock<Bridge>,
    bridge_config: BridgeConfig,
    addresses: PathBuf,
    setting_up: Mutex<()>,
    cni: Cni,
    /// What was found when it was last looked at.
    state: Mutex<Result<(), NotReady>>,
}

/// The network that a pod is given.
#[derive(Debug)]
pub(crate) enum Chosen<'a> {
    Bridge(&'a Bridge),
    Cni(&'a Cni, Arc<berth_cni::NetworkConfig>),
}

/// What a network has to know of a pod.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pod<'a> {
    pub(crate) id: &'a SandboxId,
    pub(crate) config: &'a berth_model::sandbox::Config,
    /// Where its network namespace is pinned.
    pub(crate) namespace: &'a Path,
}

/// The interfaces of a pod, the main one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attached {
    pub(crate) interfaces: Vec<Interface>,
}

/// An interface in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: Cow<'static, str>,
    pub(crate) addresses: Vec<IpAddr>,
}

impl Attached {
    /// All addresses, the pod's main one first.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = &IpAddr> {
        self.interfaces.iter().flat_map(|interface| &interface.addresses)
    }
}

/// The state of a pod's network namespace at detach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Namespace {
    /// Pinned, and nothing is in it: it ends when it is unpinned.
    Unused,
    /// Pinned, and may contain a process that cannot be killed.
    Used,
    /// Not pinned: a repeated detach, or the node was rebooted.
    Gone,
}

/// Why pods cannot be attached, as the CRI's condition `NetworkReady` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NotReady {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// What is left of missing sandboxes.
#[derive(Debug)]
pub(crate) struct Dead {
    bridge: Option<berth_network::Dead>,
    cni: cni::DeadAttachments,
}

/// A description of a network, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) kind: &'static str,
    pub(crate) name: String,
    pub(crate) subnets: Vec<String>,
}

impl Network {
    /// Sets up the configured network, or takes over an existing one. `known`: the sandboxes that
    /// may exist, with their addresses. Blocking.
    pub(crate) fn set_up(
        config: &Config,
        layout: &Layout,
        known: &BTreeMap<String, Vec<IpAddr>>,
    ) -> Result<Self, NetworkError> {
        let network = Self {
            kind: config.network.kind,
            bridge: OnceLock::new(),
            bridge_config: config.network.bridge.clone(),
            addresses: layout.network(),
            setting_up: Mutex::default(),
            cni: Cni::new(&config.network.cni),
            state: Mutex::new(Ok(())),
        };
        let is_bridge = match network.kind {
            NetworkKind::Bridge => true,
            NetworkKind::Cni => false,
            NetworkKind::Auto => matches!(network.cni.configuration(), Ok(None)) && !kubelet_is_set_up(),
        };
        // Pods that are on it from before, whatever new ones get.
        if is_bridge || bridge::has_addresses(&network.bridge_config, &network.addresses) {
            network.bridge_for(known)?;
        }
        network.look();
        Ok(network)
    }

    fn bridge_for(&self, known: &BTreeMap<String, Vec<IpAddr>>) -> Result<&Bridge, NetworkError> {
        let _alone = lock(&self.setting_up);
        if let Some(bridge) = self.bridge.get() {
            return Ok(bridge);
        }
        let bridge = bridge::set_up(self.bridge_config.clone(), &self.addresses, known)?;
        Ok(self.bridge.get_or_init(|| bridge))
    }

    /// The network that a pod is given now. Blocking.
    pub(crate) fn choose(&self) -> Result<Chosen<'_>, NetworkError> {
        if self.kind != NetworkKind::Bridge {
            match self.cni.configuration()? {
                Some(config) => return Ok(Chosen::Cni(&self.cni, config)),
                None if self.kind == NetworkKind::Cni || kubelet_is_set_up() => {
                    return Err(NetworkError::NotConfigured(self.waits_for_cni()));
                }
                None => {}
            }
        }
        match self.bridge.get() {
            Some(bridge) => Ok(Chosen::Bridge(bridge)),
            // No pod has been on it.
            None => Ok(Chosen::Bridge(self.bridge_for(&BTreeMap::new())?)),
        }
    }

    fn waits_for_cni(&self) -> String {
        let directory = self.cni.directory().display();
        match self.kind {
            NetworkKind::Auto => format!(
                "there is no CNI configuration in {directory}; this node has a kubelet, so pods wait for its cluster's network: install that, or set \
                 network.kind = \"bridge\" to use the built-in one"
            ),
            _ => format!("there is no CNI configuration in {directory}; pods wait for the cluster's network"),
        }
    }

    /// Gives back what a sandbox has of plugins, while its namespaces are pinned still. May be
    /// repeated. Blocking.
    pub(crate) fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        self.cni.detach(sandbox)
    }

    /// Gives back what a sandbox has of the node, once its namespaces are unpinned. May be
    /// repeated. Blocking.
    pub(crate) fn release(&self, sandbox: &SandboxId, namespace: Namespace) -> Result<(), NetworkError> {
        match self.bridge.get() {
            Some(bridge) => bridge::release(bridge, sandbox, namespace),
            None => Ok(()),
        }
    }

    /// The addresses of a sandbox, as far as known without its record; the main one first.
    pub(crate) fn addresses_of(&self, sandbox: &SandboxId) -> Vec<IpAddr> {
        let bridge = self.bridge.get().map(|bridge| bridge.addresses_of(sandbox.as_str()));
        let bridge = bridge.into_iter().flatten().map(|found| found.address);
        bridge.chain(self.cni.addresses_of(sandbox)).collect()
    }

    /// What there is of sandboxes that are not among the living, for [`Network::remove_dead`] at a
    /// later time, when there may be new ones. Blocking.
    pub(crate) fn dead(&self, living: &[&str]) -> Result<Dead, NetworkError> {
        let bridge = self.bridge.get().map(|bridge| bridge.dead(living.iter().copied())).transpose()?;
        // One kind does not keep the other from being cleared.
        let cni = self.cni.dead(living).unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "cannot look for orphaned CNI attachments");
            cni::DeadAttachments::default()
        });
        Ok(Dead { bridge, cni })
    }

    /// Removes it. Blocking.
    pub(crate) fn remove_dead(&self, dead: &Dead) -> Result<(), NetworkError> {
        let from_bridge = match (self.bridge.get(), &dead.bridge) {
            (Some(bridge), Some(dead)) => bridge.remove_dead(dead).map(drop).map_err(Into::into),
            _ => Ok(()),
        };
        if self.kind == NetworkKind::Bridge && dead.cni.is_empty() {
            return from_bridge;
        }
        from_bridge.and(self.cni.remove_dead(&dead.cni))
    }

    /// Checks the network, repairs it if needed, and remembers the outcome: an administrator may
    /// flush the firewall or take the bridge down under running pods. To be called periodically.
    /// then. Blocking.
    pub(crate) fn look(&self) {
        let bridge = self.bridge.get().map_or(Ok(()), bridge::look);
        let state = match self.choose() {
            Ok(Chosen::Bridge(_)) => bridge,
            Ok(Chosen::Cni(cni, config)) => cni.status(&config),
            Err(error) => Err(not_ready(chain(&error))),
        };
        *lock(&self.state) = state;
    }

    /// Whether pods can be attached, as of the last check.
    pub(crate) fn state(&self) -> Result<(), NotReady> {
        lock(&self.state).clone()
    }

    /// The kubelet names the network of the node's pods.
    pub(crate) fn take_pod_cidr(&self, cidr: &str) {
        self.cni.set_pod_cidr(cidr);
        if let Some(bridge) = self.bridge.get() {
            tracing::info!(
                cidr, ipv4 = %bridge.config().ipv4,
                "ignoring the pod CIDR of the kubelet: the built-in bridge uses the configured subnet"
            );
        }
    }

    pub(crate) fn description(&self) -> Description {
        match self.choose() {
            Ok(Chosen::Cni(_, config)) => {
                Description { kind: "cni", name: config.name().to_owned(), subnets: Vec::new() }
            }
            Ok(Chosen::Bridge(bridge)) => bridge::description(bridge),
            Err(_) => Description { kind: "none", name: String::new(), subnets: Vec::new() },
        }
    }
}

impl Chosen<'_> {
    /// What is done on a thread in the sandbox's new network namespace, which is pinned already.
    /// `None` when [`Chosen::attach_from_node`] has to follow. On an error the sandbox may own
    /// something, and has to be detached and released. Blocking.
    pub(crate) fn attach_within(&self, sandbox: &SandboxId) -> Result<Option<Attached>, NetworkError> {
        match self {
            Self::Bridge(bridge) => bridge::attach(bridge, sandbox).map(Some),
            Self::Cni(..) => {
                let mut inside = Netlink::open().map_err(NetworkError::Loopback)?;
                Bridge::loopback_up(&mut inside).map_err(NetworkError::Loopback)?;
                Ok(None)
            }
        }
    }

    /// What is done from the node's namespaces. Blocking.
    pub(crate) fn attach_from_node(&self, pod: &Pod<'_>) -> Result<Attached, NetworkError> {
        match self {
            Self::Bridge(_) => Ok(Attached { interfaces: Vec::new() }),
            Self::Cni(cni, config) => cni.attach(config, pod),
        }
    }

    /// Whether it can do what the pod asks for, before anything is made.
    pub(crate) fn check(&self, config: &berth_model::sandbox::Config) -> Result<(), NetworkError> {
        match self {
            Self::Bridge(_) if config.port_mappings.iter().any(|mapping| mapping.host_port != 0) => {
                Err(NetworkError::HostPorts)
            }
            _ => Ok(()),
        }
    }
}

/// Whether this node belongs to a cluster, which brings its network: kubeadm and most others put
/// the kubelet's configuration there.
fn kubelet_is_set_up() -> bool {
    Path::new("/var/lib/kubelet/config.yaml").exists()
}
