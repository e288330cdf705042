//! The mounts of a container, and their sources.
//!
//! Three kinds, in order of precedence: the requested mounts; the standard ones, from `/proc` to
//! `/etc/resolv.conf`; a directory for each volume of the image. All are sorted by the number of
//! path elements, so that nested mounts come later. Destinations are compared as text here and
//! resolved below the root by the shim; a destination that a link redirects is mounted there,
//! inside the root.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use berth_image::ImageConfig;
use berth_model::container::{Config, Mount as Asked, Propagation};
use berth_model::limit::{MAX_MOUNTS, MAX_PATH_BYTES};
use oci_spec::runtime::Mount;

use super::{HOST_SHM, Inputs, SpecError, is_pods};
use crate::host_directory;

/// The mount points of kernel filesystems. An image's volume there would replace files that later
/// steps write to and that isolation depends on (CVE-2019-16884), and a requested mount there
/// replaces everything below it.
const OF_THE_KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A requested mount, with its resolved source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedMount {
    /// The mount or device of the request.
    pub asked: Asked,
    /// The source on the host: absolute, without links.
    pub source: PathBuf,
}

/// A container's cgroup in one v1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupDirectory {
    /// The name of the hierarchy's directory below `/sys/fs/cgroup`, as on the host; such as
    /// `memory`.
    pub name: String,
    /// The cgroup's directory on the host.
    pub directory: PathBuf,
}

/// A mount of the request whose source cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It cannot be looked up.
    #[error("mounts: cannot look up {path:?}")]
    Look {
        /// The path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It is missing and cannot be created.
    #[error("mounts: cannot create the directory {path:?}")]
    Make {
        /// The path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The mount table cannot be read.
    #[error("cannot read {MOUNTINFO}")]
    Table(#[source] io::Error),
    /// The requested propagation needs a shared or slave mount.
    #[error("mounts: {path:?} is on a mount that is not {needed}")]
    Propagation {
        /// The source.
        path: PathBuf,
        /// The required kind of mount.
        needed: &'static str,
    },
}

/// The mount table of this process: proc(5).
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Looks up the source of a mount. Links are resolved. A source that is absent becomes a directory
/// with mode 0755: the CRI calls that an error, but workloads are written for runtimes that make
/// it.
///
/// Blocks, and may do so forever: a container may share the path.
///
/// # Errors
/// [`SourceError`]. Directories created by then stay.
pub fn find_source(path: &Path) -> Result<PathBuf, SourceError> {
    match std::fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            host_directory::make_missing(path)
                .map_err(|(path, source)| SourceError::Make { path, source })?;
            std::fs::canonicalize(path)
        }
        found => found,
    }
    .map_err(|source| SourceError::Look { path: path.to_owned(), source })
}

/// The mounts of a request with their sources ([`find_source`]), in order.
///
/// # Errors
/// [`SourceError`] for one whose source cannot propagate as is asked for.
pub fn resolve_mounts(mounts: &[Asked], sources: Vec<PathBuf>) -> Result<Vec<ResolvedMount>, SourceError> {
    let mut table = None;
    let mut resolved = Vec::with_capacity(mounts.len());
    for (asked, source) in mounts.iter().zip(sources) {
        if asked.propagation != Propagation::Private {
            let table = match &table {
                Some(table) => table,
                None => table.insert(std::fs::read(MOUNTINFO).map_err(SourceError::Table)?),
            };
            check_propagation(table, &source, asked.propagation)?;
        }
        resolved.push(ResolvedMount { asked: asked.clone(), source });
    }
    Ok(resolved)
}

