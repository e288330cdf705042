//! The child between clone and exec: the container's main process, and the processes of exec.
//!
//! A flat list of steps, each with the reason for its place. One thread, no logging; a step that
//! fails is reported to the shim and the child ends.
//!
//! A process in a pid namespace exposes, to every process there that may trace (`CAP_SYS_PTRACE`)
//! what it has: its root, its working directory, its descriptors, its memory, and through that its
//! privileges. So nothing of the host enters a namespace where others live. A process bound for one
//! prepares outside until the root is the container's and the descriptors, privileges, filter and
//! profile are the program's, reports, and only then continues as a sibling born inside
//! ([`go_on_inside`]). Messages of that sibling are not trusted ([`crate::handshake`]).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use berth_shim_proto::control::{Created, Failed};
use berth_shim_proto::launch::{Cgroup, Launch, Namespaces, PidNamespace, Process};
use berth_sys::beneath::Root;
use berth_sys::process::SingleThreaded;
use berth_sys::{file, ns, process, socket, tty};

use crate::apparmor::{Profile, Way};
use crate::execute::{self, Privileges, Program};
use crate::failure::{Step, refused};
use crate::handshake::{self, ChildEnd};
use crate::host_path::host_path;
use crate::inheritance;
use crate::procfs::{self, Target};
use crate::rootfs;
use crate::user::{self, Resolved};

/// The streams of a process of exec.
pub(crate) enum ExecStreams {
    Pipes(Stdio),
    /// A new terminal. Its other end is sent to the shim over this socket.
    Terminal(OwnedFd),
}

/// Standard input, output and error of a child; none for a terminal.
pub(crate) struct Stdio {
    pub(crate) input: OwnedFd,
    pub(crate) output: OwnedFd,
    pub(crate) error: OwnedFd,
}

/// The container that a process of exec enters.
pub(crate) struct Entered<'a> {
    /// Its main process.
    pub(crate) main: BorrowedFd<'a>,
    pub(crate) user: &'a Resolved,
    /// Where it has its processes, if not in its own cgroup.
    pub(crate) joins: Option<&'a SubCgroup>,
}

/// A cgroup below a container's own.
pub(crate) struct SubCgroup {
    /// The container's own directory.
    pub(crate) own: OwnedFd,
    pub(crate) below: PathBuf,
}

impl SubCgroup {
    /// Moves this process there. The names are the container's, so they are resolved below its
    /// directory, and that may take forever.
    fn join(&self) -> Result<(), Failed> {
        let members = self.below.join("cgroup.procs");
        self.own
            .try_clone()
            .and_then(Root::from_fd)
            .and_then(|own| own.open_with(&members, file::READ_WRITE))
            .and_then(|members| File::from(members).write_all(b"0"))
            .step("join the cgroup", members.display())
    }
}

impl Stdio {
    fn all(&self) -> [BorrowedFd<'_>; 3] {
        [self.input.as_fd(), self.output.as_fd(), self.error.as_fd()]
    }
}

/// The main process. Never returns: it executes the program, or reports a failure and ends.
pub(crate) fn run_main(
    launch: &Launch,
    target: Option<&Target>,
    stdio: Option<Stdio>,
    end: &mut ChildEnd,
) -> ! {
    let failed = become_main(launch, target, stdio, end);
    end.failed(&failed);
    process::exit_now(127)
}

/// A process of exec. Never returns.
pub(crate) fn run_exec(
    launch: &Launch,
    program: &Process,
    entered: &Entered<'_>,
    streams: ExecStreams,
    end: &mut ChildEnd,
) -> ! {
    let failed = become_exec(launch, program, entered, streams, end);
    end.failed(&failed);
    process::exit_now(127)
}

fn become_main(launch: &Launch, target: Option<&Target>, stdio: Option<Stdio>, end: &mut ChildEnd) -> Failed {
    match prepare_main(launch, target, stdio, end) {
        Ok((program, privileges, profile)) => {
            execute::finish(&launch.process, &program, privileges, profile, end)
        }
        Err(failed) => failed,
    }
}

