//! RuntimeDefault: the profile for containers that ask for the runtime's own.
//!
//! An allow list, arranged by the purpose of the calls. A call is on it when an ordinary program
//! may need it and the kernel's own checks (ids, capabilities, namespaces) decide about its use;
//! calls that need a capability are on it when the container has that capability, because that was
//! a decision. Off the list are calls that reach into the whole machine, that widen the kernel's
//! attack surface without need (io_uring, userfaultfd, keyrings, AF_VSOCK and AF_ALG sockets), and
//! relics. Every call of the tables is either on a list here or on [`REFUSED`], each with its
//! group's reason; a test checks that none is forgotten.

use std::collections::BTreeSet;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator,
    LinuxSyscall,
};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// All `CLONE_NEW*` flags that clone(2) takes; `CLONE_NEWTIME` shares its bit with the exit signal
/// there and is for clone3 and unshare only.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// Address families of socket(2). AF_ALG exposes the kernel's cipher code to everyone
/// (CVE-2026-31431 and earlier ones); AF_VSOCK reaches the hypervisor and, on a host of virtual
/// machines, all of them, past every network policy.
const AF_ALG: u64 = 38;
/// The other families above that: NFC, and those after AF_VSOCK (40), up to MCTP in Linux 6.18. One
/// by one, not "above 40": the kernel cuts the argument down to an int, so 2^32 + 38, which is
/// above 40, is AF_ALG to it.
const AF_ABOVE_ALG: [u64; 6] = [39, 41, 42, 43, 44, 45];

