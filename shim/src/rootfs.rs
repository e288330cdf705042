//! The container's root: overlay, mounts, device nodes, hidden and read-only paths.
//!
//! Runs in the child, in its own mount namespace, before the root is changed. The content of the
//! root may be hostile: every path in it is resolved below it by descriptor (`berth_sys::beneath`),
//! mounts are made detached and attached to descriptors, and a mask that cannot be applied to
//! something that is there fails the container.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use berth_shim_proto::control::Failed;
use berth_shim_proto::launch::{
    Device, Launch, Mount, Propagation, Rootfs, mount::Filesystem, mount::Source,
};
use berth_sys::beneath::{self, FileType, Node, Root};
use berth_sys::errno::{EINVAL, ELOOP};
use berth_sys::mount::{self, FsContext, attr};

use crate::failure::{Step, from_io, refused, shown};
use crate::host_path::host_path;
use crate::mount_place;
use crate::user::Accounts;

/// Links that every `/dev` has: runtime-spec, "Default Devices" and "/dev symbolic links".
const DEV_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// A root that is ready on its mount point.
pub(crate) struct Assembled {
    pub(crate) root: OwnedFd,
    /// The accounts as the program would see them without the masks.
    pub(crate) accounts: Accounts,
}

/// Makes an empty directory that takes no writes the root of the calling process's mount namespace.
pub(crate) fn enter_empty_root() -> Result<(), Failed> {
    mount::set_propagation(Path::new("/"), mount::Propagation::Private, true)
        .step("make the mounts private", "/")?;
    let empty = FsContext::open(c"tmpfs").step("open", "tmpfs")?;
    empty.set("size", "0".as_ref()).step("configure", "tmpfs")?;
    empty.set("nr_inodes", "1".as_ref()).step("configure", "tmpfs")?;
    let root = empty
        .mount(attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)
        .step("mount", "an empty root")?;
    let place = std::fs::File::open("/proc").step("open", "/proc")?;
    mount::attach(root.as_fd(), place.as_fd()).step("mount", "an empty root")?;
    drop(place);
    mount::pivot_into(root.as_fd()).step("change the root", "")
}

/// Builds the root on its mount point; the caller makes it the root of the mount namespace.
/// `procfs` is the one for `/proc`, a detached mount; without it, a new one shows the caller's own
/// pid namespace.
pub(crate) fn assemble(launch: &Launch, mut procfs: Option<OwnedFd>) -> Result<Assembled, Failed> {
    // Sources are pinned first: they are the host's, and after this no path of the host is looked
    // up again.
    let sources = pin_sources(launch)?;
    let from_host = propagation(launch.rootfs.propagation);
    // Changes made here must not reach the host, above all the unmounting of the old root. Clones
    // pinned above have kept their peers, so a shared mount stays shared with the host.
    let whole = match from_host {
        mount::Propagation::Private => mount::Propagation::Private,
        mount::Propagation::Slave | mount::Propagation::Shared => mount::Propagation::Slave,
    };
    mount::set_propagation(Path::new("/"), whole, true).step("detach the mounts from the host", "/")?;

    let covers = Covers::make(host_path(&launch.rootfs.mount_point))?;
    let mounted = mount_overlay(&launch.rootfs)?;
    let root = Root::from_fd(mounted.try_clone().step("copy a descriptor", "")?).step("open the root", "")?;
    // Before the mounts, some of which may lie in them.
    for path in &launch.volumes {
        keep_writable(&root, path, launch.rootfs.read_only)?;
    }
    for (mount, source) in launch.mounts.iter().zip(sources) {
        attach(&root, mount, source, &mut procfs)?;
    }
    if has_own_dev(launch) {
        make_dev_links(&root)?;
    }
    for device in &launch.devices {
        make_device(&root, device)?;
    }
    for path in &launch.readonly_paths {
        make_readonly(&root, path)?;
    }
    // The user is looked up in the files that the program sees, including those of a volume, but
    // ignoring masks: they are there to keep files from the program.
    let accounts = Accounts::read(&root)?;
    for path in &launch.masked_paths {
        covers.hide(&root, path)?;
    }
    if launch.rootfs.read_only {
        mount::set_attributes(mounted.as_fd(), attr::RDONLY, 0, None, false)
            .step("make the root read-only", "")?;
    }
    Ok(Assembled { root: mounted, accounts })
}

