//! The firewall of a bridge: masquerading, host ports, and what pods must not send.
//!
//! Two tables, both named after the bridge, hold all of it. [`rules`] writes them as a whole, as
//! text for `nft`; `kernel` changes the elements of their `sets` by netlink when a pod comes or
//! goes, because starting a program for that would cost more than the rest of the pod's start.

pub(crate) mod conntrack;
pub(crate) mod kernel;
pub mod rules;
pub(crate) mod sets;

use std::net::IpAddr;

use crate::config::BridgeName;
use crate::host_ports::HostPort;

/// Name of both tables of a bridge.
pub fn table(bridge: &BridgeName) -> String {
    format!("berth-{bridge}")
}

/// A pod's port on the bridge, and what the firewall has to know of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The host end of the pod's veth pair ([`crate::identity::host_interface`]).
    pub interface: String,
    /// The pod's addresses: the ones that it may send from.
    pub addresses: Vec<IpAddr>,
    /// The ports of the node that lead to the pod.
    pub host_ports: Vec<HostPort>,
}
