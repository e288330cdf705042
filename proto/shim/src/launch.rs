//! The plan of a container: what a shim needs to start it, and nothing that it would have to
//! interpret.
//!
//! Paths are bytes, as the kernel has them. Paths marked *host* are looked up in the shim's own
//! mount namespace and are the daemon's or the kubelet's; paths marked *inside* are looked up below
//! the container's root and may be hostile.

/// Everything about one container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Launch {
    /// The container's id: 64 lower-case hex digits.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Its root filesystem.
    #[prost(message, required, tag = "2")]
    pub rootfs: Rootfs,
    /// What is mounted in it, in this order.
    #[prost(message, repeated, tag = "3")]
    pub mounts: Vec<Mount>,
    /// Device nodes, all of them.
    #[prost(message, repeated, tag = "4")]
    pub devices: Vec<Device>,
    /// Inside: hidden, files by an empty device, directories by an empty read-only tmpfs. Absent
    /// ones are skipped.
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub masked_paths: Vec<Vec<u8>>,
    /// Inside: made read-only. Absent ones are skipped.
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub readonly_paths: Vec<Vec<u8>>,
    /// The namespaces it lives in.
    #[prost(message, required, tag = "7")]
    pub namespaces: Namespaces,
    /// The cgroup it is born in.
    #[prost(message, required, tag = "8")]
    pub cgroup: Cgroup,
    /// Its main process.
    #[prost(message, required, tag = "9")]
    pub process: Process,
    /// Host: the pod's log directory; empty for no log.
    #[prost(bytes = "vec", tag = "10")]
    pub log_directory: Vec<u8>,
    /// The log file below `log_directory`, reached through no symbolic link.
    #[prost(bytes = "vec", tag = "14")]
    pub log_name: Vec<u8>,
    /// Host: where the exit record is written.
    #[prost(bytes = "vec", tag = "11")]
    pub exit_record_path: Vec<u8>,
    /// Whether standard input is a pipe that stays open (`ContainerConfig.stdin`); else it is
    /// `/dev/null`.
    #[prost(bool, tag = "12")]
    pub stdin: bool,
    /// Whether that is closed when the first client that was attached to it leaves
    /// (`ContainerConfig.stdin_once`); never for a terminal.
    #[prost(bool, tag = "16")]
    pub stdin_once: bool,
    /// Inside: directories that are made when absent, and stay writable when the root is read-only.
    #[prost(bytes = "vec", repeated, tag = "15")]
    pub volumes: Vec<Vec<u8>>,
    /// The longest piece of a line in one log entry; longer lines are cut into partial entries. 0
    /// is the default, 16 KiB.
    #[prost(uint64, tag = "13")]
    pub max_log_line_bytes: u64,
}

/// A root filesystem: an overlay.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Rootfs {
    /// Host: the read-only layers, topmost first; at least one.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub lower_dirs: Vec<Vec<u8>>,
    /// Host: the writable layer.
    #[prost(bytes = "vec", tag = "2")]
    pub upper_dir: Vec<u8>,
    /// Host: overlay's work directory, on the filesystem of `upper_dir`.
    #[prost(bytes = "vec", tag = "3")]
    pub work_dir: Vec<u8>,
    /// Host: an empty directory that the root is mounted on, in the container's own mount namespace
    /// only.
    #[prost(bytes = "vec", tag = "4")]
    pub mount_point: Vec<u8>,
    /// The root itself is read-only; mounts in it keep their own mode.
    #[prost(bool, tag = "5")]
    pub read_only: bool,
    /// How mounts of the host reach the container's mount namespace.
    #[prost(enumeration = "Propagation", tag = "6")]
    pub propagation: i32,
}

/// Mount propagation: mount_namespaces(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Propagation {
    /// None.
    Private = 0,
    /// From the host to the container.
    Slave = 1,
    /// Both ways.
    Shared = 2,
}

/// One mount in the container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    /// Inside: where. Made when absent, as a directory or an empty file as the source asks.
    #[prost(bytes = "vec", tag = "1")]
    pub target: Vec<u8>,
    /// `MOUNT_ATTR_*` bits to set on it (`berth_sys::mount::attr`).
    #[prost(uint64, tag = "2")]
    pub attributes: u64,
    /// Whether `attributes` reach every mount below it too.
    #[prost(bool, tag = "3")]
    pub attributes_recursive: bool,
    /// Where it comes from.
    #[prost(oneof = "mount::Source", tags = "4, 5")]
    pub source: Option<mount::Source>,
    /// The target must not be reached through a symbolic link: for `/proc`, `/sys`, `/dev`, which
    /// later steps rely on.
    #[prost(bool, tag = "6")]
    pub no_symlinks: bool,
}

/// The search path of a process whose environment has none: the one that Docker images are built
/// for, and that of execvp(3) in glibc.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What may be mounted over in `/proc`, as with runc: the files that lxcfs replaces by those of the
/// container's own limits, and two that tools for checkpoints and for FIPS mode write or replace.
pub const REPLACEABLE_IN_PROC: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
];

