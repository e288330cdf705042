//! The bridge network against the real kernel, as root, in network namespaces that each test makes
//! for itself: one plays the node, others the pods. The machine's own network is not touched. Needs
//! `nft` and `ip`.
//!
//! A namespace is entered on its own thread that ends with the visit, so that no other test runs in
//! it by accident.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use berth_network::bridge::{Error, NotReady, POD_INTERFACE, open_in_pod};
use berth_network::config::{BridgeName, Mtu, Subnets};
use berth_network::{Bandwidth, Bridge, BridgeConfig, Known, Netlink, addresses, identity, interfaces};
use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, setsockopt, sockopt,
};

use common::{Namespace, Node, PATIENCE, Pod, id, talk, uplink, wait_until};

#[test]
fn two_pods_and_the_node_reach_each_other_by_ipv4_and_ipv6() {
    let node = Node::new();
    let (first, second) = (node.attach(1), node.attach(2));
    for family in [0, 1] {
        assert_eq!(talk(&first.namespace, &second.namespace, second.address(family)), first.address(family));
        assert_eq!(talk(&second.namespace, &first.namespace, first.address(family)), second.address(family));
        talk(&node.namespace, &first.namespace, first.address(family));
    }
    talk(&second.namespace, &node.namespace, "10.88.0.1".parse().unwrap());
    talk(&second.namespace, &node.namespace, "fd62:6572:7468::1".parse().unwrap());
    // Loopback is up as well.
    talk(&first.namespace, &first.namespace, "127.0.0.1".parse().unwrap());
    talk(&first.namespace, &first.namespace, "::1".parse().unwrap());
}

#[test]
fn what_attach_returns_is_what_the_pod_has() {
    let node = Node::with(BridgeConfig { mtu: Some(Mtu::new(1400).unwrap()), ..BridgeConfig::default() });
    let pod = node.attach(1);
    let shown = pod.namespace.command("ip addr show eth0");
    for expected in
        ["mtu 1400", "state UP", &pod.attachment.mac.to_string(), "10.88.0.2/16", "fd62:6572:7468::2/64"]
    {
        assert!(shown.contains(expected), "{expected} is missing in {shown}");
    }
    assert!(!shown.contains("fd62:6572:7468::2/64 scope global tentative"), "{shown}");
    let texts: Vec<String> = pod.attachment.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["10.88.0.2/16", "fd62:6572:7468::2/64"]);
    assert_eq!(node.bridge.addresses_of(&pod.id), pod.attachment.addresses);
    assert!(pod.namespace.command("ip route").contains("default via 10.88.0.1 dev eth0"));
    assert!(pod.namespace.command("ip -6 route").contains("default via fd62:6572:7468::1 dev eth0"));
    assert!(node.interfaces().contains(&pod.attachment.host_interface));
    let accept_ra =
        pod.namespace.run(|| fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_ra")).unwrap();
    assert_eq!(accept_ra.trim(), "0");
}

#[test]
fn outside_the_node_a_pod_appears_with_the_nodes_address() {
    let node = Node::new();
    let outside = uplink(&node);
    let pod = node.attach(1);
    let cases = [("192.0.2.2", "192.0.2.1", "ip saddr"), ("2001:db8::2", "2001:db8::1", "ip6 saddr")];
    for (target, source, rule) in cases {
        let before = node.met("inet", rule);
        assert_eq!(talk(&pod.namespace, &outside, target.parse().unwrap()).to_string(), source);
        assert_eq!(node.met("inet", rule), before + 1);
    }
    // Between pods nothing is rewritten, and so nothing counted.
    let (other, before) = (node.attach(2), node.met("inet", "ip saddr"));
    assert_eq!(talk(&pod.namespace, &other.namespace, other.address(0)), pod.address(0));
    assert_eq!(node.met("inet", "ip saddr"), before);
}

#[test]
fn without_leave_to_forward_the_host_is_not_made_to() {
    let node = Node::with(BridgeConfig { forwarding: false, ..BridgeConfig::default() });
    let read = |path: &str| node.namespace.run(|| fs::read_to_string(path)).unwrap();
    assert_eq!(read("/proc/sys/net/ipv4/ip_forward").trim(), "0");
    assert_eq!(read("/proc/sys/net/ipv6/conf/all/forwarding").trim(), "0");
    node.namespace.run(|| node.bridge.ready()).unwrap();
}

