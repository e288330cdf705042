//! The OCI runtime spec as a plan for the shim.
//!
//! A translation and nothing else: [`launch`] grants nothing that the spec does not name, and
//! refuses a spec that asks for something the shim does not do, so that no property is lost in
//! silence. What the spec has no words for comes in [`Extra`].

mod mount_options;
mod privileges;

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use berth_image::StoredLayer;
use berth_model::id::ContainerId;
use berth_model::security;
use berth_shim_proto::launch::mount::{Bind, Filesystem, Source};
use berth_shim_proto::launch::{
    Cgroup, Device, Launch, Mount, Namespaces, PidNamespace, Process, Propagation, REPLACEABLE_IN_PROC,
    Rootfs, User,
};
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, LinuxNamespaceType, Spec};

use mount_options::{MountOptions, OptionError};

pub use privileges::{capability_bits, rlimit_number};

/// Places that later steps, and programs in the container, rely on being the kernel's own: never
/// reached through a link of the image.
const NO_SYMLINKS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Filesystems of which new instances can be mounted: those of OCI runtime-spec "Default
/// Filesystems" and cgroup v2.
const FILESYSTEMS: [&str; 6] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2"];

/// Permission bits of a device node without any in the spec.
const DEVICE_MODE: u32 = 0o666;

/// What the shim needs beside the spec. Paths are the host's.
#[derive(Debug, Clone, Copy)]
pub struct Extra<'a> {
    /// The container's id.
    pub container_id: &'a ContainerId,
    /// Who the request wants the process to run as.
    pub user: &'a security::User,
    /// Who the image wants it to run as, unless the request says.
    pub image_user: &'a str,
    /// The image's layers, topmost first.
    pub layers: &'a [StoredLayer],
    /// The writable layer.
    pub upper_dir: &'a Path,
    /// Overlay's work directory.
    pub work_dir: &'a Path,
    /// Inside: directories of the image that stay writable.
    pub volumes: &'a [String],
    /// The pod's log directory and the name of the log file below it; `None` for no log.
    pub log: Option<(&'a Path, &'a Path)>,
    /// Where the exit record is written.
    pub exit_record: &'a Path,
    /// Standard input stays open.
    pub stdin: bool,
    /// That is closed when the first client that was attached to it leaves.
    pub stdin_once: bool,
    /// How the process gets into its cgroup.
    pub cgroup: &'a Cgroup,
    /// The compiled profile of the spec; there exactly when the spec has one.
    pub seccomp: Option<Filter<'a>>,
    /// What a pid namespace with a path is.
    pub pid_namespace: PidPath<'a>,
}

/// Whose pid namespace it is that a spec names by a path.
#[derive(Debug, Clone, Copy)]
pub enum PidPath<'a> {
    /// The pod's, pinned at that path, with a procfs of it mounted here.
    Pod(&'a Path),
    /// Another container's; the shim is handed it by descriptor, and the path is for people.
    Target,
}

/// A compiled seccomp profile.
#[derive(Debug, Clone, Copy)]
pub struct Filter<'a> {
    /// An array of `struct sock_filter`; not empty.
    pub program: &'a [u8],
    /// `SECCOMP_FILTER_FLAG_*`: seccomp(2).
    pub flags: u32,
    /// The one for the way into a pid namespace, empty when `program` serves:
    /// `Process.entry_filter` of the plan.
    pub entry: &'a [u8],
}

/// A spec that the shim cannot carry out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A part that no container can be without.
    #[error("the spec has no {0}")]
    Missing(&'static str),
    /// A property that is not offered.
    #[error("the spec's {0} is not supported")]
    Unsupported(&'static str),
    /// Of two namespaces of one kind it is unclear which one is meant.
    #[error("the spec has two {0} namespaces")]
    TwoNamespaces(LinuxNamespaceType),
    /// A namespace that can only be joined, without a path, or one that can only be made, with one.
    #[error("the spec's {0} namespace cannot be created or joined as given")]
    Namespace(LinuxNamespaceType),
    /// A filesystem of which containers get no new instance.
    #[error("mount on {destination:?}: the filesystem type {kind:?} is not supported")]
    Filesystem {
        /// The mount point.
        destination: PathBuf,
        /// Its type.
        kind: String,
    },
    /// An option of a mount.
    #[error("cannot mount on {destination:?}")]
    MountOption {
        /// The mount point.
        destination: PathBuf,
        /// What is wrong.
        #[source]
        source: OptionError,
    },
    /// A read-only filesystem in which something writable is to be mounted: its mount points could
    /// not be made.
    #[error("mount on {0:?}: a new read-only filesystem has writable mounts below it")]
    WritableBelow(PathBuf),
    /// A place among the kernel's files. The shim refuses what only a link leads there.
    #[error("mount on {0:?}: in /proc only {list} can be mounted", list = REPLACEABLE_IN_PROC.join(", "))]
    InProc(PathBuf),
    /// A path that has to be absolute.
    #[error("{property}: {path:?} is not absolute")]
    Relative {
        /// The property.
        property: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A device with numbers that no device has, or that is neither a character nor a block device.
    #[error(
        "device {0:?} cannot be created: it is neither a character nor a block device with a valid number"
    )]
    Device(PathBuf),
    /// A profile in the spec and no filter, or a filter and no profile.
    #[error("the seccomp filter does not match the spec")]
    Seccomp,
    /// A user name of the request that the shim would read as two.
    #[error("run_as_username: {0:?} is not a name")]
    User(String),
    /// A value for propagation that mount_namespaces(7) does not have.
    #[error("rootfs propagation {0:?} is unknown")]
    RootPropagation(String),
}

