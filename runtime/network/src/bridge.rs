//! The driver of the bridge network: one bridge on the node, one veth pair for each pod.
//!
//! ```text
//! node                                              pod's network namespace
//!   berth0  10.88.0.1/16  fd62:6572:7468::1/64
//!     └─ bv1a20123456789  <---------------------->  eth0  10.88.0.2/16  fd62:6572:7468::2/64
//!                                                   default routes via the two gateways
//! ```
//!
//! Attaching takes four exchanges with the kernel: one lets the pod's addresses through the firewall; one
//! makes the pair whole (peer named and placed in the pod's namespace, host end up and a port of the bridge);
//! two in the pod bring its interfaces up and find the number of `eth0`, and set addresses and routes. What a
//! sandbox owns is found again from its id: the interface by its derived name, the addresses in their store.
//!
//! Calls block and may come from many threads at once. Requests on the node take turns on one socket, which
//! costs nothing: the kernel serialises them under one lock (`rtnl_mutex`) anyway.
//!
//! Assumed: the caller is root in the network namespace of the node (`CAP_NET_ADMIN`), creates the pods'
//! namespaces, and lets no two daemons use one bridge name. Left to others: host ports, and rules of other
//! firewalls that stop forwarded packets.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use crate::addresses::{self, AddressStore, Range};
use crate::config::{BridgeConfig, InterfaceAddress};
use crate::forwarding::{self, Families};
use crate::guard::{self, Family, Port};
use crate::identity::{self, MacAddress};
use crate::masquerade;
use crate::netlink::{self, Link, Netlink, Request};
use crate::nft;

/// Name of a pod's interface: what CRI and every CNI set-up call it.
pub const POD_INTERFACE: &str = "eth0";

/// Number of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`, `net/flow.h`).
const LOOPBACK_INDEX: u32 = 1;

/// Sockets for deleting interfaces. The kernel answers such a request only after an RCU grace period, tens of
/// milliseconds in which it holds no lock (`netdev_run_todo`, net/core/dev.c): nobody who makes interfaces
/// should wait for that, and several that are deleted at the same time share one period. Eight is what a
/// daemon stops at once.
const REMOVERS: usize = 8;

/// `IFF_UP` (`linux/if.h`).
const IFF_UP: u32 = 1;

/// How long the kernel may take to remove the links of pods that have gone, and how often to look. It ends
/// namespaces many at a time.
const GOING: Duration = Duration::from_secs(10);
const GOING_PAUSE: Duration = Duration::from_millis(20);

/// `RT_SCOPE_UNIVERSE` (`linux/rtnetlink.h`): an address that is valid beyond its link.
const SCOPE_GLOBAL: u8 = 0;

