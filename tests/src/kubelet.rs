//! A real kubelet on static pods: the fixture of `tests/kubelet.rs`.
//!
//! Its binary comes from `scripts/build-peer kubelet` (or the path in `KUBELET`), its configuration from
//! `tests/kubelet/config.yaml`. It runs without an API server, in folders, a port and a cgroup of its own. It insists
//! on `/var/lib/kubelet/device-plugins` and `/var/log/containers`, and mounts its root folder over itself: these are
//! undone on drop, and the folders removed if they were not there before.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::deadline::within;

/// What the kubelet calls its node; it ends every static pod's name.
const NODE: &str = "berth-test";

/// Time for one answer of the kubelet's API, on a machine that is busy with other things.
const ANSWER: Duration = Duration::from_secs(10);

/// Time for the kubelet to serve its API after its start (it takes about one second), and to end.
const START_OR_END: Duration = Duration::from_secs(60);

/// Folders that a kubelet makes on the host whatever its configuration says.
const UNAVOIDABLE: [&str; 2] = ["/var/lib/kubelet", "/var/log/containers"];

/// A running kubelet, killed and cleaned up after on drop.
#[derive(Debug)]
pub struct Kubelet {
    process: Child,
    dir: PathBuf,
    port: u16,
    http: reqwest::blocking::Client,
    made: Vec<PathBuf>,
    // Last: dropped when the kubelet is gone, which makes new cgroups as long as it lives.
    cgroup: Cgroup,
}

/// A pod as the kubelet reports it: the parts of `v1.Pod` (Kubernetes API reference) that the tests look at.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its name, with the node's at its end.
    pub name: String,
    /// Whether its condition `Ready` is true.
    pub ready: bool,
    /// Its init containers, in the order of the manifest.
    pub init_containers: Vec<PodContainer>,
    /// Its containers, by name.
    pub containers: Vec<PodContainer>,
}

/// A container of a [`Pod`]: the parts of `v1.ContainerStatus` that the tests look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodContainer {
    /// Its name in the manifest.
    pub name: String,
    /// The runtime's id, without the runtime's name before it; empty before the container was made.
    pub id: String,
    /// How often it was started anew.
    pub restart_count: u64,
    /// Whether its readiness probe says so.
    pub ready: bool,
    /// Exit code of this instance, if it ended.
    pub exit_code: Option<i64>,
    /// Exit code of the instance before, if there was one.
    pub previous_exit_code: Option<i64>,
}

impl Pod {
    /// The container of this name.
    ///
    /// # Errors
    /// When the kubelet does not report one.
    pub fn container(&self, name: &str) -> Result<&PodContainer> {
        let mut containers = self.containers.iter().chain(&self.init_containers);
        containers
            .find(|container| container.name == name)
            .with_context(|| format!("no container {name} in {self:?}"))
    }

    fn read(pod: &Value) -> Self {
        let containers = |list: &str| {
            let list = pod.pointer(list).and_then(Value::as_array);
            list.into_iter().flatten().map(PodContainer::read).collect()
        };
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let ready = conditions.into_iter().flatten().find(|condition| text(condition, "/type") == "Ready");
        Self {
            name: text(pod, "/metadata/name"),
            ready: ready.is_some_and(|condition| text(condition, "/status") == "True"),
            init_containers: containers("/status/initContainerStatuses"),
            containers: containers("/status/containerStatuses"),
        }
    }
}

impl PodContainer {
    fn read(status: &Value) -> Self {
        let id = text(status, "/containerID");
        Self {
            name: text(status, "/name"),
            id: id.split_once("://").map(|(_, id)| id.to_owned()).unwrap_or_default(),
            restart_count: status.pointer("/restartCount").and_then(Value::as_u64).unwrap_or_default(),
            ready: status.pointer("/ready").and_then(Value::as_bool).unwrap_or_default(),
            exit_code: status.pointer("/state/terminated/exitCode").and_then(Value::as_i64),
            previous_exit_code: status.pointer("/lastState/terminated/exitCode").and_then(Value::as_i64),
        }
    }
}

