//! Paths of the host: creating missing directories, and resolving a path without blocking.
//!
//! Unlike the paths of [`beneath`](crate::beneath), a path of the host may lead through symbolic
//! links: administrators move `/var/lib/kubelet` to another disk that way. But a container may own
//! a directory on the path, and swap its entries at any time. So the walk goes by descriptor, the
//! kernel resolves each component once, and a new directory is entered without following a link.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Creates the missing directories of the absolute `path`, with `mode` less the umask:
/// `mkdirat(2)`.
///
/// The mode is never set afterwards: a container could have put another directory in the place of
/// the new one.
///
/// # Errors
/// The part of the path that could not be created or entered, and why: `ENOTDIR` for a file in the
/// way, `ENOENT` for a dangling link, `EINVAL` when `path` is not absolute.
pub fn make_dir_all(path: &Path, mode: u32) -> Result<(), (PathBuf, io::Error)> {
    let mut reached = PathBuf::from("/");
    let mut dir = None;
    for component in path.components() {
        let step = match (&dir, component) {
            (None, Component::RootDir) => open(libc::AT_FDCWD, c"/", 0),
            (Some(dir), Component::Normal(name)) => {
                reached.push(name);
                enter(dir, name, mode)
            }
            (Some(dir), Component::ParentDir) => {
                reached.push("..");
                open(dir.as_raw_fd(), c"..", 0)
            }
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        dir = Some(step.map_err(|error| (reached.clone(), error))?);
    }
    Ok(())
}

/// <linux/openat2.h>, Linux 5.12; nix lacks it.
const RESOLVE_CACHED: u64 = 0x20;

/// The absolute path, without links, that `path` leads to, if the kernel has all of it in memory:
/// `openat2(2)` with `RESOLVE_CACHED`, which takes no lock and asks no filesystem. `None`
/// otherwise, even when nothing exists there: finding that out may take forever.
#[must_use]
pub fn resolve_cached(path: &Path) -> Option<PathBuf> {
    let opened = open_cached(path).ok()?;
    let found = std::fs::read_link(format!("/proc/thread-self/fd/{}", opened.as_raw_fd())).ok()?;
    // A removed file has this after its name, and an unreachable one has no absolute path.
    let is_path = found.is_absolute() && !found.as_os_str().as_bytes().ends_with(b" (deleted)");
    is_path.then_some(found)
}

/// What the kernel has in memory of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached {
    /// It leads to this.
    Is(Facts),
    /// It leads to nothing.
    Absent,
    /// Not enough to say.
    Unknown,
}

/// What tells a file or directory from another, and from itself before a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// The filesystem: major and minor number.
    pub device: (u32, u32),
    /// Its number there.
    pub inode: u64,
    /// In bytes.
    pub size: u64,
    /// When it was last changed in any way: seconds since the epoch, and nanoseconds.
    pub changed: (i64, u32),
}

/// What `path` leads to, as far as the kernel has it in memory. As [`resolve_cached`], this never
/// waits.
#[must_use]
pub fn look_cached(path: &Path) -> Cached {
    match open_cached(path) {
        Ok(opened) => facts(opened.as_fd()).map_or(Cached::Unknown, Cached::Is),
        Err(nix::errno::Errno::ENOENT) => Cached::Absent,
        Err(_) => Cached::Unknown,
    }
}