/// Whether `/dev` is a tmpfs created for this container, and not something of the host.
pub(crate) fn has_own_dev(launch: &Launch) -> bool {
    launch
        .mounts
        .iter()
        .any(|mount| mount.target == b"/dev" && matches!(mount.source, Some(Source::Filesystem(_))))
}

/// Binds the container's terminal on `/dev/console`, by descriptor on both sides. Runs once the
/// root is the root.
pub(crate) fn show_console(terminal: std::os::fd::BorrowedFd<'_>) -> Result<(), Failed> {
    const STEP: &str = "show the terminal as /dev/console";
    let root = Root::open(Path::new("/")).step(STEP, "")?;
    let dev = root.open_dir_no_links(Path::new("dev")).step(STEP, "")?;
    match dev.create_file(OsStr::new("console"), 0o600) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => {
            made.step(STEP, "")?;
        }
    }
    let place = root.resolve_no_follow(Path::new("dev/console")).step(STEP, "")?;
    let clone = mount::clone_tree(terminal, Path::new(""), false).step(STEP, "")?;
    mount::attach(clone.as_fd(), place.as_fd()).step(STEP, "")
}

/// The steps that are possible only once the root is the root.
pub(crate) fn finish_inside(launch: &Launch) -> Result<(), Failed> {
    // Propagation of the container's own mounts, for containers that asked for some; pivot_root(2)
    // refuses a shared root.
    match propagation(launch.rootfs.propagation) {
        mount::Propagation::Shared => {
            mount::set_propagation(Path::new("/"), mount::Propagation::Shared, false)
                .step("share the root's mount", "/")
        }
        mount::Propagation::Private | mount::Propagation::Slave => Ok(()),
    }
}

fn propagation(number: i32) -> mount::Propagation {
    match Propagation::try_from(number) {
        Ok(Propagation::Slave) => mount::Propagation::Slave,
        Ok(Propagation::Shared) => mount::Propagation::Shared,
        Ok(Propagation::Private) | Err(_) => mount::Propagation::Private,
    }
}

fn pin_sources(launch: &Launch) -> Result<Vec<Option<OwnedFd>>, Failed> {
    launch
        .mounts
        .iter()
        .map(|mount| match &mount.source {
            Some(Source::Bind(bind)) => {
                let path = host_path(&bind.source);
                mount::clone_tree_at(path, bind.recursive)
                    .step("open the mount source", path.display())
                    .map(Some)
            }
            _ => Ok(None),
        })
        .collect()
}

/// Mounts the overlay on its mount point and returns a descriptor of it.
fn mount_overlay(rootfs: &Rootfs) -> Result<OwnedFd, Failed> {
    const STEP: &str = "mount the root";
    let target = host_path(&rootfs.mount_point);
    let place = std::fs::File::open(target).step(STEP, target.display())?;
    match new_overlay(rootfs) {
        Ok(mounted) => {
            mount::attach(mounted.as_fd(), place.as_fd()).step(STEP, target.display())?;
            Ok(mounted)
        }
        // Linux before 6.5 has no parameter for a single lower layer.
        Err(failed) if failed.errno == EINVAL => {
            old_overlay(rootfs, target).map_err(|_| failed)?;
            let fd = std::fs::File::open(target).step(STEP, target.display())?;
            Ok(fd.into())
        }
        Err(failed) => Err(failed),
    }
}