/// The string at `pointer`, empty when there is none.
fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// The place of a container's log to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instance {
    /// The container that runs now.
    Current,
    /// The one before the last restart.
    Previous,
}

impl Kubelet {
    /// Starts a kubelet on the CRI socket `socket`, with everything it keeps below `dir`, and waits for its API.
    ///
    /// `dir` gets the folders `manifests` (for pods), `logs`, and `evidence` (for the pods to leave files in).
    ///
    /// # Errors
    /// When the binary is missing (the message says how to build it), a file cannot be written, or the API does not
    /// answer in time (the message ends with the kubelet's last lines).
    pub fn start(dir: &Path, socket: &Path) -> Result<Self> {
        let program = program()?;
        for folder in ["manifests", "logs", "evidence"] {
            fs::create_dir_all(dir.join(folder)).with_context(|| format!("making {folder}"))?;
        }
        let port = free_port()?;
        let cgroup = Cgroup::create(&format!("berth-kubelet-{}", std::process::id()))?;
        let configuration = template(
            "config.yaml",
            &[
                ("DIR", &dir.to_string_lossy()),
                ("SOCKET", &socket.to_string_lossy()),
                ("PORT", &port.to_string()),
                ("CGROUP", &cgroup.path()),
            ],
        )?;
        let configuration_file = dir.join("config.yaml");
        fs::write(&configuration_file, configuration).context("writing the kubelet's configuration")?;

        let made = UNAVOIDABLE.iter().map(PathBuf::from).filter(|path| !path.exists()).collect();
        let output = File::create(dir.join("kubelet.log")).context("making the kubelet's log")?;
        let process = Command::new(&program)
            .arg("--config")
            .arg(&configuration_file)
            .arg("--root-dir")
            .arg(dir.join("root"))
            .arg("--cert-dir")
            .arg(dir.join("pki"))
            .args(["--hostname-override", NODE])
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("sharing the kubelet's log")?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let mut kubelet = Self { process, dir: dir.to_owned(), port, http: client()?, made, cgroup };
        within(START_OR_END, "the kubelet's API answers", || {
            if let Some(status) = kubelet.process.try_wait().context("looking after the kubelet")? {
                // The closure cannot end the wait early; the last error is what will be told.
                bail!("the kubelet ended by itself: {status}");
            }
            kubelet.pods().map(Some)
        })
        .with_context(|| kubelet.last_words())?;
        Ok(kubelet)
    }

    /// The cgroup that every pod's is below.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The folder that the pods have as `/evidence`.
    #[must_use]
    pub fn evidence(&self) -> PathBuf {
        self.dir.join("evidence")
    }