/// The facts about an open file, as they are in memory: `statx(2)`, `AT_STATX_DONT_SYNC`.
///
/// # Errors
/// When they are not there.
pub fn facts(file: BorrowedFd<'_>) -> io::Result<Facts> {
    let wanted = libc::STATX_INO | libc::STATX_SIZE | libc::STATX_CTIME;
    // SAFETY: a statx is plain numbers, for which zero is a value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: statx(2) takes an open descriptor, an empty NUL-terminated name with AT_EMPTY_PATH,
    // and a structure to fill, all of which live until it returns.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC,
            wanted,
            &raw mut found,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if found.stx_mask & wanted != wanted {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(Facts {
        device: (found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        size: found.stx_size,
        changed: (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec),
    })
}

fn open_cached(path: &Path) -> nix::Result<OwnedFd> {
    use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
    if !path.is_absolute() {
        return Err(nix::errno::Errno::EINVAL);
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::from_bits_retain(RESOLVE_CACHED));
    openat2(AT_FDCWD, path, how)
}

fn enter(dir: &OwnedFd, name: &OsStr, mode: u32) -> io::Result<OwnedFd> {
    let name = CString::new(name.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    match open(dir.as_raw_fd(), &name, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        opened => return opened,
    }
    // SAFETY: mkdirat(2) takes an open directory and a NUL-terminated name, and both live until it
    // returns.
    if unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) } == 0 {
        return open(dir.as_raw_fd(), &name, libc::O_NOFOLLOW);
    }
    match io::Error::last_os_error() {
        // Another process created it just now, or it is a dangling link, which the open refuses.
        error if error.raw_os_error() == Some(libc::EEXIST) => open(dir.as_raw_fd(), &name, 0),
        error => Err(error),
    }
}

fn open(dir: i32, name: &CStr, flags: i32) -> io::Result<OwnedFd> {
    let flags = flags | libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: openat(2) takes a directory or AT_FDCWD, which `dir` is in every call here, and a
    // NUL-terminated name.
    let raw = unsafe { libc::openat(dir, name.as_ptr(), flags) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned `raw` as a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::{Duration, Instant};

    use super::*;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("berth-host-path-{}-{name}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn what_the_kernel_has_in_memory_is_found_and_nothing_else() {
        let directory = Directory::new("cached");
        let top = fs::canonicalize(&directory.0).unwrap();
        fs::create_dir(top.join("data")).unwrap();
        fs::write(top.join("data/file"), "").unwrap();
        symlink("data/file", top.join("link")).unwrap();
        assert!(fs::metadata(top.join("link")).is_ok(), "it is in memory now");
        // The kernel gives up when something is mounted or renamed meanwhile, anywhere: other tests
        // do little else for a while.
        let end = Instant::now() + Duration::from_secs(60);
        let found = loop {
            let found = resolve_cached(&top.join("data/../link"));
            if found.is_some() || Instant::now() > end {
                break found;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(found, Some(top.join("data/file")));
        assert_eq!(resolve_cached(&top.join("absent")), None);
        assert_eq!(resolve_cached(&top.join("data/file/")), None);
        assert_eq!(resolve_cached(Path::new("relative")), None);
        fs::write(top.join("x (deleted)"), "").unwrap();
        assert_eq!(resolve_cached(&top.join("x (deleted)")), None);
    }

    #[test]
    fn links_of_the_administrator_are_followed_and_links_to_nothing_are_not() {
        let directory = Directory::new("links");
        fs::create_dir(directory.0.join("data")).unwrap();
        symlink("data", directory.0.join("kubelet")).unwrap();
        symlink("absent", directory.0.join("dangling")).unwrap();
        fs::write(directory.0.join("file"), "").unwrap();
        make_dir_all(&directory.0.join("kubelet/a/../b"), 0o755).unwrap();
        assert!(directory.0.join("data/a").is_dir() && directory.0.join("data/b").is_dir());
        let refused = |path: &str| make_dir_all(&directory.0.join(path), 0o755).unwrap_err();
        let (at, error) = refused("dangling/a");
        assert_eq!((at, error.raw_os_error()), (directory.0.join("dangling"), Some(libc::ENOENT)));
        let (at, error) = refused("file/a");
        assert_eq!((at, error.raw_os_error()), (directory.0.join("file"), Some(libc::ENOTDIR)));
        assert!(!directory.0.join("absent").exists());
        assert_eq!(make_dir_all(Path::new("a"), 0o755).unwrap_err().1.raw_os_error(), Some(libc::EINVAL));
    }
}
