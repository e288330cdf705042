//! A node with all its pods: a runtime, a kubelet on it, and the pods of `tests/kubelet/pods`. The
//! fixture of `tests/node`.
//!
//! The runtime is a private daemon of `dist/`, on any machine. With `BERTH_TEST_NODE=installed` it
//! is the Berth that is installed on the machine as a systemd service, with the driver that it
//! chose and with real slices: for a machine that may be broken, such as the guest of `scripts/vm`.
//! `BERTH_TEST_DEB` names a package of it, for the replacement of a running daemon.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use berth_cri::v1;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::geteuid;

use crate::census::{mounts_below, status_field};
use crate::cgroup::Driver;
use crate::cri::Client;
use crate::daemon::{Daemon, IMAGE, programs, rootful};
use crate::deadline::within_looks;
use crate::kubelet::{ADDRESS, Kubelet, Place, Pod};
use crate::program::output;
use crate::skip::skip;

/// Time for operations that the kubelet and the runtime do at once or within a few of their periods
/// of seconds: for sixty containers, on a machine whose processor may be emulated.
const SOON: Duration = Duration::from_secs(400);

/// The pause between two attempts. Each makes the kubelet write long answers, and many tests poll
/// at the same time.
const PAUSE: Duration = Duration::from_millis(300);

/// The manifests, without those that only some machines support.
const PODS: [&str; 9] =
    ["crashes", "lifecycle", "probes", "logs", "resources", "volumes", "security", "messages", "deletion"];

/// A program that does nothing until it is asked to end.
const IDLE: &str = "[sh, -c, 'trap exit TERM; sleep 1000000 & wait']";

/// A seccomp profile (runtime-spec, "Seccomp") that forbids creating directories.
const NO_DIRECTORIES: &str = r#"{
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }]
}"#;

/// The socket of an installed Berth.
const INSTALLED_SOCKET: &str = "/run/berth/berth.sock";

/// The service of an installed Berth.
const SERVICE: &str = "berthd.service";

/// The runtime of a node.
#[derive(Debug)]
enum Runtime<'a> {
    /// A private daemon of the test.
    Private(&'a Daemon),
    /// The installed one.
    Installed {
        /// When the test began, in the format of journalctl(1).
        since: String,
    },
}

/// A node, with its pods started; ended and cleaned up after on drop.
#[derive(Debug)]
pub struct Node<'a> {
    /// The kubelet.
    pub kubelet: Kubelet,
    // After the kubelet, which may still use it when it ends.
    runtime: Runtime<'a>,
    client: Client,
    /// The pods at a time less than [`PAUSE`] ago, and that time.
    pods: Mutex<Option<(Instant, Vec<Pod>)>>,
    /// The objects on the machine before there were pods.
    before: Vec<String>,
    dir: tempfile::TempDir,
}

