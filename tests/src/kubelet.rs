//! A real kubelet on static pods: the fixture of `tests/kubelet.rs` and of `tests/node`.
//!
//! Its binary comes from `scripts/build-peer kubelet` (or the path in `KUBELET`), its configuration
//! from `tests/kubelet/config.yaml`. It runs without an API server, with its own directories and
//! port, and below its own cgroup or in the machine's real `kubepods.slice` ([`Place::driver`]). It
//! insists on `/var/lib/kubelet/device-plugins` and `/var/log/containers`, and mounts its root
//! directory over itself: these are undone on drop, and the directories removed if they did not
//! exist before.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::cgroup::{Cgroup, Driver};
use crate::deadline::within;
use crate::host::Host;
use crate::peers;

/// The kubelet's name for its node, which ends every static pod's name.
const NODE: &str = "berth-test";

/// The node's address on a host that has been given one ([`Place::address`]).
pub const ADDRESS: &str = "10.99.0.1";

/// Time for one answer of the kubelet's API, on a machine that is busy with other things: longer
/// than commands that tests run in containers.
const ANSWER: Duration = Duration::from_secs(60);

/// Time for the kubelet to serve its API after its start (it takes about one second), and to end.
const START_OR_END: Duration = Duration::from_secs(60);

/// Directories that a kubelet makes on the host whatever its configuration says.
const UNAVOIDABLE: [&str; 2] = ["/var/lib/kubelet", "/var/log/containers"];

/// Where and how a kubelet runs.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The directory of all its files.
    pub dir: &'a Path,
    /// The runtime's CRI socket.
    pub socket: &'a Path,
    /// The host whose network it is in; the machine's own when there is none.
    pub host: Option<&'a Host>,
    /// Whether its node has the address [`ADDRESS`]; otherwise it uses an address that it finds. A
    /// kubelet needs one for pods on the network of the node.
    pub address: bool,
    /// The creator of its cgroups: itself, below its own cgroup, so that no other pods are touched;
    /// or systemd, as slices below the machine's real `kubepods.slice`.
    pub driver: Driver,
    /// The version to run, by its name in `scripts/build-peer`.
    pub peer: &'a str,
    /// A file of `tests/kubelet` whose settings override those of `config.yaml`, if any.
    pub settings: Option<&'a str>,
}

/// A running kubelet, killed and cleaned up after on drop.
#[derive(Debug)]
pub struct Kubelet {
    process: Mutex<Child>,
    /// The command that starts it again.
    command: Mutex<Command>,
    dir: PathBuf,
    port: u16,
    http: reqwest::blocking::Client,
    made: Vec<PathBuf>,
    driver: Driver,
    // Dropped last, when the kubelet is gone: it creates new cgroups as long as it lives.
    cgroup: Cgroup,
}

/// A pod as the kubelet reports it: the parts of `v1.Pod` (Kubernetes API reference) that the tests
/// look at.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its name, with the node's at its end.
    pub name: String,
    /// Its uid, which is in the names of its cgroups.
    pub uid: String,
    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    pub phase: String,
    /// `Guaranteed`, `Burstable` or `BestEffort`.
    pub class: String,
    /// Its address; empty before it has one.
    pub address: String,
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
    /// The runtime's id, without the prefix that names the runtime; empty before the container was
    /// created.
    pub id: String,
    /// How often it was restarted.
    pub restart_count: u64,
    /// Whether its readiness probe says so.
    pub ready: bool,
    /// Whether its startup probe has succeeded, or it has none and is running.
    pub started: bool,
    /// When it started; empty when it is not running.
    pub running_since: String,
    /// Why it is not running yet, or not again: the reason and the message.
    pub waiting: Option<(String, String)>,
    /// How this instance ended, if it did.
    pub end: Option<End>,
    /// How the previous instance ended, if there was one.
    pub previous_end: Option<End>,
}

/// How an instance of a container ended (`v1.ContainerStateTerminated`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The exit code; 128 and the signal for one that was killed.
    pub exit_code: i64,
    /// `Completed`, `Error`, `OOMKilled` and the like.
    pub reason: String,
    /// The termination message.
    pub message: String,
}

impl Pod {
    /// The container of this name.
    ///
    /// # Errors
    /// When the kubelet does not report one.
    pub fn container(&self, name: &str) -> Result<&PodContainer> {
        self.all_containers()
            .find(|container| container.name == name)
            .with_context(|| format!("no container {name} in {self:?}"))
    }