#[test]
fn a_host_that_lives_on_router_advertisements_keeps_them() {
    let namespace = Namespace::new();
    namespace.command("ip link add up0 type bridge");
    namespace.command("ip link add odd0 type bridge");
    namespace.run(|| fs::write("/proc/sys/net/ipv6/conf/odd0/accept_ra", "0")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    namespace.run(|| Bridge::set_up(BridgeConfig::default(), directory.path())).unwrap();
    let accept_ra = |name: &str| {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/accept_ra");
        namespace.run(|| fs::read_to_string(path)).unwrap().trim().to_owned()
    };
    assert_eq!(["up0", "odd0", "berth0", "default"].map(accept_ra), ["2", "0", "0", "1"]);
}

#[test]
fn detach_removes_the_link_and_frees_the_addresses_and_may_be_repeated() {
    let node = Node::new();
    let pod = node.attach(1);
    assert_eq!(node.records(), ["10.88.0.2", "fd62:6572:7468::2"]);
    for _ in 0..2 {
        node.bridge.detach(&pod.id).unwrap();
        assert_eq!(node.interfaces(), ["berth0", "lo"]);
        assert!(node.records().is_empty());
        assert_eq!(pod.namespace.command("ip -o link show").lines().count(), 1);
    }
    // The next pod gets the next address; the freed one rests.
    assert_eq!(node.attach(2).address(0).to_string(), "10.88.0.3");
}

#[test]
fn detach_and_release_work_when_the_namespace_is_gone_already() {
    let node = Node::new();
    let (first, second) = (node.attach(1), node.attach(2));
    drop((first.namespace, second.namespace));
    node.bridge.detach(&first.id).unwrap();
    node.bridge.release(&second.id).unwrap();
    wait_until(|| !node.bridge.clear_released().unwrap());
    assert!(node.records().is_empty());
    node.wait_for_interfaces(&["berth0", "lo"]);
}

#[test]
fn an_interface_that_outlives_its_pod_goes_before_its_address_is_anybodys() {
    let node = Node::with(BridgeConfig { ipv4: "10.99.0.0/29".parse().unwrap(), ..BridgeConfig::default() });
    let pods: Vec<Pod> = (1..=5).map(|number| node.attach(number)).collect();
    let records = node.records();
    let is_there = |pod: &Pod| node.interfaces().contains(&pod.attachment.host_interface);
    // Its namespace is held, as by a socket that it passed to another pod.
    let [held, next, ..] = pods.as_slice() else { panic!() };
    node.bridge.release(&held.id).unwrap();
    assert!(!node.namespace.command("nft list ruleset").contains(&held.attachment.host_interface));
    assert!(is_there(held) && node.records() == records);
    node.namespace.run(|| node.bridge.repair()).unwrap();
    assert!(!node.namespace.command("nft list ruleset").contains(&held.attachment.host_interface));
    // Where there is no other address, nobody waits.
    let sixth = node.attach(6);
    assert_eq!(sixth.address(0), held.address(0));
    assert!(!is_there(held));
    talk(&node.namespace, &sixth.namespace, sixth.address(0));
    node.bridge.release(&next.id).unwrap();
    wait_until(|| !node.bridge.clear_released().unwrap());
    assert!(!is_there(next) && !node.records().contains(&next.address(0).to_string()));
}

#[test]
fn a_full_subnet_is_a_typed_error_and_leaves_nothing() {
    let node = Node::with(BridgeConfig { ipv4: "10.99.0.0/29".parse().unwrap(), ..BridgeConfig::default() });
    let pods: Vec<Pod> = (1..=5).map(|number| node.attach(number)).collect();
    let (records, interfaces) = (node.records(), node.interfaces());
    let error = node.try_attach(6, &Namespace::new()).unwrap_err();
    assert!(
        matches!(&error, Error::Addresses { source: addresses::Error::Exhausted { taken: 5, .. } }),
        "{error:?}"
    );
    assert_eq!((node.records(), node.interfaces()), (records, interfaces));
    node.bridge.detach(&pods[2].id).unwrap();
    assert_eq!(node.attach(6).address(0), pods[2].address(0));
}

#[test]
fn every_failing_step_of_attach_is_undone() {
    let node = Node::new();
    let clean = |error: Error| {
        assert!(node.records().is_empty(), "{error:?}");
        assert_eq!(node.interfaces(), ["berth0", "lo"], "{error:?}");
    };

    // The pod has an interface of that name already.
    let occupied = Namespace::new();
    occupied.command("ip link add eth0 type bridge");
    let error = node.try_attach(1, &occupied).unwrap_err();
    assert!(
        matches!(&error, Error::Interface { source, .. } if source.errno() == Some(Errno::EEXIST)),
        "{error:?}"
    );
    clean(error);

    // The socket is of another namespace, where there is no eth0: after the pair was made.
    let (pod, other) = (Namespace::new(), Namespace::new());
    let mut elsewhere = other.run(open_in_pod).unwrap();
    let error = node.bridge.attach(&id(1), &[], &mut elsewhere, pod.0.as_fd()).unwrap_err();
    assert!(
        matches!(&error, Error::Pod { source, .. } if source.errno() == Some(Errno::ENODEV)),
        "{error:?}"
    );
    clean(error);

    // The pod refuses IPv6 addresses: after IPv4 was set.
    let pod = Namespace::new();
    let mut inside = pod.run(open_in_pod).unwrap();
    pod.run(|| fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")).unwrap();
    let error = node.bridge.attach(&id(1), &[], &mut inside, pod.0.as_fd()).unwrap_err();
    assert!(
        matches!(&error, Error::Pod { source, .. } if source.errno() == Some(Errno::EACCES)),
        "{error:?}"
    );
    clean(error);

    // Not a namespace at all.
    let file = tempfile::tempfile().unwrap();
    let error = node.bridge.attach(&id(1), &[], &mut inside, file.as_fd()).unwrap_err();
    assert!(matches!(error, Error::Interface { .. }), "{error:?}");
    clean(error);
}

#[test]
fn ids_that_share_ten_digits_do_not_share_an_interface() {
    let node = Node::new();
    let pod = node.attach(1);
    let namespace = Namespace::new();
    let mut inside = namespace.run(open_in_pod).unwrap();
    let twin = format!("{}ff", &pod.id[..10]);
    let error = node.bridge.attach(&twin, &[], &mut inside, namespace.0.as_fd()).unwrap_err();
    assert!(matches!(error, Error::InterfaceTaken { .. }), "{error:?}");
    // The twin's failure did not cost the first its network.
    talk(&node.namespace, &pod.namespace, pod.address(0));
    assert_eq!(node.records().len(), 2);
}

#[test]
fn odd_ids_are_refused_in_words() {
    let node = Node::new();
    let namespace = Namespace::new();
    let mut inside = namespace.run(open_in_pod).unwrap();
    for text in ["", "..", "0123456789/../x", "0123456789\0", "ABCDEF0123456789"] {
        let error = node.bridge.attach(text, &[], &mut inside, namespace.0.as_fd()).unwrap_err();
        assert!(
            matches!(error, Error::Addresses { source: addresses::Error::SandboxId { .. } }),
            "{error:?}"
        );
        node.bridge.detach(text).unwrap_err();
    }
    assert_eq!(node.interfaces(), ["berth0", "lo"]);
}

#[test]
fn pods_attached_from_eight_threads_at_once_all_work() {
    let node = Node::new();
    let pods = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for worker in 0..8 {
            let (node, pods) = (&node, &pods);
            scope.spawn(move || {
                for number in 0..4 {
                    let number = worker * 100 + number;
                    let pod = node.attach(number);
                    pods.lock().unwrap().insert(pod.address(0), pod);
                }
            });
        }
    });
    let pods = pods.into_inner().unwrap();
    assert_eq!(pods.len(), 32);
    for pod in pods.values() {
        talk(&node.namespace, &pod.namespace, pod.address(0));
        talk(&node.namespace, &pod.namespace, pod.address(1));
    }
}