/// Why something could not be done with the network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused to change or show links, addresses or routes on the node.
    #[error("the node's network could not be changed")]
    Node {
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// The same in a pod's namespace.
    #[error("the network of sandbox {sandbox_id} could not be set up")]
    Pod {
        /// The sandbox.
        sandbox_id: String,
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// The veth pair of a sandbox could not be made or removed.
    #[error("interface {interface} of sandbox {sandbox_id}")]
    Interface {
        /// The sandbox.
        sandbox_id: String,
        /// The host end.
        interface: String,
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// The firewall could not be told which addresses the sandbox may use; `ENOENT` when it was flushed and
    /// not yet repaired.
    #[error("the addresses of sandbox {sandbox_id} could not be let through the firewall or taken out of it")]
    Guard {
        /// The sandbox.
        sandbox_id: String,
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// An interface with the host end's name exists: left behind by a sandbox with the same id, or with one
    /// that begins with the same ten digits.
    #[error("interface {interface} for sandbox {sandbox_id} exists already")]
    InterfaceTaken {
        /// The sandbox.
        sandbox_id: String,
        /// The name.
        interface: String,
    },
    /// An interface has the bridge's name, but was not made here.
    #[error("interface {name} exists and is not a bridge of Berth's (its MAC address is not {expected})")]
    BridgeTaken {
        /// The bridge's name.
        name: String,
        /// The MAC address that a bridge of ours has.
        expected: MacAddress,
    },
    /// The bridge has pods that have no addresses here.
    #[error(
        "interface {interface} of bridge {name} is that of a pod with no address recorded here: another berthd uses the bridge, or \
         the records were removed under its pods; set network.bridge and network.ipv4 for this one, or remove the pod's interface"
    )]
    BridgeShared {
        /// The bridge's name.
        name: String,
        /// One of them.
        interface: String,
    },
    /// Another interface of the node has an address in the pods' subnet.
    #[error(
        "interface {interface} of the node has {address}, which lies in the pods' subnet; choose another subnet"
    )]
    SubnetTaken {
        /// The interface.
        interface: String,
        /// Its address.
        address: IpAddr,
    },
    /// The address store failed.
    #[error("the addresses could not be looked after")]
    Addresses {
        /// What it said.
        #[source]
        source: addresses::Error,
    },
    /// The firewall rules could not be put in place or removed.
    #[error("the firewall rules could not be changed")]
    Firewall {
        /// What nft said.
        #[source]
        source: nft::Error,
    },
    /// A sysctl could not be read or set.
    #[error("the host could not be made to forward packets safely")]
    Forwarding {
        /// Which and why.
        #[source]
        source: forwarding::Error,
    },
    /// Pods still have addresses.
    #[error("the bridge is in use: {addresses} addresses are taken")]
    InUse {
        /// How many.
        addresses: usize,
    },
    /// Undoing a half-done step failed too.
    #[error("a step failed, and what it left could not be undone ({undo})")]
    Undo {
        /// What failed first.
        #[source]
        first: Box<Error>,
        /// What failed in the undoing.
        undo: Box<Error>,
    },
}

/// What is missing for pods to have a network.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// There is no interface with the bridge's name and MAC address.
    #[error("the bridge {name} is gone")]
    BridgeGone {
        /// Its name.
        name: String,
    },
    /// The bridge is there but not up, or is not the one that new pods would be attached to.
    #[error("the bridge {name} is down or was made anew")]
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
    /// The host stopped forwarding, though it was allowed to be set to.
    #[error("the host does not forward packets")]
    ForwardingOff,
    /// The state could not be asked for.
    #[error("the state of the network could not be asked for")]
    Netlink {
        /// Why.
        #[source]
        source: netlink::Error,
    },
    /// A sysctl could not be read.
    #[error("the state of forwarding could not be read")]
    Forwarding {
        /// Why.
        #[source]
        source: forwarding::Error,
    },
}

/// What a pod got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its addresses on [`POD_INTERFACE`], IPv4 first; one of each family in use.
    pub addresses: Vec<InterfaceAddress>,
    /// The node's end of its veth pair.
    pub host_interface: String,
    /// The MAC address of its interface.
    pub mac: MacAddress,
}

/// What [`Bridge::reconcile`] found and removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reconciled {
    /// Addresses whose owners are dead.
    pub addresses: Vec<IpAddr>,
    /// Host interfaces whose sandboxes are dead.
    pub interfaces: Vec<String>,
}

/// What there is of sandboxes that are dead: [`Bridge::dead`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dead {
    /// Host interfaces.
    interfaces: Vec<String>,
    /// Addresses by their owners.
    owners: BTreeMap<String, Vec<IpAddr>>,
}

/// A bridge network that is set up.
#[derive(Debug)]
pub struct Bridge {
    /// As given, except that `ipv6` is `None` on a host without IPv6.
    config: BridgeConfig,
    addresses: AddressStore,
    /// rtnetlink in the node's namespace.
    node: Mutex<Netlink>,
    /// More of the same for deleting interfaces, see [`REMOVERS`].
    removers: Vec<Mutex<Netlink>>,
    /// Which of them is next.
    next_remover: AtomicUsize,
    /// The packet filter of the node's namespace.
    netfilter: Mutex<Netlink>,
    /// Interface number of the bridge.
    index: AtomicU32,
}

