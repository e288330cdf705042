//! Which cgroup hierarchies this machine has, and where they are mounted.
//!
//! Three arrangements occur, cgroups(7): *unified* (v2 only), *legacy* (controllers on v1 mounts),
//! and *hybrid* (controllers on v1, and an empty v2 mount beside them, for systemd). Hybrid is
//! legacy here: what counts is where the controllers are. The parsers are pure functions over the
//! bytes of `/proc/self/mountinfo` and `/proc/self/cgroup`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::{Direct, Driver, Error, control_file};

/// The controllers whose limits Berth sets or whose files it needs to end and count processes. On
/// v1 a container's cgroup must exist in each of their hierarchies that is mounted, and a named
/// parent must too: kubelet and cAdvisor look for the container there.
pub(crate) const NEEDED: [&str; 7] = ["cpu", "cpuacct", "cpuset", "memory", "pids", "devices", "freezer"];

/// Those of them without which a node cannot enforce its limits.
const LIMITING: [&str; 3] = ["cpu", "memory", "pids"];

/// One v1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyMount {
    /// Where it is mounted.
    pub path: PathBuf,
    /// What is bound to it: controllers, or the one entry `name=…` for a hierarchy without.
    pub controllers: Vec<String>,
}

impl LegacyMount {
    /// Whether a container must have a cgroup here. The others (blkio, net_cls, perf_event,
    /// `name=systemd` …) are followed where the parent exists, so that their accounting, and
    /// systemd's idea of who belongs to whom, stays right; nothing depends on them.
    pub(crate) fn is_needed(&self) -> bool {
        self.controllers.iter().any(|name| NEEDED.contains(&name.as_str()))
    }

    /// Whether the creator of pods' cgroups may have left this hierarchy out. A kubelet does so
    /// with `devices`, in which it sets no limit (runc's `SkipDevices`, set by kubelet's cgroup
    /// manager); what a container may open is decided by the runtime.
    pub(crate) fn is_runtimes_own(&self) -> bool {
        self.controllers.iter().all(|name| name == "devices")
    }
}

/// The cgroup file systems of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hierarchy {
    /// Cgroup v2 with the controllers.
    Unified {
        /// Its mount point, usually `/sys/fs/cgroup`.
        mount: PathBuf,
    },
    /// Cgroup v1, each hierarchy once, in the order of the mount table.
    Legacy {
        /// The hierarchies.
        mounts: Vec<LegacyMount>,
    },
}

impl Hierarchy {
    /// Looks at this process's mount namespace.
    ///
    /// # Errors
    /// [`Error::Read`] when procfs cannot be read, and those of [`Hierarchy::from_proc`].
    pub fn detect() -> Result<Self, Error> {
        let mountinfo = control_file::read(&Direct, Path::new("/proc/self/mountinfo"))?;
        let membership = control_file::read(&Direct, Path::new("/proc/self/cgroup"))?;
        Self::from_proc(&mountinfo, &membership)
    }

    /// The same from the bytes of `/proc/self/mountinfo` (proc(5)) and `/proc/self/cgroup`
    /// (cgroups(7)).
    ///
    /// [`Error::NoHierarchy`], or [`Error::ControllerNotMounted`] when cpu, memory or pids is bound
    /// to a v1 hierarchy that is not mounted: the v2 mount then lacks it too, and limits would
    /// silently not be enforced.
    pub fn from_proc(mountinfo: &[u8], membership: &[u8]) -> Result<Self, Error> {
        let mut unified: Option<(bool, PathBuf)> = None;
        let mut legacy: Vec<(bool, LegacyMount)> = Vec::new();
        for mount in mountinfo.split(|&byte| byte == b'\n').filter_map(parse_mount) {
            match mount {
                Mount::Unified { whole, path } => {
                    if unified.as_ref().is_none_or(|(had_whole, _)| whole && !had_whole) {
                        unified = Some((whole, path));
                    }
                }
                Mount::Legacy { whole, mount } => {
                    match legacy.iter_mut().find(|(_, known)| known.controllers == mount.controllers) {
                        // The same hierarchy mounted twice: the mount that shows all of it is the
                        // one to use.
                        Some(known) => {
                            if whole && !known.0 {
                                *known = (whole, mount);
                            }
                        }
                        None => legacy.push((whole, mount)),
                    }
                }
            }
        }
        let mounts: Vec<LegacyMount> = legacy.into_iter().map(|(_, mount)| mount).collect();
        let bound = parse_membership(membership);
        for controller in LIMITING {
            let is_legacy = bound.iter().any(|name| name == controller);
            if is_legacy
                && !mounts.iter().any(|mount| mount.controllers.iter().any(|name| name == controller))
            {
                return Err(Error::ControllerNotMounted { controller: controller.into() });
            }
        }
        if mounts.iter().any(LegacyMount::is_needed) {
            return Ok(Self::Legacy { mounts });
        }
        match unified {
            Some((_, mount)) => Ok(Self::Unified { mount }),
            None => Err(Error::NoHierarchy),
        }
    }

