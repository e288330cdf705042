//! Who is in a cgroup, and ending all of them.
//!
//! v2 has `cgroup.kill` (Linux 5.14), which cannot miss anyone. v1 has not: there the cgroup is
//! frozen, so that no process forks while the list is read, each on the list gets SIGKILL, and it
//! is thawed so that they can die; and so on until none is left. A container may have made
//! sub-cgroups, in one hierarchy and not in another, so all directories of all hierarchies are
//! read.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use berth_sys::errno::{EOPNOTSUPP, ESRCH};
use berth_sys::process;

use crate::cgroup::Place;
use crate::{Cgroup, Error, control_file};

/// Waits between two looks: from the time that a killed process with little memory needs, to one at
/// which looking costs nothing.
const FIRST_WAIT: Duration = Duration::from_micros(200);
const LONGEST_WAIT: Duration = Duration::from_millis(10);

impl Cgroup {
    /// The pids of all processes in this cgroup and below it, as this process's pid namespace
    /// numbers them. Those that it cannot see are left out.
    ///
    /// # Errors
    /// [`Error::Read`]; a cgroup that is not there has no processes.
    pub fn processes(&self) -> Result<BTreeSet<i32>, Error> {
        let mut pids = BTreeSet::new();
        for dir in self.directories() {
            let tree = control_file::tree(dir).map_err(|source| Error::Read { path: dir.into(), source })?;
            for dir in tree {
                read_pids(&dir, &mut pids)?;
            }
        }
        Ok(pids)
    }

    /// The same as one hierarchy has it, which is enough to look at them, not to end them: a
    /// process may have been moved in another. A twelfth of the work on a v1 machine with twelve.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn members(&self) -> Result<BTreeSet<i32>, Error> {
        let mut pids = BTreeSet::new();
        let Some(dir) = self.dir_of("memory") else { return Ok(pids) };
        for dir in control_file::tree(dir).map_err(|source| Error::Read { path: dir.into(), source })? {
            read_pids(&dir, &mut pids)?;
        }
        Ok(pids)
    }

    /// Whether no process is in this cgroup or below it.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn is_empty(&self) -> Result<bool, Error> {
        if let Place::Unified(dir) = &self.place {
            let Some(events) = control_file::read_if_there(&dir.join("cgroup.events"))? else {
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
    /// example); [`Error::Kill`], [`Error::Read`], [`Error::Write`]. Whatever happens, the cgroup
    /// is not left frozen.
    pub fn kill(&self, within: Duration) -> Result<(), Error> {
        let started = Instant::now();
        let mut wait = FIRST_WAIT;
        while !self.is_empty()? {
            match &self.place {
                Place::Unified(dir) => match control_file::write(&dir.join("cgroup.kill"), "1") {
                    Err(Error::Write { source, .. }) if control_file::is_gone(&source) => {}
                    other => other?,
                },
                Place::Legacy(_) => self.kill_round()?,
            }
            if started.elapsed() >= within {
                let left = self.processes()?.len();
                if left == 0 {
                    break;
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
        Ok(())
    }

    /// v1: one round of freeze, list, kill, thaw.
    fn kill_round(&self) -> Result<(), Error> {
        let _thaw = match self.dir_of("freezer") {
            Some(dir) => Some(Frozen::new(dir)?),
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
        // A pid may have been reused between the list and the pidfd. Who is on a second list with
        // the pidfd already held is that process.
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

/// A v1 freezer, thawed when this goes out of scope, also on the way out of an error: a frozen
/// cgroup cannot die and would outlive its pod. With it those below, which a container may have
/// frozen on its own.
struct Frozen<'a> {
    dir: &'a Path,
}

/// freezer-subsystem.txt of the kernel's cgroup v1 documents.
const STATE: &str = "freezer.state";

impl<'a> Frozen<'a> {
    /// Asks for the freeze and does not wait for it: who is still moving is caught in the next
    /// round.
    fn new(dir: &'a Path) -> Result<Self, Error> {
        let frozen = Self { dir };
        match control_file::write(&dir.join(STATE), "FROZEN") {
            Err(Error::Write { source, .. }) if control_file::is_gone(&source) => Ok(frozen),
            other => other.map(|()| frozen),
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let below = control_file::tree(self.dir).unwrap_or_default();
        for dir in below.iter().map(PathBuf::as_path).chain([self.dir]) {
            // Cannot be refused but for the cgroup being gone.
            let _ = control_file::write_value(&dir.join(STATE), "THAWED");
        }
    }
}

fn read_pids(dir: &Path, into: &mut BTreeSet<i32>) -> Result<(), Error> {
    let path = dir.join("cgroup.procs");
    let bytes = match control_file::read_bytes(&path) {
        Ok(bytes) => bytes,
        Err(error) if control_file::is_gone(&error) || error.raw_os_error() == Some(EOPNOTSUPP) => {
            return Ok(());
        }
        Err(source) => return Err(Error::Read { path, source }),
    };
    into.extend(parse_pids(&bytes));
    Ok(())
}

/// One pid a line. A process of a pid namespace that the reader cannot see is 0, which must never
/// reach kill(2).
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
