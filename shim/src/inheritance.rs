//! Resets what a process inherits from its parent: nothing comes from the daemon, its unit or the
//! shell that started it.
//!
//! Limits, umask, signals, environment, descriptors, credentials and the oom score are set
//! elsewhere, as the plan says. This is the same for every process of every container, and for
//! process 1 of a pod. What cannot be undone stays: a seccomp filter, `no_new_privs`, Landlock
//! rules, locked secure bits, `PR_SET_MDWE` and speculation controls of the daemon's unit only take
//! privileges away; a core scheduling cookie and an audit login id (`/proc/self/loginuid`) are up
//! to the unit.

use std::io;

use berth_shim_proto::control::Failed;
use berth_sys::errno::EINVAL;
use berth_sys::{process, scheduling};

use crate::failure::Step;

/// The kernel's default: PR_SET_TIMERSLACK(2const).
const TIMER_SLACK_NS: u32 = 50_000;

/// The kernel's default: core(5), `/proc/pid/coredump_filter`.
const COREDUMP_FILTER: &str = "0x33";

/// Resets what the children of a shim can only inherit: the default timer slack of a process is its
/// parent's, and the core dump filter is a file, which would cost each child three calls. For a
/// shim at its start.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn reset_for_children() -> io::Result<()> {
    scheduling::set_timer_slack(TIMER_SLACK_NS)?;
    match std::fs::write("/proc/self/coredump_filter", COREDUMP_FILTER) {
        // A kernel without core dumps.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Resets everything else. For a child, before it joins its cgroup: a real-time policy could be
/// refused there.
///
/// # Errors
/// When the kernel refuses, except for features that it lacks, and for priorities of processor,
/// disk and memory that a daemon without `CAP_SYS_NICE` may not set: that weakens no isolation.
pub(crate) fn reset() -> Result<(), Failed> {
    const STEP: &str = "reset what is inherited";
    where_allowed(scheduling::use_default_policy()).step(STEP, "scheduling policy and nice value")?;
    // The cpuset that is joined next restricts it.
    scheduling::use_all_processors().step(STEP, "processors")?;
    where_allowed(scheduling::use_default_io_priority()).step(STEP, "I/O priority")?;
    where_allowed(scheduling::use_default_memory_policy()).step(STEP, "memory policy")?;
    where_known(scheduling::allow_huge_pages()).step(STEP, "huge pages")?;
    where_known(scheduling::merge_no_memory()).step(STEP, "memory merging")?;
    where_known(scheduling::use_default_memory_failure_policy()).step(STEP, "memory failure policy")?;
    where_allowed(scheduling::flush_no_io()).step(STEP, "I/O flusher")?;
    scheduling::use_default_personality().step(STEP, "personality")?;
    // A new empty keyring for each process that the shim starts, exec too: keys that one of them
    // adds are not visible to the others.
    where_known(process::join_new_session_keyring()).step(STEP, "session keyring")
}

fn where_allowed(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => where_known(other),
    }
}

/// A kernel that lacks a feature has nothing of it to inherit.
fn where_known(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(EINVAL) => {
            Ok(())
        }
        other => other,
    }
}