/// Everything that could be left behind on a node.
fn census(node: &Node) -> String {
    let mut text = String::new();
    for line in
        ["ip -o link show", "ip -o addr show", "ip route", "ip -6 route", "ip neigh", "nft -s list ruleset"]
    {
        text += &node.namespace.command(line);
    }
    text += &node.records().join("\n");
    // What depends on whether a pod is there at the moment, and the second that IPv6 waits for a
    // duplicate.
    for word in
        ["linkdown ", "tentative ", "NO-CARRIER,", ",LOWER_UP", "state UP", "state DOWN", "state UNKNOWN"]
    {
        text = text.replace(word, "");
    }
    text
}

#[test]
fn after_200_cycles_the_node_is_as_before() {
    let node = Node::new();
    let warm = node.attach(0);
    talk(&node.namespace, &warm.namespace, warm.address(0));
    node.bridge.detach(&warm.id).unwrap();
    drop(warm);
    node.namespace.command("ip neigh flush all");
    let open_files = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = census(&node);
    let files_before = open_files();
    for number in 1..=200 {
        let pod = node.attach(number);
        if number % 2 == 0 {
            node.bridge.detach(&pod.id).unwrap();
        } else {
            drop(pod.namespace);
            node.bridge.release(&pod.id).unwrap();
        }
    }
    wait_until(|| !node.bridge.clear_released().unwrap());
    node.wait_for_interfaces(&["berth0", "lo"]);
    assert_eq!(census(&node), before);
    // Other tests run in this process too, and hold at most some dozens of files; 200 leaked ones
    // would show.
    assert!(open_files() < files_before + 150);
}

#[test]
fn a_flushed_firewall_is_noticed_and_repaired() {
    let node = Node::new();
    let pod = node.attach(1);
    let ready = || node.namespace.run(|| node.bridge.ready());
    ready().unwrap();
    let rules = node.namespace.command("nft -s list ruleset");
    for family in ["inet", "bridge"] {
        for change in [
            format!("nft delete table {family} berth-berth0"),
            // The table is there, and nothing in it.
            format!("nft flush table {family} berth-berth0"),
            format!("nft insert rule {family} berth-berth0 prerouting accept"),
        ] {
            node.namespace.command(&change);
            assert!(matches!(ready(), Err(NotReady::FirewallChanged { .. })), "{change}");
            node.namespace.run(|| node.bridge.repair()).unwrap();
            ready().unwrap();
        }
    }
    node.namespace.command("nft flush ruleset");
    assert!(matches!(ready(), Err(NotReady::FirewallChanged { .. })));
    // Until then no pod starts without its guard; one that ends is not held up.
    assert!(matches!(node.try_attach(2, &Namespace::new()), Err(Error::Guard { .. })));
    node.bridge.detach(&id(2)).unwrap();
    node.namespace.run(|| node.bridge.repair()).unwrap();
    ready().unwrap();
    assert_eq!(node.namespace.command("nft -s list ruleset"), rules);
    talk(&node.namespace, &pod.namespace, pod.address(0));
}

#[test]
fn a_bridge_that_is_down_or_deleted_or_without_forwarding_is_noticed_and_repaired() {
    let node = Node::new();
    let (first, second) = (node.attach(1), node.attach(2));
    let ready = || node.namespace.run(|| node.bridge.ready());
    let repair = || node.namespace.run(|| node.bridge.repair()).unwrap();

    node.namespace.command("ip link set berth0 down");
    assert!(matches!(ready(), Err(NotReady::BridgeChanged { .. })));
    repair();
    ready().unwrap();

    node.namespace.command("ip link delete berth0");
    assert!(matches!(ready(), Err(NotReady::BridgeGone { .. })));
    node.try_attach(3, &Namespace::new()).unwrap_err();
    repair();
    ready().unwrap();
    // The pods that were there are ports of the new bridge.
    for family in [0, 1] {
        talk(&first.namespace, &second.namespace, second.address(family));
        talk(&node.namespace, &first.namespace, first.address(family));
    }

    node.namespace.run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "0")).unwrap();
    assert!(matches!(ready(), Err(NotReady::ForwardingOff)));
    repair();
    ready().unwrap();
}

#[test]
fn setting_up_again_keeps_living_pods_and_their_addresses() {
    let node = Node::new();
    let pod = node.attach(1);
    // Not those of one link only: the kernel adds them whenever it likes.
    let addresses = || node.namespace.command("ip -o addr show scope global");
    let before = addresses();
    let again =
        node.namespace.run(|| Bridge::set_up(BridgeConfig::default(), node.directory.path())).unwrap();
    assert_eq!(addresses(), before);
    assert_eq!(again.addresses_of(&pod.id), pod.attachment.addresses);
    talk(&node.namespace, &pod.namespace, pod.address(0));
    again.detach(&pod.id).unwrap();
    assert_eq!(node.interfaces(), ["berth0", "lo"]);
}

#[test]
fn another_subnet_takes_the_place_of_the_old_gateway_address() {
    let node = Node::new();
    let other = BridgeConfig { ipv4: "10.77.0.0/24".parse().unwrap(), ipv6: None, ..BridgeConfig::default() };
    node.namespace.run(|| Bridge::set_up(other, node.directory.path())).unwrap();
    let shown = node.namespace.command("ip addr show berth0");
    assert!(shown.contains("10.77.0.1/24") && !shown.contains("10.88") && !shown.contains("fd62"), "{shown}");
}

#[test]
fn another_subnet_does_not_cut_off_the_pods_in_the_old_one() {
    let node = Node::new();
    let outside = uplink(&node);
    let (first, second) = (node.attach(1), node.attach(2));
    let config = BridgeConfig {
        ipv4: "10.77.0.0/24".parse().unwrap(),
        ipv6: Some("fd00:77::/64".parse().unwrap()),
        ..BridgeConfig::default()
    };
    let set_up = || node.namespace.run(|| Bridge::set_up(config.clone(), node.directory.path())).unwrap();
    let bridge = set_up();
    let namespace = Namespace::new();
    let mut inside = namespace.run(open_in_pod).unwrap();
    let third = bridge.attach(&id(3), &[], &mut inside, namespace.0.as_fd()).unwrap();
    drop(inside);
    assert_eq!(third.addresses[0].to_string(), "10.77.0.2/24");
    for (family, (beyond, source)) in
        [("192.0.2.2", "192.0.2.1"), ("2001:db8::2", "2001:db8::1")].into_iter().enumerate()
    {
        talk(&first.namespace, &second.namespace, second.address(family));
        talk(&first.namespace, &namespace, third.addresses[family].address);
        talk(&namespace, &first.namespace, first.address(family));
        for pod in [&first.namespace, &namespace] {
            assert_eq!(talk(pod, &outside, beyond.parse().unwrap()).to_string(), source);
        }
    }
    // The old gateways go when no pod needs them.
    for pod in [&first, &second] {
        bridge.detach(&pod.id).unwrap();
    }
    set_up();
    let shown = node.namespace.command("ip addr show berth0");
    assert!(shown.contains("10.77.0.1/24") && !shown.contains("10.88") && !shown.contains("fd62"), "{shown}");
}

