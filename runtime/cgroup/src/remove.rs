//! Removing a cgroup with everything below it.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Cgroup, Error};

/// A killed process leaves its cgroup a moment before it can be waited for, but css references can
/// keep it busy for a moment longer.
/// keep it busy a moment after.
const FIRST_WAIT: Duration = Duration::from_micros(200);
const LONGEST_WAIT: Duration = Duration::from_millis(10);

/// How long systemd may take to notice that a scope is empty, which takes it milliseconds, before
/// it is asked to stop the scope.
const UNIT_NOTICED: Duration = Duration::from_secs(1);

impl Cgroup {
    /// Removes the cgroup and those that the container created below it. An absent one counts as
    /// removed. Blocks for up to `within` while the kernel reports it as busy; processes in it are
    /// not killed, [`Cgroup::kill`] does that.
    ///
    /// systemd removes a scope when its last process has ended. One that still exists after a
    /// second is stopped, and, if systemd does not answer in the time that is left, removed like
    /// any other.
    ///
    /// # Errors
    /// [`Error::Remove`] for the first directory that stayed, after all have been tried.
    pub fn remove(&self, within: Duration) -> Result<(), Error> {
        let until = Instant::now() + within;
        if let Some(unit) = &self.unit
            && !self.is_gone(UNIT_NOTICED.min(within))
        {
            // The directory shows below whether that worked.
            let _ = unit.systemd.stop(&unit.name, until.saturating_duration_since(Instant::now()));
        }
        let failed = self.remove_directories(until);
        let more = failed.len().saturating_sub(1);
        match failed.into_iter().next() {
            None => Ok(()),
            Some((path, source)) => Err(Error::Remove { path, more, source }),
        }
    }

    /// Kills everything in it and removes it. Blocks for up to twice `within`.
    ///
    /// # Errors
    /// As [`Cgroup::kill`] and [`Cgroup::remove`].
    pub fn end(&self, within: Duration) -> Result<(), Error> {
        // Nobody is left in most that are to go, which the kernel says as well. A scope is removed
        // by systemd.
        if self.unit.is_none() && self.remove_directories(Instant::now()).is_empty() {
            return Ok(());
        }
        self.kill(within)?;
        self.remove(within)
    }

    /// What could not be removed so far.
    fn remove_directories(&self, until: Instant) -> Vec<(PathBuf, io::Error)> {
        let mut left: Vec<PathBuf> = self.directories().map(Path::to_path_buf).collect();
        let mut wait = FIRST_WAIT;
        while !left.is_empty() {
            let removed = self.files.remove(&left);
            let failed: Vec<(PathBuf, io::Error)> = left
                .into_iter()
                .zip(removed)
                .filter_map(|(dir, removed)| Some((dir, removed.err()?)))
                .collect();
            let is_busy = failed.iter().any(|(_, error)| error.kind() == io::ErrorKind::ResourceBusy);
            if !is_busy || Instant::now() >= until {
                return failed;
            }
            left = failed.into_iter().map(|(dir, _)| dir).collect();
            thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        }
        Vec::new()
    }

    /// Whether all its directories disappear on their own within this time.
    fn is_gone(&self, within: Duration) -> bool {
        let until = Instant::now() + within;
        let mut wait = FIRST_WAIT;
        loop {
            if !self.directories().any(Path::exists) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Driver, Hierarchy, Parent, Systemd, systemd};

    #[test]
    fn a_systemd_that_does_not_answer_is_not_waited_for_longer_than_was_asked() {
        let root = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::Unified { mount: root.path().to_path_buf() };
        let parent = Parent::named(Driver::Systemd, "a.slice").unwrap();
        let (silent, asked) = Systemd::silent();
        let cgroup = Cgroup::open(&hierarchy, &parent, "0a").unwrap().with_systemd(Some(&silent));
        let directory = root.path().join("a.slice/berth-0a.scope");
        std::fs::create_dir_all(&directory).unwrap();
        let begun = Instant::now();
        cgroup.remove(Duration::from_millis(100)).unwrap();
        assert!(begun.elapsed() < systemd::LIMIT, "{:?}", begun.elapsed());
        assert!(!directory.exists());
        assert_eq!(asked.len(), 1, "it was asked to stop the scope");
    }
}
