//! The containers that are being created in a sandbox, so that its stop finds every container that
//! will ever be in it, and waits for none without a limit.
//!
//! A creation registers here, and becomes a container in one step under the lock that a stop takes
//! to forbid it: it is either among the containers that the stop ends, or it is cancelled and
//! cleans up what it created.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::lock;

#[derive(Debug, Clone, Copy, Default)]
struct Standing {
    /// No creation may begin, and only those that a stop still waits for may finish.
    closed: bool,
    /// Those in progress are cancelled.
    given_up: bool,
    under_way: usize,
}

/// The creations in one sandbox.
#[derive(Debug, Clone)]
pub(super) struct Creations(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Held while a creation finishes, so that none is between "may still finish" and "is visible".
    finishing: Mutex<()>,
    standing: watch::Sender<Standing>,
}

impl Default for Creations {
    fn default() -> Self {
        Self(Arc::new(Inner { finishing: Mutex::new(()), standing: watch::Sender::default() }))
    }
}

/// A creation in progress. Over when dropped.
#[derive(Debug)]
pub(crate) struct Creation(Arc<Inner>);

impl Creations {
    /// Begins one; `None` after [`Creations::close`].
    pub(super) fn begin(&self) -> Option<Creation> {
        let begun = self.0.standing.send_if_modified(|standing| {
            standing.under_way += usize::from(!standing.closed);
            !standing.closed
        });
        begun.then(|| Creation(self.0.clone()))
    }

    /// Forbids further ones, and waits for those in progress, at most for `limit`; then cancels
    /// them. On return every container that will ever exist is visible. `true` if one was cancelled
    /// and has not cleaned up yet.
    pub(super) async fn close(&self, limit: Duration) -> bool {
        self.0.standing.send_modify(|standing| standing.closed = true);
        let mut standing = self.0.standing.subscribe();
        // The sender is in `self`, so it cannot have gone.
        let over = standing.wait_for(|standing| standing.under_way == 0);
        if tokio::time::timeout(limit, over).await.is_ok() {
            return false;
        }
        let _alone = lock(&self.0.finishing);
        self.0.standing.send_modify(|standing| standing.given_up = true);
        self.0.standing.borrow().under_way > 0
    }
}

impl Creation {
    /// Whether it is cancelled: the sandbox was stopped and waits no longer.
    pub(crate) fn is_given_up(&self) -> bool {
        self.0.standing.borrow().given_up
    }

    /// Resolves when it is cancelled.
    pub(crate) async fn given_up(&self) {
        let mut standing = self.0.standing.subscribe();
        let _ = standing.wait_for(|standing| standing.given_up).await;
    }

    /// Makes the container visible by `show`, or returns `false` if it is too late for that.
    pub(crate) fn finish(&self, show: impl FnOnce()) -> bool {
        let _alone = lock(&self.0.finishing);
        if self.is_given_up() {
            return false;
        }
        show();
        true
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        self.0.standing.send_modify(|standing| standing.under_way -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_stop_waits_for_what_is_being_made_and_sees_it() {
        let creations = Creations::default();
        let creation = creations.begin().unwrap();
        let closing = tokio::spawn({
            let creations = creations.clone();
            async move { creations.close(LONG).await }
        });
        while creations.begin().is_some() {
            tokio::task::yield_now().await;
        }
        let mut seen = false;
        assert!(creation.finish(|| seen = true) && seen);
        drop(creation);
        assert!(!closing.await.unwrap());
        assert!(creations.begin().is_none());
        assert!(!creations.close(SHORT).await, "twice is fine");
    }

    #[tokio::test]
    async fn a_creation_that_hangs_is_given_up_and_can_never_be_finished() {
        let creations = Creations::default();
        let creation = creations.begin().unwrap();
        assert!(!creation.is_given_up());
        assert!(creations.close(SHORT).await);
        creation.given_up().await;
        assert!(!creation.finish(|| unreachable!("it must not be seen")));
        assert!(creations.close(SHORT).await, "it has not taken back what it made");
        drop(creation);
        assert!(!creations.close(SHORT).await);
    }
}
