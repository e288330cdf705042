//! The child between clone and exec: the container's main process, and the processes of exec.
//!
//! A flat list of steps, each with the reason for its place. One thread, no logging; a step that fails is reported to the shim and
//! the child ends.

use crate::execute::{self, Program};
use crate::failure::{Step, refused};
use crate::handshake::ChildEnd;
use crate::rootfs;
use crate::user::{self, Resolved};
use berth_shim_proto::control::{Created, Failed};
use berth_shim_proto::launch::{Cgroup, Launch, Process};
use berth_sys::beneath::Root;
use berth_sys::{ns, process, tty};
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Standard input, output and error of a child; none for a terminal.
pub(crate) struct Stdio {
    pub(crate) input: OwnedFd,
    pub(crate) output: OwnedFd,
    pub(crate) error: OwnedFd,
}

/// A host path of the plan.
pub(crate) fn host_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// The main process. Never returns: it becomes the program, or reports why not and ends.
pub(crate) fn run_main(launch: &Launch, stdio: Option<Stdio>, end: &ChildEnd) -> ! {
    let failed = become_main(launch, stdio, end);
    end.failed(&failed);
    process::exit_now(127)
}

/// A process of exec, in the container whose main process `main` stands for. Never returns.
pub(crate) fn run_exec(
    launch: &Launch,
    program: &Process,
    main: BorrowedFd<'_>,
    user: &Resolved,
    stdio: Stdio,
    end: &ChildEnd,
) -> ! {
    let failed = become_exec(launch, program, main, user, stdio, end);
    end.failed(&failed);
    process::exit_now(127)
}

fn become_main(launch: &Launch, stdio: Option<Stdio>, end: &ChildEnd) -> Failed {
    match prepare_main(launch, stdio) {
        Ok((program, user, created, terminal)) => {
            execute::finish(&launch.process, &program, &user, end, Some((created, terminal)))
        }
        Err(failed) => failed,
    }
}

type Prepared = (Program, Resolved, Created, Option<OwnedFd>);

fn prepare_main(launch: &Launch, stdio: Option<Stdio>) -> Result<Prepared, Failed> {
    let mut notes = Vec::new();
    begin(&launch.cgroup)?;
    // While /proc is still the host's.
    execute::set_limits(&launch.process, &mut notes)?;

    let namespaces = &launch.namespaces;
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
    // After the cgroup was joined: a cgroup namespace is rooted where its maker is, cgroup_namespaces(7). After the network
    // namespace was joined: sysfs shows the one of its mounter.
    if namespaces.own_cgroup {
        ns::unshare(ns::CGROUP).step("make a cgroup namespace", "")?;
    }

    let rootfs::Assembled { root, accounts } = rootfs::assemble(launch)?;
    berth_sys::mount::pivot_into(root.as_fd()).step("change the root", "")?;
    drop(root);
    rootfs::finish_inside(launch)?;
    let user = user::resolve(&launch.process.user, &accounts)?;
    drop(accounts);

    // A session of its own: signals of a terminal reach it and nobody else. The terminal is one of the devpts just mounted.
    process::new_session().step("make a session", "")?;
    let terminal = match stdio {
        Some(stdio) => {
            place(stdio, &user)?;
            None
        }
        None => Some(open_terminal(&user, rootfs::has_own_dev(launch))?),
    };
    execute::enter_directory(&launch.process.cwd, &user)?;
    if !launch.process.apparmor_profile.is_empty() {
        set_apparmor_profile(&launch.process.apparmor_profile)?;
    }
    let program = Program::new(&launch.process, &user.home)?;
    let created = Created {
        uid: user.uid,
        gid: user.gid,
        groups: user.groups.clone(),
        home: user.home.clone(),
        notes,
        ..Created::default()
    };
    Ok((program, user, created, terminal))
}

fn become_exec(
    launch: &Launch,
    program: &Process,
    main: BorrowedFd<'_>,
    user: &Resolved,
    stdio: Stdio,
    end: &ChildEnd,
) -> Failed {
    match prepare_exec(launch, program, main, user, stdio) {
        Ok(exec) => execute::finish(program, &exec, user, end, None),
        Err(failed) => failed,
    }
}

