//! Cgroups of what is gone, in which a process could not be killed: removed as soon as that has ended.
//!
//! A process in an uninterruptible wait (a network file system whose server is away) dies when that ends,
//! which may take hours. Until then its cgroup is kept in mind here, and tried again. When the daemon ends
//! first, the next start finds those below the daemon's own cgroup parent; those below a pod's are left to
//! whoever made the pod's, as a kubelet does.

use crate::lock;
use berth_cgroup::Cgroup;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How soon the cgroups are tried again, and how rarely in the end.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long one attempt may take for each cgroup: it was killed long ago.
const ATTEMPT: Duration = Duration::from_millis(50);

/// The cgroups that are there still. There are as many as the kernel has with such a process.
#[derive(Debug, Default)]
pub(crate) struct LeftCgroups(Arc<Mutex<Vec<Cgroup>>>);

impl LeftCgroups {
    /// Tries again, in the background, to end what is in `cgroup` and to remove it, until that is done.
    pub(crate) fn keep(&self, cgroup: &Cgroup) {
        let mut left = lock(&self.0);
        if left.iter().any(|other| other.path() == cgroup.path()) {
            return;
        }
        left.push(cgroup.clone());
        // With others, they are being tried already. Without a runtime the daemon is at its end.
        if left.len() == 1
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(try_again(self.0.clone()));
        }
    }
}

/// Until nothing is left.
async fn try_again(left: Arc<Mutex<Vec<Cgroup>>>) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        let trying = left.clone();
        // The task fails only when the daemon stops.
        if tokio::task::spawn_blocking(move || try_all(&trying)).await.unwrap_or(true) {
            return;
        }
    }
}

/// Whether all are gone. Blocking.
fn try_all(left: &Mutex<Vec<Cgroup>>) -> bool {
    let trying = lock(left).clone();
    let gone: Vec<&Cgroup> = trying
        .iter()
        .filter(|cgroup| cgroup.kill(ATTEMPT).and_then(|()| cgroup.remove(ATTEMPT)).is_ok())
        .collect();
    for cgroup in &gone {
        tracing::info!(cgroup = cgroup.path(), "removed an orphaned cgroup");
    }
    let mut left = lock(left);
    left.retain(|cgroup| !gone.iter().any(|gone| gone.path() == cgroup.path()));
    left.is_empty()
}
