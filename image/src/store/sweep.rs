//! Deleting trees in the background.
//!
//! Whatever goes is first renamed to `<name>.<n>.partial`: that is the removal, for every observer.
//! The deleting may take minutes; no caller waits for it, holds a lock for it, or fails because of
//! it. What is not deleted when the process ends is deleted by the next one.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::sync_dir;
use super::remove_tree;

/// The queue, and whether a thread works on it. One tree at a time: deleting is work for the disk,
/// which others use too.
#[derive(Debug, Clone, Default)]
pub(super) struct Sweeper(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    paths: VecDeque<PathBuf>,
    running: bool,
}

impl Sweeper {
    /// Remembers what is to be deleted after a call of [`Sweeper::start`].
    pub(super) fn queue(&self, path: PathBuf) {
        self.lock().paths.push_back(path);
    }

    /// Deletes what is queued, on a thread of the runtime's. Without a runtime it is done on
    /// return.
    pub(super) fn start(&self) {
        {
            let mut queue = self.lock();
            if queue.running || queue.paths.is_empty() {
                return;
            }
            queue.running = true;
        }
        let sweeper = self.clone();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || sweeper.drain())),
            Err(_) => sweeper.drain(),
        }
    }

    fn drain(&self) {
        // Before the first byte goes, the new names are durable: a power cut must not bring back an
        // old name to half a tree.
        let mut synced = BTreeSet::new();
        loop {
            let batch: Vec<PathBuf> = {
                let mut queue = self.lock();
                if queue.paths.is_empty() {
                    queue.running = false;
                    return;
                }
                queue.paths.drain(..).collect()
            };
            synced.clear();
            for path in batch {
                if let Some(directory) = path.parent()
                    && synced.insert(directory.to_owned())
                    && let Err(error) = sync_dir(directory)
                {
                    tracing::warn!(path = %directory.display(), %error, "cannot sync");
                }
                delete(&path);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn delete(path: &Path) {
    if let Err(error) = remove_tree(path) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot delete what is left of an image; trying again at the next start"
        );
    }
}
