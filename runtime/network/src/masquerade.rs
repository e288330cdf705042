//! The firewall of a bridge as text for `nft -f -`: masquerading outwards, and what pods must not
//! send.
//!
//! Two tables, both named after the bridge, replaced as a whole in one transaction:
//!
//! - `inet berth-<bridge>`: packets from the pods' subnet to anywhere else leave with the address
//!   of the interface they leave by.
//! - `bridge berth-<bridge>`: frames that enter from a pod's port are dropped unless their sender
//!   is one of that pod's own addresses, and when they advertise routes, redirect, aim at loopback
//!   addresses, or are neither IP nor ARP (a VLAN tag would hide the rest from these rules).
//!
//! The addresses that a port may use are in sets. This text fills them for existing pods; later
//! pods are added by [`crate::guard`], without `nft`.
//!
//! Each rule has a counter, so that `nft list table bridge berth-<bridge>` shows which rule stops
//! what.
//!
//! Nothing in the text comes from a user unchecked: names and subnets are types with closed
//! character sets ([`crate::config`]). Syntax and priorities: `nft(8)`; the bridge family's
//! prerouting hook runs before the bridge learns or forwards.

use std::net::{IpAddr, Ipv6Addr};

use crate::config::{BridgeName, Ipv4Subnet, Ipv6Subnet};
use crate::guard::{self, Port};
use crate::identity;

/// Name of both tables of a bridge.
pub fn table(bridge: &BridgeName) -> String {
    format!("berth-{bridge}")
}

/// A script that puts both tables in place, replacing whatever has their names, with the given pods
/// in the sets.
pub fn installation(
    bridge: &BridgeName,
    ipv4: Ipv4Subnet,
    ipv6: Option<Ipv6Subnet>,
    pods: &[Port],
) -> String {
    let table = table(bridge);
    let mut text = removal(bridge);

    text += &format!("table inet {table} {{\n");
    text += "  chain postrouting {\n    type nat hook postrouting priority srcnat; policy accept;\n";
    // Multicast keeps its source: what the pods' bridge sends to a group is not a connection.
    text += &format!("    ip saddr {ipv4} ip daddr != {{ {ipv4}, 224.0.0.0/4 }} counter masquerade\n");
    if let Some(ipv6) = ipv6 {
        text += &format!("    ip6 saddr {ipv6} ip6 daddr != {{ {ipv6}, ff00::/8 }} counter masquerade\n");
    }
    text += "  }\n}\n";

    let ports = format!("{}*", identity::host_interface_prefix(bridge));
    let mac = identity::bridge_mac(bridge);
    let types = if ipv6.is_some() { "{ ip, ip6, arp }" } else { "{ ip, arp }" };
    text += &format!("table bridge {table} {{\n");
    text += &set(
        guard::IPV4_SENDERS,
        "type ifname . ipv4_addr",
        &elements(pods, |address| match address {
            IpAddr::V4(address) => Some(address.to_string()),
            IpAddr::V6(_) => None,
        }),
    );
    if ipv6.is_some() {
        let ipv6 = |show: fn(Ipv6Addr) -> String| {
            elements(pods, move |address| match address {
                IpAddr::V4(_) => None,
                IpAddr::V6(address) => Some(show(address)),
            })
        };
        text += &set(guard::IPV6_SENDERS, "type ifname . ipv6_addr", &ipv6(|address| address.to_string()));
        // The target of a neighbour advertisement: the 128 bits behind the first 64 of the ICMPv6
        // header (RFC 4861, 4.4).
        let integers = ipv6(|address| format!("{:#034x}", u128::from(address)));
        text += &set(guard::IPV6_TARGETS, "typeof iifname . @th,64,128", &integers);
    }
    text += "  chain prerouting {\n    type filter hook prerouting priority filter; policy accept;\n";
    text += &format!("    iifname \"{ports}\" jump from_pod\n  }}\n");
    text += "  chain from_pod {\n";
    text += &format!("    ether type != {types} counter drop\n");
    text += &format!("    ether saddr {mac} counter drop\n");
    text += &format!("    iifname . ip saddr != @{} counter drop\n", guard::IPV4_SENDERS);
    text += "    ip daddr 127.0.0.0/8 counter drop\n";
    text += "    arp htype != 1 counter drop\n";
    // 0.0.0.0 is the sender of a probe for a duplicate address (RFC 5227).
    text += &format!(
        "    arp saddr ip != 0.0.0.0 iifname . arp saddr ip != @{} counter drop\n",
        guard::IPV4_SENDERS
    );
    if ipv6.is_some() {
        text += "    icmpv6 type { nd-router-advert, nd-redirect } counter drop\n";
        // 0x3fa: the ten bits of fe80::/10. A pod chooses its link-local address itself.
        text += &format!(
            "    icmpv6 type nd-neighbor-advert @th,64,10 != 0x3fa iifname . @th,64,128 != @{} counter drop\n",
            guard::IPV6_TARGETS
        );
        text += &format!(
            "    ip6 saddr != {{ ::, fe80::/10 }} iifname . ip6 saddr != @{} counter drop\n",
            guard::IPV6_SENDERS
        );
    }
    text += "  }\n}\n";
    text
}