/// personality(2): Linux, 32-bit, either with `UNAME26`, and the query for the current one. Not
/// `ADDR_NO_RANDOMIZE` and the like.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Calls that any container may make.
const ALLOWED: [&[&str]; 13] = [
    // Files: contents.
    &[
        "_llseek",
        "close",
        "close_range",
        "copy_file_range",
        "creat",
        "dup",
        "dup2",
        "dup3",
        "fadvise64",
        "fadvise64_64",
        "fallocate",
        "fcntl",
        "fcntl64",
        "fdatasync",
        "flock",
        "fsync",
        "ftruncate",
        "ftruncate64",
        "ioctl",
        "lseek",
        "open",
        "openat",
        "openat2",
        "pread64",
        "preadv",
        "preadv2",
        "pwrite64",
        "pwritev",
        "pwritev2",
        "read",
        "readahead",
        "readv",
        "sendfile",
        "sendfile64",
        "splice",
        "sync",
        "sync_file_range",
        "syncfs",
        "tee",
        "truncate",
        "truncate64",
        "vmsplice",
        "write",
        "writev",
    ],
    // Files: names, attributes, directories.
    &[
        "access",
        "chdir",
        "chmod",
        "chown",
        "chown32",
        "faccessat",
        "faccessat2",
        "fchdir",
        "fchmod",
        "fchmodat",
        "fchmodat2",
        "fchown",
        "fchown32",
        "fchownat",
        "fgetxattr",
        "file_getattr",
        "file_setattr",
        "flistxattr",
        "fremovexattr",
        "fsetxattr",
        "fstat",
        "fstat64",
        "fstatat64",
        "fstatfs",
        "fstatfs64",
        "futimesat",
        "getcwd",
        "getdents",
        "getdents64",
        "getxattr",
        "getxattrat",
        "lchown",
        "lchown32",
        "lgetxattr",
        "link",
        "linkat",
        "listxattr",
        "listxattrat",
        "llistxattr",
        "lremovexattr",
        "lsetxattr",
        "lstat",
        "lstat64",
        "mkdir",
        "mkdirat",
        "mknod",
        "mknodat",
        "name_to_handle_at",
        "newfstatat",
        "readlink",
        "readlinkat",
        "removexattr",
        "removexattrat",
        "rename",
        "renameat",
        "renameat2",
        "rmdir",
        "setxattr",
        "setxattrat",
        "stat",
        "stat64",
        "statfs",
        "statfs64",
        "statx",
        "symlink",
        "symlinkat",
        "umask",
        "unlink",
        "unlinkat",
        "utime",
        "utimensat",
        "utimensat_time64",
        "utimes",
    ],
    // Waiting for files and events.
    &[
        "_newselect",
        "epoll_create",
        "epoll_create1",
        "epoll_ctl",
        "epoll_ctl_old",
        "epoll_pwait",
        "epoll_pwait2",
        "epoll_wait",
        "epoll_wait_old",
        "eventfd",
        "eventfd2",
        "fanotify_mark",
        "inotify_add_watch",
        "inotify_init",
        "inotify_init1",
        "inotify_rm_watch",
        "pipe",
        "pipe2",
        "poll",
        "ppoll",
        "ppoll_time64",
        "pselect6",
        "pselect6_time64",
        "select",
        "signalfd",
        "signalfd4",
    ],
    // Asynchronous I/O of the older kind.
    &[
        "io_cancel",
        "io_destroy",
        "io_getevents",
        "io_pgetevents",
        "io_pgetevents_time64",
        "io_setup",
        "io_submit",
    ],
    // Memory.
    &[
        "brk",
        "cachestat",
        "madvise",
        "map_shadow_stack",
        "membarrier",
        "memfd_create",
        "memfd_secret",
        "mincore",
        "mlock",
        "mlock2",
        "mlockall",
        "mmap",
        "mmap2",
        "mprotect",
        "mremap",
        "mseal",
        "msync",
        "munlock",
        "munlockall",
        "munmap",
        "pkey_alloc",
        "pkey_free",
        "pkey_mprotect",
        "remap_file_pages",
    ],
    // Processes and threads. clone and clone3 have rules of their own.
    &[
        "arch_prctl",
        "execve",
        "execveat",
        "exit",
        "exit_group",
        "fork",
        "futex",
        "futex_requeue",
        "futex_time64",
        "futex_wait",
        "futex_waitv",
        "futex_wake",
        "get_robust_list",
        "get_thread_area",
        "getcpu",
        "getpgid",
        "getpgrp",
        "getpid",
        "getppid",
        "getsid",
        "gettid",
        "modify_ldt",
        "pause",
        "pidfd_open",
        "pidfd_send_signal",
        "prctl",
        "process_mrelease",
        "restart_syscall",
        "rseq",
        "set_robust_list",
        "set_thread_area",
        "set_tid_address",
        "setpgid",
        "setsid",
        "uname",
        // The kernel's own trampoline makes this one when a probe of the host returns; refused, the
        // probed program would crash.
        "uretprobe",
        "vfork",
        "wait4",
        "waitid",
        "waitpid",
    ],
    // Debuggers and sandboxes. The bypass of seccomp by ptrace was closed in Linux 4.8.
    &[
        "landlock_add_rule",
        "landlock_create_ruleset",
        "landlock_restrict_self",
        "lsm_get_self_attr",
        "lsm_list_modules",
        "lsm_set_self_attr",
        "ptrace",
        "seccomp",
    ],
    // Signals.
    &[
        "kill",
        "rt_sigaction",
        "rt_sigpending",
        "rt_sigprocmask",
        "rt_sigqueueinfo",
        "rt_sigreturn",
        "rt_sigsuspend",
        "rt_sigtimedwait",
        "rt_sigtimedwait_time64",
        "rt_tgsigqueueinfo",
        "sgetmask",
        "sigaction",
        "sigaltstack",
        "signal",
        "sigpending",
        "sigprocmask",
        "sigreturn",
        "sigsuspend",
        "ssetmask",
        "tgkill",
        "tkill",
    ],
    // Users, groups, capabilities.
    &[
        "capget",
        "capset",
        "getegid",
        "getegid32",
        "geteuid",
        "geteuid32",
        "getgid",
        "getgid32",
        "getgroups",
        "getgroups32",
        "getresgid",
        "getresgid32",
        "getresuid",
        "getresuid32",
        "getuid",
        "getuid32",
        "setfsgid",
        "setfsgid32",
        "setfsuid",
        "setfsuid32",
        "setgid",
        "setgid32",
        "setgroups",
        "setgroups32",
        "setregid",
        "setregid32",
        "setresgid",
        "setresgid32",
        "setresuid",
        "setresuid32",
        "setreuid",
        "setreuid32",
        "setuid",
        "setuid32",
    ],
    // Scheduling, limits, accounting.
    &[
        "getpriority",
        "getrlimit",
        "getrusage",
        "ioprio_get",
        "ioprio_set",
        "nice",
        "prlimit64",
        "sched_get_priority_max",
        "sched_get_priority_min",
        "sched_getaffinity",
        "sched_getattr",
        "sched_getparam",
        "sched_getscheduler",
        "sched_rr_get_interval",
        "sched_rr_get_interval_time64",
        "sched_setaffinity",
        "sched_setattr",
        "sched_setparam",
        "sched_setscheduler",
        "sched_yield",
        "setpriority",
        "setrlimit",
        "sysinfo",
        "times",
        "ugetrlimit",
    ],
    // Time. The adjtime family only reads without CAP_SYS_TIME.
    &[
        "adjtimex",
        "alarm",
        "clock_adjtime",
        "clock_adjtime64",
        "clock_getres",
        "clock_getres_time64",
        "clock_gettime",
        "clock_gettime64",
        "clock_nanosleep",
        "clock_nanosleep_time64",
        "getitimer",
        "gettimeofday",
        "nanosleep",
        "setitimer",
        "time",
        "timer_create",
        "timer_delete",
        "timer_getoverrun",
        "timer_gettime",
        "timer_gettime64",
        "timer_settime",
        "timer_settime64",
        "timerfd_create",
        "timerfd_gettime",
        "timerfd_gettime64",
        "timerfd_settime",
        "timerfd_settime64",
    ],
    // Existing sockets. Creating them has its own rules.
    &[
        "accept",
        "accept4",
        "bind",
        "connect",
        "getpeername",
        "getsockname",
        "getsockopt",
        "listen",
        "recv",
        "recvfrom",
        "recvmmsg",
        "recvmmsg_time64",
        "recvmsg",
        "send",
        "sendmmsg",
        "sendmsg",
        "sendto",
        "setsockopt",
        "shutdown",
    ],
    // Messages, semaphores, shared memory, random numbers.
    &[
        "getrandom",
        "ipc",
        "mq_getsetattr",
        "mq_notify",
        "mq_open",
        "mq_timedreceive",
        "mq_timedreceive_time64",
        "mq_timedsend",
        "mq_timedsend_time64",
        "mq_unlink",
        "msgctl",
        "msgget",
        "msgrcv",
        "msgsnd",
        "semctl",
        "semget",
        "semop",
        "semtimedop",
        "semtimedop_time64",
        "shmat",
        "shmctl",
        "shmdt",
        "shmget",
    ],
];

