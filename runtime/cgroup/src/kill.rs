//! Which processes are in a cgroup, and killing all of them.
//!
//! v2 has `cgroup.kill` (Linux 5.14), which misses no process. v1 does not: there the cgroup is
//! frozen, so that no process forks while the list is read, each on the list gets SIGKILL, and the
//! cgroup is thawed so that they can die; this repeats until none is left. A container may have
//! created sub-cgroups in one hierarchy and not in another, so all directories of all hierarchies
//! are read.
//!
//! A container that keeps one of these directories locked blocks that ([`Files`]). Its processes
//! are then found through procfs, which is not exact while new processes are born, but kills the
//! one that holds the lock.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use berth_sys::errno::{EOPNOTSUPP, ESRCH};
use berth_sys::process;

use crate::cgroup::Place;
use crate::{Cgroup, Error, OpenFor, control_file};

/// Waits between two looks: from the time that a killed process with little memory needs, up to one
/// at which looking costs nothing.
const FIRST_WAIT: Duration = Duration::from_micros(200);
const LONGEST_WAIT: Duration = Duration::from_millis(10);

/// The wait while a directory does not answer and all of procfs has to be read.
const UNSEEN_WAIT: Duration = Duration::from_millis(100);

/// How many files are open at a time.
const AT_A_TIME: usize = 64;

impl Cgroup {
    /// The pids of all processes in this cgroup and below it, as this process's pid namespace
    /// numbers them. Those that are invisible to it are left out.
    ///
    /// # Errors
    /// [`Error::Read`]; an absent cgroup has no processes.
    pub fn processes(&self) -> Result<BTreeSet<i32>, Error> {
        self.pids_below(self.directories())
    }

