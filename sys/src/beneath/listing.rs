//! Whole directories: their names, and removing them with all that is in them.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use super::dir::{single_name, unlink_at};
use super::{Dir, stat_fd};

/// Bytes asked from `getdents64` at once: some hundred entries.
const LISTING_BUFFER: usize = 32 * 1024;

impl Dir {
    /// Removes `name` whatever it is, a directory with all that is in it. Absent is success.
    ///
    /// Works without recursion and with two descriptors at a time, however deep the tree is, and needs no free space. Nothing is
    /// followed. A tree that somebody moves about meanwhile ends it with `EAGAIN`; a mount inside with `EBUSY`.
    ///
    /// # Errors
    /// As unlinkat(2) and openat(2); what was removed until then stays removed.
    pub fn remove_all(&self, name: &OsStr) -> io::Result<()> {
        let name = single_name(name)?;
        match remove_one(self.as_fd(), &name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => {}
            done => return done,
        }
        // The directories above the current one: their names, to remove them when they are empty, and who their parents are, to
        // notice when `..` is no longer where we came from.
        let mut above = vec![(name.clone(), stat_fd(self.as_fd())?.identity)];
        let mut current = self.open_raw_c(&name, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        let mut buffer = vec![0_u8; LISTING_BUFFER];
        loop {
            let descend = empty_dir(current.as_fd(), &mut buffer)?;
            if let Some(child) = descend {
                above.push((child.clone(), stat_fd(current.as_fd())?.identity));
                current = (Self { fd: current }).open_raw_c(&child, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
                continue;
            }
            let Some((emptied, parent_identity)) = above.pop() else { return Ok(()) };
            if above.is_empty() {
                return unlink_at(self.as_fd(), &emptied, libc::AT_REMOVEDIR);
            }
            let parent = (Self { fd: current }).open_raw_c(c"..", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            if stat_fd(parent.as_fd())?.identity != parent_identity {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            unlink_at(parent.as_fd(), &emptied, libc::AT_REMOVEDIR)?;
            current = parent;
        }
    }

    /// The names in this directory, without `.` and `..`, in the kernel's order. All are read at once: for a directory of
    /// unknown size the caller bounds what it keeps by `limit`.
    ///
    /// # Errors
    /// As getdents64(2); `EOVERFLOW` if there are more than `limit`.
    pub fn names(&self, limit: usize) -> io::Result<Vec<OsString>> {
        // A second description of its own, so that positions of two listings do not mix.
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

/// Removes what can be removed from a directory. Returns the first child that is a directory with something in it.
fn empty_dir(dir: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<CString>> {
    loop {
        // From the start again each time: what was listed before is gone, and positions in a directory that changes mean little.
        // SAFETY: lseek(2) takes numbers only.
        if unsafe { libc::lseek(dir.as_raw_fd(), 0, libc::SEEK_SET) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let length = getdents(dir, buffer)?;
        let mut removed = false;
        for name in DirEntries(buffer.get(..length).unwrap_or_default()) {
            match remove_one(dir, name) {
                Ok(()) => removed = true,
                Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => {
                    return Ok(Some(name.to_owned()));
                }
                Err(error) => return Err(error),
            }
        }
        if !removed {
            return Ok(None);
        }
    }
}

/// Removes one entry. `ENOTEMPTY` says: a directory with something in it. Absent is success.
fn remove_one(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let first = unlink_at(dir, name, 0);
    let result = match &first {
        // Linux says EISDIR where POSIX says EPERM (unlink(2)); EPERM is an immutable file here, or a directory on odd filesystems.
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

fn getdents(dir: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: getdents64(2) writes at most the given length into the buffer, which has that length.
    let result =
        unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The names in what `getdents64` wrote, without `.` and `..`.
///
/// `struct linux_dirent64` (getdents64(2)): d_ino u64, d_off i64, d_reclen u16, d_type u8, then the NUL-terminated name.
struct DirEntries<'a>(&'a [u8]);

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
