//! Mounts as file descriptors: the mount API of Linux 5.2 and `mount_setattr` of 5.12.
//!
//! A mount is created detached, gets its flags, and is attached by descriptor to a target that was
//! resolved beforehand, so no path that a container can change is looked up twice. `mount(2)`
//! itself is only used where the kernel has no other way (an overlay with many lower layers before
//! 6.5, a change of propagation).

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Attributes of a mount point: `MOUNT_ATTR_*` of `mount_setattr(2)`.
pub mod attr {
    /// The mount is read-only.
    pub const RDONLY: u64 = 0x1;
    /// Set-user-id bits and file capabilities are ignored on exec.
    pub const NOSUID: u64 = 0x2;
    /// Device nodes cannot be opened.
    pub const NODEV: u64 = 0x4;
    /// Programs cannot be executed.
    pub const NOEXEC: u64 = 0x8;
    /// The access-time mode bits, to be cleared when one of the modes is set.
    pub const ATIME_MASK: u64 = 0x70;
    /// Access times are not updated.
    pub const NOATIME: u64 = 0x10;
    /// Every access updates the time.
    pub const STRICTATIME: u64 = 0x20;
}

/// How mount events travel between this mount and its peers: mount_namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Nothing is propagated.
    Private,
    /// Events come in from the peer group, none go out.
    Slave,
    /// Events travel both ways.
    Shared,
}

impl Propagation {
    fn flag(self) -> libc::c_ulong {
        match self {
            Self::Private => libc::MS_PRIVATE,
            Self::Slave => libc::MS_SLAVE,
            Self::Shared => libc::MS_SHARED,
        }
    }
}

/// `struct mount_attr` of <linux/mount.h>, as of its first version (32 bytes).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSCONFIG_CMD_RECONFIGURE: libc::c_uint = 7;
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const AT_RECURSIVE: libc::c_uint = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let raw = RawFd::try_from(check(result)?).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel returned `raw` as a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn c_string(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// A filesystem under configuration: `fsopen(2)`.
#[derive(Debug)]
pub struct FsContext(OwnedFd);

impl FsContext {
    /// Starts the configuration of a filesystem of the type `fstype` (`"overlay"`, `"proc"`,
    /// `"tmpfs"`, …).
    ///
    /// # Errors
    /// `ENODEV` when the kernel has no such type, `EPERM` without `CAP_SYS_ADMIN`.
    pub fn open(fstype: &CStr) -> io::Result<Self> {
        // SAFETY: fsopen(2) reads a NUL-terminated string, which `fstype` is, and keeps no pointer.
        owned(unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), FSOPEN_CLOEXEC) }).map(Self)
    }

    /// Continues a configuration that another process has begun.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The descriptor, to pass to another process.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Sets `key` to the string `value` (at most 255 bytes: the kernel's limit for one parameter).
    ///
    /// # Errors
    /// `EINVAL` for an unknown key or a value that does not fit; the kernel's message is in
    /// [`FsContext::log`].
    pub fn set(&self, key: &str, value: &OsStr) -> io::Result<()> {
        let key = c_string(key.as_bytes())?;
        let value = c_string(value.as_bytes())?;
        // SAFETY: both pointers are NUL-terminated strings that live over the call; the auxiliary
        // value is 0 as FSCONFIG_SET_STRING demands.
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                FSCONFIG_SET_STRING,
                key.as_ptr(),
                value.as_ptr(),
                0,
            )
        })
        .map(drop)
    }

    /// Sets the flag `key` (a parameter without a value, such as `ro`).
    ///
    /// # Errors
    /// `EINVAL` for an unknown flag.
    pub fn set_flag(&self, key: &str) -> io::Result<()> {
        let key = c_string(key.as_bytes())?;
        // SAFETY: `key` is a NUL-terminated string that lives over the call; value and auxiliary
        // value are null and 0 as FSCONFIG_SET_FLAG demands.
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                FSCONFIG_SET_FLAG,
                key.as_ptr(),
                std::ptr::null::<libc::c_char>(),
                0,
            )
        })
        .map(drop)
    }

    /// Creates the filesystem and returns it as a detached mount with the attributes `attributes`
    /// ([`attr`]).
    ///
    /// # Errors
    /// Whatever the filesystem reports about its configuration; see [`FsContext::log`].
    pub fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        self.command(FSCONFIG_CMD_CREATE)?;
        // SAFETY: fsmount(2) takes only numbers.
        owned(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
    }

    /// Makes the filesystem, which [`FsContext::mount`] has created, read-only for every mount of
    /// it.
    ///
    /// # Errors
    /// `EBUSY` while a file in it is open for writing.
    pub fn make_read_only(&self) -> io::Result<()> {
        // After fsmount(2) the context is for reconfiguration.
        self.set_flag("ro")?;
        self.command(FSCONFIG_CMD_RECONFIGURE)
    }

    fn command(&self, command: libc::c_uint) -> io::Result<()> {
        // SAFETY: the commands take no key, value or auxiliary value.
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                std::ptr::null::<libc::c_char>(),
                std::ptr::null::<libc::c_char>(),
                0,
            )
        })
        .map(drop)
    }

    /// The kernel's messages about this configuration, for error texts; empty when there are none.
    #[must_use]
    pub fn log(&self) -> String {
        let mut text = String::new();
        let mut buffer = [0_u8; 512];
        // A read returns one message, and ENODATA when none is left. 16 are more than any
        // filesystem writes.
        for _ in 0..16 {
            match nix::unistd::read(&self.0, &mut buffer) {
                Ok(length) if length > 0 => {
                    if !text.is_empty() {
                        text.push_str("; ");
                    }
                    text.push_str(String::from_utf8_lossy(&buffer[..length]).trim_end());
                }
                _ => break,
            }
        }
        text
    }
}

