//! The cgroups of containers: created, limited, watched and removed, on cgroup v2 and on v1,
//! directly or through systemd.
//!
//! ```text
//! Hierarchy::detect()                      which version, mounted where (once, at start)
//!     Cgroup::create(&hierarchy, &Parent, id)   <parent>/<id>, in every hierarchy that counts
//!         .apply(&Limits)  .set_devices(&DevicePolicy)
//!         .join_files() or .unified_dir()  how the container's process gets in
//!         .update(&Limits)                 later, all or nothing
//!         .stats()  .oom_source()
//!         .kill(within)  .remove(within)
//! ```
//!
//! Everything here is synchronous and touches only control files, through [`Files`] where a
//! container may see them; nothing is kept in memory that is not in those files, so a restarted
//! daemon continues with [`Cgroup::open`]. The caller decides which process belongs in which
//! cgroup, and what the limits are.
//!
//! A parent that the caller names is never created: it is kubelet's, with kubelet's limits, and a
//! container outside it would escape them (CVE-2025-47291 was that). Only the default parent, which
//! is Berth's own, is created when it is missing.
//!
//! With the systemd driver the first step is [`Cgroup::create_scope`] instead: systemd creates the
//! cgroup, as the scope of a unit, and is notified of the limits and their changes. Everything else
//! is the same, and is done with the same files: what systemd delegates, it leaves alone.

#![forbid(unsafe_code)]

mod apply;
mod cgroup;
mod control_file;
mod devices;
mod driver;
mod error;
mod files;
mod hierarchy;
mod kill;
mod limits;
mod name;
mod oom;
mod remove;
mod stats;
mod systemd;
mod unit;

pub use cgroup::{Cgroup, Leaves, Scope, create_parent, leaves, leftovers};
pub use devices::{Access, DeviceKind, DevicePolicy, DeviceRule, default_devices};
pub use driver::Driver;
pub use error::Error;
pub use files::{Direct, Files, OpenFor};
pub use hierarchy::{Hierarchy, LegacyMount};
pub use limits::{Ceiling, HugepageLimit, Limits, Note, cpu_weight};
pub use name::{Naming, Parent};
pub use oom::{OomSource, parse_oom_kills};
pub use stats::{
    CpuStats, Detail, DeviceIo, MemoryStats, Pressure, PressureLine, Stats, SwapStats, stats_of_parent,
};
pub use systemd::{Systemd, SystemdError};
pub use unit::Ending;