    /// Whether this is its name, which may be that of its manifest.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        self.name == full_name(name)
    }

    /// All containers, init containers first.
    pub fn all_containers(&self) -> impl Iterator<Item = &PodContainer> {
        self.init_containers.iter().chain(&self.containers)
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
            uid: text(pod, "/metadata/uid"),
            phase: text(pod, "/status/phase"),
            class: text(pod, "/status/qosClass"),
            address: text(pod, "/status/podIP"),
            ready: ready.is_some_and(|condition| text(condition, "/status") == "True"),
            init_containers: containers("/status/initContainerStatuses"),
            containers: containers("/status/containerStatuses"),
        }
    }
}

impl PodContainer {
    /// The exit code of this instance, if it has ended.
    #[must_use]
    pub fn exit_code(&self) -> Option<i64> {
        self.end.as_ref().map(|end| end.exit_code)
    }

    /// The exit code of the previous instance, if there was one.
    #[must_use]
    pub fn previous_exit_code(&self) -> Option<i64> {
        self.previous_end.as_ref().map(|end| end.exit_code)
    }

    /// Whether it waits for this reason.
    #[must_use]
    pub fn waits_for(&self, reason: &str) -> bool {
        self.waiting.as_ref().is_some_and(|(waits_for, _)| waits_for == reason)
    }

    fn read(status: &Value) -> Self {
        let id = text(status, "/containerID");
        let flag = |name: &str| status.pointer(name).and_then(Value::as_bool).unwrap_or_default();
        Self {
            name: text(status, "/name"),
            id: id.split_once("://").map(|(_, id)| id.to_owned()).unwrap_or_default(),
            restart_count: status.pointer("/restartCount").and_then(Value::as_u64).unwrap_or_default(),
            ready: flag("/ready"),
            started: flag("/started"),
            running_since: text(status, "/state/running/startedAt"),
            waiting: status
                .pointer("/state/waiting")
                .map(|waiting| (text(waiting, "/reason"), text(waiting, "/message"))),
            end: status.pointer("/state/terminated").and_then(End::read),
            previous_end: status.pointer("/lastState/terminated").and_then(End::read),
        }
    }
}

impl End {
    fn read(terminated: &Value) -> Option<Self> {
        Some(Self {
            exit_code: terminated.pointer("/exitCode").and_then(Value::as_i64)?,
            reason: text(terminated, "/reason"),
            message: text(terminated, "/message"),
        })
    }
}

/// The string at `pointer`, empty when there is none.
fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Which instance's log to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instance {
    /// The container that runs now.
    Current,
    /// The one before the last restart.
    Previous,
}

