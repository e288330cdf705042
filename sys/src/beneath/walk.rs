//! A walk over every entry of a tree that others write to, a part at a time.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::inode::stat_at;
use super::listing::{DirEntries, LISTING_BUFFER, getdents};
use super::{Dir, FileType, stat_fd};

/// The totals of everything below a directory, as far as it was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Allocated on the disk, in bytes.
    pub bytes: u64,
    /// Inodes; one with several names counts once.
    pub inodes: u64,
}

/// Counts everything below a directory, without following links.
///
/// It uses two descriptors at a time, however deep the tree is, and no recursion. It remembers the
/// names of directories that are still to be walked and the inodes with several names: at most as
/// many as the caller lets it count.
#[derive(Debug)]
pub struct Walk {
    current: OwnedFd,
    /// The directories that are open, the top one first: their identities, to notice when `..` no
    /// longer leads back, and those of their subdirectories that were not walked yet.
    levels: Vec<Level>,
    /// Whether all entries of the current directory were seen.
    listed: bool,
    linked: HashSet<(u64, u64)>,
    usage: Usage,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Level {
    identity: (u64, u64),
    pending: Vec<CString>,
}

impl Walk {
    /// Begins at `top`, which is not counted itself.
    ///
    /// # Errors
    /// As fstatat(2), and `EMFILE`.
    pub fn new(top: &Dir) -> io::Result<Self> {
        // A separate open file description, so that positions of two listings do not mix.
        let current = top.open_raw_c(c".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        let level = Level { identity: stat_fd(current.as_fd())?.identity, pending: Vec::new() };
        Ok(Self {
            current,
            levels: vec![level],
            listed: false,
            linked: HashSet::new(),
            usage: Usage::default(),
            buffer: vec![0; LISTING_BUFFER],
        })
    }

    /// The totals so far.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Continues by some hundred entries, or to another directory. `false` when everything was
    /// counted.
    ///
    /// # Errors
    /// `EAGAIN` when directories were moved so that the way back is lost; otherwise those of
    /// getdents64(2). The walk is then over.
    pub fn step(&mut self) -> io::Result<bool> {
        if !self.listed {
            let length = getdents(self.current.as_fd(), &mut self.buffer)?;
            self.listed = length == 0;
            let buffer = std::mem::take(&mut self.buffer);
            for name in DirEntries(buffer.get(..length).unwrap_or_default()) {
                self.count(name);
            }
            self.buffer = buffer;
            return Ok(true);
        }
        let Some(level) = self.levels.last_mut() else { return Ok(false) };
        if let Some(name) = level.pending.pop() {
            // One that has vanished, or has become something else, has nothing below it.
            if let Ok(child) = self.at(&name) {
                let identity = stat_fd(child.as_fd())?.identity;
                self.levels.push(Level { identity, pending: Vec::new() });
                (self.current, self.listed) = (child, false);
            }
            return Ok(true);
        }
        self.levels.pop();
        let Some(above) = self.levels.last().map(|level| level.identity) else { return Ok(false) };
        let parent = self.at(c"..")?;
        if stat_fd(parent.as_fd())?.identity != above {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        self.current = parent;
        Ok(true)
    }

    fn at(&self, name: &CStr) -> io::Result<OwnedFd> {
        let dir = Dir { fd: self.current.try_clone()? };
        dir.open_raw_c(name, libc::O_RDONLY | libc::O_DIRECTORY, 0)
    }

    fn count(&mut self, name: &CStr) {
        // Entries that vanish meanwhile are not counted.
        let Ok(stat) = stat_at(self.current.as_fd(), name, libc::AT_SYMLINK_NOFOLLOW) else { return };
        if stat.file_type == FileType::Directory {
            if let Some(level) = self.levels.last_mut() {
                level.pending.push(name.to_owned());
            }
        } else if stat.links > 1 && !self.linked.insert(stat.identity) {
            return;
        }
        self.usage.bytes = self.usage.bytes.saturating_add(stat.allocated);
        self.usage.inodes += 1;
    }
}