/// Calls that one of these capabilities opens: capabilities(7).
const WITH_CAPABILITY: [(&str, &[&str]); 14] = [
    ("CAP_BPF", &["bpf"]),
    ("CAP_DAC_READ_SEARCH", &["open_by_handle_at"]),
    ("CAP_PERFMON", &["perf_event_open"]),
    (
        "CAP_SYS_ADMIN",
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "listmount",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "open_tree_attr",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "statmount",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    ("CAP_SYS_BOOT", &["reboot"]),
    ("CAP_SYS_CHROOT", &["chroot"]),
    ("CAP_SYS_MODULE", &["delete_module", "finit_module", "init_module"]),
    ("CAP_SYS_NICE", &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    ("CAP_SYS_PACCT", &["acct"]),
    ("CAP_SYS_PTRACE", &["kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev"]),
    ("CAP_SYS_RAWIO", &["ioperm", "iopl"]),
    ("CAP_SYS_TIME", &["clock_settime", "clock_settime64", "settimeofday", "stime"]),
    ("CAP_SYS_TTY_CONFIG", &["vhangup"]),
    ("CAP_SYSLOG", &["syslog"]),
];

/// Calls that have conditions; see [`default_profile`]. Only the test that every call is decided
/// reads this. `clone` and `clone3` are also among those that a capability opens.
#[cfg(test)]
const CONDITIONAL: [&str; 6] = ["clone", "clone3", "personality", "socket", "socketcall", "socketpair"];

/// The rest, refused with `EPERM` whatever the capabilities. Only the test that every call is
/// decided reads this.
#[cfg(test)]
const REFUSED: [&[&str]; 5] = [
    // They affect the whole machine: another kernel, swap, the root of the mount tree.
    &["kexec_file_load", "kexec_load", "pivot_root", "swapoff", "swapon"],
    // Attack surface without need: keyrings are not namespaced, io_uring does calls that no filter
    // sees, userfaultfd makes races easy.
    &[
        "add_key",
        "io_uring_enter",
        "io_uring_register",
        "io_uring_setup",
        "keyctl",
        "request_key",
        "uprobe",
        "userfaultfd",
        "vm86",
        "vm86old",
    ],
    // Moving the memory of others between nodes.
    &["migrate_pages", "move_pages"],
    // Superseded, and little tested since.
    &["_sysctl", "bdflush", "nfsservctl", "sysfs", "uselib", "ustat"],
    // Never implemented, or removed.
    &[
        "afs_syscall",
        "break",
        "create_module",
        "ftime",
        "get_kernel_syms",
        "getpmsg",
        "gtty",
        "idle",
        "lock",
        "mpx",
        "oldfstat",
        "oldlstat",
        "oldolduname",
        "oldstat",
        "olduname",
        "prof",
        "profil",
        "putpmsg",
        "query_module",
        "readdir",
        "security",
        "stty",
        "tuxcall",
        "ulimit",
        "vserver",
    ],
];

/// The profile for a container with these capabilities (`CAP_SYS_ADMIN` or `SYS_ADMIN`; unknown
/// names mean nothing).
///
/// Besides the lists: `clone` creates no namespaces, and `clone3`, whose flags a filter cannot see,
/// is reported as not implemented, so that C libraries use `clone`; both are free with
/// CAP_SYS_ADMIN. `socket` and `socketpair` create neither AF_ALG nor AF_VSOCK sockets; the way to
/// them through i386's `socketcall`, where a filter cannot see the family, is closed (`ENOSYS`:
/// musl and Go then use the direct calls, which Linux has had since 4.3; a 32-bit glibc does not,
/// and needs another profile). `personality` takes five harmless values.
///
/// Covers x86_64 with i386; x32 is left out, since it doubles what can be reached and is unused.
#[must_use]
pub fn default_profile<'a>(capabilities: impl IntoIterator<Item = &'a str>) -> LinuxSeccomp {
    let has: BTreeSet<&str> =
        capabilities.into_iter().map(|name| name.strip_prefix("CAP_").unwrap_or(name)).collect();
    let opened: BTreeSet<&str> = WITH_CAPABILITY
        .iter()
        .filter(|(capability, _)| has.contains(capability.strip_prefix("CAP_").unwrap_or(capability)))
        .flat_map(|(_, calls)| calls.iter().copied())
        .collect();
    let mut rules = vec![allow(ALLOWED.concat(), None)];
    if !opened.is_empty() {
        rules.push(allow(opened.iter().copied().collect(), None));
    }
    if !opened.contains("clone") {
        rules.push(allow(vec!["clone"], Some(masked(0, CLONE_NAMESPACES, 0))));
    }
    if !opened.contains("clone3") {
        rules.push(refuse_as_missing("clone3", None));
    }
    for value in PERSONALITIES {
        rules.push(allow(vec!["personality"], Some(arg(0, LinuxSeccompOperator::ScmpCmpEq, value))));
    }
    let below = arg(0, LinuxSeccompOperator::ScmpCmpLt, AF_ALG);
    let above = AF_ABOVE_ALG.map(|family| arg(0, LinuxSeccompOperator::ScmpCmpEq, family));
    // All conditions on one argument in one rule: any of them suffices.
    let mut sockets = allow(vec!["socket", "socketpair"], None);
    sockets.set_args(Some(std::iter::once(below).chain(above).collect()));
    rules.push(sockets);
    // Call 1 is socket and call 8 socketpair, <linux/net.h>; the rest of socketcall is allowed with
    // the calls it stands for.
    for call in [1, 8] {
        rules.push(refuse_as_missing("socketcall", Some(arg(0, LinuxSeccompOperator::ScmpCmpEq, call))));
    }
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(vec![Arch::ScmpArchNative, Arch::ScmpArchX86]))
        .set_syscalls(Some(rules));
    profile
}

