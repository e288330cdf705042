//! What every part of the daemon works with: the node that it runs on, and everything that it opened there.

use crate::apparmor::DefaultProfile;
use crate::config::Config;
use crate::container::output_room::OutputRoom;
use crate::handlers::Handlers;
use crate::left_cgroups::LeftCgroups;
use crate::oci_spec::HostFacts;
use crate::registry::{Found, Registry};
use crate::shim_client::{Holder, ShimError, ShimProgram};
use crate::unanswered::Unanswered;
use berth_cgroup::{Cgroup, Driver, Ending, Hierarchy, Limits, Parent, Scope, Systemd, SystemdError};
use berth_image::{InUse, Store};
use berth_model::layout::Layout;
use berth_network::Bridge;
use berth_seccomp::Cache;
use berth_sys::xattr;
use std::collections::HashSet;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How many notes about the node are remembered as said.
const MAX_SAID: usize = 256;

/// How long a cgroup that could not be limited may take to go.
const CGROUP_GONE: Duration = Duration::from_secs(10);

/// The extended attribute of a cgroup that names the root of the daemon that made it. `trusted`: a
/// container's root may not change it.
const OWNER: &CStr = c"trusted.berth.root";

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MakeCgroup {
    /// It could not be made or limited.
    #[error(transparent)]
    Cgroup(#[from] berth_cgroup::Error),
    /// There is no process to put into it.
    #[error(transparent)]
    Holder(#[from] ShimError),
}

/// Shared by all requests. Never locked as a whole.
#[derive(Debug)]
pub(crate) struct Node {
    /// What is in force; see [`Node::config`].
    pub(crate) config: Mutex<Arc<Config>>,
    pub(crate) layout: Layout,
    pub(crate) hierarchy: Hierarchy,
    pub(crate) cgroup_driver: Driver,
    /// Where pods go that name no parent cgroup.
    pub(crate) default_cgroup_parent: Parent,
    /// With the systemd driver.
    pub(crate) systemd: Option<Systemd>,
    pub(crate) unanswered: Unanswered,
    pub(crate) left_cgroups: LeftCgroups,
    pub(crate) handlers: Handlers,
    pub(crate) shim: ShimProgram,
    pub(crate) bridge: Arc<Bridge>,
    pub(crate) images: Store,
    pub(crate) filters: Cache,
    pub(crate) registry: Registry,
    pub(crate) output_room: OutputRoom,
    /// `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot_id: String,
    pub(crate) facts: HostFacts,
    pub(crate) default_apparmor_profile: DefaultProfile,
    /// Whether the network was whole when it was last looked at; if not, why.
    pub(crate) network: Mutex<Result<(), String>>,
    /// Notes that were said already. They are about privileges and limits that the daemon lacks, so there are
    /// few.
    pub(crate) said: Mutex<HashSet<String>>,
}

impl Node {
    /// The configuration in force now. Another one may be a moment later ([`crate::reload`]).
    pub(crate) fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another configuration into force.
    pub(crate) fn set_config(&self, config: Config) {
        self.images.set_options(config.images.clone());
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    /// The parent cgroup of a pod: the one that it names, or the daemon's own.
    pub(crate) fn cgroup_parent(&self, named: &str) -> Result<Parent, berth_cgroup::Error> {
        if named.is_empty() {
            Ok(self.default_cgroup_parent.clone())
        } else {
            Ok(Parent::named(self.cgroup_driver, named)?.with_naming(self.default_cgroup_parent.naming()))
        }
    }

    /// The parent cgroup of a pod of the daemon before this one, which may have had the other driver.
    pub(crate) fn recorded_cgroup_parent(&self, named: &str) -> Result<Parent, berth_cgroup::Error> {
        if named.is_empty() {
            Ok(self.default_cgroup_parent.clone())
        } else {
            let parent = Parent::named(Parent::form_of(named), named)?;
            Ok(parent.with_naming(self.default_cgroup_parent.naming()))
        }
    }

    /// Makes the cgroup of `id` with its limits in force. `ending` is for the systemd driver. With that
    /// driver there is a process in it, which does nothing and goes when the second value is dropped: that
    /// has to wait until the process that the cgroup is for is in it. Blocking.
    pub(crate) fn make_cgroup(
        &self,
        parent: &Parent,
        id: &str,
        limits: &Limits,
        ending: Ending<'_>,
    ) -> Result<(Cgroup, Option<Holder>), MakeCgroup> {
        let (cgroup, holder) = match &self.systemd {
            None => (Cgroup::create(&self.hierarchy, parent, id)?, None),
            Some(systemd) => {
                let holder = self.shim.spawn_holder()?;
                let scope = Scope { process: holder.pid(), limits, ending };
                match Cgroup::create_scope(&self.hierarchy, systemd, parent, id, &scope) {
                    Ok(cgroup) => {
                        self.unanswered.systemd_answers();
                        (cgroup, Some(holder))
                    }
                    Err(error) => {
                        if matches!(error, berth_cgroup::Error::Unit { source: SystemdError::Silent, .. }) {
                            self.unanswered.keep(holder);
                        }
                        return Err(error.into());
                    }
                }
            }
        };
        if parent.path() == self.default_cgroup_parent.path() {
            self.mark(&cgroup);
        }
        match cgroup.apply(limits) {
            Ok(notes) => {
                for note in notes {
                    tracing::warn!(id, %note, "a limit could not be set as asked");
                }
                Ok((cgroup, holder))
            }
            Err(error) => {
                drop(holder);
                if let Err(left) = cgroup.kill(CGROUP_GONE).and_then(|()| cgroup.remove(CGROUP_GONE)) {
                    tracing::warn!(id, error = %crate::chain(&left), "a cgroup that failed is left; it is tried again");
                    self.left_cgroups.keep(&cgroup);
                }
                Err(error.into())
            }
        }
    }

    /// Writes onto a cgroup whose it is: below the daemons' own parent, which another one may have too, each
    /// takes away what is nobody's.
    fn mark(&self, cgroup: &Cgroup) {
        for directory in cgroup.directories() {
            let marked = File::open(directory)
                .and_then(|file| xattr::set(file.as_fd(), OWNER, self.layout.root().as_os_str().as_bytes()));
            if let Err(error) = marked {
                // Without it, only the protection from a daemon with the same parent is missing.
                tracing::debug!(path = %directory.display(), %error, "could not mark a cgroup");
            }
        }
    }

    /// Whether another daemon has made a cgroup.
    pub(crate) fn is_anothers(&self, cgroup: &Cgroup) -> bool {
        let own = self.layout.root().as_os_str().as_bytes();
        cgroup.directories().any(|directory| {
            let owner = File::open(directory).and_then(|file| xattr::get(file.as_fd(), OWNER));
            owner.is_ok_and(|owner| owner.is_some_and(|owner| owner != own))
        })
    }

    /// The cgroup of `id` as it may be there still. Nothing of it being there is no error.
    pub(crate) fn open_cgroup(&self, parent: &Parent, id: &str) -> Result<Cgroup, berth_cgroup::Error> {
        Ok(Cgroup::open(&self.hierarchy, parent, id)?.with_systemd(self.systemd.as_ref()))
    }

    /// Whether a cgroup that a pod names is there, as far as the memory controller says (or the only
    /// hierarchy).
    pub(crate) fn has_cgroup(&self, parent: &Parent) -> bool {
        let Some(mount) = self.hierarchy.mount_of("memory") else { return false };
        mount.join(parent.path().trim_start_matches('/')).is_dir()
    }

    /// Whether this is the first time that `note` is to be said: what holds for the whole node is said once,
    /// not for every container. Only so many are remembered; what comes after them is not said.
    pub(crate) fn is_new(&self, note: &str) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.len() < MAX_SAID && said.insert(note.to_owned())
    }

    /// Whether the network was whole when it was last looked at; if not, why.
    pub(crate) fn network(&self) -> Result<(), String> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_network(&self, state: Result<(), String>) {
        *self.network.lock().unwrap_or_else(PoisonError::into_inner) = state;
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
