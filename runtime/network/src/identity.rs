//! Names and MAC addresses that are derived, so that they can be found again without being stored.
//!
//! Host interface of a pod: `bv`, three hex digits of the bridge's name, ten hex digits of the
//! sandbox id. The digits of the bridge keep two daemons on one host apart: their firewall rules
//! select their own pods by this prefix. Forty bits of a random id collide among a thousand pods
//! about once in two million nodes; the kernel then refuses the second name.

use std::fmt;
use std::net::Ipv4Addr;

use crate::config::BridgeName;

/// Shortest sandbox id in bytes: enough to fill its part of an interface name.
pub const MIN_SANDBOX_ID: usize = 10;

/// Longest sandbox id in bytes: twice the 64 digits that are usual; keeps an address record small.
pub const MAX_SANDBOX_ID: usize = 128;

/// Whether a text can be the id of a sandbox here: 10 to 128 lower-case hex digits.
pub fn is_sandbox_id(text: &str) -> bool {
    (MIN_SANDBOX_ID..=MAX_SANDBOX_ID).contains(&text.len())
        && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A 48-bit interface address. Shown as `0a:be:0a:58:00:02`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// The MAC address of a bridge. Fixed, because a bridge without its own takes the lowest of its
/// ports' and changes it when a pod ends, which breaks the neighbour entries of all others. It also
/// marks a bridge as ours.
///
/// The second-lowest bit of the first octet says "locally administered" (IEEE 802, section 8.4).
pub fn bridge_mac(bridge: &BridgeName) -> MacAddress {
    let [a, b, c, d] = fnv1a(bridge.as_str()).to_be_bytes();
    MacAddress([0x02, 0xbe, a, b, c, d])
}

/// The MAC address of a pod's interface, from its IPv4 address: the next pod with the address gets
/// the MAC with it, so no neighbour cache on the node is ever wrong.
pub fn pod_mac(address: Ipv4Addr) -> MacAddress {
    let [a, b, c, d] = address.octets();
    MacAddress([0x0a, 0xbe, a, b, c, d])
}

/// The prefix of the host interfaces of all pods of a bridge.
pub fn host_interface_prefix(bridge: &BridgeName) -> String {
    format!("bv{:03x}", fnv1a(bridge.as_str()) & 0xfff)
}

/// The host end of a sandbox's veth pair, 15 bytes; `None` when the id is not one (see
/// [`is_sandbox_id`]).
pub fn host_interface(bridge: &BridgeName, sandbox_id: &str) -> Option<String> {
    let digits = is_sandbox_id(sandbox_id).then(|| sandbox_id.get(..MIN_SANDBOX_ID))??;
    Some(format!("{}{digits}", host_interface_prefix(bridge)))
}

/// FNV-1a, 32 bits: spreads names; keeps no secrets.
fn fnv1a(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_INTERFACE_NAME;

    fn bridge(name: &str) -> BridgeName {
        BridgeName::new(name).unwrap()
    }

    #[test]
    fn a_host_interface_fills_an_interface_name() {
        let id = "0123456789abcdef".repeat(4);
        let name = host_interface(&bridge("berth0"), &id).unwrap();
        assert_eq!(name.len(), MAX_INTERFACE_NAME);
        assert!(name.starts_with(&host_interface_prefix(&bridge("berth0"))) && name.ends_with("0123456789"));
        assert_ne!(name, host_interface(&bridge("berth1"), &id).unwrap());
    }

    #[test]
    fn ids_that_are_not_plain_hex_have_no_interface() {
        let odd = [
            "",
            " ",
            "012345678",
            "0123456789ABCDEF",
            "../../../../x",
            "0123456789\0",
            "0123456789 ",
            "ééééééé",
        ];
        for id in odd {
            assert_eq!(host_interface(&bridge("berth0"), id), None, "{id:?}");
        }
        assert_eq!(host_interface(&bridge("berth0"), &"a".repeat(MAX_SANDBOX_ID + 1)), None);
        assert!(host_interface(&bridge("berth0"), &"a".repeat(MAX_SANDBOX_ID)).is_some());
    }

    #[test]
    fn macs_are_local_and_unicast() {
        for mac in [bridge_mac(&bridge("berth0")), pod_mac(Ipv4Addr::new(255, 255, 255, 255))] {
            assert_eq!(mac.0[0] & 0b11, 0b10, "{mac}");
        }
        assert_eq!(pod_mac(Ipv4Addr::new(10, 88, 0, 2)).to_string(), "0a:be:0a:58:00:02");
    }
}
