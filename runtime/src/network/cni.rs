//! The node's CNI configuration as a network of pods.
//!
//! What touches CNI's directories is done by workers ([`crate::host_paths::cni`]): containers of
//! network add-ons have mounts of them, and may keep them locked. While one does not answer, the
//! last good configuration stays in use, and what needs the directory fails with its name.

use std::borrow::Cow;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_cni::{Attachment, Cache, NetworkConfig, Seen};
use berth_model::id::SandboxId;
use berth_network::Bandwidth;
use berth_sys::host_path::{self, Cached};
use serde_json::{Map, Value, json};

use super::pod_cidr::PodCidr;
use super::{Attached, Interface, MAIN_INTERFACE, NetworkError, NotReady, Pod, bandwidth};
use crate::clock;
use crate::config::CniConfig;
use crate::host_paths::cni::{Asked, Configuration, Directories, Outcome, Task};
use crate::host_paths::{HostPathError, HostPaths};
use crate::{chain, lock};

/// How long a directory may take to answer, at most: as long as workers have.
const PATIENCE: Duration = Duration::MAX;

/// The same before the daemon serves.
pub(super) const AT_START: Duration = Duration::from_secs(1);

/// The same when plugins are asked for their status, which is repeated soon.
const STATUS: Duration = Duration::from_secs(5);

/// What tells that this node belongs to a cluster, which brings its network: kubeadm and most
/// others put the kubelet's configuration there.
const KUBELET: &str = "/var/lib/kubelet/config.yaml";

/// What is sent at once: as much as the bandwidth plugin takes, as other runtimes have it.
const BURST: u64 = u32::MAX as u64;

/// The network of the first configuration in a directory.
#[derive(Debug)]
pub(crate) struct Cni {
    directories: Directories,
    workers: HostPaths,
    known: Mutex<Known>,
    pod_cidr: Arc<PodCidr>,
}

/// What is known of the directory of configurations.
#[derive(Debug, Default)]
struct Known {
    /// The last configuration that could be used.
    last_good: Option<Arc<NetworkConfig>>,
    /// Whether there has been one, usable or not: this node has a network of its cluster's.
    had_one: bool,
    /// The directory as it was when that was found out, if it can tell a change.
    seen: Option<Seen>,
    /// What was wrong when the directory was last read, so that it is logged once.
    complaint: Option<String>,
}

/// What the directory says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Configured {
    Network(Arc<NetworkConfig>),
    /// Nothing, and it never has.
    Nothing {
        /// The cluster's network will come.
        has_kubelet: bool,
    },
}

impl Cni {
    pub(super) fn new(config: &CniConfig, workers: HostPaths, pod_cidr: Arc<PodCidr>) -> Self {
        let CniConfig { config_directory, plugin_directories, cache_directory, namespace_directory } =
            config.clone();
        Self {
            directories: Directories {
                configurations: config_directory,
                plugins: plugin_directories,
                cache: cache_directory,
                namespaces: namespace_directory,
            },
            workers,
            known: Mutex::default(),
            pod_cidr,
        }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directories.configurations
    }

    fn ask(&self, task: Task) -> Result<Outcome, HostPathError> {
        self.ask_within(task, PATIENCE)
    }

    fn ask_within(&self, task: Task, patience: Duration) -> Result<Outcome, HostPathError> {
        self.workers.cni(&Asked { task, directories: self.directories.clone() }, patience)
    }

    /// The configuration to attach with. One that has become unusable leaves the last good one in
    /// use. Blocking.
    pub(super) fn configuration(&self) -> Result<Configured, NetworkError> {
        self.configuration_within(PATIENCE)
    }

    pub(super) fn configuration_within(&self, patience: Duration) -> Result<Configured, NetworkError> {
        if let Some(unchanged) = self.unchanged() {
            return Ok(unchanged);
        }
        let task = Task::Configuration { kubelet: PathBuf::from(KUBELET) };
        match self.ask_within(task, patience) {
            Ok(Outcome::Configuration(found)) => self.take(found),
            Ok(other) => self.take(Configuration::Unknown(format!("{other:?} is no answer"))),
            // Whether there is one is not known. The log has it when it begins and when it ends.
            Err(error) => {
                let mut known = lock(&self.known);
                known.seen = None;
                known.last_good.clone().map(Configured::Network).ok_or(NetworkError::Cni(error))
            }
        }
    }

