//! Devices: which nodes are in a container, which ones its cgroup allows, and what a request's paths stand for on the host.
//!
//! Nodes are made only in the container's own `/dev` and root. Where something is mounted, the mount has what belongs there, and a
//! node would be made in a directory of the host. Looking up ([`resolve_devices`], [`host_devices`]) touches the host's `/dev` and blocks.

use super::{Inputs, mounts};
use berth_cgroup::{Access, DeviceKind, DevicePolicy, DeviceRule, default_devices};
use berth_model::container::Device;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Devices of one request, those in a directory counted one by one. The cgroup crate takes 1024 rules, of which a few are the default
/// ones; no real container comes near.
pub const MAX_DEVICES: usize = 1000;

/// Entries of directories that are looked at for one request: a `/dev` of a large machine has some ten thousand.
const MAX_ENTRIES: usize = 65_536;

/// How deep directories are followed; `/dev/bus/usb/001/001` is 3 below `/dev`.
const MAX_DEPTH: usize = 8;

/// Where devices are.
const DEV: &str = "/dev";

/// Not passed on from the host, not even to privileged containers: the first is the machine's, the second a link into the container's own devpts.
const NEVER_THE_HOSTS: [&str; 2] = ["/dev/console", "/dev/ptmx"];

/// OCI runtime-spec "Default Devices", but for `/dev/console` and `/dev/ptmx`, see [`NEVER_THE_HOSTS`]: name, major, minor.
const DEFAULT_NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// A device of the host, looked up, and its place in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedDevice {
    /// In the container; absolute, without `..`.
    pub container_path: PathBuf,
    /// Character or block.
    pub kind: DeviceKind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits, as on the host.
    pub mode: u32,
    /// Owner, as on the host.
    pub uid: u32,
    /// Group, as on the host.
    pub gid: u32,
    /// What the container may do with it.
    pub access: Access,
}

/// A device of the request that cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It is not there, or cannot be looked at.
    #[error("devices: look at {path:?}")]
    Look {
        /// What was looked at.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It is not below `/dev`, or a link leads out of it.
    #[error("devices: {asked:?} is {found:?}, which is not in /dev")]
    Outside {
        /// `Device.host_path`.
        asked: String,
        /// Where it leads.
        found: PathBuf,
    },
    /// Neither a device nor a directory.
    #[error("devices: {0:?} is not a device")]
    NotADevice(String),
    /// `Device.container_path` that no node can have.
    #[error("devices: container_path {0:?} is not a place for a device")]
    ContainerPath(String),
    /// `Device.permissions` with something else than `r`, `w` and `m`.
    #[error("devices: permissions {0:?} are not of \"rwm\"")]
    Permissions(String),
    /// More than [`MAX_DEVICES`], or directories with far too many entries.
    #[error("devices: too many of them, or below {0:?}")]
    TooMany(PathBuf),
}

/// Looks up the devices of a request: CRI `Device`. Links are resolved; a directory stands for every device below it, on
/// its own filesystem and without following links. An empty `container_path` is the host's.
///
/// # Errors
/// [`DeviceError`].
pub fn resolve_devices(devices: &[Device]) -> Result<Vec<ResolvedDevice>, DeviceError> {
    let mut search = Search { found: Vec::new(), entries_left: MAX_ENTRIES };
    for device in devices {
        let path = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
        let container_path = mounts::clean(path)
            .filter(|path| path != "/" && path != DEV)
            .or_else(|| (device.host_path == DEV && path == DEV).then(|| DEV.to_owned()))
            .ok_or_else(|| DeviceError::ContainerPath(path.clone()))?;
        let access = Access::parse(&device.permissions)
            .ok_or_else(|| DeviceError::Permissions(device.permissions.clone()))?;
        let look = |source| DeviceError::Look { path: PathBuf::from(&device.host_path), source };
        // Refused before anything of it is looked at: `..` and links elsewhere could make /dev a way to any file.
        let host_path = std::fs::canonicalize(&device.host_path).map_err(look)?;
        if !host_path.starts_with(DEV) {
            return Err(DeviceError::Outside { asked: device.host_path.clone(), found: host_path });
        }
        let metadata = std::fs::symlink_metadata(&host_path).map_err(look)?;
        if metadata.is_dir() {
            search.directory(&host_path, Path::new(&container_path), access, metadata.dev(), MAX_DEPTH)?;
        } else {
            let resolved = of_node(PathBuf::from(container_path), &metadata, access)
                .ok_or_else(|| DeviceError::NotADevice(device.host_path.clone()))?;
            search.take(resolved)?;
        }
    }
    Ok(search.found)
}

