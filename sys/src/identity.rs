//! Recorded processes: found again by number and start time, and held so that another process with
//! the same number is never mistaken for them.
//!
//! A number belongs to one process until that is reaped. So a process that still has the recorded
//! start time is the recorded process, and as long as its pidfd takes signals, everything that was
//! looked up by its number so far was its own.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::beneath::Root;
use crate::ns::{self, Kind};
use crate::process;

/// A process that was found again.
#[derive(Debug)]
pub struct Identified {
    pidfd: OwnedFd,
    /// Its directory in `/proc`, which still means this process after its number is reused:
    /// proc(5).
    directory: OwnedFd,
}

impl Identified {
    /// Finds the process with this number and this start time ([`process::start_time`]).
    ///
    /// # Errors
    /// `ESRCH` when it was reaped, even if its number has been reused.
    pub fn find(pid: i32, start_time: u64) -> io::Result<Self> {
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let pidfd = process::open_pidfd(pid)?;
        let directory = std::ffi::CString::new(format!("/proc/{pid}")).map_err(|_| gone())?;
        // SAFETY: open(2) takes a NUL-terminated path, and no mode without O_CREAT.
        let raw =
            unsafe { libc::open(directory.as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) };
        if raw < 0 {
            return Err(match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENOENT) => gone(),
                error => error,
            });
        }
        // SAFETY: the kernel returned `raw` as a new descriptor that nothing else owns.
        let directory = unsafe { OwnedFd::from_raw_fd(raw) };
        let found = Self { pidfd, directory };
        let mut stat = Vec::new();
        std::fs::File::from(found.open(c"stat")?).read_to_end(&mut stat)?;
        let same = process::parse_start_time(&stat) == Some(start_time);
        // The descriptor and the directory could belong to two processes; both belong to the one
        // that is still alive.
        if same && found.holds_its_number() { Ok(found) } else { Err(gone()) }
    }

    /// Finds the process that has this number now.
    ///
    /// # Errors
    /// `ESRCH` or `ENOENT` when there is none.
    pub fn find_now(pid: i32) -> io::Result<Self> {
        Self::find(pid, process::start_time(pid)?)
    }

    /// The content of one of its files in `/proc`, such as `cgroup`.
    ///
    /// # Errors
    /// `ESRCH` or `ENOENT` when it has ended.
    pub fn read(&self, name: &std::ffi::CStr) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        std::fs::File::from(self.open(name)?).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Its root directory in its mount namespace, as a boundary for paths: `/proc/<pid>/root`,
    /// proc(5).
    ///
    /// # Errors
    /// `ESRCH` or `ENOENT` when it has ended; `EACCES` without the right to trace it.
    pub fn root(&self) -> io::Result<Root> {
        Root::from_fd(self.open(c"root")?)
    }

    /// A descriptor that stands for it, to keep: pidfd_open(2).
    #[must_use]
    pub fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }

    /// Whether it has not been reaped yet, so that everything that was looked up by its number so
    /// far was its own.
    #[must_use]
    pub fn holds_its_number(&self) -> bool {
        process::signal_pidfd(self.pidfd.as_fd(), 0).is_ok()
    }

    /// Opens its namespace of this kind: `/proc/<pid>/ns/`, namespaces(7).
    ///
    /// # Errors
    /// `ESRCH` or `ENOENT` when it has ended.
    pub fn namespace(&self, kind: Kind) -> io::Result<OwnedFd> {
        let name = match kind {
            Kind::Network => c"ns/net",
            Kind::Ipc => c"ns/ipc",
            Kind::Uts => c"ns/uts",
            Kind::Pid => c"ns/pid",
        };
        let namespace = self.open(name)?;
        if ns::is_namespace(namespace.as_fd()) {
            Ok(namespace)
        } else {
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        }
    }

    fn open(&self, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
        // SAFETY: openat(2) takes an open directory and a NUL-terminated name, and no mode without
        // O_CREAT.
        let raw = unsafe {
            libc::openat(self.directory.as_raw_fd(), name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC)
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel returned `raw` as a new descriptor that nothing else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> (Child, i32, u64) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        (child, pid, process::start_time(pid).unwrap())
    }

    fn end(child: &mut Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_recorded_process_is_found_and_its_namespace_is_its_own() {
        let (mut child, pid, start_time) = sleeper();
        let found = Identified::find(pid, start_time).unwrap();
        let namespace = std::fs::File::from(found.namespace(Kind::Pid).unwrap()).metadata().unwrap();
        let own = std::fs::metadata("/proc/self/ns/pid").unwrap();
        assert_eq!((namespace.dev(), namespace.ino()), (own.dev(), own.ino()));
        end(&mut child);
        assert!(!found.holds_its_number() && found.namespace(Kind::Pid).is_err());
    }

    #[test]
    fn what_is_in_proc_is_read_for_as_long_as_it_lives() {
        let (mut child, pid, _) = sleeper();
        let found = Identified::find_now(pid).unwrap();
        assert!(found.read(c"status").unwrap().starts_with(b"Name:"));
        let root = found.root().unwrap();
        assert!(root.open_regular(std::path::Path::new("/proc/self/../../etc/passwd")).is_ok());
        end(&mut child);
        assert!(found.root().is_err() && found.read(c"cgroup").is_err());
        assert!(Identified::find_now(pid).is_err());
    }

    #[test]
    fn another_process_with_its_number_is_not_taken_for_it() {
        let (mut child, pid, start_time) = sleeper();
        // Stands in for a reused number: its process started at another time.
        let error = Identified::find(pid, start_time - 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
        end(&mut child);
        assert_eq!(Identified::find(pid, start_time).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
