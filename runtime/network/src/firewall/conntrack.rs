//! Connections that the kernel tracks and that a host port makes wrong.
//!
//! A client that keeps sending to a UDP port keeps its entry alive, and with it where its packets
//! go: past a host port that is new, or to a pod that is gone. Connections of other protocols end
//! by themselves.
//!
//! Wire format: `linux/netfilter/nfnetlink_conntrack.h`. Filters of lists: Linux 5.8.

use std::net::IpAddr;

use netlink_packet_core::{NlaBuffer, NlasIterator};
use nix::errno::Errno;
use nix::libc::{AF_INET, AF_INET6};

use super::kernel::{header, nest, put};
use crate::host_ports::Protocol;
use crate::netlink::{Error, Netlink, Request};

/// `NFNL_SUBSYS_CTNETLINK` in the high byte.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;

/// `CTA_TUPLE_ORIG`: the packets of the side that began.
const ORIGINAL: u16 = 1;
/// `CTA_TUPLE_REPLY`: the packets that answer them.
const REPLY: u16 = 2;
/// `CTA_ID`.
const ID: u16 = 12;
/// `CTA_FILTER`, in it `CTA_FILTER_ORIG_FLAGS`.
const FILTER: u16 = 25;
const FILTER_FLAGS: u16 = 1;
/// `CTA_FILTER_F_CTA_PROTO_NUM`, `CTA_FILTER_F_CTA_PROTO_DST_PORT`: the bits of the fields that
/// have to match (`net/netfilter/nf_internals.h`).
const MATCH_PROTOCOL: u32 = 1 << 3;
const MATCH_DESTINATION_PORT: u32 = 1 << 5;

/// `CTA_TUPLE_IP`; in it `CTA_IP_V4_SRC`, `CTA_IP_V4_DST`, `CTA_IP_V6_SRC`, `CTA_IP_V6_DST`.
const ADDRESSES: u16 = 1;
const SOURCES: [u16; 2] = [1, 3];
const DESTINATIONS: [u16; 2] = [2, 4];
/// `CTA_TUPLE_PROTO`; in it `CTA_PROTO_NUM`, `CTA_PROTO_DST_PORT`.
const TRANSPORT: u16 = 2;
const PROTOCOL: u16 = 1;
const DESTINATION_PORT: u16 = 3;

/// `NLA_F_NESTED` (`linux/netlink.h`).
const NESTED: u16 = 0x8000;
/// Size of `struct nfgenmsg`.
const NFGENMSG_BYTES: usize = 4;

/// How many are forgotten with one datagram, whose answers have to fit into the socket's buffer.
const AT_ONCE: usize = 100;

const LIST: &str = "list tracked connections";

/// A tracked connection.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Where its first packet was sent.
    pub(crate) destination: IpAddr,
    /// Who answers.
    pub(crate) answered_by: IpAddr,
    /// The attributes that name it to the kernel.
    name: Vec<u8>,
}

/// Forgets the UDP connections to a port for which `is_wrong` says so.
///
/// # Errors
/// What the kernel said.
pub(crate) fn forget_udp(
    netfilter: &mut Netlink,
    port: u16,
    is_wrong: impl Fn(&Connection) -> bool,
) -> Result<(), Error> {
    for family in [AF_INET, AF_INET6] {
        let family = u8::try_from(family).unwrap_or(0);
        let wrong = list_udp(netfilter, family, port, &is_wrong)?;
        for connections in wrong.chunks(AT_ONCE) {
            let forget = |connection: &Connection| {
                let body = [header(family, 0), connection.name.clone()].concat();
                Request::raw("forget a tracked connection", DELETE, 0, body)
            };
            match netfilter.request(&connections.iter().map(forget).collect::<Vec<_>>()) {
                Err(error) if error.errno() == Some(Errno::ENOENT) => {}
                outcome => drop(outcome?),
            }
        }
    }
    Ok(())
}

/// A pod can fill the table with others, which are not kept.
fn list_udp(
    netfilter: &mut Netlink,
    family: u8,
    port: u16,
    is_wrong: impl Fn(&Connection) -> bool,
) -> Result<Vec<Connection>, Error> {
    let mut transport = Vec::new();
    put(&mut transport, PROTOCOL, &[Protocol::Udp.number()]);
    put(&mut transport, DESTINATION_PORT, &port.to_be_bytes());
    let mut body = header(family, 0);
    put(&mut body, ORIGINAL | NESTED, &nest(TRANSPORT | NESTED, &transport));
    let flags = (MATCH_PROTOCOL | MATCH_DESTINATION_PORT).to_ne_bytes();
    put(&mut body, FILTER | NESTED, &nest(FILTER_FLAGS, &flags));
    let wanted = |body: Vec<u8>| match connection(&body) {
        Some(connection) => is_wrong(&connection).then_some(Ok(connection)),
        None => Some(Err(Error::Malformed { operation: LIST })),
    };
    netfilter.dump_wanted(&Request::raw(LIST, GET, 0, body), wanted)?.into_iter().collect()
}

fn connection(body: &[u8]) -> Option<Connection> {
    let (mut destination, mut answered_by, mut name) = (None, None, Vec::new());
    for attribute in NlasIterator::new(body.get(NFGENMSG_BYTES..)?) {
        let attribute: NlaBuffer<&[u8]> = attribute.ok()?;
        let value = attribute.value();
        match attribute.kind() {
            ORIGINAL => {
                destination = address(value, DESTINATIONS);
                put(&mut name, ORIGINAL | NESTED, value);
            }
            REPLY => answered_by = address(value, SOURCES),
            ID => put(&mut name, ID, value),
            _ => {}
        }
    }
    Some(Connection { destination: destination?, answered_by: answered_by?, name })
}

/// An address of a tuple: the first attribute of these kinds.
fn address(tuple: &[u8], kinds: [u16; 2]) -> Option<IpAddr> {
    let addresses = attribute(tuple, |kind| kind == ADDRESSES)?;
    let bytes = attribute(&addresses, |kind| kinds.contains(&kind))?;
    let ipv4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
    ipv4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from)).ok()
}

fn attribute(bytes: &[u8], is_meant: impl Fn(u16) -> bool) -> Option<Vec<u8>> {
    let mut attributes = NlasIterator::new(bytes).map_while(Result::ok);
    let found: NlaBuffer<&[u8]> =
        attributes.find(|attribute: &NlaBuffer<&[u8]>| is_meant(attribute.kind()))?;
    Some(found.value().to_vec())
}