/// Every device of the host's `/dev`, for privileged containers. What is mounted below it (`pts`, `shm`, `mqueue`) is not looked at.
///
/// # Errors
/// [`DeviceError::Look`] and [`DeviceError::TooMany`].
pub fn host_devices() -> Result<Vec<ResolvedDevice>, DeviceError> {
    let dev = Path::new(DEV);
    let metadata = std::fs::symlink_metadata(dev)
        .map_err(|source| DeviceError::Look { path: dev.to_owned(), source })?;
    let mut search = Search { found: Vec::new(), entries_left: MAX_ENTRIES };
    search.directory(dev, dev, Access::ALL, metadata.dev(), MAX_DEPTH)?;
    search
        .found
        .retain(|device| !NEVER_THE_HOSTS.iter().any(|never| device.container_path == Path::new(never)));
    Ok(search.found)
}

struct Search {
    found: Vec<ResolvedDevice>,
    entries_left: usize,
}

impl Search {
    fn take(&mut self, device: ResolvedDevice) -> Result<(), DeviceError> {
        if self.found.len() >= MAX_DEVICES {
            return Err(DeviceError::TooMany(device.container_path));
        }
        self.found.push(device);
        Ok(())
    }

    fn directory(
        &mut self,
        host: &Path,
        container: &Path,
        access: Access,
        filesystem: u64,
        depth_left: usize,
    ) -> Result<(), DeviceError> {
        let look = |source| DeviceError::Look { path: host.to_owned(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(host).map_err(look)? {
            self.entries_left =
                self.entries_left.checked_sub(1).ok_or_else(|| DeviceError::TooMany(host.to_owned()))?;
            names.push(entry.map_err(look)?.file_name());
        }
        // The same request makes the same container, whatever order the directory has.
        names.sort();
        for name in names {
            let path = host.join(&name);
            let metadata = match std::fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                // Unplugged since.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(DeviceError::Look { path, source }),
            };
            if metadata.is_dir() {
                if metadata.dev() == filesystem {
                    let depth_left =
                        depth_left.checked_sub(1).ok_or_else(|| DeviceError::TooMany(path.clone()))?;
                    self.directory(&path, &container.join(&name), access, filesystem, depth_left)?;
                }
            } else if let Some(device) = of_node(container.join(&name), &metadata, access) {
                self.take(device)?;
            }
        }
        Ok(())
    }
}

fn of_node(container_path: PathBuf, metadata: &Metadata, access: Access) -> Option<ResolvedDevice> {
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => DeviceKind::Char,
        kind if kind.is_block_device() => DeviceKind::Block,
        _ => return None,
    };
    // The layout of a device number in user space: makedev(3), <sys/sysmacros.h>.
    let number = metadata.rdev();
    let major = ((number >> 8) & 0xfff) | ((number >> 32) & 0xffff_f000);
    let minor = (number & 0xff) | ((number >> 12) & 0xffff_ff00);
    Some(ResolvedDevice {
        container_path,
        kind,
        major: u32::try_from(major).ok()?,
        minor: u32::try_from(minor).ok()?,
        mode: metadata.mode() & 0o777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        access,
    })
}

/// What the container's cgroup allows: the default devices and those asked for, or everything for a privileged container.
#[must_use]
pub fn device_policy(privileged: bool, asked: &[ResolvedDevice]) -> DevicePolicy {
    if privileged {
        return DevicePolicy::All;
    }
    let mut rules = default_devices();
    rules.extend(asked.iter().map(|device| DeviceRule {
        kind: device.kind,
        major: Some(device.major),
        minor: Some(device.minor),
        access: device.access,
    }));
    DevicePolicy::Only(rules)
}

/// The nodes of the container: the default ones, for a privileged container the host's, and those asked for. The last of one place wins.
pub(super) fn nodes(inputs: &Inputs<'_>, mounts: &[oci_spec::runtime::Mount]) -> Vec<LinuxDevice> {
    let default = DEFAULT_NODES.iter().map(|(name, major, minor)| ResolvedDevice {
        container_path: Path::new(DEV).join(name),
        kind: DeviceKind::Char,
        major: *major,
        minor: *minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
        access: Access::ALL,
    });
    let host = inputs.host.devices.iter().filter(|_| inputs.config.security.privileged).cloned();
    let all = default.chain(host).chain(inputs.devices.iter().cloned());

    let mut nodes: Vec<LinuxDevice> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for device in all.filter(|device| !is_mounted_over(&device.container_path, mounts)) {
        let place = *places.entry(device.container_path.clone()).or_insert(nodes.len());
        match nodes.get_mut(place) {
            Some(earlier) => *earlier = node(device),
            None => nodes.push(node(device)),
        }
    }
    nodes
}

/// Whether something else than the container's own, new `/dev` is mounted at or above the path.
fn is_mounted_over(path: &Path, mounts: &[oci_spec::runtime::Mount]) -> bool {
    mounts.iter().any(|mount| path.starts_with(mount.destination()) && !mounts::is_own_dev(mount))
}