fn new_overlay(rootfs: &Rootfs) -> Result<OwnedFd, Failed> {
    const STEP: &str = "mount the root";
    let overlay = FsContext::open(c"overlay").step(STEP, "overlay")?;
    let set = |key: &str, value: &OsStr| {
        overlay
            .set(key, value)
            .map_err(|error| with_log(&overlay, &error, STEP, &format!("{key}={}", value.display())))
    };
    set("source", OsStr::new("overlay"))?;
    for layer in &rootfs.lower_dirs {
        set("lowerdir+", OsStr::from_bytes(layer))?;
    }
    set("upperdir", OsStr::from_bytes(&rootfs.upper_dir))?;
    set("workdir", OsStr::from_bytes(&rootfs.work_dir))?;
    for (key, value) in OVERLAY_OPTIONS {
        set(key, OsStr::new(value))?;
    }
    // The writable layer dies with the container, so its unmounting need not wait for the disk:
    // overlayfs, "Volatile mount".
    overlay.set_flag("volatile").map_err(|error| with_log(&overlay, &error, STEP, "volatile"))?;
    overlay.mount(0).map_err(|error| with_log(&overlay, &error, STEP, "overlay"))
}

/// Off, whatever the kernel's default: they change the format of the writable layer, and Berth
/// reads none of it.
const OVERLAY_OPTIONS: [(&str, &str); 3] = [("index", "off"), ("redirect_dir", "off"), ("metacopy", "off")];

/// All options in one string of at most a page. Layers go by descriptor, which makes the string
/// short enough for some 200 of them.
fn old_overlay(rootfs: &Rootfs, target: &Path) -> Result<(), Failed> {
    use std::os::fd::AsRawFd;
    const STEP: &str = "mount the root";
    let mut open = Vec::new();
    let mut options = OsString::from("volatile");
    for (key, value) in OVERLAY_OPTIONS {
        options.push(format!(",{key}={value}"));
    }
    options.push(",lowerdir=");
    for (number, layer) in rootfs.lower_dirs.iter().enumerate() {
        let layer = std::fs::File::open(host_path(layer)).step(STEP, host_path(layer).display())?;
        let separator = if number == 0 { "" } else { ":" };
        options.push(format!("{separator}/proc/self/fd/{}", layer.as_raw_fd()));
        open.push(layer);
    }
    for (key, path) in [("upperdir", &rootfs.upper_dir), ("workdir", &rootfs.work_dir)] {
        let directory = std::fs::File::open(host_path(path)).step(STEP, host_path(path).display())?;
        options.push(format!(",{key}=/proc/self/fd/{}", directory.as_raw_fd()));
        open.push(directory);
    }
    mount::mount_overlay_with_options(target, &options).step(STEP, target.display())
}

fn with_log(context: &FsContext, error: &io::Error, step: &str, about: &str) -> Failed {
    let log = context.log();
    let about = if log.is_empty() { about.to_owned() } else { format!("{about} ({log})") };
    from_io(error, step, about)
}

