//! One directory, and operations on its entries by name.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use super::inode::{stat_at, timespec};
use super::{
    FileType, Root, Stat, Timestamp, c_string, invalid, owned, proc_path, read_link_at, reopen,
    retry_interrupted, stat_fd,
};
use crate::mount::mount_id_at;

/// One directory inside a tree, open for reading. Its methods take a single name and act on that
/// entry itself, not on the target of a link of that name.
#[derive(Debug)]
pub struct Dir {
    pub(super) fd: OwnedFd,
}

/// What [`Dir::make_node`] creates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// Named pipe.
    Fifo,
    /// Character device of a major and a minor number.
    CharDevice(u32, u32),
    /// Block device of a major and a minor number.
    BlockDevice(u32, u32),
}

impl Dir {
    /// This directory as a boundary for paths below it.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`.
    pub fn as_root(&self) -> io::Result<Root> {
        Ok(Root { fd: self.fd.try_clone()? })
    }

    /// Opens the directory `name`; a link is not followed.
    ///
    /// # Errors
    /// As openat(2): `ENOTDIR` for anything but a directory, links included.
    pub fn open_dir(&self, name: &OsStr) -> io::Result<Self> {
        self.open_raw(name, libc::O_RDONLY | libc::O_DIRECTORY, 0).map(|fd| Self { fd })
    }