    /// What is known, if the directory has not changed. For pods this is the usual way, and takes
    /// two system calls.
    fn unchanged(&self) -> Option<Configured> {
        let known = lock(&self.known);
        if !known.seen.as_ref()?.is_unchanged(self.directory()) {
            return None;
        }
        match &known.last_good {
            Some(config) => Some(Configured::Network(config.clone())),
            None if known.had_one => None,
            None => match host_path::look_cached(Path::new(KUBELET)) {
                Cached::Is(_) => Some(Configured::Nothing { has_kubelet: true }),
                Cached::Absent => Some(Configured::Nothing { has_kubelet: false }),
                Cached::Unknown => None,
            },
        }
    }

    fn take(&self, found: Configuration) -> Result<Configured, NetworkError> {
        let mut known = lock(&self.known);
        known.seen = None;
        let error = match found {
            Configuration::Found { text, seen } => match NetworkConfig::from_json(text.as_bytes()) {
                Ok(config) => {
                    let config = Arc::new(config);
                    *known = Known { last_good: Some(config.clone()), had_one: true, seen, complaint: None };
                    return Ok(Configured::Network(config));
                }
                // It was parsed already.
                Err(error) => chain(&error),
            },
            // Removed on purpose: attaching to what it named would fail or, worse, work.
            Configuration::Nothing { has_kubelet, seen } => {
                known.last_good = None;
                if !known.had_one {
                    known.complaint = None;
                    known.seen = seen;
                    return Ok(Configured::Nothing { has_kubelet });
                }
                let error = format!("there is no CNI configuration in {}", self.directory().display());
                known.complain(&error, "pods wait for a new one");
                return Err(NetworkError::CniConfiguration(error));
            }
            // Whether there is one is not known.
            Configuration::Unknown(error) => error,
            Configuration::Unusable(error) => {
                known.had_one = true;
                error
            }
        };
        match known.last_good.clone() {
            Some(config) => {
                known.complain(&error, "the last good configuration stays in use");
                Ok(Configured::Network(config))
            }
            None => {
                known.complain(&error, "pods wait until it is mended");
                Err(NetworkError::CniConfiguration(error))
            }
        }
    }

    /// Asks the plugins whether attaching would work. Blocking.
    pub(super) fn status(&self, config: &NetworkConfig) -> Result<(), NotReady> {
        if !config.has_status() {
            return Ok(());
        }
        let asked = self.ask_within(Task::Status { config: text(config) }, STATUS);
        asked.map(drop).map_err(|error| not_ready(chain(&error)))
    }

    pub(super) fn attach(&self, config: &NetworkConfig, pod: &Pod<'_>) -> Result<Attached, NetworkError> {
        let attachment = Attachment {
            args: args(pod),
            capabilities: self.capabilities(pod)?,
            ..self.attachment(pod.id.as_str())
        };
        let begin = clock::unix_ns();
        let namespace = pod.namespace.to_owned();
        let (addresses, dns) = match self.ask(Task::Attach { config: text(config), namespace, attachment })? {
            Outcome::Attached { addresses, dns } => (in_order(addresses), dns),
            _ => (Vec::new(), None),
        };
        if addresses.is_empty() {
            return Err(NetworkError::NoAddress { network: config.name().to_owned() });
        }
        tracing::debug!(
            sandbox = %pod.id, network = config.name(), ?addresses,
            took_ms = (clock::unix_ns() - begin) / 1_000_000, "attached to a CNI network"
        );
        Ok(Attached { interfaces: vec![Interface { name: Cow::Borrowed(MAIN_INTERFACE), addresses }], dns })
    }

    /// Whether a directory is known not to answer: then nothing of a pod is made.
    pub(super) fn check(&self) -> Result<(), NetworkError> {
        let Directories { configurations: _, plugins, cache, namespaces } = &self.directories;
        let results = Cache::new(cache).directory().to_owned();
        let needed = [plugins.as_slice(), &[results, namespaces.clone()]].concat();
        Ok(self.workers.check_plugins(needed)?)
    }