/// Everything up to the wait for the start, including the report; returns the profile that exec
/// changes to.
fn prepare_main(
    launch: &Launch,
    target: Option<&Target>,
    stdio: Option<Stdio>,
    end: &mut ChildEnd,
) -> Result<(Program, Privileges, Option<Way>), Failed> {
    let mut kept = end.all();
    kept.extend(stdio.iter().flat_map(Stdio::all));
    kept.extend(target.iter().flat_map(|target| target.all()));
    keep_only(&kept)?;
    let mut notes = Vec::new();
    begin(&launch.cgroup)?;
    // While /proc is still the host's.
    execute::set_limits(&launch.process, &mut notes)?;
    let profile = Profile::find(&launch.process.apparmor_profile)?;

    let namespaces = &launch.namespaces;
    enter(namespaces)?;

    let procfs = match (&namespaces.pid, target) {
        (Some(PidNamespace::Join(path)), _) => {
            let procfs = procfs::pinned(host_path(&namespaces.procfs))?;
            let path = host_path(path);
            let namespace = ns::open(path).step("open the pid namespace", path.display())?;
            join_for_children(namespace.as_fd())?;
            Some(procfs)
        }
        (Some(PidNamespace::Target(())), Some(target)) => {
            let procfs = target.procfs()?;
            join_for_children(target.pid_namespace())?;
            Some(procfs)
        }
        _ => None,
    };
    let inhabited = procfs.is_some();
    // While all capabilities are present.
    let (profile, at_exec) = match profile {
        Some(profile) if !inhabited => (None, Some(profile.take_on_at_exec()?)),
        profile => (profile, None),
    };
    let rootfs::Assembled { root, accounts } = rootfs::assemble(launch, procfs)?;
    berth_sys::mount::pivot_into(root.as_fd()).step("change the root", "")?;
    drop(root);
    rootfs::finish_inside(launch)?;
    let user = user::resolve(&launch.process.user, &accounts)?;
    drop(accounts);
    let terminal = match stdio {
        Some(stdio) => {
            place(stdio, &user)?;
            None
        }
        None => Some(open_terminal(&user, rootfs::has_own_dev(launch))?),
    };
    execute::enter_directory(&launch.process.cwd, &user)?;
    let program = Program::new(&launch.process, &user.home)?;
    execute::become_user(&launch.process, &user)?;
    let Resolved { uid, gid, groups, home } = user;
    let created = Created { uid, gid, groups, home, notes, ..Created::default() };
    let has_terminal = terminal.is_some();
    if inhabited {
        // Still outside, where it is trusted.
        end.ready(&created, terminal.as_ref().map(AsFd::as_fd))?;
        drop(terminal);
        let privileges = go_on_inside(&launch.process, profile, end)?;
        lead_session(has_terminal)?;
        Ok((program, privileges, None))
    } else {
        execute::keep_what_shedding_needs(&launch.process)?;
        lead_session(has_terminal)?;
        end.ready(&created, terminal.as_ref().map(AsFd::as_fd))?;
        Ok((program, Privileges::Shedding, at_exec))
    }
}

/// A session for the process: signals of a terminal reach only it, and the shim can signal an exec
/// as a whole.
fn lead_session(has_terminal: bool) -> Result<(), Failed> {
    process::new_session().step("create a session", "")?;
    if has_terminal {
        tty::make_controlling(std::io::stdin().as_fd()).step("open a terminal", "")?;
    }
    Ok(())
}

fn become_exec(
    launch: &Launch,
    program: &Process,
    entered: &Entered<'_>,
    streams: ExecStreams,
    end: &mut ChildEnd,
) -> Failed {
    match prepare_exec(launch, program, entered, streams, end) {
        Ok((exec, privileges)) => execute::finish_exec(program, &exec, privileges),
        Err(failed) => failed,
    }
}

