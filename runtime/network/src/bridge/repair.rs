//! Whether the network is whole, and repairing it: an administrator may flush the firewall or take
//! the bridge down under running pods.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use netlink_packet_route::link::LinkAttribute;
use nix::errno::Errno;

use super::links::{
    IFF_UP, SCOPE_GLOBAL, add_address, create_bridge, delete_address, find_link, hairpin,
    learn_from_checked_frames, list_addresses, list_links, set_up_link, track_bridged,
};
use super::{Bridge, Error, lock, node};
use crate::config::{InterfaceAddress, Subnets};
use crate::firewall::{Port, kernel, rules};
use crate::forwarding;
use crate::netlink::{self, LinkAddress, Netlink};
use crate::{bridged, firewall, identity, nft};

/// Why pods have no network.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// No interface has the bridge's name and MAC address.
    #[error("the bridge {name} is gone")]
    BridgeGone {
        /// Its name.
        name: String,
    },
    /// The bridge is there but not up, or is not the one that new pods would be attached to.
    #[error("the bridge {name} is down or was recreated")]
    BridgeChanged {
        /// Its name.
        name: String,
    },
    /// Rules of a firewall table are gone, or others were added: the firewall was flushed.
    #[error("the rules of the nftables table {table} were changed or removed")]
    FirewallChanged {
        /// Its name.
        table: String,
    },
    /// The host stopped forwarding, though Berth may turn it on.
    #[error("the host does not forward packets")]
    ForwardingOff,
    /// The state could not be queried.
    #[error("cannot query the state of the network")]
    Netlink {
        /// The cause.
        #[source]
        source: netlink::Error,
    },
    /// A sysctl could not be read.
    #[error("cannot read the state of forwarding")]
    Forwarding {
        /// The cause.
        #[source]
        source: forwarding::Error,
    },
}

impl Bridge {
    /// Restores everything that [`Bridge::set_up`] created, and enslaves the interfaces of living
    /// pods if the bridge itself had to be recreated. To be called on a thread in the node's
    /// network namespace. Runs `nft` once.
    ///
    /// # Errors
    /// As [`Bridge::set_up`].
    pub fn repair(&self) -> Result<(), Error> {
        let mut netlink = lock(&self.node);
        let name = self.name.as_str();
        let expected = identity::bridge_mac(&self.name);
        let found = find_link(&mut netlink, name).map_err(node)?;
        self.refuse_taken_subnet(&mut netlink, self.subnets(), found.as_ref().map(|link| link.index))?;
        let link = match found {
            Some(link) => link,
            None => {
                netlink.request(&[create_bridge(name, expected)]).map_err(node)?;
                find_link(&mut netlink, name)
                    .map_err(node)?
                    .ok_or_else(|| Error::BridgeTaken { name: name.to_owned(), expected })?
            }
        };
        // The MAC is set in the request that creates the bridge, so that even a crash right after
        // it leaves the mark.
        if link.mac != Some(expected.0) {
            return Err(Error::BridgeTaken { name: name.to_owned(), expected });
        }
        if forwarding::has_ipv6() {
            forwarding::ignore_router_advertisements(name).map_err(|source| Error::Forwarding { source })?;
        }
        netlink.request(&[learn_from_checked_frames(link.index)]).map_err(node)?;
        self.settle_addresses(&mut netlink, link.index)?;
        let mut attributes = Vec::new();
        attributes.extend(self.mtu.map(|mtu| LinkAttribute::Mtu(mtu.bytes())));
        netlink.request(&[set_up_link("bring the bridge up", link.index, attributes)]).map_err(node)?;
        self.index.store(link.index, Ordering::Release);
        self.enslave_orphans(&mut netlink, link.index)?;
        let tracks_bridged = bridged::can_be_tracked();
        if tracks_bridged {
            netlink.request(&[track_bridged(link.index)]).map_err(node)?;
        }
        drop(netlink);
        self.settle_localnet(&lock(&self.host_ports))?;

        if self.forwarding {
            forwarding::turn_on(self.families()).map_err(|source| Error::Forwarding { source })?;
        }
        // Under this lock a pod that is attached meanwhile is either admitted before, and then has
        // its address already and is in the script, or after. A pod that is detached has either
        // neither address nor permission, or both.
        let mut netfilter = lock(&self.netfilter);
        let host_ports = lock(&self.host_ports);
        let port = |(id, addresses): (String, Vec<IpAddr>)| {
            let interface = identity::host_interface(&self.name, &id)?;
            Some(Port { interface, addresses, host_ports: host_ports.of(&id) })
        };
        let mut owners = self.addresses.owners();
        owners.retain(|id, _| !lock(&self.released).contains_key(id));
        let pods: Vec<Port> = owners.into_iter().filter_map(port).collect();
        drop(host_ports);
        let setting = rules::Setting {
            bridge: &self.name,
            subnets: &self.inhabited(),
            non_masquerade: &self.non_masquerade,
            tracks_bridged,
        };
        nft::apply(&rules::installation(setting, &pods)).map_err(|source| Error::Firewall { source })?;
        let table = firewall::table(&self.name);
        let uses = kernel::chain_uses(&mut netfilter, &table, &rules::CHAINS).map_err(node)?;
        *lock(&self.chain_uses) = uses;
        Ok(())
    }