    /// As far as it is known from the sandbox's id.
    fn attachment(&self, sandbox: &str) -> Attachment {
        Attachment {
            container_id: sandbox.to_owned(),
            interface: MAIN_INTERFACE.to_owned(),
            netns: self.directories.pin(sandbox),
            args: vec![("IgnoreUnknown".to_owned(), "1".to_owned())],
            capabilities: Map::new(),
        }
    }

    /// Gives back every attachment of a sandbox, and lets go of its namespace. Blocking.
    pub(super) fn detach(&self, sandbox: &str) -> Result<(), NetworkError> {
        let config = lock(&self.known).last_good.as_deref().map(text);
        let task = Task::Detach { sandbox: sandbox.to_owned(), config, lost: self.attachment(sandbox) };
        if matches!(self.ask(task)?, Outcome::Lost) {
            tracing::warn!(
                sandbox,
                "cannot delete what a pod has of its CNI network: its entry in the cache is lost, and there is no configuration"
            );
        }
        Ok(())
    }

    /// The addresses of a sandbox, unless they take long to find out.
    pub(super) fn addresses_of(&self, sandbox: &SandboxId) -> Vec<IpAddr> {
        match self.ask_within(Task::Addresses { sandbox: sandbox.to_string() }, AT_START) {
            Ok(Outcome::Addresses(addresses)) => in_order(addresses),
            _ => Vec::new(),
        }
    }

    /// Gives back what there is of sandboxes that `exists` does not know. If this is the network of
    /// the node's pods, or was, the plugins also give back what else belongs to nothing. Blocking.
    pub(super) fn remove_dead(
        &self,
        exists: &dyn Fn(&str) -> bool,
        mut is_in_use: bool,
    ) -> Result<(), NetworkError> {
        let (ids, unreadable) = match self.ask(Task::Sandboxes)? {
            Outcome::Sandboxes { ids, unreadable } => (ids, unreadable),
            _ => (Vec::new(), Vec::new()),
        };
        for error in unreadable {
            tracing::warn!(error, "cannot read an entry of CNI's cache; it is left alone");
        }
        let mut first = Ok(());
        for sandbox in ids.iter().filter(|id| !exists(id)) {
            is_in_use = true;
            let detached = self.detach(sandbox);
            if detached.is_ok() {
                tracing::info!(sandbox, "gave back what a sandbox that is gone had of a CNI network");
            }
            first = first.and(detached);
        }
        if let Some(Configured::Network(config)) = is_in_use.then(|| self.configuration().ok()).flatten() {
            let task = Task::Collect { config: text(&config), interface: MAIN_INTERFACE.to_owned() };
            first = first.and(self.ask(task).map(drop).map_err(Into::into));
        }
        first
    }

    /// What plugins may have of a pod if their configuration asks for it: the conventions of CNI's
    /// "CONVENTIONS.md", and those of Kubernetes' runtimes.
    fn capabilities(&self, pod: &Pod<'_>) -> Result<Map<String, Value>, NetworkError> {
        let config = pod.config;
        let mut capabilities = Map::new();
        let ports: Vec<Value> = config
            .port_mappings
            .iter()
            .filter(|mapping| mapping.host_port != 0)
            .map(|mapping| {
                json!({
                    "hostPort": mapping.host_port,
                    "containerPort": mapping.container_port,
                    "protocol": mapping.protocol.to_ascii_lowercase(),
                    "hostIP": mapping.host_ip,
                })
            })
            .collect();
        if !ports.is_empty() {
            capabilities.insert("portMappings".into(), ports.into());
        }
        let Bandwidth { ingress, egress } = bandwidth::of(config)?;
        let mut bandwidth = Map::new();
        for (limit, rate, burst) in
            [(ingress, "ingressRate", "ingressBurst"), (egress, "egressRate", "egressBurst")]
        {
            if let Some(bits) = limit {
                bandwidth.insert(rate.into(), bits.into());
                bandwidth.insert(burst.into(), BURST.into());
            }
        }
        if !bandwidth.is_empty() {
            capabilities.insert("bandwidth".into(), bandwidth.into());
        }
        if let Some(dns) = &config.dns {
            capabilities.insert(
                "dns".into(),
                json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options}),
            );
        }
        let ranges: Vec<Value> =
            self.pod_cidr.networks().iter().map(|subnet| json!([{"subnet": subnet.to_string()}])).collect();
        if !ranges.is_empty() {
            capabilities.insert("ipRanges".into(), ranges.into());
        }
        if !config.cgroup_parent.is_empty() {
            capabilities.insert("cgroupPath".into(), config.cgroup_parent.clone().into());
        }
        capabilities.insert("io.kubernetes.cri.pod-annotations".into(), json!(config.annotations));
        Ok(capabilities)
    }
}

