//! The parent half of starting processes: what the shim prepares, clones and keeps.

use crate::cri_log::LogFile;
use crate::exit::{self, OomCounter};
use crate::failure::{Step, refused};
use crate::handshake::{self, ShimEnd};
use crate::init::{self, Stdio, host_path};
use crate::stdio::{Output, ShimStreams};
use crate::user::Resolved;
use berth_shim_proto::control::{Created, ExecRequest, Failed, exec_process};
use berth_shim_proto::launch::{Cgroup, Launch, PidNamespace};
use berth_sys::file;
use berth_sys::process::{self, Cloned, namespace};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

/// A container whose main process waits or runs.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) launch: Launch,
    pub(crate) created: Created,
    pub(crate) pidfd: OwnedFd,
    pub(crate) oom: Option<OomCounter>,
    /// Until the start.
    pub(crate) handshake: Option<ShimEnd>,
}

/// What is said of a container that the kernel killed before it was ready. Preparing takes some hundred KiB.
const TOO_LITTLE_MEMORY: &str = "out of memory: its memory limit is too low to start anything";

/// What [`create`] made.
pub(crate) struct NewContainer {
    pub(crate) container: Container,
    pub(crate) streams: ShimStreams,
    pub(crate) log: Option<LogFile>,
}

/// Clones the main process, which does everything up to its exec. On an error nothing of it is left.
pub(crate) fn create(launch: Launch) -> Result<NewContainer, Failed> {
    let pid_flags = match &launch.namespaces.pid {
        Some(PidNamespace::Own(())) => namespace::PID,
        Some(PidNamespace::Host(()) | PidNamespace::Join(_)) => 0,
        None => return Err(refused("prepare the container", "no pid namespace in the plan")),
    };
    let log = Output::open_log(&launch)?;
    let oom = OomCounter::open(&launch.cgroup).step("open", host_path(&launch.cgroup.oom_file).display())?;
    let (child_streams, shim_streams) = if launch.process.terminal {
        (None, None)
    } else {
        let (child, shim) = pipes(launch.stdin)?;
        (Some(child), Some(shim))
    };
    let (end, child_end) = handshake::pair().step("make a socket", "")?;
    let unified = open_unified(&launch.cgroup)?;
    let (mut pid, mut pidfd) =
        match process::clone_process(pid_flags | namespace::MOUNT, unified.as_ref().map(AsFd::as_fd))
            .step("make a process", "")?
        {
            Cloned::Child => {
                // The shim's ends must not live on in the child: an end of a stream would never come.
                drop((end, shim_streams));
                init::run_main(&launch, child_streams, &child_end)
            }
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
    drop((child_end, child_streams));
    if matches!(launch.namespaces.pid, Some(PidNamespace::Join(_))) {
        (pid, pidfd) = successor(pid, &end)?;
    }
    let (mut created, terminal) = match end.wait_for_ready() {
        Ok(ready) => ready,
        Err(failed) => {
            end_child(pid, &pidfd);
            let out_of_memory =
                failed.detail == handshake::KILLED && oom.as_ref().is_some_and(|oom| oom.has_risen(true));
            return Err(if out_of_memory { refused(&failed.step, TOO_LITTLE_MEMORY) } else { failed });
        }
    };
    created.pid = pid;
    created.start_time = exit::start_time(pid);
    let streams = match (shim_streams, terminal) {
        (Some(streams), _) => streams,
        (None, Some(terminal)) => ShimStreams::Terminal(terminal),
        (None, None) => {
            end_child(pid, &pidfd);
            return Err(refused("open a terminal", "none was reported"));
        }
    };
    let container =
        Container { launch: without_what_is_done(launch), created, pidfd, oom, handshake: Some(end) };
    Ok(NewContainer { container, streams, log })
}

/// The plan without what only the start needed, so that a small process stays small.
fn without_what_is_done(mut launch: Launch) -> Launch {
    launch.mounts = Vec::new();
    launch.devices = Vec::new();
    launch.masked_paths = Vec::new();
    launch.readonly_paths = Vec::new();
    launch.rootfs.lower_dirs = Vec::new();
    launch
}

/// A running exec.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) pid: i32,
    /// The connection and the request to answer at its end.
    pub(crate) connection: u64,
    pub(crate) request_id: u64,
}

