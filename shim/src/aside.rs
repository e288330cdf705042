//! Runs work that may block forever in a child process, which is then left behind.
//!
//! A container can keep the directories of its cgroup locked: anyone else who looks up a name in
//! one then waits and cannot be killed.

use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use berth_sys::poll::{Interest, Poll};
use berth_sys::process::{self, Cloned, CloseRange};

/// How long to wait for the child, if no other one waits. It is reaped whenever it ends.
const PATIENCE: Duration = Duration::from_millis(500);

/// How many children may be left behind at a time. Each waits for the container.
const MOST_LEFT: usize = 8;

/// Children that were left behind and not reaped.
static LEFT: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Runs `work`, which may fail, in a child that keeps nothing open that is open here; not if too
/// many of them wait already.
pub(crate) fn aside(work: impl FnOnce()) {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    if left.len() >= MOST_LEFT {
        return;
    }
    // If another one waits, this one may, too.
    let patience = if left.is_empty() { PATIENCE } else { Duration::ZERO };
    match process::clone_process(0, None) {
        Ok(Cloned::Child) => {
            // It must not keep a stream or connection open that ends here.
            if process::close_from(0, CloseRange::Now).is_ok() {
                work();
            }
            process::exit_now(0)
        }
        Ok(Cloned::Parent { pid, pidfd }) => {
            let ended = Poll::new().and_then(|poll| {
                poll.watch(pidfd.as_fd(), 0, Interest::Input)?;
                poll.wait(Some(patience))
            });
            if ended.is_ok_and(|ended| !ended.is_empty()) {
                // Otherwise it is reaped with the other children.
                let _ = process::reap_or_running(pid);
            } else {
                left.push(pid);
            }
        }
        // Like the work itself, this may fail: the daemon tries again.
        Err(_) => {}
    }
}

/// To be called for each child that is reaped elsewhere: it may be one that was left behind.
pub(crate) fn reaped(pid: i32) {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner).retain(|left| *left != pid);
}