impl Known {
    fn complain(&mut self, error: &str, consequence: &str) {
        if self.complaint.as_deref() != Some(error) {
            tracing::warn!(error, "{consequence}");
            self.complaint = Some(error.to_owned());
        }
    }
}

/// A configuration was read from JSON, which is UTF-8.
fn text(config: &NetworkConfig) -> String {
    String::from_utf8_lossy(config.text()).into_owned()
}

pub(super) fn not_ready(message: String) -> NotReady {
    NotReady { reason: "NetworkPluginNotReady", message }
}

/// What plugins that know Kubernetes look for.
fn args(pod: &Pod<'_>) -> Vec<(String, String)> {
    let metadata = &pod.config.metadata;
    [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &metadata.namespace),
        ("K8S_POD_NAME", &metadata.name),
        ("K8S_POD_INFRA_CONTAINER_ID", pod.id.as_str()),
        ("K8S_POD_UID", &metadata.uid),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// The first of IPv4 is the pod's main address, as other runtimes have it.
fn in_order(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    addresses.sort_by_key(IpAddr::is_ipv6);
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn cni() -> Cni {
        let config = CniConfig {
            config_directory: "/nonexistent/net.d".into(),
            plugin_directories: Vec::new(),
            cache_directory: "/nonexistent/cache".into(),
            namespace_directory: "/nonexistent/netns".into(),
        };
        let pod_cidr = PodCidr::open(Path::new("/nonexistent")).unwrap();
        Cni::new(&config, HostPaths::for_cni(tokio::runtime::Handle::current()), Arc::new(pod_cidr))
    }

    fn nothing() -> Configuration {
        Configuration::Nothing { has_kubelet: false, seen: None }
    }

    fn found() -> Configuration {
        let text = r#"{"cniVersion": "1.0.0", "name": "n", "type": "bridge"}"#;
        Configuration::Found { text: text.to_owned(), seen: None }
    }

    fn unknown() -> Configuration {
        Configuration::Unknown("it does not answer".to_owned())
    }

    #[tokio::test]
    async fn a_node_without_cni_stays_one_after_an_error() {
        let cni = cni().await;
        let is_nothing = |taken: Result<Configured, NetworkError>| {
            assert_eq!(taken.unwrap(), Configured::Nothing { has_kubelet: false });
        };
        is_nothing(cni.take(nothing()));
        // It cannot be listed for a while, as when descriptors run out.
        assert_eq!(cni.take(unknown()).unwrap_err().to_string(), "it does not answer");
        is_nothing(cni.take(nothing()));
    }

    #[tokio::test]
    async fn a_node_of_a_cluster_stays_one_without_configuration() {
        let cni = cni().await;
        assert!(cni.take(Configuration::Unusable("it is torn".to_owned())).is_err());
        assert!(cni.take(nothing()).unwrap_err().to_string().contains("there is no CNI configuration in"));
        let is_network = |taken| matches!(taken, Ok(Configured::Network(_)));
        assert!(is_network(cni.take(found())));
        // The last good one.
        assert!(is_network(cni.take(unknown())));
        assert!(is_network(cni.take(Configuration::Unusable("it is torn".to_owned()))));
        assert!(cni.take(nothing()).is_err());
        assert!(cni.take(unknown()).is_err());
    }
}