/// Opens the socket that [`Bridge::attach`] needs, and makes the namespace's interfaces ignore router
/// advertisements.
///
/// To be called on a thread that is in the pod's network namespace, before the pod has an interface. The
/// socket keeps the namespace alive: drop it before waiting for the namespace to end.
///
/// # Errors
/// [`Error::Forwarding`] when the sysctl cannot be written, [`Error::Node`] when the socket cannot be opened.
pub fn open_in_pod() -> Result<Netlink, Error> {
    if forwarding::has_ipv6() {
        forwarding::ignore_router_advertisements("default").map_err(|source| Error::Forwarding { source })?;
    }
    Netlink::open().map_err(|source| Error::Node { source })
}

impl Bridge {
    /// [`Bridge::set_up_for`] no sandboxes.
    ///
    /// # Errors
    /// As there.
    pub fn set_up(config: BridgeConfig, address_directory: &Path) -> Result<Self, Error> {
        Self::set_up_for(config, address_directory, &BTreeMap::new())
    }

    /// Makes the bridge, its addresses, the firewall tables, and forwarding if allowed; or takes over what is
    /// there already. To be called on a thread in the node's network namespace. Runs `nft` once.
    ///
    /// `address_directory` is the parent of the bridge's own directory of address records,
    /// `<address_directory>/<bridge name>`. `sandboxes` are those of the caller that may have an interface,
    /// each with the addresses that it is known to use: records that were lost are made again.
    ///
    /// # Errors
    /// [`Error::BridgeShared`], and then nothing was changed; [`Error::BridgeTaken`], [`Error::SubnetTaken`],
    /// [`Error::Node`], [`Error::Addresses`], [`Error::Firewall`], [`Error::Forwarding`]. What was made
    /// before the failure stays; another set-up goes on from there.
    pub fn set_up_for(
        mut config: BridgeConfig,
        address_directory: &Path,
        sandboxes: &BTreeMap<String, Vec<IpAddr>>,
    ) -> Result<Self, Error> {
        config.ipv6 = config.ipv6.filter(|_| forwarding::has_ipv6());
        let (first, last) = config.ipv4.pods();
        let mut ranges = vec![Range::Ipv4(first, last)];
        ranges.extend(config.ipv6.map(|subnet| {
            let (first, last) = subnet.pods();
            Range::Ipv6(first, last)
        }));
        let directory = address_directory.join(config.name.as_str());
        let addresses =
            AddressStore::open(&directory, &ranges).map_err(|source| Error::Addresses { source })?;
        let removers = (0..REMOVERS).map(|_| Netlink::open().map(Mutex::new)).collect::<Result<_, _>>();
        let bridge = Self {
            config,
            addresses,
            node: Mutex::new(Netlink::open().map_err(node)?),
            removers: removers.map_err(node)?,
            next_remover: AtomicUsize::new(0),
            netfilter: Mutex::new(Netlink::open_netfilter().map_err(node)?),
            index: AtomicU32::new(0),
        };
        bridge.restore_addresses(sandboxes)?;
        bridge.refuse_strangers(sandboxes)?;
        bridge.repair()?;
        Ok(bridge)
    }

    /// Makes the address records of sandboxes again that have an interface and lack them.
    fn restore_addresses(&self, sandboxes: &BTreeMap<String, Vec<IpAddr>>) -> Result<(), Error> {
        if sandboxes.is_empty() {
            return Ok(());
        }
        let links = self.pod_links(&mut lock(&self.node))?;
        let links: HashSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
        for (id, addresses) in sandboxes {
            let interface = self.host_interface(id)?;
            if links.contains(interface.as_str()) {
                let known = |owner: &str| sandboxes.contains_key(owner);
                self.addresses.restore(id, addresses, known).map_err(|source| Error::Addresses { source })?;
            }
        }
        Ok(())
    }