fn prepare_exec(
    launch: &Launch,
    program: &Process,
    entered: &Entered<'_>,
    streams: ExecStreams,
    end: &mut ChildEnd,
) -> Result<(Program, Privileges), Failed> {
    let Entered { main, user, joins } = *entered;
    let mut kept = end.all();
    match &streams {
        ExecStreams::Pipes(stdio) => kept.extend(stdio.all()),
        ExecStreams::Terminal(taker) => kept.push(taker.as_fd()),
    }
    kept.push(main);
    kept.extend(joins.map(|place| place.own.as_fd()));
    keep_only(&kept)?;
    begin(&launch.cgroup)?;
    joins.map_or(Ok(()), SubCgroup::join)?;
    let mut notes = Vec::new();
    execute::set_limits(program, &mut notes)?;
    let profile = Profile::find(&program.apparmor_profile)?;
    let mut flags = ns::MOUNT | ns::Kind::Pid.flag();
    for (path, flag) in [
        (&launch.namespaces.network, ns::Kind::Network.flag()),
        (&launch.namespaces.ipc, ns::Kind::Ipc.flag()),
        (&launch.namespaces.uts, ns::Kind::Uts.flag()),
    ] {
        if !path.is_empty() {
            flags |= flag;
        }
    }
    if launch.namespaces.own_cgroup {
        flags |= ns::CGROUP;
    }
    // All at once by the pidfd: the kernel joins every one or none. Root and working directory
    // become the container's; of the pid namespaces only the one that children go to changes,
    // setns(2).
    ns::join(main, flags).step("join the container", "")?;
    match streams {
        ExecStreams::Pipes(stdio) => place(stdio, user)?,
        ExecStreams::Terminal(taker) => {
            let controller = open_terminal(user, false)?;
            // Still outside, where messages are trusted.
            socket::send(taker.as_fd(), b"T", &[controller.as_fd()]).step("hand over the terminal", "")?;
        }
    }
    execute::enter_directory(&program.cwd, user)?;
    let exec = Program::new(program, &user.home)?;
    execute::become_user(program, user)?;
    let privileges = go_on_inside(program, profile, end)?;
    end.wait_for_go()?;
    lead_session(program.terminal)?;
    Ok((exec, privileges))
}

/// Closes the child's copies of everything else that the shim has open. A copy would keep it open
/// after the shim closes it: daemons would not see its end, and epoll would continue to report it.
/// A child may hang for a long time.
fn keep_only(kept: &[BorrowedFd<'_>]) -> Result<(), Failed> {
    process::close_all_but(kept).step("close descriptors", "")
}

/// The first steps of every child.
pub(crate) fn begin(cgroup: &Cgroup) -> Result<(), Failed> {
    // Before the container can see this process: nothing in there may trace it or open its files,
    // /proc/<pid>/exe among them (CVE-2016-9962, CVE-2019-5736). Exec turns it on again.
    process::set_dumpable(false).step("guard the process", "")?;
    process::reset_signals().step("reset the signals", "")?;
    inheritance::reset()?;
    // In cgroup v1 a single thread that writes "0" moves only itself, which spares the kernel its
    // global lock. From here on all work for the container counts against its limits.
    for path in &cgroup.tasks_files {
        let path = host_path(path);
        OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|mut file| file.write_all(b"0"))
            .step("join the cgroup", path.display())?;
    }
    Ok(())
}

/// Continues as a new process in the pid namespace that was joined for children, and ends the old
/// one, whose name tells the shim the new pid. Only 0, 1, 2 and two pipes to the shim stay open.
/// All system calls from here on are listed in `berth_shim_proto::launch::ENTERING`.
fn go_on_inside(
    program: &Process,
    profile: Option<Profile>,
    end: &mut ChildEnd,
) -> Result<Privileges, Failed> {
    const STEP: &str = "enter the pid namespace";
    let mut kept = Vec::from(end.rest());
    kept.extend(profile.iter().map(AsFd::as_fd));
    process::close_all_but(&kept).step(STEP, "")?;
    let single = SingleThreaded::check().step(STEP, "")?;
    let privileges = execute::shed_before_birth(program, profile)?;
    match process::clone_sibling(single).step(STEP, "")? {
        // It does nothing before the shim knows it, and ends if that never happens.
        None => Ok(privileges),
        Some(pid) => {
            let name = CString::new(handshake::name_of_maker(pid)).unwrap_or_default();
            process::set_name(&name).step(STEP, "")?;
            process::exit_now(0)
        }
    }
}