fn allow(names: Vec<&str>, condition: Option<LinuxSeccompArg>) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.into_iter().map(str::to_owned).collect())
        .set_action(LinuxSeccompAction::ScmpActAllow)
        .set_args(condition.map(|condition| vec![condition]));
    rule
}

fn refuse_as_missing(name: &str, condition: Option<LinuxSeccompArg>) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(vec![name.to_owned()])
        .set_action(LinuxSeccompAction::ScmpActErrno)
        .set_errno_ret(Some(ENOSYS))
        .set_args(condition.map(|condition| vec![condition]));
    rule
}

fn arg(index: usize, op: LinuxSeccompOperator, value: u64) -> LinuxSeccompArg {
    build(LinuxSeccompArgBuilder::default().index(index).op(op).value(value))
}

fn masked(index: usize, mask: u64, value: u64) -> LinuxSeccompArg {
    let op = LinuxSeccompOperator::ScmpCmpMaskedEq;
    build(LinuxSeccompArgBuilder::default().index(index).op(op).value(mask).value_two(value))
}

fn build(builder: LinuxSeccompArgBuilder) -> LinuxSeccompArg {
    builder.build().expect("a builder whose fields all have defaults has nothing to miss")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{Abi, X32_BIT};
    use crate::evaluate::Call;
    use crate::meaning::{meaning, run};
    use crate::{Filter, compile};

    const ALLOW: u32 = 0x7fff_0000;
    const REFUSE: u32 = 0x0005_0001;
    const MISSING: u32 = 0x0005_0026;
    const KILL: u32 = 0x8000_0000;

    /// The capabilities that containers have by default.
    const USUAL: [&str; 14] = [
        "CAP_AUDIT_WRITE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    ];

    fn filter(capabilities: &[&str]) -> Filter {
        compile(&default_profile(capabilities.iter().copied())).unwrap()
    }

    #[test]
    fn every_call_of_the_tables_is_decided_once() {
        let mut decided: Vec<&str> = ALLOWED.concat();
        let opened: BTreeSet<&str> =
            WITH_CAPABILITY.iter().flat_map(|(_, calls)| calls.iter().copied()).collect();
        decided.extend(opened.iter().filter(|call| !CONDITIONAL.contains(call)));
        decided.extend(CONDITIONAL);
        decided.extend(REFUSED.concat());
        let all: BTreeSet<&str> = decided.iter().copied().collect();
        assert_eq!(all.len(), decided.len(), "one is decided twice");
        // The tables contain one name that is a keyword of Rust: `r#break`.
        for table in [
            syscalls::x86_64::Sysno::iter().map(|call| call.name()).collect::<Vec<_>>(),
            syscalls::x86::Sysno::iter().map(|call| call.name()).collect(),
        ] {
            let forgotten: Vec<_> = table
                .into_iter()
                .map(|name| name.trim_start_matches("r#"))
                .filter(|name| !all.contains(name))
                .collect();
            assert!(forgotten.is_empty(), "{forgotten:?}");
        }
        // Names inside socketcall have no number, and the crate spells `break`, which no kernel
        // ever implemented, as Rust does.
        let nowhere: Vec<_> = all
            .into_iter()
            .filter(|name| Abi::X86_64.number(name).is_none() && Abi::X86.number(name).is_none())
            .collect();
        assert_eq!(nowhere, ["break", "recv", "send"]);
    }

    type Verdict = (&'static str, &'static [u64], Option<u32>, Option<u32>);

    /// Name, arguments, and the answer on amd64 and on i386 (nothing where the call does not exist)
    /// with the usual capabilities.
    #[rustfmt::skip]
    const VERDICTS: [Verdict; 75] = [
        ("read", &[], Some(ALLOW), Some(ALLOW)),
        ("openat", &[], Some(ALLOW), Some(ALLOW)),
        ("openat2", &[], Some(ALLOW), Some(ALLOW)),
        ("execve", &[], Some(ALLOW), Some(ALLOW)),
        ("exit_group", &[], Some(ALLOW), Some(ALLOW)),
        ("mmap", &[], Some(ALLOW), Some(ALLOW)),
        ("mmap2", &[], None, Some(ALLOW)),
        ("futex", &[], Some(ALLOW), Some(ALLOW)),
        ("futex_time64", &[], None, Some(ALLOW)),
        ("futex_waitv", &[], Some(ALLOW), Some(ALLOW)),
        ("rseq", &[], Some(ALLOW), Some(ALLOW)),
        ("statx", &[], Some(ALLOW), Some(ALLOW)),
        ("cachestat", &[], Some(ALLOW), Some(ALLOW)),
        ("fchmodat2", &[], Some(ALLOW), Some(ALLOW)),
        ("map_shadow_stack", &[], Some(ALLOW), Some(ALLOW)),
        ("mseal", &[], Some(ALLOW), Some(ALLOW)),
        ("setxattrat", &[], Some(ALLOW), Some(ALLOW)),
        ("landlock_restrict_self", &[], Some(ALLOW), Some(ALLOW)),
        ("seccomp", &[], Some(ALLOW), Some(ALLOW)),
        ("ptrace", &[], Some(ALLOW), Some(ALLOW)),
        ("pidfd_open", &[], Some(ALLOW), Some(ALLOW)),
        ("mknod", &[], Some(ALLOW), Some(ALLOW)),
        ("chroot", &[], Some(ALLOW), Some(ALLOW)),
        ("setuid32", &[], None, Some(ALLOW)),
        ("clock_gettime64", &[], None, Some(ALLOW)),
        ("uretprobe", &[], Some(ALLOW), None),
        ("clone", &[0x3d_0f00], Some(ALLOW), Some(ALLOW)),
        ("clone", &[17], Some(ALLOW), Some(ALLOW)),
        ("clone", &[0x1000_0011], Some(REFUSE), Some(REFUSE)),
        ("clone", &[0x2_0000], Some(REFUSE), Some(REFUSE)),
        ("clone", &[0x4000_0000], Some(REFUSE), Some(REFUSE)),
        ("clone3", &[], Some(MISSING), Some(MISSING)),
        ("unshare", &[0x1000_0000], Some(REFUSE), Some(REFUSE)),
        ("setns", &[], Some(REFUSE), Some(REFUSE)),
        ("mount", &[], Some(REFUSE), Some(REFUSE)),
        ("umount2", &[], Some(REFUSE), Some(REFUSE)),
        ("umount", &[], None, Some(REFUSE)),
        ("fsopen", &[], Some(REFUSE), Some(REFUSE)),
        ("move_mount", &[], Some(REFUSE), Some(REFUSE)),
        ("open_tree", &[], Some(REFUSE), Some(REFUSE)),
        ("statmount", &[], Some(REFUSE), Some(REFUSE)),
        ("listmount", &[], Some(REFUSE), Some(REFUSE)),
        ("pivot_root", &[], Some(REFUSE), Some(REFUSE)),
        ("sethostname", &[], Some(REFUSE), Some(REFUSE)),
        ("bpf", &[], Some(REFUSE), Some(REFUSE)),
        ("perf_event_open", &[], Some(REFUSE), Some(REFUSE)),
        ("keyctl", &[], Some(REFUSE), Some(REFUSE)),
        ("add_key", &[], Some(REFUSE), Some(REFUSE)),
        ("request_key", &[], Some(REFUSE), Some(REFUSE)),
        ("io_uring_setup", &[], Some(REFUSE), Some(REFUSE)),
        ("io_uring_enter", &[], Some(REFUSE), Some(REFUSE)),
        ("userfaultfd", &[], Some(REFUSE), Some(REFUSE)),
        ("init_module", &[], Some(REFUSE), Some(REFUSE)),
        ("finit_module", &[], Some(REFUSE), Some(REFUSE)),
        ("kexec_load", &[], Some(REFUSE), Some(REFUSE)),
        ("reboot", &[], Some(REFUSE), Some(REFUSE)),
        ("swapon", &[], Some(REFUSE), Some(REFUSE)),
        ("settimeofday", &[], Some(REFUSE), Some(REFUSE)),
        ("open_by_handle_at", &[], Some(REFUSE), Some(REFUSE)),
        ("process_vm_readv", &[], Some(REFUSE), Some(REFUSE)),
        ("kcmp", &[], Some(REFUSE), Some(REFUSE)),
        ("syslog", &[], Some(REFUSE), Some(REFUSE)),
        ("mbind", &[], Some(REFUSE), Some(REFUSE)),
        ("personality", &[0], Some(ALLOW), Some(ALLOW)),
        ("personality", &[0xffff_ffff], Some(ALLOW), Some(ALLOW)),
        ("personality", &[0x4_0000], Some(REFUSE), Some(REFUSE)),
        ("socket", &[1], Some(ALLOW), Some(ALLOW)),
        ("socket", &[10], Some(ALLOW), Some(ALLOW)),
        ("socket", &[38], Some(REFUSE), Some(REFUSE)),
        ("socket", &[40], Some(REFUSE), Some(REFUSE)),
        ("socketpair", &[40], Some(REFUSE), Some(REFUSE)),
        ("socketcall", &[1], None, Some(MISSING)),
        ("socketcall", &[8], None, Some(MISSING)),
        ("socketcall", &[3], None, Some(ALLOW)),
        ("ipc", &[21], None, Some(ALLOW)),
    ];

    #[test]
    fn the_verdict_table_holds_on_amd64_and_i386() {
        let filter = filter(&USUAL);
        for (name, args, amd64, i386) in VERDICTS {
            for (abi, expected) in [(Abi::X86_64, amd64), (Abi::X86, i386)] {
                match (abi.number(name), expected) {
                    (None, None) => {}
                    (Some(_), Some(expected)) => {
                        let verdict = run(&filter.bytes, &Call::new(abi, name, args));
                        assert_eq!(verdict, expected, "{name} {args:x?} on {abi:?}: {verdict:#x}");
                    }
                    _ => panic!("{name} on {abi:?}"),
                }
            }
        }
    }

    #[test]
    fn numbers_that_mean_nothing_are_said_to_be_missing() {
        let filter = filter(&USUAL);
        for number in [400, 470, 1000, 65_535, 0x3fff_ffff, X32_BIT, X32_BIT | 1, X32_BIT | 512, u32::MAX] {
            let call = Call { number, arch: Abi::X86_64.audit_arch(), args: [0; 6] };
            assert_eq!(run(&filter.bytes, &call), MISSING, "{number:#x}");
        }
        let call = Call { number: 0x4000_0003, arch: Abi::X86.audit_arch(), args: [0; 6] };
        assert_eq!(run(&filter.bytes, &call), MISSING);
        let elsewhere = Call { number: 63, arch: Abi::Aarch64.audit_arch(), args: [0; 6] };
        assert_eq!(run(&filter.bytes, &elsewhere), KILL);
    }

    #[test]
    fn high_halves_of_arguments_count_on_amd64_only() {
        let filter = filter(&USUAL);
        let wide = 1 << 32;
        for (name, arg, amd64, i386) in [
            // The kernel takes an int and ignores the high half; the filter must not be fooled by
            // it.
            ("socket", wide | 38, REFUSE, REFUSE),
            ("socket", wide | 1, REFUSE, ALLOW),
            ("personality", wide, REFUSE, ALLOW),
            ("clone", wide, ALLOW, ALLOW),
        ] {
            assert_eq!(run(&filter.bytes, &Call::new(Abi::X86_64, name, &[arg])), amd64, "{name}");
            assert_eq!(run(&filter.bytes, &Call::new(Abi::X86, name, &[arg])), i386, "{name}");
        }
    }

    #[test]
    fn capabilities_open_their_calls_and_no_others() {
        for (capability, calls) in WITH_CAPABILITY {
            let without = filter(&[]);
            for name in [capability, capability.strip_prefix("CAP_").unwrap()] {
                let with = filter(&[name]);
                for abi in [Abi::X86_64, Abi::X86] {
                    for call in calls.iter().filter(|call| abi.number(call).is_some()) {
                        let call = Call::new(abi, call, &[0x1000_0000]);
                        assert_eq!(run(&with.bytes, &call), ALLOW, "{name} {call:?}");
                        assert_ne!(run(&without.bytes, &call), ALLOW, "{name} {call:?}");
                    }
                    for refused in REFUSED.concat().iter().filter(|call| abi.number(call).is_some()) {
                        assert_eq!(
                            run(&with.bytes, &Call::new(abi, refused, &[])),
                            REFUSE,
                            "{name} {refused}"
                        );
                    }
                }
            }
        }
        assert_eq!(filter(&["CAP_NO_SUCH"]), filter(&[]));
    }

    #[test]
    fn all_calls_of_both_tables_are_as_the_profile_means() {
        for capabilities in [&USUAL[..], &["CAP_SYS_ADMIN", "CAP_SYSLOG"]] {
            let profile = default_profile(capabilities.iter().copied());
            let filter = compile(&profile).unwrap();
            for arch in [Abi::X86_64.audit_arch(), Abi::X86.audit_arch()] {
                for number in (0..480).chain(X32_BIT..X32_BIT + 10) {
                    for first in [1, 8, 39, 40, 0x2_0000, u64::MAX] {
                        let call = Call { number, arch, args: [first, 0, 0, 0, 0, 0] };
                        assert_eq!(run(&filter.bytes, &call), meaning(&profile, &call), "{call:x?}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_filter_is_short() {
        let instructions = filter(&USUAL).bytes.len() / 8;
        assert!(instructions < 700, "{instructions}");
    }
}
