//! Where requested mounts may go: not into `/proc`, and into `/dev` only by its own name.
//!
//! The runtime's own set-up of a container depends on these directories: masks and read-only paths
//! of `/proc`, the device nodes and the terminal of `/dev`. A requested path can lead there
//! indirectly, through a link in a volume that another container writes. So the resolved place is
//! checked, after the path was resolved.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use berth_shim_proto::control::Failed;
use berth_shim_proto::launch::{Mount, REPLACEABLE_IN_PROC};
use berth_sys::beneath::{self, Root};
use berth_sys::errno::ELOOP;
use berth_sys::mount::{self, Filesystem};

use crate::failure::{Step, from_io, refused, shown};

/// The inode of the root of a procfs: `PROC_ROOT_INO` of the kernel's <linux/proc_fs.h>.
const PROC_ROOT_INODE: u64 = 1;

const STEP: &str = "find the mount point";

/// Checks `place`, to which the path of `mount` has led below `root`, and returns the place to
/// mount on. `source` is what a bind mount shows.
///
/// # Errors
/// When nothing may be mounted there.
pub(crate) fn checked(
    root: &Root,
    mount: &Mount,
    place: OwnedFd,
    source: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, Failed> {
    let about = shown(&mount.target);
    if mount.target == b"/proc" {
        let of_kernel = source.is_none_or(is_root_of_procfs);
        let reason = "only the root of a procfs can be mounted on /proc";
        return if of_kernel { Ok(place) } else { Err(refused(STEP, reason)) };
    }
    let lies_in = |name| is_on_filesystem_of(root, name, place.as_fd()).step(STEP, &about);
    match mount::filesystem_of(place.as_fd()).step(STEP, &about)? {
        // The procfs of the host, for example, that a request has mounted elsewhere is allowed.
        Filesystem::Proc if !lies_in("proc")? => return Ok(place),
        Filesystem::Proc if REPLACEABLE_IN_PROC.iter().any(|path| path.as_bytes() == mount.target) => {}
        Filesystem::Proc => {
            let allowed = REPLACEABLE_IN_PROC.join(", ");
            return Err(refused(
                STEP,
                format!("{about} is in /proc, where only {allowed} can be mounted on"),
            ));
        }
        Filesystem::Memory if !lies_in("dev")? => return Ok(place),
        // A request that mounts the host's /dev gets its links with it, and nothing is created in
        // it.
        Filesystem::Memory if is_of_host("/dev", place.as_fd()).step(STEP, &about)? => return Ok(place),
        Filesystem::Memory | Filesystem::Terminals => {}
        Filesystem::Other => return Ok(place),
    }
    let path = mount.target.strip_prefix(b"/").unwrap_or(&mount.target);
    root.resolve_no_links(Path::new(OsStr::from_bytes(path))).map_err(|error| {
        if error.raw_os_error() == Some(ELOOP) {
            refused(STEP, format!("{about} leads through a symbolic link into /proc or /dev"))
        } else {
            from_io(&error, STEP, &about)
        }
    })
}

fn is_root_of_procfs(source: BorrowedFd<'_>) -> bool {
    mount::is_procfs(source).unwrap_or(false)
        && beneath::stat_fd(source).is_ok_and(|found| found.identity.1 == PROC_ROOT_INODE)
}

/// Whether `place` is on the filesystem of this directory of the host, whose files the shim's child
/// still sees.
fn is_of_host(directory: &str, place: BorrowedFd<'_>) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        found => Ok(found?.dev() == beneath::stat_fd(place)?.identity.0),
    }
}

/// Whether `place` is on the filesystem of the container's own `/proc` or `/dev`.
fn is_on_filesystem_of(root: &Root, name: &str, place: BorrowedFd<'_>) -> io::Result<bool> {
    let own = match root.open_dir_no_links(Path::new(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        own => own?,
    };
    Ok(beneath::stat_fd(own.as_fd())?.identity.0 == beneath::stat_fd(place)?.identity.0)
}
