//! Where the pods of this node get their network from: the built-in bridge ([`berth_network`]).
//!
//! Nothing outside this module knows which kind it is. What a kind has to do:
//!
//! - *attach*: in a pod's new namespace, make interfaces and say which addresses they have;
//! - *release*: give back what a pod has, once its namespace is let go of, from its id alone, so that it can
//!   be done by another daemon, for the second time, and with the namespace gone;
//! - *dead*: find and remove what belongs to sandboxes that are not there;
//! - *look*: say whether pods can be attached and if not, why; repair or read again what can be.
//!
//! Host ports are refused at the CRI edge; a kind that can have them finds them in the sandbox's
//! configuration.

mod bridge;
mod error;

use crate::config::Config;
use crate::lock;
use berth_model::id::SandboxId;
use berth_model::layout::Layout;
use berth_network::Bridge;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;

pub(crate) use error::NetworkError;

/// The network of the pods that do not use the node's.
#[derive(Debug)]
pub(crate) struct Network {
    kind: Kind,
    /// As it was when it was last looked at.
    state: Mutex<Result<(), NotReady>>,
}

#[derive(Debug)]
enum Kind {
    Bridge(Bridge),
}

/// What a pod got: its interfaces, the main one first.
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

/// A pod's network namespace when the pod is detached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Namespace {
    /// Pinned, and nothing is in it: it ends when it is unpinned.
    Unused,
    /// Pinned, and a process that cannot be ended may be in it.
    Used,
    /// Not pinned: a detach that is repeated, or a node that was started again.
    Gone,
}

/// Why pods cannot be attached, as the CRI's condition `NetworkReady` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NotReady {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// What there is of sandboxes that are not there.
#[derive(Debug)]
pub(crate) enum Dead {
    Bridge(berth_network::Dead),
}

/// What a person is shown of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) kind: &'static str,
    pub(crate) name: String,
    pub(crate) subnets: Vec<String>,
}

impl Network {
    /// Sets up the network that the configuration asks for, or takes over what is there. `known`: the
    /// sandboxes that there may be, with the addresses that they use. Blocking.
    pub(crate) fn set_up(
        config: &Config,
        layout: &Layout,
        known: &BTreeMap<String, Vec<IpAddr>>,
    ) -> Result<Self, NetworkError> {
        let kind = Kind::Bridge(bridge::set_up(config, layout, known)?);
        Ok(Self { kind, state: Mutex::new(Ok(())) })
    }

    /// Gives a sandbox its interfaces. Called on a thread in its new network namespace, which is pinned
    /// already; whatever has to run outside is given the node's namespace by the kind. On an error the
    /// sandbox may own something, and has to be detached. Blocking.
    pub(crate) fn attach(&self, sandbox: &SandboxId) -> Result<Attached, NetworkError> {
        match &self.kind {
            Kind::Bridge(bridge) => bridge::attach(bridge, sandbox),
        }
    }

    /// Gives back what a sandbox has, once its namespaces are unpinned. May be repeated. Blocking.
    pub(crate) fn release(&self, sandbox: &SandboxId, namespace: Namespace) -> Result<(), NetworkError> {
        match &self.kind {
            Kind::Bridge(bridge) => bridge::release(bridge, sandbox, namespace),
        }
    }

    /// The addresses that a sandbox has, as far as that is known without its record; the main one first.
    pub(crate) fn addresses_of(&self, sandbox: &SandboxId) -> Vec<IpAddr> {
        match &self.kind {
            Kind::Bridge(bridge) => {
                bridge.addresses_of(sandbox.as_str()).into_iter().map(|found| found.address).collect()
            }
        }
    }

    /// What there is of sandboxes that are not among the living, for [`Network::remove_dead`] at a later
    /// time, when there may be new ones. Blocking.
    pub(crate) fn dead<'a>(&self, living: impl IntoIterator<Item = &'a str>) -> Result<Dead, NetworkError> {
        match &self.kind {
            Kind::Bridge(bridge) => Ok(Dead::Bridge(bridge.dead(living)?)),
        }
    }

    /// Removes it. Blocking.
    pub(crate) fn remove_dead(&self, dead: &Dead) -> Result<(), NetworkError> {
        match (&self.kind, dead) {
            (Kind::Bridge(bridge), Dead::Bridge(dead)) => Ok(bridge.remove_dead(dead).map(drop)?),
        }
    }

    /// Looks whether the network is whole, repairs it if it is not, and remembers the outcome: an
    /// administrator may flush the firewall or take the bridge down under running pods. To be called now and
    /// then. Blocking.
    pub(crate) fn look(&self) {
        let state = match &self.kind {
            Kind::Bridge(bridge) => bridge::look(bridge),
        };
        *lock(&self.state) = state;
    }

    /// Whether pods can be attached, as far as is known.
    pub(crate) fn state(&self) -> Result<(), NotReady> {
        lock(&self.state).clone()
    }

    /// The kubelet names the network of the node's pods.
    pub(crate) fn take_pod_cidr(&self, cidr: &str) {
        match &self.kind {
            Kind::Bridge(bridge) => tracing::info!(
                cidr, ipv4 = %bridge.config().ipv4,
                "ignoring the pod CIDR of the kubelet: the built-in bridge uses the configured subnet"
            ),
        }
    }

    pub(crate) fn description(&self) -> Description {
        match &self.kind {
            Kind::Bridge(bridge) => bridge::description(bridge),
        }
    }
}
