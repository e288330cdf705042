//! A single-node Kubernetes cluster on a test's private daemon: etcd, API server, controller
//! manager, scheduler and a kubelet, all on the daemon's test host.
//!
//! The programs come from `scripts/build-peer etcd kubernetes kubelet`. Ports are those that every
//! cluster uses, because the host is private to the test; pods get their network from Berth, and
//! there is no kube-proxy and no DNS. Clients of the API server present a token, and verify it by a
//! certificate authority that `openssl` creates for this one cluster.
//!
//! A kubelet insists on `/var/lib/kubelet` and `/var/log/containers`; they are removed on drop if
//! they did not exist before. Everything else is in the daemon's directory, cgroup and host, and is
//! removed with them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reqwest::blocking::Client;
use serde_json::Value;

use crate::census::{mounts_below, processes_in_network, status_field};
use crate::daemon::Daemon;
use crate::deadline::within;
use crate::peers;
use crate::program::output;

/// What the kubelet calls its node.
pub const NODE: &str = "berth-node";

/// The node's address. Pods of Berth's built-in network are elsewhere (`docs/network.md`,
/// "Settings").
pub const ADDRESS: &str = "10.99.0.1";

/// Time for one answer of a server, on a machine that is busy with other things.
const ANSWER: Duration = Duration::from_secs(20);

/// Time for a server to serve after its start (the API server takes about ten seconds), and to end.
const START_OR_END: Duration = Duration::from_secs(120);

/// Directories that a kubelet makes on the machine whatever its configuration says.
const UNAVOIDABLE: [&str; 2] = ["/var/lib/kubelet", "/var/log/containers"];

/// How much of each log a failed test shows.
const LAST_LINES: usize = 12;

/// The clients of the API server: the file of each kubeconfig, with the user and the group of its
/// token. The API server itself creates roles of these names (Kubernetes, "Using RBAC
/// Authorization", "Core component roles").
const CALLERS: [(&str, &str, &str); 4] = [
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("kubelet", "system:node:berth-node", "system:nodes"),
];

/// A running cluster, ended and cleaned up after on drop.
#[derive(Debug)]
pub struct Cluster<'a> {
    daemon: &'a Daemon,
    dir: PathBuf,
    /// In the order of their start.
    servers: Vec<Server>,
    http: Client,
    made: Vec<PathBuf>,
}

/// A program of the cluster.
#[derive(Debug)]
struct Server {
    name: &'static str,
    process: Child,
}

/// A pod as the API server reports it: the parts of `v1.Pod` (Kubernetes API reference) that the
/// tests look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its uid, which is in the names of its cgroups.
    pub uid: String,
    /// Its address; empty before it has one.
    pub address: String,
    /// Whether its condition `Ready` is true and it is not being deleted.
    pub ready: bool,
    /// The ids of its containers by their names, without the prefix that names the runtime.
    /// Containers without an id are left out.
    pub container_ids: BTreeMap<String, String>,
    /// How often its first container was restarted.
    pub restart_count: u64,
    /// Why its first container waits, if it does.
    pub waiting: String,
    /// Exit code of the previous instance of the first container, if there was one.
    pub previous_exit_code: Option<i64>,
}

impl Pod {
    fn read(pod: &Value) -> Self {
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let ready = conditions.into_iter().flatten().find(|condition| text(condition, "/type") == "Ready");
        let ready = ready.is_some_and(|condition| text(condition, "/status") == "True");
        let container = |field: &str| pod.pointer(&format!("/status/containerStatuses/0{field}"));
        Self {
            name: text(pod, "/metadata/name"),
            uid: text(pod, "/metadata/uid"),
            address: text(pod, "/status/podIP"),
            ready: ready && pod.pointer("/metadata/deletionTimestamp").is_none(),
            container_ids: pod
                .pointer("/status/containerStatuses")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(|status| {
                    let (_, id) = status.get("containerID")?.as_str()?.split_once("://")?;
                    Some((text(status, "/name"), id.to_owned()))
                })
                .collect(),
            restart_count: container("/restartCount").and_then(Value::as_u64).unwrap_or_default(),
            waiting: container("/state/waiting/reason")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
            previous_exit_code: container("/lastState/terminated/exitCode").and_then(Value::as_i64),
        }
    }
}

