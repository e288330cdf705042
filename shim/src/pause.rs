//! Process 1 of a pod whose containers share a pid namespace (`NamespaceMode.POD`): it reaps
//! orphans and does nothing else.
//!
//! `berth-shim pause` creates it and ends. It is a child in a new pid and mount namespace whose
//! root is an empty read-only tmpfs, in the pod's other namespaces, without capabilities or
//! descriptors, under a filter that allows only what it does, and it lives until it is killed. The
//! daemon sends `launch::Pause` as one frame and is answered with `Failed`, or with `Created` and
//! two descriptors: the pid namespace, and a procfs of it as a detached mount, created while the
//! process is alone in there ([`crate::procfs`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use berth_shim_proto::control::{Created, Failed, Reply, reply::Answer};
use berth_shim_proto::frame;
use berth_shim_proto::launch::Pause;
use berth_sys::mount::{FsContext, attr};
use berth_sys::poll::{ChildSignals, Interest, Poll};
use berth_sys::process::SIGKILL;
use berth_sys::process::{self, Cloned, CloseRange, namespace};
use berth_sys::{credentials, ns, socket};

use crate::apparmor::{Profile, Way};
use crate::failure::{Step, from_io, refused};

/// Creates the process and reports it to the daemon.
///
/// # Errors
/// When the report cannot be sent; earlier failures are in the report.
pub(crate) fn run(connection: OwnedFd) -> io::Result<()> {
    let (answer, descriptors) = match read_request(&connection).and_then(|request| make(&request)) {
        Ok((created, descriptors)) => (Answer::Created(created), Vec::from(descriptors)),
        Err(failed) => (Answer::Failed(failed), Vec::new()),
    };
    let bytes = frame::encode(&Reply { id: 0, answer: Some(answer) }).map_err(io::Error::other)?;
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    socket::send(connection.as_fd(), &bytes, &descriptors).map(drop)
}

fn read_request(connection: &OwnedFd) -> Result<Pause, Failed> {
    const STEP: &str = "read the request";
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(request) = frame::take(&mut received).map_err(|error| refused(STEP, error))? {
            return Ok(request);
        }
        match socket::receive(connection.as_fd(), &mut buffer).step(STEP, "")? {
            (0, _) => return Err(refused(STEP, "it is truncated")),
            (length, _) => received.extend_from_slice(buffer.get(..length).unwrap_or_default()),
        }
    }
}

/// The longest text of a failure.
const MAX_TEXT: usize = 16 * 1024;

/// The process, its pid namespace, and a procfs of that.
fn make(request: &Pause) -> Result<(Created, [OwnedFd; 2]), Failed> {
    const STEP: &str = "create the pod's first process";
    let unified = crate::launch::open_unified(&request.cgroup)?;
    let (own, other) = socket::packet_pair().step("create a socket", "")?;
    match process::clone_process(namespace::PID | namespace::MOUNT, unified.as_ref().map(AsFd::as_fd))
        .step("create a process", "")?
    {
        Cloned::Child => {
            drop(own);
            let made = begin(request).and_then(|(procfs, profile)| {
                // Confined first, since the parent relies on the report.
                confine(profile, &request.seccomp_filter)?;
                socket::send(other.as_fd(), b"p", &[procfs.as_fd()]).step("hand over the procfs", "")
            });
            if let Err(failed) = made {
                let text = failed.to_string();
                let _ = socket::send(
                    other.as_fd(),
                    text.as_bytes().get(..MAX_TEXT).unwrap_or(text.as_bytes()),
                    &[],
                );
                process::exit_now(1);
            }
            // Everything except for the signal descriptor of the loop, which is created later.
            let _ = process::close_from(0, CloseRange::Now);
            reap_for_ever()
        }
        Cloned::Parent { pid, .. } => {
            drop(other);
            let mut buffer = vec![0; MAX_TEXT];
            let heard = socket::receive(own.as_fd(), &mut buffer).step("get an answer from the process", "");
            let made = heard.and_then(|(length, descriptors)| {
                let Some(procfs) = descriptors.into_iter().next() else {
                    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
                    return Err(refused(STEP, if text.is_empty() { "it was killed".into() } else { text }));
                };
                // This process's own child, which has not been reaped: the pid is valid.
                let path = format!("/proc/{pid}/ns/{}", ns::Kind::Pid.file_name());
                let pid_namespace = ns::open(Path::new(&path)).step("open the pid namespace", &path)?;
                let start_time =
                    process::start_time(pid).map_err(|error| from_io(&error, "find the process", pid))?;
                Ok((Created { pid, start_time, ..Created::default() }, [pid_namespace, procfs]))
            });
            if made.is_err() {
                // It may have ended already; it is reaped all the same.
                let _ = process::signal_child(pid, SIGKILL);
                let _ = process::wait_for(pid);
            }
            made
        }
    }
}

/// The first steps of the process; returns the procfs of its pid namespace, in which it is the only
/// process, and the file through which it enters its profile.
fn begin(request: &Pause) -> Result<(OwnedFd, Option<Way>), Failed> {
    crate::init::begin(&request.cgroup)?;
    crate::init::enter(&request.namespaces)?;
    let profile = Profile::find(&request.apparmor_profile)?.map(Profile::open_current).transpose()?;
    let procfs = FsContext::open(c"proc")
        .and_then(|procfs| procfs.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC))
        .step("create the pod's procfs", "")?;
    Ok((procfs, profile))
}

/// Drops everything that another process in the pod could gain from this one.
fn confine(profile: Option<Way>, filter: &[u8]) -> Result<(), Failed> {
    process::new_session().step("create a session", "")?;
    process::set_name(c"berth-pause").step("set the name of the process", "")?;
    crate::rootfs::enter_empty_root()?;
    // Mounting is done, and the credentials have not changed yet.
    profile.map_or(Ok(()), Way::enter)?;
    credentials::limit_bounding_set(0).step("drop the capabilities", "")?;
    credentials::clear_ambient_set().step("drop the capabilities", "")?;
    process::set_no_new_privileges().step("set no_new_privs", "")?;
    credentials::set_capabilities(0, 0, 0).step("drop the capabilities", "")?;
    process::install_seccomp(filter, 0).step("install the seccomp filter", "")
}

fn reap_for_ever() -> ! {
    // Process 1 ignores signals without a handler from inside its namespace, pid_namespaces(7);
    // from outside SIGKILL ends it.
    loop {
        if let (Ok(poll), Ok(children)) = (Poll::new(), ChildSignals::new())
            && poll.watch(children.as_fd(), 0, Interest::Input).is_ok()
        {
            loop {
                children.clear();
                while let Ok(Some(_)) = process::reap_any() {}
                if poll.wait(None).is_err() {
                    break;
                }
            }
        }
        // Temporarily out of memory: zombies can wait, but process 1 must not end.
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}
