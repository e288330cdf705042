//! The boundary, and paths of several components below it, which the kernel resolves.

use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use super::{
    Dir, FileType, MAX_TRIES, Stat, c_string, invalid, owned, read_link_at, reopen, retry_interrupted,
    stat_fd,
};

/// Symbolic links followed while directories are created; the kernel's own limit
/// (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The boundary: paths are resolved as if this directory were `/`. Holds an `O_PATH` descriptor.
#[derive(Debug)]
pub struct Root {
    pub(super) fd: OwnedFd,
}

/// A directory that [`Root::make_dir_all_with`] needs and does not find.
#[derive(Debug)]
pub struct MissingDir<'a> {
    /// Its path from the boundary, without links.
    pub path: &'a Path,
    /// The directory in which to create it.
    pub parent: &'a Dir,
    /// Its name there.
    pub name: &'a OsStr,
    /// Anything with that name that is neither a directory nor a link.
    pub obstacle: Option<Stat>,
}

/// `struct open_how` (include/uapi/linux/openat2.h): three 64-bit fields.
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

const RESOLVE_NO_XDEV: u64 = 0x01;
const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
const RESOLVE_NO_SYMLINKS: u64 = 0x04;
const RESOLVE_IN_ROOT: u64 = 0x10;

impl Root {
    /// Opens the boundary itself. `path` is trusted: links in it are followed.
    ///
    /// # Errors
    /// As open(2); `ENOTDIR` if it is not a directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = c_string(path.as_os_str())?;
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: open(2) takes a NUL-terminated path, which a CString is, and no mode without
        // O_CREAT.
        let fd = retry_interrupted(|| unsafe { libc::open(path.as_ptr(), flags) })?;
        Ok(Self { fd: owned(fd) })
    }

    /// Takes a descriptor of a directory as the boundary.
    ///
    /// # Errors
    /// `ENOTDIR` if it is not one.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        if stat_fd(fd.as_fd())?.file_type != FileType::Directory {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        Ok(Self { fd })
    }

    /// Resolves `path`, links included, to an `O_PATH` descriptor of any type of file.
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

    /// Like [`Root::resolve`], but any link on the way is an error.
    ///
    /// # Errors
    /// As openat2(2); `ELOOP` for a link.
    pub fn resolve_no_links(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open_raw(path, libc::O_PATH, RESOLVE_NO_SYMLINKS)
    }

    /// Target of the link at `path`, reached through no other link and through no mount point: the
    /// link of the filesystem at the boundary, even if something is mounted over it.
    ///
    /// # Errors
    /// As openat2(2): `EXDEV` for a mount point, `ELOOP` for a link on the way; `EINVAL` or
    /// `ENOENT` when it is not a link.
    pub fn read_link_of_own_mount(&self, path: &Path) -> io::Result<OsString> {
        let link =
            self.open_raw(path, libc::O_PATH | libc::O_NOFOLLOW, RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS)?;
        read_link_at(link.as_fd(), c"")
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

    /// Opens a regular file for reading; links are followed inside the boundary. The type is
    /// checked before the open, so that no device is touched and no FIFO is waited for.
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

    /// Opens `path` with the given open(2) flags; links are followed inside the boundary. For files
    /// that are known to be safe to open: a device waits or acts, a FIFO blocks unless the flags
    /// say otherwise.
    ///
    /// # Errors
    /// As openat2(2).
    pub fn open_with(&self, path: &Path, flags: i32) -> io::Result<OwnedFd> {
        self.open_raw(path, flags, 0)
    }

    /// Opens a regular file for appending and creates it when absent (mode 0640); any link on the
    /// way is an error, and so is a file that has a second name: in a directory that others can
    /// write, both are ways to make the caller write elsewhere. The type is checked before the
    /// open, as with [`Root::open_regular`].
    ///
    /// # Errors
    /// As openat2(2); `ELOOP` for a link; `EINVAL` for anything but a regular file with one name.
    pub fn open_append(&self, path: &Path) -> io::Result<File> {
        const FLAGS: i32 = libc::O_WRONLY | libc::O_APPEND | libc::O_NOCTTY;
        let is_wanted = |fd: BorrowedFd<'_>| {
            let stat = stat_fd(fd)?;
            let is_wanted = stat.file_type == FileType::Regular && stat.links == 1;
            if is_wanted { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
        };
        // Others may create and remove it meanwhile.
        for _ in 0..MAX_TRIES {
            match self.resolve_no_links(path) {
                Ok(found) => {
                    is_wanted(found.as_fd())?;
                    let opened = reopen(found.as_fd(), FLAGS)?;
                    // It may have acquired another name since.
                    is_wanted(opened.as_fd())?;
                    return Ok(File::from(opened));
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
            let path = c_string(path.as_os_str())?;
            let how = OpenHow {
                flags: u64::from((FLAGS | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC).cast_unsigned()),
                mode: 0o640,
                resolve: RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS,
            };
            match openat2(self.fd.as_fd(), &path, &how) {
                Ok(made) => return Ok(File::from(made)),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    /// Opens the directory that contains the last component of `path`, and returns that component.
    /// Links on the way are followed.
    ///
    /// # Errors
    /// As openat2(2); `EINVAL` if the last component is absent or `..`.
    pub fn open_parent(&self, path: &Path) -> io::Result<(Dir, OsString)> {
        let name = path.file_name().ok_or_else(invalid)?.to_owned();
        Ok((self.open_dir(path.parent().unwrap_or(Path::new("")))?, name))
    }

    /// Opens the directory `path` and creates it and its parents where they are absent, owned by
    /// the caller and with `mode` (less the umask).
    ///
    /// A link on the way is followed inside the boundary, even a dangling one: then its target is
    /// created.
    ///
    /// # Errors
    /// As openat2(2) and mkdirat(2); `ENOTDIR` if something else is in the way; `ELOOP` after 40
    /// links.
    pub fn make_dir_all(&self, path: &Path, mode: u32) -> io::Result<Dir> {
        self.make_dir_all_with(path, |missing| match missing.obstacle {
            None => missing.parent.make_dir(missing.name, mode),
            Some(_) => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        })
    }

    /// Like [`Root::make_dir_all`], but `make` creates each directory that is missing, or fails.
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
        // The components that are still to be walked, last first, and the current place: a path
        // without any link.
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

fn openat2(dir: BorrowedFd<'_>, path: &CStr, how: &OpenHow) -> io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        // SAFETY: openat2(2) reads a NUL-terminated path and `size` bytes of open_how; both outlive
        // the call.
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

/// Pushes the components of `path` so that the first one is popped first. `.` and a leading `/` are
/// dropped.
fn push_components(stack: &mut Vec<OsString>, path: &Path) {
    for component in path.components().rev() {
        match component {
            Component::Normal(name) => stack.push(name.to_owned()),
            Component::ParentDir => stack.push(OsString::from("..")),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
}
