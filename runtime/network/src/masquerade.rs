//! The firewall of a bridge as text for `nft -f -`: masquerading outwards, and what pods must not send.
//!
//! Two tables, both named after the bridge, replaced as a whole in one transaction:
//!
//! - `inet berth-<bridge>`: packets from the pods' subnet to anywhere else leave with the address of the interface they leave by.
//! - `bridge berth-<bridge>`: frames that enter from a pod's port are dropped when they pretend to come from outside the
//!   pods' subnets or from the gateway, advertise routes, redirect, aim at loopback addresses, or are neither IP nor ARP
//!   (a VLAN tag would hide the rest from these rules).
//!
//! The rules name no single pod, so that starting a pod costs nothing here. What they therefore do not stop is a pod with
//! `CAP_NET_RAW` using the address of another pod of the same bridge.
//!
//! Each rule counts what it meets, so that `nft list table bridge berth-<bridge>` shows who is being stopped by what.
//!
//! Nothing in the text comes from a user unchecked: names and subnets are types with closed character sets ([`crate::config`]).
//! Syntax and priorities: `nft(8)`; the bridge family's prerouting hook runs before the bridge learns or forwards.

use crate::config::{BridgeName, Ipv4Subnet, Ipv6Subnet};
use crate::identity;

/// Name of both tables of a bridge.
pub fn table(bridge: &BridgeName) -> String {
    format!("berth-{bridge}")
}

/// A script that puts both tables in place, whatever was there under their names.
pub fn installation(bridge: &BridgeName, ipv4: Ipv4Subnet, ipv6: Option<Ipv6Subnet>) -> String {
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
    let gateway = ipv4.gateway();
    text += &format!("table bridge {table} {{\n");
    text += "  chain prerouting {\n    type filter hook prerouting priority filter; policy accept;\n";
    text += &format!("    iifname \"{ports}\" jump from_pod\n  }}\n");
    text += "  chain from_pod {\n";
    text += &format!("    ether type != {types} counter drop\n");
    text += &format!("    ether saddr {mac} counter drop\n");
    text += &format!("    ip saddr {gateway} counter drop\n");
    text += &format!("    ip saddr != {ipv4} counter drop\n");
    text += "    ip daddr 127.0.0.0/8 counter drop\n";
    text += "    ether type arp arp htype != 1 counter drop\n";
    text += &format!("    arp saddr ip {gateway} counter drop\n");
    // 0.0.0.0 is the sender of a probe for a duplicate address (RFC 5227).
    text += &format!("    arp saddr ip != {{ 0.0.0.0, {ipv4} }} counter drop\n");
    if let Some(ipv6) = ipv6 {
        let gateway = ipv6.gateway();
        text += &format!("    ip6 saddr {gateway} counter drop\n");
        text += &format!("    ip6 saddr != {{ ::, fe80::/10, {ipv6} }} counter drop\n");
        text += "    icmpv6 type { nd-router-advert, nd-redirect } counter drop\n";
        // The target of a neighbour advertisement: the 128 bits behind the first 64 of the ICMPv6 header (RFC 4861, 4.4).
        let target = u128::from(gateway);
        text += &format!("    icmpv6 type nd-neighbor-advert @th,64,128 {target:#034x} counter drop\n");
    }
    text += "  }\n}\n";
    text
}

/// A script that removes both tables, whether or not they are there.
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

    #[test]
    fn nft_accepts_the_rules_of_every_configuration() {
        for name in ["berth0", "b", "_", "exactly15bytes_", "a-b_c", "0", "table"] {
            let bridge = BridgeName::new(name).unwrap();
            for ipv4 in ["10.88.0.0/16", "10.0.0.0/8", "192.168.7.8/30"] {
                for ipv6 in [None, Some("fd62:6572:7468::/64"), Some("2001:db8::1200/120")] {
                    check(&installation(
                        &bridge,
                        ipv4.parse().unwrap(),
                        ipv6.map(|text| text.parse().unwrap()),
                    ));
                }
            }
            check(&removal(&bridge));
        }
    }

    #[test]
    fn without_ipv6_no_ipv6_frame_passes() {
        let text = installation(&BridgeName::default(), Ipv4Subnet::default(), None);
        assert!(text.contains("ether type != { ip, arp } counter drop"), "{text}");
        assert!(!text.contains("ip6"), "{text}");
    }
}