fn prepare_exec(
    launch: &Launch,
    program: &Process,
    main: BorrowedFd<'_>,
    user: &Resolved,
    stdio: Stdio,
) -> Result<Program, Failed> {
    begin(&launch.cgroup)?;
    let mut notes = Vec::new();
    execute::set_limits(program, &mut notes)?;
    process::new_session().step("make a session", "")?;
    let mut flags = ns::MOUNT;
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
    // All at once by the pidfd: the kernel joins every one or none. Root and working directory become the container's.
    ns::join(main, flags).step("join the container", "")?;
    place(stdio, user)?;
    execute::enter_directory(&program.cwd, user)?;
    if !program.apparmor_profile.is_empty() {
        set_apparmor_profile(&program.apparmor_profile)?;
    }
    Program::new(program, &user.home)
}

/// What every child does first.
pub(crate) fn begin(cgroup: &Cgroup) -> Result<(), Failed> {
    // Before anything of the container can see this process: nobody in there may trace it or open its files, /proc/<pid>/exe
    // among them (CVE-2016-9962, CVE-2019-5736). Exec turns it on again.
    process::set_dumpable(false).step("guard the process", "")?;
    process::reset_signals().step("reset the signals", "")?;
    // In cgroup v1 a single thread that writes "0" moves only itself, which spares the kernel its global lock. From here on
    // everything that is done for the container counts against its limits.
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

/// Puts the three descriptors in place as 0, 1, 2, and gives pipes to the user, so that it can open /dev/stdout and the like.
fn place(stdio: Stdio, user: &Resolved) -> Result<(), Failed> {
    for (descriptor, number) in [(&stdio.input, 0), (&stdio.output, 1), (&stdio.error, 2)] {
        give_away(descriptor.as_fd(), user)?;
        process::place_descriptor(descriptor.as_fd(), number).step("place the standard streams", number)?;
    }
    Ok(())
}

fn give_away(descriptor: BorrowedFd<'_>, user: &Resolved) -> Result<(), Failed> {
    let file = std::fs::File::from(descriptor.try_clone_to_owned().step("copy a descriptor", "")?);
    let metadata = file.metadata().step("look at a standard stream", "")?;
    // Only what was made for this container: /dev/null belongs to the host.
    if metadata.file_type().is_fifo() && metadata.uid() != user.uid {
        std::os::unix::fs::fchown(&file, Some(user.uid), None).step("give away a standard stream", "")?;
    }
    Ok(())
}

/// Opens a new terminal in the container's own devpts, makes it the controlling one, 0, 1 and 2, and where `/dev` is the container's own
/// `/dev/console` too; returns the other end.
fn open_terminal(user: &Resolved, own_dev: bool) -> Result<OwnedFd, Failed> {
    const STEP: &str = "open a terminal";
    let inside = Root::open(Path::new("/dev/pts")).step(STEP, "/dev/pts")?;
    let controller =
        inside.open_with(Path::new("ptmx"), berth_sys::file::READ_WRITE).step(STEP, "/dev/pts/ptmx")?;
    let terminal = tty::open_other_end(controller.as_fd()).step(STEP, "")?;
    tty::make_controlling(terminal.as_fd()).step(STEP, "")?;
    std::os::unix::fs::fchown(&terminal, Some(user.uid), None).step(STEP, "")?;
    if own_dev {
        rootfs::show_console(terminal.as_fd())?;
    }
    for number in 0..3 {
        process::place_descriptor(terminal.as_fd(), number).step(STEP, number)?;
    }
    Ok(controller)
}

/// `/proc/thread-self/attr/apparmor/exec` of apparmor's kernel interface: the profile that the next exec changes to.
fn set_apparmor_profile(profile: &str) -> Result<(), Failed> {
    const STEP: &str = "set the AppArmor profile";
    let proc = Root::open(Path::new("/proc")).step(STEP, profile)?;
    // A mount of the request could have covered it; the write would go nowhere and the container run without its profile.
    if !berth_sys::mount::is_procfs(proc.as_fd()).step(STEP, "/proc")? {
        return Err(refused(STEP, format!("{profile}: /proc is not the kernel's")));
    }
    let file =
        proc.open_with(Path::new("self/attr/apparmor/exec"), berth_sys::file::WRITE).step(STEP, profile)?;
    std::fs::File::from(file).write_all(format!("exec {profile}").as_bytes()).step(STEP, profile)
}