/// The string at `pointer`, empty when there is none.
fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

impl<'a> Cluster<'a> {
    /// Starts one on `daemon`, and waits until its node is ready for pods.
    ///
    /// # Errors
    /// When a program is missing (the message says how to build it), a file cannot be written, or a
    /// server does not answer in time (the message ends with the servers' last lines).
    pub fn start(daemon: &'a Daemon) -> Result<Self> {
        let dir = daemon.directory("cluster")?;
        make_certificates(&dir)?;
        write_kubeconfigs(&dir)?;
        give_an_address(daemon)?;
        let made = UNAVOIDABLE.iter().map(PathBuf::from).filter(|path| !path.exists()).collect();
        let http = client(daemon, &dir)?;
        let mut cluster = Self { daemon, dir, servers: Vec::new(), http, made };
        cluster.start_all().with_context(|| cluster.last_words())?;
        Ok(cluster)
    }

    fn start_all(&mut self) -> Result<()> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let kubeconfig = |caller: &str| format!("--kubeconfig={}", file(&format!("{caller}.kubeconfig")));
        let kubernetes = peers::directory("kubernetes")?;

        let etcd = [
            format!("--data-dir={}", file("etcd")),
            // Nothing here has to survive a power cut.
            "--unsafe-no-fsync".to_owned(),
        ];
        let apiserver = [
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--advertise-address={ADDRESS}"),
            format!("--cert-dir={}", file("pki")),
            format!("--tls-cert-file={}", file("server.crt")),
            format!("--tls-private-key-file={}", file("server.key")),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("account.key")),
            format!("--service-account-signing-key-file={}", file("account.key")),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ];
        let controllers = [
            kubeconfig("controller-manager"),
            "--bind-address=127.0.0.1".to_owned(),
            "--leader-elect=false".to_owned(),
            "--use-service-account-credentials".to_owned(),
            format!("--root-ca-file={}", file("ca.crt")),
            format!("--service-account-private-key-file={}", file("account.key")),
        ];
        let scheduler = [
            kubeconfig("scheduler"),
            "--bind-address=127.0.0.1".to_owned(),
            "--leader-elect=false".to_owned(),
        ];
        let kubelet = [
            kubeconfig("kubelet"),
            format!("--config={}", file("kubelet.yaml")),
            format!("--root-dir={}", file("kubelet")),
            format!("--cert-dir={}", file("kubelet-pki")),
            format!("--hostname-override={NODE}"),
            format!("--node-ip={ADDRESS}"),
        ];
        let configuration = self.kubelet_configuration()?;
        fs::write(self.dir.join("kubelet.yaml"), configuration)
            .context("writing the kubelet's configuration")?;

        // `scripts/build-peer` names the main package of etcd.
        self.spawn("etcd", &peers::directory("etcd")?.join("server"), &etcd)?;
        self.spawn("kube-apiserver", &kubernetes.join("kube-apiserver"), &apiserver)?;
        self.answers("the API server is ready", |cluster| {
            let answer = cluster.http.get(format!("https://{ADDRESS}:6443/readyz")).send()?;
            Ok(answer.status().is_success().then_some(()))
        })?;
        self.spawn("kube-controller-manager", &kubernetes.join("kube-controller-manager"), &controllers)?;
        self.spawn("kube-scheduler", &kubernetes.join("kube-scheduler"), &scheduler)?;
        self.spawn("kubelet", &peers::directory("kubelet")?.join("kubelet"), &kubelet)?;
        self.answers("the node is there, and pods can have an account", |cluster| {
            // A pod that is requested before the namespace has its account is refused.
            cluster.get(&format!("/api/v1/nodes/{NODE}"))?;
            cluster.get("/api/v1/namespaces/default/serviceaccounts/default").map(Some)
        })?;
        self.kubectl(&["wait", "--for=condition=Ready", "--timeout=120s", &format!("node/{NODE}")])?;
        Ok(())
    }

    fn kubelet_configuration(&self) -> Result<String> {
        let template = manifest("kubelet.yaml");
        let template =
            fs::read_to_string(&template).with_context(|| format!("reading {}", template.display()))?;
        Ok(template
            .replace("@SOCKET@", &self.daemon.socket().to_string_lossy())
            .replace("@DIR@", &self.dir.to_string_lossy())
            .replace("@ADDRESS@", ADDRESS)
            .replace("@CGROUP@", &self.daemon.cgroup().path()))
    }

    fn spawn(&mut self, name: &'static str, program: &Path, arguments: &[String]) -> Result<()> {
        ensure!(program.exists(), "no {}: run scripts/build-peer etcd kubernetes kubelet", program.display());
        let log = File::create(self.log(name)).with_context(|| format!("making the log of {name}"))?;
        let process = self
            .daemon
            .host()
            .command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        self.servers.push(Server { name, process });
        Ok(())
    }

    /// Waits for an answer, or until a server has ended.
    fn answers<T>(&mut self, what: &str, mut look: impl FnMut(&Self) -> Result<Option<T>>) -> Result<T> {
        let mut ended = None;
        let answer = within(START_OR_END, what, || {
            for server in &mut self.servers {
                if let Some(status) = server.process.try_wait().context("looking after a server")? {
                    ended = Some(format!("{} ended by itself: {status}", server.name));
                    return Ok(None);
                }
            }
            Ok(look(self)?.map(Some))
        });
        match (answer, ended) {
            (Ok(Some(answer)), _) => Ok(answer),
            (Err(error), Some(ended)) => Err(error).context(ended),
            (Err(error), None) => Err(error),
            (Ok(None), _) => bail!("{what}: no answer"),
        }
    }

    /// Runs `kubectl` on the test's host, as the cluster's administrator, and returns what it
    /// prints.
    ///
    /// # Errors
    /// When it does not end with success; the message has its output.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        output(self.kubectl_command()?.args(arguments))
    }

    /// `kubectl apply` of a manifest of `tests/cluster`.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn apply(&self, name: &str) -> Result<()> {
        self.kubectl(&["apply", "-f", &manifest(name).to_string_lossy()]).map(drop)
    }

    /// `kubectl delete` of a manifest of `tests/cluster`; returns when the API server has forgotten
    /// it.
    ///
    /// # Errors
    /// When the API server refuses, or it takes too long.
    pub fn delete(&self, name: &str) -> Result<()> {
        let path = manifest(name);
        self.kubectl(&["delete", "--timeout=120s", "--cascade=foreground", "-f", &path.to_string_lossy()])
            .map(drop)
    }

    /// A kubectl that knows the cluster.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn kubectl_command(&self) -> Result<Command> {
        let mut command = self.daemon.host().command(peers::directory("kubernetes")?.join("kubectl"));
        command.env("KUBECONFIG", self.dir.join("admin.kubeconfig"));
        // Its cache of the API server's resources would go into the home directory.
        command.env("KUBECACHEDIR", self.dir.join("kubectl-cache"));
        Ok(command)
    }

    /// The object of the API server at a path.
    ///
    /// # Errors
    /// When it does not answer, or not with JSON.
    pub fn get(&self, path: &str) -> Result<Value> {
        let url = format!("https://{ADDRESS}:6443{path}");
        let answer = self.http.get(url).bearer_auth(token("admin")).send();
        let answer = answer.with_context(|| format!("asking for {path}"))?;
        let status = answer.status();
        let text = answer.text().with_context(|| format!("reading {path}"))?;
        ensure!(status.is_success(), "{path} answers {status}: {text}");
        serde_json::from_str(&text).with_context(|| format!("reading {path}"))
    }

    /// The pods of the namespace `default` that a label selector (`key=value`) chooses, by name;
    /// all of them for an empty selector.
    ///
    /// # Errors
    /// When the API server does not answer with a list.
    pub fn pods(&self, selector: &str) -> Result<Vec<Pod>> {
        self.list(&format!("/api/v1/namespaces/default/pods?labelSelector={selector}"))
            .map(|pods| pods.iter().map(Pod::read).collect())
    }

    /// The pod of this name in the namespace `default`.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        self.get(&format!("/api/v1/namespaces/default/pods/{name}")).map(|pod| Pod::read(&pod))
    }

    /// The items of the list at a path.
    ///
    /// # Errors
    /// When the API server does not answer with a list.
    pub fn list(&self, path: &str) -> Result<Vec<Value>> {
        match self.get(path)?.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => Ok(items),
            Some(Value::Null) => Ok(Vec::new()),
            other => bail!("{path} is no list: {other:?}"),
        }
    }

    /// The answer of a web server on the test's host or in a pod to a request for `path`.
    ///
    /// # Errors
    /// When there is no such server or page.
    pub fn page(&self, address: &str, port: u16, path: &str) -> Result<String> {
        let url = format!("http://{address}:{port}{path}");
        let answer = self.http.get(&url).send().and_then(reqwest::blocking::Response::error_for_status);
        let answer = answer.with_context(|| format!("asking for {url}"))?;
        Ok(answer.text().with_context(|| format!("reading {url}"))?.trim_end().to_owned())
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
        let mut known: Vec<u32> = self.servers.iter().map(|server| server.process.id()).collect();
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
        found.extend(processes.map(|pid| format!("process {pid} {:?}", status_field(pid, "Name"))));
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

    /// The end of each server's log and the pods as they are, for the message of a failed test.
    /// Copies of the whole logs, and the events, are left in `target/test-logs/cluster`.
    #[must_use]
    pub fn last_words(&self) -> String {
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-logs/cluster");
        let _ = fs::create_dir_all(&kept);
        let _ = fs::copy(self.daemon.dir().join("log"), kept.join("berthd.log"));
        let mut words = String::new();
        for server in &self.servers {
            let log = fs::read(self.log(server.name)).unwrap_or_default();
            let _ = fs::write(kept.join(format!("{}.log", server.name)), &log);
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default();
            words += &format!("the last lines of {}:\n{}\n", server.name, last.join("\n"));
        }
        if let Ok(events) = self.kubectl(&["get", "events", "--sort-by=.lastTimestamp"]) {
            let _ = fs::write(kept.join("events"), events);
        }
        if let Ok(pods) = self.kubectl(&["get", "pods", "-o", "wide"]) {
            words += &format!("the pods:\n{pods}\n");
        }
        words
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        // The kubelet first, or it would see the others vanish.
        while let Some(mut server) = self.servers.pop() {
            if let Ok(pid) = i32::try_from(server.process.id()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            // Only the kubelet has something to clean up; the API server would wait for its
            // clients.
            let patience = if server.name == "kubelet" { ANSWER } else { Duration::from_secs(1) };
            if within(patience, "a server ends", || Ok(server.process.try_wait()?)).is_err() {
                let _ = server.process.kill();
                let _ = server.process.wait();
            }
        }
        for directory in &self.made {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

/// The path of a file in `tests/cluster`.
fn manifest(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster").join(name)
}

/// The token of a caller. Not secret: anyone who can reach the API server may know it.
fn token(caller: &str) -> String {
    format!("token-of-{caller}")
}

/// Makes `ca.crt`, the API server's `server.crt` and `server.key`, and `account.key`, which signs
/// service accounts' tokens.
fn make_certificates(dir: &Path) -> Result<()> {
    let openssl = |arguments: &[&str]| {
        output(Command::new("openssl").current_dir(dir).args(arguments))
            .context("openssl makes the certificates")
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let usage = "keyUsage=critical,keyCertSign";
    let authority = ["req", "-x509", "-subj", "/CN=berth-test", "-addext", usage];
    openssl(&[&authority[..], &key, &["-keyout", "ca.key", "-out", "ca.crt"]].concat())?;
    let names = format!("subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{ADDRESS}");
    let server = ["req", "-x509", "-CA", "ca.crt", "-CAkey", "ca.key", "-subj", "/CN=kube-apiserver"];
    let extensions = ["-addext", &names, "-addext", "basicConstraints=critical,CA:FALSE"];
    let files = ["-keyout", "server.key", "-out", "server.crt"];
    openssl(&[&server[..], &key, &extensions, &files].concat())?;
    openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "account.key"])?;
    Ok(())
}

/// Writes `tokens.csv` and a kubeconfig for each caller. JSON is YAML.
fn write_kubeconfigs(dir: &Path) -> Result<()> {
    let mut tokens = String::new();
    for (caller, user, group) in CALLERS {
        tokens += &format!("{},{user},{user},\"{group}\"\n", token(caller));
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "test",
                "cluster": {
                    "server": format!("https://{ADDRESS}:6443"),
                    "certificate-authority": dir.join("ca.crt"),
                },
            }],
            "users": [{ "name": caller, "user": { "token": token(caller) } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": caller } }],
            "current-context": "test",
        });
        let file = dir.join(format!("{caller}.kubeconfig"));
        fs::write(&file, kubeconfig.to_string()).with_context(|| format!("writing {}", file.display()))?;
    }
    fs::write(dir.join("tokens.csv"), tokens).context("writing the tokens")
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

/// A client on the test's host that trusts the cluster's certificate authority and no other.
fn client(daemon: &Daemon, dir: &Path) -> Result<Client> {
    // Refused when another test of this process was first, which is just as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let authority = fs::read(dir.join("ca.crt")).context("reading the certificate authority")?;
    let authority =
        reqwest::Certificate::from_pem(&authority).context("reading the certificate authority")?;
    // The client creates its sockets on a thread that it starts here, and which stays in the
    // namespace.
    daemon.host().inside(|| {
        Client::builder()
            .tls_certs_only([authority])
            .no_proxy()
            // Pods come and go, and their addresses are reused.
            .pool_max_idle_per_host(0)
            .timeout(ANSWER)
            .build()
            .context("making an HTTPS client")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_read_however_little_is_known_of_it() {
        let fresh =
            Pod::read(&json!({"metadata": {"name": "a", "uid": "1"}, "status": {"phase": "Pending"}}));
        assert_eq!((fresh.name.as_str(), fresh.uid.as_str(), fresh.address.as_str()), ("a", "1", ""));
        assert_eq!((fresh.ready, fresh.restart_count, fresh.previous_exit_code), (false, 0, None));

        let ready = json!([{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}]);
        let mut pod =
            json!({"metadata": {"name": "b"}, "status": {"podIP": "10.88.0.2", "conditions": ready}});
        assert!(Pod::read(&pod).ready);
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(!Pod::read(&pod).ready, "a pod that is to end is not counted any more");

        let crashing = json!({"status": {"containerStatuses": [{
            "name": "main",
            "containerID": "berth://0a",
            "restartCount": 2,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 7}},
        }]}});
        let crashing = Pod::read(&crashing);
        assert_eq!((crashing.restart_count, crashing.waiting.as_str()), (2, "CrashLoopBackOff"));
        assert_eq!(crashing.previous_exit_code, Some(7));
        assert_eq!(crashing.container_ids, BTreeMap::from([("main".to_owned(), "0a".to_owned())]));
    }
}
