//! Starting, naming and ending processes: `clone3(2)`, pidfds, and the state of the calling process
//! that exec passes on.
//!
//! The functions that change the whole process are for a child between clone and exec, or for a
//! single-threaded program. The daemon, which has threads, starts programs only through [`spawn`].

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Namespaces that a new process gets: `CLONE_NEW*` of `clone(2)`.
pub mod namespace {
    /// Its own mount namespace.
    pub const MOUNT: u64 = libc::CLONE_NEWNS as u64;
    /// Its own pid namespace, of which it is process 1.
    pub const PID: u64 = libc::CLONE_NEWPID as u64;
    /// Its own network namespace.
    pub const NETWORK: u64 = libc::CLONE_NEWNET as u64;
    /// Its own System V IPC and POSIX message queue namespace.
    pub const IPC: u64 = libc::CLONE_NEWIPC as u64;
    /// Its own hostname.
    pub const UTS: u64 = libc::CLONE_NEWUTS as u64;
    /// Its own view of the cgroup tree.
    pub const CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
}

const CLONE_PIDFD: u64 = libc::CLONE_PIDFD as u64;
/// <linux/sched.h>; the libc crate lacks it for musl and has 0 for gnu.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of <linux/sched.h>, version 2 (88 bytes, Linux 5.7).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Which side of [`clone_process`] one is on.
#[derive(Debug)]
pub enum Cloned {
    /// In the new process.
    Child,
    /// In the caller: the child's pid as the caller's pid namespace numbers it, and a descriptor
    /// that stands for it.
    Parent {
        /// The pid.
        pid: i32,
        /// The pidfd: pidfd_open(2).
        pidfd: OwnedFd,
    },
}

