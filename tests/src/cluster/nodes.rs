//! Clusters of several nodes on one machine.
//!
//! Each node is a network and a mount namespace with a daemon, a kubelet and a kube-proxy of its
//! own, and has a link to the underlay. The underlay is a bridge in a namespace of its own, in
//! which the control plane runs as well: what is asked from there is asked from outside of the
//! nodes.
//! Nodes route each other's pods, as a cloud's router or a plugin's agent would.
//!
//! ```text
//!  underlay  192.0.2.1   control plane            10.244.N.0/24 by 192.0.2.(10 + N)
//!    ├─ node-1  192.0.2.11   daemon, kubelet, kube-proxy   ── pods 10.244.N.0/24
//!    ├─ node-2  192.0.2.12
//!    └─ ...
//! ```
//!
//! The programs come from `scripts/build-peer etcd kubernetes kubelet coredns cni`. The cluster's
//! DNS is a Deployment (`tests/cluster/nodes/dns.yaml`).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::control_plane::{ControlPlane, Plan, Web, kept, manifest};
use super::servers::Servers;
use super::{kubelet_arguments, kubelet_configuration};
use crate::census::{WORKER, mounts_below, processes_in_network, status_field};
use crate::daemon::{Daemon, SOON, Setup, programs};
use crate::deadline::within;
use crate::host::Host;
use crate::peers;

/// The address of the control plane's host, from which the tests ask.
pub const OUTSIDE: &str = "192.0.2.1";

/// The network of all pods. The control plane gives each node a part of it.
const PODS: &str = "10.244.0.0/16";

/// The link of a node to the underlay.
const UPLINK: &str = "uplink";

/// Time for the control plane to notice something, and to act.
const CONTROL: Duration = Duration::from_secs(120);

/// Where pods get their network from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// The built-in bridge, on the pod CIDR that the kubelet names.
    BuiltIn,
    /// CNI's `bridge`, `host-local` and `portmap`.
    CniBridge,
    /// CNI's `ptp`, `host-local` and `portmap`.
    CniPtp,
}

impl Network {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::BuiltIn, Self::CniBridge, Self::CniPtp];

    /// Its name in the names of tests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BuiltIn => "built-in",
            Self::CniBridge => "cni-bridge",
            Self::CniPtp => "cni-ptp",
        }
    }

    /// Lines for the section `[network]` of `berth.toml`.
    fn setup(self) -> String {
        match self {
            Self::BuiltIn => {
                format!("kind = \"bridge\"\nipv4 = \"pod-cidr\"\nnon_masquerade_cidrs = [\"{PODS}\"]\n")
            }
            Self::CniBridge | Self::CniPtp => "kind = \"cni\"\n".to_owned(),
        }
    }

    /// The CNI configuration of a node.
    fn configuration(self, pods: &str) -> Option<Value> {
        let ipam = json!({
            "type": "host-local",
            "dataDir": "DATA",
            "ranges": [[{ "subnet": pods }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        });
        let plugin = match self {
            Self::BuiltIn => return None,
            Self::CniBridge => json!({
                "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": ipam,
            }),
            Self::CniPtp => json!({ "type": "ptp", "ipam": ipam }),
        };
        let ports =
            json!({ "type": "portmap", "backend": "nftables", "capabilities": { "portMappings": true } });
        Some(json!({ "cniVersion": "1.1.0", "name": "pods", "plugins": [plugin, ports] }))
    }
}

/// What connects the nodes, and the host of the control plane.
#[derive(Debug)]
pub struct Underlay {
    host: Host,
    dir: TempDir,
}

impl Underlay {
    /// An underlay without nodes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("berth-test-").tempdir().context("making a directory")?;
        let host = Host::create(dir.path().join("netns"))?;
        let underlay = Self { host, dir };
        for command in [
            "link add underlay type bridge",
            &format!("address add {OUTSIDE}/24 dev underlay"),
            "link set underlay up",
        ] {
            ip(&underlay.host, command)?;
        }
        Ok(underlay)
    }

    /// Connects a node.
    fn connect(&self, number: usize, node: &Host, address: &str) -> Result<()> {
        let there = node.file().display();
        ip(&self.host, &format!("link add {} type veth peer name {UPLINK} netns {there}", port(number)))?;
        ip(&self.host, &format!("link set {} master underlay up", port(number)))?;
        ip(node, &format!("address add {address}/24 dev {UPLINK}"))?;
        ip(node, &format!("link set {UPLINK} up"))?;
        // The API server and the control plane's address for Services are beyond it.
        ip(node, &format!("route add default via {OUTSIDE}"))
    }
}