fn attach(
    root: &Root,
    mount: &Mount,
    source: Option<OwnedFd>,
    procfs: &mut Option<OwnedFd>,
) -> Result<(), Failed> {
    let path = shown(&mount.target);
    let is_directory = match &source {
        Some(source) => {
            beneath::stat_fd(source.as_fd()).step("examine the mount source", &path)?.file_type
                == FileType::Directory
        }
        None => true,
    };
    check_kind(root, &mount.target, is_directory)?;
    let target = target_for(root, &mount.target, is_directory, mount.no_symlinks)?;
    let target = mount_place::checked(root, mount, target, source.as_ref().map(AsFd::as_fd))?;
    let mounted = match (&mount.source, source) {
        (Some(Source::Filesystem(filesystem)), _) => {
            let made = if filesystem.fstype == "proc" { procfs.take() } else { None };
            match made {
                Some(procfs) => {
                    mount::set_attributes(
                        procfs.as_fd(),
                        mount.attributes,
                        !mount.attributes & CLONED_FLAGS | attr::ATIME_MASK,
                        Some(mount::Propagation::Private),
                        false,
                    )
                    .step("set the flags of the mount", &path)?;
                    procfs
                }
                None => new_filesystem(filesystem, mount.attributes, &path)?,
            }
        }
        (Some(Source::Bind(bind)), Some(clone)) => {
            mount::set_attributes(
                clone.as_fd(),
                mount.attributes,
                atime_mask(mount.attributes),
                None,
                mount.attributes_recursive,
            )
            .step("set the flags of the mount", &path)?;
            let own = propagation(bind.propagation);
            // Shared stays as it was cloned, a peer of the host's mount; sharing it here would make
            // it a peer of none.
            if own != mount::Propagation::Shared {
                mount::set_attributes(clone.as_fd(), 0, 0, Some(own), true)
                    .step("set the propagation of the mount", &path)?;
            }
            clone
        }
        _ => return Err(refused("mount", format!("{path}: no source in the plan"))),
    };
    mount::attach(mounted.as_fd(), target.as_fd()).step("mount", path)
}

/// The attributes that a cloned mount already has, and a new one gets only on request.
const CLONED_FLAGS: u64 = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;

/// A directory is mounted on a directory, anything else on anything else: mount(2), `ENOTDIR`. The
/// kernel's error would not say which is which.
fn check_kind(root: &Root, target: &[u8], source_is_directory: bool) -> Result<(), Failed> {
    let Some(place) = if_present(root, target, "find the mount point")? else { return Ok(()) };
    let about = shown(target);
    let found = beneath::stat_fd(place.as_fd()).step("examine the mount point", &about)?.file_type;
    match (source_is_directory, found == FileType::Directory) {
        (true, false) => {
            Err(refused("mount", format!("{about}: the source is a directory and the mount point is not")))
        }
        (false, true) => {
            Err(refused("mount", format!("{about}: the source is not a directory and the mount point is")))
        }
        _ => Ok(()),
    }
}

/// The access-time mode is a field, not a bit: it has to be cleared when a value is set,
/// mount_setattr(2).
fn atime_mask(attributes: u64) -> u64 {
    if attributes & attr::ATIME_MASK != 0 { attr::ATIME_MASK } else { 0 }
}

fn new_filesystem(filesystem: &Filesystem, attributes: u64, path: &str) -> Result<OwnedFd, Failed> {
    const STEP: &str = "mount";
    let fstype =
        CString::new(filesystem.fstype.as_bytes()).map_err(|_| refused(STEP, "a type with a NUL byte"))?;
    let about = format!("{} on {path}", filesystem.fstype);
    let context = FsContext::open(&fstype).step(STEP, &about)?;
    if !filesystem.source.is_empty() {
        context
            .set("source", OsStr::new(&filesystem.source))
            .map_err(|error| with_log(&context, &error, STEP, &about))?;
    }
    for option in &filesystem.options {
        match option.split_once('=') {
            Some((key, value)) => context.set(key, OsStr::new(value)),
            None => context.set_flag(option),
        }
        .map_err(|error| with_log(&context, &error, STEP, &format!("{about}, option {option}")))?;
    }
    context.mount(attributes).map_err(|error| with_log(&context, &error, STEP, &about))
}