    /// Refuses a bridge with pods when there is no record of any, and none of them is the caller's: a second
    /// daemon would give their addresses away once more. The links of pods that have gone just now are waited
    /// for.
    fn refuse_strangers(&self, sandboxes: &BTreeMap<String, Vec<IpAddr>>) -> Result<(), Error> {
        let own: HashSet<String> =
            sandboxes.keys().filter_map(|id| identity::host_interface(&self.config.name, id)).collect();
        let end = Instant::now() + GOING;
        loop {
            if self.addresses.taken() > 0 {
                return Ok(());
            }
            let links = self.pod_links(&mut lock(&self.node))?;
            if links.iter().any(|link| own.contains(&link.name)) {
                return Ok(());
            }
            match links.into_iter().next() {
                None => return Ok(()),
                Some(link) if Instant::now() >= end => {
                    return Err(Error::BridgeShared {
                        name: self.config.name.to_string(),
                        interface: link.name,
                    });
                }
                Some(_) => std::thread::sleep(GOING_PAUSE),
            }
        }
    }

    /// Puts everything in place again that [`Bridge::set_up`] made, and enslaves the interfaces of living
    /// pods again when the bridge itself had to be made anew. To be called on a thread in the node's network
    /// namespace. Runs `nft` once.
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
        // The MAC is set in the request that makes the bridge, so that even a crash right after it leaves the
        // mark.
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
        // Under this lock a pod that is attached meanwhile is admitted before, and then has its address
        // already and is in the script, or after. One that is detached has neither address nor leave, or
        // both.
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

    /// Whether the network is whole: the bridge up, the firewall tables there, forwarding on if it is ours to
    /// turn on. Costs a few system calls, no program. To be called on a thread in the node's network
    /// namespace.
    ///
    /// # Errors
    /// The first thing that is missing; [`Bridge::repair`] is the cure.
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

    /// Gives a sandbox its interface, addresses and routes. May be called from any thread.
    ///
    /// `inside` comes from [`open_in_pod`] in the sandbox's namespace, and `netns` is that namespace (an open
    /// `/proc/<pid>/ns/net` or a bind mount of one). Loopback comes up too.
    ///
    /// # Errors
    /// [`Error::Addresses`] (none left, the sandbox has some, not an id), [`Error::InterfaceTaken`],
    /// [`Error::Interface`], [`Error::Guard`], [`Error::Pod`]. After an error the sandbox owns nothing; only
    /// its loopback may be up.
    pub fn attach(
        &self,
        sandbox_id: &str,
        inside: &mut Netlink,
        netns: BorrowedFd<'_>,
    ) -> Result<Attachment, Error> {
        let interface = self.host_interface(sandbox_id)?;
        let addresses = self.addresses.allocate(sandbox_id).map_err(|source| Error::Addresses { source })?;
        let attachment = self.attachment(&interface, &addresses);
        let port = Port { interface, addresses };
        // Apart from the `if`, which would hold the lock while undoing.
        let admitted = guard::admit(&mut lock(&self.netfilter), &masquerade::table(&self.config.name), &port);
        if let Err(source) = admitted {
            let error = Error::Guard { sandbox_id: sandbox_id.to_owned(), source };
            return Err(with_undo(error, self.free(sandbox_id)));
        }
        if let Err(error) = self.create_pair(sandbox_id, &attachment, netns) {
            // No pair was made; one with the name, if there is one, belongs to somebody else.
            return Err(with_undo(error, self.free(sandbox_id)));
        }
        if let Err(source) = self.configure_inside(inside, &attachment) {
            let error = Error::Pod { sandbox_id: sandbox_id.to_owned(), source };
            return Err(with_undo(error, self.detach(sandbox_id)));
        }
        Ok(attachment)
    }

