//! Process 1 of a pod whose containers share a pid namespace (`NamespaceMode.POD`): it reaps orphans and does nothing else.
//!
//! `berth-shim pause` makes it and ends: a child in a new pid and mount namespace whose root is an empty read-only tmpfs, without
//! capabilities, without descriptors. The daemon sends its cgroup as one frame; it answers on its connection with `Created` (or `Failed`) and lives until it is killed.

use crate::failure::{Step, from_io, refused};
use berth_shim_proto::control::{Created, Failed, Reply, reply::Answer};
use berth_shim_proto::frame;
use berth_shim_proto::launch::Cgroup;
use berth_sys::poll::{ChildSignals, Poll};
use berth_sys::process::{self, Cloned, CloseRange, namespace};
use berth_sys::{credentials, socket};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Makes the process and reports it to the daemon.
///
/// # Errors
/// When the report cannot be sent; what failed before that is in the report.
pub(crate) fn run(connection: OwnedFd) -> io::Result<()> {
    let answer = match read_cgroup(&connection).and_then(|cgroup| make(&cgroup)) {
        Ok(created) => Answer::Created(created),
        Err(failed) => Answer::Failed(failed),
    };
    let bytes = frame::encode(&Reply { id: 0, answer: Some(answer) }).map_err(io::Error::other)?;
    socket::send(connection.as_fd(), &bytes, &[]).map(drop)
}

fn read_cgroup(connection: &OwnedFd) -> Result<Cgroup, Failed> {
    const STEP: &str = "read the request";
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(cgroup) = frame::take(&mut received).map_err(|error| refused(STEP, error))? {
            return Ok(cgroup);
        }
        match socket::receive(connection.as_fd(), &mut buffer).step(STEP, "")? {
            (0, _) => return Err(refused(STEP, "it is cut short")),
            (length, _) => received.extend_from_slice(buffer.get(..length).unwrap_or_default()),
        }
    }
}

fn make(cgroup: &Cgroup) -> Result<Created, Failed> {
    let unified = crate::launch::open_unified(cgroup)?;
    let (read, write) = berth_sys::file::pipe().step("make a pipe", "")?;
    match process::clone_process(namespace::PID | namespace::MOUNT, unified.as_ref().map(AsFd::as_fd))
        .step("make a process", "")?
    {
        Cloned::Child => {
            drop(read);
            if let Err(failed) = crate::init::begin(cgroup).and_then(|()| confine()) {
                let text = failed.to_string();
                // The reader is the parent, which reads to the end; a message is shorter than a pipe.
                let _ = io::Write::write_all(&mut std::fs::File::from(write), text.as_bytes());
                process::exit_now(1);
            }
            drop(write);
            // Everything, the signal descriptor of the loop excepted, which is made after this.
            let _ = process::close_from(0, CloseRange::Now);
            reap_for_ever()
        }
        Cloned::Parent { pid, pidfd } => {
            drop(write);
            let mut failure = String::new();
            io::Read::read_to_string(&mut std::fs::File::from(read), &mut failure)
                .step("hear from the process", "")?;
            if !failure.is_empty() {
                crate::launch::end_child(pid, &pidfd);
                return Err(Failed {
                    step: "make the pod's first process".to_owned(),
                    errno: 0,
                    detail: failure,
                });
            }
            let start_time =
                process::start_time(pid).map_err(|error| from_io(&error, "find the process", pid))?;
            Ok(Created { pid, start_time, ..Created::default() })
        }
    }
}

/// Takes everything away that somebody in the pod could gain by getting at this process.
fn confine() -> Result<(), Failed> {
    process::new_session().step("make a session", "")?;
    process::set_name(c"berth-pause").step("name the process", "")?;
    crate::rootfs::enter_empty_root()?;
    credentials::limit_bounding_set(0).step("drop the capabilities", "")?;
    credentials::clear_ambient_set().step("drop the capabilities", "")?;
    process::set_no_new_privileges().step("set no_new_privs", "")?;
    credentials::set_capabilities(0, 0, 0).step("drop the capabilities", "")
}

fn reap_for_ever() -> ! {
    // Process 1 ignores signals without a handler from inside its namespace, pid_namespaces(7); from outside SIGKILL ends it.
    loop {
        if let (Ok(poll), Ok(children)) = (Poll::new(), ChildSignals::new())
            && poll.watch(children.as_fd(), 0, false).is_ok()
        {
            loop {
                children.clear();
                while let Ok(Some(_)) = process::reap_any() {}
                if poll.wait(None).is_err() {
                    break;
                }
            }
        }
        // No memory for a moment: zombies can wait, but process 1 must not end.
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}
