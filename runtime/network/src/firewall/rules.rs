//! The firewall of a bridge as text for `nft -f -`.
//!
//! Two tables, replaced as a whole in one transaction:
//!
//! - `inet berth-<bridge>`: packets from the pod subnet to anywhere else leave with the address of
//!   the interface they leave by; host ports of local addresses lead to pods.
//! - `bridge berth-<bridge>`: frames that enter from a pod's port are dropped unless their sender
//!   is one of that pod's own addresses, and when they advertise routes, redirect, aim at loopback
//!   addresses, or are neither IP nor ARP (a VLAN tag would hide the rest from these rules).
//!
//! Each rule counts the packets it matches, so `nft list table bridge berth-<bridge>` shows which
//! pods are being blocked and why.
//!
//! Nothing in the text comes from a user unchecked: names and subnets are types with closed
//! character sets ([`crate::config`]). Syntax and priorities: `nft(8)`; the bridge family's
//! prerouting hook runs before the bridge learns or forwards.

use std::net::IpAddr;

use ipnet::IpNet;

use super::sets::{Family, Set, elements};
use super::{Port, table};
use crate::config::{BridgeName, InterfaceAddress};
use crate::identity;

/// The chains of the tables.
pub(crate) const CHAINS: [(Family, &str); 8] = [
    (Family::Inet, "ports"),
    (Family::Inet, "prerouting"),
    (Family::Inet, "output"),
    (Family::Inet, "local"),
    (Family::Inet, "host_ports"),
    (Family::Inet, "postrouting"),
    (Family::Bridge, "prerouting"),
    (Family::Bridge, "from_pod"),
];

/// What the rules depend on.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// The bridge.
    pub bridge: &'a BridgeName,
    /// The node's addresses in the pods' networks. Without an IPv6 one, pods have no IPv6.
    pub subnets: &'a [InterfaceAddress],
    /// Where packets of pods go under the pod's own address, too.
    pub non_masquerade: &'a [IpNet],
    /// Whether packets that only cross the bridge pass the rules for routed ones, too
    /// (`br_netfilter`).
    pub tracks_bridged: bool,
}

impl Setting<'_> {
    fn has_ipv6(&self) -> bool {
        self.subnets.iter().any(|subnet| subnet.address.is_ipv6())
    }

    /// The networks of a family, as `nft` lists them.
    fn networks(&self, is_meant: fn(&IpAddr) -> bool) -> Option<String> {
        let subnets = self.subnets.iter().filter(|subnet| is_meant(&subnet.address));
        let networks: Vec<String> =
            subnets.map(|subnet| format!("{}/{}", subnet.network(), subnet.prefix)).collect();
        (!networks.is_empty()).then(|| networks.join(", "))
    }

    /// What excepts the networks to which pods keep their addresses.
    fn exceptions(&self, family: &str, is_meant: fn(&IpAddr) -> bool) -> String {
        let networks = self.non_masquerade.iter().filter(|network| is_meant(&network.addr()));
        networks.map(|network| format!("{family} daddr != {network} ")).collect()
    }
}

