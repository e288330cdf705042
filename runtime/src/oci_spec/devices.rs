//! Devices: which nodes are in a container, which ones its cgroup allows, and what a request's
//! paths mean on the host.
//!
//! Nodes are created only in the container's own `/dev` and root. Below a mount, a node would be
//! created in a host directory: a device requested there has to exist in the mount already
//! ([`Covered::check`]), or the request is refused. Looking up ([`resolve_devices`],
//! [`host_devices`], [`find_below`]) touches the host and blocks, maybe forever: a container may
//! share a path.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use berth_cgroup::{Access, DeviceKind, DevicePolicy, DeviceRule, default_devices};
use berth_model::container::Device;
use berth_model::limit::MAX_DEVICES;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use super::{Inputs, ResolvedMount, SpecError, mounts};

/// The most directory entries that are examined for one request. The host's own devices
/// ([`host_devices`]) are not limited.
const MAX_ENTRIES: usize = 65_536;

/// How deep directories are followed; `/dev/bus/usb/001/001` is 3 below `/dev`.
const MAX_DEPTH: usize = 8;

/// The device directory.
const DEV: &str = "/dev";

/// Never passed on from the host, not even to privileged containers: the first is the machine's,
/// the second a link into the container's own devpts.
const NEVER_THE_HOSTS: [&str; 2] = ["/dev/console", "/dev/ptmx"];

/// OCI runtime-spec "Default Devices", but for `/dev/console` and `/dev/ptmx`, see
/// [`NEVER_THE_HOSTS`]: name, major, minor.
const DEFAULT_NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// A resolved host device, and its path in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedDevice {
    /// Its path in the container; absolute, without `..`.
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
    /// The container's access to it.
    pub access: Access,
}

/// A device of the request that cannot be provided.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It cannot be looked up.
    #[error("devices: cannot look up {path:?}")]
    Look {
        /// The path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A directory that is not below `/dev`, or a link out of it to one.
    #[error("devices: {asked:?} is the directory {found:?}, which is not in /dev")]
    Outside {
        /// `Device.host_path`.
        asked: String,
        /// The resolved path.
        found: PathBuf,
    },
    /// Neither a device nor a directory.
    #[error("devices: {0:?} is not a device")]
    NotADevice(String),
    /// An invalid `Device.container_path`.
    #[error("devices: container_path {0:?} cannot be the path of a device")]
    ContainerPath(String),
    /// `Device.permissions` other than `r`, `w` and `m`.
    #[error("devices: permissions {0:?} are not a combination of r, w and m")]
    Permissions(String),
    /// A mount at or above `container_path` does not contain the device.
    #[error("devices: {path:?} is at or below the mount {mount:?}, where there is no such device")]
    Mounted {
        /// `Device.container_path`.
        path: PathBuf,
        /// `Mount.container_path`.
        mount: String,
    },
    /// More than [`MAX_DEVICES`], or directories with far too many entries.
    #[error("devices: more than Berth accepts below {0:?}")]
    TooMany(PathBuf),
}

/// Looks up the devices of a request: CRI `Device`. Links are resolved. A node may be anywhere on
/// the host; a directory in `/dev` stands for every device below it, on the same filesystem and
/// without following links. An empty `container_path` is the host's.
///
/// # Errors
/// [`DeviceError`].
pub fn resolve_devices(devices: &[Device]) -> Result<Vec<ResolvedDevice>, DeviceError> {
    let mut search =
        Search { found: Vec::new(), limits: Some(Limits { entries: MAX_ENTRIES, devices: MAX_DEVICES }) };
    for device in devices {
        let path = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
        let container_path = mounts::clean(path)
            .filter(|path| path != "/" && path != DEV)
            .or_else(|| (device.host_path == DEV && path == DEV).then(|| DEV.to_owned()))
            .ok_or_else(|| DeviceError::ContainerPath(path.clone()))?;
        let access = Access::parse(&device.permissions)
            .ok_or_else(|| DeviceError::Permissions(device.permissions.clone()))?;
        let look = |source| DeviceError::Look { path: PathBuf::from(&device.host_path), source };
        // Other files are not examined: a request must not reveal anything about the host's
        // files.
        let metadata = std::fs::metadata(&device.host_path).map_err(look)?;
        if metadata.is_dir() {
            let host_path = std::fs::canonicalize(&device.host_path).map_err(look)?;
            if !host_path.starts_with(DEV) {
                return Err(DeviceError::Outside { asked: device.host_path.clone(), found: host_path });
            }
            search.directory(&host_path, Path::new(&container_path), access, metadata.dev(), MAX_DEPTH)?;
        } else {
            let resolved = of_node(PathBuf::from(container_path), &metadata, access)
                .ok_or_else(|| DeviceError::NotADevice(device.host_path.clone()))?;
            search.take(resolved)?;
        }
    }
    Ok(search.found)
}

