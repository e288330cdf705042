//! Paths inside a tree that an attacker wrote: an image's layer, a container's root.
//!
//! Everything is relative to a directory descriptor. A path of several components is resolved by the kernel with
//! `openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)`: symbolic links and `..` are followed, but as if the tree's root were `/`
//! (openat2(2)). What changes the tree takes a [`Dir`] and one name in it, and never follows a link in that name. There is no
//! fallback for kernels without openat2 (Linux 5.6): a weaker walk is a hole.
//!
//! `RESOLVE_IN_ROOT` answers `EAGAIN` while somebody renames directories inside the tree (openat2(2), ERRORS); it is tried
//! again [`MAX_TRIES`] times, then the call fails.
//!
//! Callers decide what to do with types, owners and modes. Errors are the kernel's errno.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// How often an `EAGAIN` of openat2 is answered with another try. A rename storm that lasts through 128 tries is an attack.
pub const MAX_TRIES: usize = 128;

/// Symbolic links followed while directories are made; the kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Bytes asked from `getdents64` at once: some hundred entries.
const LISTING_BUFFER: usize = 32 * 1024;

/// The boundary: paths are resolved as if this directory were `/`. Holds an `O_PATH` descriptor.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

/// One directory inside a tree, open for reading. Its methods take a single name and act on that very entry, not on what a link
/// of that name points at.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// `S_IFREG`
    Regular,
    /// `S_IFDIR`
    Directory,
    /// `S_IFLNK`
    Symlink,
    /// `S_IFCHR`
    CharDevice,
    /// `S_IFBLK`
    BlockDevice,
    /// `S_IFIFO`
    Fifo,
    /// `S_IFSOCK`
    Socket,
}

/// A point in time as inodes have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Seconds since 1970; may be negative.
    pub seconds: i64,
    /// 0..=999_999_999
    pub nanoseconds: u32,
}

/// What `fstatat(2)` says of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Type of the inode.
    pub file_type: FileType,
    /// Permission bits with set-user-id, set-group-id and sticky: `0o7777` at most.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Number of names.
    pub links: u64,
    /// For devices: major and minor number.
    pub device: (u32, u32),
    /// Last change of the content.
    pub modified: Timestamp,
    /// Device and inode number: equal for two names of one inode.
    pub identity: (u64, u64),
}

/// A directory that [`Root::make_dir_all_with`] needs and does not find.
#[derive(Debug)]
pub struct MissingDir<'a> {
    /// Its path from the boundary, without links.
    pub path: &'a Path,
    /// The directory that it must be made in.
    pub parent: &'a Dir,
    /// Its name there.
    pub name: &'a OsStr,
    /// What has that name and is neither a directory nor a link, if anything.
    pub obstacle: Option<Stat>,
}

/// What [`Dir::make_node`] makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// Named pipe.
    Fifo,
    /// Character device of a major and a minor number.
    CharDevice(u32, u32),
    /// Block device of a major and a minor number.
    BlockDevice(u32, u32),
}

/// `struct open_how` (include/uapi/linux/openat2.h): three 64-bit fields.
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
const RESOLVE_NO_SYMLINKS: u64 = 0x04;
const RESOLVE_IN_ROOT: u64 = 0x10;