/// Creates a child that continues from here with a copy of the memory, like fork, in the
/// `namespaces` ([`namespace`], or 0) and, when `cgroup` is a directory of the cgroup2 filesystem,
/// born inside that cgroup: `clone3(2)`.
///
/// # Errors
/// `EAGAIN` at a pids limit, `EBUSY`/`EOPNOTSUPP` when the cgroup cannot hold processes, `ENOMEM`
/// when the pid namespace that children go to has lost its process 1.
///
/// # Panics
/// When called by a process with more than one thread: the child would inherit locks whose owner
/// does not exist in it.
pub fn clone_process(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    assert!(is_single_threaded()?, "clone_process is for single-threaded processes");
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: namespaces | CLONE_PIDFD,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        ..CloneArgs::default()
    };
    if let Some(directory) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(directory.as_raw_fd().unsigned_abs());
    }
    // SAFETY: `args` is a `struct clone_args` of the size given; its `pidfd` points at a live i32;
    // no CLONE_VM and no new stack, so the child runs on a copy of this one; there is one thread,
    // so no lock in the copy is held by a thread that does not exist there.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match result {
        0 => Ok(Cloned::Child),
        pid if pid > 0 => {
            // SAFETY: with CLONE_PIDFD the kernel stored a new descriptor in `pidfd`, owned by
            // nothing else.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
            Ok(Cloned::Parent { pid, pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Proof that the calling process has one thread, and so creates no child that inherits locks whose
/// owner does not exist in it. A process that starts no thread can obtain it early and use it
/// later.
#[derive(Debug, Clone, Copy)]
pub struct SingleThreaded(());

impl SingleThreaded {
    /// Checks by `unshare(2)`.
    ///
    /// # Errors
    /// When a filter forbids the call.
    ///
    /// # Panics
    /// When there are more threads.
    pub fn check() -> io::Result<Self> {
        assert!(is_single_threaded()?, "this is for single-threaded processes");
        Ok(Self(()))
    }
}

/// Creates a sibling of the caller that continues from here with a copy of the memory: a child of
/// the caller's parent (`CLONE_PARENT`), born in the pid namespace that the caller has joined for
/// its children. Returns `None` in the sibling, and in the caller the sibling's pid in the caller's
/// own pid namespace.
///
/// By `clone(2)`: filters see its flags, and those that let programs create processes forbid
/// `clone3(2)`, whose flags they cannot see.
///
/// # Errors
/// Those of [`clone_process`].
pub fn clone_sibling(_: SingleThreaded) -> io::Result<Option<i32>> {
    // No signal of its own: the parent learns of the sibling's end in the same way as of the
    // caller's.
    let flags = libc::c_long::from(libc::CLONE_PARENT);
    // SAFETY: no CLONE_VM and no new stack, so the sibling runs on a copy of this one; the null
    // pointers are for what is not asked for; there is one thread, so no lock in the copy is held
    // by a thread that does not exist there.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize) };
    match result {
        0 => Ok(None),
        pid if pid > 0 => {
            i32::try_from(pid).map(Some).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_single_threaded() -> io::Result<bool> {
    // Does nothing for a process with one thread and fails with EINVAL for others, unshare(2).
    // Unlike what /proc says it does not depend on whose /proc that is. SAFETY: unshare(2) takes
    // only numbers.
    if unsafe { libc::unshare(libc::CLONE_THREAD) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EINVAL) { Ok(false) } else { Err(error) }
}

/// A descriptor that stands for the process `pid`: `pidfd_open(2)`.
///
/// # Errors
/// `ESRCH` when there is none.
pub fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes only numbers.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    let raw = RawFd::try_from(raw).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel returned `raw` as a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Whether the process that `pidfd` stands for has ended, reaped or not: pidfd_open(2), "readable".
///
/// # Errors
/// As poll(2).
pub fn has_ended(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::new(pidfd, PollFlags::POLLIN)];
    loop {
        match poll(&mut polled, PollTimeout::ZERO) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(ready) => return Ok(ready > 0 && polled.iter().any(says_ended)),
        }
    }
}

fn says_ended(polled: &PollFd<'_>) -> bool {
    polled.revents().is_some_and(|events| events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP))
}

/// Sends `signal` to the process that `pidfd` stands for: `pidfd_send_signal(2)`.
///
/// # Errors
/// `ESRCH` when it has ended and was reaped.
pub fn signal_pidfd(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed and means the one of kill(2); the rest are numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Ends a process at once: signal(7).
pub const SIGKILL: i32 = libc::SIGKILL;

/// Asks a process to end: signal(7).
pub const SIGTERM: i32 = libc::SIGTERM;

/// Tells a daemon to read its configuration again: daemon(7).
pub const SIGHUP: i32 = libc::SIGHUP;

/// Sends `signal` to the process group `group`: `kill(2)` with a negative pid.
///
/// # Errors
/// `ESRCH` when the group has no member.
pub fn signal_group(group: i32, signal: i32) -> io::Result<()> {
    if group <= 1 {
        // kill(-1) and kill(0) mean "everybody" and "my group".
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: kill(2) takes only numbers.
    if unsafe { libc::kill(-group, signal) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How a process ended: `waitid(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It called exit with this code (0 to 255).
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
}

impl Ended {
    /// The code that shells and CRI use: the exit code, or 128 + the signal.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal,
        }
    }
}

/// Reaps any one child that has ended: `waitid(2)` with `P_ALL`. `None` when none has.
///
/// # Errors
/// None that a caller has to act on: without children it returns `None`.
pub fn reap_any() -> io::Result<Option<(i32, Ended)>> {
    wait(libc::P_ALL, 0, libc::WNOHANG)
}

/// Whether there are children that were not reaped, which may still run: `waitid(2)`.
///
/// # Errors
/// None that a caller has to act on.
pub fn has_children() -> io::Result<bool> {
    Ok(peek(libc::P_ALL, 0)?.is_some())
}

/// The result of [`reap_or_running`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Child {
    /// It is still running.
    Running,
    /// It has ended and is reaped now.
    Ended(Ended),
    /// It is not a child of the caller, or was reaped before.
    None,
}

/// Reaps the child `pid` if it has ended, without waiting.
///
/// # Errors
/// None that a caller has to act on.
pub fn reap_or_running(pid: i32) -> io::Result<Child> {
    if peek(libc::P_PID, pid.unsigned_abs())?.is_none() {
        return Ok(Child::None);
    }
    Ok(match wait(libc::P_PID, pid.unsigned_abs(), libc::WNOHANG)? {
        Some((_, ended)) => Child::Ended(ended),
        None => Child::Running,
    })
}

/// Whether `pid` is a child of the calling process not yet reaped: `waitid(2)` with `WNOWAIT`. As
/// long as it is, the number is its own.
///
/// # Errors
/// None in practice.
pub fn is_child(pid: i32) -> io::Result<bool> {
    Ok(pid > 0 && peek(libc::P_PID, pid.unsigned_abs())?.is_some())
}

/// The children of the process `pid`, as far as the kernel lists them:
/// `/proc/PID/task/TID/children`, proc_pid_task(5). Nothing without `CONFIG_PROC_CHILDREN`.
#[must_use]
pub fn children(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// A child that has ended and was not reaped, which it still is not afterwards: of all children,
/// or, with `pid`, that one.
///
/// # Errors
/// None that a caller has to act on: without children it returns `None`.
pub fn ended_child(pid: Option<i32>) -> io::Result<Option<i32>> {
    let found = match pid {
        Some(pid) => peek(libc::P_PID, pid.unsigned_abs())?,
        None => peek(libc::P_ALL, 0)?,
    };
    Ok(found.filter(|pid| *pid != 0))
}

/// `waitid(2)` with `WNOHANG` and `WNOWAIT`: `None` when there is no such child, 0 when it has not
/// ended.
fn peek(kind: libc::idtype_t, id: u32) -> io::Result<Option<i32>> {
    // SAFETY: siginfo_t is plain data for which all zero bytes are valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: `info` is a live siginfo_t; the rest are numbers.
    if unsafe { libc::waitid(kind, id, &raw mut info, options) } < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ECHILD) { Ok(None) } else { Err(error) };
    }
    // SAFETY: after a successful waitid the si_pid member is the one in use; it is zero when no
    // child has ended.
    Ok(Some(unsafe { info.si_pid() }))
}

/// Sends `signal` to the child `pid`, which the caller has not reaped yet, so that the number is
/// still its own.
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn signal_child(pid: i32, signal: i32) -> io::Result<()> {
    signal_pidfd(open_pidfd(pid)?.as_fd(), signal)
}

/// Waits for the child `pid` to end and reaps it.
///
/// # Errors
/// None that a caller has to act on: `None` when it is not a child of the caller.
pub fn wait_for(pid: i32) -> io::Result<Option<Ended>> {
    Ok(wait(libc::P_PID, pid.unsigned_abs(), 0)?.map(|(_, ended)| ended))
}

fn wait(kind: libc::idtype_t, id: u32, flags: i32) -> io::Result<Option<(i32, Ended)>> {
    // SAFETY: siginfo_t is plain data for which all zero bytes are valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: `info` is a live siginfo_t; the rest are numbers.
        let result = unsafe { libc::waitid(kind, id, &raw mut info, libc::WEXITED | libc::__WALL | flags) };
        if result == 0 {
            break;
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::ECHILD) => return Ok(None),
            _ => return Err(error),
        }
    }
    // SAFETY: after a successful waitid the si_pid and si_status members are the ones in use; with
    // WNOHANG and no child they are zero, as waitid(2) says.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let ended =
        if info.si_code == libc::CLD_EXITED { Ended::Exited(status) } else { Ended::Signaled(status) };
    Ok(Some((pid, ended)))
}

/// Replaces the program of this process: `execve(2)`. Returns only when that failed.
#[must_use]
pub fn execute(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let args: Vec<*const libc::c_char> =
        args.iter().map(|arg| arg.as_ptr()).chain([std::ptr::null()]).collect();
    let env: Vec<*const libc::c_char> =
        env.iter().map(|pair| pair.as_ptr()).chain([std::ptr::null()]).collect();
    // SAFETY: `path` and every element are NUL-terminated strings that outlive the call; both
    // arrays end with null.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends this process at once, with no destructor and no exit handler: `_exit(2)`.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

fn prctl(option: i32, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used in this file take numbers only; unused arguments are zero as
    // prctl(2) asks.
    if unsafe { libc::prctl(option, value, 0, 0, 0) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether others may read this process's memory and descriptors: `PR_SET_DUMPABLE`. Exec turns it
/// on again.
///
/// # Errors
/// None in practice.
pub fn set_dumpable(dumpable: bool) -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, libc::c_ulong::from(dumpable))
}

/// Makes orphans below this process its children: `PR_SET_CHILD_SUBREAPER`.
///
/// # Errors
/// None in practice.
pub fn become_subreaper() -> io::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1)
}

/// Makes the kernel kill this process when its parent ends: `PR_SET_PDEATHSIG`. A parent that has
/// already ended is not noticed.
///
/// # Errors
/// None in practice.
pub fn end_with_parent() -> io::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL.unsigned_abs().into())
}

/// Forbids this process and its descendants to gain privileges by exec: `PR_SET_NO_NEW_PRIVS`.
///
/// # Errors
/// None in practice.
pub fn set_no_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// Keeps the permitted capabilities over the next change of user ids: `PR_SET_KEEPCAPS`. Exec turns
/// it off.
///
/// # Errors
/// None in practice.
pub fn keep_capabilities() -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1)
}

/// Sets the name that `ps` shows for this thread, at most 15 bytes: `PR_SET_NAME`.
///
/// # Errors
/// None in practice.
pub fn set_name(name: &CStr) -> io::Result<()> {
    // SAFETY: PR_SET_NAME reads a NUL-terminated string of which it takes the first 15 bytes.
    if unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Installs a seccomp filter, an array of `struct sock_filter` (8 bytes each), on this thread:
/// `seccomp(2)`, `SECCOMP_SET_MODE_FILTER` with `flags`.
///
/// # Errors
/// `EINVAL` for a malformed filter, `EACCES` without `CAP_SYS_ADMIN` and without no_new_privs.
pub fn install_seccomp(filter: &[u8], flags: u32) -> io::Result<()> {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
    if filter.is_empty() || !filter.len().is_multiple_of(INSTRUCTION) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let count =
        u16::try_from(filter.len() / INSTRUCTION).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // Copied into instructions of the right alignment; `filter` may start anywhere.
    let mut instructions = Vec::with_capacity(usize::from(count));
    for chunk in filter.chunks_exact(INSTRUCTION) {
        instructions.push(libc::sock_filter {
            code: u16::from_ne_bytes([chunk[0], chunk[1]]),
            jt: chunk[2],
            jf: chunk[3],
            k: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        });
    }
    let program = libc::sock_fprog { len: count, filter: instructions.as_mut_ptr() };
    // SAFETY: `program` points at `count` instructions that live over the call; the kernel copies
    // and verifies them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives this process a new, empty session keyring, so that it cannot read its parent's keys:
/// `keyctl(2)`, `KEYCTL_JOIN_SESSION_KEYRING`.
///
/// # Errors
/// `ENOSYS` on a kernel without keyrings, `EDQUOT` at the key quota.
pub fn join_new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring; nothing is read through pointers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
            0,
            0,
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Marks every descriptor from `first` on close-on-exec (`CloseRange::OnExec`) or closes it:
/// `close_range(2)`.
///
/// # Errors
/// `EINVAL` when the kernel lacks the flag (before 5.11).
pub fn close_from(first: u32, when: CloseRange) -> io::Result<()> {
    let flags: libc::c_uint = match when {
        CloseRange::Now => 0,
        CloseRange::OnExec => 4,
    };
    // SAFETY: close_range(2) takes only numbers. With `Now` the caller promises to use no
    // descriptor from `first` on again; in this project only a child right before exec or before
    // work after which it ends, and a program at its start do so.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes every descriptor except for 0, 1, 2 and `kept`: [`close_from`] on all sides of them.
///
/// # Errors
/// None in practice.
pub fn close_all_but(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers: Vec<u32> = kept.iter().map(|kept| kept.as_raw_fd().unsigned_abs()).collect();
    numbers.sort_unstable();
    let mut first = 3;
    for number in numbers {
        if number > first {
            // SAFETY: as in `close_from`.
            let result = unsafe { libc::syscall(libc::SYS_close_range, first, number - 1, 0) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = first.max(number + 1);
    }
    close_from(first, CloseRange::Now)
}

/// When [`close_from`] closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseRange {
    /// At once.
    Now,
    /// At the next exec.
    OnExec,
}

/// The resource limit on open descriptors: getrlimit(2), `<asm-generic/resource.h>`.
pub const RLIMIT_NOFILE: u32 = 7;

/// Sets the soft and hard value of a resource limit (`RLIMIT_*` number): `setrlimit(2)`.
///
/// # Errors
/// `EPERM` when the hard value is raised without `CAP_SYS_RESOURCE`.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: prlimit64 with pid 0 is setrlimit on this process; `limit` is a live struct rlimit of
    // 64-bit members.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            &raw const limit,
            std::ptr::null_mut::<libc::rlimit>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The soft and hard value of a resource limit (`RLIMIT_*` number): `getrlimit(2)`.
///
/// # Errors
/// `EINVAL` for an unknown resource.
pub fn rlimit(resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: prlimit64 with pid 0 and no new value is getrlimit on this process; `limit` is a live
    // struct rlimit.
    let result = unsafe {
        libc::syscall(libc::SYS_prlimit64, 0, resource, std::ptr::null::<libc::rlimit>(), &raw mut limit)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok((limit.rlim_cur, limit.rlim_max)) }
}

/// Makes the kernel keep ended children until they are waited for, whatever the caller was started
/// with: where SIGCHLD is ignored, which is inherited, their statuses are lost and `wait(2)` fails
/// with `ECHILD`.
///
/// # Errors
/// None in practice.
pub fn keep_ended_children() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: it sets no handler.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    Ok(())
}

/// Resets every signal to its default action and unblocks all, as a new program expects: signal(7).
///
/// # Errors
/// None in practice.
pub fn reset_signals() -> io::Result<()> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    // Bypasses the C library, which keeps signals 32 and up for itself: posix_spawn(3) of glibc
    // leaves them ignored in a child, and they would stay ignored in a program whose C library uses
    // them for something else.
    let by_default = [0_u64; 4];
    for signal in 1..=64 {
        // SAFETY: all zero bytes are a kernel sigaction without a function, flags and mask; 8 is
        // the length of its mask. SIGKILL and SIGSTOP refuse with EINVAL, which is what is wanted
        // for them.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, by_default.as_ptr(), std::ptr::null_mut::<u64>(), 8)
        };
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    Ok(())
}

/// Makes the calling process the leader of a new session without a terminal: `setsid(2)`.
///
/// # Errors
/// `EPERM` when it leads a process group already.
pub fn new_session() -> io::Result<()> {
    nix::unistd::setsid()?;
    Ok(())
}

/// Makes `descriptor` also the standard stream `number` (0, 1 or 2), which stays open over exec:
/// `dup2(2)`.
///
/// # Errors
/// `EINVAL` for another number.
pub fn place_descriptor(descriptor: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    if !(0..=2).contains(&number) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: dup2 takes only numbers. Nothing in Rust owns 0, 1 or 2; their standard handles
    // borrow them.
    if unsafe { libc::dup2(descriptor.as_raw_fd(), number) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets the file mode creation mask: `umask(2)`.
pub fn set_umask(mask: u32) {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mask));
}

/// A program to start: the daemon's way to start a process, safe with threads.
#[derive(Debug)]
pub struct Program<'a> {
    /// Path of the program in this process's namespaces; `/proc/self/fd/N` works, also for a
    /// close-on-exec descriptor.
    pub path: &'a CStr,
    /// Its arguments, with the name first.
    pub args: &'a [CString],
    /// Its whole environment, as `NAME=value`.
    pub env: &'a [CString],
    /// Its descriptors 0, 1, 2, … in this order; everything else is closed by close-on-exec.
    pub descriptors: &'a [BorrowedFd<'a>],
}

/// Starts `program` in a new session: `posix_spawn(3)`, which on Linux shares the memory until exec
/// and so copies no page tables.
///
/// Signals are reset to default and unblocked in it. The caller has to reap it.
///
/// # Errors
/// Those of exec, `EAGAIN` at a process limit, `EMFILE` at the descriptor limit.
pub fn spawn(program: &Program<'_>) -> io::Result<i32> {
    use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
    let count = i32::try_from(program.descriptors.len()).map_err(|_| Errno::EMFILE)?;
    // Above the limit, glibc refuses an action with a code that nix takes for success.
    if rlimit(RLIMIT_NOFILE)?.0 < program.descriptors.len() as u64 {
        return Err(Errno::EMFILE.into());
    }
    let mut actions = PosixSpawnFileActions::init()?;
    // A descriptor may have a number that a dup2 for another one overwrites; a copy above them all
    // does not.
    let mut copies = Vec::new();
    for (fd, place) in program.descriptors.iter().zip(0..) {
        let from = if fd.as_raw_fd() < count {
            copies.push(copy_from(*fd, count)?);
            copies.last().map_or(-1, AsRawFd::as_raw_fd)
        } else {
            fd.as_raw_fd()
        };
        // This clears close-on-exec.
        actions.add_dup2(from, place)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
            | PosixSpawnFlags::from_bits_retain(POSIX_SPAWN_SETSID),
    )?;
    attributes.set_sigdefault(&nix::sys::signal::SigSet::all())?;
    attributes.set_sigmask(&nix::sys::signal::SigSet::empty())?;
    Ok(posix_spawn(program.path, &actions, &attributes, program.args, program.env)?.as_raw())
}

/// A copy of `descriptor` with a number of at least `least`, close-on-exec: `F_DUPFD_CLOEXEC` of
/// fcntl(2).
fn copy_from(descriptor: BorrowedFd<'_>, least: RawFd) -> io::Result<OwnedFd> {
    let raw = nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(least))?;
    // SAFETY: fcntl returned `raw` as a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// <spawn.h>, glibc 2.26 and musl 1.1.22.
const POSIX_SPAWN_SETSID: libc::c_int = 0x80;

/// The time at which process `pid` started, in clock ticks since boot: field 22 of
/// proc_pid_stat(5). Together with the pid it identifies a process for good; a pid alone is reused.
///
/// # Errors
/// `ENOENT`/`ESRCH` when there is no such process, `InvalidData` when the file is not as
/// documented.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// Whether the process `pid` that started at `start_time` ([`start_time`]) still exists, if only as
/// a zombie.
///
/// # Errors
/// When that cannot be determined.
pub fn is_there(pid: i32, start_time: u64) -> io::Result<bool> {
    match self::start_time(pid) {
        Ok(found) => Ok(found == start_time),
        // ESRCH when it is reaped between the open and the read.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The session of process `pid`: field 6 of proc_pid_stat(5).
///
/// # Errors
/// As with [`start_time`].
pub fn session(pid: i32) -> io::Result<i32> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&stat, 6).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

pub(crate) fn parse_start_time(stat: &[u8]) -> Option<u64> {
    parse_stat(stat, 22)
}

/// A field after the name, by its number in proc_pid_stat(5).
fn parse_stat<T: std::str::FromStr>(stat: &[u8], field: usize) -> Option<T> {
    // The name in parentheses may contain anything, even spaces and parentheses: the fields
    // continue after the last one, with number 3.
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(field.checked_sub(3)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_read_behind_any_name() {
        for name in ["sh", "a b", ")", "x) S 1 2 3 (", ""] {
            let line = format!("12 ({name}) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 424242 20 21\n");
            assert_eq!(parse_start_time(line.as_bytes()), Some(424_242), "{name:?}");
        }
        assert_eq!(parse_start_time(b""), None);
        assert_eq!(parse_start_time(b"12 (sh) S 1"), None);
    }

    #[test]
    fn own_start_time_stays_the_same() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(start_time(pid).unwrap(), start_time(pid).unwrap());
    }

    #[test]
    fn the_session_of_a_process_is_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        // SAFETY: getsid(2) takes a number.
        assert_eq!(session(pid).unwrap(), unsafe { libc::getsid(0) });
        assert!(session(0).is_err());
    }

    #[test]
    fn a_program_gets_its_descriptors_in_order() {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let args = [c"sh", c"-c", c"echo out; echo err >&2; echo three >&3"].map(CStr::to_owned);
        let descriptors = [null.as_fd(), write.as_fd(), write.as_fd(), write.as_fd()];
        let pid =
            spawn(&Program { path: c"/bin/sh", args: &args, env: &[], descriptors: &descriptors }).unwrap();
        drop(write);
        let mut text = String::new();
        io::Read::read_to_string(&mut std::fs::File::from(read), &mut text).unwrap();
        assert_eq!(text, "out\nerr\nthree\n");
        assert_eq!(wait_for(pid).unwrap(), Some(Ended::Exited(0)));
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let error = spawn(&Program { path: c"/no/such", args: &[], env: &[], descriptors: &[] }).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn only_children_that_were_not_reaped_are_children() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(is_child(pid).unwrap());
        while ended_child(Some(pid)).unwrap().is_none() {
            std::thread::yield_now();
        }
        assert_eq!(ended_child(Some(pid)).unwrap(), Some(pid));
        assert!(is_child(pid).unwrap(), "one that has ended is one still");
        child.wait().unwrap();
        assert_eq!(ended_child(Some(pid)).unwrap(), None);
        for other in [pid, 1, 0, -1, i32::MIN] {
            assert!(!is_child(other).unwrap(), "{other}");
        }
    }

    #[test]
    fn everybody_is_not_a_group() {
        for group in [-1, 0, 1] {
            assert_eq!(signal_group(group, 0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
    }
}
