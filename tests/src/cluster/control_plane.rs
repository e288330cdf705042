//! The control plane of a test's cluster: etcd, API server, controller manager and scheduler, and
//! what clients do with it.
//!
//! The programs come from `scripts/build-peer etcd kubernetes`. Ports are those that every cluster
//! uses, because the host is private to the test. Clients of the API server present a token, and
//! verify it by a certificate authority that `openssl` creates for this one cluster.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::blocking::Client;
use serde_json::Value;

use super::pod::Pod;
use super::servers::{ANSWER, Servers};
use crate::host::Host;
use crate::peers;
use crate::program::output;

/// The network of Services.
const SERVICES: &str = "10.96.0.0/24";

/// The clients of the API server that every cluster has: the file of each kubeconfig, with the user
/// and the group of its token. The API server itself creates roles of these names (Kubernetes,
/// "Using RBAC Authorization", "Core component roles").
const CALLERS: [(&str, &str, &str); 3] = [
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
];

/// What differs from one cluster to another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan<'a> {
    /// The address of its host.
    pub(super) address: &'a str,
    /// More clients, as in [`CALLERS`].
    pub(super) callers: &'a [(String, String, &'static str)],
    /// More arguments of the API server.
    pub(super) apiserver: &'a [&'a str],
    /// The same for the controller manager.
    pub(super) controllers: &'a [&'a str],
}

/// A running control plane, ended on drop.
#[derive(Debug)]
pub struct ControlPlane<'a> {
    host: &'a Host,
    address: String,
    pub(super) servers: Servers,
    http: Client,
}

impl<'a> ControlPlane<'a> {
    /// Starts one on `host`, with its files in `dir`, and waits until pods can be requested.
    pub(super) fn start(host: &'a Host, dir: PathBuf, plan: Plan<'_>) -> Result<Self> {
        let address = plan.address.to_owned();
        make_certificates(&dir, &address)?;
        write_kubeconfigs(&dir, plan)?;
        let http = client(host, Some(&dir))?;
        let mut control = Self { host, address, servers: Servers::new(dir), http };
        let started = control.start_all(plan);
        started.with_context(|| control.servers.last_words(&kept()))?;
        Ok(control)
    }

    fn start_all(&mut self, plan: Plan<'_>) -> Result<()> {
        let file = |name: &str| self.file(name).display().to_string();
        let kubeconfig = |caller: &str| format!("--kubeconfig={}", file(&format!("{caller}.kubeconfig")));
        let kubernetes = peers::directory("kubernetes")?;
        let more = |arguments: &[&str]| arguments.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();

        let etcd = [
            format!("--data-dir={}", file("etcd")),
            // Nothing here has to survive a power cut.
            "--unsafe-no-fsync".to_owned(),
        ];
        let apiserver = [
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--advertise-address={}", self.address),
            format!("--cert-dir={}", file("pki")),
            format!("--tls-cert-file={}", file("server.crt")),
            format!("--tls-private-key-file={}", file("server.key")),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            format!("--service-cluster-ip-range={SERVICES}"),
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
        let apiserver = [&apiserver[..], &more(plan.apiserver)].concat();
        let controllers = [&controllers[..], &more(plan.controllers)].concat();

        // `scripts/build-peer` names the main package of etcd.
        let host = self.host;
        self.servers.start(host, "etcd", &peers::directory("etcd")?.join("server"), &etcd)?;
        self.servers.start(host, "kube-apiserver", &kubernetes.join("kube-apiserver"), &apiserver)?;
        let url = format!("https://{}:6443", self.address);
        let http = &self.http;
        self.servers.answers("the API server is ready", || {
            let answer = http.get(format!("{url}/readyz")).send()?;
            Ok(answer.status().is_success().then_some(()))
        })?;
        let manager = kubernetes.join("kube-controller-manager");
        self.servers.start(host, "kube-controller-manager", &manager, &controllers)?;
        self.servers.start(host, "kube-scheduler", &kubernetes.join("kube-scheduler"), &scheduler)?;
        // A pod that is requested before the namespace has its account is refused.
        self.servers.answers("pods can have an account", || {
            let url = format!("{url}/api/v1/namespaces/default/serviceaccounts/default");
            let answer = http.get(url).bearer_auth(token("admin")).send()?;
            Ok(answer.status().is_success().then_some(()))
        })
    }

    /// The path of one of its files.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.servers.dir().join(name)
    }