/// The sources of a [`Mount`].
pub mod mount {
    /// Where a mount comes from.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Source {
        /// A new filesystem.
        #[prost(message, tag = "4")]
        Filesystem(Filesystem),
        /// A file or directory of the host.
        #[prost(message, tag = "5")]
        Bind(Bind),
    }

    /// A new filesystem, configured as with `fsconfig(2)`.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Filesystem {
        /// Its type.
        #[prost(string, tag = "1")]
        pub fstype: String,
        /// `key=value`, or a `flag` alone.
        #[prost(string, repeated, tag = "2")]
        pub options: Vec<String>,
        /// What shows as the device in `/proc/mounts`.
        #[prost(string, tag = "3")]
        pub source: String,
    }

    /// A bind mount, with everything that is mounted below the source when `recursive`.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Bind {
        /// Host: the source, in which symbolic links have been resolved.
        #[prost(bytes = "vec", tag = "1")]
        pub source: Vec<u8>,
        /// `MS_REC`.
        #[prost(bool, tag = "2")]
        pub recursive: bool,
        /// Its own propagation.
        #[prost(enumeration = "super::Propagation", tag = "3")]
        pub propagation: i32,
    }
}

/// A device node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Device {
    /// Inside: where.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// A block device; else a character device.
    #[prost(bool, tag = "2")]
    pub block: bool,
    /// Major number.
    #[prost(uint32, tag = "3")]
    pub major: u32,
    /// Minor number.
    #[prost(uint32, tag = "4")]
    pub minor: u32,
    /// Permission bits.
    #[prost(uint32, tag = "5")]
    pub mode: u32,
    /// Owner.
    #[prost(uint32, tag = "6")]
    pub uid: u32,
    /// Group.
    #[prost(uint32, tag = "7")]
    pub gid: u32,
}

/// The namespaces of a container. Mount is always its own.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Namespaces {
    /// Host: a pinned network namespace to join; empty for the host's.
    #[prost(bytes = "vec", tag = "1")]
    pub network: Vec<u8>,
    /// Host: a pinned IPC namespace to join; empty for the host's.
    #[prost(bytes = "vec", tag = "2")]
    pub ipc: Vec<u8>,
    /// Host: a pinned UTS namespace to join; empty for the host's.
    #[prost(bytes = "vec", tag = "3")]
    pub uts: Vec<u8>,
    /// The pid namespace.
    #[prost(oneof = "PidNamespace", tags = "4, 5, 6, 9")]
    pub pid: Option<PidNamespace>,
    /// Its own cgroup namespace, rooted at its cgroup.
    #[prost(bool, tag = "7")]
    pub own_cgroup: bool,
    /// Host: for [`PidNamespace::Join`], where a procfs of that namespace is mounted.
    #[prost(bytes = "vec", tag = "8")]
    pub procfs: Vec<u8>,
}

/// Which pid namespace a container lives in.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum PidNamespace {
    /// Its own; its main process is process 1.
    #[prost(message, tag = "4")]
    Own(()),
    /// The host's.
    #[prost(message, tag = "5")]
    Host(()),
    /// Host: the one pinned at this path.
    #[prost(bytes, tag = "6")]
    Join(Vec<u8>),
    /// That of another container. The request carries two descriptors: the main process of that
    /// container (`pidfd_open(2)`), and its pid namespace.
    #[prost(message, tag = "9")]
    Target(()),
}

/// The cgroup of a container, made beforehand.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cgroup {
    /// Host: the `tasks` file in each v1 hierarchy.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub tasks_files: Vec<Vec<u8>>,
    /// Host: its directory in the unified hierarchy; empty on pure v1.
    #[prost(bytes = "vec", tag = "2")]
    pub unified_dir: Vec<u8>,
    /// Host: the file that counts kills by the OOM killer; empty for none.
    #[prost(bytes = "vec", tag = "3")]
    pub oom_file: Vec<u8>,
    /// The key of the counter in `oom_file`.
    #[prost(string, tag = "4")]
    pub oom_key: String,
}

/// What process 1 of a pod's own pid namespace is made with.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Pause {
    /// Its cgroup.
    #[prost(message, required, tag = "1")]
    pub cgroup: Cgroup,
    /// Its AppArmor profile; empty for none.
    #[prost(string, tag = "2")]
    pub apparmor_profile: String,
    /// The pod's namespaces, in which it is too: a tracer gains nothing by it. `pid` is not used.
    #[prost(message, required, tag = "3")]
    pub namespaces: Namespaces,
    /// A filter that lets [`REAPING`] through, as `Process::seccomp_filter`; never empty.
    #[prost(bytes = "vec", tag = "4")]
    pub seccomp_filter: Vec<u8>,
}

/// What process 1 of a pod's own pid namespace calls once it is confined. Each is of use on
/// descriptors, memory and children that the process has already, so a tracer gains nothing by
/// them.
pub const REAPING: [&str; 27] = [
    "brk",
    "clock_nanosleep",
    "close",
    "close_range",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "exit",
    "exit_group",
    "futex",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "read",
    "restart_syscall",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sendmsg",
    "signalfd4",
    "wait4",
    "waitid",
    "write",
];