impl Drop for Underlay {
    fn drop(&mut self) {
        if let Ok(network) = self.host.number() {
            for pid in processes_in_network(network) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// The underlay's end of a node's link.
fn port(number: usize) -> String {
    format!("node{number}")
}

fn ip(host: &Host, arguments: &str) -> Result<()> {
    host.run("ip", &arguments.split(' ').collect::<Vec<_>>()).map(drop)
}

/// A running cluster, ended and cleaned up after on drop.
#[derive(Debug)]
pub struct Nodes<'a> {
    // In the order of their end.
    nodes: Vec<Node>,
    control: ControlPlane<'a>,
    underlay: &'a Underlay,
}

/// What a cluster has on the machine.
#[derive(Debug)]
pub struct Traces {
    networks: Vec<u64>,
    /// Files and cgroups.
    directories: Vec<PathBuf>,
}

impl Traces {
    /// What is there: processes in its network namespaces, mounts, files, cgroups.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let processes = self.networks.iter().flat_map(|network| processes_in_network(*network));
        let mut left: Vec<String> = processes.map(|pid| format!("process {pid}")).collect();
        for directory in &self.directories {
            left.extend(mounts_below(directory).iter().map(|mount| format!("mount {}", mount.display())));
            left.extend(directory.exists().then(|| format!("directory {}", directory.display())));
        }
        left
    }
}

/// One of its nodes.
#[derive(Debug)]
pub struct Node {
    number: usize,
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// The network of its pods, in CIDR notation.
    pub pods: String,
    // Before the daemon: a kubelet ends first.
    servers: Mutex<Servers>,
    /// A web client on it.
    pub web: Web,
    /// Its daemon.
    pub daemon: Daemon,
}

impl<'a> Nodes<'a> {
    /// Starts a cluster of `count` nodes, and waits until all of them are ready for pods.
    ///
    /// # Errors
    /// When a program is missing (the message says how to build it), a file cannot be written, or a
    /// server does not answer in time (the message ends with the servers' last lines).
    pub fn start(underlay: &'a Underlay, network: Network, count: usize) -> Result<Self> {
        let dir = underlay.dir.path().join("cluster");
        fs::create_dir(&dir).context("making a directory for the control plane")?;
        let name = |number: usize| format!("node-{number}");
        let kubelet = |number| (name(number), format!("system:node:{}", name(number)), "system:nodes");
        let mut callers: Vec<_> = (1..=count).map(kubelet).collect();
        callers.push(("kube-proxy".to_owned(), "system:kube-proxy".to_owned(), ""));
        let plan = Plan {
            address: OUTSIDE,
            callers: &callers,
            // Pods of a node that is gone are replaced soon after that was noticed.
            apiserver: &[
                "--default-not-ready-toleration-seconds=5",
                "--default-unreachable-toleration-seconds=5",
            ],
            controllers: &[
                "--allocate-node-cidrs",
                &format!("--cluster-cidr={PODS}"),
                "--node-cidr-mask-size=24",
            ],
        };
        let control = ControlPlane::start(&underlay.host, dir, plan)?;
        let mut cluster = Self { nodes: Vec::new(), control, underlay };
        for number in 1..=count {
            let node = cluster.add(number, &name(number), network).with_context(|| cluster.last_words())?;
            cluster.nodes.push(node);
            let node = cluster.nodes.last().context("it was added")?;
            node.start_servers(&cluster.control).with_context(|| cluster.last_words())?;
        }
        for number in 1..=count {
            cluster.control.wait_for_node(&name(number)).with_context(|| cluster.last_words())?;
        }
        cluster.route().with_context(|| cluster.last_words())?;
        Ok(cluster)
    }

