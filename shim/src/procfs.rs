//! The procfs of a pid namespace in which other processes live.
//!
//! A procfs shows the pid namespace of the process that created it (pid_namespaces(7)). A process
//! that creates one in an inhabited namespace would be visible there, with the privilege that
//! mounting takes, and a process that may trace it would have that privilege. So none is created: a
//! procfs that was created before any process lived there is cloned.
//!
//! - A pod that shares its pid namespace has one, created at the birth of the pod's first process
//!   and mounted on the host (`Namespaces.procfs`).
//! - A container that is the target of another has its own, in its own mount namespace. Its
//!   processes may have mounted anything there, so the shim checks that it is a complete procfs, of
//!   that pid namespace.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use berth_shim_proto::control::Failed;
use berth_sys::beneath::{Root, stat_fd};
use berth_sys::process::Cloned;
use berth_sys::{mount, ns, process, socket};

use crate::failure::{Step, refused};

/// The container whose pid namespace another one joins (`NamespaceMode.TARGET`), as found by the
/// daemon.
#[derive(Debug)]
pub(crate) struct Target {
    /// Its main process.
    process: OwnedFd,
    /// The pid namespace of that process.
    pid_namespace: OwnedFd,
}

/// How long examining a target's `/proc` may take.
const LOOK: Duration = Duration::from_secs(5);

/// The inode of the root of every procfs: `PROC_ROOT_INO`, <linux/proc_fs.h>.
const ROOT_INODE: u64 = 1;

impl Target {
    /// Takes the descriptors of the plan: the process, then the namespace.
    pub(crate) fn received(descriptors: Vec<OwnedFd>) -> Result<Self, Failed> {
        let mut descriptors = descriptors.into_iter();
        match (descriptors.next(), descriptors.next()) {
            (Some(process), Some(pid_namespace)) => Ok(Self { process, pid_namespace }),
            _ => Err(refused("find the target", "no descriptors came with the plan")),
        }
    }

    pub(crate) fn all(&self) -> [BorrowedFd<'_>; 2] {
        [self.process.as_fd(), self.pid_namespace.as_fd()]
    }

    /// Its pid namespace.
    pub(crate) fn pid_namespace(&self) -> BorrowedFd<'_> {
        self.pid_namespace.as_fd()
    }

    /// Its procfs, as a detached mount.
    ///
    /// Another process, outside its pid namespace, looks into its mount namespace: joining a mount
    /// namespace changes root and working directory for good, setns(2). It may hang in a filesystem
    /// that the target serves, so its time is limited to [`LOOK`], and it ends with this process.
    pub(crate) fn procfs(&self) -> Result<OwnedFd, Failed> {
        const STEP: &str = "take the target's procfs";
        let (own, other) = socket::packet_pair().step("create a socket", "")?;
        let pid = match process::clone_process(0, None).step("create a process", "")? {
            Cloned::Child => {
                drop(own);
                let guarded = process::end_with_parent().step("guard the process", "");
                let code = match guarded.and_then(|()| self.clone_procfs()) {
                    Ok(procfs) => socket::send(other.as_fd(), b"p", &[procfs.as_fd()]).is_err().into(),
                    Err(failed) => {
                        // Without a message the parent has its own error.
                        let _ = socket::send(other.as_fd(), failed.to_string().as_bytes(), &[]);
                        1
                    }
                };
                process::exit_now(code)
            }
            Cloned::Parent { pid, .. } => pid,
        };
        drop(other);
        socket::limit_waits(own.as_fd(), LOOK).step(STEP, "")?;
        let mut words = [0; 4096];
        // If it hangs it is not waited for: it ends with this process, which ends with the error.
        let (length, descriptors) =
            socket::receive(own.as_fd(), &mut words).step(STEP, "/proc does not answer")?;
        process::wait_for(pid).step(STEP, "")?;
        descriptors
            .into_iter()
            .next()
            .ok_or_else(|| refused(STEP, String::from_utf8_lossy(words.get(..length).unwrap_or_default())))
    }

    fn clone_procfs(&self) -> Result<OwnedFd, Failed> {
        const STEP: &str = "examine the target's /proc";
        let number = ns::number(self.pid_namespace()).step(STEP, "pid namespace")?;
        ns::join(self.process.as_fd(), ns::MOUNT).step("join the target's mount namespace", "")?;
        let root = Root::open(Path::new("/")).step(STEP, "/")?;
        let place = root.resolve_no_follow(Path::new("proc")).step(STEP, "/proc")?;
        check(place.as_fd(), number).step(STEP, "it is not the procfs of its own pid namespace")?;
        mount::clone_tree(place.as_fd(), Path::new(""), false).step(STEP, "")
    }
}

/// The procfs that is mounted at `path` on the host, as a detached mount.
pub(crate) fn pinned(path: &Path) -> Result<OwnedFd, Failed> {
    const STEP: &str = "take the pod's procfs";
    let place =
        Root::open(path).step(STEP, path.display())?.resolve(Path::new("")).step(STEP, path.display())?;
    if !mount::is_procfs(place.as_fd()).step(STEP, path.display())? {
        return Err(refused(STEP, format!("{} is not a procfs: recreate the pod", path.display())));
    }
    mount::clone_tree(place.as_fd(), Path::new(""), false).step(STEP, path.display())
}

/// Checks that `place` is the root of a procfs that shows the pid namespace of this number.
///
/// Its process 1 is that of the namespace it shows, so the link to its pid namespace identifies it.
/// The link is read beneath anything that is mounted over it.
fn check(place: BorrowedFd<'_>, number: u64) -> io::Result<()> {
    let is_root = mount::is_procfs(place)? && stat_fd(place)?.identity.1 == ROOT_INODE;
    if is_root {
        let shown =
            Root::from_fd(place.try_clone_to_owned()?)?.read_link_of_own_mount(Path::new("1/ns/pid"))?;
        if shown.to_str() == Some(format!("pid:[{number}]").as_str()) {
            return Ok(());
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_procfs_of_the_namespace_will_do() {
        let own = ns::number(ns::open_own(ns::Kind::Pid).unwrap().as_fd()).unwrap();
        let is = |path: &str, number: u64| {
            let root = Root::open(Path::new(path)).unwrap();
            check(root.resolve(Path::new("")).unwrap().as_fd(), number).is_ok()
        };
        // Only a process that may trace process 1 can read its link.
        if std::fs::read_link("/proc/1/ns/pid").is_ok() {
            assert!(is("/proc", own));
        }
        assert!(!is("/proc", own + 1));
        assert!(!is("/proc/self", own));
        assert!(!is("/sys", own));
        assert!(!is("/", own));
    }
}