#[test]
fn subnets_change_under_running_pods_and_only_if_the_node_has_room_for_them() {
    let node = Node::new();
    let outside = uplink(&node);
    let first = node.attach(1);
    let before = node.namespace.command("ip -o address show dev berth0");
    let taken = Subnets { ipv4: "192.0.2.0/25".parse().unwrap(), ipv6: None };
    let refused = node.namespace.run(|| node.bridge.change_subnets(taken)).unwrap_err();
    assert!(matches!(&refused, Error::SubnetTaken { interface, .. } if interface == "up0"), "{refused}");
    assert_eq!(node.namespace.command("ip -o address show dev berth0"), before);
    let second = node.attach(2);
    assert_eq!(second.attachment.addresses[0].to_string(), "10.88.0.3/16");

    let given = Subnets { ipv4: "10.244.3.0/24".parse().unwrap(), ipv6: None };
    node.namespace.run(|| node.bridge.change_subnets(given)).unwrap();
    assert_eq!(node.bridge.subnets(), given);
    let third = node.attach(3);
    let addresses: Vec<_> = third.attachment.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.244.3.2/24"]);
    for (from, to) in [(&first, &third), (&third, &second), (&second, &first)] {
        assert_eq!(talk(&from.namespace, &to.namespace, to.address(0)), from.address(0));
    }
    talk(&first.namespace, &second.namespace, second.address(1));
    for pod in [&first, &third] {
        let source = talk(&pod.namespace, &outside, "192.0.2.2".parse().unwrap());
        assert_eq!(source.to_string(), "192.0.2.1");
    }
    node.namespace.run(|| node.bridge.ready()).unwrap();
    // The old gateways go when no pod needs them.
    for pod in [&first, &second] {
        node.bridge.detach(&pod.id).unwrap();
    }
    node.namespace.run(|| node.bridge.repair()).unwrap();
    let shown = node.namespace.command("ip addr show berth0");
    assert!(
        shown.contains("10.244.3.1/24") && !shown.contains("10.88") && !shown.contains("fd62"),
        "{shown}"
    );
}

#[test]
fn the_traffic_of_a_pod_is_limited_each_way_and_that_of_others_is_not() {
    let node = Node::new();
    let (limited, other) = (node.attach(1), node.attach(2));
    let shown = |namespace: &Namespace, interface: &str| {
        namespace.command(&format!("tc -s qdisc show dev {interface}"))
    };
    let shape = |ingress, egress| {
        let mut inside = limited.namespace.run(open_in_pod).unwrap();
        node.bridge.shape(&limited.id, Bandwidth { ingress, egress }, &mut inside).unwrap();
    };
    shape(Some(8_000_000), None);
    let host_end = &limited.attachment.host_interface;
    let received = shown(&node.namespace, host_end);
    assert!(received.contains("qdisc tbf") && received.contains("rate 8Mbit burst 128Kb"), "{received}");
    assert!(!shown(&limited.namespace, "eth0").contains("tbf"));
    shape(Some(1_000_000_000_000), Some(40_000_000_000));
    assert!(shown(&node.namespace, host_end).contains("rate 1Tbit"), "{}", shown(&node.namespace, host_end));
    let sent = shown(&limited.namespace, "eth0");
    assert!(sent.contains("qdisc tbf") && sent.contains("rate 40Gbit"), "{sent}");
    assert!(!shown(&node.namespace, &other.attachment.host_interface).contains("tbf"));
    talk(&node.namespace, &limited.namespace, limited.address(0));
    talk(&limited.namespace, &other.namespace, other.address(1));

    // What is more than its share is dropped, on the way out and in.
    shape(Some(8_000), Some(8_000));
    let flood = |from: &Namespace, to: IpAddr| {
        // What waits in the queue may be all that one socket can send.
        for _ in 0..10 {
            let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
            let socket = from.run(|| UdpSocket::bind(any)).unwrap();
            socket.set_nonblocking(true).unwrap();
            (0..100).for_each(|_| drop(socket.send_to(&[0; 1400], SocketAddr::new(to, 9))));
        }
    };
    flood(&limited.namespace, other.address(0));
    flood(&other.namespace, limited.address(0));
    for (namespace, interface) in [(&limited.namespace, "eth0"), (&node.namespace, host_end.as_str())] {
        let shown = shown(namespace, interface);
        let dropped = shown.split("dropped ").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
        assert!(dropped.parse::<u64>().unwrap() > 100, "{shown}");
    }
}

#[test]
fn no_change_of_subnets_gives_the_node_the_address_of_a_pod_or_a_pod_that_of_the_node() {
    let node = Node::with(BridgeConfig { ipv4: "10.91.0.0/24".parse().unwrap(), ..BridgeConfig::default() });
    let pods: Vec<Pod> = (1..=4).map(|number| node.attach(number)).collect();
    assert_eq!(pods[3].address(0).to_string(), "10.91.0.5");
    let change = |ipv4: &str| {
        let subnets = Subnets { ipv4: ipv4.parse().unwrap(), ipv6: None };
        node.namespace.run(|| node.bridge.change_subnets(subnets))
    };
    let refused = change("10.91.0.4/30").unwrap_err();
    assert!(matches!(&refused, Error::GatewayTaken { .. }), "{refused}");
    assert!(refused.to_string().contains("10.91.0.5/30"), "{refused}");
    node.bridge.detach(&pods[3].id).unwrap();
    change("10.91.0.4/30").unwrap();
    let small = node.attach(5);
    assert_eq!(small.address(0).to_string(), "10.91.0.6");
    // The bridge keeps 10.91.0.5 for the pod on the small network.
    change("10.91.0.0/24").unwrap();
    for pod in &pods[..3] {
        node.bridge.detach(&pod.id).unwrap();
    }
    let addresses: Vec<String> = (6..=10).map(|number| node.attach(number).address(0).to_string()).collect();
    assert!(!addresses.contains(&"10.91.0.5".to_owned()), "{addresses:?}");
    talk(&small.namespace, &node.namespace, "10.91.0.5".parse().unwrap());
}