/// Every device in the host's `/dev` now, for a privileged container. Mounts below it (`pts`,
/// `shm`, `mqueue`) are skipped, and so are devices that cannot be looked up, such as one that is
/// unplugged at the moment.
///
/// # Errors
/// [`DeviceError::Look`], when `/dev` itself cannot be read.
pub fn host_devices() -> Result<Vec<ResolvedDevice>, DeviceError> {
    let dev = Path::new(DEV);
    let metadata = std::fs::symlink_metadata(dev)
        .map_err(|source| DeviceError::Look { path: dev.to_owned(), source })?;
    let mut search = Search { found: Vec::new(), limits: None };
    search.directory(dev, dev, Access::ALL, metadata.dev(), MAX_DEPTH)?;
    search
        .found
        .retain(|device| !NEVER_THE_HOSTS.iter().any(|never| device.container_path == Path::new(never)));
    Ok(search.found)
}

/// A device that a mount of the request covers.
#[derive(Debug)]
pub struct Covered<'a> {
    device: &'a ResolvedDevice,
    mount: &'a ResolvedMount,
    /// Where it has to be in what is mounted; empty for that itself.
    pub below: PathBuf,
}

/// The devices which the request's own mounts cover. The last of the mounts above a path counts.
#[must_use]
pub fn covered<'a>(devices: &'a [ResolvedDevice], mounts: &'a [ResolvedMount]) -> Vec<Covered<'a>> {
    let cover = |device: &'a ResolvedDevice| {
        let (mount, place) = mounts
            .iter()
            .filter_map(|mount| Some((mount, mounts::clean(&mount.asked.container_path)?)))
            .filter(|(_, place)| device.container_path.starts_with(place))
            // Of two at the same path, the later one is on top.
            .max_by_key(|(_, place)| place.len())?;
        let below = device.container_path.strip_prefix(&place).unwrap_or(&device.container_path).to_owned();
        Some(Covered { device, mount, below })
    };
    devices.iter().filter_map(cover).collect()
}

impl Covered<'_> {
    /// The source of the mount.
    #[must_use]
    pub fn source(&self) -> &Path {
        &self.mount.source
    }

    /// Checks what was found at its place: [`find_below`].
    ///
    /// # Errors
    /// [`DeviceError::Mounted`] when that is nothing, or another device.
    pub fn check(&self, found: Option<&ResolvedDevice>) -> Result<(), DeviceError> {
        let number = |device: &ResolvedDevice| (device.kind, device.major, device.minor);
        if found.map(number) == Some(number(self.device)) {
            return Ok(());
        }
        let (path, mount) = (self.device.container_path.clone(), self.mount.asked.container_path.clone());
        Err(DeviceError::Mounted { path, mount })
    }
}

/// The device at `path` below a directory of the host that may be a container's as well; at the
/// directory itself for an empty path.
#[must_use]
pub fn find_below(top: &Path, path: &Path) -> Option<ResolvedDevice> {
    let node = if path.as_os_str().is_empty() {
        std::fs::symlink_metadata(top)
    } else {
        let root = berth_sys::beneath::Root::open(top).ok()?;
        // O_PATH: the device itself is not opened.
        std::fs::File::from(root.resolve(path).ok()?).metadata()
    };
    of_node(path.to_owned(), &node.ok()?, Access::ALL)
}

/// The budget of a request.
struct Limits {
    entries: usize,
    devices: usize,
}

struct Search {
    found: Vec<ResolvedDevice>,
    /// `None` for the host's own devices: unlimited.
    limits: Option<Limits>,
}

