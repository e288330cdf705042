//! The built-in bridge as a network of pods.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

use berth_model::id::SandboxId;
use berth_model::sandbox;
use berth_network::bridge::open_in_pod;
use berth_network::config::Subnets;
use berth_network::{Bridge, BridgeConfig, HostPort, Known, Protocol};
use berth_sys::ns::{self, Kind};

use super::{Attached, Description, Interface, MAIN_INTERFACE, NetworkError, NotReady, bandwidth};
use crate::chain;

/// Whether a bridge's directory of addresses has any that are in use, or that cannot be found out.
pub(super) fn has_addresses(config: &BridgeConfig, records: &Path) -> bool {
    match std::fs::read_dir(records.join(config.name.as_str())) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

pub(super) fn set_up(
    config: BridgeConfig,
    records: &Path,
    known: &BTreeMap<String, Known>,
) -> Result<Bridge, NetworkError> {
    let bridge = Bridge::set_up_for(config, records, known)?;
    let unread = bridge.unread_addresses();
    if !unread.is_empty() {
        tracing::warn!(
            ?unread,
            "cannot read the records of these addresses; they stay allocated until the next start"
        );
    }
    Ok(bridge)
}

/// The ports of the node that a sandbox asks for. What cannot be read was refused at the edge.
pub(crate) fn host_ports(config: &sandbox::Config) -> Vec<HostPort> {
    let host_port = |mapping: &sandbox::PortMapping| {
        let protocol = match mapping.protocol.as_str() {
            "UDP" => Protocol::Udp,
            "SCTP" => Protocol::Sctp,
            _ => Protocol::Tcp,
        };
        HostPort {
            protocol,
            address: mapping.host_ip.parse().ok().map(|address: IpAddr| address.to_canonical()),
            host_port: mapping.host_port,
            container_port: mapping.container_port,
        }
    };
    config.port_mappings.iter().filter(|mapping| mapping.host_port != 0).map(host_port).collect()
}

pub(super) fn attach(
    bridge: &Bridge,
    sandbox: &SandboxId,
    config: &sandbox::Config,
) -> Result<Attached, NetworkError> {
    let mut inside = open_in_pod()?;
    let own = ns::open_own(Kind::Network).map_err(NetworkError::Namespace)?;
    let bandwidth = bandwidth::of(config)?;
    let attachment = bridge.attach(sandbox.as_str(), &host_ports(config), &mut inside, own.as_fd())?;
    if bandwidth.is_limited() {
        bridge.shape(sandbox.as_str(), bandwidth, &mut inside)?;
    }
    let addresses = attachment.addresses.iter().map(|address| address.address).collect();
    Ok(Attached { interfaces: vec![Interface { name: Cow::Borrowed(MAIN_INTERFACE), addresses }], dns: None })
}

pub(super) fn look(bridge: &Bridge) -> Result<(), NotReady> {
    let Err(broken) = bridge.ready() else { return Ok(()) };
    tracing::warn!(error = %chain(&broken), "the network is damaged; repairing it");
    bridge.repair().map_err(|error| NotReady { reason: "NetworkPluginNotReady", message: chain(&error) })
}

pub(super) fn description(bridge: &Bridge) -> Description {
    let Subnets { ipv4, ipv6 } = bridge.subnets();
    let subnets = [Some(ipv4.to_string()), ipv6.map(|subnet| subnet.to_string())];
    Description {
        kind: "bridge",
        name: bridge.name().to_string(),
        subnets: subnets.into_iter().flatten().collect(),
    }
}