/// Runs `test` on a node to which every pod was given; a failure is reported with the last lines of
/// both. Without root the test is skipped.
///
/// # Errors
/// What the test returns, and when the runtime or the kubelet does not start.
pub fn on_a_node(test: impl FnOnce(&Node<'_>) -> Result<()>) -> Result<()> {
    match std::env::var("BERTH_TEST_NODE").as_deref() {
        Ok("installed") => {
            if !geteuid().is_root() {
                skip("node", "needs root");
                return Ok(());
            }
            let since = format!("@{}", output(Command::new("date").arg("+%s"))?.trim());
            test(&Node::start(Runtime::Installed { since })?)
        }
        Ok(other) => bail!("BERTH_TEST_NODE is {other:?}; only \"installed\" has a meaning"),
        Err(_) => rootful(|daemon| test(&Node::start(Runtime::Private(daemon))?)),
    }
}

impl<'a> Node<'a> {
    fn start(runtime: Runtime<'a>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("berth-node-").tempdir().context("making a directory")?;
        let (socket, host, driver) = match &runtime {
            Runtime::Private(daemon) => (daemon.socket(), Some(daemon.host()), Driver::Cgroupfs),
            Runtime::Installed { .. } => (INSTALLED_SOCKET.into(), None, Driver::Systemd),
        };
        let client = Client::new(&socket)?;
        if let Runtime::Installed { .. } = runtime {
            let archive = programs()?.join("images/demo.tar");
            client.import(&archive).context("importing the demo image")?;
        }
        // Not with `add`: an earlier run may have left it.
        let address = ["address", "replace", &format!("{ADDRESS}/32"), "dev", "lo"];
        match host {
            Some(host) => host.run("ip", &address)?,
            None => output(Command::new("ip").args(address))?,
        };
        let profiles = dir.path().join("root/seccomp");
        fs::create_dir_all(&profiles).context("making a directory for seccomp profiles")?;
        fs::write(profiles.join("no-directories.json"), NO_DIRECTORIES)
            .context("writing a seccomp profile")?;
        let kubelet = Kubelet::start(Place {
            peer: "kubelet",
            dir: dir.path(),
            socket: &socket,
            host,
            address: true,
            driver,
            settings: Some("node.conf"),
        })?;
        let mut node = Self { kubelet, runtime, client, pods: Mutex::new(None), before: Vec::new(), dir };
        node.before = node.on_the_machine()?;
        node.run_pods().with_context(|| node.last_words())?;
        Ok(node)
    }

    fn run_pods(&self) -> Result<()> {
        let evidence = self.kubelet.evidence();
        let tree = evidence.join("tree");
        fs::create_dir(&tree).context("making a directory for a volume")?;
        // Not every machine's file systems propagate mounts as systemd's do.
        for flags in [MsFlags::MS_BIND, MsFlags::MS_SHARED] {
            mount(Some(&tree), &tree, None::<&str>, flags, None::<&str>).context("mounting a volume")?;
        }
        fs::write(evidence.join("file"), "a file of the node\n").context("making a file for a volume")?;
        let words = [("IMAGE", IMAGE), ("IDLE", IDLE), ("EVIDENCE", &*evidence.to_string_lossy())];
        for name in PODS {
            self.kubelet.run_pods(name, &words)?;
        }
        if has_apparmor() {
            self.kubelet.run_pods("apparmor", &words)?;
        }
        self.resize("100m", "64Mi")
    }

    /// Gives the pod `resized` these limits.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub fn resize(&self, cpu: &str, memory: &str) -> Result<()> {
        let words = [("IMAGE", IMAGE), ("IDLE", IDLE), ("CPU", cpu), ("MEMORY", memory)];
        self.kubelet.run_pods("resized", &words)
    }

    /// Waits until `is` accepts the pod.
    ///
    /// # Errors
    /// When it does not in time; the message has the pod's actual state.
    pub fn pod_that(&self, name: &str, what: &str, is: impl Fn(&Pod) -> Result<bool>) -> Result<Pod> {
        soon(&format!("{name}: {what}"), || {
            let pod = self.recent_pod(name)?;
            ensure!(is(&pod)?, "it is {pod:?}");
            Ok(Some(pod))
        })
    }

    /// The pod as one of the last polls saw it, which many tests share. Each poll is later than
    /// those that any test has had before.
    fn recent_pod(&self, name: &str) -> Result<Pod> {
        let mut recent = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.as_ref().is_none_or(|(when, _)| when.elapsed() > PAUSE) {
            *recent = None;
            *recent = Some((Instant::now(), self.kubelet.pods()?));
        }
        let (_, pods) = recent.as_ref().context("they were just looked at")?;
        let pod = pods.iter().find(|pod| pod.is_called(name));
        pod.cloned().with_context(|| format!("the kubelet knows no pod {name}"))
    }

    /// The pod, once it is ready.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn ready_pod(&self, name: &str) -> Result<Pod> {
        self.pod_that(name, "it is ready", |pod| Ok(pod.ready))
    }

    /// Asks the first process of a container to end. Whether that works shows in the state of the
    /// container: the command that asks may be ended with it.
    pub fn end(&self, pod: &str, container: &str) {
        let _ = self.kubelet.run(pod, container, "kill 1");
    }

    /// A file that the pods left for the test.
    ///
    /// # Errors
    /// When it does not exist.
    pub fn evidence(&self, name: &str) -> Result<String> {
        let path = self.kubelet.evidence().join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// A client of the runtime's socket.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The process id of the daemon.
    ///
    /// # Errors
    /// When it is not running.
    pub fn daemon_pid(&self) -> Result<u32> {
        match &self.runtime {
            Runtime::Private(daemon) => daemon.pid(),
            Runtime::Installed { .. } => {
                let show = ["show", "--property=MainPID", "--value", SERVICE];
                let pid = output(Command::new("systemctl").args(show))?;
                let pid = pid.trim().parse().with_context(|| format!("systemctl says {pid:?}"))?;
                ensure!(pid != 0, "the daemon does not run");
                Ok(pid)
            }
        }
    }

    /// Whether the daemon has a capability, by its number (`capabilities(7)`).
    ///
    /// # Errors
    /// When it is not running.
    pub fn daemon_has(&self, capability: u32) -> Result<bool> {
        let pid = i32::try_from(self.daemon_pid()?).context("the daemon's process id")?;
        let set = status_field(pid, "CapEff").context("the daemon has no capabilities")?;
        let set =
            u64::from_str_radix(&set, 16).with_context(|| format!("the daemon's capabilities {set:?}"))?;
        Ok(set & (1 << capability) != 0)
    }

    /// Ends the daemon as an administrator would, and starts it again.
    ///
    /// # Errors
    /// When it does not end or start in time.
    pub fn restart_daemon(&self) -> Result<()> {
        self.anew(|| match &self.runtime {
            Runtime::Private(daemon) => {
                daemon.stop()?;
                daemon.start_again()
            }
            Runtime::Installed { .. } => systemctl(&["restart", SERVICE]),
        })
    }

    /// Kills the daemon; a new one starts when it is gone.
    ///
    /// # Errors
    /// When none is running, or the new one does not start in time.
    pub fn kill_daemon(&self) -> Result<()> {
        self.anew(|| match &self.runtime {
            Runtime::Private(daemon) => daemon.crash(),
            Runtime::Installed { .. } => systemctl(&["kill", "--signal=KILL", "--kill-whom=main", SERVICE]),
        })
    }

    /// Replaces the daemon and the shim by another build, as an upgrade does: by new files,
    /// whatever their content.
    ///
    /// # Errors
    /// When the package is missing or cannot be installed, or the new daemon does not start in time
    /// or is not of the new file.
    pub fn replace_daemon(&self) -> Result<()> {
        let program =
            |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).context("looking at the daemon's program");
        let old = self.daemon_pid()?;
        let old_program = program(old)?;
        self.anew(|| match &self.runtime {
            Runtime::Private(daemon) => {
                let directory = self.dir.path().join("other-build");
                fs::create_dir(&directory).context("making a directory for the other build")?;
                for name in ["berthd", "berth-shim"] {
                    fs::copy(programs()?.join(name), directory.join(name))
                        .with_context(|| format!("copying {name}"))?;
                }
                daemon.stop()?;
                daemon.start_from(&directory)
            }
            Runtime::Installed { .. } => {
                let package =
                    std::env::var_os("BERTH_TEST_DEB").context("BERTH_TEST_DEB names no package")?;
                // An installed package is installed again, which replaces its files.
                output(Command::new("dpkg").arg("--install").arg(package)).map(drop)
            }
        })?;
        let new_program = program(self.daemon_pid()?)?;
        match &self.runtime {
            Runtime::Private(_) => {
                ensure!(new_program != old_program, "it still runs {}", new_program.display())
            }
            // The link of a process whose file was replaced would say that it is deleted.
            Runtime::Installed { .. } => ensure!(new_program.exists(), "it runs {}", new_program.display()),
        }
        Ok(())
    }

    /// Runs an operation that replaces the daemon's process, and waits until the new one answers.
    fn anew(&self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let old = self.daemon_pid()?;
        act()?;
        soon("another daemon answers", || {
            self.client.version(v1::VersionRequest::default())?;
            Ok((self.daemon_pid()? != old).then_some(()))
        })
    }

    /// The namespaces of the node that pods may share: `net`, `pid` and `ipc`, by the number that
    /// the kernel gives each (`namespaces(7)`).
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn namespace(&self, kind: &str) -> Result<PathBuf> {
        let path = format!("/proc/{}/ns/{kind}", self.daemon_pid()?);
        fs::read_link(&path).with_context(|| format!("reading {path}"))
    }

    /// The daemon's log since the test began.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn daemon_log(&self) -> Result<String> {
        match &self.runtime {
            Runtime::Private(daemon) => daemon.log(),
            Runtime::Installed { since } => {
                let arguments = ["--no-pager", "--output=cat", "--unit", SERVICE, "--since", since];
                output(Command::new("journalctl").args(arguments))
            }
        }
    }

    /// The objects on the machine that did not exist before there were pods: cgroups of pods,
    /// mounts, links into pods, volumes.
    ///
    /// # Errors
    /// When links cannot be listed.
    pub fn remains(&self) -> Result<Vec<String>> {
        let mut found = self.on_the_machine()?;
        found.retain(|one| !self.before.contains(one));
        Ok(found)
    }

    fn on_the_machine(&self) -> Result<Vec<String>> {
        let links = ["-oneline", "link", "show", "type", "veth"];
        let (links, state) = match &self.runtime {
            Runtime::Private(daemon) => (daemon.host().run("ip", &links)?, daemon.state()),
            Runtime::Installed { .. } => (output(Command::new("ip").args(links))?, "/run/berth".into()),
        };
        let mut found: Vec<String> = links.lines().map(str::to_owned).collect();
        let cgroups = self.kubelet.cgroup().below("pod").into_iter();
        let classes = ["kubepods", "kubepods.slice", "kubepods-burstable.slice", "kubepods-besteffort.slice"];
        found.extend(
            cgroups
                .filter(|path| !classes.iter().any(|class| path.ends_with(class)))
                .map(|path| path.display().to_string()),
        );
        found.extend(self.kubelet.pod_directories().iter().map(|path| path.display().to_string()));
        let mounts = mounts_below(&state).into_iter();
        found.extend(mounts.map(|path| path.display().to_string()));
        Ok(found)
    }

    /// The last lines of the kubelet. The whole logs of it and of the daemon, and the pods as they
    /// are, are left in the directory `node` of `target/test-logs`, or of the directory that
    /// `BERTH_TEST_LOGS` names.
    #[must_use]
    pub fn last_words(&self) -> String {
        let logs = BTreeMap::from([
            ("kubelet.log", self.kubelet.own_log().unwrap_or_default()),
            ("berthd.log", self.daemon_log().unwrap_or_default()),
            ("pods.json", self.kubelet.get("/pods").unwrap_or_default()),
        ]);
        let kept = std::env::var_os("BERTH_TEST_LOGS")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-logs"), PathBuf::from);
        let kept = kept.join("node");
        let mut words = format!("whole logs are in {}\n", kept.display());
        if let Err(error) = fs::create_dir_all(&kept) {
            words = format!("{}: {error}\n", kept.display());
        }
        for (name, log) in logs {
            let _ = fs::write(kept.join(name), log);
        }
        words + &self.kubelet.last_words()
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        for mount in mounts_below(&self.kubelet.evidence()).into_iter().rev() {
            let _ = umount2(&mount, MntFlags::MNT_DETACH);
        }
        // Everything on an installed runtime has to be removed explicitly; a private one goes with
        // its host and its cgroup.
        if let Runtime::Installed { .. } = self.runtime {
            let _ = self.kubelet.delete_pods();
            for sandbox in self.client.sandboxes(v1::PodSandboxFilter::default()).unwrap_or_default() {
                let _ = self.client.remove_sandbox(&sandbox.id);
            }
            let _ =
                output(Command::new("ip").args(["address", "delete", &format!("{ADDRESS}/32"), "dev", "lo"]));
        }
    }
}

/// Calls `look` until it returns something, as [`within`](crate::deadline::within) does, for as
/// long as operations on a node may take and no more often than a kubelet tolerates.
///
/// # Errors
/// When that time has passed; the message names `what`.
pub fn soon<T>(what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    within_looks(SOON, PAUSE, what, look)
}

/// Whether the machine's kernel has AppArmor turned on.
#[must_use]
pub fn has_apparmor() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y")
}

fn systemctl(arguments: &[&str]) -> Result<()> {
    output(Command::new("systemctl").args(arguments)).map(drop)
}
