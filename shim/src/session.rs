//! A program of exec and everything in its session: setsid(2).
//!
//! The kernel signals a process or a group. A shell that runs jobs gives each its own group, so
//! this searches the processes of the container for the session. A process that has left it for its
//! own session stays: as with other runtimes, it is then independent and ends with the container.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use berth_shim_proto::launch::Cgroup;
use berth_sys::process;

use crate::aside::aside;
use crate::host_path::host_path;

/// How often the processes are searched: one that is born meanwhile is found the next time.
const ROUNDS: usize = 8;

/// How many cgroups below the container's own are searched; it can create any number.
const MOST_CGROUPS: usize = 256;

/// Signals the session of `leader`, a child that was not reaped; or `leader` alone, while it is not
/// in its own session.
pub(crate) fn end(leader: i32, signal: i32, cgroup: Option<&Cgroup>) -> io::Result<()> {
    let told = process::signal_group(leader, signal).or_else(|_| process::signal_child(leader, signal));
    if signal == process::SIGKILL
        && let Some(directory) = cgroup.and_then(directory)
    {
        aside(|| {
            for _ in 0..ROUNDS {
                if !kill_members(leader, &directory) {
                    break;
                }
            }
        });
    }
    told
}

/// The directory that lists the processes of the container.
fn directory(cgroup: &Cgroup) -> Option<PathBuf> {
    if !cgroup.unified_dir.is_empty() {
        return Some(host_path(&cgroup.unified_dir).to_owned());
    }
    Some(host_path(cgroup.tasks_files.first()?).parent()?.to_owned())
}

/// Kills the members of a session that are neither its leader nor ended; returns whether there was
/// one.
fn kill_members(leader: i32, directory: &Path) -> bool {
    let mut directories = vec![directory.to_owned()];
    let (mut seen, mut found) = (0, false);
    while let Some(directory) = directories.pop() {
        let listed = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        for pid in listed.lines().filter_map(|line| line.parse().ok()) {
            if pid == leader || !matches!(process::session(pid), Ok(session) if session == leader) {
                continue;
            }
            // By descriptor, and checked again: the number may belong to another process by now,
            // but then it is in another session.
            if let Ok(pidfd) = process::open_pidfd(pid)
                && matches!(process::session(pid), Ok(session) if session == leader)
            {
                found |= process::signal_pidfd(pidfd.as_fd(), process::SIGKILL).is_ok();
            }
        }
        let below = std::fs::read_dir(&directory).into_iter().flatten().flatten();
        let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let room = MOST_CGROUPS.saturating_sub(seen);
        directories.extend(below.take(room).map(|entry| entry.path()));
        seen += 1;
        if seen > MOST_CGROUPS {
            break;
        }
    }
    found
}
