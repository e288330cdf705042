//! How the files of a cgroup are reached once a container may see its directory.
//!
//! A process that sees a directory can keep the kernel's lock on it forever: getdents64(2) holds
//! the lock while it writes to memory, which may be a page that is never served. Anyone else who
//! then looks up a name that is not in the kernel's cache, lists the directory or removes it waits
//! and cannot be killed. So these three go through [`Files`], and the user of this crate decides
//! which process waits; everything else is done on files that are already open.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use crate::control_file::{self, is_gone};

/// What a control file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenFor {
    /// Reading.
    Reading,
    /// Writing. It is never created.
    Writing,
}

/// Looks up names in directories of cgroups. If no answer comes, the error is
/// [`io::ErrorKind::TimedOut`].
pub trait Files: fmt::Debug + Send + Sync {
    /// Opens all of these, each of which may or may not exist.
    fn open(&self, paths: &[PathBuf], purpose: OpenFor) -> Vec<io::Result<File>>;

    /// A directory and all below it, parents before their children.
    ///
    /// # Errors
    /// As readdir(3).
    fn tree(&self, directory: &Path) -> io::Result<Vec<PathBuf>>;

    /// One attempt to remove each of these directories and everything below it. An absent one
    /// counts as removed.
    fn remove(&self, directories: &[PathBuf]) -> Vec<io::Result<()>>;
}

/// Done by the calling thread, which may wait forever where a container sees the directory: for
/// directories that no container sees, and for processes that may be left behind.
#[derive(Debug, Clone, Copy)]
pub struct Direct;

impl Files for Direct {
    fn open(&self, paths: &[PathBuf], purpose: OpenFor) -> Vec<io::Result<File>> {
        let mut options = OpenOptions::new();
        match purpose {
            OpenFor::Reading => options.read(true),
            OpenFor::Writing => options.write(true),
        };
        paths.iter().map(|path| options.open(path)).collect()
    }

    fn tree(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        control_file::tree(directory)
    }

    fn remove(&self, directories: &[PathBuf]) -> Vec<io::Result<()>> {
        directories.iter().map(|directory| remove_tree(directory)).collect()
    }
}

/// Deepest first. The files of a cgroup are not removed; they go with it.
fn remove_tree(directory: &Path) -> io::Result<()> {
    // rmdir(2) waits for the directory's lock while it holds that of the parent directory, which
    // pods share. This waits for the first lock alone.
    let unheld = std::fs::metadata(directory)
        .and_then(|metadata| std::fs::set_permissions(directory, metadata.permissions()));
    match unheld {
        Err(error) if is_gone(&error) => return Ok(()),
        _ => {}
    }
    let busy = match rmdir(directory) {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    let below = control_file::tree(directory)?;
    if below.len() == 1 {
        return Err(busy);
    }
    // Parents come before their children in the list.
    below.iter().rev().try_for_each(|directory| rmdir(directory))
}

fn rmdir(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir(directory) {
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    }
}
