//! What may have to wait for ever: done by a child that is left behind then.
//!
//! A container can keep the directories of its cgroup locked, and whoever looks for a name in one
//! waits and cannot be killed.

use std::os::fd::AsFd;
use std::time::Duration;

use berth_sys::poll::{Interest, Poll};
use berth_sys::process::{self, Cloned, CloseRange};

/// How long the child is waited for. It is reaped whenever it ends.
const PATIENCE: Duration = Duration::from_millis(500);

/// Has a child do `work`, which may fail: with nothing that is open here.
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
                // Else it is reaped with the other children.
                let _ = process::reap_or_running(pid);
            }
        }
        // Like the work itself, this may fail: the daemon looks again.
        Err(_) => {}
    }
}
