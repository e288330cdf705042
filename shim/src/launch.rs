//! The parent half of starting processes: preparation, clone, and the shim's ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use berth_shim_proto::control::{Created, ExecRequest, Failed, exec_process};
use berth_shim_proto::launch::{Cgroup, Launch, PidNamespace};
use berth_sys::process::{self, Cloned, namespace};
use berth_sys::{file, socket};

use crate::apparmor;
use crate::birth::Birth;
use crate::exit::{self, OomCounter};
use crate::failure::{Step, refused};
use crate::handshake;
use crate::host_path::host_path;
use crate::init::{self, Entered, ExecStreams, Stdio, SubCgroup};
use crate::log_queue::Log;
use crate::null_device;
use crate::procfs::Target;
use crate::relay::{Ends, Way};
use crate::stdio::ShimStreams;
use crate::user::Resolved;

/// A container that is being created.
#[derive(Debug)]
pub(crate) struct Making {
    launch: Launch,
    pub(crate) birth: Birth,
    oom: Option<OomCounter>,
    /// The shim's ends of its streams; a terminal's comes with the report.
    streams: Option<ShimStreams>,
    pub(crate) log: Option<Log>,
}

/// A container whose main process waits or runs.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) launch: Launch,
    pub(crate) created: Created,
    pub(crate) pidfd: OwnedFd,
    pub(crate) oom: Option<OomCounter>,
}

/// The error for a container that the kernel killed before it was ready. Preparing takes a few
/// hundred KiB.
const TOO_LITTLE_MEMORY: &str = "out of memory: its memory limit is too low to start anything";

/// The result of [`Making::finish`].
pub(crate) struct NewContainer {
    pub(crate) container: Container,
    pub(crate) streams: ShimStreams,
    pub(crate) log: Option<Log>,
}

/// Clones the main process, which does everything up to its exec. `descriptors` came with the
/// request; `log` is being opened.
///
/// # Errors
/// When no process was created; nothing is left then.
pub(crate) fn create(launch: Launch, descriptors: Vec<OwnedFd>, log: Option<Log>) -> Result<Making, Failed> {
    const STEP: &str = "prepare the container";
    let pid_flags = match &launch.namespaces.pid {
        Some(PidNamespace::Own(())) => namespace::PID,
        Some(PidNamespace::Host(()) | PidNamespace::Join(_) | PidNamespace::Target(())) => 0,
        None => return Err(refused(STEP, "no pid namespace in the plan")),
    };
    let target = match &launch.namespaces.pid {
        Some(PidNamespace::Target(())) => Some(Target::received(descriptors)?),
        _ => None,
    };
    exit::reserve_record(host_path(&launch.exit_record_path))
        .step("reserve room for the exit record", host_path(&launch.exit_record_path).display())?;
    let oom = OomCounter::open(&launch.cgroup).step("open", host_path(&launch.cgroup.oom_file).display())?;
    let (child_streams, streams) = if launch.process.terminal {
        (None, None)
    } else {
        let (child, shim) = pipes(launch.stdin)?;
        (Some(child), Some(shim))
    };
    let (end, mut child_end) = handshake::pair(true).step("create a socket", "")?;
    let unified = open_unified(&launch.cgroup)?;
    let pid = match process::clone_process(pid_flags | namespace::MOUNT, unified.as_ref().map(AsFd::as_fd))
        .step("create a process", "")?
    {
        Cloned::Child => {
            // The shim's ends must not stay open in the child: the end of a stream would never be
            // seen.
            drop((end, streams));
            init::run_main(&launch, target.as_ref(), child_streams, &mut child_end)
        }
        Cloned::Parent { pid, .. } => pid,
    };
    let birth = if is_inhabited(&launch) { Birth::by_maker(end, pid) } else { Birth::direct(end, pid) };
    Ok(Making { launch, birth, oom, streams, log })
}

impl Making {
    /// Takes the report of the process, once it waits for its start and the log is open.
    pub(crate) fn take_ready(&mut self) -> Option<(Created, Option<OwnedFd>)> {
        if self.log.as_ref().is_none_or(Log::is_open) { self.birth.take_ready() } else { None }
    }

