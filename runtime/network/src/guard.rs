//! Talking to the packet filter in the kernel directly: which addresses a pod's port may use, and
//! whether a table exists.
//!
//! The rules of [`crate::masquerade`] look a frame's port and sender up in sets. Starting a program
//! to add a pod to them would cost more than the rest of the pod's start, so elements are added and
//! removed by netlink, in one transaction of some 30 µs.
//!
//! Wire format: `linux/netfilter/nfnetlink.h` and `nf_tables.h`. A transaction is a datagram of
//! messages between a "begin" and an "end"; the kernel carries out all of them or none.

use std::net::IpAddr;

use netlink_packet_core::NLM_F_CREATE;
use nix::errno::Errno;

use crate::netlink::{Error, Netlink, Request};

/// The set of ports and the IPv4 addresses that they may send from: `ifname . ipv4_addr`.
pub const IPV4_SENDERS: &str = "ipv4_senders";
/// The set of ports and the IPv6 addresses that they may send from: `ifname . ipv6_addr`.
pub const IPV6_SENDERS: &str = "ipv6_senders";
/// The set of ports and the IPv6 addresses that they may advertise: the same elements as in
/// [`IPV6_SENDERS`], as an integer of 128 bits, because `nft` 1.0.6 has no name for the field of
/// the advertisement.
pub const IPV6_TARGETS: &str = "ipv6_targets";

/// A pod's port on the bridge and the addresses that it may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The host end of the pod's veth pair ([`crate::identity::host_interface`]).
    pub interface: String,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
}

/// The families of tables that are used here, by their number (`NFPROTO_*`, `linux/netfilter.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Inet = 1,
    Bridge = 7,
}

/// `NFNL_SUBSYS_NFTABLES`: the high byte of message types, and the resource that a transaction is
/// about.
const SUBSYSTEM: u8 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const GET_TABLE: u16 = 10 << 8 | 1;
const NEW_ELEMENT: u16 = 10 << 8 | 12;
const DELETE_ELEMENT: u16 = 10 << 8 | 14;

/// `NFTA_TABLE_NAME`, `NFTA_SET_ELEM_LIST_TABLE`: a NUL-terminated string.
const TABLE: u16 = 1;
/// `NFTA_SET_ELEM_LIST_SET`.
const SET: u16 = 2;
/// `NFTA_SET_ELEM_LIST_ELEMENTS`.
const ELEMENTS: u16 = 3;
/// `NFTA_LIST_ELEM`, in it `NFTA_SET_ELEM_KEY`, in it `NFTA_DATA_VALUE`: all three happen to be
/// number 1.
const INNER: u16 = 1;
/// `NLA_F_NESTED` (`linux/netlink.h`).
const NESTED: u16 = 0x8000;

/// An interface name in a key: `IFNAMSIZ` bytes, padded with NUL.
const NAME_BYTES: usize = 16;

