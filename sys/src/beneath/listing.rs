//! Whole directories: their names, and removing them with all their content.

use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use super::dir::{single_name, unlink_at};
use super::{Dir, stat_fd};

/// Bytes requested from `getdents64` at once: some hundred entries.
pub(super) const LISTING_BUFFER: usize = 32 * 1024;

/// After this many entries that cannot be removed, a removal gives up: the filesystem will not let
/// the rest be removed either.
const MAX_STUCK: usize = 1000;

impl Dir {
    /// Removes `name` of any type, a directory with all its content. An absent name is success.
    ///
    /// Works without recursion and with two descriptors at a time, however deep the tree is, and
    /// needs no free space. No link is followed. An entry that cannot be removed (immutable:
    /// `EPERM`; a mount point: `EBUSY`) keeps only its parent directories; everything else is
    /// removed, and the first such error is returned. If the tree is moved meanwhile, it ends with
    /// `EAGAIN`.
    ///
    /// # Errors
    /// As unlinkat(2) and openat(2); what was removed by then stays removed.
    pub fn remove_all(&self, name: &OsStr) -> io::Result<()> {
        let name = single_name(name)?;
        match remove_one(self.as_fd(), &name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => {}
            done => return done,
        }
        // The directories above the current one: their names, to remove them when they are empty,
        // their parents' identities, to notice when `..` no longer leads back, and the entries that
        // are stuck in them.
        let mut above = vec![(name.clone(), stat_fd(self.as_fd())?.identity, HashSet::new())];
        let mut current = self.open_raw_c(&name, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        let mut stuck = Stuck::default();
        let mut buffer = vec![0_u8; LISTING_BUFFER];
        loop {
            let descend = empty_dir(current.as_fd(), &mut buffer, &mut stuck)?;
            if let Some(child) = descend {
                let here = Self { fd: current };
                match here.open_raw_c(&child, libc::O_RDONLY | libc::O_DIRECTORY, 0) {
                    Ok(opened) => {
                        let identity = stat_fd(here.as_fd())?.identity;
                        above.push((child, identity, std::mem::take(&mut stuck.here)));
                        current = opened;
                    }
                    Err(error) => {
                        stuck.add(child, error)?;
                        current = here.fd;
                    }
                }
                continue;
            }
            let Some((emptied, parent_identity, in_parent)) = above.pop() else { return Ok(()) };
            if above.is_empty() {
                let removed = unlink_at(self.as_fd(), &emptied, libc::AT_REMOVEDIR);
                return stuck.first.map_or(removed, Err);
            }
            let parent = (Self { fd: current }).open_raw_c(c"..", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            if stat_fd(parent.as_fd())?.identity != parent_identity {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            stuck.here = in_parent;
            if let Err(error) = unlink_at(parent.as_fd(), &emptied, libc::AT_REMOVEDIR) {
                stuck.add(emptied, error)?;
            }
            current = parent;
        }
    }

    /// The names in this directory, without `.` and `..`, in the kernel's order. All are read at
    /// once: for a directory of unknown size the caller bounds what it keeps by `limit`.
    ///
    /// # Errors
    /// As getdents64(2); `EOVERFLOW` if there are more than `limit`.
    pub fn names(&self, limit: usize) -> io::Result<Vec<OsString>> {
        // A second open file description, so that positions of two listings do not mix.
        let fd = self.open_raw_c(c".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        let mut names = Vec::new();
        let mut buffer = vec![0_u8; LISTING_BUFFER];
        loop {
            let length = getdents(fd.as_fd(), &mut buffer)?;
            if length == 0 {
                return Ok(names);
            }
            for name in DirEntries(buffer.get(..length).unwrap_or_default()) {
                if names.len() == limit {
                    return Err(io::Error::from_raw_os_error(libc::EOVERFLOW));
                }
                names.push(OsStr::from_bytes(name.to_bytes()).to_owned());
            }
        }
    }
}

/// An entry that could not be removed.
#[derive(Default)]
struct Stuck {
    /// In the current directory, by name.
    here: HashSet<CString>,
    count: usize,
    first: Option<io::Error>,
}

impl Stuck {
    /// Remembers one; gives up with the first error when there are too many.
    fn add(&mut self, name: CString, error: io::Error) -> io::Result<()> {
        self.here.insert(name);
        self.count += 1;
        let first = self.first.get_or_insert(error).raw_os_error();
        if self.count <= MAX_STUCK {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(first.unwrap_or(libc::EIO)))
    }
}

/// Removes what can be removed from a directory. Returns the first child that is a directory with
/// content and not known to be stuck.
fn empty_dir(dir: BorrowedFd<'_>, buffer: &mut [u8], stuck: &mut Stuck) -> io::Result<Option<CString>> {
    loop {
        // From the start again each time: what was listed before is gone, and positions in a
        // directory that changes mean little. SAFETY: lseek(2) takes numbers only.
        if unsafe { libc::lseek(dir.as_raw_fd(), 0, libc::SEEK_SET) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut removed = false;
        loop {
            let length = getdents(dir, buffer)?;
            for name in DirEntries(buffer.get(..length).unwrap_or_default()) {
                if stuck.here.contains(name) {
                    continue;
                }
                match remove_one(dir, name) {
                    Ok(()) => removed = true,
                    Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => {
                        return Ok(Some(name.to_owned()));
                    }
                    Err(error) => stuck.add(name.to_owned(), error)?,
                }
            }
            // After a listing in which everything was stuck, more may follow.
            if removed || length == 0 {
                break;
            }
        }
        if !removed {
            return Ok(None);
        }
    }
}

/// Removes one entry. `ENOTEMPTY` means a directory with content. An absent one is success.
fn remove_one(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let first = unlink_at(dir, name, 0);
    let result = match &first {
        // Linux says EISDIR where POSIX says EPERM (unlink(2)); EPERM is an immutable file here, or
        // a directory on odd filesystems.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EISDIR | libc::EPERM)) => {
            match unlink_at(dir, name, libc::AT_REMOVEDIR) {
                // Some filesystems say EEXIST for a directory that is not empty (rmdir(2)).
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    Err(io::Error::from_raw_os_error(libc::ENOTEMPTY))
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => first,
                done => done,
            }
        }
        _ => first,
    };
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done,
    }
}

pub(super) fn getdents(dir: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: getdents64(2) writes at most the given length into the buffer, which has that length.
    let result =
        unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The names in the output of `getdents64`, without `.` and `..`.
///
/// `struct linux_dirent64` (getdents64(2)): d_ino u64, d_off i64, d_reclen u16, d_type u8, then the
/// NUL-terminated name.
pub(super) struct DirEntries<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for DirEntries<'a> {
    type Item = &'a CStr;

    fn next(&mut self) -> Option<&'a CStr> {
        const NAME: usize = 19;
        loop {
            let length = usize::from(u16::from_ne_bytes(self.0.get(16..18)?.try_into().ok()?));
            let name = CStr::from_bytes_until_nul(self.0.get(NAME..length)?).ok()?;
            self.0 = self.0.get(length..)?;
            if name != c"." && name != c".." {
                return Some(name);
            }
        }
    }
}
