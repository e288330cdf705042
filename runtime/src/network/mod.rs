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
//! - *remove dead*: find and remove what belongs to missing sandboxes;
//! - *look*: report whether pods can be attached and if not, why; repair or reread what can be.

mod bandwidth;
mod bridge;
mod cni;
mod error;
mod pod_cidr;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use berth_model::id::SandboxId;
use berth_model::layout::Layout;
use berth_model::sandbox;
use berth_network::config::Subnets;
use berth_network::{Bridge, BridgeConfig, Known, Netlink};
use ipnet::IpNet;
use tokio::sync::Notify;

use crate::config::{Config, ConfiguredSubnets, NetworkKind};
use crate::host_paths::HostPaths;
use crate::{chain, lock};
use cni::{Cni, Configured, not_ready};
use pod_cidr::PodCidr;

pub(crate) use bridge::host_ports;
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
    configured_subnets: ConfiguredSubnets,
    pod_cidr: Arc<PodCidr>,
    addresses: PathBuf,
    setting_up: Mutex<()>,
    /// A sandbox has been released.
    released: Notify,
    cni: Cni,
    /// What was found when it was last looked at.
    state: Mutex<Result<(), NotReady>>,
    /// What the last pod was given, or the next would have been when it was last looked at.
    chosen: Mutex<Description>,
}

/// The network that a pod is given.
#[derive(Debug)]
pub(crate) enum Chosen<'a> {
    Bridge(&'a Bridge),
    Cni(&'a Cni, Arc<berth_cni::NetworkConfig>),
}

/// What there is once a thread has been in the pod's namespace.
#[derive(Debug)]
pub(crate) enum Within<'a> {
    /// All of it.
    Attached(Attached),
    /// Plugins attach it from the node.
    Plugins(Plugins<'a>),
}

/// The plugins of a network.
#[derive(Debug)]
pub(crate) struct Plugins<'a> {
    cni: &'a Cni,
    config: Arc<berth_cni::NetworkConfig>,
}

/// What a network has to know of a pod.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pod<'a> {
    pub(crate) id: &'a SandboxId,
    pub(crate) config: &'a sandbox::Config,
    /// Where its network namespace is pinned.
    pub(crate) namespace: &'a Path,
}

/// The interfaces of a pod, the main one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attached {
    pub(crate) interfaces: Vec<Interface>,
    /// The network's own name servers, for a pod that asks for none.
    pub(crate) dns: Option<sandbox::Dns>,
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

/// Why pods cannot be attached, as the CRI's condition `NetworkReady` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NotReady {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// What is left of missing sandboxes on the bridge.
#[derive(Debug)]
pub(crate) struct Dead(Option<berth_network::Dead>);

