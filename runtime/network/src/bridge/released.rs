//! Pods that have been released, whose interfaces may exist still.
//!
//! The kernel removes a pod's interface with its network namespace, for nothing and many at a time,
//! once nobody uses that any more. Nobody can say when: a socket of the namespace may have been
//! passed to another pod. As long as the interface is a port of the bridge, its addresses belong to
//! no other pod, and an interface that outlives its pod is deleted.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::{Bridge, Error, lock};

/// How long the kernel is given.
const BY_ITSELF: Duration = Duration::from_secs(1);

/// A released pod.
#[derive(Debug)]
pub(super) struct Released {
    since: Instant,
    /// Whether it is out of the firewall, and its host ports lead nowhere.
    pub(super) is_withdrawn: bool,
}

impl Default for Released {
    fn default() -> Self {
        Self { since: Instant::now(), is_withdrawn: false }
    }
}

impl Bridge {
    /// Frees the addresses of released pods whose interfaces have gone, and deletes those that do
    /// not go by themselves. Returns whether some are left. Blocking: deleting an interface takes
    /// some 40 ms.
    ///
    /// # Errors
    /// The first failure, after everything was tried; those that it is about are left.
    pub fn clear_released(&self) -> Result<bool, Error> {
        self.clear(BY_ITSELF)
    }

    pub(super) fn clear(&self, patience: Duration) -> Result<bool, Error> {
        let released: Vec<(String, Instant)> =
            lock(&self.released).iter().map(|(id, released)| (id.clone(), released.since)).collect();
        if released.is_empty() {
            return Ok(false);
        }
        let links = self.pod_links(&mut lock(&self.node))?;
        let present: HashSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
        let mut failure = None;
        for (sandbox_id, since) in released {
            let cleared = self.host_interface(&sandbox_id).and_then(|interface| {
                match present.contains(interface.as_str()) {
                    true if since.elapsed() < patience => Ok(()),
                    true => self.detach(&sandbox_id),
                    false => self.free(&sandbox_id),
                }
            });
            failure = failure.or(cleared.err());
        }
        let are_left = !lock(&self.released).is_empty();
        failure.map_or(Ok(are_left), Err)
    }
}
