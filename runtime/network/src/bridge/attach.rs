//! Attaches a pod: addresses, the permission to use them, and a veth pair.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};
use nix::errno::Errno;

use super::links::{
    LOOPBACK_INDEX, add_address, add_default_route, find_link, get_link, hairpin, list_addresses, raise,
    route_localnet, set_up_link,
};
use super::{Bridge, Error, lock, node};
use crate::addresses;
use crate::config::{InterfaceAddress, Subnets};
use crate::firewall::conntrack::{self, Connection};
use crate::firewall::{Port, kernel, table};
use crate::forwarding;
use crate::host_ports::{HostPort, HostPorts, Protocol};
use crate::identity::{self, MacAddress};
use crate::netlink::{self, Netlink, Request};

/// Name of a pod's interface, the same in CRI and in every CNI configuration.
pub const POD_INTERFACE: &str = "eth0";

/// How often the addresses of released pods are freed for one that finds none.
const CLEARINGS: usize = 16;

/// The network of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its addresses on [`POD_INTERFACE`], IPv4 first; one of each family in use.
    pub addresses: Vec<InterfaceAddress>,
    /// The node's end of its veth pair.
    pub host_interface: String,
    /// The MAC address of its interface.
    pub mac: MacAddress,
}

/// Opens the socket that [`Bridge::attach`] needs, and makes the namespace's interfaces ignore
/// router advertisements.
///
/// To be called on a thread that is in the pod's network namespace, before the pod has an
/// interface. The socket keeps the namespace alive: drop it before waiting for the namespace to
/// end.
///
/// # Errors
/// [`Error::Forwarding`] when the sysctl cannot be written, [`Error::Node`] when the socket cannot
/// be opened.
pub fn open_in_pod() -> Result<Netlink, Error> {
    if forwarding::has_ipv6() {
        forwarding::ignore_router_advertisements("default").map_err(|source| Error::Forwarding { source })?;
    }
    Netlink::open().map_err(|source| Error::Node { source })
}

impl Bridge {
    /// Gives a sandbox its interface, addresses, routes and host ports. May be called from any
    /// thread.
    ///
    /// `inside` comes from [`open_in_pod`] in the sandbox's namespace, and `netns` is that
    /// namespace (an open `/proc/<pid>/ns/net` or a bind mount of one). Loopback comes up too.
    ///
    /// # Errors
    /// [`Error::HostPort`], [`Error::HostPortFamily`], [`Error::Conntrack`],
    /// [`Error::Addresses`] (none left, the sandbox already has some, not an id),
    /// [`Error::InterfaceTaken`], [`Error::Interface`], [`Error::Guard`], [`Error::Pod`]. After an
    /// error the sandbox owns nothing; only its loopback may be up.
    pub fn attach(
        &self,
        sandbox_id: &str,
        host_ports: &[HostPort],
        inside: &mut Netlink,
        netns: BorrowedFd<'_>,
    ) -> Result<Attachment, Error> {
        let interface = self.host_interface(sandbox_id)?;
        let (subnets, addresses) = self.allocate(sandbox_id)?;
        let attachment = attachment(&interface, &addresses, subnets);
        let port = Port { interface, addresses, host_ports: host_ports.to_vec() };
        if let Err(error) = self.admit(sandbox_id, &port) {
            return Err(with_undo(error, self.free(sandbox_id)));
        }
        if let Err(error) = self.create_pair(sandbox_id, &attachment, netns) {
            // No pair was made; one with the name, if any, was created by another process.
            return Err(with_undo(error, self.free(sandbox_id)));
        }
        let hairpin = hairpin(&attachment.host_interface);
        let configured = lock(&self.node).request(&[hairpin]).map(drop);
        if let Err(source) = configured.and_then(|()| configure_inside(inside, &attachment, subnets)) {
            let error = Error::Pod { sandbox_id: sandbox_id.to_owned(), source };
            return Err(with_undo(error, self.detach(sandbox_id)));
        }
        Ok(attachment)
    }