/// Clones the mount at `path` (relative to `dir`, or `dir` itself when `path` is empty) as a
/// detached mount: `open_tree(2)`.
///
/// # Errors
/// `ENOENT` and the like from the lookup, `EINVAL` when the mount is unbindable.
pub fn clone_tree(dir: BorrowedFd<'_>, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_string(path.as_os_str().as_bytes())?;
    let mut flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    // SAFETY: `path` is a NUL-terminated string that lives over the call; the rest are numbers.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// [`clone_tree`] of an absolute path of this process.
///
/// # Errors
/// As [`clone_tree`]; `EINVAL` when `path` is not absolute.
pub fn clone_tree_at(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    if !path.is_absolute() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: AT_FDCWD is the special value that openat(2) documents, valid for as long as the
    // process lives.
    clone_tree(unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }, path, recursive)
}

/// Attaches the detached mount `mount` at the place that `target` (an `O_PATH` descriptor) stands
/// for: `move_mount(2)`.
///
/// # Errors
/// `EINVAL` when one is a directory and the other is not, or `mount` is not detached.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both path arguments are empty NUL-terminated strings, as the EMPTY_PATH flags ask;
    // the rest are numbers.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Changes attributes ([`attr`]) and propagation of the mount that `mount` stands for:
/// `mount_setattr(2)`.
///
/// With `recursive`, of every mount below it too, all or none.
///
/// # Errors
/// `EPERM` when a bit is locked by a more privileged namespace.
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    propagation: Option<Propagation>,
    recursive: bool,
) -> io::Result<()> {
    let attributes = MountAttr {
        attr_set: set,
        attr_clr: clear,
        propagation: propagation.map_or(0, Propagation::flag),
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH as libc::c_uint;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    // SAFETY: `attributes` is a `struct mount_attr` of the size given and lives over the call; the
    // path is an empty string.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Changes the propagation of the mount at `path`, and with `recursive` of all below it:
/// `mount(2)`.
///
/// # Errors
/// `EINVAL` when `path` is not a mount point.
pub fn set_propagation(path: &Path, propagation: Propagation, recursive: bool) -> io::Result<()> {
    let path = c_string(path.as_os_str().as_bytes())?;
    let flags = propagation.flag() | if recursive { libc::MS_REC } else { 0 };
    // SAFETY: the target is a NUL-terminated string; source, type and data may be null for a change
    // of propagation.
    check(libc::c_long::from(unsafe {
        libc::mount(std::ptr::null(), path.as_ptr(), std::ptr::null(), flags, std::ptr::null())
    }))
    .map(drop)
}

/// Mounts an overlay the old way, all options in one string of at most a page: `mount(2)`.
///
/// # Errors
/// `EINVAL` when the options are longer than a page or wrong.
pub fn mount_overlay_with_options(target: &Path, options: &OsStr) -> io::Result<()> {
    let target = c_string(target.as_os_str().as_bytes())?;
    let options = c_string(options.as_bytes())?;
    // SAFETY: all pointers are NUL-terminated strings that live over the call.
    check(libc::c_long::from(unsafe {
        libc::mount(c"overlay".as_ptr(), target.as_ptr(), c"overlay".as_ptr(), 0, options.as_ptr().cast())
    }))
    .map(drop)
}

/// The kind of filesystem of a place, among those that the kernel provides and that a container has
/// its own of: `fstatfs(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filesystem {
    /// `PROC_SUPER_MAGIC`.
    Proc,
    /// `DEVPTS_SUPER_MAGIC`.
    Terminals,
    /// `TMPFS_MAGIC`, devtmpfs too.
    Memory,
    /// Any other.
    Other,
}

/// The filesystem of `place`, according to the kernel and not to its path.
///
/// # Errors
/// None in practice.
pub fn filesystem_of(place: BorrowedFd<'_>) -> io::Result<Filesystem> {
    use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, PROC_SUPER_MAGIC, TMPFS_MAGIC};
    Ok(match nix::sys::statfs::fstatfs(place)?.filesystem_type() {
        PROC_SUPER_MAGIC => Filesystem::Proc,
        DEVPTS_SUPER_MAGIC => Filesystem::Terminals,
        TMPFS_MAGIC => Filesystem::Memory,
        _ => Filesystem::Other,
    })
}

