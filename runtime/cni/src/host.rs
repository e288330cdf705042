//! What networks use of the host, and where that may never answer.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cache::Cache;

/// What networks use of the host.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// `CNI_PATH`: directories of plugins, in the order in which they are searched.
    pub directories: &'a [PathBuf],
    /// The attachments.
    pub cache: &'a Cache,
    /// Told of each step before it is taken.
    pub announce: &'a dyn Fn(Step<'_>),
    /// A connection to who asked: a plugin does not outlive it.
    pub caller: Option<BorrowedFd<'a>>,
}

impl std::fmt::Debug for Host<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { directories, cache, announce: _, caller: _ } = self;
        formatter
            .debug_struct("Host")
            .field("directories", directories)
            .field("cache", cache)
            .finish_non_exhaustive()
    }
}

/// A step that may never end, since others may keep a directory locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    /// Something at this path is looked at or changed.
    Path(&'a Path),
    /// This plugin runs, for as long as it may.
    Plugin(&'a Path, Duration),
}
