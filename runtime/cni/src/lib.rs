//! The runtime's side of CNI: network configurations, plugins that are run with them, what they
//! answer, and the cache of attachments.
//!
//! Versions 0.3.0 to 1.1.0 of the [specification]. Files and formats that the specification leaves
//! to the runtime are those of libcni, so that a node's other tools find them: configurations are
//! taken by the order of their file names, and attachments are kept in `/var/lib/cni/results`.
//!
//! Nothing here knows of pods. Everything is blocking and takes a deadline; nothing is locked while
//! a plugin runs.
//!
//! [specification]: https://www.cni.dev/docs/spec/

#![forbid(unsafe_code)]

mod cache;
mod config;
mod directory;
mod network;
mod plugin;
mod result;
mod version;

pub use cache::{Cache, CacheError, CachedAttachment, Entries};
pub use config::{ConfigError, NetworkConfig, PluginConfig};
pub use directory::{Directory, DirectoryError};
pub use network::{Attachment, Network, NetworkError};
pub use plugin::{Command, PluginError};
pub use result::{AddResult, Address, Dns, Interface, ResultError, Route};
pub use version::Version;