/// Joins the pinned namespaces except for the pid namespace, and creates a cgroup namespace if
/// required. For a process that has joined its cgroup: a cgroup namespace is rooted at the cgroup
/// of its creator, cgroup_namespaces(7).
pub(crate) fn enter(namespaces: &Namespaces) -> Result<(), Failed> {
    for (path, kind) in [
        (&namespaces.network, ns::Kind::Network),
        (&namespaces.ipc, ns::Kind::Ipc),
        (&namespaces.uts, ns::Kind::Uts),
    ] {
        if !path.is_empty() {
            let file = ns::open(host_path(path)).step("open the namespace", host_path(path).display())?;
            ns::join(file.as_fd(), kind.flag()).step("join the namespace", host_path(path).display())?;
        }
    }
    // After joining the network namespace: sysfs shows that of the mounting process.
    if namespaces.own_cgroup { ns::unshare(ns::CGROUP).step("create a cgroup namespace", "") } else { Ok(()) }
}

fn join_for_children(namespace: BorrowedFd<'_>) -> Result<(), Failed> {
    ns::join(namespace, ns::Kind::Pid.flag()).step("join the pid namespace", "")
}

/// Puts the three descriptors in place as 0, 1, 2, and gives pipes to the user, so that it can open
/// /dev/stdout and the like.
fn place(stdio: Stdio, user: &Resolved) -> Result<(), Failed> {
    for (descriptor, number) in [(&stdio.input, 0), (&stdio.output, 1), (&stdio.error, 2)] {
        give_away(descriptor.as_fd(), user)?;
        process::place_descriptor(descriptor.as_fd(), number).step("place the standard streams", number)?;
    }
    Ok(())
}

fn give_away(descriptor: BorrowedFd<'_>, user: &Resolved) -> Result<(), Failed> {
    let file = File::from(descriptor.try_clone_to_owned().step("copy a descriptor", "")?);
    let metadata = file.metadata().step("examine a standard stream", "")?;
    // The null device is shared.
    if metadata.file_type().is_fifo() && metadata.uid() != user.uid {
        std::os::unix::fs::fchown(&file, Some(user.uid), None)
            .step("change the owner of a standard stream", "")?;
    }
    Ok(())
}

/// Opens a new terminal in the container's own devpts, makes it 0, 1 and 2, and if `/dev` is the
/// container's own, `/dev/console` too; returns the other end.
fn open_terminal(user: &Resolved, own_dev: bool) -> Result<OwnedFd, Failed> {
    const STEP: &str = "open a terminal";
    let inside = Root::open(Path::new("/dev/pts")).step(STEP, "/dev/pts")?;
    let controller = inside.open_with(Path::new("ptmx"), file::READ_WRITE).step(STEP, "/dev/pts/ptmx")?;
    // A container that may mount could have replaced it, before an exec.
    if !tty::is_devpts(controller.as_fd()).step(STEP, "/dev/pts/ptmx")? {
        return Err(refused(STEP, "/dev/pts is not the kernel's"));
    }
    let terminal = tty::open_other_end(controller.as_fd()).step(STEP, "")?;
    std::os::unix::fs::fchown(&terminal, Some(user.uid), None).step(STEP, "")?;
    if own_dev {
        rootfs::show_console(terminal.as_fd())?;
    }
    for number in 0..3 {
        process::place_descriptor(terminal.as_fd(), number).step(STEP, number)?;
    }
    Ok(controller)
}