fn set(name: &str, kind: &str, elements: &[String]) -> String {
    let elements = match elements {
        [] => String::new(),
        _ => format!("    elements = {{ {} }}\n", elements.join(", ")),
    };
    format!("  set {name} {{\n    {kind}\n{elements}  }}\n")
}

/// The elements of a set: each port with those of its addresses that belong there, as text.
fn elements(pods: &[Port], show: impl Fn(IpAddr) -> Option<String>) -> Vec<String> {
    let of = |port: &Port| -> Vec<String> {
        let shown = port.addresses.iter().filter_map(|address| show(*address));
        shown.map(|address| format!("\"{}\" . {address}", port.interface)).collect()
    };
    pods.iter().flat_map(of).collect()
}

/// A script that removes both tables, whether or not they exist.
pub fn removal(bridge: &BridgeName) -> String {
    let table = table(bridge);
    // `add` first, because `delete` fails on what is absent, and `destroy` needs kernel 6.3.
    ["inet", "bridge"]
        .map(|family| format!("add table {family} {table}\ndelete table {family} {table}\n"))
        .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft;

    fn check(script: &str) {
        if let Err(error) = nft::check(script) {
            panic!("{error}: {:?}\n{script}", std::error::Error::source(&error));
        }
    }

    fn pod(number: u8) -> Port {
        let addresses = [format!("10.88.0.{number}"), format!("fd62:6572:7468::{number}")];
        Port {
            interface: format!("bvaaa000000000{number}"),
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn nft_accepts_the_rules_of_every_configuration() {
        for name in ["berth0", "b", "_", "exactly15bytes_", "a-b_c", "0", "table"] {
            let bridge = BridgeName::new(name).unwrap();
            for ipv4 in ["10.88.0.0/16", "10.0.0.0/8", "192.168.7.8/30"] {
                for ipv6 in [None, Some("fd62:6572:7468::/64"), Some("2001:db8::1200/120")] {
                    let ipv6 = ipv6.map(|text| text.parse().unwrap());
                    check(&installation(&bridge, ipv4.parse().unwrap(), ipv6, &[]));
                    check(&installation(&bridge, ipv4.parse().unwrap(), ipv6, &[pod(1), pod(2)]));
                }
            }
            check(&removal(&bridge));
        }
    }

    #[test]
    fn without_ipv6_no_ipv6_frame_passes() {
        let text = installation(&BridgeName::default(), Ipv4Subnet::default(), None, &[pod(1)]);
        assert!(text.contains("ether type != { ip, arp } counter drop"), "{text}");
        assert!(!text.contains("ip6"), "{text}");
    }
}