/// mount_namespaces(7): a slave receives from a shared mount or a slave, a peer has to be one of a
/// shared mount.
fn check_propagation(table: &[u8], source: &Path, wanted: Propagation) -> Result<(), SourceError> {
    let tags = propagation_tags(table, source);
    let refused = |needed| Err(SourceError::Propagation { path: source.to_owned(), needed });
    match wanted {
        Propagation::Bidirectional if !tags.shared => refused("shared"),
        Propagation::HostToContainer if !(tags.shared || tags.slave) => refused("shared or a slave"),
        _ => Ok(()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Tags {
    shared: bool,
    slave: bool,
}

/// The propagation of the mount that `path` is on, from the text of [`MOUNTINFO`]: proc(5), fields
/// 5 (mount point) and 7 (tags, up to a dash). Of mounts at the same path the last one is on top.
fn propagation_tags(table: &[u8], path: &Path) -> Tags {
    let mut best = (0, Tags::default());
    for line in table.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ').skip(4);
        let Some(point) = fields.next().map(unescape) else { continue };
        let point = Path::new(std::ffi::OsStr::from_bytes(&point));
        if !point.is_absolute() || !path.starts_with(point) {
            continue;
        }
        let length = point.as_os_str().len();
        if length >= best.0 {
            let tags: Vec<&[u8]> = fields.skip(1).take_while(|tag| *tag != b"-").collect();
            let has = |prefix: &[u8]| tags.iter().any(|tag| tag.starts_with(prefix));
            best = (length, Tags { shared: has(b"shared:"), slave: has(b"master:") });
        }
    }
    best.1
}

/// Space, tab, line break and backslash are `\` and three octal digits in the kernel's tables of
/// mounts.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal =
            after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            plain.push(byte);
            rest = after.get(3..).unwrap_or_default();
        } else {
            plain.push(*first);
            rest = after;
        }
    }
    plain
}

