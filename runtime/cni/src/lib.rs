//! The runtime's side of CNI: network configurations, plugins that are run with them, what they
//! answer, and the cache of attachments.
//!
//! Versions 0.3.0 to 1.1.0 of the [specification]. Files and formats that the specification leaves
//! to the runtime are those of libcni, so that a node's other tools find them: configurations are
//! taken by the order of their file names, and attachments are kept in `/var/lib/cni/results`.
//!
//! Nothing here knows of pods. Everything is blocking; plugins have a deadline, but directories may
//! never answer: each is announced before it is looked at ([`Step`]). Nothing is locked while a
//! plugin runs.
//!
//! [specification]: https://www.cni.dev/docs/spec/

#![forbid(unsafe_code)]

mod cache;
mod config;
mod directory;
mod host;
mod network;
mod plugin;
mod result;
mod version;

pub use cache::{Cache, CacheError, CachedAttachment, Entries};
pub use config::{ConfigError, NetworkConfig, PluginConfig};
pub use directory::{DirectoryError, Found, Seen, first};
pub use host::{Host, Step};
pub use network::{Attachment, Network, NetworkError};
pub use plugin::{Command, PluginError};
pub use result::{AddResult, Address, Dns, Interface, ResultError, Route};
pub use version::Version;