/// A script that puts both tables in place, whatever existed under their names, with these pods in
/// the sets.
pub fn installation(setting: Setting<'_>, pods: &[Port]) -> String {
    let bridge = setting.bridge;
    let table = table(bridge);
    let ipv6 = setting.has_ipv6();
    let mut text = removal(bridge);
    text += &format!("table inet {table} {{\n");
    text += &sets(Family::Inet, ipv6, pods);
    // A bridge passes frames to groups that it does not forward (01:80:c2:00:00:0x) to the port
    // that they came by, past its own firewall; and without its bridge a port is an interface like
    // any other. Nothing is received by one: what the bridge receives enters by the bridge.
    let ports = format!("{}*", identity::host_interface_prefix(bridge));
    text += "  chain ports {\n    type filter hook prerouting priority raw; policy accept;\n";
    text += &format!("    iifname \"{ports}\" counter drop\n");
    // Host ports of 127.0.0.1 need `route_localnet`. Who gets to the loopback with that must not
    // depend on the port of the bridge: the rules for pods know those of pods only.
    text += &format!("    iifname \"{bridge}\" ip daddr 127.0.0.0/8 counter drop\n  }}\n");
    text += "  chain prerouting {\n    type nat hook prerouting priority dstnat; policy accept;\n    fib daddr type local jump local\n  }\n";
    text += "  chain output {\n    type nat hook output priority -100; policy accept;\n    fib daddr type local jump local\n  }\n";
    // From ::1 nothing can be sent to another interface: there, a client shall be refused and try
    // 127.0.0.1.
    text += "  chain local {\n    ip6 daddr ::1 return\n    meta l4proto { tcp, udp, sctp } jump host_ports\n  }\n";
    text += "  chain host_ports {\n";
    for (family, bound, ports) in
        [("ip", Set::Ipv4BoundPorts, Set::Ipv4Ports), ("ip6", Set::Ipv6BoundPorts, Set::Ipv6Ports)]
    {
        if family == "ip" || ipv6 {
            let (bound, ports) = (bound.name(), ports.name());
            text += &format!("    dnat {family} to {family} daddr . meta l4proto . th dport map @{bound}\n");
            text += &format!("    dnat {family} to meta l4proto . th dport map @{ports}\n");
        }
    }
    text += "  }\n";
    text += &postrouting(setting);
    text += "}\n";
    text += &format!("table bridge {table} {{\n");
    text += &sets(Family::Bridge, ipv6, pods);
    text += &from_pods(setting);
    text += "}\n";
    text
}

/// What leaves with another source address.
fn postrouting(setting: Setting<'_>) -> String {
    let Setting { bridge, tracks_bridged, .. } = setting;
    let mut text =
        "  chain postrouting {\n    type nat hook postrouting priority srcnat; policy accept;\n".to_owned();
    // Multicast and broadcast keep their source: what the bridge sends to a group is not a
    // connection.
    let families = [
        ("ip", IpAddr::is_ipv4 as fn(&IpAddr) -> bool, "224.0.0.0/4, 255.255.255.255", Set::Ipv4Selves),
        ("ip6", IpAddr::is_ipv6, "ff00::/8", Set::Ipv6Selves),
    ];
    for (family, is_meant, groups, selves) in families {
        let Some(networks) = setting.networks(is_meant) else { continue };
        let exceptions = setting.exceptions(family, is_meant);
        text += &format!(
            "    {family} saddr {{ {networks} }} {family} daddr != {{ {networks}, {groups} }} {exceptions}counter masquerade\n"
        );
        // From pod to pod by a translated address: the answer has to come back this way. A bridge
        // whose packets are tracked sees it anyway, unless the pod talks to itself.
        text += &match tracks_bridged {
            true => format!(
                "    oifname \"{bridge}\" {family} saddr . {family} daddr @{} counter masquerade\n",
                selves.name()
            ),
            false => format!(
                "    oifname \"{bridge}\" ct status dnat {family} saddr {{ {networks} }} {family} daddr {{ {networks} }} counter masquerade\n"
            ),
        };
    }
    // To a host port of 127.0.0.1, whose source no pod could answer.
    text += &format!("    oifname \"{bridge}\" ip saddr 127.0.0.0/8 counter masquerade\n");
    text + "  }\n"
}

/// What pods may not send.
fn from_pods(setting: Setting<'_>) -> String {
    let ports = format!("{}*", identity::host_interface_prefix(setting.bridge));
    let types = if setting.has_ipv6() { "{ ip, ip6, arp }" } else { "{ ip, arp }" };
    let (macs, ipv4_senders) = (Set::Macs.name(), Set::Ipv4Senders.name());
    let mut text =
        "  chain prerouting {\n    type filter hook prerouting priority filter; policy accept;\n".to_owned();
    text += &format!("    iifname \"{ports}\" jump from_pod\n  }}\n");
    text += "  chain from_pod {\n";
    text += &format!("    ether type != {types} counter drop\n");
    text += &format!("    iifname . ether saddr != @{macs} counter drop\n");
    text += &format!("    iifname . ip saddr != @{ipv4_senders} counter drop\n");
    text += "    ip daddr 127.0.0.0/8 counter drop\n";
    text += "    arp htype != 1 counter drop\n";
    // 0.0.0.0 is the sender of a probe for a duplicate address (RFC 5227).
    text += &format!("    arp saddr ip != 0.0.0.0 iifname . arp saddr ip != @{ipv4_senders} counter drop\n");
    if setting.has_ipv6() {
        let (senders, targets) = (Set::Ipv6Senders.name(), Set::Ipv6Targets.name());
        text += "    icmpv6 type { nd-router-advert, nd-redirect } counter drop\n";
        // 0x3fa: the ten bits of fe80::/10. A pod makes its link-local address on its own.
        text += &format!(
            "    icmpv6 type nd-neighbor-advert @th,64,10 != 0x3fa iifname . @th,64,128 != @{targets} counter drop\n"
        );
        text +=
            &format!("    ip6 saddr != {{ ::, fe80::/10 }} iifname . ip6 saddr != @{senders} counter drop\n");
    }
    text + "  }\n"
}

