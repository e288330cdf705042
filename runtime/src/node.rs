//! What every part of the daemon works with: the node that it runs on, and everything that it opened there.

use crate::apparmor::DefaultProfile;
use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::container::output_room::OutputRoom;
use crate::handlers::Handlers;
use crate::host_paths::HostPaths;
use crate::lock;
use crate::network::Network;
use crate::oci_spec::HostFacts;
use crate::registry::{Found, Registry};
use crate::shim_client::ShimProgram;
use berth_image::{InUse, Store};
use berth_model::layout::Layout;
use berth_seccomp::Cache;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// How many notes about the node are remembered as said.
const MAX_SAID: usize = 256;

/// Shared by all requests. Never locked as a whole.
#[derive(Debug)]
pub(crate) struct Node {
    /// What is in force; see [`Node::config`].
    pub(crate) config: Mutex<Arc<Config>>,
    pub(crate) layout: Layout,
    pub(crate) cgroups: Cgroups,
    pub(crate) handlers: Handlers,
    pub(crate) shim: ShimProgram,
    pub(crate) host_paths: HostPaths,
    pub(crate) network: Network,
    pub(crate) images: Store,
    pub(crate) filters: Cache,
    pub(crate) registry: Registry,
    pub(crate) output_room: OutputRoom,
    /// `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot_id: String,
    pub(crate) facts: HostFacts,
    pub(crate) default_apparmor_profile: DefaultProfile,
    /// Notes that were said already. They are about privileges and limits that the daemon lacks, so there are
    /// few.
    pub(crate) said: Mutex<HashSet<String>>,
}

impl Node {
    /// The configuration in force now. Another one may be a moment later ([`crate::reload`]).
    pub(crate) fn config(&self) -> Arc<Config> {
        Arc::clone(&lock(&self.config))
    }

    /// Puts another configuration into force.
    pub(crate) fn set_config(&self, config: Config) {
        self.images.set_options(config.images.clone());
        *lock(&self.config) = Arc::new(config);
    }

    /// Whether this is the first time that `note` is to be said: what holds for the whole node is said once,
    /// not for every container. Only so many are remembered; what comes after them is not said.
    pub(crate) fn is_new(&self, note: &str) -> bool {
        let mut said = lock(&self.said);
        said.len() < MAX_SAID && said.insert(note.to_owned())
    }

    /// The images that containers were made from; `None` if there are containers, or may be, that this daemon
    /// does not know: their images are not known either.
    pub(crate) fn images_in_use(&self) -> InUse {
        for directory in [self.layout.containers(), self.layout.container_states()] {
            for entry in std::fs::read_dir(&directory).ok()? {
                let entry = entry.ok()?;
                if !self.is_known_container(&entry.file_name()) && may_exist(&entry.path()) {
                    return None;
                }
            }
        }
        // One whose record was lost does not say which image it has.
        self.registry.containers().iter().map(|container| container.image_digest()).collect()
    }

    /// Whether something in a directory of containers is one that is known, or that is being made and has a
    /// lease on its image.
    fn is_known_container(&self, name: &OsStr) -> bool {
        let Some(name) = name.to_str() else { return false };
        matches!(self.registry.find_container(name), Found::One(found) if found.id().as_str() == name)
            || self.registry.is_being_made(name)
    }

    /// Lets layers go, in the background, that no container uses any more.
    pub(crate) fn collect_images(self: &Arc<Self>) {
        let node = self.clone();
        self.images.collect_soon(move || node.images_in_use());
    }
}

/// Whether a path is there, or cannot be looked at: a container that goes leaves its directories before it is
/// forgotten.
fn may_exist(path: &Path) -> bool {
    !std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}