impl Root {
    /// Opens the boundary itself. `path` is trusted: links in it are followed.
    ///
    /// # Errors
    /// As open(2); `ENOTDIR` if it is no directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = c_string(path.as_os_str())?;
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: open(2) wants a NUL-terminated path, which a CString is, and no mode without O_CREAT.
        let fd = retry_interrupted(|| unsafe { libc::open(path.as_ptr(), flags) })?;
        Ok(Self { fd: owned(fd) })
    }

    /// Takes a descriptor of a directory as the boundary.
    ///
    /// # Errors
    /// `ENOTDIR` if it is none.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        if stat_fd(fd.as_fd())?.file_type != FileType::Directory {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        Ok(Self { fd })
    }

    /// Resolves `path`, links included, to an `O_PATH` descriptor of whatever is there.
    ///
    /// # Errors
    /// As openat2(2).
    pub fn resolve(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open_raw(path, libc::O_PATH, 0)
    }

    /// Like [`Root::resolve`], but a link in the last component is the result, not followed.
    ///
    /// # Errors
    /// As openat2(2).
    pub fn resolve_no_follow(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open_raw(path, libc::O_PATH | libc::O_NOFOLLOW, 0)
    }

    /// Opens a directory; links are followed inside the boundary.
    ///
    /// # Errors
    /// As openat2(2); `ENOTDIR`.
    pub fn open_dir(&self, path: &Path) -> io::Result<Dir> {
        Ok(Dir { fd: self.open_raw(path, libc::O_RDONLY | libc::O_DIRECTORY, 0)? })
    }

    /// Like [`Root::open_dir`], but any link on the way is an error.
    ///
    /// # Errors
    /// As openat2(2); `ELOOP` for a link.
    pub fn open_dir_no_links(&self, path: &Path) -> io::Result<Dir> {
        Ok(Dir { fd: self.open_raw(path, libc::O_RDONLY | libc::O_DIRECTORY, RESOLVE_NO_SYMLINKS)? })
    }

    /// Opens a regular file for reading; links are followed inside the boundary. The type is looked at before the open, so that
    /// no device is touched and no FIFO is waited for.
    ///
    /// # Errors
    /// As openat2(2); `EINVAL` if it is not a regular file.
    pub fn open_regular(&self, path: &Path) -> io::Result<File> {
        let fd = self.resolve(path)?;
        if stat_fd(fd.as_fd())?.file_type != FileType::Regular {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        reopen(fd.as_fd(), libc::O_RDONLY | libc::O_NOCTTY).map(File::from)
    }

    /// Opens what is at `path` with the given open(2) flags; links are followed inside the boundary. For what is known to be safe to
    /// open: a device waits or acts, a FIFO blocks unless the flags say otherwise.
    ///
    /// # Errors
    /// As openat2(2).
    pub fn open_with(&self, path: &Path, flags: i32) -> io::Result<OwnedFd> {
        self.open_raw(path, flags, 0)
    }

    /// Opens a regular file for appending and makes it when absent (mode 0640); any link on the way is an error, and so is a file that
    /// has a second name: in a directory that others can write, both are ways to make the caller write elsewhere.
    ///
    /// # Errors
    /// As openat2(2); `ELOOP` for a link; `EINVAL` for what is not a regular file or has other names.
    pub fn open_append(&self, path: &Path) -> io::Result<File> {
        let path = c_string(path.as_os_str())?;
        // Non-blocking for the case that a FIFO lies there; it means nothing for the regular file that is wanted.
        let flags = libc::O_WRONLY
            | libc::O_APPEND
            | libc::O_CREAT
            | libc::O_NOFOLLOW
            | libc::O_NONBLOCK
            | libc::O_NOCTTY;
        let how = OpenHow {
            flags: u64::from((flags | libc::O_CLOEXEC).cast_unsigned()),
            mode: 0o640,
            resolve: RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS,
        };
        let fd = openat2(self.fd.as_fd(), &path, &how)?;
        let stat = stat_fd(fd.as_fd())?;
        if stat.file_type != FileType::Regular || stat.links != 1 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(File::from(fd))
    }

    /// Opens the directory that the last component of `path` lies in, and returns that component. Links on the way are followed.
    ///
    /// # Errors
    /// As openat2(2); `EINVAL` if the last component is absent or `..`.
    pub fn open_parent(&self, path: &Path) -> io::Result<(Dir, OsString)> {
        let name = path.file_name().ok_or_else(invalid)?.to_owned();
        Ok((self.open_dir(path.parent().unwrap_or(Path::new("")))?, name))
    }

    /// Opens the directory `path` and makes it and its parents where they are absent, owned by the caller and with `mode` (less the
    /// umask).
    ///
    /// A link on the way is followed inside the boundary, also one that points at nothing yet: then its target is made.
    ///
    /// # Errors
    /// As openat2(2) and mkdirat(2); `ENOTDIR` if something else is in the way; `ELOOP` after 40 links.
    pub fn make_dir_all(&self, path: &Path, mode: u32) -> io::Result<Dir> {
        self.make_dir_all_with(path, |missing| match missing.obstacle {
            None => missing.parent.make_dir(missing.name, mode),
            Some(_) => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        })
    }

    /// Like [`Root::make_dir_all`], but `make` makes each directory that is missing, or fails.
    ///
    /// # Errors
    /// As openat2(2), and what `make` fails with; `ELOOP` after 40 links.
    pub fn make_dir_all_with(
        &self,
        path: &Path,
        mut make: impl FnMut(MissingDir<'_>) -> io::Result<()>,
    ) -> io::Result<Dir> {
        match self.open_dir(path) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {}
            opened => return opened,
        }
        // The components that are still to be walked, last first, and where the walk is: a path without any link.
        let mut ahead: Vec<OsString> = Vec::new();
        push_components(&mut ahead, path);
        let mut here = PathBuf::new();
        let mut dir = self.open_dir_no_links(&here)?;
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            if name == ".." {
                here.pop();
                dir = self.open_dir_no_links(&here)?;
                continue;
            }
            let found = match dir.stat(&name) {
                Ok(stat) => Some(stat),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
                Err(error) => return Err(error),
            };
            match found.map(|stat| stat.file_type) {
                Some(FileType::Symlink) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(io::Error::from_raw_os_error(libc::ELOOP));
                    }
                    let target = PathBuf::from(dir.read_link(&name)?);
                    if target.has_root() {
                        here.clear();
                        dir = self.open_dir_no_links(&here)?;
                    }
                    push_components(&mut ahead, &target);
                    continue;
                }
                Some(FileType::Directory) => here.push(&name),
                _ => {
                    here.push(&name);
                    make(MissingDir { path: &here, parent: &dir, name: &name, obstacle: found })?;
                }
            }
            dir = dir.open_dir(&name)?;
        }
        Ok(dir)
    }

    fn open_raw(&self, path: &Path, flags: i32, resolve: u64) -> io::Result<OwnedFd> {
        // openat2 refuses the empty path; here it is the boundary itself.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let path = c_string(path.as_os_str())?;
        let how = OpenHow {
            flags: u64::from((flags | libc::O_CLOEXEC).cast_unsigned()),
            mode: 0,
            resolve: RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve,
        };
        openat2(self.fd.as_fd(), &path, &how)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
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
    /// As openat(2): `ENOTDIR` for anything else than a directory, links included.
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

    /// Makes a directory.
    ///
    /// # Errors
    /// As mkdirat(2).
    pub fn make_dir(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        let name = single_name(name)?;
        // SAFETY: mkdirat(2) wants an open directory, which `self.fd` keeps open, and a NUL-terminated name.
        retry_interrupted(|| unsafe { libc::mkdirat(self.fd.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
    }

    /// Makes a symbolic link; `target` is stored as it is and may hold any bytes but NUL.
    ///
    /// # Errors
    /// As symlinkat(2): `ENOENT` for an empty target.
    pub fn make_symlink(&self, target: &OsStr, name: &OsStr) -> io::Result<()> {
        let (target, name) = (c_string(target)?, single_name(name)?);
        // SAFETY: symlinkat(2) wants two NUL-terminated strings and an open directory; all live until it returns.
        retry_interrupted(|| unsafe { libc::symlinkat(target.as_ptr(), self.fd.as_raw_fd(), name.as_ptr()) })
            .map(drop)
    }

    /// Makes `name` another name of the inode `from_name` in `from`. If that is a link, of the link itself.
    ///
    /// # Errors
    /// As linkat(2): `EPERM` for a directory, `EXDEV`, `EMLINK`.
    pub fn make_hard_link(&self, name: &OsStr, from: &Self, from_name: &OsStr) -> io::Result<()> {
        let (name, from_name) = (single_name(name)?, single_name(from_name)?);
        // SAFETY: linkat(2) wants two open directories and two NUL-terminated names; flags 0 = do not follow the source.
        retry_interrupted(|| unsafe {
            libc::linkat(from.fd.as_raw_fd(), from_name.as_ptr(), self.fd.as_raw_fd(), name.as_ptr(), 0)
        })
        .map(drop)
    }

    /// Makes a FIFO or a device.
    ///
    /// # Errors
    /// As mknodat(2); `EINVAL` if a number does not fit the kernel's 12 bits of major and 20 bits of minor number.
    pub fn make_node(&self, name: &OsStr, node: Node, mode: u32) -> io::Result<()> {
        let name = single_name(name)?;
        let (kind, major, minor) = match node {
            Node::Fifo => (libc::S_IFIFO, 0, 0),
            Node::CharDevice(major, minor) => (libc::S_IFCHR, major, minor),
            Node::BlockDevice(major, minor) => (libc::S_IFBLK, major, minor),
        };
        // The C library's type is wider than the kernel's; what does not fit would be cut silently.
        if major >= 1 << 12 || minor >= 1 << 20 {
            return Err(invalid());
        }
        let (mode, device) = (kind | (mode & 0o7777), libc::makedev(major, minor));
        // SAFETY: mknodat(2) wants an open directory and a NUL-terminated name; the rest are numbers.
        retry_interrupted(|| unsafe { libc::mknodat(self.fd.as_raw_fd(), name.as_ptr(), mode, device) })
            .map(drop)
    }

    /// What `name` is; a link is not followed.
    ///
    /// # Errors
    /// As fstatat(2).
    pub fn stat(&self, name: &OsStr) -> io::Result<Stat> {
        stat_at(self.fd.as_fd(), &single_name(name)?, libc::AT_SYMLINK_NOFOLLOW)
    }

    /// Target of the link `name`.
    ///
    /// # Errors
    /// As readlinkat(2): `EINVAL` if it is no link.
    pub fn read_link(&self, name: &OsStr) -> io::Result<OsString> {
        let name = single_name(name)?;
        // A target is shorter than PATH_MAX (symlink(7)), so it always fits and is never cut.
        let mut buffer = vec![0_u8; 4096];
        // SAFETY: readlinkat(2) writes at most the given length into the buffer, which has that length.
        let length = retry_interrupted_long(|| unsafe {
            libc::readlinkat(self.fd.as_raw_fd(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
        })?;
        buffer.truncate(length);
        Ok(OsString::from_vec(buffer))
    }

    /// Changes owner and group of the entry itself.
    ///
    /// # Errors
    /// As fchownat(2).
    pub fn chown(&self, name: &OsStr, uid: u32, gid: u32) -> io::Result<()> {
        let name = single_name(name)?;
        // SAFETY: fchownat(2) wants an open directory and a NUL-terminated name.
        retry_interrupted(|| unsafe {
            libc::fchownat(self.fd.as_raw_fd(), name.as_ptr(), uid, gid, libc::AT_SYMLINK_NOFOLLOW)
        })
        .map(drop)
    }

    /// Changes the permission bits of the entry itself, which must not be a link. For what must not be opened, as devices; for
    /// files and directories use [`chmod`].
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a link (inodes of links have no mode of their own); as chmod(2).
    pub fn chmod(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        let fd = self.open_raw(name, libc::O_PATH, 0)?;
        if stat_fd(fd.as_fd())?.file_type == FileType::Symlink {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // fchmodat2(2) with AT_EMPTY_PATH came with Linux 6.6. The descriptor pins the inode, so the link in /proc names exactly it.
        let path = proc_path(fd.as_fd());
        // SAFETY: chmod(2) wants a NUL-terminated path.
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

    /// Moves `name` to `to_name` in `to`, over what is there if types allow.
    ///
    /// # Errors
    /// As renameat(2).
    pub fn rename(&self, name: &OsStr, to: &Self, to_name: &OsStr) -> io::Result<()> {
        let (name, to_name) = (single_name(name)?, single_name(to_name)?);
        // SAFETY: renameat(2) wants two open directories and two NUL-terminated names.
        retry_interrupted(|| unsafe {
            libc::renameat(self.fd.as_raw_fd(), name.as_ptr(), to.fd.as_raw_fd(), to_name.as_ptr())
        })
        .map(drop)
    }

    /// Removes `name` whatever it is, a directory with all that is in it. Absent is success.
    ///
    /// Works without recursion and with two descriptors at a time, however deep the tree is, and needs no free space. Nothing is
    /// followed. A tree that somebody moves about meanwhile ends it with `EAGAIN`; a mount inside with `EBUSY`.
    ///
    /// # Errors
    /// As unlinkat(2) and openat(2); what was removed until then stays removed.
    pub fn remove_all(&self, name: &OsStr) -> io::Result<()> {
        let name = single_name(name)?;
        match remove_one(self.fd.as_fd(), &name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => {}
            done => return done,
        }
        // The directories above the current one: their names, to remove them when they are empty, and who their parents are, to
        // notice when `..` is no longer where we came from.
        let mut above = vec![(name.clone(), stat_fd(self.fd.as_fd())?.identity)];
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
                return unlink_at(self.fd.as_fd(), &emptied, libc::AT_REMOVEDIR);
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

    fn open_raw(&self, name: &OsStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
        self.open_raw_c(&single_name(name)?, flags, mode)
    }

    fn open_raw_c(&self, name: &CStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
        let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: openat(2) wants an open directory, a NUL-terminated name, and with O_CREAT a mode, which is always passed.
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

/// What the inode behind a descriptor (`O_PATH` too) is.
///
/// # Errors
/// As fstatat(2).
pub fn stat_fd(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    stat_at(fd, c"", libc::AT_EMPTY_PATH)
}

/// Changes owner and group of an open file (not `O_PATH`). The kernel clears set-user-id, set-group-id and file capabilities
/// then (chown(2)), so it comes before [`chmod`] and before `security.capability`.
///
/// # Errors
/// As fchown(2).
pub fn chown(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: fchown(2) wants an open descriptor, which BorrowedFd is.
    retry_interrupted(|| unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) }).map(drop)
}

/// Changes the permission bits of an open file (not `O_PATH`).
///
/// # Errors
/// As fchmod(2).
pub fn chmod(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    // SAFETY: fchmod(2) wants an open descriptor, which BorrowedFd is.
    retry_interrupted(|| unsafe { libc::fchmod(fd.as_raw_fd(), mode) }).map(drop)
}

/// Sets access and modification time of an open file (not `O_PATH`).
///
/// # Errors
/// As futimens(3).
pub fn set_times(fd: BorrowedFd<'_>, time: Timestamp) -> io::Result<()> {
    let times = [timespec(time); 2];
    // SAFETY: futimens(3) reads two timespecs, which `times` has.
    retry_interrupted(|| unsafe { libc::futimens(fd.as_raw_fd(), times.as_ptr()) }).map(drop)
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

fn unlink_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: unlinkat(2) wants an open directory and a NUL-terminated name.
    retry_interrupted(|| unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

fn openat2(dir: BorrowedFd<'_>, path: &CStr, how: &OpenHow) -> io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        // SAFETY: openat2(2) reads a NUL-terminated path and `size` bytes of open_how; both outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                dir.as_raw_fd(),
                path.as_ptr(),
                std::ptr::from_ref(how),
                size_of::<OpenHow>(),
            )
        };
        if let Ok(fd) = i32::try_from(result)
            && fd >= 0
        {
            return Ok(owned(fd));
        }
        let error = io::Error::last_os_error();
        tries += 1;
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) || tries >= MAX_TRIES {
            return Err(error);
        }
    }
}

fn stat_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> io::Result<Stat> {
    let mut buffer = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstatat(2) wants an open descriptor, a NUL-terminated name, and room for one `struct stat`.
    retry_interrupted(|| unsafe {
        libc::fstatat(dir.as_raw_fd(), name.as_ptr(), buffer.as_mut_ptr(), flags)
    })?;
    // SAFETY: fstatat succeeded, so it has written the whole struct.
    let raw = unsafe { buffer.assume_init() };
    let file_type = match raw.st_mode & libc::S_IFMT {
        libc::S_IFREG => FileType::Regular,
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFIFO => FileType::Fifo,
        libc::S_IFSOCK => FileType::Socket,
        _ => return Err(invalid()),
    };
    Ok(Stat {
        file_type,
        mode: raw.st_mode & 0o7777,
        uid: raw.st_uid,
        gid: raw.st_gid,
        size: raw.st_size.cast_unsigned(),
        links: raw.st_nlink,
        device: (libc::major(raw.st_rdev), libc::minor(raw.st_rdev)),
        modified: Timestamp {
            seconds: raw.st_mtime,
            nanoseconds: u32::try_from(raw.st_mtime_nsec).unwrap_or(0),
        },
        identity: (raw.st_dev, raw.st_ino),
    })
}

/// Opens an `O_PATH` descriptor anew. The descriptor pins the inode; the link in /proc leads to exactly it.
fn reopen(fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let path = proc_path(fd);
    // SAFETY: open(2) wants a NUL-terminated path, and no mode without O_CREAT.
    retry_interrupted(|| unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) }).map(owned)
}

fn proc_path(fd: BorrowedFd<'_>) -> CString {
    let mut text = format!("/proc/thread-self/fd/{}", fd.as_raw_fd()).into_bytes();
    text.push(0);
    CString::from_vec_with_nul(text).unwrap_or_default()
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

/// Pushes the components of `path` so that the first one is popped first. `.` and a leading `/` are dropped.
fn push_components(stack: &mut Vec<OsString>, path: &Path) {
    for component in path.components().rev() {
        match component {
            Component::Normal(name) => stack.push(name.to_owned()),
            Component::ParentDir => stack.push(OsString::from("..")),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
}

/// Checks that `name` is one component that means an entry of the directory itself.
fn single_name(name: &OsStr) -> io::Result<CString> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(invalid());
    }
    c_string(name)
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| invalid())
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn timespec(time: Timestamp) -> libc::timespec {
    libc::timespec { tv_sec: time.seconds, tv_nsec: i64::from(time.nanoseconds) }
}

/// Makes a descriptor that a call just returned owned.
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: every caller passes what a successful open call has just returned: open, and owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn retry_interrupted(mut call: impl FnMut() -> i32) -> io::Result<i32> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

fn retry_interrupted_long(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(result) = usize::try_from(call()) {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    /// A folder with `root/` (the tree) and `canary` beside it (what nobody may reach).
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("berth-beneath-{}-{name}", std::process::id()));
            fs::create_dir_all(path.join("root")).unwrap();
            fs::create_dir_all(path.join("canary")).unwrap();
            fs::write(path.join("canary/secret"), "host").unwrap();
            Self(path)
        }

        fn root(&self) -> Root {
            Root::open(&self.0.join("root")).unwrap()
        }

        fn inside(&self, path: &str) -> PathBuf {
            self.0.join("root").join(path)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let parent = Root::open(self.0.parent().unwrap()).unwrap().open_dir(Path::new("")).unwrap();
            parent.remove_all(self.0.file_name().unwrap()).unwrap();
        }
    }

    fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
        result.unwrap_err().raw_os_error().unwrap()
    }

    #[test]
    fn links_and_parents_stay_inside() {
        let tree = Tree::new("inside");
        let canary = tree.0.join("canary");
        symlink(&canary, tree.inside("absolute")).unwrap();
        symlink("../canary", tree.inside("relative")).unwrap();
        symlink("../../../../../../../../../../etc", tree.inside("far")).unwrap();
        let root = tree.root();
        for path in
            ["absolute", "relative", "far", "../canary", "/../canary", "absolute/secret", "far/passwd"]
        {
            assert_eq!(errno(root.resolve(Path::new(path))), libc::ENOENT, "{path}");
            assert_eq!(errno(root.open_regular(Path::new(path))), libc::ENOENT, "{path}");
        }
        let top = stat_fd(root.as_fd()).unwrap().identity;
        assert_eq!(stat_fd(root.resolve(Path::new("../..")).unwrap().as_fd()).unwrap().identity, top);
    }

    #[test]
    fn links_of_proc_are_never_followed() {
        let proc = Root::open(Path::new("/proc")).unwrap();
        assert_eq!(errno(proc.resolve(Path::new("self/root/etc"))), libc::ELOOP);
    }

    #[test]
    fn missing_directories_are_made_through_dangling_links_inside() {
        let tree = Tree::new("dangling");
        fs::create_dir(tree.inside("a")).unwrap();
        symlink("/x/../y/z", tree.inside("a/link")).unwrap();
        symlink("../../../canary/made", tree.inside("out")).unwrap();
        let mut made = Vec::new();
        tree.root()
            .make_dir_all_with(Path::new("a/link/deep"), |missing| {
                made.push(missing.path.to_owned());
                missing.parent.make_dir(missing.name, 0o755)
            })
            .unwrap();
        assert_eq!(made, ["x", "y", "y/z", "y/z/deep"].map(PathBuf::from));
        assert!(tree.inside("y/z/deep").is_dir());
        tree.root().make_dir_all(Path::new("out"), 0o755).unwrap();
        assert!(tree.inside("canary/made").is_dir());
        assert!(!tree.0.join("canary/made").exists());
    }

    #[test]
    fn link_loops_and_files_in_the_way_end_with_an_error() {
        let tree = Tree::new("loop");
        symlink("b", tree.inside("a")).unwrap();
        symlink("a", tree.inside("b")).unwrap();
        fs::write(tree.inside("file"), "").unwrap();
        let make = |path: &str| tree.root().make_dir_all(Path::new(path), 0o755);
        assert_eq!(errno(make("a/c")), libc::ELOOP);
        assert_eq!(errno(make("file/c")), libc::ENOTDIR);
    }

    #[test]
    fn names_with_a_path_in_them_are_refused() {
        let tree = Tree::new("names");
        let dir = tree.root().open_dir(Path::new("")).unwrap();
        for name in ["", ".", "..", "a/b", "/", "../canary", "a\0b"] {
            let name = OsStr::new(name);
            assert_eq!(errno(dir.make_dir(name, 0o755)), libc::EINVAL, "{name:?}");
            assert_eq!(errno(dir.create_file(name, 0o644)), libc::EINVAL, "{name:?}");
            assert_eq!(errno(dir.remove_all(name)), libc::EINVAL, "{name:?}");
            assert_eq!(errno(dir.make_symlink(OsStr::new("x"), name)), libc::EINVAL, "{name:?}");
        }
    }

    #[test]
    fn a_link_in_the_last_place_is_neither_written_through_nor_changed_through() {
        let tree = Tree::new("last");
        let secret = tree.0.join("canary/secret");
        symlink(&secret, tree.inside("link")).unwrap();
        let before = fs::metadata(&secret).unwrap();
        let dir = tree.root().open_dir(Path::new("")).unwrap();
        let link = OsStr::new("link");
        assert_eq!(errno(dir.create_file(link, 0o644)), libc::EEXIST);
        assert_eq!(errno(dir.chmod(link, 0o777)), libc::EOPNOTSUPP);
        assert_eq!(errno(dir.open_dir(link)), libc::ENOTDIR);
        dir.set_times(link, Timestamp { seconds: 7, nanoseconds: 9 }).unwrap();
        assert_eq!(dir.stat(link).unwrap().modified, Timestamp { seconds: 7, nanoseconds: 9 });
        dir.make_hard_link(OsStr::new("second"), &dir, link).unwrap();
        assert_eq!(dir.stat(OsStr::new("second")).unwrap().file_type, FileType::Symlink);
        let after = fs::metadata(&secret).unwrap();
        assert_eq!(
            (before.mtime(), before.mode(), before.nlink()),
            (after.mtime(), after.mode(), after.nlink())
        );
    }

    #[test]
    fn removal_takes_a_tree_deeper_than_any_path_and_follows_nothing() {
        let tree = Tree::new("deep");
        let mut dir = tree.root().open_dir(Path::new("")).unwrap();
        let name = OsStr::new("d");
        for level in 0..5000 {
            dir.make_dir(name, 0o700).unwrap();
            dir = dir.open_dir(name).unwrap();
            if level % 100 == 0 {
                dir.make_symlink(tree.0.join("canary").as_os_str(), OsStr::new("out")).unwrap();
                dir.create_file(OsStr::new("file"), 0o600).unwrap();
            }
        }
        let top = tree.root().open_dir(Path::new("")).unwrap();
        top.remove_all(name).unwrap();
        assert_eq!(top.names(10).unwrap(), Vec::<OsString>::new());
        assert_eq!(fs::read(tree.0.join("canary/secret")).unwrap(), b"host");
        top.remove_all(name).unwrap();
    }

    #[test]
    fn removal_takes_a_directory_wider_than_one_listing() {
        let tree = Tree::new("wide");
        fs::create_dir(tree.inside("wide")).unwrap();
        for i in 0..3000 {
            fs::write(tree.inside(&format!("wide/a-rather-long-name-for-one-file-{i}")), "").unwrap();
        }
        let top = tree.root().open_dir(Path::new("")).unwrap();
        let wide = top.open_dir(OsStr::new("wide")).unwrap();
        assert_eq!(wide.names(5000).unwrap().len(), 3000);
        assert_eq!(errno(wide.names(2999)), libc::EOVERFLOW);
        top.remove_all(OsStr::new("wide")).unwrap();
        assert!(!tree.inside("wide").exists());
    }

    #[test]
    fn device_numbers_that_do_not_fit_are_refused() {
        let tree = Tree::new("device");
        let dir = tree.root().open_dir(Path::new("")).unwrap();
        for (major, minor) in [(1 << 12, 0), (0, 1 << 20), (u32::MAX, u32::MAX)] {
            let made = dir.make_node(OsStr::new("dev"), Node::CharDevice(major, minor), 0o600);
            assert_eq!(errno(made), libc::EINVAL);
        }
        dir.make_node(OsStr::new("pipe"), Node::Fifo, 0o600).unwrap();
        assert_eq!(dir.stat(OsStr::new("pipe")).unwrap().file_type, FileType::Fifo);
        assert_eq!(errno(tree.root().open_regular(Path::new("pipe"))), libc::EINVAL);
    }

    #[test]
    fn renames_by_others_do_not_open_a_way_out() {
        let tree = Tree::new("race");
        fs::create_dir_all(tree.inside("a/b")).unwrap();
        fs::create_dir_all(tree.inside("c")).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::rename(tree.inside("a/b"), tree.inside("c/b"));
                    let _ = fs::rename(tree.inside("c/b"), tree.inside("a/b"));
                }
            });
            let root = tree.root();
            for _ in 0..2000 {
                if let Ok(fd) = root.resolve(Path::new("a/b/../../../canary/secret")) {
                    panic!("left the tree: {fd:?}");
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
