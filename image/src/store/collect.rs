//! What leaves the store, and when.
//!
//! A layer goes when no image needs it: no listed one, none that was removed while a container uses
//! it or is being made from it, none whose directory is kept because it cannot be used, and no pull
//! that runs. As long as one of those is not known, nothing goes: not which containers there are,
//! not what an image of theirs stands on.
//!
//! Removal is a rename; see `sweep` for the rest.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::fault::Fault;
use super::load::{Held, Needs, Tree};
use super::record::Lower;
use super::{Inner, REMOVED, State, StoreError, file_error};
use crate::Digest;

/// The ids of the images of all containers; `None` if there may be containers that are not known.
pub type InUse = Option<BTreeSet<Digest>>;

/// How much a collection takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// What removals left behind. A damaged image stays, so that pulling it again need not fetch
    /// its layers.
    Removed,
    /// Damaged images too: space is wanted.
    Damaged,
}

/// Whether a collection is waiting to run.
#[derive(Debug, Default)]
pub(super) struct Waiting(AtomicBool);

impl Inner {
    /// Takes an image out of the lists. Works on a full disk: one rename. The caller holds the disk
    /// lock.
    pub(super) fn unlist(&self, id: Digest) -> Result<(), StoreError> {
        let (path, removed) = (self.image_path(id), self.removed_path(id));
        // The same image, removed before and pulled again.
        self.discard(&removed)?;
        match fs::rename(&path, &removed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file_error("remove", &path)(error));
            }
            // Absent: another process removed the directory, so the image is gone.
            _ => {}
        }
        {
            let mut state = self.state();
            if let Some(listed) = state.images.remove(&id) {
                state.removed.insert(id, listed.record);
            }
            state.tags.retain(|_, owner| *owner != id);
        }
        if let Err(error) = self.sync_directory("images") {
            // It is gone, and comes back at worst if the power fails now.
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the removal of an image may not survive a crash"
            );
        }
        Ok(())
    }

    /// Removes an image that is not listed because it cannot be used, by its id. False if there is
    /// none.
    pub(super) fn remove_held(&self, text: &str) -> Result<bool, StoreError> {
        let Ok(id) = Digest::from_hex(text.strip_prefix("sha256:").unwrap_or(text)) else { return Ok(false) };
        if !self.state().held.contains_key(&id.hex()) {
            return Ok(false);
        }
        let (path, removed) = (self.image_path(id), self.removed_path(id));
        self.discard(&removed)?;
        fs::rename(&path, &removed).map_err(file_error("remove", &path))?;
        let mut state = self.state();
        state.removed.remove(&id);
        if let Some(held) = state.held.remove(&id.hex()) {
            state.held.insert(format!("{}{REMOVED}", id.hex()), held);
        }
        Ok(true)
    }

    /// Renames something out of sight and queues it for deletion. Absent is success.
    pub(super) fn discard(&self, path: &Path) -> Result<(), StoreError> {
        let partial = self.partial_path(path);
        match fs::rename(path, &partial) {
            Ok(()) => self.sweeper.queue(partial),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(file_error("remove", path)(error)),
        }
        Ok(())
    }

    /// Puts a damaged image where a person can look at it. The names there are never used twice.
    pub(super) fn quarantine(&self, path: &Path) -> Result<(), StoreError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let directory = self.root.join("quarantine");
        let free = (0..)
            .map(|number| {
                directory.join(if number == 0 { name.to_string() } else { format!("{name}.{number}") })
            })
            .find(|target| fs::symlink_metadata(target).is_err_and(|e| e.kind() == io::ErrorKind::NotFound));
        match fs::rename(path, free.unwrap_or(directory)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(file_error("move to quarantine", path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Releases what is no longer needed. Failures here are not errors of the caller. The caller
    /// holds the disk lock.
    pub(super) fn collect(&self, reach: Reach, in_use: impl FnOnce() -> InUse) {
        // In this order: a lease is dropped only after its container is registered.
        let leased: BTreeSet<Digest> = self.state().leases.keys().copied().collect();
        let Some(mut used) = in_use() else {
            tracing::warn!("not all containers are known, so no layer is deleted");
            return;
        };
        used.extend(leased);
        let (free, damaged) = {
            let state = self.state();
            if let Some(reason) = state.doubt(reach, &used) {
                tracing::warn!("no layer is deleted: {reason}");
                return;
            }
            let free: Vec<Digest> = state.removed.keys().filter(|id| !used.contains(id)).copied().collect();
            let damaged: Vec<String> = state
                .held
                .iter()
                .filter(|(name, held)| held.is_free(name, reach, &used))
                .map(|(name, _)| name.clone())
                .collect();
            (free, damaged)
        };
        // Records first, so that no crash leaves one without its layers.
        for id in free {
            match self.discard(&self.removed_path(id)) {
                Ok(()) => drop(self.state().removed.remove(&id)),
                Err(error) => complain(&error),
            }
        }
        for name in damaged {
            match self.quarantine(&self.root.join("images").join(&name)) {
                Ok(()) => {
                    tracing::warn!(
                        image = name,
                        "moved to quarantine: it is unusable, and no container uses it"
                    );
                    self.state().held.remove(&name);
                }
                Err(error) => complain(&error),
            }
        }
        self.discard_trees(|_| true);
        self.discard_replaced(&used);
        self.sweeper.start();
    }

    /// Lets go those of these layers and patches that is not needed. The caller holds the disk
    /// lock.
    pub(super) fn discard_unneeded(&self, candidates: &BTreeSet<Lower>) {
        self.discard_trees(|lower| candidates.contains(&lower));
        self.sweeper.start();
    }

    fn discard_trees(&self, is_candidate: impl Fn(Lower) -> bool) {
        let doomed: Vec<(Lower, Tree)> = {
            let mut state = self.state();
            let needed = state.needed();
            // Under the lock that pins are taken under: a pull that relies on a layer from now on
            // finds that it is not there.
            let doomed = state.trees.extract_if(.., |lower, tree| {
                let in_doubt = tree.fault().is_some_and(|fault| !fault.is_damaged());
                is_candidate(*lower) && !needed.contains(lower) && !in_doubt
            });
            doomed.collect()
        };
        for (lower, tree) in doomed {
            if let Err(error) = self.discard(&self.tree_path(lower)) {
                complain(&error);
                self.state().trees.insert(lower, tree);
            }
        }
    }

    fn discard_replaced(&self, used: &BTreeSet<Digest>) {
        let replaced: Vec<PathBuf> = {
            let state = self.state();
            let mounted = state.needs_of(used);
            let free = state.replaced.iter().filter(|(_, lower)| !mounted.contains(lower));
            free.map(|(path, _)| path.clone()).collect()
        };
        for path in replaced {
            match self.discard(&path) {
                Ok(()) => drop(self.state().replaced.remove(&path)),
                Err(error) => complain(&error),
            }
        }
    }

    /// [`Inner::collect`] in the background, if there is anything to collect. Calls that come
    /// before it runs are one.
    pub(super) fn collect_soon(self: &Arc<Self>, in_use: impl FnOnce() -> InUse + Send + 'static) {
        let is_idle = {
            let state = self.state();
            let is_removed = |name: &String| name.ends_with(REMOVED);
            state.removed.is_empty() && state.replaced.is_empty() && !state.held.keys().any(is_removed)
        };
        if is_idle || self.waiting.0.swap(true, Ordering::AcqRel) {
            return;
        }
        let inner = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let _disk = inner.disk();
            // A later caller may see something that this one missed.
            inner.waiting.0.store(false, Ordering::Release);
            inner.collect(Reach::Removed, in_use);
        });
    }
}