    /// A node of the cluster with a daemon. Its kubelet will find that it has been registered.
    fn add(&self, number: usize, name: &str, network: Network) -> Result<Node> {
        let object = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } });
        let file = self.control.file("node.json");
        fs::write(&file, object.to_string()).context("writing the node")?;
        self.control.kubectl(&["create", "-f", &file.to_string_lossy()])?;
        let pods = within(CONTROL, "the node is given a pod CIDR", || {
            let node = self.control.get(&format!("/api/v1/nodes/{name}"))?;
            Ok(node.pointer("/spec/podCIDR").and_then(Value::as_str).map(str::to_owned))
        })?;
        let setup = network.setup();
        let daemon = Daemon::start(Setup { network: &setup, own_mounts: true, ..Setup::default() })?;
        let address = format!("192.0.2.{}", 10 + number);
        self.underlay.connect(number, daemon.host(), &address)?;
        if let Some(configuration) = network.configuration(&pods) {
            daemon.install_cni_plugins()?;
            daemon.configure_cni("10-pods.conflist", &configuration.to_string())?;
        }
        let image = programs()?.join("images/demo.tar");
        ensure!(image.exists(), "no {}: run make images", image.display());
        daemon.client().import(&image).context("importing the demo image")?;
        let servers = Mutex::new(Servers::new(daemon.directory("cluster")?));
        let web = Web::on(daemon.host())?;
        let node = Node { number, name: name.to_owned(), address, pods, servers, web, daemon };
        node.write_configurations(&self.control)?;
        Ok(node)
    }

    /// Has everybody find the pods of every node.
    fn route(&self) -> Result<()> {
        for to in &self.nodes {
            let route = format!("route add {} via {}", to.pods, to.address);
            ip(&self.underlay.host, &route)?;
            for from in self.nodes.iter().filter(|from| from.number != to.number) {
                ip(from.daemon.host(), &route)?;
            }
        }
        Ok(())
    }

    /// What it has on the machine now, and should not have after its end.
    ///
    /// # Errors
    /// When a namespace cannot be looked at.
    pub fn traces(&self) -> Result<Traces> {
        let mut traces = Traces {
            networks: vec![self.underlay.host.number()?],
            directories: vec![self.underlay.dir.path().to_owned()],
        };
        for Node { daemon, .. } in &self.nodes {
            traces.networks.push(daemon.host().number()?);
            traces.directories.push(daemon.dir().to_owned());
            traces.directories.extend(daemon.cgroup().directories());
        }
        Ok(traces)
    }

    /// The control plane.
    #[must_use]
    pub fn control(&self) -> &ControlPlane<'a> {
        &self.control
    }

    /// Another web client outside of the nodes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn outside(&self) -> Result<Web> {
        Web::on(&self.underlay.host)
    }

    /// The nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        let node = self.nodes.iter().find(|node| node.name == name);
        node.with_context(|| format!("there is no node {name:?}"))
    }

    /// Ends a node as a power cut does: the link goes down, and everything on it is killed.
    ///
    /// # Errors
    /// When its daemon does not run.
    pub fn vanish(&self, node: &Node) -> Result<()> {
        ip(&self.underlay.host, &format!("link set {} down", port(node.number)))?;
        node.servers().kill();
        node.daemon.kill()?;
        let network = node.daemon.host().number()?;
        within(SOON, "the node's processes are gone", || {
            node.daemon.cgroup().end_everything();
            let left = processes_in_network(network);
            for pid in &left {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            Ok(left.is_empty().then_some(()))
        })
    }

    /// Starts a node that vanished, and waits until it is ready for pods.
    ///
    /// # Errors
    /// When something of it does not start.
    pub fn come_back(&self, node: &Node) -> Result<()> {
        ip(&self.underlay.host, &format!("link set {} up", port(node.number)))?;
        node.daemon.start_again()?;
        node.start_servers(&self.control)?;
        let name = format!("node/{}", node.name);
        self.control.kubectl(&["wait", "--for=condition=Ready", "--timeout=120s", &name]).map(drop)
    }

    /// [`ControlPlane::last_words`], and the end of each log of each node, of which copies are
    /// left, too.
    #[must_use]
    pub fn last_words(&self) -> String {
        let mut words = self.control.last_words();
        if let Ok(nodes) = self.control.kubectl(&["describe", "nodes"]) {
            let _ = fs::write(kept().join("nodes"), nodes);
        }
        for node in &self.nodes {
            let kept = kept().join(&node.name);
            words += &format!("{}:\n{}", node.name, node.servers().last_words(&kept));
            words += &node.daemon.last_words();
            let _ = fs::copy(node.daemon.dir().join("log"), kept.join("berthd.log"));
            for (file, program, arguments) in [
                ("rules", "nft", &["list", "ruleset"][..]),
                ("addresses", "ip", &["address"]),
                ("routes", "ip", &["route"]),
            ] {
                let found = node.daemon.host().run(program, arguments);
                let _ = fs::write(kept.join(file), found.unwrap_or_else(|error| format!("{error:#}")));
            }
        }
        words
    }
}