/// A description of a network, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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
        cni_workers: HostPaths,
        known: &BTreeMap<String, Known>,
    ) -> Result<Self, NetworkError> {
        let pod_cidr = Arc::new(PodCidr::open(&layout.network())?);
        let network = Self {
            kind: config.network.kind,
            bridge: OnceLock::new(),
            bridge_config: config.network.bridge.clone(),
            configured_subnets: config.network.subnets,
            pod_cidr: pod_cidr.clone(),
            addresses: layout.network(),
            setting_up: Mutex::default(),
            released: Notify::new(),
            cni: Cni::new(&config.network.cni, cni_workers, pod_cidr),
            state: Mutex::new(Ok(())),
            chosen: Mutex::default(),
        };
        // A directory that does not answer is known to be silent then, and delays nothing more.
        let configured =
            (network.kind != NetworkKind::Bridge).then(|| network.cni.configuration_within(cni::AT_START));
        let is_bridge = match network.kind {
            NetworkKind::Bridge => true,
            NetworkKind::Cni => false,
            NetworkKind::Auto => {
                matches!(configured, Some(Ok(Configured::Nothing { has_kubelet: false })))
            }
        };
        // Pods that are on it from before, whatever new ones get.
        if is_bridge && !network.waits_for_pod_cidr()
            || bridge::has_addresses(&network.bridge_config, &network.addresses)
        {
            network.bridge_for(known)?;
        }
        network.look();
        Ok(network)
    }

    fn bridge_for(&self, known: &BTreeMap<String, Known>) -> Result<&Bridge, NetworkError> {
        let _alone = lock(&self.setting_up);
        if let Some(bridge) = self.bridge.get() {
            return Ok(bridge);
        }
        let Subnets { ipv4, ipv6 } = self.subnets(&self.pod_cidr.networks())?;
        let config = BridgeConfig { ipv4, ipv6, ..self.bridge_config.clone() };
        let bridge = bridge::set_up(config, &self.addresses, known)?;
        Ok(self.bridge.get_or_init(|| bridge))
    }

    /// The network that a pod is given now. Blocking.
    pub(crate) fn choose(&self) -> Result<Chosen<'_>, NetworkError> {
        let chosen = self.choose_unseen();
        *lock(&self.chosen) = match &chosen {
            Ok(Chosen::Cni(_, config)) => {
                Description { kind: "cni", name: config.name().to_owned(), subnets: Vec::new() }
            }
            Ok(Chosen::Bridge(bridge)) => bridge::description(bridge),
            Err(_) => Description { kind: "none", ..Description::default() },
        };
        chosen
    }

    fn choose_unseen(&self) -> Result<Chosen<'_>, NetworkError> {
        if self.kind != NetworkKind::Bridge {
            match self.cni.configuration()? {
                Configured::Network(config) => return Ok(Chosen::Cni(&self.cni, config)),
                Configured::Nothing { has_kubelet } if has_kubelet || self.kind == NetworkKind::Cni => {
                    return Err(NetworkError::NotConfigured(self.waits_for_cni()));
                }
                Configured::Nothing { .. } => {}
            }
        }
        if self.waits_for_pod_cidr() {
            return Err(NetworkError::NotConfigured(
                "network.ipv4 is \"pod-cidr\", and the kubelet has not named the node's pod CIDR yet; the cluster's controller manager gives it with \
                 --allocate-node-cidrs"
                    .to_owned(),
            ));
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
        self.cni.detach(sandbox.as_str())
    }

    /// Gives back what a sandbox has of the node, once its namespaces are unpinned. May be
    /// repeated. Blocking.
    pub(crate) fn release(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let Some(bridge) = self.bridge.get() else { return Ok(()) };
        bridge.release(sandbox.as_str())?;
        self.released.notify_one();
        Ok(())
    }

    /// Waits until a sandbox has been released.
    pub(crate) async fn released(&self) {
        self.released.notified().await;
    }

    /// Frees the addresses of released sandboxes whose interfaces have gone. Returns whether some
    /// are left. Blocking.
    pub(crate) fn clear_released(&self) -> Result<bool, NetworkError> {
        self.bridge.get().map_or(Ok(false), |bridge| Ok(bridge.clear_released()?))
    }

    /// The addresses of a sandbox, as far as known without its record; the main one first.
    pub(crate) fn addresses_of(&self, sandbox: &SandboxId) -> Vec<IpAddr> {
        let bridge = self.bridge.get().map(|bridge| bridge.addresses_of(sandbox.as_str()));
        let bridge = bridge.into_iter().flatten().map(|found| found.address);
        bridge.chain(self.cni.addresses_of(sandbox)).collect()
    }

    /// What the bridge has of sandboxes that are not among the living, for [`Network::remove_dead`]
    /// at a later time, when there may be new ones. Blocking.
    pub(crate) fn dead(&self, living: &[&str]) -> Result<Dead, NetworkError> {
        let bridge = self.bridge.get().map(|bridge| bridge.dead(living.iter().copied())).transpose()?;
        Ok(Dead(bridge))
    }

    /// Removes it. Blocking.
    pub(crate) fn remove_dead(&self, dead: &Dead) -> Result<(), NetworkError> {
        match (self.bridge.get(), &dead.0) {
            (Some(bridge), Some(dead)) => bridge.remove_dead(dead).map(drop).map_err(Into::into),
            _ => Ok(()),
        }
    }

    /// Gives back what plugins have of sandboxes that `exists` does not know. May be repeated.
    /// Blocking.
    pub(crate) fn detach_dead(&self, exists: &dyn Fn(&str) -> bool) -> Result<(), NetworkError> {
        self.cni.remove_dead(exists, self.kind != NetworkKind::Bridge)
    }

    /// Checks the network, repairs it if needed, and remembers the outcome: an administrator may
    /// flush the firewall or take the bridge down under running pods. To be called periodically.
    /// Blocking.
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

    /// The kubelet names the networks of the node's pods: new ones get their addresses there.
    /// Blocking.
    ///
    /// # Errors
    /// What is not a pod CIDR, or none that the bridge can have where it is in use; then nothing
    /// has changed. Another error of the bridge, which [`Network::look`] mends.
    pub(crate) fn take_pod_cidr(&self, text: &str) -> Result<(), NetworkError> {
        let networks = pod_cidr::parse(text)?;
        let alone = lock(&self.setting_up);
        if let Some(bridge) = self.bridge.get() {
            bridge.change_subnets(self.subnets(&networks)?)?;
        } else if self.kind == NetworkKind::Bridge {
            self.subnets(&networks)?;
        }
        self.pod_cidr.set(&networks)?;
        drop(alone);
        self.look();
        Ok(())
    }

    fn waits_for_pod_cidr(&self) -> bool {
        self.configured_subnets.waits_for_pod_cidr && self.pod_cidr.networks().is_empty()
    }

    /// Where the bridge gives new pods their addresses.
    fn subnets(&self, pod_cidr: &[IpNet]) -> Result<Subnets, NetworkError> {
        pod_cidr::subnets(self.configured_subnets, pod_cidr)
    }

    /// The network of the next pod, as far as that is known without a look.
    pub(crate) fn description(&self) -> Description {
        lock(&self.chosen).clone()
    }
}

impl<'a> Chosen<'a> {
    /// What is done on a thread in the sandbox's new network namespace, which is pinned already.
    /// On an error the sandbox may own something, and has to be detached and released. Blocking.
    pub(crate) fn attach_within(
        &self,
        sandbox: &SandboxId,
        config: &sandbox::Config,
    ) -> Result<Within<'a>, NetworkError> {
        match self {
            Self::Bridge(bridge) => bridge::attach(bridge, sandbox, config).map(Within::Attached),
            Self::Cni(cni, config) => {
                let mut inside = Netlink::open().map_err(NetworkError::Loopback)?;
                Bridge::loopback_up(&mut inside).map_err(NetworkError::Loopback)?;
                Ok(Within::Plugins(Plugins { cni, config: config.clone() }))
            }
        }
    }

    /// Whether a pod can be attached, before anything is made.
    pub(crate) fn check(&self) -> Result<(), NetworkError> {
        match self {
            Self::Bridge(_) => Ok(()),
            Self::Cni(cni, _) => cni.check(),
        }
    }
}

impl Plugins<'_> {
    /// What is done from the node's namespaces. Blocking.
    pub(crate) fn attach(&self, pod: &Pod<'_>) -> Result<Attached, NetworkError> {
        self.cni.attach(&self.config, pod)
    }
}