/// Resolves the place for a mount, and creates it when absent: a directory for a directory, else an
/// empty file.
fn target_for(root: &Root, path: &[u8], directory: bool, no_symlinks: bool) -> Result<OwnedFd, Failed> {
    const STEP: &str = "find the mount point";
    let about = shown(path);
    let relative = relative(path);
    if no_symlinks {
        match root.open_dir_no_links(relative) {
            Ok(found) => return found.as_fd().try_clone_to_owned().step(STEP, about),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A link, or a file, where the kernel's own files belong. Links in a root are
            // legitimate, here they are an attack.
            Err(error) if error.raw_os_error() == Some(ELOOP) => {
                return Err(refused(STEP, format!("{about}: the image has a symbolic link there")));
            }
            Err(error) => return Err(from_io(&error, STEP, about)),
        }
    }
    if directory {
        let made = root.make_dir_all(relative, 0o755).step(STEP, &about)?;
        return made.as_fd().try_clone_to_owned().step(STEP, about);
    }
    match root.resolve(relative) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        found => return found.step(STEP, about),
    }
    make_file(root, relative).step("create the mount point", &about)?;
    root.resolve(relative).step(STEP, about)
}

/// As many links as the kernel follows: path_resolution(7).
const MAX_LINKS: usize = 40;

/// Creates an empty file and its parent directories. A link to a file that does not exist is
/// followed inside the root, and its target created: in many images `/etc/resolv.conf` is one.
fn make_file(root: &Root, path: &Path) -> io::Result<()> {
    let mut path = path.to_owned();
    for _ in 0..=MAX_LINKS {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        path.pop();
        let parent = root.make_dir_all(&path, 0o755)?;
        match parent.create_file(&name, 0o644) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let target = parent.read_link(&name)?;
                // An absolute target takes the place of the whole path; the root is the
                // container's.
                path.push(target);
            }
            made => return made.map(drop),
        }
    }
    Err(io::Error::from_raw_os_error(ELOOP))
}

fn relative(path: &[u8]) -> &Path {
    let start = path.iter().position(|byte| *byte != b'/').unwrap_or(path.len());
    Path::new(OsStr::from_bytes(path.get(start..).unwrap_or_default()))
}

/// A volume of the image: an ordinary directory of the writable layer, but with its own mount in a
/// root that is made read-only, so that it keeps its content and takes writes.
fn keep_writable(root: &Root, path: &[u8], read_only: bool) -> Result<(), Failed> {
    const STEP: &str = "create the image's volume";
    let about = shown(path);
    let directory = root.make_dir_all(relative(path), 0o755).step(STEP, &about)?;
    if read_only {
        let clone = mount::clone_tree(directory.as_fd(), Path::new(""), false).step(STEP, &about)?;
        mount::attach(clone.as_fd(), directory.as_fd()).step(STEP, about)?;
    }
    Ok(())
}

fn make_dev_links(root: &Root) -> Result<(), Failed> {
    // The tmpfs was mounted just now, so /dev is empty and private.
    let dev = root.open_dir_no_links(Path::new("dev")).step("open", "/dev")?;
    for (name, target) in DEV_LINKS {
        match dev.make_symlink(OsStr::new(target), OsStr::new(name)) {
            // A mount of the request below /dev took the name.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result.step("create the link", format!("/dev/{name}"))?,
        }
    }
    Ok(())
}

fn make_device(root: &Root, device: &Device) -> Result<(), Failed> {
    const STEP: &str = "create the device";
    let about = shown(&device.path);
    let path = relative(&device.path);
    let name = path.file_name().ok_or_else(|| refused(STEP, &about))?;
    let parent = root.make_dir_all(path.parent().unwrap_or(Path::new("")), 0o755).step(STEP, &about)?;
    let node = if device.block {
        Node::BlockDevice(device.major, device.minor)
    } else {
        Node::CharDevice(device.major, device.minor)
    };
    match parent.make_node(name, node, device.mode) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // A second device for one place, or a file of the image: the request wins, but never
            // over a mount.
            parent.unlink(name).step(STEP, &about)?;
            parent.make_node(name, node, device.mode).step(STEP, &about)?;
        }
        result => result.step(STEP, &about)?,
    }
    // mknod applied the umask to the mode.
    parent.chmod(name, device.mode).step(STEP, &about)?;
    parent.chown(name, device.uid, device.gid).step(STEP, about)
}