    /// The folders of pods that the kubelet still keeps: their volumes.
    #[must_use]
    pub fn pod_folders(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.join("root/pods")).into_iter().flatten();
        entries.filter_map(Result::ok).map(|entry| entry.path()).collect()
    }

    /// Gives the kubelet the static pod of `tests/kubelet/pod.yaml` with `image` in every container, and returns the
    /// pod's name.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn run_pod(&self, image: &str) -> Result<String> {
        let manifest = template("pod.yaml", &[("DIR", &self.dir.to_string_lossy()), ("IMAGE", image)])?;
        // Renamed into place, or the kubelet may read half of it.
        let written = self.dir.join("pod.yaml");
        fs::write(&written, manifest).context("writing the manifest")?;
        fs::rename(&written, self.manifest()).context("handing over the manifest")?;
        Ok(format!("web-{NODE}"))
    }

    /// Takes the manifest away; the kubelet then ends the pod.
    ///
    /// # Errors
    /// When there is none.
    pub fn delete_pod(&self) -> Result<()> {
        fs::remove_file(self.manifest()).context("removing the manifest")
    }

    /// The pods that the kubelet has, as its API reports them.
    ///
    /// # Errors
    /// When the API does not answer, or not with a `v1.PodList`.
    pub fn pods(&self) -> Result<Vec<Pod>> {
        let text = self.get("/pods")?;
        let list: Value = serde_json::from_str(&text).context("reading the pod list")?;
        match list.get("items") {
            Some(Value::Array(items)) => Ok(items.iter().map(Pod::read).collect()),
            Some(Value::Null) => Ok(Vec::new()),
            _ => bail!("the answer is no pod list: {text}"),
        }
    }

    /// The pod of this name.
    ///
    /// # Errors
    /// When the API does not answer, or knows no such pod.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let mut pods = self.pods()?.into_iter();
        pods.find(|pod| pod.name == name).with_context(|| format!("the kubelet knows no pod {name}"))
    }

    /// The log of a container of a pod in the namespace `default`, as the kubelet's API gives it.
    ///
    /// # Errors
    /// When the API does not answer, or has no such log.
    pub fn log(&self, pod: &str, container: &str, instance: Instance) -> Result<String> {
        let query = match instance {
            Instance::Current => "",
            Instance::Previous => "?previous=true",
        };
        self.get(&format!("/containerLogs/default/{pod}/{container}{query}"))
    }

    /// The end of the kubelet's own log, for the message of a failed test.
    #[must_use]
    pub fn last_words(&self) -> String {
        let log = fs::read(self.dir.join("kubelet.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let last = lines.get(lines.len().saturating_sub(15)..).unwrap_or_default();
        format!("the kubelet's last lines:\n{}", last.join("\n"))
    }

    fn get(&self, path: &str) -> Result<String> {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let answer = self.http.get(&url).send().with_context(|| format!("asking for {path}"))?;
        let status = answer.status();
        let text = answer.text().with_context(|| format!("reading {path}"))?;
        if !status.is_success() {
            bail!("{path} answers {status}: {text}");
        }
        Ok(text)
    }

    fn manifest(&self) -> PathBuf {
        self.dir.join("manifests/web.yaml")
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.process.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let ended = within(START_OR_END, "the kubelet ends", || Ok(self.process.try_wait()?));
        if ended.is_err() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
        // Volumes of pods that a failed test left, then the root folder itself.
        let root = self.dir.join("root");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let below = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
        for mount in below.filter(|mount| mount.starts_with(&root)).collect::<Vec<_>>().into_iter().rev() {
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        for folder in &self.made {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// The kubelet to use: `KUBELET`, else the one that `scripts/build-peer` made.
fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("KUBELET") {
        return Ok(path.into());
    }
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/peers");
    let built = fs::read_dir(&peers).into_iter().flatten().filter_map(Result::ok).find(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("kubelet-") && !name.ends_with(".new")
    });
    match built {
        Some(folder) => Ok(folder.path().join("kubelet")),
        None => bail!("no kubelet in {}: run scripts/build-peer kubelet", peers.display()),
    }
}

/// A file of `tests/kubelet` with its `@WORDS@` filled in.
fn template(name: &str, words: &[(&str, &str)]) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kubelet").join(name);
    let mut text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    for (word, value) in words {
        text = text.replace(&format!("@{word}@"), value);
    }
    Ok(text)
}

/// A port of loopback that nothing listens on just now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("finding a free port")?;
    Ok(listener.local_addr().context("finding a free port")?.port())
}

/// A client that takes the certificate which a kubelet without an API server signs for itself. It is only used with
/// 127.0.0.1.
fn client() -> Result<reqwest::blocking::Client> {
    // Refused when another test of this process was first, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::blocking::Client::builder()
        .tls_danger_accept_invalid_certs(true)
        .no_proxy()
        .timeout(ANSWER)
        .build()
        .context("making an HTTPS client")
}