    /// Waits until the node `name` is ready for pods.
    pub(super) fn wait_for_node(&mut self, name: &str) -> Result<()> {
        let url = format!("https://{}:6443/api/v1/nodes/{name}", self.address);
        let http = &self.http;
        self.servers.answers("the node is there", || {
            let answer = http.get(&url).bearer_auth(token("admin")).send()?;
            Ok(answer.status().is_success().then_some(()))
        })?;
        self.kubectl(&["wait", "--for=condition=Ready", "--timeout=120s", &format!("node/{name}")]).map(drop)
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

    /// [`apply`](Self::apply), with a word of the manifest replaced.
    ///
    /// # Errors
    /// When the manifest cannot be read, or the API server refuses it.
    pub fn apply_with(&self, name: &str, word: &str, value: &str) -> Result<()> {
        let text = fs::read_to_string(manifest(name)).with_context(|| format!("reading {name}"))?;
        let file = self.file("manifest.yaml");
        fs::write(&file, text.replace(word, value)).context("writing the manifest")?;
        self.kubectl(&["apply", "-f", &file.to_string_lossy()]).map(drop)
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
        let mut command = self.host.command(peers::directory("kubernetes")?.join("kubectl"));
        command.env("KUBECONFIG", self.servers.dir().join("admin.kubeconfig"));
        // Its cache of the API server's resources would go into the home directory.
        command.env("KUBECACHEDIR", self.servers.dir().join("kubectl-cache"));
        Ok(command)
    }

    /// The object of the API server at a path.
    ///
    /// # Errors
    /// When it does not answer, or not with JSON.
    pub fn get(&self, path: &str) -> Result<Value> {
        let url = format!("https://{}:6443{path}", self.address);
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

    /// The answer of a web server that the host reaches to a request for `path`.
    ///
    /// # Errors
    /// When there is no such server or page.
    pub fn page(&self, address: &str, port: u16, path: &str) -> Result<String> {
        page(&self.http, address, port, path)
    }

    /// The end of each server's log and the pods as they are, for the message of a failed test.
    /// Copies of the whole logs, and the events, are left in `target/test-logs/cluster`.
    #[must_use]
    pub fn last_words(&self) -> String {
        let kept = kept();
        let mut words = self.servers.last_words(&kept);
        let events = ["get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"];
        if let Ok(events) = self.kubectl(&events) {
            let _ = fs::write(kept.join("events"), events);
        }
        if let Ok(pods) = self.kubectl(&["get", "pods", "--all-namespaces", "-o", "wide"]) {
            words += &format!("the pods:\n{pods}\n");
        }
        words
    }
}

/// A web client on a host.
#[derive(Debug)]
pub struct Web(Client);

impl Web {
    /// One on `host`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn on(host: &Host) -> Result<Self> {
        client(host, None).map(Self)
    }

    /// The answer to a request for `path`.
    ///
    /// # Errors
    /// When there is no such server or page.
    pub fn page(&self, address: &str, port: u16, path: &str) -> Result<String> {
        page(&self.0, address, port, path)
    }
}

fn page(http: &Client, address: &str, port: u16, path: &str) -> Result<String> {
    let url = format!("http://{address}:{port}{path}");
    let answer = http.get(&url).send().and_then(reqwest::blocking::Response::error_for_status);
    let answer = answer.with_context(|| format!("asking for {url}"))?;
    Ok(answer.text().with_context(|| format!("reading {url}"))?.trim_end().to_owned())
}

/// Where the logs of a failed test are left.
pub(super) fn kept() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-logs/cluster")
}

/// The path of a file in `tests/cluster`.
pub(super) fn manifest(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster").join(name)
}

/// The token of a caller. Not secret: anyone who can reach the API server may know it.
fn token(caller: &str) -> String {
    format!("token-of-{caller}")
}

/// Makes `ca.crt`, the API server's `server.crt` and `server.key`, and `account.key`, which signs
/// service accounts' tokens.
fn make_certificates(dir: &Path, address: &str) -> Result<()> {
    let openssl = |arguments: &[&str]| {
        output(Command::new("openssl").current_dir(dir).args(arguments))
            .context("openssl makes the certificates")
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let usage = "keyUsage=critical,keyCertSign";
    let authority = ["req", "-x509", "-subj", "/CN=berth-test", "-addext", usage];
    openssl(&[&authority[..], &key, &["-keyout", "ca.key", "-out", "ca.crt"]].concat())?;
    // Pods know it by the first address of Services.
    let names = format!("subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{address},IP:10.96.0.1");
    let server = ["req", "-x509", "-CA", "ca.crt", "-CAkey", "ca.key", "-subj", "/CN=kube-apiserver"];
    let extensions = ["-addext", &names, "-addext", "basicConstraints=critical,CA:FALSE"];
    let files = ["-keyout", "server.key", "-out", "server.crt"];
    openssl(&[&server[..], &key, &extensions, &files].concat())?;
    openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "account.key"])?;
    Ok(())
}

/// Writes `tokens.csv` and a kubeconfig for each caller. JSON is YAML.
fn write_kubeconfigs(dir: &Path, plan: Plan<'_>) -> Result<()> {
    let mut tokens = String::new();
    let own =
        CALLERS.into_iter().chain(plan.callers.iter().map(|(name, user, group)| (&**name, &**user, *group)));
    for (caller, user, group) in own {
        tokens += &format!("{},{user},{user},\"{group}\"\n", token(caller));
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "test",
                "cluster": {
                    "server": format!("https://{}:6443", plan.address),
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

/// A client on `host` that trusts the cluster's certificate authority, which is in `dir`, and no
/// other.
fn client(host: &Host, dir: Option<&Path>) -> Result<Client> {
    // Refused when another test of this process was first, which is just as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let authorities = dir.map(|dir| {
        let authority = fs::read(dir.join("ca.crt")).context("reading the certificate authority")?;
        reqwest::Certificate::from_pem(&authority).context("reading the certificate authority")
    });
    let authorities = authorities.transpose()?;
    // The client creates its sockets on a thread that it starts here, and which stays in the
    // namespace.
    host.inside(|| {
        Client::builder()
            .tls_certs_only(authorities)
            .no_proxy()
            // Pods come and go, and their addresses are reused.
            .pool_max_idle_per_host(0)
            .timeout(ANSWER)
            .build()
            .context("making an HTTPS client")
    })
}