    /// The container, and its birth, which lasts until exec.
    ///
    /// # Errors
    /// When something is missing. The process is killed then.
    pub(crate) fn finish(
        self,
        mut created: Created,
        terminal: Option<OwnedFd>,
    ) -> Result<(NewContainer, Birth), Failed> {
        let Self { launch, birth, oom, streams, log } = self;
        let opened = birth
            .process()
            .ok_or_else(|| refused("find the container's process", ""))
            .and_then(|pid| Ok((pid, process::open_pidfd(pid).step("find the container's process", pid)?)));
        let streams = match (streams, terminal) {
            (Some(streams), _) => Ok(streams),
            (None, Some(terminal)) => Ok(ShimStreams::Terminal(terminal)),
            (None, None) => Err(refused("open a terminal", "none was reported")),
        };
        let ((pid, pidfd), streams) = match (opened, streams) {
            (Ok(opened), Ok(streams)) => (opened, streams),
            (Err(failed), _) | (_, Err(failed)) => {
                birth.kill();
                return Err(failed);
            }
        };
        created.pid = pid;
        created.start_time = exit::start_time(pid);
        let container = Container { launch: without_what_is_done(launch), created, pidfd, oom };
        Ok((NewContainer { container, streams, log }, birth))
    }

    /// Why it failed, as precisely as known. `failed` is the reported failure.
    pub(crate) fn reason(&self, failed: Failed) -> Failed {
        let out_of_memory =
            failed.detail == handshake::KILLED && self.oom.as_ref().is_some_and(|oom| oom.has_risen(true));
        if out_of_memory { refused(&failed.step, TOO_LITTLE_MEMORY) } else { failed }
    }

    /// The path of its exit record.
    pub(crate) fn exit_record_path(&self) -> &Path {
        host_path(&self.launch.exit_record_path)
    }
}

impl Container {
    /// Checks that a main process that waits in a shared pid namespace still has its profile.
    /// Elsewhere the process checks itself.
    ///
    /// # Errors
    /// When it does not, or when the profile cannot be read.
    pub(crate) fn check_profile(&self) -> Result<(), Failed> {
        if is_inhabited(&self.launch) {
            apparmor::check_process(self.created.pid, &self.launch.process.apparmor_profile)
        } else {
            Ok(())
        }
    }
}

/// Whether it joins a pid namespace of other processes, other than the host's.
fn is_inhabited(launch: &Launch) -> bool {
    matches!(launch.namespaces.pid, Some(PidNamespace::Join(_) | PidNamespace::Target(())))
}

/// The plan without the parts that only the start needed, to save memory.
fn without_what_is_done(mut launch: Launch) -> Launch {
    launch.mounts = Vec::new();
    launch.devices = Vec::new();
    launch.masked_paths = Vec::new();
    launch.readonly_paths = Vec::new();
    launch.rootfs.lower_dirs = Vec::new();
    launch
}

/// The shim's side of the streams of an exec.
#[derive(Debug)]
pub(crate) enum Streams {
    /// Pipes of the program, each with the daemon's pipe at the other side of the relay.
    Pipes(Vec<Ends>),
    /// A terminal, which arrives on the first; the daemon waits for its side on the other.
    Terminal { handed_over: OwnedFd, taker: OwnedFd },
}

/// Starts a program in the container. `descriptors` are the daemon's ends of its standard output,
/// error and, if there is a third, input; with a terminal, the socket on which the daemon expects
/// its side of it.
///
/// # Errors
/// When no process was created.
pub(crate) fn exec(
    container: &Container,
    request: &ExecRequest,
    descriptors: Vec<OwnedFd>,
) -> Result<(Birth, Streams), Failed> {
    const STEP: &str = "exec in the container";
    let mut descriptors = descriptors.into_iter();
    let (child_streams, streams) = if request.terminal {
        let taker = descriptors
            .next()
            .ok_or_else(|| refused(STEP, "no descriptor for the terminal came with the request"))?;
        let (handed_over, to_shim) = socket::packet_pair().step(STEP, "create a socket")?;
        (ExecStreams::Terminal(to_shim), Streams::Terminal { handed_over, taker })
    } else {
        let (Some(output), Some(error)) = (descriptors.next(), descriptors.next()) else {
            return Err(refused(STEP, "no descriptors for its output"));
        };
        let mut pipes = Vec::new();
        let stdio = Stdio {
            input: match descriptors.next() {
                Some(input) => inner(Way::In, input, &mut pipes)?,
                None => null_device::open()?,
            },
            output: inner(Way::Out, output, &mut pipes)?,
            error: inner(Way::Out, error, &mut pipes)?,
        };
        (ExecStreams::Pipes(stdio), Streams::Pipes(pipes))
    };
    let program = exec_process(&container.launch.process, request);
    let user = Resolved {
        uid: container.created.uid,
        gid: container.created.gid,
        groups: container.created.groups.clone(),
        home: container.created.home.clone(),
    };
    let (end, mut child_end) = handshake::pair(false).step("create a pipe", "")?;
    let (cloned, joins) = clone_into(container).step(STEP, "")?;
    match cloned {
        Cloned::Child => {
            drop((end, streams));
            let entered = Entered { main: container.pidfd.as_fd(), user: &user, joins: joins.as_ref() };
            init::run_exec(&container.launch, &program, &entered, child_streams, &mut child_end)
        }
        Cloned::Parent { pid, .. } => Ok((Birth::of_exec(end, pid), streams)),
    }
}