fn node(device: ResolvedDevice) -> LinuxDevice {
    let mut node = LinuxDevice::default();
    node.set_path(device.container_path)
        .set_typ(match device.kind {
            DeviceKind::Char => LinuxDeviceType::C,
            DeviceKind::Block => LinuxDeviceType::B,
        })
        .set_major(i64::from(device.major))
        .set_minor(i64::from(device.minor))
        .set_file_mode(Some(device.mode))
        .set_uid(Some(device.uid))
        .set_gid(Some(device.gid));
    node
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(host: &str, container: &str, permissions: &str) -> Device {
        Device { host_path: host.into(), container_path: container.into(), permissions: permissions.into() }
    }

    #[test]
    fn a_device_is_what_its_node_says() {
        let found = resolve_devices(&[asked("/dev/null", "/dev/nothing/../black", "rw")]).unwrap();
        let [device] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((device.kind, device.major, device.minor), (DeviceKind::Char, 1, 3));
        assert_eq!(device.container_path, Path::new("/dev/black"));
        assert_eq!(device.access, Access { read: true, write: true, mknod: false });
    }

    #[test]
    fn links_in_dev_are_resolved_and_links_out_of_it_refused() {
        let name = format!("/dev/berth-test-{}", std::process::id());
        std::fs::create_dir(&name).unwrap();
        let inside = format!("{name}/inside");
        let outside = format!("{name}/outside");
        std::os::unix::fs::symlink("/dev/zero", &inside).unwrap();
        std::os::unix::fs::symlink("/", &outside).unwrap();
        let found = resolve_devices(&[asked(&inside, "/dev/zero", "r")]);
        let refused = resolve_devices(&[asked(&outside, "/dev/all", "r")]);
        // Links below a directory are not followed at all.
        let below = resolve_devices(&[asked(&name, "/dev/all", "r")]);
        std::fs::remove_dir_all(&name).unwrap();
        assert_eq!(found.unwrap()[0].minor, 5);
        assert!(matches!(refused, Err(DeviceError::Outside { .. })), "{refused:?}");
        assert_eq!(below.unwrap(), []);
    }

    #[test]
    fn what_is_no_device_of_dev_is_refused() {
        type Expected = fn(&DeviceError) -> bool;
        let cases: [(&str, &str, &str, Expected); 12] = [
            ("/", "/dev/x", "rwm", |error| matches!(error, DeviceError::Outside { .. })),
            ("/dev/..", "/dev/x", "rwm", |error| matches!(error, DeviceError::Outside { .. })),
            ("/dev/../etc/passwd", "/dev/x", "r", |error| matches!(error, DeviceError::Outside { .. })),
            ("/dev/fd", "/dev/x", "r", |error| matches!(error, DeviceError::Outside { .. })),
            ("/dev/absent-of-berth", "/dev/x", "rwm", |error| matches!(error, DeviceError::Look { .. })),
            ("", "/dev/x", "rwm", |error| matches!(error, DeviceError::Look { .. })),
            ("/dev/nu\0ll", "/dev/x", "rwm", |error| matches!(error, DeviceError::Look { .. })),
            ("/dev/null", "dev/x", "rwm", |error| matches!(error, DeviceError::ContainerPath(_))),
            ("/dev/null", "/dev/x/..", "rwm", |error| matches!(error, DeviceError::ContainerPath(_))),
            ("/dev/null", "/", "rwm", |error| matches!(error, DeviceError::ContainerPath(_))),
            ("/dev/null", "/dev/x", "", |error| matches!(error, DeviceError::Permissions(_))),
            ("/dev/null", "/dev/x", "rwx", |error| matches!(error, DeviceError::Permissions(_))),
        ];
        for (host, container, permissions, expected) in cases {
            // The last one is fine in itself: one bad device refuses all.
            let result = resolve_devices(&[asked(host, container, permissions), asked("/dev/null", "", "r")]);
            assert!(
                result.as_ref().is_err_and(expected),
                "{host:?} {container:?} {permissions:?}: {result:?}"
            );
        }
    }

    #[test]
    fn a_request_for_too_many_devices_is_refused() {
        let many = vec![asked("/dev/null", "/dev/x", "r"); MAX_DEVICES];
        assert_eq!(resolve_devices(&many).unwrap().len(), MAX_DEVICES);
        let more = [many, vec![asked("/dev/null", "/dev/x", "r")]].concat();
        assert!(matches!(resolve_devices(&more), Err(DeviceError::TooMany(_))));
        let DevicePolicy::Only(rules) = device_policy(false, &resolve_devices(&more[1..]).unwrap()) else {
            panic!()
        };
        assert!(rules.len() <= 1024);
    }

    #[test]
    fn the_host_keeps_its_console_and_terminals() {
        let devices = host_devices().unwrap();
        assert!(devices.iter().any(|device| device.container_path == Path::new("/dev/null")));
        for never in NEVER_THE_HOSTS {
            assert!(!devices.iter().any(|device| device.container_path == Path::new(never)), "{never}");
        }
    }
}