    /// Removes a sandbox's interface and frees its addresses. Absent is fine: either may have gone before,
    /// with the namespace or in a crash. May be called from any thread.
    ///
    /// Removing the pair waits until no processor uses it any more (an RCU grace period): 37 ms were measured
    /// on a machine of two processors. Where the namespace has ended anyway, [`Bridge::release`] takes 0.08
    /// ms.
    ///
    /// # Errors
    /// [`Error::Interface`]: the interface is still there, and so the addresses are still taken.
    /// [`Error::Addresses`].
    pub fn detach(&self, sandbox_id: &str) -> Result<(), Error> {
        let interface = self.host_interface(sandbox_id)?;
        match self.remove_link(&interface) {
            Ok(()) => self.free(sandbox_id),
            Err(source) => Err(Error::Interface { sandbox_id: sandbox_id.to_owned(), interface, source }),
        }
    }

    /// Frees the addresses of a sandbox whose namespace has lost its last user: the kernel removes the pair
    /// with the namespace, a little later and on its own time. Absent is fine.
    ///
    /// # Errors
    /// [`Error::Addresses`].
    pub fn release(&self, sandbox_id: &str) -> Result<(), Error> {
        self.free(sandbox_id)
    }

    /// Brings loopback up in a namespace that gets no other interface from here.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn loopback_up(inside: &mut Netlink) -> Result<(), netlink::Error> {
        inside.request(&[set_up_link("bring loopback up", LOOPBACK_INDEX, Vec::new())]).map(drop)
    }

    /// The addresses that a sandbox has, as in its [`Attachment`]; empty when it has none. For a daemon that
    /// comes back.
    pub fn addresses_of(&self, sandbox_id: &str) -> Vec<InterfaceAddress> {
        self.addresses.of(sandbox_id).into_iter().map(|address| self.with_prefix(address)).collect()
    }

    /// Removes interfaces and frees addresses of all sandboxes that are not among the living. Sandboxes that
    /// are being made must be among them, so this is for the start, or under whatever keeps new ones from
    /// being made.
    ///
    /// # Errors
    /// The first failure; the rest was tried.
    pub fn reconcile<'a>(&self, living: impl IntoIterator<Item = &'a str>) -> Result<Reconciled, Error> {
        self.remove_dead(&self.dead(living)?)
    }

    /// What there is of sandboxes that are not among the living, for [`Bridge::remove_dead`] at a later time,
    /// when there may be new ones.
    ///
    /// # Errors
    /// [`Error::Node`].
    pub fn dead<'a>(&self, living: impl IntoIterator<Item = &'a str>) -> Result<Dead, Error> {
        let living: HashSet<&str> = living.into_iter().collect();
        let kept: HashSet<String> =
            living.iter().filter_map(|id| identity::host_interface(&self.config.name, id)).collect();
        let links = self.pod_links(&mut lock(&self.node))?;
        let interfaces = links.into_iter().map(|link| link.name).filter(|name| !kept.contains(name));
        Ok(Dead { interfaces: interfaces.collect(), owners: self.addresses.dead(&living) })
    }

    /// Removes the interfaces, the leave and the addresses of dead sandboxes.
    ///
    /// # Errors
    /// The first failure; the rest was tried.
    pub fn remove_dead(&self, dead: &Dead) -> Result<Reconciled, Error> {
        let mut result = Reconciled::default();
        let mut failure = None;
        for interface in &dead.interfaces {
            match self.remove_link(interface) {
                Ok(()) => result.interfaces.push(interface.clone()),
                Err(error) => failure = failure.or(Some(node(error))),
            }
        }
        let table = masquerade::table(&self.config.name);
        for (id, addresses) in &dead.owners {
            // Without a valid owner it was never let through the firewall.
            if let Some(interface) = identity::host_interface(&self.config.name, id) {
                let port = Port { interface, addresses: addresses.clone() };
                if let Err(source) = guard::dismiss(&mut lock(&self.netfilter), &table, &port) {
                    failure = failure.or(Some(Error::Guard { sandbox_id: id.clone(), source }));
                }
            }
            match self.addresses.free_of(id, addresses) {
                Ok(addresses) => result.addresses.extend(addresses),
                Err(source) => failure = failure.or(Some(Error::Addresses { source })),
            }
        }
        failure.map_or(Ok(result), Err)
    }

    /// Addresses that stay taken because their records could not be read.
    pub fn unread_addresses(&self) -> Vec<IpAddr> {
        self.addresses.unread()
    }

    /// Removes the bridge, the firewall tables and the directory of address records. The forwarding sysctls
    /// stay as they are: others may have come to rely on them. Runs `nft` once.
    ///
    /// # Errors
    /// [`Error::InUse`], and then nothing was removed; else the first failure, after everything was tried.
    pub fn tear_down(self) -> Result<(), Error> {
        let taken = self.addresses.taken();
        if taken != 0 {
            return Err(Error::InUse { addresses: taken });
        }
        let link = self.remove_link(self.config.name.as_str()).map_err(node);
        let firewall =
            nft::apply(&masquerade::removal(&self.config.name)).map_err(|source| Error::Firewall { source });
        let directory = self.addresses.remove().map_err(|source| Error::Addresses { source });
        link.and(firewall).and(directory)
    }

    /// The configuration in use; without IPv6 on a host that has none.
    pub fn config(&self) -> &BridgeConfig {
        &self.config
    }

    fn families(&self) -> Families {
        if self.config.ipv6.is_some() { Families::Both } else { Families::Ipv4 }
    }

    /// Deletes an interface of the node; absent is fine.
    fn remove_link(&self, interface: &str) -> Result<(), netlink::Error> {
        // In turn; the vector is never empty, and the stand-in would only be slow.
        let turn = self.next_remover.fetch_add(1, Ordering::Relaxed) % REMOVERS;
        let remover = self.removers.get(turn).unwrap_or(&self.node);
        match lock(remover).request(&[delete_link(interface)]) {
            Err(error) if error.errno() != Some(Errno::ENODEV) => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes back the leave to use the addresses, then the addresses.
    fn free(&self, sandbox_id: &str) -> Result<(), Error> {
        let interface = self.host_interface(sandbox_id)?;
        let mut netfilter = lock(&self.netfilter);
        let port = Port { interface, addresses: self.addresses.of(sandbox_id) };
        if !port.addresses.is_empty() {
            let dismissed = guard::dismiss(&mut netfilter, &masquerade::table(&self.config.name), &port);
            dismissed.map_err(|source| Error::Guard { sandbox_id: sandbox_id.to_owned(), source })?;
        }
        self.addresses.free(sandbox_id).map(drop).map_err(|source| Error::Addresses { source })
    }

    fn host_interface(&self, sandbox_id: &str) -> Result<String, Error> {
        identity::host_interface(&self.config.name, sandbox_id).ok_or_else(|| Error::Addresses {
            source: addresses::Error::SandboxId { text: sandbox_id.to_owned() },
        })
    }

    fn with_prefix(&self, address: IpAddr) -> InterfaceAddress {
        let prefix = match address {
            IpAddr::V4(_) => self.config.ipv4.prefix(),
            // An IPv6 address of an earlier configuration may outlive its subnet here; a host route is true
            // of any address.
            IpAddr::V6(_) => self.config.ipv6.map_or(128, |subnet| subnet.prefix()),
        };
        InterfaceAddress { address, prefix }
    }

    fn attachment(&self, interface: &str, addresses: &[IpAddr]) -> Attachment {
        // The IPv4 range comes first in the store, so there always is one; the gateway's would be a harmless
        // stand-in.
        let ipv4 = addresses.iter().find_map(|address| match address {
            IpAddr::V4(ipv4) => Some(*ipv4),
            IpAddr::V6(_) => None,
        });
        Attachment {
            addresses: addresses.iter().map(|address| self.with_prefix(*address)).collect(),
            host_interface: interface.to_owned(),
            mac: identity::pod_mac(ipv4.unwrap_or_else(|| self.config.ipv4.gateway())),
        }
    }

    /// One request: both ends, the peer in the pod's namespace, the host end up and a port of the bridge.
    fn create_pair(
        &self,
        sandbox_id: &str,
        attachment: &Attachment,
        netns: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let mtu = self.config.mtu.map(|mtu| LinkAttribute::Mtu(mtu.bytes()));
        // Not up yet: a veth end refuses to come up (ENOTCONN) before it knows its peer, and this one is made
        // first.
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
        // EEXIST may mean either end's name. In doubt the kernel's own words do.
        if source.errno() == Some(Errno::EEXIST) && matches!(find_link(&mut netlink, &interface), Ok(Some(_)))
        {
            return Err(Error::InterfaceTaken { sandbox_id, interface });
        }
        Err(Error::Interface { sandbox_id, interface, source })
    }

    /// Two exchanges in the pod's namespace: find the interface, then addresses and routes.
    fn configure_inside(&self, inside: &mut Netlink, attachment: &Attachment) -> Result<(), netlink::Error> {
        const FIND: &str = "find the pod's interface";
        let replies = inside.request(&[
            set_up_link("bring loopback up", LOOPBACK_INDEX, Vec::new()),
            // Number 0: the one that the name says.
            set_up_link(
                "bring the pod's interface up",
                0,
                vec![LinkAttribute::IfName(POD_INTERFACE.to_owned())],
            ),
            get_link(FIND, POD_INTERFACE),
        ])?;
        let reply = replies.first().ok_or(netlink::Error::Malformed { operation: FIND })?;
        let index = reply.link(FIND)?.index;
        let addresses = attachment
            .addresses
            .iter()
            .map(|address| add_address("give the pod an address", index, *address));
        let gateways = attachment.addresses.iter().filter_map(|address| match address.address {
            IpAddr::V4(_) => Some(IpAddr::V4(self.config.ipv4.gateway())),
            IpAddr::V6(_) => self.config.ipv6.map(|subnet| IpAddr::V6(subnet.gateway())),
        });
        let routes =
            gateways.map(|gateway| add_default_route("give the pod a default route", index, gateway));
        inside.request(&addresses.chain(routes).collect::<Vec<_>>()).map(drop)
    }

    /// Gives the bridge its gateway addresses and takes away global ones of an earlier configuration.
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
            .map(|address| add_address("give the bridge its address", index, *address))
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
            // An interface that went away between the two lists holds no address any more.
            if let Some(interface) = interface.filter(|interface| *interface != self.config.name.as_str()) {
                let (interface, address) = (interface.to_owned(), conflict.address);
                return Err(Error::SubnetTaken { interface, address });
            }
        }
        Ok(())
    }

    /// Makes the host ends that no bridge holds ports of this one: they lost theirs when it was deleted.
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

    /// The host ends of this bridge's pods.
    fn pod_links(&self, netlink: &mut Netlink) -> Result<Vec<Link>, Error> {
        let prefix = identity::host_interface_prefix(&self.config.name);
        let mut links = list_links(netlink).map_err(node)?;
        links.retain(|link| link.name.starts_with(&prefix));
        Ok(links)
    }
}

