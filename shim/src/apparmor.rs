//! The AppArmor profile of a process: apparmor(7). The files are those of its kernel interface,
//! `/proc/<pid>/attr/apparmor`.
//!
//! ```text
//!  exec      where no other process lives: the profile that the next exec changes to
//!  current   where others do: the profile from now on
//! ```
//! Processes in the pid namespace may trace a process that is born there, as far as the profiles of
//! both allow it. So a process that enters it has its program's profile before it is created, and
//! that profile has to allow executing the program. An intermediate profile would not work: the
//! kernel does not let a confined process with no_new_privs change to another profile.
//!
//! Removing a profile from the kernel leaves its processes unconfined, even if it is loaded again.
//! So the profile is checked again after the wait for the start.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use berth_shim_proto::control::Failed;
use berth_sys::beneath::Root;
use berth_sys::{file, mount};

use crate::failure::{Step, refused};

const STEP: &str = "set the AppArmor profile";

/// The longest label, in bytes. The kernel writes at most a page.
const MAX_LABEL: usize = 4096;

/// A profile, and the host's procfs through which it is entered.
pub(crate) struct Profile {
    name: String,
    proc: Root,
}

/// The file through which this process enters its profile. It only works with the credentials that
/// opened it.
pub(crate) struct Way {
    name: String,
    file: File,
}

impl Profile {
    /// The profile `name`, or none for an empty name.
    ///
    /// Must run while `/proc` is still the host's: in a container, something else could be mounted
    /// there.
    pub(crate) fn find(name: &str) -> Result<Option<Self>, Failed> {
        if name.is_empty() {
            return Ok(None);
        }
        let proc = Root::open(Path::new("/proc")).step(STEP, name)?;
        // The write would have no effect, and the container would run unconfined.
        if !mount::is_procfs(proc.as_fd()).step(STEP, "/proc")? {
            return Err(refused(STEP, format!("{name}: /proc is not the kernel's")));
        }
        Ok(Some(Self { name: name.to_owned(), proc }))
    }

    /// Makes the next exec change to it.
    pub(crate) fn take_on_at_exec(self) -> Result<Way, Failed> {
        let mut way = self.open("exec")?;
        let Way { name, file } = &mut way;
        file.write_all(format!("exec {name}").as_bytes()).step(STEP, name)?;
        Ok(way)
    }

    /// Opens the file through which to enter it before an exec. A kernel that restricts leaving the
    /// unconfined state requires `CAP_MAC_OVERRIDE` for this
    /// (`kernel.apparmor_restrict_unprivileged_unconfined`).
    pub(crate) fn open_current(self) -> Result<Way, Failed> {
        self.open("current")
    }

    fn open(self, attribute: &str) -> Result<Way, Failed> {
        let path = PathBuf::from("self/attr/apparmor").join(attribute);
        let file = self.proc.open_with(&path, file::READ_WRITE).step(STEP, &self.name)?;
        Ok(Way { name: self.name, file: file.into() })
    }
}

impl AsFd for Profile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.proc.as_fd()
    }
}

impl Way {
    /// Enters the profile now, through [`Profile::open_current`].
    pub(crate) fn enter(mut self) -> Result<(), Failed> {
        self.file.write_all(format!("changeprofile {}", self.name).as_bytes()).step(STEP, &self.name)?;
        self.check()
    }

    /// Whether the process still has the profile.
    pub(crate) fn check(self) -> Result<(), Failed> {
        check(&self.file, &self.name)
    }
}

/// Checks whether another process has the profile `name`; an empty name matches any.
///
/// Opening the file takes a lock that an exec of the process holds for a moment
/// (`exec_update_lock`). Anyone who may trace the process, and has mapped memory of it to a file
/// system under their control, can make that moment long. It ends when the process is killed by its
/// cgroup, for which the daemon needs no answer from the shim.
pub(crate) fn check_process(pid: i32, name: &str) -> Result<(), Failed> {
    if name.is_empty() {
        return Ok(());
    }
    check(&File::open(format!("/proc/{pid}/attr/apparmor/current")).step(STEP, name)?, name)
}

/// In a single read, which every filter allows.
fn check(mut file: &File, name: &str) -> Result<(), Failed> {
    let mut label = [0; MAX_LABEL];
    let length = file.read(&mut label).step(STEP, name)?;
    let label = label.get(..length).unwrap_or_default();
    if is_of(label, name) {
        return Ok(());
    }
    Err(refused(
        STEP,
        format!(
            "{name}: it was removed from the kernel after it was set, and {} is in its place; recreate the container",
            String::from_utf8_lossy(label).trim_end()
        ),
    ))
}

/// Whether a label is exactly this profile: `NAME (MODE)`. Names may contain brackets.
fn is_of(label: &[u8], name: &str) -> bool {
    label
        .strip_prefix(name.as_bytes())
        .and_then(|rest| rest.strip_prefix(b" ("))
        .and_then(|rest| rest.trim_ascii_end().strip_suffix(b")"))
        .is_some_and(|mode| !mode.contains(&b'('))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_the_whole_profile_and_nothing_else() {
        for (label, name, expected) in [
            ("berth-default (enforce)\n", "berth-default", true),
            ("a (b) (complain)\n", "a (b)", true),
            ("a (b) (complain)\n", "a", false),
            ("unconfined\n", "berth-default", false),
            ("berth-default//&unconfined (mixed)\n", "berth-default", false),
            ("berth-default-not (enforce)\n", "berth-default", false),
            ("berth-default", "berth-default", false),
            ("", "berth-default", false),
        ] {
            assert_eq!(is_of(label.as_bytes(), name), expected, "{label:?}");
        }
    }

    #[test]
    fn no_profile_is_no_file() {
        assert!(Profile::find("").unwrap().is_none());
        assert!(check_process(-1, "").is_ok());
        assert!(check_process(-1, "berth-default").is_err());
    }
}
