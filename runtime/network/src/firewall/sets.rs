//! The sets and maps of the tables, and the elements that a pod has in them: one description, for
//! the text that `nft` reads and for the bytes that the kernel reads.

use std::fmt;
use std::net::IpAddr;

use super::Port;
use crate::host_ports::Protocol;
use crate::identity::{self, MacAddress};

/// The families of tables that are used here, by their number (`NFPROTO_*`, `linux/netfilter.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Inet = 1,
    Bridge = 7,
}

/// A set or a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Set {
    /// Ports of the bridge and the MAC address that each may send from.
    Macs,
    /// The same for IPv4 addresses.
    Ipv4Senders,
    /// The same for IPv6 addresses.
    Ipv6Senders,
    /// Ports and the IPv6 addresses that they may advertise: the elements of [`Set::Ipv6Senders`],
    /// with the address as an integer of 128 bits, because `nft` 1.0.6 has no name for the field of
    /// the advertisement.
    Ipv6Targets,
    /// Host ports on every address of the node, and where they lead.
    Ipv4Ports,
    /// The same for IPv6.
    Ipv6Ports,
    /// Host ports on one address of the node, and where they lead.
    Ipv4BoundPorts,
    /// The same for IPv6.
    Ipv6BoundPorts,
    /// Pods with host ports, each address twice: a pod that uses its own host port.
    Ipv4Selves,
    /// The same for IPv6.
    Ipv6Selves,
}

impl Set {
    /// Those of a table, in the order in which they are written.
    pub(crate) fn of(family: Family, ipv6: bool) -> impl Iterator<Item = Self> {
        use Set::{
            Ipv4BoundPorts, Ipv4Ports, Ipv4Selves, Ipv4Senders, Ipv6BoundPorts, Ipv6Ports, Ipv6Selves,
            Ipv6Senders, Ipv6Targets, Macs,
        };
        let (always, with_ipv6): (&[Self], &[Self]) = match family {
            Family::Inet => {
                (&[Ipv4Ports, Ipv4BoundPorts, Ipv4Selves], &[Ipv6Ports, Ipv6BoundPorts, Ipv6Selves])
            }
            Family::Bridge => (&[Macs, Ipv4Senders], &[Ipv6Senders, Ipv6Targets]),
        };
        always.iter().chain(with_ipv6.iter().filter(move |_| ipv6)).copied()
    }

    pub(crate) fn family(self) -> Family {
        match self {
            Self::Macs | Self::Ipv4Senders | Self::Ipv6Senders | Self::Ipv6Targets => Family::Bridge,
            _ => Family::Inet,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Macs => "macs",
            Self::Ipv4Senders => "ipv4_senders",
            Self::Ipv6Senders => "ipv6_senders",
            Self::Ipv6Targets => "ipv6_targets",
            Self::Ipv4Ports => "ipv4_ports",
            Self::Ipv6Ports => "ipv6_ports",
            Self::Ipv4BoundPorts => "ipv4_bound_ports",
            Self::Ipv6BoundPorts => "ipv6_bound_ports",
            Self::Ipv4Selves => "ipv4_selves",
            Self::Ipv6Selves => "ipv6_selves",
        }
    }

    /// The beginning of its declaration in a table.
    pub(crate) fn declaration(self) -> String {
        let (keyword, kind) = match self {
            Self::Macs => ("set", "type ifname . ether_addr"),
            Self::Ipv4Senders => ("set", "type ifname . ipv4_addr"),
            Self::Ipv6Senders => ("set", "type ifname . ipv6_addr"),
            // The target of a neighbour advertisement: the 128 bits behind the first 64 of the
            // ICMPv6 header (RFC 4861, 4.4).
            Self::Ipv6Targets => ("set", "typeof iifname . @th,64,128"),
            Self::Ipv4Ports => ("map", "type inet_proto . inet_service : ipv4_addr . inet_service"),
            Self::Ipv6Ports => ("map", "type inet_proto . inet_service : ipv6_addr . inet_service"),
            Self::Ipv4BoundPorts => {
                ("map", "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service")
            }
            Self::Ipv6BoundPorts => {
                ("map", "type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service")
            }
            Self::Ipv4Selves => ("set", "type ipv4_addr . ipv4_addr"),
            Self::Ipv6Selves => ("set", "type ipv6_addr . ipv6_addr"),
        };
        format!("{keyword} {} {{\n    {kind}\n", self.name())
    }
}