/// A panic leaves the socket usable: answers to the interrupted request carry an old sequence number and are
/// skipped.
fn lock(netlink: &Mutex<Netlink>) -> MutexGuard<'_, Netlink> {
    netlink.lock().unwrap_or_else(PoisonError::into_inner)
}

fn node(source: netlink::Error) -> Error {
    Error::Node { source }
}

/// The first error, and beside it that of the undoing, if that failed too.
fn with_undo(first: Error, undo: Result<(), Error>) -> Error {
    match undo {
        Ok(()) => first,
        Err(undo) => Error::Undo { first: Box::new(first), undo: Box::new(undo) },
    }
}

fn raise(message: &mut LinkMessage) {
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
}

fn create_bridge(name: &str, mac: MacAddress) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
    ];
    Request::route("create the bridge", NLM_F_CREATE | NLM_F_EXCL, &RouteNetlinkMessage::NewLink(message))
}

fn set_up_link(operation: &'static str, index: u32, attributes: Vec<LinkAttribute>) -> Request {
    let mut message = LinkMessage::default();
    raise(&mut message);
    message.header.index = index;
    message.attributes = attributes;
    // RTM_NEWLINK without NLM_F_CREATE changes a link, and unlike RTM_SETLINK may change its master and flags
    // together.
    Request::route(operation, 0, &RouteNetlinkMessage::NewLink(message))
}

