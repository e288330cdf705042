//! The driver of the bridge network: one bridge on the node, one veth pair for each pod.
//!
//! ```text
//! node                                              pod's network namespace
//!   berth0  10.88.0.1/16  fd62:6572:7468::1/64
//!     └─ bv1a20123456789  <---------------------->  eth0  10.88.0.2/16  fd62:6572:7468::2/64
//!                                                   default routes via the two gateways
//! ```
//!
//! Attaching takes five exchanges with the kernel: one lets the pod's addresses through the
//! firewall and its host ports lead to it; one creates the whole pair (peer named and placed in the
//! pod's namespace, host end up and a port of the bridge); one sets the port's mode; two in the pod
//! bring its interfaces up and find the number of `eth0`, and set addresses and routes. What a
//! sandbox owns is found again from its id: the interface by its derived name, the addresses in
//! their store.
//!
//! Calls block and may come from many threads at once. Requests on the node take turns on one
//! socket, which costs nothing: the kernel serialises them under one lock (`rtnl_mutex`) anyway.
//!
//! Assumed: the caller is root in the network namespace of the node (`CAP_NET_ADMIN`), creates the
//! pods' namespaces, and lets no two daemons use one bridge name. Left to others: rules of other
//! firewalls that stop forwarded packets.
//!
//! `set_up` creates the bridge and `repair` restores it; `attach` attaches and detaches pods,
//! `released` sees to their interfaces, `dead` removes remains; `links` has the requests to the
//! kernel.

mod attach;
mod dead;
mod links;
mod released;
mod repair;
mod set_up;
mod shaping;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use ipnet::IpNet;
use nix::errno::Errno;

use crate::addresses::{self, AddressStore};
use crate::config::{BridgeName, InterfaceAddress, Mtu, Subnets};
use crate::forwarding::{self, Families};
use crate::host_ports::{self, HostPorts};
use crate::identity::{self, MacAddress};
use crate::netlink::{self, Link, Netlink};
use crate::nft;
use links::{delete_link, list_links};
use released::Released;

pub use attach::{Attachment, POD_INTERFACE, open_in_pod};
pub use dead::{Dead, Reconciled};
pub use repair::NotReady;
pub use set_up::Known;
pub use shaping::Bandwidth;

/// Sockets for deleting interfaces. The kernel answers such a request only after an RCU grace
/// period, tens of milliseconds in which it holds no lock (`netdev_run_todo`, net/core/dev.c):
/// creating an interface should not have to wait for that, and several deletions at the same time
/// share one period. A daemon stops eight pods at once.
const REMOVERS: usize = 8;

/// Why a network operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused to change or show links, addresses or routes on the node.
    #[error("cannot change the node's network")]
    Node {
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// The same in a pod's namespace.
    #[error("cannot set up the network of sandbox {sandbox_id}")]
    Pod {
        /// The sandbox.
        sandbox_id: String,
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// The veth pair of a sandbox could not be made or removed.
    #[error("cannot create or remove interface {interface} of sandbox {sandbox_id}")]
    Interface {
        /// The sandbox.
        sandbox_id: String,
        /// The host end.
        interface: String,
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// The addresses that the sandbox may use could not be set in the firewall; `ENOENT` when it
    /// was flushed and not yet repaired.
    #[error("cannot change the firewall sets for the addresses of sandbox {sandbox_id}")]
    Guard {
        /// The sandbox.
        sandbox_id: String,
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// Another sandbox has a host port, or it was requested twice.
    #[error(transparent)]
    HostPort(#[from] host_ports::Conflict),
    /// A host port on an IPv6 address, and no IPv6 in the pods' network.
    #[error("host port {port} is on an IPv6 address, but pods of this node have no IPv6")]
    HostPortFamily {
        /// The port.
        port: host_ports::HostPort,
    },
    /// Old connections to a host port could not be found or forgotten.
    #[error("cannot forget tracked connections to the UDP host ports of sandbox {sandbox_id}")]
    Conntrack {
        /// The sandbox.
        sandbox_id: String,
        /// The request and the reason.
        #[source]
        source: netlink::Error,
    },
    /// An interface with the host end's name exists: left behind by a sandbox with the same id, or
    /// with one that begins with the same ten digits.
    #[error("interface {interface} for sandbox {sandbox_id} already exists")]
    InterfaceTaken {
        /// The sandbox.
        sandbox_id: String,
        /// The name.
        interface: String,
    },
    /// An interface has the bridge's name, but was not created by Berth.
    #[error(
        "interface {name} exists and was not created by Berth (its MAC address is not {expected}); remove it or set network.bridge"
    )]
    BridgeTaken {
        /// The bridge's name.
        name: String,
        /// The MAC address that a bridge of ours has.
        expected: MacAddress,
    },
    /// The bridge has pods of which this store has no addresses.
    #[error(
        "interface {interface} of bridge {name} belongs to a pod without an address record here: another berthd uses the bridge, or \
         the records were deleted; set network.bridge and network.ipv4 for this one, or remove the interface"
    )]
    BridgeShared {
        /// The bridge's name.
        name: String,
        /// One of them.
        interface: String,
    },
    /// Another interface of the node has an address in the pods' subnet.
    #[error(
        "interface {interface} of the node has {address}, which is in the pod subnet; set network.ipv4 or network.ipv6 to another subnet"
    )]
    SubnetTaken {
        /// The interface.
        interface: String,
        /// Its address.
        address: IpAddr,
    },
    /// The pods' subnet is a part of a network that an interface of the node is in.
    #[error(
        "the pod subnet {subnet} is a part of the network of interface {interface} ({address}), whose hosts there could not be \
         reached; set network.ipv4 or network.ipv6 to another subnet"
    )]
    SubnetWithin {
        /// The pods' subnet.
        subnet: InterfaceAddress,
        /// The interface.
        interface: String,
        /// Its address.
        address: InterfaceAddress,
    },
    /// A pod has the address that the node needs in the pods' new subnet.
    #[error(
        "the node's address in the pod subnet would be {gateway}, which a running pod has; remove the pod, or choose another subnet"
    )]
    GatewayTaken {
        /// The node's address.
        gateway: InterfaceAddress,
    },
    /// The address store failed.
    #[error("cannot record pod addresses")]
    Addresses {
        /// The error.
        #[source]
        source: addresses::Error,
    },
    /// The firewall rules could not be put in place or removed.
    #[error("cannot change the firewall rules")]
    Firewall {
        /// The error of nft.
        #[source]
        source: nft::Error,
    },
    /// A sysctl could not be read or set.
    #[error("cannot set up packet forwarding on the host")]
    Forwarding {
        /// Which and why.
        #[source]
        source: forwarding::Error,
    },
    /// Pods still have addresses.
    #[error("the bridge is in use: {addresses} addresses are allocated")]
    InUse {
        /// The number of allocated addresses.
        addresses: usize,
    },
    /// The rollback of a failed step failed, too.
    #[error("a step failed and could not be undone ({undo})")]
    Undo {
        /// What failed first.
        #[source]
        first: Box<Error>,
        /// The failure of the rollback.
        undo: Box<Error>,
    },
}