    /// Opens the regular file `name` for reading; a link is not followed.
    ///
    /// # Errors
    /// As openat(2); `EINVAL` if it is not a regular file.
    pub fn open_regular(&self, name: &OsStr) -> io::Result<File> {
        let fd = self.open_raw(name, libc::O_PATH, 0)?;
        if stat_fd(fd.as_fd())?.file_type != FileType::Regular {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        reopen(fd.as_fd(), libc::O_RDONLY | libc::O_NOCTTY).map(File::from)
    }

    /// Makes a new regular file, open for writing: `O_CREAT | O_EXCL | O_NOFOLLOW`.
    ///
    /// # Errors
    /// As openat(2): `EEXIST` if the name is taken, by a link too.
    pub fn create_file(&self, name: &OsStr, mode: u32) -> io::Result<File> {
        self.open_raw(name, libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL, mode).map(File::from)
    }

    /// Opens the regular file `name` to overwrite its content; a link is not followed. For a file
    /// that something is mounted on, and that cannot be replaced.
    ///
    /// # Errors
    /// As openat(2); `EINVAL` if it is not a regular file.
    pub fn open_to_overwrite(&self, name: &OsStr) -> io::Result<File> {
        let fd = self.open_raw(name, libc::O_PATH, 0)?;
        if stat_fd(fd.as_fd())?.file_type != FileType::Regular {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        reopen(fd.as_fd(), libc::O_WRONLY | libc::O_NOCTTY).map(File::from)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// As mkdirat(2).
    pub fn make_dir(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        let name = single_name(name)?;
        // SAFETY: mkdirat(2) takes an open directory, which `self.fd` keeps open, and a
        // NUL-terminated name.
        retry_interrupted(|| unsafe { libc::mkdirat(self.fd.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
    }

    /// Makes a symbolic link; `target` is stored as it is and may hold any bytes but NUL.
    ///
    /// # Errors
    /// As symlinkat(2): `ENOENT` for an empty target.
    pub fn make_symlink(&self, target: &OsStr, name: &OsStr) -> io::Result<()> {
        let (target, name) = (c_string(target)?, single_name(name)?);
        // SAFETY: symlinkat(2) takes two NUL-terminated strings and an open directory; all live
        // until it returns.
        retry_interrupted(|| unsafe { libc::symlinkat(target.as_ptr(), self.fd.as_raw_fd(), name.as_ptr()) })
            .map(drop)
    }

    /// Makes `name` another name of the inode `from_name` in `from`. If that is a link, of the link
    /// itself.
    ///
    /// # Errors
    /// As linkat(2): `EPERM` for a directory, `EXDEV`, `EMLINK`.
    pub fn make_hard_link(&self, name: &OsStr, from: &Self, from_name: &OsStr) -> io::Result<()> {
        let (name, from_name) = (single_name(name)?, single_name(from_name)?);
        // SAFETY: linkat(2) takes two open directories and two NUL-terminated names; flags 0 = do
        // not follow the source.
        retry_interrupted(|| unsafe {
            libc::linkat(from.fd.as_raw_fd(), from_name.as_ptr(), self.fd.as_raw_fd(), name.as_ptr(), 0)
        })
        .map(drop)
    }

    /// Makes a FIFO or a device.
    ///
    /// # Errors
    /// As mknodat(2); `EINVAL` if a number does not fit the kernel's 12 bits of major and 20 bits
    /// of minor number.
    pub fn make_node(&self, name: &OsStr, node: Node, mode: u32) -> io::Result<()> {
        let name = single_name(name)?;
        let (kind, major, minor) = match node {
            Node::Fifo => (libc::S_IFIFO, 0, 0),
            Node::CharDevice(major, minor) => (libc::S_IFCHR, major, minor),
            Node::BlockDevice(major, minor) => (libc::S_IFBLK, major, minor),
        };
        // The C library's type is wider than the kernel's; a number that does not fit would be
        // truncated silently.
        if major >= 1 << 12 || minor >= 1 << 20 {
            return Err(invalid());
        }
        let (mode, device) = (kind | (mode & 0o7777), libc::makedev(major, minor));
        // SAFETY: mknodat(2) takes an open directory and a NUL-terminated name; the rest are
        // numbers.
        retry_interrupted(|| unsafe { libc::mknodat(self.fd.as_raw_fd(), name.as_ptr(), mode, device) })
            .map(drop)
    }

    /// The type and attributes of `name`; a link is not followed.
    ///
    /// # Errors
    /// As fstatat(2).
    pub fn stat(&self, name: &OsStr) -> io::Result<Stat> {
        stat_at(self.fd.as_fd(), &single_name(name)?, libc::AT_SYMLINK_NOFOLLOW)
    }

    /// Whether something is mounted on `name`, in whichever mount namespace this directory is. Only
    /// in that namespace does unlinkat(2) refuse such a name; from others, it takes the mount away.
    ///
    /// # Errors
    /// As statx(2).
    pub fn is_mounted_on(&self, name: &OsStr) -> io::Result<bool> {
        let id = |name: &CStr, flags| mount_id_at(self.fd.as_raw_fd(), name, flags);
        Ok(id(&single_name(name)?, libc::AT_SYMLINK_NOFOLLOW)? != id(c"", libc::AT_EMPTY_PATH)?)
    }

    /// Target of the link `name`.
    ///
    /// # Errors
    /// As readlinkat(2): `EINVAL` if it is not a link.
    pub fn read_link(&self, name: &OsStr) -> io::Result<OsString> {
        read_link_at(self.fd.as_fd(), &single_name(name)?)
    }

    /// Changes owner and group of the entry itself.
    ///
    /// # Errors
    /// As fchownat(2).
    pub fn chown(&self, name: &OsStr, uid: u32, gid: u32) -> io::Result<()> {
        let name = single_name(name)?;
        // SAFETY: fchownat(2) takes an open directory and a NUL-terminated name.
        retry_interrupted(|| unsafe {
            libc::fchownat(self.fd.as_raw_fd(), name.as_ptr(), uid, gid, libc::AT_SYMLINK_NOFOLLOW)
        })
        .map(drop)
    }

    /// Changes the permission bits of the entry itself, which must not be a link. For an entry that
    /// must not be opened, such as a device; for files and directories use [`chmod`](super::chmod).
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a link (inodes of links have no mode of their own); as chmod(2).
    pub fn chmod(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        let fd = self.open_raw(name, libc::O_PATH, 0)?;
        if stat_fd(fd.as_fd())?.file_type == FileType::Symlink {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // fchmodat2(2) with AT_EMPTY_PATH came with Linux 6.6. The descriptor pins the inode, so
        // the link in /proc names exactly it.
        let path = proc_path(fd.as_fd());
        // SAFETY: chmod(2) takes a NUL-terminated path.
        retry_interrupted(|| unsafe { libc::chmod(path.as_ptr(), mode) }).map(drop)
    }

    /// Sets access and modification time of the entry itself, links included.
    ///
    /// # Errors
    /// As utimensat(2).
    pub fn set_times(&self, name: &OsStr, time: Timestamp) -> io::Result<()> {
        let name = single_name(name)?;
        let times = [timespec(time); 2];
        // SAFETY: utimensat(2) reads two timespecs, which `times` has, and a NUL-terminated name.
        retry_interrupted(|| unsafe {
            libc::utimensat(self.fd.as_raw_fd(), name.as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW)
        })
        .map(drop)
    }

    /// Removes a name that is not a directory.
    ///
    /// # Errors
    /// As unlinkat(2): `EISDIR` for a directory.
    pub fn unlink(&self, name: &OsStr) -> io::Result<()> {
        unlink_at(self.fd.as_fd(), &single_name(name)?, 0)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// As unlinkat(2): `ENOTEMPTY`, `ENOTDIR`, `EBUSY` for a mount point.
    pub fn remove_dir(&self, name: &OsStr) -> io::Result<()> {
        unlink_at(self.fd.as_fd(), &single_name(name)?, libc::AT_REMOVEDIR)
    }

    /// Moves `name` to `to_name` in `to`, replacing an existing entry if the types allow it.
    ///
    /// # Errors
    /// As renameat(2).
    pub fn rename(&self, name: &OsStr, to: &Self, to_name: &OsStr) -> io::Result<()> {
        let (name, to_name) = (single_name(name)?, single_name(to_name)?);
        // SAFETY: renameat(2) takes two open directories and two NUL-terminated names.
        retry_interrupted(|| unsafe {
            libc::renameat(self.fd.as_raw_fd(), name.as_ptr(), to.fd.as_raw_fd(), to_name.as_ptr())
        })
        .map(drop)
    }

    fn open_raw(&self, name: &OsStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
        self.open_raw_c(&single_name(name)?, flags, mode)
    }

    pub(super) fn open_raw_c(&self, name: &CStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
        let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: openat(2) takes an open directory, a NUL-terminated name, and with O_CREAT a
        // mode, which is always passed.
        let fd =
            retry_interrupted(|| unsafe { libc::openat(self.fd.as_raw_fd(), name.as_ptr(), flags, mode) })?;
        Ok(owned(fd))
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Checks that `name` is one component that means an entry of the directory itself.
pub(super) fn single_name(name: &OsStr) -> io::Result<CString> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(invalid());
    }
    c_string(name)
}

pub(super) fn unlink_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: unlinkat(2) takes an open directory and a NUL-terminated name.
    retry_interrupted(|| unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}