/// Whether `place` lies on a procfs: `fstatfs(2)`, `PROC_SUPER_MAGIC`.
///
/// # Errors
/// None in practice.
pub fn is_procfs(place: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(nix::sys::statfs::fstatfs(place)?.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC)
}

/// Whether `place` lies on a filesystem of the kernel's own whose files have contents that are made
/// when they are read, and do not state how long they are: `fstatfs(2)`.
///
/// # Errors
/// None in practice.
pub fn states_no_lengths(place: BorrowedFd<'_>) -> io::Result<bool> {
    use nix::sys::statfs::{
        CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, PROC_SUPER_MAGIC, SECURITYFS_MAGIC,
        SYSFS_MAGIC, TRACEFS_MAGIC,
    };
    Ok(matches!(
        nix::sys::statfs::fstatfs(place)?.filesystem_type(),
        CGROUP_SUPER_MAGIC
            | CGROUP2_SUPER_MAGIC
            | DEBUGFS_MAGIC
            | PROC_SUPER_MAGIC
            | SECURITYFS_MAGIC
            | SYSFS_MAGIC
            | TRACEFS_MAGIC
    ))
}

/// Binds `source` on `target`, both paths of this process that no other process can change:
/// `mount(2)` with `MS_BIND`.
///
/// # Errors
/// `ENOENT` and the like from the lookups.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    let source = c_string(source.as_os_str().as_bytes())?;
    let target = c_string(target.as_os_str().as_bytes())?;
    // SAFETY: source and target are NUL-terminated strings that live over the call; type and data
    // are ignored for a bind.
    check(libc::c_long::from(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null())
    }))
    .map(drop)
}

/// Detaches whatever is mounted at `path`, without following a symbolic link there: `umount2(2)`,
/// `MNT_DETACH`.
///
/// # Errors
/// `EINVAL` when nothing is mounted there, `ENOENT` when there is no such path.
pub fn detach(path: &Path) -> io::Result<()> {
    let path = c_string(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is a NUL-terminated string that lives over the call.
    check(libc::c_long::from(unsafe {
        libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW)
    }))
    .map(drop)
}

/// Makes the directory `root` (a mount) the root of this mount namespace and drops the old root:
/// `pivot_root(2)`.
///
/// The old root is stacked on the new one and then detached, the way that the man page describes
/// under `pivot_root(".", ".")`; no directory in the new root is needed. The working directory is
/// the new root afterwards.
///
/// The namespace's root is replaced, even for a caller in a chroot (whose root has to be a mount as
/// well): if only the caller's root were replaced, everything of the host would stay in the
/// namespace, and a process that joins it would begin there.
///
/// # Errors
/// `EINVAL` when `root` is not a mount point, its parent mount is shared, or the namespace's root
/// is the kernel's initial one, which cannot be replaced; `EPERM` without `CAP_SYS_ADMIN` and
/// `CAP_SYS_CHROOT`.
pub fn pivot_into(root: BorrowedFd<'_>) -> io::Result<()> {
    let seen = mount_id(Path::new("/"))?;
    // A process that joins a mount namespace gets its root, even if it is in it already: setns(2).
    let own = crate::process::open_pidfd(nix::unistd::getpid().as_raw())?;
    crate::ns::join(own.as_fd(), crate::ns::MOUNT)?;
    let chroot = mount_id(Path::new("/"))? != seen;
    if chroot {
        // pivot_root(2) requires it to be private; what was mounted below the caller's own root is
        // up to the caller.
        set_propagation(Path::new("/"), Propagation::Private, false)?;
    }
    let old = open_directory(c"/")?;
    nix::unistd::fchdir(root.as_fd())?;
    // SAFETY: both arguments are NUL-terminated strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    nix::unistd::fchdir(old.as_fd())?;
    if chroot {
        // Otherwise the mounts of the host would be unmounted with their copies here.
        set_propagation(Path::new("."), Propagation::Private, true)?;
    }
    // SAFETY: the path is a NUL-terminated string.
    check(libc::c_long::from(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) }))?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// A directory to change to later: `open(2)`, `O_PATH`.
fn open_directory(path: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the path is a NUL-terminated string.
    let raw = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nothing else.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Which mount `path` is on.
fn mount_id(path: &Path) -> io::Result<u64> {
    mount_id_at(libc::AT_FDCWD, &c_string(path.as_os_str().as_bytes())?, 0)
}

/// Which mount a path below the directory `raw` is on: `statx(2)`, `STATX_MNT_ID`.
pub(crate) fn mount_id_at(raw: RawFd, path: &CStr, flags: i32) -> io::Result<u64> {
    // SAFETY: all fields of the structure are numbers.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a NUL-terminated string, and `found` has room for what the call writes.
    let result = unsafe { libc::statx(raw, path.as_ptr(), flags, libc::STATX_MNT_ID, &raw mut found) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(found.stx_mnt_id)
}