/// The program's end for the stream whose other end is `outer`: for a pipe, the end of a separate
/// pipe whose other end goes to `pipes`. Anything else is the host's null device, which is replaced
/// by the container's.
fn inner(way: Way, outer: OwnedFd, pipes: &mut Vec<Ends>) -> Result<OwnedFd, Failed> {
    const STEP: &str = "create a pipe";
    let outer = File::from(outer);
    if !outer.metadata().step(STEP, "")?.file_type().is_fifo() {
        return null_device::open();
    }
    let (read, write) = file::pipe().step(STEP, "")?;
    let (from, to, inner) = match way {
        Way::In => (outer.into(), write, read),
        Way::Out => (read, outer.into(), write),
    };
    pipes.push(Ends { way, from, to });
    Ok(inner)
}

/// Clones a child into the container's cgroup.
///
/// A container that manages its own part of the tree (systemd in a privileged pod) has its
/// processes in cgroups below, and enabled controllers for them: then no process may be in the
/// cgroup itself, cgroups(7), "no internal processes". The child, which may have to wait forever
/// for a directory that the container keeps locked, joins where the main process is by itself.
fn clone_into(container: &Container) -> io::Result<(Cloned, Option<SubCgroup>)> {
    let unified = &container.launch.cgroup.unified_dir;
    if unified.is_empty() {
        return Ok((process::clone_process(0, None)?, None));
    }
    let own = File::open(host_path(unified))?;
    match process::clone_process(0, Some(own.as_fd())) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            let below = Path::new("/proc").join(container.created.pid.to_string()).join("cgroup");
            let listed = std::fs::read(below)?;
            let Some(below) = below_in_hierarchy(unified, &listed) else { return Err(error) };
            let place = SubCgroup { own: own.into(), below: below.into() };
            Ok((process::clone_process(0, None)?, Some(place)))
        }
        other => Ok((other?, None)),
    }
}

/// The cgroup of a process below the cgroup directory `unified`, from its `/proc/<pid>/cgroup`,
/// proc_pid_cgroup(5). `None` when it is elsewhere. The paths in that file begin at the root of the
/// hierarchy, wherever that is mounted.
fn below_in_hierarchy<'a>(unified: &[u8], listed: &'a [u8]) -> Option<&'a std::ffi::OsStr> {
    let path = listed.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::"))?;
    let mut rest = unified;
    // The longest end of the directory that the path begins with is the cgroup's own name in the
    // hierarchy.
    loop {
        if rest.starts_with(b"/")
            && rest.len() > 1
            && let Some(below) = path.strip_prefix(rest).and_then(|below| below.strip_prefix(b"/"))
        {
            return (!below.is_empty()).then(|| std::ffi::OsStr::from_bytes(below));
        }
        let next = rest.iter().skip(1).position(|byte| *byte == b'/')?;
        rest = rest.get(next + 1..)?;
    }
}

pub(crate) fn open_unified(cgroup: &Cgroup) -> Result<Option<OwnedFd>, Failed> {
    if cgroup.unified_dir.is_empty() {
        return Ok(None);
    }
    let path = host_path(&cgroup.unified_dir);
    File::open(path).step("open the cgroup", path.display()).map(|file| Some(file.into()))
}

fn pipes(stdin: bool) -> Result<(Stdio, ShimStreams), Failed> {
    const STEP: &str = "create a pipe";
    let (output_read, output) = file::pipe().step(STEP, "")?;
    let (error_read, error) = file::pipe().step(STEP, "")?;
    let (input, input_write) = if stdin {
        let (read, write) = file::pipe().step(STEP, "")?;
        (read, Some(write))
    } else {
        (null_device::open()?, None)
    };
    Ok((
        Stdio { input, output, error },
        ShimStreams::Pipes { input: input_write, output: output_read, error: error_read },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_process_is_found_below_its_cgroup_only() {
        let unified = b"/sys/fs/cgroup/kubepods/pod1/abc";
        for (listed, expected) in [
            ("0::/kubepods/pod1/abc/init.scope\n", Some("init.scope")),
            ("1:name=x:/\n0::/kubepods/pod1/abc/a/b\n", Some("a/b")),
            ("0::/kubepods/pod1/abc\n", None),
            ("0::/kubepods/pod1/abc/\n", None),
            ("0::/kubepods/pod1/abcd/e\n", None),
            ("0::/\n", None),
            ("0::/other\n", None),
            ("1:cpu:/kubepods/pod1/abc/x\n", None),
            ("", None),
        ] {
            let found = below_in_hierarchy(unified, listed.as_bytes());
            assert_eq!(found.and_then(std::ffi::OsStr::to_str), expected, "{listed}");
        }
    }
}
