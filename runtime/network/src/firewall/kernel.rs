//! Talking to the packet filter in the kernel directly: the elements of pods, and whether the
//! tables are as they were written.
//!
//! A transaction takes some 30 µs. Wire format: `linux/netfilter/nfnetlink.h` and `nf_tables.h`. It
//! is a datagram of messages between a "begin" and an "end"; the kernel carries out all or none.

use netlink_packet_core::{NLM_F_CREATE, NlaBuffer, NlasIterator};
use nix::errno::Errno;

use super::Port;
use super::sets::{Element, Family, elements};
use crate::netlink::{Error, Netlink, Request};

/// `NFNL_SUBSYS_NFTABLES`: the high byte of message types, and the resource that a transaction is
/// about.
const SUBSYSTEM: u8 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const GET_CHAIN: u16 = 10 << 8 | 4;
const NEW_ELEMENT: u16 = 10 << 8 | 12;
const DELETE_ELEMENT: u16 = 10 << 8 | 14;

/// `NFTA_SET_ELEM_LIST_TABLE`, `NFTA_CHAIN_TABLE`: a NUL-terminated string.
const TABLE: u16 = 1;
/// `NFTA_SET_ELEM_LIST_SET`.
const SET: u16 = 2;
/// `NFTA_SET_ELEM_LIST_ELEMENTS`.
const ELEMENTS: u16 = 3;
/// `NFTA_CHAIN_NAME`.
const CHAIN_NAME: u16 = 3;
/// `NFTA_CHAIN_USE`: how many rules it has, and how many jump to it; u32 in network order.
const CHAIN_USE: u16 = 6;
/// `NFTA_LIST_ELEM`, `NFTA_SET_ELEM_KEY` and `NFTA_DATA_VALUE` happen to have the same number.
const INNER: u16 = 1;
/// `NFTA_SET_ELEM_DATA`.
const DATA: u16 = 2;
/// `NLA_F_NESTED` (`linux/netlink.h`).
const NESTED: u16 = 0x8000;
/// Size of `struct nfgenmsg`.
const NFGENMSG_BYTES: usize = 4;

/// Most elements in one message: an attribute is at most 64 KiB, and an element at most 80 bytes.
const IN_A_MESSAGE: usize = 500;

/// Most elements in one transaction, which has to fit into the socket's buffer of 208 KiB.
const IN_A_TRANSACTION: usize = 2000;

/// How often each of these chains is used, by rules in it and rules that jump to it; `None` for one
/// that is not there. One exchange, some 10 µs.
///
/// # Errors
/// What the kernel said, other than that there is no such table or chain.
pub(crate) fn chain_uses(
    netfilter: &mut Netlink,
    table: &str,
    chains: &[(Family, &str)],
) -> Result<Vec<Option<u32>>, Error> {
    const LOOK: &str = "look up a firewall chain";
    let use_of = |(family, chain): &(Family, &str)| {
        let mut body = header(*family as u8, 0);
        put(&mut body, TABLE, &text(table));
        put(&mut body, CHAIN_NAME, &text(chain));
        let replies = match netfilter.request(&[Request::raw(LOOK, GET_CHAIN, 0, body)]) {
            Err(error) if error.errno() == Some(Errno::ENOENT) => return Ok(None),
            replies => replies?,
        };
        let malformed = || Error::Malformed { operation: LOOK };
        let body =
            replies.first().and_then(|reply| reply.body().get(NFGENMSG_BYTES..)).ok_or_else(malformed)?;
        for attribute in NlasIterator::new(body) {
            let attribute: NlaBuffer<&[u8]> = attribute.map_err(|_| malformed())?;
            if attribute.kind() == CHAIN_USE {
                let value = attribute.value().first_chunk().ok_or_else(malformed)?;
                return Ok(Some(u32::from_be_bytes(*value)));
            }
        }
        Err(malformed())
    };
    chains.iter().map(use_of).collect()
}

/// Lets a pod send from its addresses, and its host ports lead to it. What there is stays.
///
/// # Errors
/// What the kernel said; `ENOENT` when the firewall was flushed. Something may be changed then.
pub(crate) fn admit(netfilter: &mut Netlink, table: &str, port: &Port) -> Result<(), Error> {
    for elements in elements(port).chunks(IN_A_TRANSACTION) {
        let operation = "add the pod to the firewall";
        transact(netfilter, messages(operation, NEW_ELEMENT, NLM_F_CREATE, table, elements))?;
    }
    Ok(())
}