/// A process in a container: the main one or, with a few fields changed, one that was asked for by
/// exec.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Process {
    /// The program and its arguments; at least one. A program without a slash is looked up in
    /// `PATH`.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub args: Vec<Vec<u8>>,
    /// The environment, `NAME=value`. `HOME` is added from the passwd file when absent.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub env: Vec<Vec<u8>>,
    /// Inside: the working directory. Made when absent.
    #[prost(bytes = "vec", tag = "3")]
    pub cwd: Vec<u8>,
    /// Who it runs as.
    #[prost(message, required, tag = "4")]
    pub user: User,
    /// Capability sets.
    #[prost(message, required, tag = "5")]
    pub capabilities: Capabilities,
    /// `PR_SET_NO_NEW_PRIVS`.
    #[prost(bool, tag = "6")]
    pub no_new_privileges: bool,
    /// Resource limits to set.
    #[prost(message, repeated, tag = "7")]
    pub rlimits: Vec<Rlimit>,
    /// A seccomp filter: an array of `struct sock_filter`; empty for none.
    #[prost(bytes = "vec", tag = "8")]
    pub seccomp_filter: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    #[prost(uint32, tag = "9")]
    pub seccomp_flags: u32,
    /// `/proc/self/oom_score_adj`.
    #[prost(sint32, optional, tag = "10")]
    pub oom_score_adj: Option<i32>,
    /// Its AppArmor profile; empty for none.
    #[prost(string, tag = "11")]
    pub apparmor_profile: String,
    /// A pseudo-terminal as standard input, output and error.
    #[prost(bool, tag = "12")]
    pub terminal: bool,
    /// File mode creation mask.
    #[prost(uint32, tag = "13")]
    pub umask: u32,
    /// A filter for the way into a pid namespace where others live: `seccomp_filter`, but for the
    /// calls of [`ENTERING`], which it lets through. Empty when `seccomp_filter` lets them through
    /// itself, which is then in force all the way. Else the process has `PR_SET_NO_NEW_PRIVS` set,
    /// because the last filter is installed without any privilege.
    #[prost(bytes = "vec", tag = "15")]
    pub entry_filter: Vec<u8>,
}

/// What the shim's child calls after it has given up its privileges outside a pid namespace, up to
/// its program, each with the first arguments, which a filter can depend on.
///
/// The clone is one of `CLONE_PARENT`, the ioctl a `TIOCSCTTY`.
pub const ENTERING: [(&str, &[u64]); 15] = [
    ("clone", &[0x8000]),
    ("read", &[]),
    ("write", &[]),
    ("close", &[]),
    ("setsid", &[]),
    ("ioctl", &[0, 0x540e]),
    ("execve", &[]),
    ("exit_group", &[]),
    // Memory, which may come and go in between.
    ("brk", &[]),
    ("mmap", &[]),
    ("mremap", &[]),
    ("munmap", &[]),
    ("madvise", &[]),
    // What a limit of capabilities takes that comes after the filter, and the name of the maker.
    ("capset", &[]),
    ("prctl", &[]),
];

/// What a process calls besides [`ENTERING`] when it has an `entry_filter`:
/// `SECCOMP_SET_MODE_FILTER`.
pub const LAST_FILTER: (&str, &[u64]) = ("seccomp", &[1]);

/// Who a process runs as, in the words of the request; resolved by the container's own passwd and
/// group files.
#[derive(Clone, PartialEq, prost::Message)]
pub struct User {
    /// A number or a name, with `:` and a group (number or name) behind it if the image says so;
    /// empty is user 0.
    #[prost(string, tag = "1")]
    pub user: String,
    /// The primary group, whatever the files say.
    #[prost(uint32, optional, tag = "2")]
    pub group: Option<u32>,
    /// Supplementary groups of the request.
    #[prost(uint32, repeated, tag = "3")]
    pub supplementary_groups: Vec<u32>,
    /// Add the groups that the group file lists the user in (`SupplementalGroupsPolicy.Merge`).
    #[prost(bool, tag = "4")]
    pub merge_groups: bool,
}

/// Capability sets as bits by number: capabilities(7).
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Capabilities {
    /// Bounding set.
    #[prost(fixed64, tag = "1")]
    pub bounding: u64,
    /// Effective set.
    #[prost(fixed64, tag = "2")]
    pub effective: u64,
    /// Permitted set.
    #[prost(fixed64, tag = "3")]
    pub permitted: u64,
    /// Inheritable set.
    #[prost(fixed64, tag = "4")]
    pub inheritable: u64,
    /// Ambient set.
    #[prost(fixed64, tag = "5")]
    pub ambient: u64,
}

/// A resource limit: getrlimit(2).
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Rlimit {
    /// `RLIMIT_*`.
    #[prost(uint32, tag = "1")]
    pub resource: u32,
    /// Soft value.
    #[prost(uint64, tag = "2")]
    pub soft: u64,
    /// Hard value.
    #[prost(uint64, tag = "3")]
    pub hard: u64,
}