    /// Whether the network is complete: the bridge up, the firewall tables present, forwarding on
    /// if Berth may turn it on. Costs a few system calls, no program. To be called on a thread in
    /// the node's network namespace.
    ///
    /// # Errors
    /// The first thing that is missing; [`Bridge::repair`] fixes it.
    pub fn ready(&self) -> Result<(), NotReady> {
        let name = || self.name.to_string();
        let link = find_link(&mut lock(&self.node), self.name.as_str());
        let link = link.map_err(|source| NotReady::Netlink { source })?;
        let expected = identity::bridge_mac(&self.name);
        let Some(link) = link.filter(|link| link.mac == Some(expected.0)) else {
            return Err(NotReady::BridgeGone { name: name() });
        };
        if link.flags & IFF_UP == 0 || link.index != self.index.load(Ordering::Acquire) {
            return Err(NotReady::BridgeChanged { name: name() });
        }
        let table = firewall::table(&self.name);
        let uses = kernel::chain_uses(&mut lock(&self.netfilter), &table, &rules::CHAINS)
            .map_err(|source| NotReady::Netlink { source })?;
        if uses != *lock(&self.chain_uses) {
            return Err(NotReady::FirewallChanged { table });
        }
        if self.forwarding
            && !forwarding::is_on(self.families()).map_err(|source| NotReady::Forwarding { source })?
        {
            return Err(NotReady::ForwardingOff);
        }
        Ok(())
    }

    /// Gives the bridge its gateway addresses. Those of an earlier configuration stay while pods
    /// have addresses in their subnets.
    fn settle_addresses(&self, netlink: &mut Netlink, index: u32) -> Result<(), Error> {
        let gateways = self.subnets().gateways();
        let owners = self.addresses.owners();
        let taken = || owners.values().flatten();
        let mut former = Vec::new();
        for present in list_addresses(netlink).map_err(node)? {
            let address = InterfaceAddress { address: present.address, prefix: present.prefix };
            if present.index != index || present.scope != SCOPE_GLOBAL || gateways.contains(&address) {
                continue;
            }
            match taken().any(|taken| address.is_in_subnet(*taken) && *taken != address.address) {
                true => former.push(address),
                false => drop(netlink.request(&[delete_address(index, address)]).map_err(node)?),
            }
        }
        let add = |address: &InterfaceAddress| add_address("assign the bridge its address", index, *address);
        netlink.request(&gateways.iter().map(add).collect::<Vec<_>>()).map_err(node)?;
        self.addresses.reserve(former.iter().chain(&gateways).map(|gateway| gateway.address));
        *lock(&self.former) = former;
        Ok(())
    }

    /// The node's addresses in the networks that pods have addresses in, or may get them.
    fn inhabited(&self) -> Vec<InterfaceAddress> {
        let mut subnets = self.subnets().gateways();
        subnets.extend(lock(&self.former).iter());
        subnets
    }

    /// Refuses subnets that overlap with a network of the node's. Where the bridge has its address
    /// already, only an address within: what works stays, also after the node is given another.
    pub(super) fn refuse_taken_subnet(
        &self,
        netlink: &mut Netlink,
        subnets: Subnets,
        bridge: Option<u32>,
    ) -> Result<(), Error> {
        self.refuse_taken_gateways(subnets)?;
        let present = list_addresses(netlink).map_err(node)?;
        let with_prefix =
            |found: &LinkAddress| InterfaceAddress { address: found.address, prefix: found.prefix };
        let gateways = subnets.gateways();
        let is_new = |gateway: &InterfaceAddress| {
            !present.iter().any(|found| Some(found.index) == bridge && with_prefix(found) == *gateway)
        };
        let mut conflicts = Vec::new();
        for gateway in &gateways {
            let is_new = is_new(gateway);
            conflicts.extend(present.iter().filter_map(|found| {
                let address = with_prefix(found);
                let within = is_new && found.scope == SCOPE_GLOBAL && address.is_in_subnet(gateway.network());
                (gateway.is_in_subnet(found.address) || within).then_some((found.index, address, *gateway))
            }));
        }
        if conflicts.is_empty() {
            return Ok(());
        }
        let links = list_links(netlink).map_err(node)?;
        for (index, address, gateway) in conflicts {
            // An interface that disappeared between the two lists no longer has an address.
            let Some(link) = links.iter().find(|link| link.index == index) else { continue };
            if link.name == self.name.as_str() {
                continue;
            }
            let interface = link.name.clone();
            return Err(match gateway.is_in_subnet(address.address) {
                true => Error::SubnetTaken { interface, address: address.address },
                false => {
                    let subnet = InterfaceAddress { address: gateway.network(), ..gateway };
                    Error::SubnetWithin { subnet, interface, address }
                }
            });
        }
        Ok(())
    }

    /// Refuses subnets in which a pod has the node's address, from an earlier one.
    pub(super) fn refuse_taken_gateways(&self, subnets: Subnets) -> Result<(), Error> {
        let owners = self.addresses.owners();
        let is_taken =
            |gateway: &InterfaceAddress| owners.values().flatten().any(|taken| *taken == gateway.address);
        match subnets.gateways().into_iter().find(is_taken) {
            Some(gateway) => Err(Error::GatewayTaken { gateway }),
            None => Ok(()),
        }
    }

    /// Makes host ends without a bridge ports of this one: they lost theirs when it was deleted.
    fn enslave_orphans(&self, netlink: &mut Netlink, index: u32) -> Result<(), Error> {
        for link in self.pod_links(netlink)? {
            let mut requests = vec![hairpin(&link.name)];
            if link.master != Some(index) {
                let controller = vec![LinkAttribute::Controller(index)];
                requests.insert(0, set_up_link("attach an interface to the bridge", link.index, controller));
            }
            match netlink.request(&requests) {
                Err(error) if error.errno() != Some(Errno::ENODEV) => return Err(node(error)),
                _ => {}
            }
        }
        Ok(())
    }
}
