//! What workers do for CNI: everything that touches its directories, of which containers of
//! network add-ons have mounts, and running plugins.
//!
//! The daemon decides what is done, and keeps what was found.

use std::fs::{DirBuilder, File};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_cni::{
    AddResult, Attachment, Cache, CachedAttachment, DirectoryError, Host, Network, NetworkConfig,
    NetworkError, Seen, Step,
};
use berth_model::id::SandboxId;
use berth_model::sandbox::Dns;
use berth_sys::ns;
use serde::{Deserialize, Serialize};

use crate::chain;

/// How long the plugins of a network may take to attach or detach a pod, all together.
const OPERATION: Duration = Duration::from_secs(60);

/// How long they may take to say whether they are ready.
const STATUS: Duration = Duration::from_secs(5);

/// What is before the id of a sandbox in the name of its pinned namespace.
const PIN_PREFIX: &str = "berth-";

/// The directories of CNI.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Directories {
    /// Configurations.
    pub(crate) configurations: PathBuf,
    /// Plugins, in the order in which they are searched.
    pub(crate) plugins: Vec<PathBuf>,
    /// libcni's cache.
    pub(crate) cache: PathBuf,
    /// Where pods' namespaces are pinned for plugins and agents.
    pub(crate) namespaces: PathBuf,
}

/// Something to do, and where.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Asked {
    pub(crate) task: Task,
    pub(crate) directories: Directories,
}

/// Something to do. A configuration is the text of one.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// To find the configuration: [`Outcome::Configuration`]. Without one, whether there is a
    /// kubelet's.
    Configuration { kubelet: PathBuf },
    /// To pin a namespace and attach it: [`Outcome::Attached`].
    Attach { config: String, namespace: PathBuf, attachment: Attachment },
    /// To give back every attachment of a sandbox and let go of its namespace: [`Outcome::Done`].
    /// The configuration is for one whose entry in the cache is lost, with what is known of it.
    Detach { sandbox: String, config: Option<String>, lost: Attachment },
    /// The addresses of a sandbox, from the cache: [`Outcome::Addresses`].
    Addresses { sandbox: String },
    /// The sandboxes of which there is anything: [`Outcome::Sandboxes`].
    Sandboxes,
    /// To ask plugins whether attaching would work: [`Outcome::Done`].
    Status { config: String },
    /// To have plugins give back what belongs to nothing: [`Outcome::Done`].
    Collect { config: String, interface: String },
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Done,
    /// What a sandbox has cannot be given back without a configuration.
    Lost,
    Configuration(Configuration),
    Addresses(Vec<IpAddr>),
    Attached {
        addresses: Vec<IpAddr>,
        /// What the network says about name servers, if anything.
        dns: Option<Dns>,
    },
    Sandboxes {
        ids: Vec<String>,
        /// Why some entries of the cache could not be read.
        unreadable: Vec<String>,
    },
}

/// What there is in the directory of configurations.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Configuration {
    Found {
        text: String,
        seen: Option<Seen>,
    },
    Nothing {
        has_kubelet: bool,
        seen: Option<Seen>,
    },
    /// Whether there is one is not known.
    Unknown(String),
    /// There is one, and it cannot be used.
    Unusable(String),
}

impl Directories {
    /// Where the namespace of a sandbox is pinned.
    pub(crate) fn pin(&self, sandbox: &str) -> PathBuf {
        self.namespaces.join(format!("{PIN_PREFIX}{sandbox}"))
    }
}

impl Task {
    /// Whether plugins may be run for it.
    pub(super) fn runs_plugins(&self) -> bool {
        match self {
            Self::Attach { .. } | Self::Detach { .. } | Self::Status { .. } | Self::Collect { .. } => true,
            Self::Configuration { .. } | Self::Addresses { .. } | Self::Sandboxes => false,
        }
    }
}

impl Asked {
    /// The directories that it may need.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let Directories { configurations, plugins, cache, namespaces } = &self.directories;
        let results = Cache::new(cache).directory().to_owned();
        let all = || [plugins.as_slice(), &[results.clone(), namespaces.clone()]].concat();
        match &self.task {
            Task::Configuration { kubelet } => vec![configurations.clone(), kubelet.clone()],
            Task::Attach { .. } | Task::Detach { .. } | Task::Collect { .. } => all(),
            Task::Addresses { .. } => vec![results],
            Task::Sandboxes => vec![results, namespaces.clone()],
            Task::Status { .. } => plugins.clone(),
        }
    }
}

