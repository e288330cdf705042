//! Kubernetes clusters on tests' private daemons.
//!
//! [`Cluster`] has one node: etcd, API server, controller manager, scheduler and a kubelet, all on
//! the daemon's test host. The programs come from `scripts/build-peer etcd kubernetes kubelet`.
//! Pods get their network from Berth, and there is no kube-proxy and no DNS. [`nodes`] has clusters
//! of several nodes, with both.
//!
//! A kubelet insists on `/var/lib/kubelet` and `/var/log/containers`; they are removed on drop if
//! they did not exist before. Everything else is in the daemon's directory, cgroup and host, and is
//! removed with them.

mod control_plane;
pub mod nodes;
mod pod;
mod servers;

pub use self::control_plane::{ControlPlane, Web};
pub use self::pod::Pod;

use std::collections::BTreeSet;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use self::control_plane::{Plan, kept, manifest};
use crate::census::{WORKER, mounts_below, processes_in_network, status_field};
use crate::daemon::Daemon;
use crate::peers;
use crate::program::output;

/// What the kubelet calls its node.
pub const NODE: &str = "berth-node";

/// The node's address. Pods of Berth's built-in network are elsewhere (`docs/network.md`,
/// "Settings").
pub const ADDRESS: &str = "10.99.0.1";

/// Directories that a kubelet makes on the machine whatever its configuration says.
const UNAVOIDABLE: [&str; 2] = ["/var/lib/kubelet", "/var/log/containers"];

/// A running cluster of one node, ended and cleaned up after on drop.
#[derive(Debug)]
pub struct Cluster<'a> {
    daemon: &'a Daemon,
    dir: PathBuf,
    /// With the kubelet among its servers.
    control: ControlPlane<'a>,
    made: Vec<PathBuf>,
}

impl<'a> Deref for Cluster<'a> {
    type Target = ControlPlane<'a>;

    fn deref(&self) -> &Self::Target {
        &self.control
    }
}

impl<'a> Cluster<'a> {
    /// Starts one on `daemon`, and waits until its node is ready for pods.
    ///
    /// # Errors
    /// When a program is missing (the message says how to build it), a file cannot be written, or a
    /// server does not answer in time (the message ends with the servers' last lines).
    pub fn start(daemon: &'a Daemon) -> Result<Self> {
        let dir = daemon.directory("cluster")?;
        give_an_address(daemon)?;
        let made = UNAVOIDABLE.iter().map(PathBuf::from).filter(|path| !path.exists()).collect();
        let callers = [("kubelet".to_owned(), format!("system:node:{NODE}"), "system:nodes")];
        let plan = Plan { address: ADDRESS, callers: &callers, apiserver: &[], controllers: &[] };
        let control = ControlPlane::start(daemon.host(), dir.clone(), plan)?;
        let mut cluster = Self { daemon, dir, control, made };
        cluster.start_kubelet().with_context(|| cluster.last_words())?;
        Ok(cluster)
    }