impl Kubelet {
    /// Starts a kubelet and waits for its API.
    ///
    /// Its directory gets the directories `manifests` (for pods), `logs`, and `evidence` (for the
    /// pods to leave files in).
    ///
    /// # Errors
    /// When the binary is missing (the message says how to build it), a file cannot be written, or
    /// the API does not answer in time (the message ends with the kubelet's last lines).
    pub fn start(place: Place<'_>) -> Result<Self> {
        let Place { dir, host, driver, .. } = place;
        let program = program(place.peer)?;
        for directory in ["manifests", "logs", "evidence", "settings"] {
            fs::create_dir_all(dir.join(directory)).with_context(|| format!("making {directory}"))?;
        }
        let port = match host {
            Some(host) => host.inside(free_port)?,
            None => free_port()?,
        };
        let cgroup = match driver {
            Driver::Cgroupfs => Cgroup::create(&format!("berth-kubelet-{}", std::process::id()))?,
            Driver::Systemd => Cgroup::of_the_machine()?,
        };
        let (driver_name, root) = match driver {
            Driver::Cgroupfs => ("cgroupfs", cgroup.path()),
            Driver::Systemd => ("systemd", "/".to_owned()),
        };
        let configuration = template(
            "config.yaml",
            &[
                ("DIR", &dir.to_string_lossy()),
                ("SOCKET", &place.socket.to_string_lossy()),
                ("PORT", &port.to_string()),
                ("DRIVER", driver_name),
                ("CGROUP", &root),
            ],
        )?;
        let configuration_file = dir.join("config.yaml");
        fs::write(&configuration_file, configuration).context("writing the kubelet's configuration")?;
        if let Some(settings) = place.settings {
            // The kubelet ignores files there with any other ending.
            fs::write(dir.join("settings/more.conf"), template(settings, &[])?)
                .context("writing the kubelet's settings")?;
        }

        let made = UNAVOIDABLE.iter().map(PathBuf::from).filter(|path| !path.exists()).collect();
        let output = File::create(dir.join("kubelet.log")).context("making the kubelet's log")?;
        let mut command = match host {
            Some(host) => host.command(&program),
            None => Command::new(&program),
        };
        for (option, file) in [
            ("--config", "config.yaml"),
            ("--config-dir", "settings"),
            ("--root-dir", "root"),
            ("--cert-dir", "pki"),
        ] {
            command.arg(option).arg(dir.join(file));
        }
        if place.address {
            command.args(["--node-ip", ADDRESS]);
        }
        command
            .args(["--hostname-override", NODE])
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("sharing the kubelet's log")?)
            .stderr(output);
        let process = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        let http = match host {
            // The client creates its sockets on a thread that it starts here, and which stays in
            // the namespace.
            Some(host) => host.inside(client)?,
            None => client()?,
        };
        let (process, command) = (Mutex::new(process), Mutex::new(command));
        let kubelet = Self { process, command, dir: dir.to_owned(), port, http, made, driver, cgroup };
        kubelet.answers()?;
        Ok(kubelet)
    }

    fn answers(&self) -> Result<()> {
        within(START_OR_END, "the kubelet's API answers", || {
            if let Some(status) = self.process().try_wait().context("looking after the kubelet")? {
                // The closure cannot end the wait early; the last error is reported.
                bail!("the kubelet ended by itself: {status}");
            }
            self.pods().map(|_| Some(()))
        })
        .with_context(|| self.last_words())
    }

    /// Ends the kubelet, which leaves the pods running, and starts it again.
    ///
    /// # Errors
    /// When it does not end, or its API does not answer in time.
    pub fn restart(&self) -> Result<()> {
        self.end().context("ending the kubelet")?;
        let started = self.command.lock().unwrap_or_else(PoisonError::into_inner).spawn();
        *self.process() = started.context("starting the kubelet again")?;
        self.answers()
    }

    fn end(&self) -> Result<()> {
        let mut process = self.process();
        kill(Pid::from_raw(i32::try_from(process.id())?), Signal::SIGTERM).context("asking it to end")?;
        within(START_OR_END, "the kubelet ends", || Ok(process.try_wait()?)).map(drop)
    }

    fn process(&self) -> MutexGuard<'_, Child> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The creator of its pods' cgroups.
    #[must_use]
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// The parent cgroup of all pods; with [`Driver::Systemd`] the machine's root.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The directory that the pods have as `/evidence`.
    #[must_use]
    pub fn evidence(&self) -> PathBuf {
        self.dir.join("evidence")
    }

    /// The directories of pods that the kubelet still keeps: their volumes.
    #[must_use]
    pub fn pod_directories(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.join("root/pods")).into_iter().flatten();
        entries.filter_map(Result::ok).map(|entry| entry.path()).collect()
    }

    /// Gives the kubelet the static pods of the file `tests/kubelet/pods/NAME.yaml` (YAML
    /// documents, one for each pod) with these words filled in: `@WORD@` with its value.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn run_pods(&self, name: &str, words: &[(&str, &str)]) -> Result<()> {
        let manifests = template(&format!("pods/{name}.yaml"), words)?;
        // A file can contain only one pod.
        for (index, manifest) in manifests.split("\n---\n").enumerate() {
            let written = self.dir.join(format!("{name}.yaml"));
            fs::write(&written, manifest).context("writing a manifest")?;
            fs::rename(&written, self.dir.join(format!("manifests/{name}-{index}.yaml")))
                .context("handing over a manifest")?;
        }
        Ok(())
    }

    /// Removes all manifests; the kubelet then ends the pods.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn delete_pods(&self) -> Result<()> {
        let manifests =
            fs::read_dir(self.dir.join("manifests")).context("reading the manifests' directory")?;
        for manifest in manifests {
            fs::remove_file(manifest.context("reading the manifests' directory")?.path())
                .context("removing a manifest")?;
        }
        Ok(())
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

    /// The pod of this name, which may be that of its manifest.
    ///
    /// # Errors
    /// When the API does not answer, or knows no such pod.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let mut pods = self.pods()?.into_iter();
        pods.find(|pod| pod.is_called(name)).with_context(|| format!("the kubelet knows no pod {name}"))
    }

    /// Makes the kubelet run a command in a container, and returns its output. The kubelet splits
    /// the line at each space, and a code other than 0 is an error.
    ///
    /// # Errors
    /// When the API does not answer, or the command does not run or fails; the message has the
    /// kubelet's answer.
    pub fn run(&self, pod: &str, container: &str, command: &str) -> Result<String> {
        let pod = full_name(pod);
        let url = format!("https://127.0.0.1:{}/run/default/{pod}/{container}", self.port);
        let url = reqwest::Url::parse_with_params(&url, [("cmd", command)]).context("writing the address")?;
        let answer = self.http.post(url).send().with_context(|| format!("running {command:?} in {pod}"))?;
        let status = answer.status();
        let text = answer.text().with_context(|| format!("reading what {command:?} says"))?;
        ensure!(status.is_success(), "{command:?} in {container} of {pod}: {status}: {text}");
        Ok(text)
    }

    /// The answer of a web server in a pod or on the host.
    ///
    /// # Errors
    /// When there is no such server or page.
    pub fn page(&self, address: &str, port: u16, path: &str) -> Result<String> {
        let url = format!("http://{address}:{port}{path}");
        let answer = self.http.get(&url).send().and_then(reqwest::blocking::Response::error_for_status);
        let answer = answer.with_context(|| format!("asking for {url}"))?;
        answer.text().with_context(|| format!("reading {url}"))
    }

    /// The log of a container of a pod in the namespace `default`, as the kubelet's API returns it:
    /// the content of the newest file.
    ///
    /// # Errors
    /// When the API does not answer, or has no such log.
    pub fn log(&self, pod: &str, container: &str, instance: Instance) -> Result<String> {
        let query = match instance {
            Instance::Current => "",
            Instance::Previous => "?previous=true",
        };
        self.get(&format!("/containerLogs/default/{}/{container}{query}", full_name(pod)))
    }

    /// The directory of a container's log files, where the kubelet rotates them.
    #[must_use]
    pub fn log_directory(&self, pod: &Pod, container: &str) -> PathBuf {
        self.dir.join(format!("logs/default_{}_{}/{container}", pod.name, pod.uid))
    }

    /// The kubelet's own log, so far.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn own_log(&self) -> Result<String> {
        let log = fs::read(self.dir.join("kubelet.log")).context("reading the kubelet's log")?;
        Ok(String::from_utf8_lossy(&log).into_owned())
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

    /// The answer of its API at a path.
    ///
    /// # Errors
    /// When it does not answer, or not with success.
    pub fn get(&self, path: &str) -> Result<String> {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let answer = self.http.get(&url).send().with_context(|| format!("asking for {path}"))?;
        let status = answer.status();
        let text = answer.text().with_context(|| format!("reading {path}"))?;
        if !status.is_success() {
            bail!("{path} answers {status}: {text}");
        }
        Ok(text)
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        if self.end().is_err() {
            let _ = self.process().kill();
            let _ = self.process().wait();
        }
        // Volumes of pods that a failed test left, then the root directory itself.
        let root = self.dir.join("root");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let below = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
        for mount in below.filter(|mount| mount.starts_with(&root)).collect::<Vec<_>>().into_iter().rev() {
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        for directory in &self.made {
            let _ = fs::remove_dir_all(directory);
        }
        if self.driver == Driver::Systemd {
            // With everything that a failed test left in it.
            let _ = Command::new("systemctl").args(["stop", "kubepods.slice"]).status();
        }
    }
}

/// A static pod's name, with the node's at its end as the kubelet adds it.
fn full_name(name: &str) -> String {
    let suffix = format!("-{NODE}");
    if name.ends_with(&suffix) { name.to_owned() } else { name.to_owned() + &suffix }
}

/// The kubelet to use: `KUBELET`, else the one that `scripts/build-peer` made.
fn program(peer: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("KUBELET") {
        return Ok(path.into());
    }
    Ok(peers::directory(peer)?.join("kubelet"))
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

/// A port of loopback on which nothing is listening now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("finding a free port")?;
    Ok(listener.local_addr().context("finding a free port")?.port())
}

/// A client that accepts the self-signed certificate of a kubelet without an API server. It is only
/// used with 127.0.0.1.
fn client() -> Result<reqwest::blocking::Client> {
    // Refused when another test of this process was first, which is just as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::blocking::Client::builder()
        .tls_danger_accept_invalid_certs(true)
        .no_proxy()
        .timeout(ANSWER)
        .build()
        .context("making an HTTPS client")
}