/// A bridge network that is set up.
#[derive(Debug)]
pub struct Bridge {
    name: BridgeName,
    mtu: Option<Mtu>,
    /// Whether forwarding of the host may be turned on.
    forwarding: bool,
    /// Where packets of pods go under the pod's own address.
    non_masquerade: Vec<IpNet>,
    /// Where new pods get their addresses; without IPv6 on a host that lacks it. Held for reading
    /// while addresses are assigned, so that a pod has them from one network.
    subnets: RwLock<Subnets>,
    addresses: AddressStore,
    /// rtnetlink in the node's namespace.
    node: Mutex<Netlink>,
    /// More of the same for deleting interfaces, see [`REMOVERS`].
    removers: Vec<Mutex<Netlink>>,
    /// Which of them is next.
    next_remover: AtomicUsize,
    /// The packet filter of the node's namespace.
    netfilter: Mutex<Netlink>,
    /// The same, for tracked connections: a client may have many, and others should not wait.
    conntrack: Mutex<Netlink>,
    /// Interface number of the bridge.
    index: AtomicU32,
    /// Gateway addresses of earlier configurations, in whose subnets pods still have addresses.
    former: Mutex<Vec<InterfaceAddress>>,
    /// Pods that are out of the firewall, or soon will be; their interfaces may exist still. Locked
    /// alone, or after `netfilter`.
    released: Mutex<BTreeMap<String, Released>>,
    /// The ports of the node that lead to pods. Locked alone, or after `netfilter`.
    host_ports: Mutex<HostPorts>,
    /// How often the firewall's chains were used when they were written: what differs from that was
    /// changed by another program.
    chain_uses: Mutex<Vec<Option<u32>>>,
}

impl Bridge {
    /// Addresses that stay taken because their records could not be read.
    pub fn unread_addresses(&self) -> Vec<IpAddr> {
        self.addresses.unread()
    }

    /// The name of the bridge.
    pub fn name(&self) -> &BridgeName {
        &self.name
    }

    /// The networks that new pods get addresses in; without IPv6 on a host that lacks it.
    pub fn subnets(&self) -> Subnets {
        *self.subnets.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn families(&self) -> Families {
        if self.subnets().ipv6.is_some() { Families::Both } else { Families::Ipv4 }
    }

    /// Deletes an interface of the node; absence is not an error.
    fn remove_link(&self, interface: &str) -> Result<(), netlink::Error> {
        // In turn; the vector is never empty, and the fallback would only be slow.
        let turn = self.next_remover.fetch_add(1, Ordering::Relaxed) % REMOVERS;
        let remover = self.removers.get(turn).unwrap_or(&self.node);
        match lock(remover).request(&[delete_link(interface)]) {
            Err(error) if error.errno() != Some(Errno::ENODEV) => Err(error),
            _ => Ok(()),
        }
    }

    fn host_interface(&self, sandbox_id: &str) -> Result<String, Error> {
        identity::host_interface(&self.name, sandbox_id).ok_or_else(|| Error::Addresses {
            source: addresses::Error::SandboxId { text: sandbox_id.to_owned() },
        })
    }

    /// The host ends of this bridge's pods.
    fn pod_links(&self, netlink: &mut Netlink) -> Result<Vec<Link>, Error> {
        let prefix = identity::host_interface_prefix(&self.name);
        let mut links = list_links(netlink).map_err(node)?;
        links.retain(|link| link.name.starts_with(&prefix));
        Ok(links)
    }
}

/// A panic leaves what is locked usable: a socket skips answers to the interrupted request, which
/// carry an old sequence number, and the host ports are changed as a whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn node(source: netlink::Error) -> Error {
    Error::Node { source }
}
