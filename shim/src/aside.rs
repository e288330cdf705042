//! Runs work that may block forever in a child process, which is then left behind.
//!
//! A container can keep the directories of its cgroup locked: anyone else who looks up a name in
//! one then waits and cannot be killed.

use std::os::fd::AsFd;
use std::time::Duration;

use berth_sys::poll::{Interest, Poll};
use berth_sys::process::{self, Cloned, CloseRange};

/// How long to wait for the child. It is reaped whenever it ends.
const PATIENCE: Duration = Duration::from_millis(500);

/// Runs `work`, which may fail, in a child that keeps nothing open that is open here.
pub(crate) fn aside(work: impl FnOnce()) {
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
                poll.wait(Some(PATIENCE))
            });
            if ended.is_ok_and(|ended| !ended.is_empty()) {
                // Otherwise it is reaped with the other children.
                let _ = process::reap_or_running(pid);
            }
        }
        // Like the work itself, this may fail: the daemon tries again.
        Err(_) => {}
    }
}