impl Node {
    fn servers(&self) -> MutexGuard<'_, Servers> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dir(&self) -> PathBuf {
        self.daemon.dir().join("cluster")
    }

    fn write_configurations(&self, control: &ControlPlane<'_>) -> Result<()> {
        let dir = self.dir();
        let kubelet = kubelet_configuration(&self.daemon, &dir, &self.address)?;
        // Pods that do not want the cluster's DNS have none.
        let more = format!("clusterDomain: cluster.local\nresolvConf: {}/resolv.conf\n", dir.display());
        let proxy = fs::read_to_string(manifest("nodes/kube-proxy.yaml"))
            .context("reading the configuration of kube-proxy")?
            .replace("@KUBECONFIG@", &control.file("kube-proxy.kubeconfig").to_string_lossy())
            .replace("@PODS@", PODS)
            .replace("@ADDRESS@", &self.address)
            .replace("@NODE@", &self.name);
        let write = |name: &str, text: &str| {
            fs::write(dir.join(name), text).with_context(|| format!("writing {name}"))
        };
        write("kubelet.yaml", &(kubelet + &more))?;
        write("resolv.conf", "")?;
        write("kube-proxy.yaml", &proxy)?;
        fs::copy(control.file(&format!("{}.kubeconfig", self.name)), dir.join("kubelet.kubeconfig"))
            .context("placing the kubelet's kubeconfig")?;
        Ok(())
    }

    fn start_servers(&self, control: &ControlPlane<'_>) -> Result<()> {
        let dir = self.dir();
        let file = |name: &str| dir.join(name).display().to_string();
        let host = self.daemon.host();
        let mut servers = self.servers();
        let program = peers::directory("kubelet")?.join("kubelet");
        let arguments = kubelet_arguments(file, &self.name, &self.address);
        servers.start(host, "kubelet", &program, &arguments)?;
        let program = peers::directory("kubernetes")?.join("kube-proxy");
        servers.start(host, "kube-proxy", &program, &[format!("--config={}", file("kube-proxy.yaml"))])?;
        // It writes its table with the first Service, which every cluster has.
        servers.answers("kube-proxy writes its rules", || {
            control.get("/api/v1/namespaces/default/services/kubernetes")?;
            let rules = host.run("nft", &["list", "table", "ip", "kube-proxy"])?;
            Ok(rules.contains("default/kubernetes").then_some(()))
        })
    }

    /// The lines of all firewall rules on it, without counters.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn rules(&self) -> Result<BTreeSet<String>> {
        let rules = self.daemon.host().run("nft", &["-s", "list", "ruleset"])?;
        Ok(rules.lines().map(|line| line.trim().to_owned()).collect())
    }

    /// The objects on the node that belong to pods: sandboxes and containers of the daemon,
    /// processes, links, cgroups, mounts, files of the kubelet, addresses and attachments of CNI.
    ///
    /// # Errors
    /// When something cannot be listed.
    pub fn pods_remains(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let client = self.daemon.client();
        let sandboxes = client.sandboxes(v1::PodSandboxFilter::default())?;
        found.extend(sandboxes.into_iter().map(|sandbox| format!("sandbox {}", sandbox.id)));
        let containers = client.containers(v1::ContainerFilter::default())?;
        found.extend(containers.into_iter().map(|container| format!("container {}", container.id)));

        let host = self.daemon.host();
        let mut known: Vec<u32> = self.servers().pids().collect();
        known.push(self.daemon.pid()?);
        let processes = processes_in_network(host.number()?).into_iter();
        let processes = processes.filter(|pid| u32::try_from(*pid).is_ok_and(|pid| !known.contains(&pid)));
        let processes = processes.filter_map(|pid| Some((pid, status_field(pid, "Name")?)));
        let processes = processes.filter(|(_, name)| name != WORKER);
        found.extend(processes.map(|(pid, name)| format!("process {pid} {name}")));

        let links = host.run("ip", &["-oneline", "link", "show", "type", "veth"])?;
        let links = links.lines().filter_map(|line| line.split(": ").nth(1));
        found.extend(links.filter(|link| !link.starts_with(UPLINK)).map(|link| format!("link {link}")));
        let cgroups = self.daemon.cgroup().below("pod").into_iter();
        found.extend(
            cgroups
                .filter(|path| !path.ends_with("kubepods"))
                .map(|path| format!("cgroup {}", path.display())),
        );
        let pinned = format!("{}/", self.daemon.state().display());
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", self.daemon.pid()?))
            .context("reading the node's mounts")?;
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        found.extend(mounts.filter(|place| place.starts_with(&pinned)).map(|place| format!("mount {place}")));

        let entries = |directory: &Path| {
            let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
            entries.map(|entry| format!("file {}", entry.path().display())).collect::<Vec<_>>()
        };
        found.extend(entries(&self.dir().join("kubelet/pods")));
        found.extend(entries(&self.dir().join("pods")));
        let addresses = self.daemon.cni_addresses_in_use();
        found.extend(addresses.into_iter().map(|address| format!("address {address}")));
        let attachments = self.daemon.cni_attachments()?;
        found.extend(attachments.into_iter().map(|attachment| format!("attachment {attachment}")));
        Ok(found)
    }
}
