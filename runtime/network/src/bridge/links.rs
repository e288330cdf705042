//! Netlink requests about links, addresses and routes, and their answers.

use std::net::IpAddr;

use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    BridgeBooleanOptionFlags, BridgeBooleanOptions, InfoBridge, InfoBridgePort, InfoData, InfoKind,
    InfoPortData, InfoPortKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::libc::RTM_NEWLINK;

use crate::config::InterfaceAddress;
use crate::firewall::kernel::{nest, put};
use crate::identity::MacAddress;
use crate::netlink::{self, Link, Netlink, Request};

/// Number of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`, `net/flow.h`).
pub(super) const LOOPBACK_INDEX: u32 = 1;

/// `IFF_UP` (`linux/if.h`).
pub(super) const IFF_UP: u32 = 1;

/// `RT_SCOPE_UNIVERSE` (`linux/rtnetlink.h`): an address that is valid beyond its link.
pub(super) const SCOPE_GLOBAL: u8 = 0;

pub(super) fn raise(message: &mut LinkMessage) {
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
}

pub(super) fn create_bridge(name: &str, mac: MacAddress) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
    ];
    Request::route("create the bridge", NLM_F_CREATE | NLM_F_EXCL, &RouteNetlinkMessage::NewLink(message))
}

/// Makes packets that only cross the bridge pass the rules for routed ones, as
/// `net.bridge.bridge-nf-call-iptables` does for all bridges of a host.
pub(super) fn track_bridged(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(vec![
            InfoBridge::NfCallIpTables(true),
            InfoBridge::NfCallIp6Tables(true),
        ])),
    ])];
    Request::route("track the bridge's connections", 0, &RouteNetlinkMessage::NewLink(message))
}

/// Keeps the bridge from learning where a MAC address is from frames to the groups that no bridge
/// forwards (`01:80:c2:00:00:0x`). The firewall of the bridge does not see these
/// (`br_handle_frame`, `net/bridge/br_input.c`), so their sender is not checked.
pub(super) fn learn_from_checked_frames(index: u32) -> Request {
    let flag = BridgeBooleanOptionFlags::NoLinkLocalLearn;
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::MultiBoolOpt(BridgeBooleanOptions {
            value: flag,
            mask: flag,
        })])),
    ])];
    Request::route("set what the bridge learns from", 0, &RouteNetlinkMessage::NewLink(message))
}

/// Lets a port of the bridge have back what came from it: a pod may reach itself by the address of
/// a Service or the node.
pub(super) fn hairpin(interface: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(interface.to_owned()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
        ]),
    ];
    Request::route("set the mode of the bridge's port", 0, &RouteNetlinkMessage::NewLink(message))
}

/// `IFLA_AF_SPEC`, in it `AF_INET`, in it `IFLA_INET_CONF`: the sysctls of an interface by number
/// (`linux/if_link.h`).
const AF_SPEC: u16 = 26;
const INET: u16 = 2;
const INET_CONF: u16 = 1;
/// `IPV4_DEVCONF_ROUTE_LOCALNET` (`linux/ip.h`).
const ROUTE_LOCALNET: u16 = 26;

/// Whether packets of 127.0.0.0/8 may leave and enter by an interface: what
/// `net.ipv4.conf.<interface>.route_localnet` says. By netlink because the caller may be on a
/// thread in another network namespace.
pub(super) fn route_localnet(index: u32, allowed: bool) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    let value = nest(ROUTE_LOCALNET, &u32::from(allowed).to_ne_bytes());
    put(&mut body, AF_SPEC, &nest(INET, &nest(INET_CONF, &value)));
    Request::raw("allow packets from loopback on the bridge", RTM_NEWLINK, 0, body)
}

pub(super) fn set_up_link(operation: &'static str, index: u32, attributes: Vec<LinkAttribute>) -> Request {
    let mut message = LinkMessage::default();
    raise(&mut message);
    message.header.index = index;
    message.attributes = attributes;
    // RTM_NEWLINK without NLM_F_CREATE changes a link, and unlike RTM_SETLINK may change its master
    // and flags together.
    Request::route(operation, 0, &RouteNetlinkMessage::NewLink(message))
}

pub(super) fn get_link(operation: &'static str, name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        // Counters are most of the answer, and have to be summed over all processors.
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    Request::route(operation, 0, &RouteNetlinkMessage::GetLink(message))
}

pub(super) fn delete_link(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    Request::route("delete the interface", 0, &RouteNetlinkMessage::DelLink(message))
}

pub(super) fn find_link(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, netlink::Error> {
    const FIND: &str = "find an interface by name";
    match netlink.request(&[get_link(FIND, name)]) {
        Ok(replies) => replies.first().map(|reply| reply.link(FIND)).transpose(),
        Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn list_links(netlink: &mut Netlink) -> Result<Vec<Link>, netlink::Error> {
    const LIST: &str = "list the interfaces";
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    let replies = netlink.dump(&Request::route(LIST, 0, &RouteNetlinkMessage::GetLink(message)))?;
    replies.iter().map(|reply| reply.link(LIST)).collect()
}

pub(super) fn list_addresses(netlink: &mut Netlink) -> Result<Vec<netlink::LinkAddress>, netlink::Error> {
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
            // Unlike ip(8), the kernel sets no broadcast address on its own.
            let broadcast = u32::from(ipv4) | u32::MAX.checked_shr(address.prefix.into()).unwrap_or(0);
            message.attributes.push(AddressAttribute::Broadcast(broadcast.into()));
        }
        IpAddr::V6(_) => {
            message.header.family = AddressFamily::Inet6;
            // The store ensures that it is unique; duplicate detection would delay its use by a
            // second.
            message.header.flags = AddressHeaderFlags::Nodad;
        }
    }
    message
}

pub(super) fn add_address(operation: &'static str, index: u32, address: InterfaceAddress) -> Request {
    let message = RouteNetlinkMessage::NewAddress(address_message(index, address));
    Request::route(operation, NLM_F_CREATE | NLM_F_REPLACE, &message)
}

pub(super) fn delete_address(index: u32, address: InterfaceAddress) -> Request {
    let message = RouteNetlinkMessage::DelAddress(address_message(index, address));
    Request::route("remove an old address from the bridge", 0, &message)
}

pub(super) fn add_default_route(operation: &'static str, index: u32, gateway: IpAddr) -> Request {
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