    /// Whether this is cgroup v2.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        matches!(self, Self::Unified { .. })
    }

    /// The mount of a controller: on v2 the only mount (which need not have the controller), on v1
    /// its own.
    #[must_use]
    pub fn mount_of(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::Unified { mount } => Some(mount),
            Self::Legacy { mounts } => mounts
                .iter()
                .find(|mount| mount.controllers.iter().any(|name| name == controller))
                .map(|mount| mount.path.as_path()),
        }
    }
}

enum Mount {
    Unified { whole: bool, path: PathBuf },
    Legacy { whole: bool, mount: LegacyMount },
}

/// Words among a v1 mount's options that are not controllers: the VFS's, and those of
/// `cgroup1_show_options` in the kernel.
const OPTIONS: [&str; 11] = [
    "rw",
    "ro",
    "seclabel",
    "none",
    "all",
    "noprefix",
    "xattr",
    "cpuset_v2_mode",
    "clone_children",
    "favordynmods",
    "noswap",
];

/// One line of mountinfo, when it is a cgroup mount:
/// `36 35 98:0 /root /mount/point rw,noatime shared:1 … - cgroup source rw,cpu,cpuacct`.
fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = fields.nth(3)?;
    let point = fields.next()?;
    // Optional fields, any number of them, end with a lone dash.
    let fstype = fields.by_ref().skip_while(|field| *field != b"-").nth(1)?;
    let options = fields.nth(1)?;
    let whole = root == b"/";
    let path = PathBuf::from(OsString::from_vec(unescape(point)));
    match fstype {
        b"cgroup2" => Some(Mount::Unified { whole, path }),
        b"cgroup" => {
            let options = String::from_utf8_lossy(options);
            let controllers: Vec<String> = options
                .split(',')
                .filter(|word| {
                    !word.is_empty()
                        && !OPTIONS.contains(word)
                        && (!word.contains('=') || word.starts_with("name="))
                })
                .map(str::to_owned)
                .collect();
            if controllers.is_empty() {
                return None;
            }
            Some(Mount::Legacy { whole, mount: LegacyMount { path, controllers } })
        }
        _ => None,
    }
}