    /// Takes a sandbox out of the firewall and withdraws its host ports. Its interface goes with
    /// its namespace or soon after, and only then its addresses are free
    /// ([`Bridge::clear_released`]). May be repeated; absence is not an error.
    ///
    /// # Errors
    /// [`Error::Guard`], [`Error::Conntrack`], [`Error::Node`].
    pub fn release(&self, sandbox_id: &str) -> Result<(), Error> {
        let interface = self.host_interface(sandbox_id)?;
        let netfilter = lock(&self.netfilter);
        let host_ports = lock(&self.host_ports).of(sandbox_id);
        let port = Port { interface, addresses: self.addresses.of(sandbox_id), host_ports };
        // From now on no repair lets it through again.
        lock(&self.released).entry(sandbox_id.to_owned()).or_default();
        self.withdraw(netfilter, sandbox_id, &port)?;
        if let Some(released) = lock(&self.released).get_mut(sandbox_id) {
            released.is_withdrawn = true;
        }
        Ok(())
    }

    /// [`Bridge::release`], and removes the interface and frees the addresses. Either may already
    /// be gone, with the namespace or after a crash. May be called from any thread.
    ///
    /// Removing the pair waits until no processor uses it any more (an RCU grace period): 37 ms,
    /// measured on a machine with two processors. [`Bridge::release`] takes 0.08 ms.
    ///
    /// # Errors
    /// [`Error::Interface`]: the interface is still there, and so the addresses are still taken.
    /// [`Error::Addresses`], and those of [`Bridge::release`].
    pub fn detach(&self, sandbox_id: &str) -> Result<(), Error> {
        let interface = self.host_interface(sandbox_id)?;
        self.release(sandbox_id)?;
        match self.remove_link(&interface) {
            Ok(()) => self.free(sandbox_id),
            Err(source) => Err(Error::Interface { sandbox_id: sandbox_id.to_owned(), interface, source }),
        }
    }