fn make_readonly(root: &Root, path: &[u8]) -> Result<(), Failed> {
    const STEP: &str = "make the path read-only";
    let about = shown(path);
    let Some(target) = if_present(root, path, STEP)? else { return Ok(()) };
    // Where a mount begins, it is the container's own and is changed itself; elsewhere a mount is
    // laid over the path.
    match mount::set_attributes(target.as_fd(), attr::RDONLY, 0, None, true) {
        Err(error) if error.raw_os_error() == Some(EINVAL) => {}
        result => return result.step(STEP, about),
    }
    let clone = mount::clone_tree(target.as_fd(), Path::new(""), true).step(STEP, &about)?;
    mount::set_attributes(clone.as_fd(), attr::RDONLY, 0, None, true).step(STEP, &about)?;
    mount::attach(clone.as_fd(), target.as_fd()).step(STEP, about)
}

/// Only an absent target is skipped; an error in looking is returned (CVE-2025-31133: a mask
/// skipped is a mask missing).
fn if_present(root: &Root, path: &[u8], step: &str) -> Result<Option<OwnedFd>, Failed> {
    match root.resolve(relative(path)) {
        Ok(target) => Ok(Some(target)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(from_io(&error, step, shown(path))),
    }
}

/// One empty read-only directory and one empty device, which hide everything that is masked. Both
/// are created here, and neither is taken from the root, where it could be something else
/// (CVE-2025-31133).
struct Covers {
    directory: OwnedFd,
    null: OwnedFd,
}

impl Covers {
    /// `place` is where the root will be mounted, over both: a mount has to be attached somewhere
    /// to be cloned by Linux before 6.15.
    fn make(place: &Path) -> Result<Self, Failed> {
        const STEP: &str = "prepare the masks";
        let target = std::fs::File::open(place).step(STEP, place.display())?;
        let devices = Self::tmpfs("2", attr::NOSUID | attr::NOEXEC)?;
        mount::attach(devices.as_fd(), target.as_fd()).step(STEP, place.display())?;
        let inside = Root::from_fd(devices).step(STEP, "tmpfs")?;
        let null = inside
            .open_dir(Path::new(""))
            .and_then(|entries| {
                entries.make_node(OsStr::new("null"), Node::CharDevice(1, 3), 0o666)?;
                // mknod applied the umask to the mode.
                entries.chmod(OsStr::new("null"), 0o666)?;
                inside.resolve_no_follow(Path::new("null"))
            })
            .step(STEP, "an empty device")?;
        let directory = Self::tmpfs("1", attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)?;
        mount::attach(directory.as_fd(), target.as_fd()).step(STEP, place.display())?;
        Ok(Self { directory, null })
    }

    fn tmpfs(inodes: &str, attributes: u64) -> Result<OwnedFd, Failed> {
        let tmpfs = FsContext::open(c"tmpfs").step("prepare the masks", "tmpfs")?;
        for (key, value) in [("size", "4k"), ("nr_inodes", inodes), ("mode", "755")] {
            tmpfs
                .set(key, OsStr::new(value))
                .map_err(|error| with_log(&tmpfs, &error, "prepare the masks", key))?;
        }
        tmpfs.mount(attributes).map_err(|error| with_log(&tmpfs, &error, "prepare the masks", "tmpfs"))
    }

    fn hide(&self, root: &Root, path: &[u8]) -> Result<(), Failed> {
        const STEP: &str = "mask the path";
        let about = shown(path);
        let Some(target) = if_present(root, path, STEP)? else { return Ok(()) };
        let file_type = beneath::stat_fd(target.as_fd()).step(STEP, &about)?.file_type;
        let cover = if file_type == FileType::Directory { &self.directory } else { &self.null };
        let clone = mount::clone_tree(cover.as_fd(), Path::new(""), false).step(STEP, &about)?;
        mount::attach(clone.as_fd(), target.as_fd()).step(STEP, about)
    }
}