/// The path without `.`, `..`, double and final slashes, lexically. `None` if it is not absolute,
/// too long, or contains a NUL byte.
pub(super) fn clean(path: &str) -> Option<String> {
    if !path.starts_with('/') || path.len() > MAX_PATH_BYTES || path.contains('\0') {
        return None;
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    Some(format!("/{}", parts.join("/")))
}

/// Whether `path` is `above` or below it, lexically.
fn is_at_or_below(path: &Path, above: &str) -> bool {
    path.starts_with(above)
}

/// Whether the mount is the container's own `/dev`, in which nodes are created.
pub(super) fn is_own_dev(mount: &Mount) -> bool {
    mount.destination() == Path::new("/dev") && mount.typ().as_deref() == Some("tmpfs")
}

/// All mounts of a container, in order.
pub(super) fn of_container(inputs: &Inputs<'_>) -> Result<Vec<Mount>, SpecError> {
    let asked = inputs.mounts.iter().map(asked_mount).collect::<Result<Vec<_>, _>>()?;
    let found = asked.len() + image_volumes(inputs.config, inputs.image)?.len();
    if found > MAX_MOUNTS {
        return Err(SpecError::TooManyMounts { found });
    }
    let mut mounts = standard(inputs, &asked)?;
    mounts.retain(|mount| !asked.iter().any(|asked| gives_way(mount.destination(), asked.destination())));
    mounts.extend(asked);
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

/// Whether a requested mount replaces a standard one: at the same path, or above it in
/// a kernel filesystem.
fn gives_way(standard: &Path, asked: &Path) -> bool {
    let kernels = OF_THE_KERNEL.iter().any(|place| is_at_or_below(asked, place));
    standard == asked || (kernels && standard.starts_with(asked))
}

fn asked_mount(resolved: &ResolvedMount) -> Result<Mount, SpecError> {
    let asked = &resolved.asked;
    let destination = clean(&asked.container_path).ok_or_else(|| SpecError::Path {
        origin: "mounts: container_path",
        path: asked.container_path.clone(),
    })?;
    if destination == "/" {
        return Err(SpecError::MountOnRoot(asked.container_path.clone()));
    }
    let propagation = match asked.propagation {
        Propagation::Private => "rprivate",
        Propagation::HostToContainer => "rslave",
        Propagation::Bidirectional => "rshared",
    };
    // The edge accepts recursive_read_only only with readonly and private propagation.
    let mode = match (asked.recursive_read_only, asked.readonly) {
        (true, _) => "rro",
        (false, true) => "ro",
        (false, false) => "rw",
    };
    Ok(bind(&destination, resolved.source.clone(), &["rbind", propagation, mode]))
}

/// The propagation of the root that the mounts below it require.
pub(super) fn root_propagation(mounts: &[ResolvedMount]) -> &'static str {
    let any = |wanted| mounts.iter().any(|mount| mount.asked.propagation == wanted);
    if any(Propagation::Bidirectional) {
        "rshared"
    } else if any(Propagation::HostToContainer) {
        "rslave"
    } else {
        "rprivate"
    }
}

/// The volumes of the image: those without a mount of the request at their path, absolute and
/// cleaned. `VOLUME data` and `VOLUME ../data` are relative to the root, as in other runtimes; the
/// root itself exists already. A volume at a standard mount, or in a kernel filesystem, is skipped:
/// such images (`VOLUME /sys/fs/cgroup`) need what is there anyway.
///
/// They are not mounts in the spec: the writable layer already belongs to the container and is
/// removed with it, so the shim only ensures that they exist, and are writable in a read-only root.
///
/// # Errors
/// [`SpecError::Volume`] for a path that is too long or contains a NUL byte.
pub fn image_volumes(config: &Config, image: &ImageConfig) -> Result<Vec<String>, SpecError> {
    let mut volumes: Vec<String> = Vec::new();
    // Checked before any work on them.
    if image.volumes.len() > MAX_MOUNTS {
        return Err(SpecError::TooManyMounts { found: image.volumes.len() });
    }
    for text in &image.volumes {
        let destination = clean(&format!("/{text}")).ok_or_else(|| SpecError::Volume(text.clone()))?;
        let path = Path::new(&destination);
        let taken = destination == "/"
            || OF_THE_KERNEL.iter().any(|place| is_at_or_below(path, place))
            || ETC_FILES.iter().any(|name| path == Path::new("/etc").join(name))
            || config.mounts.iter().any(|mount| clean(&mount.container_path).as_ref() == Some(&destination))
            || volumes.contains(&destination);
        if !taken {
            volumes.push(destination);
        }
    }
    Ok(volumes)
}

/// The files of the sandbox that every container sees.
const ETC_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// OCI runtime-spec "Default Filesystems", and those that CRI runtimes add.
fn standard(inputs: &Inputs<'_>, asked: &[Mount]) -> Result<Vec<Mount>, SpecError> {
    let security = &inputs.config.security;
    let system = if security.privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        filesystem("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        filesystem("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        // Group 5 is "tty" wherever it matters; glibc's grantpt(3) relies on nothing else being
        // there.
        filesystem(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        filesystem("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        filesystem("/sys", "sysfs", &["nosuid", "noexec", "nodev", system]),
    ];
    mounts.extend(cgroup_mounts(inputs, asked, system));
    let shm = if is_pods("ipc", inputs.sandbox.namespaces.ipc)? {
        inputs.sandbox_files.shm()
    } else {
        PathBuf::from(HOST_SHM)
    };
    mounts.push(bind("/dev/shm", shm, &["rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"]));
    let mode = if security.readonly_rootfs { "ro" } else { "rw" };
    mounts.extend(ETC_FILES.iter().map(|name| {
        let options = ["bind", "rprivate", "nosuid", "noexec", "nodev", mode];
        bind(&format!("/etc/{name}"), inputs.sandbox_files.etc(name), &options)
    }));
    Ok(mounts)
}

/// On v2 the hierarchy itself, of which the cgroup namespace shows the container's part; on v1 the
/// container's directory of each hierarchy.
fn cgroup_mounts(inputs: &Inputs<'_>, asked: &[Mount], system: &str) -> Vec<Mount> {
    const PLACE: &str = "/sys/fs/cgroup";
    let flags = ["nosuid", "noexec", "nodev"];
    if inputs.host.unified_cgroups {
        return vec![filesystem(PLACE, "cgroup2", &[&flags[..], &["relatime", system]].concat())];
    }
    // Read-only by itself, too, unless something writable was requested in it.
    let holds_asked = asked.iter().any(|mount| is_at_or_below(mount.destination(), PLACE));
    let own = if holds_asked { "rw" } else { system };
    let mut mounts = vec![filesystem(PLACE, "tmpfs", &[&flags[..], &["mode=755", "size=64k", own]].concat())];
    mounts.extend(inputs.cgroup_directories.iter().map(|cgroup| {
        let options = [&["bind", "rprivate"], &flags[..], &[system]].concat();
        bind(&format!("{PLACE}/{}", cgroup.name), cgroup.directory.clone(), &options)
    }));
    mounts
}

fn filesystem(destination: &str, kind: &str, options: &[&str]) -> Mount {
    mount(destination, kind, PathBuf::from(kind), options)
}

fn bind(destination: &str, source: PathBuf, options: &[&str]) -> Mount {
    mount(destination, "bind", source, options)
}

fn mount(destination: &str, kind: &str, source: PathBuf, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(PathBuf::from(destination))
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source))
        .set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
    mount
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn paths_are_cleaned_by_their_text() {
        for (path, expected) in [
            ("/", Some("/")),
            ("//", Some("/")),
            ("/a/", Some("/a")),
            ("/a//b/./c", Some("/a/b/c")),
            ("/a/../../b", Some("/b")),
            ("/..", Some("/")),
            ("/a b", Some("/a b")),
            ("/...", Some("/...")),
            ("", None),
            ("a", None),
            ("../a", None),
            ("/a\0", None),
        ] {
            assert_eq!(clean(path).as_deref(), expected, "{path:?}");
        }
        assert_eq!(clean(&format!("/{}", "a".repeat(MAX_PATH_BYTES))), None);
    }

    #[test]
    fn the_mount_that_a_path_lies_on_says_how_it_propagates() {
        let table = b"1 0 8:1 / / rw shared:1 - ext4 /dev/a rw\n\
            2 1 8:2 / /private rw - ext4 /dev/b rw\n\
            3 1 8:3 / /slave rw master:1 - ext4 /dev/c rw\n\
            4 1 8:4 / /with\\040space rw shared:7 master:1 - ext4 /dev/d rw\n\
            5 1 8:5 / /covered rw shared:9 - ext4 /dev/e rw\n\
            6 5 8:6 / /covered rw - ext4 shared:1 rw\n\
            broken\n\n";
        for (path, shared, slave) in [
            ("/a", true, false),
            ("/privately", true, false),
            ("/private", false, false),
            ("/private/a", false, false),
            ("/slave/a", false, true),
            ("/with space/a", true, true),
            // The last one on a place counts, and what looks like a tag behind the dash is none.
            ("/covered", false, false),
        ] {
            assert_eq!(propagation_tags(table, Path::new(path)), Tags { shared, slave }, "{path}");
            let check = |wanted| check_propagation(table, Path::new(path), wanted).is_ok();
            assert!(check(Propagation::Private));
            assert_eq!(check(Propagation::Bidirectional), shared, "{path}");
            assert_eq!(check(Propagation::HostToContainer), shared || slave, "{path}");
        }
        assert_eq!(propagation_tags(b"", Path::new("/a")), Tags::default());
    }

    #[test]
    fn sources_are_resolved_and_made() {
        let place = tempfile::tempdir().unwrap();
        let root = std::fs::canonicalize(place.path()).unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        std::os::unix::fs::symlink("file", root.join("link")).unwrap();
        std::os::unix::fs::symlink("nowhere", root.join("dangling")).unwrap();
        let source = |path: &str| find_source(&root.join(path));
        assert_eq!(source("link").unwrap(), root.join("file"));
        assert_eq!(source("new/er").unwrap(), root.join("new/er"));
        let mode = |path: &str| std::fs::metadata(root.join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("new"), mode("new/er")), (0o755, 0o755));
        assert!(matches!(source("file/below"), Err(SourceError::Look { .. })));
        assert!(matches!(source("dangling"), Err(SourceError::Make { .. })));
        assert!(matches!(source("n\0ul"), Err(SourceError::Look { .. })));
    }
}