    /// Brings loopback up in a namespace that gets no other interface from Berth.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn loopback_up(inside: &mut Netlink) -> Result<(), netlink::Error> {
        inside.request(&[set_up_link("bring loopback up", LOOPBACK_INDEX, Vec::new())]).map(drop)
    }

    /// The addresses of a sandbox, as in its [`Attachment`]; empty when it has none. For a daemon
    /// that was restarted.
    pub fn addresses_of(&self, sandbox_id: &str) -> Vec<InterfaceAddress> {
        let subnets = self.subnets();
        self.addresses.of(sandbox_id).into_iter().map(|address| subnets.with_prefix(address)).collect()
    }

    /// Addresses for a sandbox, and the networks that they are in.
    fn allocate(&self, sandbox_id: &str) -> Result<(Subnets, Vec<IpAddr>), Error> {
        let allocate = || {
            let subnets = self.subnets.read().unwrap_or_else(PoisonError::into_inner);
            self.addresses.allocate(sandbox_id).map(|addresses| (*subnets, addresses))
        };
        for _ in 0..CLEARINGS {
            match allocate() {
                Err(addresses::Error::Exhausted { .. }) if !lock(&self.released).is_empty() => {
                    // What cannot be freed is told where it is tried again. What can be may go to
                    // others, which release more.
                    let _ = self.clear(Duration::ZERO);
                }
                outcome => return outcome.map_err(|source| Error::Addresses { source }),
            }
        }
        allocate().map_err(|source| Error::Addresses { source })
    }

    /// Reserves the host ports, and lets the pod through the firewall.
    fn admit(&self, sandbox_id: &str, port: &Port) -> Result<(), Error> {
        self.take_host_ports(sandbox_id, &port.host_ports)?;
        kernel::admit(&mut lock(&self.netfilter), &table(&self.name), port)
            .map_err(|source| Error::Guard { sandbox_id: sandbox_id.to_owned(), source })?;
        self.forget_passed_by(sandbox_id, &port.host_ports)
    }

    /// Frees the addresses of a sandbox that has no interface; releases it, unless that was done.
    pub(super) fn free(&self, sandbox_id: &str) -> Result<(), Error> {
        let is_withdrawn = lock(&self.released).get(sandbox_id).is_some_and(|found| found.is_withdrawn);
        if !is_withdrawn {
            self.release(sandbox_id)?;
        }
        self.addresses.free(sandbox_id).map_err(|source| Error::Addresses { source })?;
        lock(&self.released).remove(sandbox_id);
        Ok(())
    }

    /// Takes a pod out of the firewall, and withdraws its host ports.
    pub(super) fn withdraw(
        &self,
        mut netfilter: MutexGuard<'_, Netlink>,
        sandbox_id: &str,
        port: &Port,
    ) -> Result<(), Error> {
        if !port.addresses.is_empty() {
            let dismissed = kernel::dismiss(&mut netfilter, &table(&self.name), port);
            dismissed.map_err(|source| Error::Guard { sandbox_id: sandbox_id.to_owned(), source })?;
        }
        drop(netfilter);
        // While it is known which they are: what fails here is repeated.
        self.forget_gone(sandbox_id, port)?;
        self.free_host_ports(sandbox_id)
    }

    /// Forgets UDP connections to the host ports of a pod that is out of the firewall.
    fn forget_gone(&self, sandbox_id: &str, port: &Port) -> Result<(), Error> {
        for number in udp(&port.host_ports) {
            let is_gone = |found: &Connection| port.addresses.contains(&found.answered_by);
            conntrack::forget_udp(&mut lock(&self.conntrack), number, is_gone)
                .map_err(|source| Error::Conntrack { sandbox_id: sandbox_id.to_owned(), source })?;
        }
        Ok(())
    }

    fn take_host_ports(&self, sandbox_id: &str, ports: &[HostPort]) -> Result<(), Error> {
        if ports.is_empty() {
            return Ok(());
        }
        let is_ipv6 = |port: &&HostPort| port.address.is_some_and(|address| address.is_ipv6());
        if self.subnets().ipv6.is_none()
            && let Some(port) = ports.iter().find(is_ipv6)
        {
            return Err(Error::HostPortFamily { port: *port });
        }
        let mut taken = lock(&self.host_ports);
        taken.take(sandbox_id, ports)?;
        self.settle_localnet(&taken)
    }

    fn free_host_ports(&self, sandbox_id: &str) -> Result<(), Error> {
        let mut taken = lock(&self.host_ports);
        if taken.of(sandbox_id).is_empty() {
            return Ok(());
        }
        taken.free(sandbox_id);
        if taken.is_empty() { self.settle_localnet(&taken) } else { Ok(()) }
    }

    /// Allows packets from 127.0.0.0/8 on the bridge while there are host ports, to which they can
    /// be translated. Those that pods send to such addresses are dropped before.
    pub(super) fn settle_localnet(&self, taken: &HostPorts) -> Result<(), Error> {
        let request = route_localnet(self.index.load(Ordering::Acquire), !taken.is_empty());
        match lock(&self.node).request(&[request]) {
            // The bridge is gone; its repair sees to the next one.
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(()),
            outcome => outcome.map(drop).map_err(node),
        }
    }

    /// Forgets UDP connections to addresses of the node that bypass new host ports.
    fn forget_passed_by(&self, sandbox_id: &str, ports: &[HostPort]) -> Result<(), Error> {
        let mut numbers = udp(ports).peekable();
        if numbers.peek().is_none() {
            return Ok(());
        }
        let present = list_addresses(&mut lock(&self.node)).map_err(node)?;
        let is_local = |address: IpAddr| {
            address.is_loopback() || present.iter().any(|present| present.address == address)
        };
        for number in numbers {
            conntrack::forget_udp(&mut lock(&self.conntrack), number, |found| is_local(found.destination))
                .map_err(|source| Error::Conntrack { sandbox_id: sandbox_id.to_owned(), source })?;
        }
        Ok(())
    }

    /// One request: both ends, the peer in the pod's namespace, the host end up and a port of the
    /// bridge.
    fn create_pair(
        &self,
        sandbox_id: &str,
        attachment: &Attachment,
        netns: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let mtu = self.mtu.map(|mtu| LinkAttribute::Mtu(mtu.bytes()));
        // Not up yet: a veth end refuses to come up (ENOTCONN) before it knows its peer, and this
        // one is created first.
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(POD_INTERFACE.to_owned()),
            LinkAttribute::Address(attachment.mac.0.to_vec()),
            LinkAttribute::NetNsFd(netns.as_raw_fd()),
        ];
        peer.attributes.extend(mtu.clone());
        let mut pair = LinkMessage::default();
        raise(&mut pair);
        pair.attributes = vec![
            LinkAttribute::IfName(attachment.host_interface.clone()),
            LinkAttribute::Controller(self.index.load(Ordering::Acquire)),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        pair.attributes.extend(mtu);
        let request = Request::route(
            "create the veth pair",
            NLM_F_CREATE | NLM_F_EXCL,
            &RouteNetlinkMessage::NewLink(pair),
        );
        let mut netlink = lock(&self.node);
        let Err(source) = netlink.request(&[request]) else { return Ok(()) };
        let (sandbox_id, interface) = (sandbox_id.to_owned(), attachment.host_interface.clone());
        // EEXIST may mean either end's name. In doubt the kernel's own message is kept.
        if source.errno() == Some(Errno::EEXIST) && matches!(find_link(&mut netlink, &interface), Ok(Some(_)))
        {
            return Err(Error::InterfaceTaken { sandbox_id, interface });
        }
        Err(Error::Interface { sandbox_id, interface, source })
    }
}