#[test]
fn pods_keep_their_addresses_towards_the_networks_of_other_nodes() {
    let node = Node::with(BridgeConfig {
        non_masquerade: vec!["10.88.0.0/8".parse().unwrap(), "192.0.2.2/32".parse().unwrap()],
        ..BridgeConfig::default()
    });
    let outside = uplink(&node);
    let pod = node.attach(1);
    // The other nodes know the way back.
    outside.command("ip route add 10.88.0.0/16 via 192.0.2.1");
    outside.command("ip address add 192.0.2.3/24 dev out0");
    let source = |address: &str| talk(&pod.namespace, &outside, address.parse().unwrap()).to_string();
    assert_eq!(source("192.0.2.2"), pod.address(0).to_string());
    assert_eq!(source("192.0.2.3"), "192.0.2.1");
    assert_eq!(source("2001:db8::2"), "2001:db8::1");
}

#[test]
fn what_belongs_to_others_is_not_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let namespace = Namespace::new();
    let set_up = || namespace.run(|| Bridge::set_up(BridgeConfig::default(), directory.path())).unwrap_err();
    namespace.command("ip link add berth0 type bridge");
    assert!(matches!(set_up(), Error::BridgeTaken { .. }));
    namespace.command("ip link delete berth0");

    namespace.command("ip link add podman0 type bridge");
    namespace.command("ip addr add 10.88.0.1/16 dev podman0");
    let error = set_up();
    assert!(matches!(&error, Error::SubnetTaken { interface, .. } if interface == "podman0"), "{error:?}");
    assert_eq!(namespace.command("nft list ruleset"), "");
    assert!(!namespace.command("ip -o link show").contains("berth0"));

    // A network that the subnet is a part of: hosts of it would be out of reach.
    namespace.command("ip link delete podman0");
    namespace.command("ip link add lan0 type bridge");
    namespace.command("ip addr add 10.1.2.3/8 dev lan0");
    let error = set_up();
    assert!(matches!(&error, Error::SubnetWithin { .. }), "{error:?}");
    assert!(
        error.to_string().contains("10.88.0.0/16 is a part of the network of interface lan0 (10.1.2.3/8)")
    );
    assert!(!namespace.command("ip -o link show").contains("berth0"));
    // A host route is no network.
    namespace.command("ip addr del 10.1.2.3/8 dev lan0");
    namespace.command("ip addr add 10.1.2.3/32 dev lan0");
    let daemon = || namespace.run(|| Bridge::set_up(BridgeConfig::default(), directory.path()));
    daemon().unwrap();
    // A node that is given such an address later keeps its pods.
    namespace.command("ip addr add 10.1.2.3/8 dev lan0");
    daemon().unwrap();
}

#[test]
fn reconcile_removes_the_dead_and_keeps_the_living() {
    let node = Node::new();
    let pods: Vec<Pod> = (1..=4).map(|number| node.attach(number)).collect();
    // One died with its link, one with its records, one with both left behind.
    node.namespace.command(&format!("ip link delete {}", pods[0].attachment.host_interface));
    for family in [0, 1] {
        fs::remove_file(node.directory.path().join("berth0").join(pods[1].address(family).to_string()))
            .unwrap();
    }
    let set_up = || Bridge::set_up(BridgeConfig::default(), node.directory.path());
    let bridge = node.namespace.run(set_up).unwrap();
    let result = bridge.reconcile([pods[3].id.as_str()]).unwrap();
    assert_eq!((result.addresses.len(), result.interfaces.len()), (4, 2));
    let mut expected = vec!["berth0".to_owned(), pods[3].attachment.host_interface.clone(), "lo".to_owned()];
    expected.sort();
    assert_eq!(node.interfaces(), expected);
    talk(&node.namespace, &pods[3].namespace, pods[3].address(1));
    assert_eq!(bridge.reconcile([pods[3].id.as_str()]).unwrap(), Default::default());
}

#[test]
fn a_bridge_with_pods_of_somebody_else_is_refused_and_left_as_it_is() {
    let node = Node::new();
    let pod = node.attach(1);
    let other = tempfile::tempdir().unwrap();
    let config = BridgeConfig { ipv4: "10.77.0.0/24".parse().unwrap(), ..BridgeConfig::default() };
    let refused = node.namespace.run(|| Bridge::set_up(config.clone(), other.path())).unwrap_err();
    assert!(
        matches!(&refused, Error::BridgeShared { interface, .. } if *interface == pod.attachment.host_interface)
    );
    assert!(refused.to_string().contains("set network.bridge and network.ipv4"), "{refused}");
    assert!(!node.namespace.command("ip address").contains("10.77."));
    talk(&node.namespace, &pod.namespace, pod.address(0));
    // Its own daemon comes back to it; and when the pod has gone, so may the other.
    node.namespace.run(|| Bridge::set_up(BridgeConfig::default(), node.directory.path())).unwrap();
    node.bridge.detach(&pod.id).unwrap();
    node.namespace.run(|| Bridge::set_up(BridgeConfig::default(), other.path())).unwrap();
}