/// Whether a table exists in the kernel: one exchange, some 10 µs.
///
/// # Errors
/// The kernel's error, except for "no such table".
pub(crate) fn table_exists(netfilter: &mut Netlink, family: Family, table: &str) -> Result<bool, Error> {
    let mut body = header(family as u8, 0);
    put(&mut body, TABLE, &text(table));
    match netfilter.request(&[Request::raw("look up a firewall table", GET_TABLE, 0, body)]) {
        Ok(_) => Ok(true),
        Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Lets a port send from its addresses. Addresses that it may already use stay allowed.
///
/// # Errors
/// The kernel's error; `ENOENT` when the firewall was flushed. Nothing is changed then.
pub(crate) fn admit(netfilter: &mut Netlink, table: &str, port: &Port) -> Result<(), Error> {
    let messages = elements("allow the pod its addresses", NEW_ELEMENT, NLM_F_CREATE, table, port);
    transact(netfilter, messages)
}

/// Revokes that permission. It is no error if there was none, or if the firewall was flushed.
///
/// # Errors
/// The kernel's error.
pub(crate) fn dismiss(netfilter: &mut Netlink, table: &str, port: &Port) -> Result<(), Error> {
    let messages = || elements("revoke the pod's addresses", DELETE_ELEMENT, 0, table, port);
    match transact(netfilter, messages()) {
        Err(error) if error.errno() == Some(Errno::ENOENT) => {}
        outcome => return outcome,
    }
    // If one is absent, none is removed: so each is removed separately.
    for message in messages() {
        match transact(netfilter, vec![message]) {
            Err(error) if error.errno() == Some(Errno::ENOENT) => {}
            outcome => outcome?,
        }
    }
    Ok(())
}

fn transact(netfilter: &mut Netlink, messages: Vec<Request>) -> Result<(), Error> {
    let frame = |kind| Request::raw("change the firewall", kind, 0, header(0, SUBSYSTEM)).unacknowledged();
    let mut requests = vec![frame(BATCH_BEGIN)];
    requests.extend(messages);
    requests.push(frame(BATCH_END));
    netfilter.request(&requests).map(drop)
}

/// One message for each set that an address of the port belongs in.
fn elements(operation: &'static str, kind: u16, flags: u16, table: &str, port: &Port) -> Vec<Request> {
    let mut requests = Vec::new();
    for address in &port.addresses {
        let (sets, octets): (&[&str], Vec<u8>) = match address {
            IpAddr::V4(address) => (&[IPV4_SENDERS], address.octets().to_vec()),
            IpAddr::V6(address) => (&[IPV6_SENDERS, IPV6_TARGETS], address.octets().to_vec()),
        };
        for set in sets {
            let mut key = port.interface.as_bytes().to_vec();
            key.resize(NAME_BYTES, 0);
            key.extend_from_slice(&octets);
            let mut body = header(Family::Bridge as u8, 0);
            put(&mut body, TABLE, &text(table));
            put(&mut body, SET, &text(set));
            let value = nest(INNER, &key);
            let element = nest(INNER | NESTED, &nest(INNER | NESTED, &value));
            put(&mut body, ELEMENTS | NESTED, &element);
            requests.push(Request::raw(operation, kind, flags, body));
        }
    }
    requests
}

/// `struct nfgenmsg`: family u8, version u8 (`NFNETLINK_V0`), resource id u16 in network order.
fn header(family: u8, resource: u8) -> Vec<u8> {
    vec![family, 0, 0, resource]
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn nest(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put(&mut bytes, kind, value);
    bytes
}

/// Appends an attribute: length u16, type u16, value, padding to four bytes (`struct nlattr`).
fn put(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // The longest value is a nest of some 60 bytes: names have at most 21, addresses 16.
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_encoded_as_nft_encodes_it() {
        let port =
            Port { interface: "bvaaa0000000001".to_owned(), addresses: vec!["10.88.0.2".parse().unwrap()] };
        let messages = elements("test", NEW_ELEMENT, 0, "t", &port);
        assert_eq!(messages.len(), 1);
        // Family bridge; table "t"; the set; three nests around name and address.
        let expected = [
            b"\x07\0\0\0".as_slice(),
            b"\x06\0\x01\0t\0\0\0",
            b"\x11\0\x02\0ipv4_senders\0\0\0\0",
            b"\x24\0\x03\x80\x20\0\x01\x80\x1c\0\x01\x80\x18\0\x01\0bvaaa0000000001\0\x0a\x58\0\x02",
        ]
        .concat();
        assert_eq!(messages[0].body(), expected);
    }

    #[test]
    fn an_ipv6_address_belongs_in_two_sets() {
        let port = Port { interface: "bv".to_owned(), addresses: vec!["fd00::2".parse().unwrap()] };
        assert_eq!(elements("test", NEW_ELEMENT, 0, "t", &port).len(), 2);
    }
}
