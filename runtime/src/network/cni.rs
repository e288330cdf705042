//! The node's CNI configuration as a network of pods.

use std::borrow::Cow;
use std::fs::{DirBuilder, File};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_cni::{Attachment, Cache, CachedAttachment, Directory, DirectoryError, Network, NetworkConfig};
use berth_model::id::SandboxId;
use berth_sys::ns;
use serde_json::{Map, Value, json};

use super::{Attached, Interface, MAIN_INTERFACE, NetworkError, NotReady, Pod};
use crate::clock;
use crate::config::CniConfig;
use crate::{chain, lock};

/// How long the plugins of a network may take to attach or detach a pod, all together.
const OPERATION: Duration = Duration::from_secs(60);

/// How long they may take to say whether they are ready.
const STATUS: Duration = Duration::from_secs(5);

/// The annotations that limit a pod's traffic, in bits per second: Kubernetes, "Network Plugins".
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// The limits that the bandwidth plugin takes: 1 kbit/s to 1 Pbit/s.
const BANDWIDTH: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// What is sent at once: as much as the bandwidth plugin takes, as other runtimes have it.
const BURST: u64 = u32::MAX as u64;

/// What is before the id of a sandbox in the name of its pinned namespace.
const PIN_PREFIX: &str = "berth-";

/// What there is of sandboxes that are not there.
#[derive(Debug, Default)]
pub(crate) struct DeadAttachments {
    entries: Vec<CachedAttachment>,
    /// Sandboxes whose namespaces are pinned, and that are not in the cache.
    pinned: Vec<String>,
}

impl DeadAttachments {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.pinned.is_empty()
    }
}

/// The network of the first configuration in a directory.
#[derive(Debug)]
pub(crate) struct Cni {
    directory: Directory,
    plugins: Vec<PathBuf>,
    cache: Cache,
    /// Where pods' namespaces are pinned for plugins and agents.
    namespaces: PathBuf,
    /// The last configuration that could be used.
    last_good: Mutex<Option<Arc<NetworkConfig>>>,
    /// Whether there has been one, usable or not: this node has a network of its cluster's.
    had_one: AtomicBool,
    /// What was wrong when the directory was last read, so that it is logged once.
    complaint: Mutex<Option<String>>,
    /// The kubelet's pod CIDR.
    pod_cidr: Mutex<Option<String>>,
}

impl Cni {
    pub(super) fn new(config: &CniConfig) -> Self {
        Self {
            directory: Directory::new(&config.config_directory),
            plugins: config.plugin_directories.clone(),
            cache: Cache::new(&config.cache_directory),
            namespaces: config.namespace_directory.clone(),
            last_good: Mutex::default(),
            had_one: AtomicBool::new(false),
            complaint: Mutex::default(),
            pod_cidr: Mutex::default(),
        }
    }

    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The configuration to attach with; `None` when there is none and never was. One that has
    /// become unusable leaves the last good one in use. Blocking.
    pub(super) fn configuration(&self) -> Result<Option<Arc<NetworkConfig>>, DirectoryError> {
        let error = match self.directory.first() {
            Ok(config) => {
                self.had_one.store(true, Relaxed);
                *lock(&self.complaint) = None;
                *lock(&self.last_good) = Some(config.clone());
                return Ok(Some(config));
            }
            Err(error) => error,
        };
        match error {
            // Removed on purpose: attaching to what it named would fail or, worse, work.
            DirectoryError::Empty { .. } => {
                *lock(&self.last_good) = None;
                if !self.had_one.load(Relaxed) {
                    *lock(&self.complaint) = None;
                    return Ok(None);
                }
                self.complain(&error, "pods wait for a new one");
                return Err(error);
            }
            // Whether there is one is not known.
            DirectoryError::List { .. } => {}
            DirectoryError::Read { .. } | DirectoryError::Invalid { .. } => {
                self.had_one.store(true, Relaxed);
            }
        }
        let last_good = lock(&self.last_good).clone();
        match last_good {
            Some(config) => {
                self.complain(&error, "the last good configuration stays in use");
                Ok(Some(config))
            }
            None => {
                self.complain(&error, "pods wait until it is mended");
                Err(error)
            }
        }
    }

    fn complain(&self, error: &DirectoryError, consequence: &str) {
        let text = chain(error);
        let mut complaint = lock(&self.complaint);
        if complaint.as_deref() != Some(&text) {
            tracing::warn!(error = text, "{consequence}");
            *complaint = Some(text);
        }
    }

    pub(super) fn set_pod_cidr(&self, cidr: &str) {
        *lock(&self.pod_cidr) = Some(cidr.to_owned());
    }

    /// Asks the plugins whether attaching would work. Blocking.
    pub(super) fn status(&self, config: &NetworkConfig) -> Result<(), NotReady> {
        self.network(config).status(Instant::now() + STATUS).map_err(|error| not_ready(chain(&error)))
    }

