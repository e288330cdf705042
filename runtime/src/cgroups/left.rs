//! Cgroups of removed objects in which a process could not be killed: removed as soon as it has
//! ended.
//!
//! A process in an uninterruptible wait (a network file system whose server is away) dies when that
//! ends, which may take hours. Until then its cgroup is remembered here, and retried. If the daemon
//! ends first, the next start finds it by its mark.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_cgroup::Cgroup;

use crate::lock;

/// The first and the longest pause between attempts.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long one attempt may take for each cgroup, which was killed long ago.
const ATTEMPT: Duration = Duration::from_millis(50);

/// The cgroups that remain. There are as many as the kernel has with such a process.
#[derive(Debug, Default, Clone)]
pub(crate) struct LeftCgroups(Arc<Mutex<Vec<Cgroup>>>);

impl LeftCgroups {
    /// Retries, in the background, to kill what is in `cgroup` and to remove it, until that is
    /// done.
    pub(crate) fn keep(&self, cgroup: &Cgroup) {
        let mut left = lock(&self.0);
        if left.iter().any(|other| other.path() == cgroup.path()) {
            return;
        }
        left.push(cgroup.clone());
        // With others, a task is at work already. Without a runtime the daemon is stopping.
        if left.len() == 1
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(try_again(self.0.clone(), end));
        }
    }
}

/// Runs until none is left. `end` returns whether a cgroup is gone; blocking.
async fn try_again(left: Arc<Mutex<Vec<Cgroup>>>, end: fn(&Cgroup) -> bool) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        let trying = lock(&left).clone();
        for cgroup in trying {
            let path = cgroup.path().to_owned();
            match tokio::task::spawn_blocking(move || end(&cgroup)).await {
                Ok(true) => {
                    tracing::info!(cgroup = path, "removed an orphaned cgroup");
                    lock(&left).retain(|cgroup| cgroup.path() != path);
                }
                Ok(false) => {}
                // A bug, which is logged. The others are tried nevertheless, and this one again.
                Err(error) if error.is_panic() => {}
                // The daemon is stopping.
                Err(_) => return,
            }
        }
        if lock(&left).is_empty() {
            return;
        }
    }
}

fn end(cgroup: &Cgroup) -> bool {
    cgroup.end(ATTEMPT).is_ok()
}

#[cfg(test)]
mod tests {
    use berth_cgroup::{Driver, Hierarchy, Parent};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_panics_stops_no_others() {
        let hierarchy = Hierarchy::Legacy { mounts: Vec::new() };
        let parent = Parent::named(Driver::Cgroupfs, "/pod").unwrap();
        let cgroup = |id| Cgroup::open(&hierarchy, &parent, id).unwrap();
        let left = Arc::new(Mutex::new(vec![cgroup("bad"), cgroup("good")]));
        let trying = tokio::spawn(try_again(left.clone(), |cgroup| {
            assert!(!cgroup.path().ends_with("bad"), "a bug");
            true
        }));
        while lock(&left).len() > 1 {
            tokio::time::sleep(FIRST_PAUSE).await;
        }
        lock(&left).push(cgroup("another"));
        while lock(&left).len() > 1 {
            tokio::time::sleep(FIRST_PAUSE).await;
        }
        assert_eq!(lock(&left)[0].path(), "/pod/bad");
        assert!(!trying.is_finished());
    }
}