/// The sets of a table, with these pods in them.
fn sets(family: Family, ipv6: bool, pods: &[Port]) -> String {
    let elements: Vec<_> = pods.iter().flat_map(elements).collect();
    let mut text = String::new();
    for set in Set::of(family, ipv6) {
        text += &format!("  {}", set.declaration());
        let of_set = elements.iter().filter(|element| element.set == set);
        let listed = of_set.map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if !listed.is_empty() {
            text += &format!("    elements = {{ {listed} }}\n");
        }
        text += "  }\n";
    }
    text
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
    use crate::host_ports::{HostPort, Protocol};
    use crate::nft;

    fn check(script: &str) {
        if let Err(error) = nft::check(script) {
            panic!("{error}: {:?}\n{script}", std::error::Error::source(&error));
        }
    }

    fn pod(number: u8) -> Port {
        let addresses = [format!("10.88.0.{number}"), format!("fd62:6572:7468::{number}")];
        let port = |protocol, address: &str| HostPort {
            protocol,
            address: (!address.is_empty()).then(|| address.parse().unwrap()),
            host_port: u16::from(number),
            container_port: 80,
        };
        Port {
            interface: format!("bvaaa000000000{number}"),
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            host_ports: vec![
                port(Protocol::Tcp, ""),
                port(Protocol::Udp, "192.0.2.1"),
                port(Protocol::Sctp, "2001:db8::1"),
                port(Protocol::Sctp, "0.0.0.0"),
            ],
        }
    }

    fn subnet(text: &str) -> InterfaceAddress {
        let (address, prefix) = text.split_once('/').unwrap();
        InterfaceAddress { address: address.parse().unwrap(), prefix: prefix.parse().unwrap() }
    }

    #[test]
    fn nft_accepts_the_rules_of_every_configuration() {
        for name in ["berth0", "b", "_", "exactly15bytes_", "a-b_c", "0", "table"] {
            let bridge = &BridgeName::new(name).unwrap();
            for subnets in [
                &["10.88.0.1/16"] as &[&str],
                &["10.0.0.1/8", "fd62:6572:7468::1/64"],
                &["192.168.7.9/30", "2001:db8::1201/120", "10.88.0.1/16", "fd62:6572:7468::1/64"],
            ] {
                let subnets: Vec<_> = subnets.iter().map(|text| subnet(text)).collect();
                let cluster = ["10.0.0.0/8", "10.88.0.0/16", "fd00::/8"].map(|text| text.parse().unwrap());
                for (tracks_bridged, non_masquerade) in [(false, &cluster as &[_]), (true, &[])] {
                    let setting = Setting { bridge, subnets: &subnets, non_masquerade, tracks_bridged };
                    check(&installation(setting, &[]));
                    check(&installation(setting, &[pod(1), pod(2)]));
                }
            }
            check(&removal(bridge));
        }
    }

    #[test]
    fn without_ipv6_no_ipv6_frame_passes() {
        let bridge = &BridgeName::default();
        let subnets = &[subnet("10.88.0.1/16")];
        let text =
            installation(Setting { bridge, subnets, non_masquerade: &[], tracks_bridged: false }, &[pod(1)]);
        assert!(text.contains("ether type != { ip, arp } counter drop"), "{text}");
        let sets: Vec<_> = Set::of(Family::Bridge, false).chain(Set::of(Family::Inet, false)).collect();
        assert!(sets.iter().all(|set| text.contains(set.name())), "{text}");
        assert!(!text.contains("ipv6"), "{text}");
    }
}
