//! The node's cgroups: who arranges them, and how one is made, found again, and recognised as this
//! daemon's own.

mod guarded;
mod left;
mod unanswered;

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_cgroup::{Cgroup, Driver, Ending, Hierarchy, Limits, Parent, Scope, Systemd, SystemdError};
use berth_model::id::ContainerId;
use berth_sys::xattr;

use crate::host_paths::HostPaths;
use crate::shim_client::{Holder, ShimError, ShimProgram};
use guarded::{Guarded, Roots};
use unanswered::Unanswered;

pub(crate) use left::LeftCgroups;

/// How long a cgroup may take to be empty after a kill, and to be removed.
pub(crate) const CGROUP_GONE: Duration = Duration::from_secs(10);

/// The extended attribute of a cgroup that names the root of the daemon that made it. `trusted`: a
/// container's root may not change it.
const OWNER: &CStr = c"trusted.berth.root";

/// Why a cgroup could not be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MakeCgroup {
    /// It could not be created or limited.
    #[error(transparent)]
    Cgroup(#[from] berth_cgroup::Error),
    /// There is no process to put into it.
    #[error(transparent)]
    Holder(#[from] ShimError),
}

/// Creates and finds cgroups.
#[derive(Debug)]
pub(crate) struct Cgroups {
    pub(crate) hierarchy: Hierarchy,
    pub(crate) driver: Driver,
    /// The parent of pods that name none.
    pub(crate) default_parent: Parent,
    /// With the systemd driver.
    systemd: Option<Systemd>,
    unanswered: Unanswered,
    left: LeftCgroups,
    /// The daemon's root, by which it recognises its own.
    root: PathBuf,
    host: Arc<HostPaths>,
    roots: Arc<Roots>,
}

impl Cgroups {
    pub(crate) fn new(
        hierarchy: Hierarchy,
        default_parent: Parent,
        systemd: Option<Systemd>,
        root: PathBuf,
        host: Arc<HostPaths>,
    ) -> Self {
        let driver = if systemd.is_some() { Driver::Systemd } else { Driver::Cgroupfs };
        let (unanswered, left) = (Unanswered::default(), LeftCgroups::default());
        let roots = Arc::new(Roots::open(&hierarchy));
        Self { hierarchy, driver, default_parent, systemd, unanswered, left, root, host, roots }
    }

    /// Retries, in the background, to kill what is in `cgroup` and to remove it, until that is
    /// done.
    pub(crate) fn keep_left(&self, cgroup: &Cgroup) {
        self.left.keep(cgroup);
    }

    /// The retries of cgroups that could not be removed, for a container.
    pub(crate) fn left(&self) -> LeftCgroups {
        self.left.clone()
    }

    /// The parent cgroup of a pod: the one that it names, or the daemon's own.
    pub(crate) fn parent(&self, named: &str) -> Result<Parent, berth_cgroup::Error> {
        if named.is_empty() {
            Ok(self.default_parent.clone())
        } else {
            Ok(Parent::named(self.driver, named)?.with_naming(self.default_parent.naming()))
        }
    }

    /// The parent cgroup of a pod of a previous daemon, which may have used the other driver.
    pub(crate) fn recorded_parent(&self, named: &str) -> Result<Parent, berth_cgroup::Error> {
        if named.is_empty() {
            Ok(self.default_parent.clone())
        } else {
            let parent = Parent::named(Parent::form_of(named), named)?;
            Ok(parent.with_naming(self.default_parent.naming()))
        }
    }

    /// Creates the cgroup of `id` with its limits in force. `ending` is for the systemd driver.
    /// With that driver there is a process in it, which does nothing and ends when the second value
    /// is dropped: that has to wait until the process that the cgroup is for is in it. Blocking.
    pub(crate) fn make(
        &self,
        shim: &ShimProgram,
        parent: &Parent,
        id: &str,
        limits: &Limits,
        ending: Ending<'_>,
    ) -> Result<(Cgroup, Option<Holder>), MakeCgroup> {
        let (cgroup, holder) = match &self.systemd {
            None => (Cgroup::create(&self.hierarchy, parent, id)?, None),
            Some(systemd) => {
                let holder = shim.spawn_holder()?;
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
        self.mark(&cgroup, parent);
        match cgroup.apply(limits) {
            Ok(notes) => {
                for note in notes {
                    tracing::warn!(id, %note, "cannot set a limit as requested");
                }
                Ok((self.guarded(cgroup), holder))
            }
            Err(error) => {
                drop(holder);
                if let Err(left) = cgroup.end(CGROUP_GONE) {
                    tracing::warn!(id, error = %crate::chain(&left), "cannot remove a cgroup that could not be set up; trying again");
                    self.left.keep(&cgroup);
                }
                Err(error.into())
            }
        }
    }

    /// Marks a cgroup as this daemon's. Below the daemons' own parent, which they may share, each
    /// removes what is orphaned, in any hierarchy; below the parents of pods, where other
    /// runtimes may have theirs, only what has its mark in the hierarchy where it looks.
    fn mark(&self, cgroup: &Cgroup, parent: &Parent) {
        let everywhere = parent.path() == self.default_parent.path();
        let looked_at = self.hierarchy.mount_of("memory");
        let marked =
            |directory: &&Path| everywhere || looked_at.is_some_and(|mount| directory.starts_with(mount));
        for directory in cgroup.directories().filter(marked) {
            let marked = File::open(directory)
                .and_then(|file| xattr::set(file.as_fd(), OWNER, self.root.as_os_str().as_bytes()));
            if let Err(error) = marked {
                // Without the mark, only the protection from a daemon with the same parent is
                // missing.
                tracing::debug!(path = %directory.display(), %error, "cannot mark a cgroup");
            }
        }
    }

    /// Whether another daemon created a cgroup.
    pub(crate) fn is_anothers(&self, cgroup: &Cgroup) -> bool {
        self.owners(cgroup).any(|owner| owner != self.mark_text())
    }

    /// The cgroups of ids that `is_known` denies, and their parents: those below the daemon's own
    /// parent, and those with its mark anywhere else, as below the cgroups of a kubelet's pods.
    pub(crate) fn orphans(&self, is_known: impl Fn(&str) -> bool) -> Vec<(Parent, String)> {
        let is_id = |name: &str| name.parse::<ContainerId>().is_ok();
        let own = berth_cgroup::leftovers(&self.hierarchy, &self.default_parent).unwrap_or_else(|error| {
            tracing::warn!(error = %crate::chain(&error), "cannot look for orphaned cgroups");
            BTreeSet::new()
        });
        let elsewhere = berth_cgroup::leaves(&self.hierarchy, is_id).unwrap_or_else(|error| {
            tracing::warn!(error = %crate::chain(&error), "cannot look for orphaned cgroups below the cgroups of pods");
            berth_cgroup::Leaves::default()
        });
        if elsewhere.is_cut {
            tracing::warn!("there are too many cgroups to look for orphaned ones in all of them");
        }
        let has_mark = |parent: &Parent, id: &str| {
            self.open(parent, id)
                .is_ok_and(|cgroup| self.owners(&cgroup).any(|owner| owner == self.mark_text()))
        };
        own.into_iter()
            .filter(|id| is_id(id))
            .map(|id| (self.default_parent.clone(), id))
            .chain(
                elsewhere.found.into_iter().filter(|(parent, id)| {
                    parent.path() != self.default_parent.path() && has_mark(parent, id)
                }),
            )
            .filter(|(_, id)| !is_known(id))
            .collect()
    }

    fn mark_text(&self) -> &[u8] {
        self.root.as_os_str().as_bytes()
    }

    /// What the marks on a cgroup say.
    fn owners(&self, cgroup: &Cgroup) -> impl Iterator<Item = Vec<u8>> {
        cgroup.directories().filter_map(|directory| {
            File::open(directory).and_then(|file| xattr::get(file.as_fd(), OWNER)).ok().flatten()
        })
    }

    /// The cgroup of `id`, which may exist still. Its absence is not an error.
    pub(crate) fn open(&self, parent: &Parent, id: &str) -> Result<Cgroup, berth_cgroup::Error> {
        Ok(self.guarded(Cgroup::open(&self.hierarchy, parent, id)?.with_systemd(self.systemd.as_ref())))
    }

    /// A cgroup that a container may see, and keep locked.
    fn guarded(&self, cgroup: Cgroup) -> Cgroup {
        let directories = cgroup.directories().map(Path::to_path_buf).collect();
        let files = Guarded::new(self.host.clone(), self.roots.clone(), directories);
        cgroup.with_files(Arc::new(files))
    }

    /// Creates the parent that a pod names, unless it exists according to the memory controller (or
    /// the only hierarchy). A kubelet has created it; `crictl` names one that nothing has.
    pub(crate) fn create_named_parent(&self, parent: &Parent) -> Result<(), berth_cgroup::Error> {
        let exists = self
            .hierarchy
            .mount_of("memory")
            .is_some_and(|mount| mount.join(parent.path().trim_start_matches('/')).is_dir());
        if exists || parent.is_ours() {
            return Ok(());
        }
        berth_cgroup::create_parent(&self.hierarchy, parent)
    }
}
