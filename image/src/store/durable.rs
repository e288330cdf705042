//! What was written made durable, or known to be lost.
//!
//! The kernel writes to the disk when it likes, and tells an error of that once to each descriptor
//! (Documentation/core-api/errseq.rst): to one opened later only if it has not been reported yet.
//! So one descriptor is kept, which gets each error since then, and errors are counted: what
//! was begun before the last one may be lost, whoever was told.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{StoreError, file_error};

/// A moment: how many errors there had been.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Since(u64);

/// The filesystem of the store.
#[derive(Debug)]
pub(super) struct Durable {
    path: PathBuf,
    root: File,
    errors: Mutex<u64>,
}

impl Durable {
    pub(super) fn of(path: &Path) -> Result<Self, StoreError> {
        let root = File::open(path).map_err(file_error("open", path))?;
        Ok(Self { path: path.to_owned(), root, errors: Mutex::new(0) })
    }

    /// To be asked before the first byte is written that has to become durable.
    pub(super) fn now(&self) -> Since {
        Since(*self.errors.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes everything durable that was written. Fails if anything may be lost of what was written
    /// `since`.
    pub(super) fn sync(&self, since: Since) -> Result<(), StoreError> {
        // Held meanwhile: an error reported to another thread is counted before this one looks.
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let synced = berth_sys::file::sync_filesystem(self.root.as_fd());
        if synced.is_err() {
            *errors += 1;
        }
        let synced = synced.and_then(|()| {
            if Since(*errors) == since {
                Ok(())
            } else {
                Err(io::Error::other("data that was written is lost"))
            }
        });
        synced.map_err(file_error("sync", &self.path))
    }
}
