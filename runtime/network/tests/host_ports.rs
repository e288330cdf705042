//! Ports of the node that lead to pods, against the real kernel, as root.

#![expect(clippy::unwrap_used, reason = "a test that cannot prepare its ground should fail at that line")]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::thread;

use berth_network::bridge::{Error, open_in_pod};
use berth_network::{Bridge, BridgeConfig, HostPort, Known, Protocol, firewall, nft};

use common::{Namespace, Node, PATIENCE, Pod, id, talk, uplink, wait_until};

/// A host port on all addresses that leads to port 80.
fn port(protocol: Protocol, host_port: u16) -> HostPort {
    HostPort { protocol, address: None, host_port, container_port: 80 }
}

/// Answers each TCP connection to port 80 in a namespace with the address that it came from, as
/// long as the test lives.
fn serve(namespace: &Namespace) {
    let listener = namespace.run(|| TcpListener::bind("[::]:80")).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let source = stream.peer_addr().unwrap().ip().to_canonical();
            let _ = (&stream).write_all(source.to_string().as_bytes());
        }
    });
}

/// What a server at an address says: whom it sees. `None` if the connection is refused or nothing
/// answers.
fn ask(from: &Namespace, target: &str) -> Option<String> {
    let target: SocketAddr = target.parse().unwrap();
    let mut stream = from.run(|| TcpStream::connect_timeout(&target, PATIENCE)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    Some(text)
}

fn is_refused(from: &Namespace, target: &str) -> bool {
    let target: SocketAddr = target.parse().unwrap();
    let error = from.run(|| TcpStream::connect_timeout(&target, PATIENCE)).map(drop).unwrap_err();
    error.kind() == std::io::ErrorKind::ConnectionRefused
}

/// Everybody who can reach a host port 8080 on all addresses, and whom the pod sees then.
fn assert_reachable(node: &Node, outside: &Namespace, pod: &Pod, other: &Pod, seen_of_other: [&str; 2]) {
    let said = |from: &Namespace, target: &str| {
        ask(from, target).unwrap_or_else(|| panic!("nothing answers at {target}"))
    };
    for (family, (address, gateway)) in
        [("192.0.2.1", "10.88.0.1"), ("[2001:db8::1]", "[fd62:6572:7468::1]")].into_iter().enumerate()
    {
        let bare = |text: &str| text.trim_matches(['[', ']']).to_owned();
        let outer = ["192.0.2.2", "2001:db8::2"][family];
        assert_eq!(said(outside, &format!("{address}:8080")), outer);
        for address in [address, gateway] {
            let target = format!("{address}:8080");
            assert_eq!(said(&node.namespace, &target), bare(address));
            assert_eq!(said(&other.namespace, &target), seen_of_other[family]);
            // The pod itself, which would not answer its own address.
            assert_eq!(said(&pod.namespace, &target), bare(gateway));
        }
    }
    assert_eq!(said(&node.namespace, "127.0.0.1:8080"), "10.88.0.1");
    // A client that tries ::1 first goes on with 127.0.0.1.
    assert!(is_refused(&node.namespace, "[::1]:8080"));
}

#[test]
fn a_host_port_leads_to_its_pod_from_everywhere() {
    let node = Node::new();
    let outside = uplink(&node);
    let pod = node.attach_with(1, &[port(Protocol::Tcp, 8080)]).unwrap();
    let other = node.attach(2);
    serve(&pod.namespace);
    outside.command("ip route add default via 192.0.2.1");
    let seen = [other.address(0).to_string(), other.address(1).to_string()];
    assert_reachable(&node, &outside, &pod, &other, [&seen[0], &seen[1]]);
    // Only at the node: the same port elsewhere, beyond it, is not taken.
    assert_eq!(talk(&pod.namespace, &outside, "192.0.2.2".parse().unwrap()).to_string(), "192.0.2.1");
    let beyond = outside.run(|| TcpListener::bind("192.0.2.2:8080")).unwrap();
    let client = other.namespace.run(|| TcpStream::connect("192.0.2.2:8080")).unwrap();
    assert_eq!(beyond.accept().unwrap().1.port(), client.local_addr().unwrap().port());
    // With the pod it goes.
    node.bridge.detach(&pod.id).unwrap();
    for target in ["192.0.2.1:8080", "[2001:db8::1]:8080"] {
        assert!(is_refused(&outside, target) && is_refused(&node.namespace, target), "{target}");
    }
    assert!(is_refused(&node.namespace, "127.0.0.1:8080"));
}

#[test]
fn a_node_whose_bridge_is_not_tracked_has_host_ports_too() {
    let node = Node::new();
    let outside = uplink(&node);
    let pod = node.attach_with(1, &[port(Protocol::Tcp, 8080)]).unwrap();
    let other = node.attach(2);
    serve(&pod.namespace);
    // As on a kernel without br_netfilter.
    for name in ["iptables", "ip6tables"] {
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{name}");
        let _ = node.namespace.run(|| std::fs::write(path, "0"));
    }
    node.namespace.command("ip link set berth0 type bridge nf_call_iptables 0 nf_call_ip6tables 0");
    let attached = |pod: &Pod, host_ports| firewall::Port {
        interface: pod.attachment.host_interface.clone(),
        addresses: pod.attachment.addresses.iter().map(|found| found.address).collect(),
        host_ports,
    };
    let pods = [attached(&pod, vec![port(Protocol::Tcp, 8080)]), attached(&other, Vec::new())];
    let subnet = |text: &str, prefix| berth_network::config::InterfaceAddress {
        address: text.parse().unwrap(),
        prefix,
    };
    let setting = firewall::rules::Setting {
        bridge: node.bridge.name(),
        subnets: &[subnet("10.88.0.1", 16), subnet("fd62:6572:7468::1", 64)],
        non_masquerade: &[],
        tracks_bridged: false,
    };
    let rules = firewall::rules::installation(setting, &pods);
    node.namespace.run(|| nft::apply(&rules)).unwrap();
    assert_reachable(&node, &outside, &pod, &other, ["10.88.0.1", "fd62:6572:7468::1"]);
}

#[test]
fn a_host_port_on_one_address_leads_to_its_pod_from_there_only() {
    let node = Node::new();
    let outside = uplink(&node);
    node.namespace.command("ip addr add 192.0.2.9/24 dev up0");
    let bound = |text: &str, host_port| HostPort {
        address: Some(text.parse().unwrap()),
        ..port(Protocol::Tcp, host_port)
    };
    let ports = [
        bound("192.0.2.9", 8080),
        bound("2001:db8::1", 8080),
        bound("127.0.0.1", 8081),
        bound("0.0.0.0", 8082),
        bound("::", 8083),
    ];
    let pod = node.attach_with(1, &ports).unwrap();
    serve(&pod.namespace);
    for target in ["192.0.2.9:8080", "[2001:db8::1]:8080", "192.0.2.1:8082", "[2001:db8::1]:8083"] {
        assert!(ask(&outside, target).is_some() && ask(&node.namespace, target).is_some(), "{target}");
        // The pod itself, too.
        assert!(ask(&pod.namespace, target).is_some(), "{target}");
    }
    assert!(ask(&node.namespace, "127.0.0.1:8081").is_some());
    for target in ["192.0.2.1:8080", "192.0.2.9:8081", "[2001:db8::1]:8082", "192.0.2.1:8083"] {
        assert!(is_refused(&outside, target), "{target}");
    }
}

/// A UDP socket at port 80 in a pod.
fn receiver(pod: &Pod) -> UdpSocket {
    let socket = pod.namespace.run(|| UdpSocket::bind("[::]:80")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn a_udp_client_that_keeps_sending_follows_the_port_to_each_new_pod() {
    let node = Node::new();
    let outside = uplink(&node);
    let udp = [port(Protocol::Udp, 5353)];
    for target in ["192.0.2.1:5353", "[2001:db8::1]:5353"] {
        let bind = if target.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let client = outside.run(|| UdpSocket::bind(bind)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        // Tracked before any host port is there. A listener, so that it is not refused.
        let target: SocketAddr = target.parse().unwrap();
        let host = node.namespace.run(|| UdpSocket::bind(target)).unwrap();
        let mut bytes = [0; 16];
        client.send_to(b"early", target).unwrap();
        let (_, from) = host.recv_from(&mut bytes).unwrap();
        host.send_to(b"host", from).unwrap();
        assert_eq!(client.recv(&mut bytes).unwrap(), 4);
        for number in 1..=3 {
            let pod = node.attach_with(number, &udp).unwrap();
            let server = receiver(&pod);
            client.send_to(b"ping", target).unwrap();
            let (length, from) = server.recv_from(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], b"ping");
            server.send_to(b"answer", from).unwrap();
            assert_eq!(client.recv_from(&mut bytes).unwrap(), (6, target));
            node.bridge.detach(&pod.id).unwrap();
        }
    }
}

#[test]
fn the_second_pod_that_wants_a_port_is_refused_in_words_and_leaves_nothing() {
    let node = Node::new();
    let first = node.attach_with(1, &[port(Protocol::Tcp, 80), port(Protocol::Udp, 80)]).unwrap();
    let (records, interfaces) = (node.records(), node.interfaces());
    let wanted = [port(Protocol::Tcp, 443), port(Protocol::Udp, 80)];
    let error = node.attach_with(2, &wanted).map(drop).unwrap_err();
    assert!(matches!(error, Error::HostPort(_)), "{error:?}");
    assert_eq!(error.to_string(), format!("host port 80/UDP is in use by sandbox {}", first.id));
    assert_eq!((node.records(), node.interfaces()), (records, interfaces));
    assert!(!node.namespace.command("nft list table inet berth-berth0").contains("443"));
    node.bridge.detach(&first.id).unwrap();
    let second = node.attach_with(2, &wanted).unwrap();
    serve(&second.namespace);
    assert!(ask(&node.namespace, "127.0.0.1:443").is_some());
}

#[test]
fn without_ipv6_a_port_on_an_ipv6_address_is_refused() {
    let node = Node::with(BridgeConfig { ipv6: None, ..BridgeConfig::default() });
    let ipv6 = HostPort { address: Some("2001:db8::1".parse().unwrap()), ..port(Protocol::Tcp, 80) };
    let error = node.attach_with(1, &[ipv6]).map(drop).unwrap_err();
    assert!(error.to_string().contains("[2001:db8::1]:80/TCP"), "{error}");
    assert!(node.records().is_empty());
    let pod = node.attach_with(1, &[port(Protocol::Tcp, 80)]).unwrap();
    serve(&pod.namespace);
    assert_eq!(ask(&node.namespace, "127.0.0.1:80").as_deref(), Some("10.88.0.1"));
}

#[test]
fn a_flushed_firewall_gets_its_host_ports_back_also_from_the_next_daemon() {
    let node = Node::new();
    let outside = uplink(&node);
    let ports = [port(Protocol::Tcp, 8080)];
    let pod = node.attach_with(1, &ports).unwrap();
    serve(&pod.namespace);
    let reachable =
        || ask(&outside, "192.0.2.1:8080").is_some() && ask(&node.namespace, "127.0.0.1:8080").is_some();
    assert!(reachable());
    node.namespace.command("nft flush ruleset");
    node.namespace.run(|| node.bridge.repair()).unwrap();
    assert!(reachable());
    node.namespace.command("ip link delete berth0");
    node.namespace.run(|| node.bridge.repair()).unwrap();
    assert!(reachable());
    let addresses = pod.attachment.addresses.iter().map(|found| found.address).collect();
    let known = BTreeMap::from([(pod.id.clone(), Known { addresses, host_ports: ports.to_vec() })]);
    let set_up = || Bridge::set_up_for(BridgeConfig::default(), node.directory.path(), &known);
    let bridge = node.namespace.run(set_up).unwrap();
    assert!(reachable());
    let attach = |ports: &[HostPort]| {
        let namespace = Namespace::new();
        let mut inside = namespace.run(open_in_pod).unwrap();
        bridge.attach(&id(2), ports, &mut inside, namespace.0.as_fd())
    };
    assert!(matches!(attach(&ports), Err(Error::HostPort(_))));
    bridge.detach(&pod.id).unwrap();
    assert!(is_refused(&outside, "192.0.2.1:8080"));
    attach(&ports).unwrap();
}

#[test]
fn no_pod_reaches_the_loopback_of_the_node_by_a_host_port() {
    let node = Node::new();
    let pod = node.attach_with(1, &[port(Protocol::Tcp, 8080)]).unwrap();
    let secret = node.namespace.run(|| UdpSocket::bind("127.0.0.1:9000")).unwrap();
    secret.set_nonblocking(true).unwrap();
    pod.namespace.run(|| std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1")).unwrap();
    pod.namespace.command("ip addr del 127.0.0.1/8 dev lo");
    pod.namespace.command("ip route add 127.0.0.0/8 via 10.88.0.1");
    let sender = pod.namespace.run(|| UdpSocket::bind(SocketAddr::new(pod.address(0), 0))).unwrap();
    let before = node.met("bridge", "ip daddr 127.0.0.0/8");
    sender.send_to(b"x", "127.0.0.1:9000").unwrap();
    wait_until(|| node.met("bridge", "ip daddr 127.0.0.0/8") > before);
    assert_eq!(secret.recv(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    // Without host ports the node does not take such packets at all.
    let localnet = || {
        let path = "/proc/sys/net/ipv4/conf/berth0/route_localnet";
        node.namespace.run(|| std::fs::read_to_string(path)).unwrap().trim().to_owned()
    };
    assert_eq!(localnet(), "1");
    node.bridge.detach(&pod.id).unwrap();
    assert_eq!(localnet(), "0");
}

#[test]
fn no_other_port_of_the_bridge_leads_to_the_loopback_of_the_node() {
    let node = Node::new();
    let _pod = node.attach_with(1, &[port(Protocol::Tcp, 8080)]).unwrap();
    let secret = node.namespace.run(|| UdpSocket::bind("127.0.0.1:9000")).unwrap();
    secret.set_nonblocking(true).unwrap();
    // As a container with CAP_NET_ADMIN can make it, by the number of its interface's peer's
    // namespace.
    let alien = Namespace::new();
    node.namespace.command("ip link add alien0 master berth0 type veth peer name inner0");
    let inside = format!("/proc/{}/fd/{}", std::process::id(), alien.0.as_raw_fd());
    node.namespace.command(&format!("ip link set inner0 netns {inside}"));
    node.namespace.command("ip link set alien0 up");
    alien.command("ip address add 10.88.200.9/16 dev inner0");
    alien.command("ip link set inner0 up");
    alien.run(|| std::fs::write("/proc/sys/net/ipv4/conf/inner0/route_localnet", "1")).unwrap();
    alien.command("ip route add 127.0.0.0/8 via 10.88.0.1");
    let sender = alien.run(|| UdpSocket::bind("10.88.200.9:0")).unwrap();
    let rule = "iifname \"berth0\" ip daddr 127.0.0.0/8";
    let before = node.met("inet", rule);
    sender.send_to(b"x", "127.0.0.1:9000").unwrap();
    wait_until(|| node.met("inet", rule) > before);
    assert_eq!(secret.recv(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_pod_may_have_as_many_ports_as_there_are() {
    let node = Node::new();
    let ports: Vec<HostPort> = (1..=u16::MAX).map(|number| port(Protocol::Tcp, number)).collect();
    let pod = node.attach_with(1, &ports).unwrap();
    serve(&pod.namespace);
    for number in [1, 30_000, u16::MAX] {
        assert!(ask(&node.namespace, &format!("127.0.0.1:{number}")).is_some(), "{number}");
    }
    node.namespace.run(|| node.bridge.repair()).unwrap();
    assert!(ask(&node.namespace, "10.88.0.1:40000").is_some());
    node.bridge.detach(&pod.id).unwrap();
    let table = node.namespace.command("nft list table inet berth-berth0");
    assert!(!table.contains("elements"), "{table}");
}
