//! The null device that a program gets for an unused stream.
//!
//! It is on its own file system. A descriptor of the host's `/dev/null` would refer to an inode of
//! the host, whose mode and owner its holder could change for everyone: `chmod /proc/self/fd/0`.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::OnceLock;

use berth_shim_proto::control::Failed;
use berth_sys::beneath::{Node, Root};
use berth_sys::file;
use berth_sys::mount::{FsContext, attr};

use crate::failure::Step;

const STEP: &str = "create the null device";

/// Its path in its file system, as links to open files show it.
const PLACE: &str = "dev/null";

/// A descriptor for it, open for reading and writing. All programs of the container share one
/// device.
pub(crate) fn open() -> Result<OwnedFd, Failed> {
    static OPENED: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(opened) = OPENED.get() {
        return opened.try_clone().step(STEP, "");
    }
    let made = make()?;
    let opened = made.try_clone().step(STEP, "")?;
    // There is only one thread, so this cannot race.
    let _ = OPENED.set(made);
    Ok(opened)
}

fn make() -> Result<OwnedFd, Failed> {
    let context = FsContext::open(c"tmpfs").step(STEP, "tmpfs")?;
    // The mount disappears with the last file that is open in it.
    let mount = context.mount(attr::NOSUID | attr::NOEXEC).step(STEP, "tmpfs")?;
    let root = Root::from_fd(mount).step(STEP, "tmpfs")?;
    let directory = root.make_dir_all(Path::new("dev"), 0o755).step(STEP, "dev")?;
    let name = OsStr::new("null");
    directory.make_node(name, Node::CharDevice(1, 3), 0o666).step(STEP, PLACE)?;
    // mknod applied the umask to the mode.
    directory.chmod(name, 0o666).step(STEP, PLACE)?;
    root.open_with(Path::new(PLACE), file::READ_WRITE).step(STEP, PLACE)
}