fn get_link(operation: &'static str, name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        // Counters are most of the answer, and summed up over all processors.
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    Request::route(operation, 0, &RouteNetlinkMessage::GetLink(message))
}

fn delete_link(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    Request::route("delete the interface", 0, &RouteNetlinkMessage::DelLink(message))
}

fn find_link(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, netlink::Error> {
    const FIND: &str = "find an interface by name";
    match netlink.request(&[get_link(FIND, name)]) {
        Ok(replies) => replies.first().map(|reply| reply.link(FIND)).transpose(),
        Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

fn list_links(netlink: &mut Netlink) -> Result<Vec<Link>, netlink::Error> {
    const LIST: &str = "list the interfaces";
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    let replies = netlink.dump(&Request::route(LIST, 0, &RouteNetlinkMessage::GetLink(message)))?;
    replies.iter().map(|reply| reply.link(LIST)).collect()
}

fn list_addresses(netlink: &mut Netlink) -> Result<Vec<netlink::LinkAddress>, netlink::Error> {
    const LIST: &str = "list the addresses";
    let request = Request::route(LIST, 0, &RouteNetlinkMessage::GetAddress(AddressMessage::default()));
    let replies = netlink.dump(&request)?;
    replies.iter().filter_map(|reply| reply.address(LIST).transpose()).collect()
}

fn address_message(index: u32, address: InterfaceAddress) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix;
    message.header.scope = AddressScope::Universe;
    message.attributes =
        vec![AddressAttribute::Local(address.address), AddressAttribute::Address(address.address)];
    match address.address {
        IpAddr::V4(ipv4) => {
            message.header.family = AddressFamily::Inet;
            // Unlike ip(8), the kernel sets no broadcast address by itself.
            let broadcast = u32::from(ipv4) | u32::MAX.checked_shr(address.prefix.into()).unwrap_or(0);
            message.attributes.push(AddressAttribute::Broadcast(broadcast.into()));
        }
        IpAddr::V6(_) => {
            message.header.family = AddressFamily::Inet6;
            // The store knows that it is unique; looking for a duplicate would keep it from use for a second.
            message.header.flags = AddressHeaderFlags::Nodad;
        }
    }
    message
}

fn add_address(operation: &'static str, index: u32, address: InterfaceAddress) -> Request {
    let message = RouteNetlinkMessage::NewAddress(address_message(index, address));
    Request::route(operation, NLM_F_CREATE | NLM_F_REPLACE, &message)
}

fn delete_address(index: u32, address: InterfaceAddress) -> Request {
    let message = RouteNetlinkMessage::DelAddress(address_message(index, address));
    Request::route("take an old address from the bridge", 0, &message)
}

fn add_default_route(operation: &'static str, index: u32, gateway: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = match gateway {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    // "Set by an administrator or static": what ip(8) would say with `proto static`.
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![RouteAttribute::Gateway(gateway.into()), RouteAttribute::Oif(index)];
    Request::route(operation, NLM_F_CREATE | NLM_F_EXCL, &RouteNetlinkMessage::NewRoute(message))
}