fn attachment(interface: &str, addresses: &[IpAddr], subnets: Subnets) -> Attachment {
    // The IPv4 range comes first in the store, so there always is one; the gateway's address is a
    // harmless fallback.
    let ipv4 = addresses.iter().find_map(|address| match address {
        IpAddr::V4(ipv4) => Some(*ipv4),
        IpAddr::V6(_) => None,
    });
    Attachment {
        addresses: addresses.iter().map(|address| subnets.with_prefix(*address)).collect(),
        host_interface: interface.to_owned(),
        mac: identity::pod_mac(ipv4.unwrap_or_else(|| subnets.ipv4.gateway())),
    }
}

/// Two exchanges in the pod's namespace: find the interface, then addresses and routes.
fn configure_inside(
    inside: &mut Netlink,
    attachment: &Attachment,
    subnets: Subnets,
) -> Result<(), netlink::Error> {
    const FIND: &str = "find the pod's interface";
    let replies = inside.request(&[
        set_up_link("bring loopback up", LOOPBACK_INDEX, Vec::new()),
        // Number 0: look up the interface by name.
        set_up_link("bring the pod's interface up", 0, vec![LinkAttribute::IfName(POD_INTERFACE.to_owned())]),
        get_link(FIND, POD_INTERFACE),
    ])?;
    let reply = replies.first().ok_or(netlink::Error::Malformed { operation: FIND })?;
    let index = reply.link(FIND)?.index;
    let addresses =
        attachment.addresses.iter().map(|address| add_address("assign the pod an address", index, *address));
    let gateways = attachment.addresses.iter().filter_map(|address| match address.address {
        IpAddr::V4(_) => Some(IpAddr::V4(subnets.ipv4.gateway())),
        IpAddr::V6(_) => subnets.ipv6.map(|subnet| IpAddr::V6(subnet.gateway())),
    });
    let routes = gateways.map(|gateway| add_default_route("add a default route to the pod", index, gateway));
    inside.request(&addresses.chain(routes).collect::<Vec<_>>()).map(drop)
}

/// The numbers of those that are for UDP.
fn udp(ports: &[HostPort]) -> impl Iterator<Item = u16> {
    ports.iter().filter(|port| port.protocol == Protocol::Udp).map(|port| port.host_port)
}

/// The first error, together with that of the rollback, if it failed too.
fn with_undo(first: Error, undo: Result<(), Error>) -> Error {
    match undo {
        Ok(()) => first,
        Err(undo) => Error::Undo { first: Box::new(first), undo: Box::new(undo) },
    }
}