impl Held {
    /// Whether the directory may be set aside: proven damaged or removed, and unused.
    fn is_free(&self, name: &str, reach: Reach, used: &BTreeSet<Digest>) -> bool {
        let is_reached = name.ends_with(REMOVED) || (reach == Reach::Damaged && self.fault.is_damaged());
        is_reached && !used.contains(&self.id)
    }
}

impl State {
    /// What is not known and would have to be, to delete anything.
    fn doubt(&self, reach: Reach, used: &BTreeSet<Digest>) -> Option<String> {
        for (name, held) in &self.held {
            if held.needs.is_none() && !held.is_free(name, reach, used) {
                return Some(format!("the layers of image {} are unknown", held.id));
            }
        }
        let known = |id: &Digest| {
            self.images.contains_key(id)
                || self.removed.contains_key(id)
                || self.held.values().any(|held| held.id == *id && held.needs.is_some())
        };
        let stranger = used.iter().find(|id| !known(id))?;
        Some(format!("a container uses image {stranger}, which is not in the store"))
    }

    fn needed(&self) -> BTreeSet<Lower> {
        let records = self.images.values().map(|listed| &listed.record).chain(self.removed.values());
        let mut needed: BTreeSet<Lower> = records.flat_map(|record| Needs::of_record(record).0).collect();
        needed.extend(self.held.values().flat_map(|held| held.needs.iter().flat_map(|needs| &needs.0)));
        needed.extend(self.pins.keys().copied().map(Lower::Layer));
        needed
    }

    /// What these images stand on.
    fn needs_of(&self, ids: &BTreeSet<Digest>) -> BTreeSet<Lower> {
        let records = ids.iter().flat_map(|id| {
            let listed = self.images.get(id).map(|listed| &listed.record);
            listed.into_iter().chain(self.removed.get(id))
        });
        let mut needs: BTreeSet<Lower> = records.flat_map(|record| Needs::of_record(record).0).collect();
        let held = self.held.values().filter(|held| ids.contains(&held.id));
        needs.extend(held.flat_map(|held| held.needs.iter().flat_map(|needs| &needs.0)));
        needs
    }

    /// What cannot be used as it is, and what to do: a line for each.
    pub(super) fn faults(&self) -> Vec<String> {
        let way_out = |fault: &Fault| match fault {
            Fault::Unread(_) => "it is read again later; pulling the image again replaces it",
            Fault::Foreign(_) => "install that version, or pull the image again",
            Fault::Damaged(_) => "pull the image again",
        };
        let held = self.held.values().map(|held| (format!("image {}", held.id), &held.fault));
        let trees = self
            .trees
            .iter()
            .filter_map(|(lower, tree)| Some((format!("{lower}: its record"), tree.fault()?)));
        held.chain(trees).map(|(what, fault)| format!("{what} {fault}; {}", way_out(fault))).collect()
    }
}

fn complain(error: &StoreError) {
    tracing::warn!(error = error as &dyn std::error::Error, "cannot remove a part of a removed image");
}