/// Does what is asked, and says each step before. The answer is JSON, or the reason why there is
/// none.
pub(super) fn perform(
    asked: &[u8],
    caller: BorrowedFd<'_>,
    announce: &dyn Fn(Step<'_>),
) -> Result<Vec<u8>, String> {
    let asked: Asked = serde_json::from_slice(asked).map_err(|error| chain(&error))?;
    let cache = Cache::new(&asked.directories.cache);
    let host =
        Host { directories: &asked.directories.plugins, cache: &cache, announce, caller: Some(caller) };
    let doing = Doing { directories: &asked.directories, host };
    let outcome = doing.perform(asked.task)?;
    serde_json::to_vec(&outcome).map_err(|error| chain(&error))
}

struct Doing<'a> {
    directories: &'a Directories,
    host: Host<'a>,
}

impl Doing<'_> {
    fn perform(&self, task: Task) -> Result<Outcome, String> {
        match task {
            Task::Configuration { kubelet } => Ok(Outcome::Configuration(self.configuration(&kubelet))),
            Task::Attach { config, namespace, attachment } => self.attach(&config, &namespace, &attachment),
            Task::Detach { sandbox, config, lost } => self.detach(&sandbox, config.as_deref(), &lost),
            Task::Addresses { sandbox } => self.addresses(&sandbox),
            Task::Sandboxes => self.sandboxes(),
            Task::Status { config } => {
                let config = parsed(&config)?;
                self.network(&config).status(Instant::now() + STATUS).map_err(|error| chain(&error))?;
                Ok(Outcome::Done)
            }
            Task::Collect { config, interface } => {
                let config = parsed(&config)?;
                // Whoever is pinned has been attached, or is being so.
                let living = self.pinned();
                self.network(&config)
                    .collect(&living, &interface, Instant::now() + OPERATION)
                    .map_err(|error| chain(&error))?;
                Ok(Outcome::Done)
            }
        }
    }

    fn at(&self, path: &Path) {
        (self.host.announce)(Step::Path(path));
    }

    fn network<'a>(&'a self, config: &'a NetworkConfig) -> Network<'a> {
        Network { config, host: self.host }
    }

    fn configuration(&self, kubelet: &Path) -> Configuration {
        self.at(&self.directories.configurations);
        match berth_cni::first(&self.directories.configurations) {
            Ok(found) => match NetworkConfig::from_json(&found.text) {
                Ok(_) => Configuration::Found {
                    // The text of JSON.
                    text: String::from_utf8_lossy(&found.text).into_owned(),
                    seen: found.seen.filter(|_| found.path.to_str().is_some()),
                },
                Err(source) => {
                    let path = found.path;
                    Configuration::Unusable(chain(&DirectoryError::Invalid { path, source }))
                }
            },
            Err(DirectoryError::Empty { seen, .. }) => {
                self.at(kubelet);
                Configuration::Nothing { has_kubelet: kubelet.exists(), seen: seen.map(|seen| *seen) }
            }
            Err(error @ DirectoryError::List { .. }) => Configuration::Unknown(chain(&error)),
            Err(error) => Configuration::Unusable(chain(&error)),
        }
    }

    fn attach(&self, config: &str, namespace: &Path, attachment: &Attachment) -> Result<Outcome, String> {
        let config = parsed(config)?;
        self.pin(namespace, &attachment.netns)?;
        let result = self
            .network(&config)
            .add(attachment, Instant::now() + OPERATION)
            .map_err(|error| chain(&error))?;
        let addresses = result.inside().map(|inside| inside.address).collect();
        Ok(Outcome::Attached { addresses, dns: dns(result.dns) })
    }

    /// Pins a pod's namespace where plugins and agents look for it.
    fn pin(&self, namespace: &Path, path: &Path) -> Result<(), String> {
        self.at(path);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.directories.namespaces)
            .and_then(|()| File::open(namespace))
            .and_then(|namespace| ns::pin_fd(namespace.as_fd(), path))
            .map_err(|error| format!("cannot pin the pod's network namespace at {}: {error}", path.display()))
    }

    fn detach(&self, sandbox: &str, config: Option<&str>, lost: &Attachment) -> Result<Outcome, String> {
        let pin = self.directories.pin(sandbox);
        let mut outcome = Outcome::Done;
        let mut entries = self.entries_of(sandbox)?;
        self.at(&pin);
        // Attached, or about to be, and not in the cache: plugins find it by the pod, if they do.
        if entries.is_empty() && ns::is_pinned(&pin).unwrap_or(false) {
            match config {
                Some(config) => entries.push(self.network(&parsed(config)?).entry(lost)),
                None => outcome = Outcome::Lost,
            }
        }
        for entry in entries {
            self.delete(&entry).map_err(|error| chain(&error))?;
        }
        self.at(self.host.cache.directory());
        self.host.cache.remove_unfinished(sandbox).map_err(|error| chain(&error))?;
        self.at(&pin);
        ns::unpin(&pin).map_err(|error| {
            format!("cannot unpin the pod's network namespace at {}: {error}", pin.display())
        })?;
        Ok(outcome)
    }

    fn delete(&self, entry: &CachedAttachment) -> Result<(), NetworkError> {
        let netns = Path::new(&entry.netns);
        self.at(netns);
        // Nothing to enter after a restart of the node: plugins then give back what they hold
        // elsewhere.
        let netns = ns::is_pinned(netns).unwrap_or(false).then_some(netns);
        entry.delete(netns, self.host, Instant::now() + OPERATION)
    }

    fn entries_of(&self, sandbox: &str) -> Result<Vec<CachedAttachment>, String> {
        self.at(self.host.cache.directory());
        self.host.cache.of_container(sandbox).map_err(|error| chain(&error))
    }

    fn addresses(&self, sandbox: &str) -> Result<Outcome, String> {
        let entries = self.entries_of(sandbox)?;
        let results = entries.iter().filter_map(|entry| entry.result.as_ref());
        let results: Vec<AddResult> =
            results.filter_map(|result| AddResult::from_object(result).ok()).collect();
        let inside = results.iter().flat_map(AddResult::inside);
        Ok(Outcome::Addresses(inside.map(|inside| inside.address).collect()))
    }

    /// By their namespaces, which are named after the sandboxes, attachments are this daemon's: the
    /// cache is shared with other runtimes.
    fn sandboxes(&self) -> Result<Outcome, String> {
        self.at(self.host.cache.directory());
        let found = self.host.cache.all().map_err(|error| chain(&error))?;
        let unreadable = found.unreadable.iter().map(|error| chain(error)).collect();
        let its = found.entries.into_iter();
        let mut ids: Vec<String> = its
            .filter(|entry| Path::new(&entry.netns) == self.directories.pin(&entry.container_id))
            .map(|entry| entry.container_id)
            // Pinned, and the daemon ended before anything else was done.
            .chain(self.pinned())
            .filter(|id| id.parse::<SandboxId>().is_ok())
            .collect();
        ids.sort();
        ids.dedup();
        Ok(Outcome::Sandboxes { ids, unreadable })
    }

    /// The sandboxes whose namespaces are pinned.
    fn pinned(&self) -> Vec<String> {
        self.at(&self.directories.namespaces);
        let names = std::fs::read_dir(&self.directories.namespaces).into_iter().flatten().flatten();
        names
            .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix(PIN_PREFIX)?.to_owned()))
            .filter(|id| id.parse::<SandboxId>().is_ok())
            .collect()
    }
}

fn parsed(config: &str) -> Result<NetworkConfig, String> {
    NetworkConfig::from_json(config.as_bytes()).map_err(|error| chain(&error))
}
/// As lines of a `resolv.conf`. Nothing that is not one word gets there.
fn dns(result: berth_cni::Dns) -> Option<Dns> {
    let is_word = |word: &String| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_graphic());
    let words = |words: Vec<String>| words.into_iter().filter(is_word).collect::<Vec<_>>();
    let mut searches = words(result.search);
    if searches.is_empty() {
        searches = words(vec![result.domain]);
    }
    let dns = Dns { servers: words(result.nameservers), searches, options: words(result.options) };
    (!dns.servers.is_empty()).then_some(dns)
}