/// A field of a key or a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Field {
    Interface(String),
    Mac(MacAddress),
    Address(IpAddr),
    Bits(u128),
    Protocol(Protocol),
    Number(u16),
}

/// An interface name in a key: `IFNAMSIZ` bytes, padded with NUL.
const NAME_BYTES: usize = 16;

impl Field {
    /// In network byte order, padded to four bytes.
    fn bytes(&self) -> Vec<u8> {
        let (mut bytes, length) = match self {
            Self::Interface(name) => (name.clone().into_bytes(), NAME_BYTES),
            Self::Mac(mac) => (mac.0.to_vec(), 8),
            Self::Address(IpAddr::V4(address)) => (address.octets().to_vec(), 4),
            Self::Address(IpAddr::V6(address)) => (address.octets().to_vec(), 16),
            Self::Bits(bits) => (bits.to_be_bytes().to_vec(), 16),
            Self::Protocol(protocol) => (vec![protocol.number()], 4),
            Self::Number(number) => (number.to_be_bytes().to_vec(), 4),
        };
        bytes.resize(length, 0);
        bytes
    }
}

impl fmt::Display for Field {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(formatter, "\"{name}\""),
            Self::Mac(mac) => mac.fmt(formatter),
            Self::Address(address) => address.fmt(formatter),
            Self::Bits(bits) => write!(formatter, "{bits:#034x}"),
            Self::Protocol(protocol) => write!(formatter, "{}", protocol.number()),
            Self::Number(number) => number.fmt(formatter),
        }
    }
}

/// An element of a set, or of a map, whose value is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) set: Set,
    pub(crate) key: Vec<Field>,
    pub(crate) value: Vec<Field>,
}

impl Element {
    pub(crate) fn key_bytes(&self) -> Vec<u8> {
        self.key.iter().flat_map(Field::bytes).collect()
    }

    pub(crate) fn value_bytes(&self) -> Vec<u8> {
        self.value.iter().flat_map(Field::bytes).collect()
    }
}

impl fmt::Display for Element {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined =
            |fields: &[Field]| fields.iter().map(ToString::to_string).collect::<Vec<_>>().join(" . ");
        formatter.write_str(&joined(&self.key))?;
        if self.value.is_empty() { Ok(()) } else { write!(formatter, " : {}", joined(&self.value)) }
    }
}

/// What a pod has in the sets.
pub(crate) fn elements(port: &Port) -> Vec<Element> {
    let mut elements = Vec::new();
    let mut add = |set, key, value| elements.push(Element { set, key, value });
    let interface = || Field::Interface(port.interface.clone());
    for address in &port.addresses {
        let own = Field::Address(*address);
        match address {
            IpAddr::V4(ipv4) => {
                add(Set::Macs, vec![interface(), Field::Mac(identity::pod_mac(*ipv4))], Vec::new());
                add(Set::Ipv4Senders, vec![interface(), own.clone()], Vec::new());
            }
            IpAddr::V6(ipv6) => {
                add(Set::Ipv6Senders, vec![interface(), own.clone()], Vec::new());
                add(Set::Ipv6Targets, vec![interface(), Field::Bits(u128::from(*ipv6))], Vec::new());
            }
        }
        let mut published = false;
        for host_port in port.host_ports.iter().filter(|host_port| host_port.leads_to(*address)) {
            let value = vec![own.clone(), Field::Number(host_port.container_port)];
            let service = [Field::Protocol(host_port.protocol), Field::Number(host_port.host_port)];
            published = true;
            match host_port.bound_to() {
                None => {
                    let set = if address.is_ipv4() { Set::Ipv4Ports } else { Set::Ipv6Ports };
                    add(set, service.to_vec(), value);
                }
                Some(bound) => {
                    let set = if address.is_ipv4() { Set::Ipv4BoundPorts } else { Set::Ipv6BoundPorts };
                    let [protocol, number] = service;
                    add(set, vec![Field::Address(bound), protocol, number], value);
                }
            }
        }
        if published {
            let set = if address.is_ipv4() { Set::Ipv4Selves } else { Set::Ipv6Selves };
            add(set, vec![own.clone(), own], Vec::new());
        }
    }
    elements
}
