//! Directories of the host that are made on the way to a path.
//!
//! Unlike the paths of [`beneath`](crate::beneath), a path of the host may lead through symbolic links:
//! administrators move `/var/lib/kubelet` to another disk that way. But a container may own a directory on
//! the path, and swap what is in it at any time. So the walk goes by descriptor, the kernel resolves each
//! component once, and what was made is entered without following a link.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Makes the directories of the absolute `path` that are absent, with `mode` less the umask: `mkdirat(2)`.
///
/// The mode is never set afterwards: a container could have put another directory in the place of the new
/// one. A thread that wants exactly `mode` has its own umask
/// ([`on_own_thread`](crate::ns::on_own_thread)).
///
/// # Errors
/// The part of the path that could not be made or entered, and why: `ENOTDIR` for a file in the way, `ENOENT`
/// for a link to nothing, `EINVAL` when `path` is not absolute.
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

fn enter(dir: &OwnedFd, name: &OsStr, mode: u32) -> io::Result<OwnedFd> {
    let name = CString::new(name.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    match open(dir.as_raw_fd(), &name, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        opened => return opened,
    }
    // SAFETY: mkdirat(2) takes an open directory and a NUL-terminated name, and both live until it returns.
    if unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) } == 0 {
        return open(dir.as_raw_fd(), &name, libc::O_NOFOLLOW);
    }
    match io::Error::last_os_error() {
        // Another process made it just now, or it is a dangling link, which the open refuses.
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
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

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