#[test]
fn a_pod_whose_address_records_are_lost_gets_them_back_from_its_daemon() {
    let node = Node::new();
    let pods: Vec<Pod> = (1..=2).map(|number| node.attach(number)).collect();
    let addresses =
        |pod: &Pod| pod.attachment.addresses.iter().map(|found| found.address).collect::<Vec<_>>();
    let known = |pod: &Pod| Known { addresses: addresses(pod), ..Known::default() };
    let known: BTreeMap<_, _> = pods.iter().map(|pod| (pod.id.clone(), known(pod))).collect();
    let directory = node.directory.path().join("berth0");
    // One record is emptied, one names no sandbox, the others are gone.
    fs::remove_dir_all(&directory).unwrap();
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join(pods[0].address(0).to_string()), "").unwrap();
    fs::write(directory.join(pods[1].address(0).to_string()), id(77)).unwrap();
    let set_up = || Bridge::set_up_for(BridgeConfig::default(), node.directory.path(), &known);
    let bridge = node.namespace.run(set_up).unwrap();
    bridge.reconcile(known.keys().map(String::as_str)).unwrap();
    for pod in &pods {
        let owned: Vec<_> = bridge.addresses_of(&pod.id).iter().map(|found| found.address).collect();
        assert_eq!(owned, addresses(pod));
        talk(&node.namespace, &pod.namespace, pod.address(0));
    }
}

#[test]
fn two_bridges_on_one_node_keep_out_of_each_others_way() {
    let node = Node::new();
    let config = BridgeConfig {
        name: BridgeName::new("other0").unwrap(),
        ipv4: "10.77.0.0/24".parse().unwrap(),
        ipv6: Some("fd00:77::/64".parse().unwrap()),
        ..BridgeConfig::default()
    };
    let other = node.namespace.run(|| Bridge::set_up(config, node.directory.path())).unwrap();
    let pod = node.attach(1);
    let stranger = Namespace::new();
    let mut inside = stranger.run(open_in_pod).unwrap();
    // The same id on both: interfaces differ in the bridge's digits.
    let attachment = other.attach(&id(1), &[], &mut inside, stranger.0.as_fd()).unwrap();
    talk(&node.namespace, &stranger, attachment.addresses[0].address);
    other.reconcile([]).unwrap();
    other.tear_down().unwrap();
    talk(&node.namespace, &pod.namespace, pod.address(0));
    node.namespace.run(|| node.bridge.ready()).unwrap();
}

#[test]
fn tear_down_removes_everything_once_nobody_is_left() {
    let Node { namespace, directory, bridge } = Node::new();
    let pod = Namespace::new();
    let mut inside = pod.run(open_in_pod).unwrap();
    bridge.attach(&id(1), &[], &mut inside, pod.0.as_fd()).unwrap();
    assert!(matches!(namespace.run(|| bridge.tear_down()), Err(Error::InUse { addresses: 2 })));
    let bridge = namespace.run(|| Bridge::set_up(BridgeConfig::default(), directory.path())).unwrap();
    talk(&namespace, &pod, "10.88.0.2".parse().unwrap());
    bridge.detach(&id(1)).unwrap();
    namespace.run(|| bridge.tear_down()).unwrap();
    assert_eq!(namespace.command("nft list ruleset"), "");
    assert_eq!(namespace.command("ip -o link show").lines().count(), 1);
    assert!(!Path::new(&directory.path().join("berth0")).exists());
}