/// Runs a program in the container. `descriptors` are its standard output, error and, if there is a third, input.
pub(crate) fn exec(
    container: &Container,
    request: &ExecRequest,
    descriptors: Vec<OwnedFd>,
) -> Result<i32, Failed> {
    const STEP: &str = "exec in the container";
    let mut descriptors = descriptors.into_iter();
    let (Some(output), Some(error)) = (descriptors.next(), descriptors.next()) else {
        return Err(refused(STEP, "no descriptors for its output"));
    };
    let input = match descriptors.next() {
        Some(input) => input,
        None => open_null()?,
    };
    let stdio = Stdio { input, output, error };
    let program = exec_process(&container.launch.process, request);
    let user = Resolved {
        uid: container.created.uid,
        gid: container.created.gid,
        groups: container.created.groups.clone(),
        home: container.created.home.clone(),
    };
    let (end, child_end) = handshake::pair().step("make a socket", "")?;
    let unified = open_unified(&container.launch.cgroup)?;
    let (first, first_pidfd) =
        match process::clone_process(0, unified.as_ref().map(AsFd::as_fd)).step(STEP, "")? {
            Cloned::Child => {
                drop(end);
                init::run_exec(&container.launch, &program, container.pidfd.as_fd(), &user, stdio, &child_end)
            }
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
    drop((child_end, stdio, first_pidfd));
    let (pid, pidfd) = successor(first, &end)?;
    if let Err(failed) = end.wait_for_exec() {
        end_child(pid, &pidfd);
        return Err(failed);
    }
    Ok(pid)
}

/// Kills a child that is of no use and reaps it.
pub(crate) fn end_child(pid: i32, pidfd: &OwnedFd) {
    const SIGKILL: i32 = 9;
    // It may have ended by itself; then there is nothing to kill, and it is reaped all the same.
    let _ = process::signal_pidfd(pidfd.as_fd(), SIGKILL);
    let _ = process::wait_for(pid);
}

/// Finds the process that goes on in place of the first child, which ends.
fn successor(first: i32, end: &ShimEnd) -> Result<(i32, OwnedFd), Failed> {
    const STEP: &str = "find the process in the container";
    let found = end.wait_for_successor();
    process::wait_for(first).step(STEP, "")?;
    let pid = found?;
    // Nobody but the shim can reap it, so the number is still its own.
    Ok((pid, process::open_pidfd(pid).step(STEP, pid)?))
}

pub(crate) fn open_unified(cgroup: &Cgroup) -> Result<Option<OwnedFd>, Failed> {
    if cgroup.unified_dir.is_empty() {
        return Ok(None);
    }
    let path = host_path(&cgroup.unified_dir);
    File::open(path).step("open the cgroup", path.display()).map(|file| Some(file.into()))
}

fn open_null() -> Result<OwnedFd, Failed> {
    File::open("/dev/null").step("open", "/dev/null").map(OwnedFd::from)
}

fn pipes(stdin: bool) -> Result<(Stdio, ShimStreams), Failed> {
    const STEP: &str = "make a pipe";
    let (output_read, output) = file::pipe().step(STEP, "")?;
    let (error_read, error) = file::pipe().step(STEP, "")?;
    let (input, input_write) = if stdin {
        let (read, write) = file::pipe().step(STEP, "")?;
        (read, Some(write))
    } else {
        (open_null()?, None)
    };
    Ok((
        Stdio { input, output, error },
        ShimStreams::Pipes { input: input_write, output: output_read, error: error_read },
    ))
}
