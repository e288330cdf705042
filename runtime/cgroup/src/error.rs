//! Errors of cgroup operations, always with the file or name.

use std::io;
use std::path::PathBuf;

use crate::{Driver, SystemdError, control_file};

/// A cgroup operation that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No cgroup file system is mounted, or none that has controllers.
    #[error("no cgroup hierarchy with controllers is mounted")]
    NoHierarchy,
    /// The kernel has bound a controller to a v1 hierarchy that is not mounted anywhere, so its
    /// limits could not be set.
    #[error("the cgroup controller {controller} belongs to a v1 hierarchy that is not mounted")]
    ControllerNotMounted {
        /// The controller, such as `memory`.
        controller: String,
    },
    /// A parent path that is not absolute, not normal, or of the other driver.
    #[error("the cgroup parent {parent:?} cannot be used with the {driver} driver: {reason}")]
    InvalidParent {
        /// The value that is refused.
        parent: String,
        /// The driver in use.
        driver: Driver,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An id that cannot be the name of a cgroup.
    #[error("the cgroup name {id:?} cannot be used: {reason}")]
    InvalidId {
        /// The value that is refused.
        id: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The parent that the caller named does not exist, and Berth must not create it.
    #[error("the parent cgroup {path:?} does not exist")]
    ParentMissing {
        /// The directory that was expected.
        path: PathBuf,
    },
    /// A slice needs the systemd driver, and that driver needs a slice; and neither works on the
    /// other version of cgroups.
    #[error("cannot create a cgroup in {parent:?} with the requested driver")]
    WrongDriver {
        /// The parent's path.
        parent: String,
    },
    /// An operation on a systemd unit failed.
    #[error("cannot {action} the unit {unit}")]
    Unit {
        /// The operation.
        action: &'static str,
        /// The unit.
        unit: String,
        /// The cause.
        #[source]
        source: SystemdError,
    },
    /// A cgroup of that name exists.
    #[error("the cgroup {path:?} already exists")]
    AlreadyExists {
        /// Its directory.
        path: PathBuf,
    },
    /// `mkdir(2)` failed.
    #[error("cannot create the cgroup {path:?}")]
    Create {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A control file or directory could not be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a value, or the control file is missing.
    #[error("cannot write {value:?} to {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The content of a control file does not have the documented format.
    #[error("{path:?} does not hold {expected}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected.
        expected: &'static str,
    },
    /// A limit needs a controller that this kernel, or this cgroup's parent, does not offer.
    #[error("the limit {limit} needs the cgroup controller {controller}, which is not available at {path:?}")]
    ControllerMissing {
        /// The limit as [`crate::Limits`] names it.
        limit: &'static str,
        /// The controller.
        controller: &'static str,
        /// The cgroup.
        path: PathBuf,
    },
    /// A limit whose value is invalid on any kernel.
    #[error("the limit {limit} cannot be {value:?}: {reason}")]
    InvalidLimit {
        /// The limit as [`crate::Limits`] names it.
        limit: &'static str,
        /// The value that is refused.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A lower memory limit would make the kernel kill processes of the container at once.
    #[error(
        "the memory limit of {path:?} cannot be lowered to {limit_bytes} bytes while {usage_bytes} bytes are in use"
    )]
    LimitBelowUsage {
        /// The cgroup.
        path: PathBuf,
        /// The limit that was asked for.
        limit_bytes: u64,
        /// What is in use.
        usage_bytes: u64,
    },
    /// An update failed, and so did putting the earlier values back.
    #[error("the limits are only partly changed: {} earlier values cannot be restored", failures.len())]
    NotRolledBack {
        /// Why the update failed.
        #[source]
        source: Box<Error>,
        /// What could not be put back.
        failures: Vec<Error>,
    },
    /// The device filter was refused.
    #[error("cannot install the device filter of {path:?}")]
    DeviceFilter {
        /// The cgroup.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A process could not be signalled.
    #[error("cannot kill the process {pid} of the cgroup {path:?}")]
    Kill {
        /// Its pid.
        pid: i32,
        /// The cgroup.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Processes were left when the time ran out.
    #[error("{left} processes of the cgroup {path:?} have not ended after {waited_ms} ms")]
    StillPopulated {
        /// The cgroup.
        path: PathBuf,
        /// The number of processes.
        left: usize,
        /// How long it waited.
        waited_ms: u128,
    },
    /// A cgroup directory could not be removed in time; all failures are counted, the first is
    /// reported.
    #[error("cannot remove the cgroup {path:?}{}", if *more == 0 { String::new() } else { format!(" and {more} more") })]
    Remove {
        /// The first directory that stayed.
        path: PathBuf,
        /// How many others stayed.
        more: usize,
        /// Why the first stayed.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Whether a directory of the cgroup did not answer, because a container may keep it locked:
    /// its state is then unknown.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        match self {
            Self::Read { source, .. } | Self::Write { source, .. } | Self::Remove { source, .. } => {
                control_file::is_silent(source)
            }
            _ => false,
        }
    }
}
