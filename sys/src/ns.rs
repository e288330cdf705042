//! Namespaces: joining them, and creating ones that live without a process, pinned as files.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::mount;

/// A kind of namespace that can be pinned as a file: namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Network devices, addresses, ports.
    Network,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Hostname.
    Uts,
    /// Process ids.
    Pid,
}

impl Kind {
    /// The name of the file in `/proc/<pid>/ns/`.
    #[must_use]
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Network => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Pid => "pid",
        }
    }

    /// The `CLONE_NEW*` bit: `clone(2)`.
    #[must_use]
    pub fn flag(self) -> i32 {
        match self {
            Self::Network => libc::CLONE_NEWNET,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::Pid => libc::CLONE_NEWPID,
        }
    }
}

/// `CLONE_NEWNS`: a mount namespace.
pub const MOUNT: i32 = libc::CLONE_NEWNS;
/// `CLONE_NEWCGROUP`: a cgroup namespace.
pub const CGROUP: i32 = libc::CLONE_NEWCGROUP;

/// Moves the calling thread into the namespace that `namespace` stands for, which must be of the
/// kind `flags` (`CLONE_NEW*`), or, when it is a pidfd, into all the namespaces in `flags` of that
/// process: `setns(2)`.
///
/// # Errors
/// `EINVAL` for another kind, `ESRCH` when the process behind a pidfd has ended.
pub fn join(namespace: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    // SAFETY: setns(2) takes only numbers.
    if unsafe { libc::setns(namespace.as_raw_fd(), flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Moves the calling thread into new namespaces of the kinds in `flags` (`CLONE_NEW*`):
/// `unshare(2)`.
///
/// # Errors
/// `ENOSPC`/`EUSERS` at a namespace limit, `EPERM` without `CAP_SYS_ADMIN`.
pub fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: unshare(2) takes only numbers.
    if unsafe { libc::unshare(flags) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens a namespace file without blocking on it or following a link.
///
/// # Errors
/// `ENOENT` when it does not exist.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY).open(path)?;
    Ok(file.into())
}

/// Opens the calling thread's own namespace of this kind.
///
/// # Errors
/// None in practice.
pub fn open_own(kind: Kind) -> io::Result<OwnedFd> {
    open(Path::new(&format!("/proc/thread-self/ns/{}", kind.file_name())))
}

/// Pins the calling thread's own namespace of this kind as the file `path`, which is created: a
/// bind mount of the file in `/proc/thread-self/ns`, namespaces(7). It lives until [`unpin`].
///
/// # Errors
/// `EEXIST` when the file exists; otherwise that of `mount(2)`.
pub fn pin_own(kind: Kind, path: &Path) -> io::Result<()> {
    pin(Path::new(&format!("/proc/thread-self/ns/{}", kind.file_name())), path)
}

/// Pins the namespace that `namespace` stands for as the file `path`, which is created.
///
/// # Errors
/// As [`pin_own`].
pub fn pin_fd(namespace: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    pin(Path::new(&format!("/proc/thread-self/fd/{}", namespace.as_raw_fd())), path)
}

/// The number that distinguishes the namespace behind `namespace` from all others of its kind: the
/// inode of nsfs, namespaces(7), which links in `/proc/<pid>/ns` show as `pid:[number]`.
///
/// # Errors
/// `EINVAL` when it is not a namespace.
pub fn number(namespace: BorrowedFd<'_>) -> io::Result<u64> {
    if !is_namespace(namespace) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(nix::sys::stat::fstat(namespace)?.st_ino)
}

fn pin(source: &Path, path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(0o400).open(path)?;
    mount::bind(source, path).inspect_err(|_| {
        // The empty file is ours, created above; the error of the mount is the one to report.
        let _ = std::fs::remove_file(path);
    })
}

/// Undoes [`pin_own`]: unmounts and deletes the file. An absent one is success.
///
/// # Errors
/// Those of `umount2(2)` and `unlink(2)`, except for "not mounted" and "does not exist".
pub fn unpin(path: &Path) -> io::Result<()> {
    match mount::detach(path) {
        Ok(()) => {}
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {}
        Err(error) => return Err(error),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether `path` is a pinned namespace (nsfs) and not just the empty file under it: `statfs(2)`,
/// `NSFS_MAGIC`. Takes no descriptor.
///
/// # Errors
/// When that cannot be determined; an absent path is `false`.
pub fn is_pinned(path: &Path) -> io::Result<bool> {
    match nix::sys::statfs::statfs(path) {
        Ok(found) => Ok(found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC),
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether `file` is a namespace (nsfs): `fstatfs(2)`, `NSFS_MAGIC`.
#[must_use]
pub fn is_namespace(file: BorrowedFd<'_>) -> bool {
    nix::sys::statfs::fstatfs(file).is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

/// Sets the hostname of the calling thread's UTS namespace: `sethostname(2)`.
///
/// # Errors
/// `EINVAL` when longer than 64 bytes.
pub fn set_hostname(name: &str) -> io::Result<()> {
    Ok(nix::unistd::sethostname(name)?)
}

/// Runs `work` on a new thread, which may change its namespaces freely and ends with the work.
///
/// The thread gets its own filesystem attributes (`CLONE_FS` unshared), so that it can also join a
/// mount namespace.
///
/// # Errors
/// When the thread cannot be created.
///
/// # Panics
/// When `work` panics, with its panic.
pub fn on_own_thread<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(256 * 1024).spawn_scoped(
            scope,
            || {
                unshare(libc::CLONE_FS)?;
                Ok(work())
            },
        )?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_pinned_namespace_lives_without_a_process() {
        let dir = tempfile_dir();
        let path = dir.join("uts");
        on_own_thread("pin", || {
            unshare(libc::CLONE_NEWUTS).unwrap();
            set_hostname("pinned-here").unwrap();
            pin_own(Kind::Uts, &path).unwrap();
        })
        .unwrap();
        assert!(is_pinned(&path).unwrap());
        let name = on_own_thread("join", || {
            join(open(&path).unwrap().as_fd(), Kind::Uts.flag()).unwrap();
            nix::unistd::gethostname().unwrap()
        })
        .unwrap();
        assert_eq!(name, "pinned-here");
        unpin(&path).unwrap();
        assert!(!path.exists());
        unpin(&path).unwrap();
        assert!(!is_pinned(&path).unwrap());
        std::fs::remove_dir(&dir).unwrap();
    }

    #[test]
    fn pinning_over_a_file_is_refused() {
        let dir = tempfile_dir();
        let path = dir.join("file");
        std::fs::write(&path, "mine").unwrap();
        assert_eq!(pin_own(Kind::Uts, &path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    fn tempfile_dir() -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!(
            "berth-ns-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::create_dir(&dir).unwrap();
        dir
    }
}