    fn start_kubelet(&mut self) -> Result<()> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let configuration = kubelet_configuration(self.daemon, &self.dir, ADDRESS)?;
        fs::write(self.dir.join("kubelet.yaml"), configuration)
            .context("writing the kubelet's configuration")?;
        let arguments = kubelet_arguments(file, NODE, ADDRESS);
        let program = peers::directory("kubelet")?.join("kubelet");
        self.control.servers.start(self.daemon.host(), "kubelet", &program, &arguments)?;
        self.control.wait_for_node(NODE)
    }

    /// The objects on the machine that belong to this cluster, beside the daemon and the servers:
    /// processes on the test's host (shims; processes in a pod show up by its cgroup), mounts,
    /// links, firewall rules, cgroups, and the files of the daemon.
    ///
    /// Without the cgroups of the kubelet's QoS classes: it creates them when it starts, and again
    /// when a pod needs them in a hierarchy that lacks them.
    ///
    /// # Errors
    /// When a tool that lists something fails.
    pub fn remains(&self) -> Result<BTreeSet<String>> {
        let host = self.daemon.host();
        let mut known: Vec<u32> = self.control.servers.pids().collect();
        known.push(self.daemon.pid()?);
        let known: Vec<i32> = known.into_iter().filter_map(|pid| pid.try_into().ok()).collect();
        let processes = processes_in_network(host.number()?).into_iter().filter(|pid| !known.contains(pid));
        let classes = ["kubepods", "kubepods/burstable", "kubepods/besteffort"];
        let cgroups = self.daemon.cgroup().below("").into_iter();
        let cgroups = cgroups.filter(|path| !classes.iter().any(|class| path.ends_with(class)));
        let links = host.run("ip", &["-oneline", "link", "show"])?;
        // -s leaves counters out.
        let rules = host.run("nft", &["-s", "list", "ruleset"])?;
        // The content of layers comes from the image, and is large.
        let (root, state) = (self.daemon.root(), self.daemon.state());
        let files = ["-path", "*/layers/*", "-prune", "-o", "-print"];
        let files = output(Command::new("find").args([root, state]).args(files))?;

        let mut found = BTreeSet::new();
        let processes = processes.map(|pid| (pid, status_field(pid, "Name").unwrap_or_default()));
        let processes = processes.filter(|(_, name)| name != WORKER);
        found.extend(processes.map(|(pid, name)| format!("process {pid} {name}")));
        found.extend(mounts_below(self.daemon.dir()).iter().map(|path| format!("mount {}", path.display())));
        found.extend(
            links.lines().filter_map(|line| line.split(": ").nth(1)).map(|name| format!("link {name}")),
        );
        found.extend(rules.lines().map(|line| format!("rule {line}")));
        found.extend(cgroups.map(|path| format!("cgroup {}", path.display())));
        found.extend(files.lines().map(|path| format!("file {path}")));
        Ok(found)
    }

    /// The directories of pods that the kubelet still keeps (their volumes, their logs), and the
    /// links to their logs that it makes for log collectors.
    #[must_use]
    pub fn pod_files(&self) -> Vec<PathBuf> {
        let entries = |directory: &Path| {
            let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
            entries.map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let links = entries(Path::new("/var/log/containers")).into_iter();
        let mut found: Vec<_> = links
            .filter(|link| fs::read_link(link).is_ok_and(|target| target.starts_with(&self.dir)))
            .collect();
        found.extend(entries(&self.dir.join("kubelet/pods")));
        found.extend(entries(&self.dir.join("pods")));
        found
    }

    /// [`ControlPlane::last_words`]; the daemon's log is left there, too.
    #[must_use]
    pub fn last_words(&self) -> String {
        let words = self.control.last_words();
        let _ = fs::copy(self.daemon.dir().join("log"), kept().join("berthd.log"));
        words
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        self.control.servers.end();
        for directory in &self.made {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

/// `tests/cluster/kubelet.yaml` for a kubelet on `daemon` with its files in `dir`.
fn kubelet_configuration(daemon: &Daemon, dir: &Path, address: &str) -> Result<String> {
    let template = manifest("kubelet.yaml");
    let template =
        fs::read_to_string(&template).with_context(|| format!("reading {}", template.display()))?;
    Ok(template
        .replace("@SOCKET@", &daemon.socket().to_string_lossy())
        .replace("@DIR@", &dir.to_string_lossy())
        .replace("@ADDRESS@", address)
        .replace("@CGROUP@", &daemon.cgroup().path()))
}

/// The arguments of a kubelet whose files are those that `file` names.
fn kubelet_arguments(file: impl Fn(&str) -> String, node: &str, address: &str) -> [String; 6] {
    [
        format!("--kubeconfig={}", file("kubelet.kubeconfig")),
        format!("--config={}", file("kubelet.yaml")),
        format!("--root-dir={}", file("kubelet")),
        format!("--cert-dir={}", file("kubelet-pki")),
        format!("--hostname-override={node}"),
        format!("--node-ip={address}"),
    ]
}

/// Gives the test's host an address beside that of loopback, which kubelet and API server insist
/// on.
fn give_an_address(daemon: &Daemon) -> Result<()> {
    let address = format!("{ADDRESS}/32");
    daemon
        .host()
        .run("ip", &["address", "add", &address, "dev", "lo"])
        .context("giving the host an address")?;
    Ok(())
}