/// Takes that back. What is not there, or was flushed with the firewall, is no error.
///
/// # Errors
/// What the kernel said.
pub(crate) fn dismiss(netfilter: &mut Netlink, table: &str, port: &Port) -> Result<(), Error> {
    let mut remove = |elements: &[Element]| {
        let operation = "remove the pod from the firewall";
        match transact(netfilter, messages(operation, DELETE_ELEMENT, 0, table, elements)) {
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(false),
            outcome => outcome.map(|()| true),
        }
    };
    for elements in elements(port).chunks(IN_A_TRANSACTION) {
        if !remove(elements)? {
            // One is absent, and none is removed: so each separately.
            for element in elements {
                remove(std::slice::from_ref(element))?;
            }
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

/// One message for each set, or more for many elements.
fn messages(
    operation: &'static str,
    kind: u16,
    flags: u16,
    table: &str,
    elements: &[Element],
) -> Vec<Request> {
    let mut elements: Vec<&Element> = elements.iter().collect();
    elements.sort_by_key(|element| element.set);
    let of_a_set = elements.chunk_by(|one, other| one.set == other.set);
    let message = |elements: &[&Element]| {
        let set = elements.first()?.set;
        let mut body = header(set.family() as u8, 0);
        put(&mut body, TABLE, &text(table));
        put(&mut body, SET, &text(set.name()));
        let mut list = Vec::new();
        for element in elements {
            let mut content = Vec::new();
            put(&mut content, INNER | NESTED, &nest(INNER, &element.key_bytes()));
            let value = element.value_bytes();
            if kind == NEW_ELEMENT && !value.is_empty() {
                put(&mut content, DATA | NESTED, &nest(INNER, &value));
            }
            put(&mut list, INNER | NESTED, &content);
        }
        put(&mut body, ELEMENTS | NESTED, &list);
        Some(Request::raw(operation, kind, flags, body))
    };
    of_a_set.flat_map(|elements| elements.chunks(IN_A_MESSAGE)).filter_map(message).collect()
}

/// `struct nfgenmsg`: family u8, version u8 (`NFNETLINK_V0`), resource id u16 in network order.
pub(super) fn header(family: u8, resource: u8) -> Vec<u8> {
    vec![family, 0, 0, resource]
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

pub(crate) fn nest(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put(&mut bytes, kind, value);
    bytes
}

/// Appends an attribute: length u16, type u16, value, padding to four bytes (`struct nlattr`).
pub(crate) fn put(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // The longest value is a list of `IN_A_MESSAGE` elements.
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_ports::{HostPort, Protocol};

    fn port(address: &str, host_ports: Vec<HostPort>) -> Port {
        Port {
            interface: "bvaaa0000000001".to_owned(),
            addresses: vec![address.parse().unwrap()],
            host_ports,
        }
    }

    #[test]
    fn elements_are_encoded_as_nft_encodes_them() {
        let http = HostPort { protocol: Protocol::Tcp, address: None, host_port: 8080, container_port: 80 };
        let elements = elements(&port("10.88.0.2", vec![http]));
        let messages = messages("test", NEW_ELEMENT, 0, "t", &elements);
        let bodies: Vec<&[u8]> = messages.iter().map(Request::body).collect();
        // The family; table "t"; the set; nests around the key of padded fields, and the value.
        let expected = [
            [
                b"\x07\0\0\0".as_slice(),
                b"\x06\0\x01\0t\0\0\0",
                b"\x09\0\x02\0macs\0\0\0\0",
                b"\x28\0\x03\x80\x24\0\x01\x80\x20\0\x01\x80\x1c\0\x01\0bvaaa0000000001\0\x0a\xbe\x0a\x58\0\x02\0\0",
            ]
            .concat(),
            [
                b"\x07\0\0\0".as_slice(),
                b"\x06\0\x01\0t\0\0\0",
                b"\x11\0\x02\0ipv4_senders\0\0\0\0",
                b"\x24\0\x03\x80\x20\0\x01\x80\x1c\0\x01\x80\x18\0\x01\0bvaaa0000000001\0\x0a\x58\0\x02",
            ]
            .concat(),
            [
                b"\x01\0\0\0".as_slice(),
                b"\x06\0\x01\0t\0\0\0",
                b"\x0f\0\x02\0ipv4_ports\0\0",
                b"\x28\0\x03\x80\x24\0\x01\x80\x10\0\x01\x80\x0c\0\x01\0\x06\0\0\0\x1f\x90\0\0",
                b"\x10\0\x02\x80\x0c\0\x01\0\x0a\x58\0\x02\0\x50\0\0",
            ]
            .concat(),
            [
                b"\x01\0\0\0".as_slice(),
                b"\x06\0\x01\0t\0\0\0",
                b"\x10\0\x02\0ipv4_selves\0",
                b"\x18\0\x03\x80\x14\0\x01\x80\x10\0\x01\x80\x0c\0\x01\0\x0a\x58\0\x02\x0a\x58\0\x02",
            ]
            .concat(),
        ];
        assert_eq!(bodies, expected);
    }

    #[test]
    fn an_ipv6_address_belongs_in_two_sets() {
        assert_eq!(messages("test", NEW_ELEMENT, 0, "t", &elements(&port("fd00::2", Vec::new()))).len(), 2);
    }
}