/// Space, tab, line end and backslash are written as `\ooo` in mountinfo, proc(5).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|digits| matches!(digits, [b'0'..=b'3', b'0'..=b'7', b'0'..=b'7']));
        match (first, digits) {
            (b'\\', Some(digits)) => {
                plain.push(digits.iter().fold(0, |value, digit| value * 8 + (digit - b'0')));
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    plain
}

/// The controllers that are bound to v1 hierarchies, from lines `9:cpu,cpuacct:/path`. Line
/// `0::/path` is v2's.
fn parse_membership(bytes: &[u8]) -> Vec<String> {
    let mut controllers = Vec::new();
    for line in bytes.split(|&byte| byte == b'\n') {
        let mut parts = line.splitn(3, |&byte| byte == b':');
        let (Some(_), Some(names), Some(_)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let names = String::from_utf8_lossy(names);
        controllers.extend(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned));
    }
    controllers
}

impl Driver {
    /// The driver that fits this node: systemd where it runs as process 1 (sd_booted(3):
    /// `/run/systemd/system` exists) on cgroup v2. On v1 the cgroupfs driver serves: there systemd
    /// keeps its own hierarchy and lets others use the controllers.
    #[must_use]
    pub fn detect(hierarchy: &Hierarchy) -> Self {
        if hierarchy.is_unified() && Path::new("/run/systemd/system").is_dir() {
            Self::Systemd
        } else {
            Self::Cgroupfs
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &[u8] = b"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 master:2 - cgroup cgroup rw,cpu,cpuacct\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,seclabel,memory\n\
        39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids,release_agent=/x\n\
        40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn a_hybrid_machine_is_legacy() {
        let hierarchy =
            Hierarchy::from_proc(HYBRID, b"3:name=systemd:/\n2:memory:/x\n1:cpu,cpuacct:/\n0::/\n").unwrap();
        assert!(!hierarchy.is_unified());
        assert_eq!(hierarchy.mount_of("cpuacct"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(hierarchy.mount_of("memory"), Some(Path::new("/sys/fs/cgroup/memory")));
        assert_eq!(hierarchy.mount_of("pids"), Some(Path::new("/sys/fs/cgroup/pids")));
        assert_eq!(hierarchy.mount_of("name=systemd"), Some(Path::new("/sys/fs/cgroup/systemd")));
        assert_eq!(hierarchy.mount_of("hugetlb"), None);
        let Hierarchy::Legacy { mounts } = hierarchy else { unreachable!("checked above") };
        assert_eq!(mounts.len(), 4);
        assert!(mounts.iter().all(|mount| mount.is_needed() != mount.controllers[0].starts_with("name=")));
    }

    #[test]
    fn a_v2_machine_is_unified_also_with_systemds_v1_name() {
        let unified = b"25 1 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
        let expected = Hierarchy::Unified { mount: "/sys/fs/cgroup".into() };
        assert_eq!(Hierarchy::from_proc(unified, b"0::/user.slice\n").unwrap(), expected);
        let beside =
            [&unified[..], b"26 1 0:23 / /run/systemd/cg rw - cgroup cgroup rw,name=systemd\n"].concat();
        assert_eq!(Hierarchy::from_proc(&beside, b"1:name=systemd:/\n0::/\n").unwrap(), expected);
    }

    #[test]
    fn a_mount_of_a_part_gives_way_to_one_of_the_whole() {
        let table = b"1 1 0:1 /docker/x /part rw - cgroup cgroup rw,memory\n\
            2 1 0:1 / /whole rw - cgroup cgroup rw,memory\n\
            3 1 0:1 / /again rw - cgroup cgroup rw,memory\n";
        let hierarchy = Hierarchy::from_proc(table, b"").unwrap();
        assert_eq!(hierarchy.mount_of("memory"), Some(Path::new("/whole")));
    }

    #[test]
    fn a_v1_controller_that_is_not_mounted_is_an_error() {
        let unified = b"25 1 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let error = Hierarchy::from_proc(unified, b"4:memory:/\n0::/\n").unwrap_err();
        assert!(matches!(error, Error::ControllerNotMounted { controller } if controller == "memory"));
    }

    #[test]
    fn odd_tables_do_not_confuse_it() {
        for table in [
            &b""[..],
            b"\n\n\n",
            b"garbage",
            b"1 2 3 4",
            b"1 2 3 / /x rw - cgroup",
            b"1 2 3 / /x rw shared:1 cgroup cgroup rw,cpu",
            b"1 2 0:3 / /x rw - cgroup cgroup rw\n",
            b"\xff\xfe\0 \0 \0 \0 - cgroup - -",
            b"1 2 0:3 / /x rw - tmpfs cgroup2 rw,cpu\n",
        ] {
            assert!(matches!(Hierarchy::from_proc(table, b""), Err(Error::NoHierarchy)), "{table:?}");
        }
        assert!(Hierarchy::from_proc(&[b' '; 100_000], &[b':'; 100_000]).is_err());
    }

    #[test]
    fn escaped_mount_points_are_read_back() {
        for (field, plain) in [
            (&b"/a\\040b"[..], &b"/a b"[..]),
            (b"/a\\134\\011", b"/a\\\t"),
            (b"/a\\", b"/a\\"),
            (b"/a\\04", b"/a\\04"),
            (b"/a\\999", b"/a\\999"),
            (b"/a\\777", b"/a\\777"),
            (b"\\\\040", b"\\ "),
            (b"", b""),
        ] {
            assert_eq!(unescape(field), plain, "{field:?}");
        }
    }

    #[test]
    fn this_machine_has_a_hierarchy() {
        let hierarchy = Hierarchy::detect().unwrap();
        for controller in LIMITING {
            assert!(hierarchy.mount_of(controller).is_some_and(Path::is_dir), "{controller}");
        }
    }
}
