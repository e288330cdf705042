//! What every part of the daemon works with: the node that it runs on, and everything that it opened there.

use crate::config::Config;
use crate::container::Container;
use crate::oci_spec::HostFacts;
use crate::registry::Registry;
use crate::shim_client::ShimProgram;
use berth_cgroup::{Hierarchy, Parent};
use berth_image::Store;
use berth_model::layout::Layout;
use berth_network::Bridge;
use berth_seccomp::Cache;
use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Shared by all requests. Never locked as a whole.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) layout: Layout,
    pub(crate) hierarchy: Hierarchy,
    pub(crate) shim: ShimProgram,
    pub(crate) bridge: Arc<Bridge>,
    pub(crate) images: Store,
    pub(crate) filters: Cache,
    pub(crate) registry: Registry,
    /// `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot_id: String,
    pub(crate) facts: HostFacts,
    /// Whether the network was whole when it was last looked at; if not, why.
    pub(crate) network: Mutex<Result<(), String>>,
    /// Notes that were said already. They are about privileges and limits that the daemon lacks, so there are few.
    pub(crate) said: Mutex<HashSet<String>>,
}

impl Node {
    /// The parent cgroup of a pod: the one that it names, or the daemon's own.
    pub(crate) fn cgroup_parent(&self, named: &str) -> Result<Parent, berth_cgroup::Error> {
        if named.is_empty() { Ok(self.config.cgroup_parent.clone()) } else { Parent::named(named) }
    }

    /// Whether a cgroup that a pod names is there, as far as the memory controller says (or the only hierarchy).
    pub(crate) fn has_cgroup(&self, parent: &Parent) -> bool {
        let Some(mount) = self.hierarchy.mount_of("memory") else { return false };
        mount.join(parent.path().trim_start_matches('/')).is_dir()
    }

    /// Whether this is the first time that `note` is to be said: what holds for the whole node is said once, not for every container.
    pub(crate) fn is_new(&self, note: &str) -> bool {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).insert(note.to_owned())
    }

    /// Whether the network was whole when it was last looked at; if not, why.
    pub(crate) fn network(&self) -> Result<(), String> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_network(&self, state: Result<(), String>) {
        *self.network.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The images that containers were made from.
    pub(crate) fn images_in_use(&self) -> BTreeSet<berth_image::Digest> {
        self.registry
            .containers()
            .iter()
            .filter_map(|container: &Arc<Container>| container.image_digest())
            .collect()
    }
}

/// The time now, in nanoseconds since the epoch.
pub(crate) fn unix_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(1)
}

/// 32 random bytes, for an id.
pub(crate) fn random_bytes() -> std::io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
    Ok(bytes)
}