/// The plan for the container of `spec`.
///
/// # Errors
/// [`PlanError`]; for specs of [`crate::oci_spec::build`], only because of `extra`.
pub fn launch(spec: &Spec, extra: &Extra<'_>) -> Result<Launch, PlanError> {
    let process = spec.process().as_ref().ok_or(PlanError::Missing("process"))?;
    let linux = spec.linux().as_ref().ok_or(PlanError::Missing("linux"))?;
    let root = spec.root().as_ref().ok_or(PlanError::Missing("root"))?;
    refuse_unsupported(spec, linux, process)?;

    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let mut readonly_paths = covered("readonlyPaths", linux.readonly_paths().as_deref())?;
    let mounts = translate_mounts(mounts, &mut readonly_paths)?;
    let (log_directory, log_name) = extra.log.unwrap_or((Path::new(""), Path::new("")));
    Ok(Launch {
        container_id: extra.container_id.to_string(),
        rootfs: Rootfs {
            lower_dirs: extra.layers.iter().map(|StoredLayer::Directory(path)| bytes(path)).collect(),
            upper_dir: bytes(extra.upper_dir),
            work_dir: bytes(extra.work_dir),
            mount_point: absolute("root.path", root.path())?,
            read_only: root.readonly().unwrap_or(false),
            propagation: root_propagation(linux)?.into(),
        },
        mounts,
        devices: linux.devices().iter().flatten().map(device).collect::<Result<_, _>>()?,
        masked_paths: covered("maskedPaths", linux.masked_paths().as_deref())?,
        readonly_paths,
        namespaces: namespaces(linux, extra.pid_namespace)?,
        cgroup: extra.cgroup.clone(),
        process: translate_process(process, linux, extra)?,
        volumes: extra.volumes.iter().map(|path| path.as_bytes().to_vec()).collect(),
        log_directory: bytes(log_directory),
        log_name: bytes(log_name),
        exit_record_path: bytes(extra.exit_record),
        stdin: extra.stdin,
        stdin_once: extra.stdin_once,
        max_log_line_bytes: 0,
    })
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn absolute(property: &'static str, path: &Path) -> Result<Vec<u8>, PlanError> {
    if path.is_absolute() {
        Ok(bytes(path))
    } else {
        Err(PlanError::Relative { property, path: path.to_owned() })
    }
}

fn covered(property: &'static str, paths: Option<&[String]>) -> Result<Vec<Vec<u8>>, PlanError> {
    paths.unwrap_or_default().iter().map(|path| absolute(property, Path::new(path))).collect()
}

/// Unsupported properties. Limits and device rules are not among them: the
/// daemon applies them to the cgroup before the shim is started.
fn refuse_unsupported(
    spec: &Spec,
    linux: &Linux,
    process: &oci_spec::runtime::Process,
) -> Result<(), PlanError> {
    fn full<T>(list: Option<&Vec<T>>) -> bool {
        list.is_some_and(|list| !list.is_empty())
    }
    let seccomp = linux.seccomp().as_ref();
    let present = [
        ("hooks", spec.hooks().is_some()),
        ("domainname", spec.domainname().is_some()),
        ("vm", spec.vm().is_some()),
        ("linux.uidMappings", full(linux.uid_mappings().as_ref())),
        ("linux.gidMappings", full(linux.gid_mappings().as_ref())),
        ("linux.sysctl", linux.sysctl().as_ref().is_some_and(|map| !map.is_empty())),
        ("linux.netDevices", linux.net_devices().as_ref().is_some_and(|map| !map.is_empty())),
        ("linux.mountLabel", linux.mount_label().as_ref().is_some_and(|label| !label.is_empty())),
        ("linux.intelRdt", linux.intel_rdt().is_some()),
        ("linux.memoryPolicy", linux.memory_policy().is_some()),
        ("linux.personality", linux.personality().is_some()),
        ("linux.timeOffsets", linux.time_offsets().is_some()),
        (
            "linux.seccomp.listenerPath",
            seccomp
                .and_then(|seccomp| seccomp.listener_path().as_ref())
                .is_some_and(|path| !path.as_os_str().is_empty()),
        ),
        ("process.selinuxLabel", process.selinux_label().as_ref().is_some_and(|label| !label.is_empty())),
        ("process.ioPriority", process.io_priority().is_some()),
        ("process.scheduler", process.scheduler().is_some()),
        ("process.execCPUAffinity", process.exec_cpu_affinity().is_some()),
    ];
    match present.iter().find(|(_, present)| *present) {
        Some((property, _)) => Err(PlanError::Unsupported(property)),
        None => Ok(()),
    }
}

fn root_propagation(linux: &Linux) -> Result<Propagation, PlanError> {
    match linux.rootfs_propagation().as_deref() {
        None | Some("" | "private" | "rprivate") => Ok(Propagation::Private),
        Some("slave" | "rslave") => Ok(Propagation::Slave),
        Some("shared" | "rshared") => Ok(Propagation::Shared),
        Some(other) => Err(PlanError::RootPropagation(other.to_owned())),
    }
}

fn namespaces(linux: &Linux, pid_path: PidPath<'_>) -> Result<Namespaces, PlanError> {
    let mut planned = Namespaces { pid: Some(PidNamespace::Host(())), ..Namespaces::default() };
    let mut seen = HashSet::new();
    let mut own_mounts = false;
    for namespace in linux.namespaces().iter().flatten() {
        let kind = namespace.typ();
        if !seen.insert(kind) {
            return Err(PlanError::TwoNamespaces(kind));
        }
        let path = namespace.path().as_deref().map(|path| absolute("linux.namespaces", path)).transpose()?;
        match (kind, path) {
            (LinuxNamespaceType::Network, Some(path)) => planned.network = path,
            (LinuxNamespaceType::Ipc, Some(path)) => planned.ipc = path,
            (LinuxNamespaceType::Uts, Some(path)) => planned.uts = path,
            (LinuxNamespaceType::Pid, Some(path)) => match pid_path {
                PidPath::Pod(procfs) => {
                    planned.pid = Some(PidNamespace::Join(path));
                    planned.procfs = bytes(procfs);
                }
                PidPath::Target => planned.pid = Some(PidNamespace::Target(())),
            },
            (LinuxNamespaceType::Pid, None) => planned.pid = Some(PidNamespace::Own(())),
            (LinuxNamespaceType::Cgroup, None) => planned.own_cgroup = true,
            (LinuxNamespaceType::Mount, None) => own_mounts = true,
            _ => return Err(PlanError::Namespace(kind)),
        }
    }
    // The shim always creates one; a spec without it means the host's, which is not supported.
    if own_mounts { Ok(planned) } else { Err(PlanError::Missing("mount namespace")) }
}

/// The mounts in order. In a new read-only tmpfs no mount points could be created; it becomes
/// read-only after the mounts, like a path of `readonly_paths`, which includes the mounts in it.
fn translate_mounts(
    mounts: &[oci_spec::runtime::Mount],
    readonly_paths: &mut Vec<Vec<u8>>,
) -> Result<Vec<Mount>, PlanError> {
    let mut planned = mounts.iter().map(translate_mount).collect::<Result<Vec<_>, _>>()?;
    let places: Vec<(PathBuf, bool)> = mounts
        .iter()
        .zip(&planned)
        .map(|(mount, planned)| {
            (mount.destination().clone(), planned.attributes & mount_options::RDONLY != 0)
        })
        .collect();
    for (number, mount) in planned.iter_mut().enumerate() {
        let tmpfs =
            matches!(&mount.source, Some(Source::Filesystem(filesystem)) if filesystem.fstype == "tmpfs");
        let Some((place, true)) = places.get(number).filter(|_| tmpfs) else { continue };
        let below: Vec<_> =
            places.iter().skip(number + 1).filter(|(other, _)| other.starts_with(place)).collect();
        if below.iter().any(|(_, read_only)| !read_only) {
            return Err(PlanError::WritableBelow(place.clone()));
        }
        if !below.is_empty() {
            mount.attributes &= !mount_options::RDONLY;
            readonly_paths.push(bytes(place));
        }
    }
    Ok(planned)
}

fn translate_mount(mount: &oci_spec::runtime::Mount) -> Result<Mount, PlanError> {
    let destination = mount.destination();
    let target = absolute("mounts", destination)?;
    let maps = [mount.uid_mappings(), mount.gid_mappings()];
    if maps.iter().any(|map| map.as_ref().is_some_and(|map| !map.is_empty())) {
        return Err(PlanError::Unsupported("mounts.uidMappings"));
    }
    let is_in_proc = destination.starts_with("/proc") && destination != Path::new("/proc");
    if is_in_proc && !REPLACEABLE_IN_PROC.iter().any(|place| destination == Path::new(place)) {
        return Err(PlanError::InProc(destination.clone()));
    }
    let kind = mount.typ().as_deref().unwrap_or_default();
    let options = MountOptions::parse(kind, mount.options().as_deref().unwrap_or_default())
        .map_err(|source| PlanError::MountOption { destination: destination.clone(), source })?;
    let source = match options.bind {
        Some(bind) => {
            let path = mount.source().as_deref().ok_or(PlanError::Missing("source of a bind mount"))?;
            Source::Bind(Bind {
                source: absolute("mounts.source", path)?,
                recursive: bind.recursive,
                propagation: options.propagation.unwrap_or(Propagation::Private).into(),
            })
        }
        None if FILESYSTEMS.contains(&kind) => Source::Filesystem(Filesystem {
            fstype: kind.to_owned(),
            options: options.of_filesystem,
            source: mount
                .source()
                .as_deref()
                .map_or(kind, |source| source.to_str().unwrap_or(kind))
                .to_owned(),
        }),
        None => {
            return Err(PlanError::Filesystem { destination: destination.clone(), kind: kind.to_owned() });
        }
    };
    Ok(Mount {
        target,
        attributes: options.attributes,
        attributes_recursive: options.recursive,
        source: Some(source),
        no_symlinks: NO_SYMLINKS.iter().any(|place| destination == Path::new(place)),
    })
}

fn device(device: &LinuxDevice) -> Result<Device, PlanError> {
    let refused = || PlanError::Device(device.path().clone());
    let block = match device.typ() {
        LinuxDeviceType::B => true,
        LinuxDeviceType::C | LinuxDeviceType::U => false,
        LinuxDeviceType::A | LinuxDeviceType::P => return Err(refused()),
    };
    Ok(Device {
        path: absolute("linux.devices", device.path())?,
        block,
        major: u32::try_from(device.major()).map_err(|_| refused())?,
        minor: u32::try_from(device.minor()).map_err(|_| refused())?,
        mode: device.file_mode().unwrap_or(DEVICE_MODE) & 0o777,
        uid: device.uid().unwrap_or_default(),
        gid: device.gid().unwrap_or_default(),
    })
}

fn translate_process(
    process: &oci_spec::runtime::Process,
    linux: &Linux,
    extra: &Extra<'_>,
) -> Result<Process, PlanError> {
    let texts =
        |list: &Option<Vec<String>>| list.iter().flatten().map(|text| text.as_bytes().to_vec()).collect();
    let args: Vec<Vec<u8>> = texts(process.args());
    if args.is_empty() {
        return Err(PlanError::Missing("process.args"));
    }
    let (seccomp_filter, entry_filter, seccomp_flags) = match (linux.seccomp(), &extra.seccomp) {
        (None, None) => (Vec::new(), Vec::new(), 0),
        (Some(_), Some(filter)) if !filter.program.is_empty() => {
            (filter.program.to_vec(), filter.entry.to_vec(), filter.flags)
        }
        _ => return Err(PlanError::Seccomp),
    };
    Ok(Process {
        args,
        env: texts(process.env()),
        cwd: absolute("process.cwd", process.cwd())?,
        user: user(extra)?,
        capabilities: privileges::capabilities(process.capabilities().as_ref()),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        rlimits: process.rlimits().iter().flatten().map(privileges::rlimit).collect(),
        seccomp_filter,
        seccomp_flags,
        oom_score_adj: process.oom_score_adj(),
        apparmor_profile: process.apparmor_profile().clone().unwrap_or_default(),
        terminal: process.terminal().unwrap_or(false),
        umask: process.user().umask().unwrap_or(0o022),
        entry_filter,
    })
}

/// The user of the request, or else of the image. Only the image's may have a group after a colon.
fn user(extra: &Extra<'_>) -> Result<User, PlanError> {
    let asked = extra.user;
    let text = match &asked.user {
        Some(name) if name.is_empty() || name.contains(':') => return Err(PlanError::User(name.clone())),
        Some(name) => name,
        None => extra.image_user,
    };
    Ok(User {
        user: text.to_owned(),
        group: asked.group,
        supplementary_groups: asked.supplementary_groups.clone(),
        merge_groups: asked.merge_groups,
    })
}

#[cfg(test)]
mod tests;