    pub(super) fn attach(&self, config: &NetworkConfig, pod: &Pod<'_>) -> Result<Attached, NetworkError> {
        let netns = self.pin(pod)?;
        let attachment = Attachment {
            container_id: pod.id.to_string(),
            interface: MAIN_INTERFACE.to_owned(),
            netns,
            args: args(pod),
            capabilities: self.capabilities(pod)?,
        };
        let begin = clock::unix_ns();
        let result = self.network(config).add(&attachment, Instant::now() + OPERATION)?;
        let addresses: Vec<IpAddr> = in_order(result.inside().map(|inside| inside.address));
        if addresses.is_empty() {
            return Err(NetworkError::NoAddress { network: config.name().to_owned() });
        }
        tracing::debug!(
            sandbox = %pod.id, network = config.name(), ?addresses,
            took_ms = (clock::unix_ns() - begin) / 1_000_000, "attached to a CNI network"
        );
        Ok(Attached { interfaces: vec![Interface { name: Cow::Borrowed(MAIN_INTERFACE), addresses }] })
    }

    /// Pins a pod's namespace where plugins and agents look for it.
    fn pin(&self, pod: &Pod<'_>) -> Result<PathBuf, NetworkError> {
        let path = self.namespace(pod.id.as_str());
        let pinned = DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.namespaces)
            .and_then(|()| File::open(pod.namespace))
            .and_then(|namespace| ns::pin_fd(namespace.as_fd(), &path));
        match pinned {
            Ok(()) => Ok(path),
            Err(source) => Err(NetworkError::Pin { path, source }),
        }
    }

    fn namespace(&self, sandbox: &str) -> PathBuf {
        self.namespaces.join(format!("{PIN_PREFIX}{sandbox}"))
    }

    /// Gives back every attachment of a sandbox, and lets go of its namespace. Blocking.
    pub(super) fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let id = sandbox.as_str();
        let mut entries = self.cache.of_container(id).map_err(berth_cni::NetworkError::from)?;
        if entries.is_empty() && ns::is_pinned(&self.namespace(id)).unwrap_or(false) {
            entries.extend(self.lost_entry(id));
        }
        for entry in entries {
            self.delete(&entry)?;
        }
        self.unpin(id)
    }

    /// What is to be deleted of a pod that was attached, or about to be, and is not in the cache:
    /// as far as plugins find it by the pod.
    fn lost_entry(&self, sandbox: &str) -> Option<CachedAttachment> {
        let config = self.configuration().ok().flatten();
        if config.is_none() {
            tracing::warn!(
                sandbox,
                "cannot delete what a pod has of its CNI network: its entry in the cache is lost, and there is no configuration"
            );
        }
        let attachment = Attachment {
            container_id: sandbox.to_owned(),
            interface: MAIN_INTERFACE.to_owned(),
            netns: self.namespace(sandbox),
            args: vec![("IgnoreUnknown".to_owned(), "1".to_owned())],
            capabilities: Map::new(),
        };
        config.map(|config| self.network(&config).entry(&attachment))
    }

    fn unpin(&self, sandbox: &str) -> Result<(), NetworkError> {
        let path = self.namespace(sandbox);
        ns::unpin(&path).map_err(|source| NetworkError::Pin { path, source })
    }

    fn delete(&self, entry: &CachedAttachment) -> Result<(), NetworkError> {
        let netns = Path::new(&entry.netns);
        // Nothing to enter after a restart of the node: plugins then give back what they hold
        // elsewhere.
        let netns = ns::is_pinned(netns).unwrap_or(false).then_some(netns);
        Ok(entry.delete(netns, &self.plugins, &self.cache, Instant::now() + OPERATION)?)
    }

    pub(super) fn addresses_of(&self, sandbox: &SandboxId) -> Vec<IpAddr> {
        let entries = self.cache.of_container(sandbox.as_str()).unwrap_or_default();
        let results = entries.iter().filter_map(|entry| entry.result.as_ref());
        let results: Vec<_> =
            results.filter_map(|result| berth_cni::AddResult::from_object(result).ok()).collect();
        in_order(results.iter().flat_map(|result| result.inside()).map(|inside| inside.address))
    }

    /// Attachments of sandboxes that are not among the living. By their namespaces, which are named
    /// after the sandboxes, they are this daemon's: the cache is shared with other runtimes.
    /// Blocking.
    pub(super) fn dead(&self, living: &[&str]) -> Result<DeadAttachments, NetworkError> {
        let found = self.cache.all().map_err(berth_cni::NetworkError::from)?;
        for error in &found.unreadable {
            tracing::warn!(error = chain(error), "cannot read an entry of CNI's cache; it is left alone");
        }
        let mut entries = found.entries;
        entries.retain(|entry| {
            Path::new(&entry.netns) == self.namespace(&entry.container_id)
                && !living.contains(&entry.container_id.as_str())
        });
        // Pinned, and the daemon ended before anything else was done.
        let mut pinned = self.pinned();
        pinned.retain(|sandbox| {
            !living.contains(&sandbox.as_str()) && !entries.iter().any(|entry| entry.container_id == *sandbox)
        });
        Ok(DeadAttachments { entries, pinned })
    }

    /// The sandboxes whose namespaces are pinned for plugins.
    fn pinned(&self) -> Vec<String> {
        let names = std::fs::read_dir(&self.namespaces).into_iter().flatten().flatten();
        names
            .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix(PIN_PREFIX)?.to_owned()))
            .filter(|id| id.parse::<SandboxId>().is_ok())
            .collect()
    }

    /// Removes them, and asks the plugins to give back what else belongs to nothing. Blocking.
    pub(super) fn remove_dead(&self, dead: &DeadAttachments) -> Result<(), NetworkError> {
        let mut first = Ok(());
        for sandbox in &dead.pinned {
            let deleted = self.lost_entry(sandbox).map_or(Ok(()), |entry| self.delete(&entry));
            first = first.and(deleted.and_then(|()| self.unpin(sandbox)));
        }
        for entry in &dead.entries {
            let deleted = self.delete(entry).and_then(|()| self.unpin(&entry.container_id));
            if deleted.is_ok() {
                tracing::info!(
                    sandbox = entry.container_id,
                    network = entry.network_name,
                    "gave back what a sandbox that is gone had of a CNI network"
                );
            }
            first = first.and(deleted);
        }
        if let Ok(Some(config)) = self.configuration() {
            // Whoever is pinned has been attached, or is being so.
            let living = self.pinned();
            let end = Instant::now() + OPERATION;
            let collected = self.network(&config).collect(&living, MAIN_INTERFACE, end);
            first = first.and(collected.map_err(Into::into));
        }
        first
    }

    fn network<'a>(&'a self, config: &'a NetworkConfig) -> Network<'a> {
        Network { config, directories: &self.plugins, cache: &self.cache }
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
        let limit = |annotation: &'static str| match config.annotations.get(annotation) {
            None => Ok(None),
            Some(value) => bits(value)
                .map(Some)
                .ok_or_else(|| NetworkError::Bandwidth { annotation, value: value.clone() }),
        };
        let mut bandwidth = Map::new();
        for (annotation, rate, burst) in
            [(INGRESS, "ingressRate", "ingressBurst"), (EGRESS, "egressRate", "egressBurst")]
        {
            if let Some(bits) = limit(annotation)? {
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
        if let Some(cidr) = &*lock(&self.pod_cidr) {
            let ranges: Vec<Value> =
                cidr.split(',').map(|subnet| json!([{"subnet": subnet.trim()}])).collect();
            capabilities.insert("ipRanges".into(), ranges.into());
        }
        if !config.cgroup_parent.is_empty() {
            capabilities.insert("cgroupPath".into(), config.cgroup_parent.clone().into());
        }
        capabilities.insert("io.kubernetes.cri.pod-annotations".into(), json!(config.annotations));
        Ok(capabilities)
    }
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
fn in_order(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = addresses.collect();
    addresses.sort_by_key(IpAddr::is_ipv6);
    addresses
}

/// A quantity of Kubernetes, as it is used for bandwidth: digits and a decimal or binary suffix.
fn bits(quantity: &str) -> Option<u64> {
    let end = quantity.find(|character: char| !character.is_ascii_digit()).unwrap_or(quantity.len());
    let (digits, suffix) = quantity.split_at(end);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor).filter(|bits| BANDWIDTH.contains(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(directory: &Path) -> Cni {
        Cni::new(&CniConfig {
            config_directory: directory.join("net.d"),
            plugin_directories: Vec::new(),
            cache_directory: directory.join("cache"),
            namespace_directory: directory.join("netns"),
        })
    }

    #[test]
    fn a_node_without_cni_stays_one_after_an_error() {
        let top = tempfile::tempdir().unwrap();
        let cni = at(top.path());
        assert_eq!(cni.configuration().unwrap(), None);
        // It cannot be listed for a while, as when descriptors run out.
        std::fs::write(top.path().join("net.d"), "").unwrap();
        assert!(matches!(cni.configuration(), Err(DirectoryError::List { .. })));
        std::fs::remove_file(top.path().join("net.d")).unwrap();
        assert_eq!(cni.configuration().unwrap(), None);
    }

    #[test]
    fn a_node_of_a_cluster_stays_one_without_configuration() {
        let top = tempfile::tempdir().unwrap();
        let (cni, file) = (at(top.path()), top.path().join("net.d/1.conf"));
        std::fs::create_dir(top.path().join("net.d")).unwrap();
        std::fs::write(&file, "{").unwrap();
        assert!(matches!(cni.configuration(), Err(DirectoryError::Invalid { .. })));
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(cni.configuration(), Err(DirectoryError::Empty { .. })));
        std::fs::write(&file, r#"{"cniVersion": "1.0.0", "name": "n", "type": "bridge"}"#).unwrap();
        assert!(cni.configuration().unwrap().is_some());
    }

    #[test]
    fn a_bandwidth_is_a_quantity_in_the_plugins_range() {
        for (quantity, expected) in [
            ("1M", Some(1_000_000)),
            ("1000", Some(1_000)),
            ("10Mi", Some(10 << 20)),
            ("1P", Some(1_000_000_000_000_000)),
            ("999", None),
            ("2P", None),
            ("", None),
            ("M", None),
            ("1m", None),
            ("-1M", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(bits(quantity), expected, "{quantity}");
        }
    }
}