#[test]
fn on_a_host_without_ipv6_pods_have_ipv4_only_and_no_ipv6_frame_passes() {
    let namespace = Namespace::new();
    for name in ["all", "default"] {
        namespace.run(|| fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1")).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let bridge = namespace.run(|| Bridge::set_up(BridgeConfig::default(), directory.path())).unwrap();
    let node = Node { namespace, directory, bridge };
    let (first, second) = (node.attach(1), node.attach(2));
    assert_eq!(first.attachment.addresses.len(), 1);
    talk(&first.namespace, &second.namespace, second.address(0));
    // Even the pods' own link-local addresses do not meet: router solicitations and neighbour
    // discovery are dropped.
    let before = node.met("bridge", "ether type");
    first.namespace.command("ip addr add fd00::5/64 dev eth0 nodad");
    let socket = first.namespace.run(|| UdpSocket::bind("[fd00::5]:0")).unwrap();
    socket.send_to(b"x", "[fd00::6]:9").unwrap();
    wait_until(|| node.met("bridge", "ether type") > before);
}

#[test]
fn a_pod_cannot_send_from_any_address_but_its_own() {
    let node = Node::new();
    let (pod, peer, third) = (node.attach(1), node.attach(2), node.attach(3));
    assert_eq!(third.address(1).to_string(), "fd62:6572:7468::4");
    let cases = [
        ("198.51.100.7/32", "198.51.100.7:0", 0),
        ("10.88.0.1/32", "10.88.0.1:0", 0),
        ("10.88.0.4/32", "10.88.0.4:0", 0),
        ("2001:db8:1::7/128", "[2001:db8:1::7]:0", 1),
        ("fd62:6572:7468::1/128", "[fd62:6572:7468::1]:0", 1),
        ("fd62:6572:7468::4/128", "[fd62:6572:7468::4]:0", 1),
    ];
    for (address, bind, family) in cases {
        let rule = ["iifname . ip saddr", "iifname . ip6 saddr"][family];
        let receiver =
            peer.namespace.run(|| UdpSocket::bind(SocketAddr::new(peer.address(family), 0))).unwrap();
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        let target = receiver.local_addr().unwrap();
        // The neighbour is known before the address is forged, so that the forged packet is really
        // sent.
        let honest = pod.namespace.run(|| UdpSocket::bind(SocketAddr::new(pod.address(family), 0))).unwrap();
        let mut bytes = [0; 16];
        honest.send_to(b"before", target).unwrap();
        assert_eq!(receiver.recv(&mut bytes).unwrap(), 6);
        pod.namespace
            .command(&format!("ip addr add {address} dev eth0{}", if family == 1 { " nodad" } else { "" }));
        let before = node.met("bridge", rule);
        let forged = pod.namespace.run(|| UdpSocket::bind(bind)).unwrap();
        forged.send_to(b"forged", target).unwrap();
        honest.send_to(b"after", target).unwrap();
        let length = receiver.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"after", "{address} came through");
        assert!(node.met("bridge", rule) > before, "{address}");
        pod.namespace.command(&format!("ip addr del {address} dev eth0"));
    }
}

#[test]
fn a_frame_with_the_mac_address_of_another_pod_does_not_take_its_traffic() {
    let node = Node::new();
    let (pod, victim) = (node.attach(1), node.attach(2));
    let gateway: IpAddr = "10.88.0.1".parse().unwrap();
    talk(&node.namespace, &victim.namespace, victim.address(0));
    let before = node.met("bridge", "iifname . ether saddr");
    // An honest sender, but for its MAC address: the bridge would send there what is for the
    // victim.
    pod.namespace.command(&format!("ip link set eth0 address {}", victim.attachment.mac));
    let socket = pod.namespace.run(|| UdpSocket::bind(SocketAddr::new(pod.address(0), 0))).unwrap();
    let _ = socket.send_to(b"x", (gateway, 9));
    wait_until(|| node.met("bridge", "iifname . ether saddr") > before);
    talk(&node.namespace, &victim.namespace, victim.address(0));
    let learned = node.namespace.command("bridge fdb show br berth0");
    let wrong = format!("{} dev {}", victim.attachment.mac, pod.attachment.host_interface);
    assert!(!learned.contains(&wrong), "{learned}");
}

/// Makes a pod send to an address in a frame to a group that no bridge forwards, which the firewall
/// of the bridge does not see (`br_handle_frame`).
fn send_by_group(pod: &Pod, group: u8, target: &str) {
    let lladdr = format!("01:80:c2:00:00:{group:02x}");
    pod.namespace.command(&format!("ip neigh replace {target} lladdr {lladdr} dev eth0 nud permanent"));
}

#[test]
fn frames_to_groups_that_no_bridge_forwards_do_not_get_past_the_firewall() {
    let node = Node::with(BridgeConfig { ipv6: None, ..BridgeConfig::default() });
    let (pod, victim) = (node.attach(1), node.attach(2));
    let on_port = "iifname \"bv";
    talk(&node.namespace, &victim.namespace, victim.address(0));
    let service = node.namespace.run(|| UdpSocket::bind("10.88.0.1:53")).unwrap();
    service.set_nonblocking(true).unwrap();
    // Forged senders, one of them with the MAC address of the victim.
    pod.namespace.command("ip addr add 198.51.100.7/32 dev eth0");
    let forged = pod.namespace.run(|| UdpSocket::bind("198.51.100.7:53")).unwrap();
    for (group, mac) in
        [(0x0e, &victim.attachment.mac), (0x03, &victim.attachment.mac), (0x0e, &pod.attachment.mac)]
    {
        pod.namespace.command(&format!("ip link set eth0 address {mac}"));
        send_by_group(&pod, group, "10.88.0.1");
        let before = node.met("inet", on_port);
        forged.send_to(b"forged", "10.88.0.1:53").unwrap();
        wait_until(|| node.met("inet", on_port) > before);
        assert_eq!(service.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::WouldBlock);
        let learned = node.namespace.command("bridge fdb show br berth0");
        let wrong = format!("{} dev {}", victim.attachment.mac, pod.attachment.host_interface);
        assert!(!learned.contains(&wrong), "{learned}");
        talk(&node.namespace, &victim.namespace, victim.address(0));
    }

    // The port itself has IPv6, though pods have none, and would take a router's advertisement.
    let shown = node.namespace.command(&format!("ip -6 -o addr show dev {}", pod.attachment.host_interface));
    let port = shown.split_whitespace().find_map(|word| word.strip_suffix("/64")).unwrap().to_owned();
    let IpAddr::V6(target) = port.parse::<IpAddr>().unwrap() else { panic!("{port}") };
    let link = pod.namespace.command("ip -o link show eth0");
    let index = link.split(':').next().unwrap().parse().unwrap();
    pod.namespace.command("ip addr add fe80::bad/64 dev eth0 nodad");
    send_by_group(&pod, 0x0e, &port);
    let sender = pod.namespace.run(|| {
        let kind = (SockType::Raw, SockProtocol::IcmpV6);
        let socket = socket::socket(AddressFamily::Inet6, kind.0, SockFlag::SOCK_CLOEXEC, kind.1).unwrap();
        setsockopt(&socket, sockopt::Ipv6Ttl, &255).unwrap();
        socket
    });
    // Router for 1,800 s (RFC 4861, 4.2). The kernel sets the checksum.
    let mut advertisement = [0_u8; 16];
    (advertisement[0], advertisement[6], advertisement[7]) = (134, 7, 8);
    let before = node.met("inet", on_port);
    let target = SockaddrIn6::from(SocketAddrV6::new(target, 0, 0, index));
    socket::sendto(sender.as_raw_fd(), &advertisement, &target, MsgFlags::empty()).unwrap();
    wait_until(|| node.met("inet", on_port) > before);
    let routes = node.namespace.command("ip -6 route show default");
    assert_eq!(routes, "");
}

#[test]
fn a_pod_that_claims_the_address_of_the_gateway_or_of_another_pod_does_not_get_its_traffic() {
    let node = Node::new();
    let (pod, victim, third) = (node.attach(1), node.attach(2), node.attach(3));
    let gateway_mac = identity::bridge_mac(&BridgeName::default()).to_string();
    let cases = [
        (["10.88.0.1", "fd62:6572:7468::1"], gateway_mac),
        (["10.88.0.4", "fd62:6572:7468::4"], third.attachment.mac.to_string()),
    ];
    for (addresses, owner) in cases {
        pod.namespace.command(&format!("ip addr add {}/32 dev eth0", addresses[0]));
        pod.namespace.command(&format!("ip addr add {}/128 dev eth0 nodad", addresses[1]));
        let rules = ["arp saddr ip", "icmpv6 type nd-neighbor-advert"];
        let before = rules.map(|rule| node.met("bridge", rule));
        // The victim asks for both addresses; the pod answers too, and its answers are dropped.
        for (address, bind) in addresses.into_iter().zip(["0.0.0.0:0", "[::]:0"]) {
            let socket = victim.namespace.run(|| UdpSocket::bind(bind)).unwrap();
            socket.send_to(b"x", (address, 9)).unwrap();
        }
        for (rule, before) in rules.into_iter().zip(before) {
            wait_until(|| node.met("bridge", rule) > before);
        }
        let neighbours = || victim.namespace.command("ip neigh show");
        wait_until(|| neighbours().matches(&owner).count() >= 2);
        assert!(!neighbours().contains(&pod.attachment.mac.to_string()), "{}", neighbours());
    }
}

#[test]
fn router_advertisements_and_redirects_of_a_pod_reach_nobody() {
    let node = Node::new();
    let (pod, peer) = (node.attach(1), node.attach(2));
    let open = || {
        let flags = SockFlag::SOCK_CLOEXEC;
        socket::socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6).unwrap()
    };
    let receiver = peer.namespace.run(open);
    let sender = pod.namespace.run(open);
    setsockopt(&receiver, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(10, 0)).unwrap();
    let IpAddr::V6(target) = peer.address(1) else { panic!("no IPv6 address") };
    let target = SockaddrIn6::from(SocketAddrV6::new(target, 0, 0, 0));
    let (routers, neighbours) = ("icmpv6 type {", "icmpv6 type nd-neighbor-advert");
    let before = (node.met("bridge", routers), node.met("bridge", neighbours));
    // A router advertisement, a redirect, an advertisement of the gateway as a neighbour (RFC 4861,
    // 4.2, 4.5, 4.4), and then an echo reply, which must come through. The kernel sets the
    // checksums.
    for kind in [134_u8, 137, 136, 129] {
        let mut message = [0_u8; 40];
        message[0] = kind;
        message[8..24].copy_from_slice(&"fd62:6572:7468::1".parse::<Ipv6Addr>().unwrap().octets());
        socket::sendto(sender.as_raw_fd(), &message, &target, MsgFlags::empty()).unwrap();
    }
    let seen = || {
        let mut bytes = [0_u8; 40];
        let length = socket::recv(receiver.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
        assert!(length > 0);
        bytes
    };
    // Honest neighbour discovery between the two (135, 136) is as it should be.
    let mut messages = vec![seen()];
    while messages.last().is_none_or(|message| message[0] != 129) {
        messages.push(seen());
    }
    let forged =
        |message: &[u8; 40]| matches!(message[0], 134 | 137) || message[0] == 136 && message[23] == 1;
    assert!(!messages.iter().any(forged), "{messages:?}");
    assert_eq!((node.met("bridge", routers), node.met("bridge", neighbours)), (before.0 + 2, before.1 + 1));
}

#[test]
fn the_counters_of_a_pod_count_what_it_sends_and_receives() {
    let node = Node::new();
    let pod = node.attach(1);
    let eth0 = || {
        let all = interfaces::counters(pod.namespace.run(Netlink::open).unwrap()).unwrap();
        assert!(all.iter().any(|interface| interface.name == "lo"));
        all.into_iter().find(|interface| interface.name == POD_INTERFACE).unwrap()
    };
    let before = eth0();
    let receiver = node.namespace.run(|| UdpSocket::bind("10.88.0.1:0")).unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let target = receiver.local_addr().unwrap();
    let sender = pod.namespace.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    for _ in 0..100 {
        sender.send_to(&[0; 1000], target).unwrap();
        assert_eq!(receiver.recv(&mut [0; 2000]).unwrap(), 1000);
    }
    let after = eth0();
    let (bytes, packets) = (after.tx_bytes - before.tx_bytes, after.tx_packets - before.tx_packets);
    // 1000 bytes and 42 of headers in each; ARP and neighbour discovery may add a little.
    assert!(
        (104_200..110_000).contains(&bytes) && (100..140).contains(&packets),
        "{bytes} bytes, {packets} packets"
    );
    assert_eq!((after.tx_errors, after.rx_errors, after.tx_dropped), (0, 0, 0));
    // A pod that may make interfaces does not make its counters a long list.
    let made = pod.namespace.run(|| {
        let script = "for i in $(seq 100); do ip link add d$i type veth peer name p$i; done";
        Command::new("sh").args(["-ec", script]).status().unwrap()
    });
    assert!(made.success());
    let all = interfaces::counters(pod.namespace.run(Netlink::open).unwrap()).unwrap();
    assert_eq!(all.len(), interfaces::MAX_INTERFACES);
    assert!(all.iter().any(|interface| interface.name == POD_INTERFACE));
}

#[test]
fn loopback_alone_can_be_brought_up() {
    let namespace = Namespace::new();
    let refused = namespace.run(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", "127.0.0.1:9"));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    let mut inside = namespace.run(Netlink::open).unwrap();
    Bridge::loopback_up(&mut inside).unwrap();
    talk(&namespace, &namespace, "127.0.0.1".parse().unwrap());
}

#[test]
#[ignore = "a measurement: cargo test --release -p berth-network --test bridge -- --ignored --nocapture"]
#[expect(clippy::print_stdout, reason = "printing is what it is for")]
fn how_long_it_takes() {
    let node = Node::new();
    let (mut open, mut attach, mut detach, mut release) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for number in 0..100 {
        let namespace = Namespace::new();
        let mut inside = namespace.run(|| {
            let begin = Instant::now();
            let inside = open_in_pod().unwrap();
            open.push(begin.elapsed());
            inside
        });
        let begin = Instant::now();
        node.bridge.attach(&id(number), &[], &mut inside, namespace.0.as_fd()).unwrap();
        attach.push(begin.elapsed());
        drop(inside);
        if number % 2 == 0 {
            let begin = Instant::now();
            node.bridge.detach(&id(number)).unwrap();
            detach.push(begin.elapsed());
        } else {
            let begin = Instant::now();
            drop(namespace);
            node.bridge.release(&id(number)).unwrap();
            release.push(begin.elapsed());
        }
    }
    let pods: Vec<Pod> = (1000..1032).map(|number| node.attach(number)).collect();
    let begin = Instant::now();
    thread::scope(|scope| {
        for part in pods.chunks(4) {
            let node = &node;
            scope.spawn(move || part.iter().for_each(|pod| node.bridge.detach(&pod.id).unwrap()));
        }
    });
    println!("32 detached by 8 threads in {:?}", begin.elapsed());
    let mut ready = Vec::new();
    node.namespace.run(|| {
        for _ in 0..100 {
            let begin = Instant::now();
            node.bridge.ready().unwrap();
            ready.push(begin.elapsed());
        }
    });
    for (name, mut times) in [
        ("open in pod", open),
        ("attach", attach),
        ("detach", detach),
        ("release", release),
        ("ready", ready),
    ] {
        times.sort();
        println!("{name:12} median {:?}  longest {:?}", times[times.len() / 2], times[times.len() - 1]);
    }
}