impl Search {
    fn take(&mut self, device: ResolvedDevice) -> Result<(), DeviceError> {
        if self.limits.as_ref().is_some_and(|limits| self.found.len() >= limits.devices) {
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
            if let Some(limits) = &mut self.limits {
                limits.entries =
                    limits.entries.checked_sub(1).ok_or_else(|| DeviceError::TooMany(host.to_owned()))?;
            }
            names.push(entry.map_err(look)?.file_name());
        }
        // Sorted, so that the same request creates the same container.
        names.sort();
        for name in names {
            let path = host.join(&name);
            let metadata = match std::fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                // Unplugged since.
                Err(error) if error.kind() == io::ErrorKind::NotFound || self.limits.is_none() => continue,
                Err(source) => return Err(DeviceError::Look { path, source }),
            };
            if metadata.is_dir() {
                if metadata.dev() == filesystem {
                    let into = container.join(&name);
                    let found = match depth_left.checked_sub(1) {
                        Some(left) => self.directory(&path, &into, access, filesystem, left),
                        None => Err(DeviceError::TooMany(path)),
                    };
                    if self.limits.is_some() {
                        found?;
                    }
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
    // The user-space layout of a device number: makedev(3), <sys/sysmacros.h>.
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

/// The devices that the container's cgroup allows: the default and requested ones, or all for a
/// privileged container.
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

/// The nodes of the container: the default ones, for a privileged container the host's, and the
/// requested ones. The last one at a path wins.
///
/// Requested ones below a mount have to exist in it: the request's own mounts were checked
/// ([`Covered::check`]), and the others are Berth's, where no device is.
pub(super) fn nodes(
    inputs: &Inputs<'_>,
    mounts: &[oci_spec::runtime::Mount],
) -> Result<Vec<LinuxDevice>, SpecError> {
    let by_request = |path: &Path| {
        inputs.mounts.iter().any(|mount| {
            mounts::clean(&mount.asked.container_path).is_some_and(|place| path.starts_with(place))
        })
    };
    if let Some(lost) = inputs
        .devices
        .iter()
        .find(|device| is_mounted_over(&device.container_path, mounts) && !by_request(&device.container_path))
    {
        return Err(SpecError::DeviceOnMount(lost.container_path.clone()));
    }
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
    let host = inputs.host_devices.iter().filter(|_| inputs.config.security.privileged).cloned();
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
    Ok(nodes)
}

/// Whether anything but the container's own `/dev` is mounted at or above the path.
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
            ("/dev/../etc/passwd", "/dev/x", "r", |error| matches!(error, DeviceError::NotADevice(_))),
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
    fn a_node_may_lie_anywhere_on_the_host() {
        let place = tempfile::tempdir().unwrap();
        let node = place.path().join("node");
        let made = std::process::Command::new("mknod").arg(&node).args(["c", "1", "3"]).status().unwrap();
        assert!(made.success());
        std::os::unix::fs::symlink(&node, place.path().join("link")).unwrap();
        for name in ["node", "link"] {
            let path = place.path().join(name).display().to_string();
            let found = resolve_devices(&[asked(&path, "/dev/mine", "rw")]).unwrap();
            assert_eq!((found[0].kind, found[0].major, found[0].minor), (DeviceKind::Char, 1, 3), "{name}");
        }
        let directory = place.path().display().to_string();
        assert!(matches!(
            resolve_devices(&[asked(&directory, "/dev/x", "rw")]),
            Err(DeviceError::Outside { .. })
        ));
    }

    #[test]
    fn a_device_under_a_mount_has_to_be_in_it() {
        let mount = |host: &Path, container: &str| ResolvedMount {
            asked: berth_model::container::Mount {
                container_path: container.to_owned(),
                host_path: host.display().to_string(),
                readonly: false,
                recursive_read_only: false,
                propagation: berth_model::container::Propagation::Private,
            },
            source: host.to_owned(),
        };
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("null"), "").unwrap();
        std::os::unix::fs::symlink("/dev/null", place.path().join("link")).unwrap();
        let dev = mount(Path::new(DEV), "/dev/");
        let empty = mount(place.path(), "/dev/dri");
        let at = |path: &str| resolve_devices(&[asked("/dev/null", path, "rw")]).unwrap();
        for (path, mounts, expected) in [
            ("/dev/null", vec![dev.clone()], true),
            ("/dev/fuse", vec![dev.clone()], false),
            ("/dev/zero", vec![dev.clone()], false),
            ("/dev/dri/null", vec![dev.clone(), empty.clone()], false),
            ("/dev/dri/null", vec![empty.clone(), mount(Path::new(DEV), "/dev/dri")], true),
            // A link of the mounted directory leads nowhere but below it.
            ("/dev/dri/link", vec![empty.clone()], false),
            ("/dev/dri", vec![mount(Path::new("/dev/null"), "/dev/dri")], true),
            ("/dev/dri", vec![mount(Path::new("/dev/zero"), "/dev/dri")], false),
            ("/dev/other", vec![empty.clone()], true),
        ] {
            let devices = at(path);
            let result = covered(&devices, &mounts)
                .iter()
                .try_for_each(|covered| covered.check(find_below(covered.source(), &covered.below).as_ref()));
            assert_eq!(result.is_ok(), expected, "{path}: {result:?}");
        }
    }

    #[test]
    fn the_host_may_have_any_number_of_devices_and_is_looked_at_each_time() {
        let name = format!("/dev/berth-many-{}", std::process::id());
        std::fs::create_dir(&name).unwrap();
        let made = std::process::Command::new("mknod")
            .arg(format!("{name}/0"))
            .args(["c", "1", "3"])
            .status()
            .unwrap();
        assert!(made.success());
        let before = host_devices().unwrap().len();
        // Hard links are nodes like any other, and quick to make.
        for number in 0..MAX_DEVICES + 100 {
            std::fs::hard_link(format!("{name}/0"), format!("{name}/more-{number}")).unwrap();
        }
        let after = host_devices();
        let refused = resolve_devices(&[asked(&name, &name, "r")]);
        std::fs::remove_dir_all(&name).unwrap();
        assert_eq!(after.unwrap().len(), before + MAX_DEVICES + 100);
        assert!(matches!(refused, Err(DeviceError::TooMany(_))), "a request has a limit");
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
