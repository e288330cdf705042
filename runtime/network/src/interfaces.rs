//! Traffic counters of the interfaces of a network namespace, for a pod's statistics.
//!
//! Source: `IFLA_STATS64` of an `RTM_GETLINK` dump (`rtnetlink(7)`, `struct rtnl_link_stats64` in
//! `linux/if_link.h`). They are the interface's own view: in a pod, received is what came to the
//! pod. CRI: `NetworkInterfaceUsage`.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;

use crate::netlink::{Error, Netlink, Request};

/// The counters of one interface since it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceCounters {
    /// Name of the interface in its namespace, as `eth0`.
    pub name: String,
    /// Number of the interface in its namespace.
    pub index: u32,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bad packets received.
    pub rx_errors: u64,
    /// Packets received and dropped for want of room or of a listener.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets that could not be sent.
    pub tx_errors: u64,
    /// Packets dropped on the way out.
    pub tx_dropped: u64,
}

/// The limit on reported interfaces of one namespace. A pod has a handful; one that may create
/// interfaces could have thousands, which would delay the statistics of all others.
pub const MAX_INTERFACES: usize = 32;

/// The counters of the interfaces, loopback included, of the namespace that the socket was opened
/// in: at most [`MAX_INTERFACES`], those with the lowest numbers as far as the kernel lists them by
/// number.
///
/// # Errors
/// The kernel's error.
pub fn counters(inside: Netlink) -> Result<Vec<InterfaceCounters>, Error> {
    let operation = "list the interfaces of a namespace";
    let request = Request::route(operation, 0, &RouteNetlinkMessage::GetLink(LinkMessage::default()));
    let replies = inside.beginning_of_dump(&request, MAX_INTERFACES)?;
    replies
        .iter()
        .take(MAX_INTERFACES)
        .map(|reply| {
            let link = reply.link(operation)?;
            let [rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped] =
                link.counters;
            Ok(InterfaceCounters {
                name: link.name,
                index: link.index,
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
            })
        })
        .collect()
}
