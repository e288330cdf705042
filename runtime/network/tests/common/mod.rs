//! Nodes, pods and what is outside, as network namespaces that each test creates for itself. The
//! machine's own network is not touched. Needs `nft` and `ip`.
//!
//! A namespace is entered on its own thread that ends with the visit, so that no other test runs in
//! it by accident.

#![expect(clippy::unwrap_used, reason = "a test that cannot prepare its ground should fail at that line")]
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use berth_network::bridge::{Error, open_in_pod};
use berth_network::{Attachment, Bridge, BridgeConfig, HostPort};
use nix::sched::{CloneFlags, setns, unshare};

/// Longest wait for anything that should be there at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A network namespace that lives as long as this does.
pub(crate) struct Namespace(pub(crate) File);

impl Namespace {
    pub(crate) fn new() -> Self {
        let open = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        };
        thread::spawn(open).join().unwrap()
    }

    /// Runs something on a thread inside.
    pub(crate) fn run<T: Send>(&self, visit: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let visitor = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                visit()
            });
            visitor.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a program inside and returns what it printed.
    pub(crate) fn command(&self, line: &str) -> String {
        let mut words = line.split(' ');
        let program = words.next().unwrap();
        let output = self.run(|| Command::new(program).args(words).output().unwrap());
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// A node: its namespace, its bridge, the directory of its address records.
pub(crate) struct Node {
    pub(crate) namespace: Namespace,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) bridge: Bridge,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self::with(BridgeConfig::default())
    }

    pub(crate) fn with(config: BridgeConfig) -> Self {
        let namespace = Namespace::new();
        let directory = tempfile::tempdir().unwrap();
        namespace.command("ip link set lo up");
        // A new namespace takes over the machine's IPv4 settings, whatever they are
        // (net.core.devconf_inherit_init_net).
        namespace.run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "0")).unwrap();
        let bridge = namespace.run(|| Bridge::set_up(config, directory.path())).unwrap();
        Self { namespace, directory, bridge }
    }

    pub(crate) fn attach(&self, number: u32) -> Pod {
        self.attach_with(number, &[]).unwrap()
    }

    pub(crate) fn try_attach(&self, number: u32, namespace: &Namespace) -> Result<Attachment, Error> {
        let mut inside = namespace.run(open_in_pod)?;
        self.bridge.attach(&id(number), &[], &mut inside, namespace.0.as_fd())
    }

    pub(crate) fn attach_with(&self, number: u32, ports: &[HostPort]) -> Result<Pod, Error> {
        let namespace = Namespace::new();
        let mut inside = namespace.run(open_in_pod)?;
        let attachment = self.bridge.attach(&id(number), ports, &mut inside, namespace.0.as_fd())?;
        Ok(Pod { id: id(number), namespace, attachment })
    }

    pub(crate) fn records(&self) -> Vec<String> {
        let directory = self.directory.path().join(self.bridge.name().as_str());
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn interfaces(&self) -> Vec<String> {
        let list = self.namespace.command("ip -o link show");
        let mut names: Vec<String> =
            list.lines().map(|line| line.split([':', '@']).nth(1).unwrap().trim().to_owned()).collect();
        names.sort();
        names
    }

    /// Waits until the kernel has removed what a dead namespace leaves behind for a moment.
    pub(crate) fn wait_for_interfaces(&self, expected: &[&str]) {
        let end = Instant::now() + PATIENCE;
        while self.interfaces() != expected {
            assert!(Instant::now() < end, "{:?} instead of {expected:?}", self.interfaces());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Packets that the firewall rule with this text has met.
    pub(crate) fn met(&self, family: &str, rule: &str) -> u64 {
        let rules = self.namespace.command(&format!("nft list table {family} berth-berth0"));
        let line = rules.lines().find(|line| line.contains(rule));
        let line = line.unwrap_or_else(|| panic!("no rule {rule:?} in {rules}"));
        line.split("counter packets ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    }
}

pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) namespace: Namespace,
    pub(crate) attachment: Attachment,
}

impl Pod {
    pub(crate) fn address(&self, family: usize) -> IpAddr {
        self.attachment.addresses[family].address
    }
}

/// An id whose first digits differ, as those of real ones do.
pub(crate) fn id(number: u32) -> String {
    format!("{number:08x}").repeat(8)
}

/// Whether a TCP connection from one namespace to an address in another carries bytes both ways;
/// the source the server saw.
pub(crate) fn talk(from: &Namespace, to: &Namespace, address: IpAddr) -> IpAddr {
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(address, 0))).unwrap();
    let target = listener.local_addr().unwrap();
    let client = from.run(|| TcpStream::connect_timeout(&target, PATIENCE));
    let mut client = client.unwrap_or_else(|error| panic!("connect to {target}: {error}"));
    let (mut server, source) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let mut bytes = [0; 4];
    client.write_all(b"ping").unwrap();
    server.read_exact(&mut bytes).unwrap();
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");
    source.ip()
}

/// Joins a node to a namespace outside: the node has .1, the outside .2 of 192.0.2.0/24 and
/// 2001:db8::/64.
pub(crate) fn uplink(node: &Node) -> Namespace {
    let outside = Namespace::new();
    let mut joined = node.namespace.command("ip link add up0 type veth peer name out0");
    // The outside is named by a file descriptor of this process.
    let fd = outside.0.as_raw_fd();
    joined +=
        &node.namespace.command(&format!("ip link set out0 netns /proc/{}/fd/{fd}", std::process::id()));
    assert_eq!(joined, "");
    for (namespace, name, host) in [(&node.namespace, "up0", 1), (&outside, "out0", 2)] {
        namespace.command(&format!("ip addr add 192.0.2.{host}/24 dev {name}"));
        namespace.command(&format!("ip addr add 2001:db8::{host}/64 dev {name} nodad"));
        namespace.command(&format!("ip link set {name} up"));
    }
    outside
}

pub(crate) fn wait_until(condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "the condition was not met in time");
        thread::sleep(Duration::from_millis(5));
    }
}
