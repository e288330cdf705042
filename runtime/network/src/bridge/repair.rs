//! Whether the network is whole, and repairing it: an administrator may flush the firewall or take
//! the bridge down under running pods.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use netlink_packet_route::link::LinkAttribute;
use nix::errno::Errno;

use super::links::{
    IFF_UP, SCOPE_GLOBAL, add_address, create_bridge, delete_address, find_link, list_addresses, list_links,
    set_up_link,
};
use super::{Bridge, Error, lock, node};
use crate::config::InterfaceAddress;
use crate::forwarding;
use crate::guard::{self, Family, Port};
use crate::netlink::{self, Netlink, Request};
use crate::{identity, masquerade, nft};

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
    /// A firewall table is gone: the firewall was flushed.
    #[error("the nftables table {table} is gone")]
    FirewallGone {
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
        let name = self.config.name.as_str();
        let expected = identity::bridge_mac(&self.config.name);
        let found = find_link(&mut netlink, name).map_err(node)?;
        self.refuse_taken_subnet(&mut netlink)?;
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
        self.settle_addresses(&mut netlink, link.index)?;
        let mut attributes = Vec::new();
        attributes.extend(self.config.mtu.map(|mtu| LinkAttribute::Mtu(mtu.bytes())));
        netlink.request(&[set_up_link("bring the bridge up", link.index, attributes)]).map_err(node)?;
        self.index.store(link.index, Ordering::Release);
        self.enslave_orphans(&mut netlink, link.index)?;
        drop(netlink);

        if self.config.forwarding {
            forwarding::turn_on(self.families()).map_err(|source| Error::Forwarding { source })?;
        }
        // Under this lock a pod that is attached meanwhile is either admitted before, and then has
        // its address already and is in the script, or after. A pod that is detached has either
        // neither address nor permission, or both.
        let _admissions = lock(&self.netfilter);
        let owners = self.addresses.owners().into_iter();
        let pods: Vec<Port> = owners
            .filter_map(|(id, addresses)| {
                Some(Port { interface: identity::host_interface(&self.config.name, &id)?, addresses })
            })
            .collect();
        let script = masquerade::installation(&self.config.name, self.config.ipv4, self.config.ipv6, &pods);
        nft::apply(&script).map_err(|source| Error::Firewall { source })
    }

    /// Whether the network is complete: the bridge up, the firewall tables present, forwarding on
    /// if Berth may turn it on. Costs a few system calls, no program. To be called on a thread in
    /// the node's network namespace.
    ///
    /// # Errors
    /// The first thing that is missing; [`Bridge::repair`] fixes it.
    pub fn ready(&self) -> Result<(), NotReady> {
        let name = || self.config.name.to_string();
        let link = find_link(&mut lock(&self.node), self.config.name.as_str());
        let link = link.map_err(|source| NotReady::Netlink { source })?;
        let expected = identity::bridge_mac(&self.config.name);
        let Some(link) = link.filter(|link| link.mac == Some(expected.0)) else {
            return Err(NotReady::BridgeGone { name: name() });
        };
        if link.flags & IFF_UP == 0 || link.index != self.index.load(Ordering::Acquire) {
            return Err(NotReady::BridgeChanged { name: name() });
        }
        let table = masquerade::table(&self.config.name);
        for family in [Family::Inet, Family::Bridge] {
            let exists = guard::table_exists(&mut lock(&self.netfilter), family, &table);
            if !exists.map_err(|source| NotReady::Netlink { source })? {
                return Err(NotReady::FirewallGone { table });
            }
        }
        if self.config.forwarding
            && !forwarding::is_on(self.families()).map_err(|source| NotReady::Forwarding { source })?
        {
            return Err(NotReady::ForwardingOff);
        }
        Ok(())
    }

    /// Gives the bridge its gateway addresses and takes away global ones of an earlier
    /// configuration.
    fn settle_addresses(&self, netlink: &mut Netlink, index: u32) -> Result<(), Error> {
        let mut wanted = vec![InterfaceAddress {
            address: self.config.ipv4.gateway().into(),
            prefix: self.config.ipv4.prefix(),
        }];
        wanted.extend(
            self.config
                .ipv6
                .map(|subnet| InterfaceAddress { address: subnet.gateway().into(), prefix: subnet.prefix() }),
        );
        for present in list_addresses(netlink).map_err(node)? {
            let address = InterfaceAddress { address: present.address, prefix: present.prefix };
            if present.index == index && present.scope == SCOPE_GLOBAL && !wanted.contains(&address) {
                netlink.request(&[delete_address(index, address)]).map_err(node)?;
            }
        }
        let requests: Vec<Request> = wanted
            .iter()
            .map(|address| add_address("assign the bridge its address", index, *address))
            .collect();
        netlink.request(&requests).map(drop).map_err(node)
    }

    fn refuse_taken_subnet(&self, netlink: &mut Netlink) -> Result<(), Error> {
        let taken = |address: IpAddr| match address {
            IpAddr::V4(address) => self.config.ipv4.contains(address),
            IpAddr::V6(address) => self.config.ipv6.is_some_and(|subnet| subnet.contains(address)),
        };
        let conflicts: Vec<_> = list_addresses(netlink)
            .map_err(node)?
            .into_iter()
            .filter(|present| taken(present.address))
            .collect();
        if conflicts.is_empty() {
            return Ok(());
        }
        let links = list_links(netlink).map_err(node)?;
        for conflict in conflicts {
            let interface =
                links.iter().find(|link| link.index == conflict.index).map(|link| link.name.as_str());
            // An interface that disappeared between the two lists no longer has an address.
            if let Some(interface) = interface.filter(|interface| *interface != self.config.name.as_str()) {
                let (interface, address) = (interface.to_owned(), conflict.address);
                return Err(Error::SubnetTaken { interface, address });
            }
        }
        Ok(())
    }

    /// Makes host ends without a bridge ports of this one: they lost theirs when it was deleted.
    fn enslave_orphans(&self, netlink: &mut Netlink, index: u32) -> Result<(), Error> {
        for link in self.pod_links(netlink)? {
            if link.master == Some(index) {
                continue;
            }
            let request = set_up_link(
                "attach an interface to the bridge",
                link.index,
                vec![LinkAttribute::Controller(index)],
            );
            match netlink.request(&[request]) {
                Err(error) if error.errno() != Some(Errno::ENODEV) => return Err(node(error)),
                _ => {}
            }
        }
        Ok(())
    }
}
