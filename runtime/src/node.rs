//! The shared state of the daemon: facts about the node, and everything opened at start.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use berth_image::{InUse, Store};
use berth_model::layout::Layout;
use berth_seccomp::Cache;

use crate::apparmor::DefaultProfile;
use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::container::output_room::OutputRoom;
use crate::events::Events;
use crate::handlers::Handlers;
use crate::host_paths::HostPaths;
use crate::lock;
use crate::network::Network;
use crate::oci_spec::HostFacts;
use crate::registry::{Found, Registry};
use crate::shim_client::ShimProgram;

/// How many notes about the node are remembered as logged.
const MAX_SAID: usize = 256;

/// Shared by all requests. Never locked as a whole.
#[derive(Debug)]
pub(crate) struct Node {
    /// The configuration in force; see [`Node::config`].
    pub(crate) config: Mutex<Arc<Config>>,
    pub(crate) layout: Layout,
    pub(crate) cgroups: Cgroups,
    pub(crate) handlers: Handlers,
    pub(crate) shim: ShimProgram,
    pub(crate) host_paths: Arc<HostPaths>,
    /// Those that images are imported from.
    pub(crate) imports: Arc<HostPaths>,
    pub(crate) network: Network,
    pub(crate) images: Store,
    pub(crate) filters: Cache,
    pub(crate) registry: Registry,
    pub(crate) events: Events,
    pub(crate) output_room: OutputRoom,
    /// `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot_id: String,
    pub(crate) facts: HostFacts,
    pub(crate) default_apparmor_profile: DefaultProfile,
    /// Notes that were already logged. They are about privileges and limits that the daemon lacks,
    /// so there are few.
    pub(crate) said: Mutex<HashSet<String>>,
}

impl Node {
    /// The configuration in force now. A reload may replace it at any time ([`crate::reload`]).
    pub(crate) fn config(&self) -> Arc<Config> {
        Arc::clone(&lock(&self.config))
    }

    /// Replaces the configuration in force.
    pub(crate) fn set_config(&self, config: Config) {
        self.images.set_options(config.images.clone());
        *lock(&self.config) = Arc::new(config);
    }

    /// Whether `note` has not been logged yet: what holds for the whole node is logged once,
    /// not for every container. The number of notes is limited; further ones are not logged.
    pub(crate) fn is_new(&self, note: &str) -> bool {
        let mut said = lock(&self.said);
        said.len() < MAX_SAID && said.insert(note.to_owned())
    }

    /// The images that containers use; `None` if there are, or may be, containers that this daemon
    /// does not know: their images are unknown, too.
    pub(crate) fn images_in_use(&self) -> InUse {
        for directory in [self.layout.containers(), self.layout.container_states()] {
            for entry in std::fs::read_dir(&directory).ok()? {
                let entry = entry.ok()?;
                if !self.is_known_container(&entry.file_name()) && may_exist(&entry.path()) {
                    return None;
                }
            }
        }
        // The image of one whose record was lost is unknown.
        self.registry.containers().iter().map(|container| container.image_digest()).collect()
    }

    /// Whether an entry in a directory of containers is known, or is being created and has a
    /// lease on its image.
    fn is_known_container(&self, name: &OsStr) -> bool {
        let Some(name) = name.to_str() else { return false };
        matches!(self.registry.find_container(name), Found::One(found) if found.id().as_str() == name)
            || self.registry.is_being_made(name)
    }

    /// Releases unused layers, in the background.
    pub(crate) fn collect_images(self: &Arc<Self>) {
        let node = self.clone();
        self.images.collect_soon(move || node.images_in_use());
    }
}

/// Whether a path exists or cannot be looked up: a container that is removed loses its directories
/// before it is forgotten.
fn may_exist(path: &Path) -> bool {
    !std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}