    /// The same as seen in one hierarchy, which is enough to inspect processes but not to kill
    /// them: one may have been moved in another hierarchy. This is a twelfth of the work on a v1
    /// machine with twelve.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn members(&self) -> Result<BTreeSet<i32>, Error> {
        self.pids_below(self.dir_of("memory").into_iter())
    }

    fn pids_below<'a>(&self, tops: impl Iterator<Item = &'a Path>) -> Result<BTreeSet<i32>, Error> {
        let mut lists = Vec::new();
        for top in tops {
            let tree = self.tree(top).map_err(|source| Error::Read { path: top.into(), source })?;
            lists.extend(tree.into_iter().map(|dir| dir.join("cgroup.procs")));
        }
        let mut pids = BTreeSet::new();
        for lists in lists.chunks(AT_A_TIME) {
            for (list, opened) in lists.iter().zip(self.files.open(lists, OpenFor::Reading)) {
                match opened.and_then(control_file::read_open) {
                    Ok(bytes) => pids.extend(parse_pids(&bytes)),
                    Err(error)
                        if control_file::is_gone(&error) || error.raw_os_error() == Some(EOPNOTSUPP) => {}
                    Err(source) => return Err(Error::Read { path: list.clone(), source }),
                }
            }
        }
        Ok(pids)
    }

    /// One of its directories and all below it.
    fn tree(&self, top: &Path) -> io::Result<Vec<PathBuf>> {
        // Two links mean no sub-cgroups, as in almost all cgroups: nothing to list.
        match std::fs::metadata(top) {
            Ok(metadata) if metadata.nlink() == 2 => Ok(vec![top.to_path_buf()]),
            _ => self.files.tree(top),
        }
    }

    /// Whether no process is in this cgroup or below it.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn is_empty(&self) -> Result<bool, Error> {
        if let Place::Unified(dir) = &self.place {
            let Some(events) = self.read_if_there(&dir.join("cgroup.events"))? else {
                return Ok(true);
            };
            return Ok(control_file::keyed(&events, "populated") == Some(0));
        }
        Ok(self.processes()?.is_empty())
    }

    /// Kills everything in this cgroup and below it, and waits until it is empty. Blocks for up to
    /// `within`.
    ///
    /// # Errors
    /// [`Error::StillPopulated`] when the time is up (a process in an uninterruptible wait, for
    /// example); [`Error::Kill`], [`Error::Read`], [`Error::Write`]. In every case the cgroup is
    /// not left frozen.
    pub fn kill(&self, within: Duration) -> Result<(), Error> {
        let started = Instant::now();
        let mut wait = FIRST_WAIT;
        loop {
            let killed = match self.is_empty() {
                Ok(true) => return Ok(()),
                Ok(false) => self.kill_once(),
                Err(error) => Err(error),
            };
            if let Err(error) = &killed {
                if !error.is_silent() {
                    return killed;
                }
                self.kill_unseen()?;
                wait = UNSEEN_WAIT;
            }
            if started.elapsed() >= within {
                killed?;
                let left = self.processes()?.len();
                if left == 0 {
                    return Ok(());
                }
                return Err(Error::StillPopulated {
                    path: self.main_dir(),
                    left,
                    waited_ms: started.elapsed().as_millis(),
                });
            }
            thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    fn kill_once(&self) -> Result<(), Error> {
        let Place::Unified(dir) = &self.place else { return self.kill_round() };
        match self.write(&dir.join("cgroup.kill"), "1") {
            Err(Error::Write { source, .. }) if control_file::is_gone(&source) => Ok(()),
            other => other,
        }
    }

    /// Kills what is in this cgroup or below it according to procfs, whatever the state of its
    /// directories: proc_pid_cgroup(5).
    fn kill_unseen(&self) -> Result<(), Error> {
        let path = Path::new("/proc");
        let fail = |source| Error::Read { path: path.into(), source };
        for entry in std::fs::read_dir(path).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            if !self.is_member(pid) {
                continue;
            }
            // A process that has ended can no longer be killed. Its number may already belong to
            // another process, which is not in the cgroup.
            if let Ok(pidfd) = process::open_pidfd(pid)
                && self.is_member(pid)
            {
                let _ = process::signal_pidfd(pidfd.as_fd(), process::SIGKILL);
            }
        }
        Ok(())
    }

    fn is_member(&self, pid: i32) -> bool {
        let listed = std::fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        is_listed(&listed, self.path())
    }

    /// v1: one round of freeze, list, kill, thaw.
    fn kill_round(&self) -> Result<(), Error> {
        let _thaw = match self.dir_of("freezer") {
            Some(dir) => Some(Frozen::new(self, dir)?),
            None => None,
        };
        let mut held = Vec::new();
        for pid in self.processes()? {
            match process::open_pidfd(pid) {
                Ok(pidfd) => held.push((pid, pidfd)),
                Err(error) if error.raw_os_error() == Some(ESRCH) => {}
                Err(source) => return Err(Error::Kill { pid, path: self.main_dir(), source }),
            }
        }
        // A pid may have been reused between the list and the pidfd. If it is on a second list
        // while the pidfd is held, it is that process.
        let still = self.processes()?;
        for (pid, pidfd) in held {
            if !still.contains(&pid) {
                continue;
            }
            match process::signal_pidfd(pidfd.as_fd(), process::SIGKILL) {
                Err(error) if error.raw_os_error() != Some(ESRCH) => {
                    return Err(Error::Kill { pid, path: self.main_dir(), source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A v1 freezer, thawed when this goes out of scope, also after an error: a frozen cgroup cannot
/// die and would outlive its pod. The same for the cgroups below, which a container may have frozen
/// on its own.
struct Frozen<'a> {
    cgroup: &'a Cgroup,
    dir: &'a Path,
    /// Opened before it is frozen, so that it can always be thawed. `None` where the cgroup is
    /// gone.
    state: Option<File>,
}

/// freezer-subsystem.txt of the kernel's cgroup v1 documents.
const STATE: &str = "freezer.state";

impl<'a> Frozen<'a> {
    /// Asks for the freeze without waiting for it: a process that is still running is caught in the
    /// next round.
    fn new(cgroup: &'a Cgroup, dir: &'a Path) -> Result<Self, Error> {
        let (path, value) = (dir.join(STATE), "FROZEN");
        let mut frozen = Self { cgroup, dir, state: None };
        let opened = cgroup.open_for_writing(&path);
        let written = opened.and_then(|file| control_file::write_to(frozen.state.insert(file), value));
        match written {
            Err(source) if !control_file::is_gone(&source) => {
                Err(Error::Write { path, value: value.into(), source })
            }
            _ => Ok(frozen),
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        const THAWED: &str = "THAWED";
        // This fails only if the cgroup is gone.
        if let Some(state) = &mut self.state {
            let _ = control_file::write_to(state, THAWED);
        }
        for dir in self.cgroup.tree(self.dir).unwrap_or_default().iter().skip(1) {
            let _ = self.cgroup.write_value(&dir.join(STATE), THAWED);
        }
    }
}

/// Whether the content of a `/proc/<pid>/cgroup` names the cgroup `path` or one below it, in any
/// hierarchy. Paths in that file begin at the root of the hierarchy, wherever that is mounted.
fn is_listed(listed: &[u8], path: &str) -> bool {
    String::from_utf8_lossy(listed).lines().any(|line| {
        let place = line.splitn(3, ':').nth(2).unwrap_or_default();
        place.ends_with(path) || place.contains(&format!("{path}/"))
    })
}

/// One pid a line. A process in a pid namespace that is invisible to the reader is 0, which must
/// never reach kill(2).
fn parse_pids(bytes: &[u8]) -> impl Iterator<Item = i32> {
    bytes
        .split(|&byte| byte == b'\n')
        .filter_map(control_file::number)
        .filter_map(|pid| i32::try_from(pid).ok())
        .filter(|&pid| pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_in_what_procfs_lists() {
        for (listed, expected) in [
            ("4:memory:/pods/1/ab\n", true),
            ("4:memory:/\n0::/pods/1/ab/below\n", true),
            ("0::/outer/pods/1/ab\n", true),
            ("0::/pods/1/abc\n4:cpu:/pods/1\n", false),
            ("0::/pods/1/ab (deleted)\n", false),
            ("/pods/1/ab\n", false),
            ("", false),
        ] {
            assert_eq!(is_listed(listed.as_bytes(), "/pods/1/ab"), expected, "{listed:?}");
        }
    }

    #[test]
    fn only_real_pids_are_taken() {
        for (bytes, pids) in [
            (&b""[..], &[][..]),
            (b"1\n22\n333\n", &[1, 22, 333]),
            (b"0\n7\n0\n", &[7]),
            (b"-1\n5\n", &[5]),
            (b"9999999999\n5", &[5]),
            (b"x\n\0\n\xff\n 6\n", &[]),
        ] {
            assert_eq!(parse_pids(bytes).collect::<Vec<_>>(), pids, "{bytes:?}");
        }
    }
}
