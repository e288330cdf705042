//! The container whose pid namespace another one joins: `NamespaceMode.TARGET`.

use super::ContainerError;
use crate::node::Node;
use crate::registry::Found;
use crate::sandbox::Sandbox;
use berth_model::container::Config;
use berth_model::security::NamespaceMode;
use berth_sys::identity::Identified;
use berth_sys::ns::Kind;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// errno(3).
const ENOENT: i32 = 2;
const ESRCH: i32 = 3;

/// The main process of the target, held.
#[derive(Debug)]
pub(super) struct Target {
    id: String,
    /// As the host numbers it, at the time of the record.
    pid: i32,
    process: Identified,
    /// Its pid namespace.
    #[expect(dead_code, reason = "kept open; the shim still opens it by path")]
    namespace: OwnedFd,
}

impl Target {
    /// Where its pid namespace can be opened while [`Target::check`] succeeds.
    pub(super) fn namespace_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/pid", self.pid))
    }

    /// Makes sure that everything that was looked up by its number up to now was its own.
    ///
    /// # Errors
    /// [`ContainerError::NoTarget`] when it has ended and its number may be another's.
    pub(super) fn check(&self) -> Result<(), ContainerError> {
        if self.process.holds_its_number() {
            Ok(())
        } else {
            Err(ContainerError::NoTarget { target: self.id.clone() })
        }
    }
}

/// Finds the target that the request names, if it names one, and makes sure that the process of its record is still that process.
///
/// # Errors
/// [`ContainerError::NoTarget`] when it is not a running container of this sandbox, or its main process has ended, whatever process has its
/// number now.
pub(super) fn verified_target(
    node: &Node,
    sandbox: &Sandbox,
    config: &Config,
) -> Result<Option<Target>, ContainerError> {
    let namespaces = &config.security.namespaces;
    if namespaces.pid != NamespaceMode::Target {
        return Ok(None);
    }
    let none = || ContainerError::NoTarget { target: namespaces.target_id.clone() };
    let container = match node.registry.find_container(&namespaces.target_id) {
        // One that waits for its start still has its privileges, and nobody may look into it.
        Found::One(target) if target.sandbox_id() == sandbox.id() && target.is_running() => target,
        _ => return Err(none()),
    };
    let record = container.record().process.ok_or_else(none)?;
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(ESRCH | ENOENT) => none(),
        _ => ContainerError::file("look at", &PathBuf::from(format!("/proc/{}", record.pid)))(error),
    };
    let process = Identified::find(record.pid, record.start_time).map_err(failed)?;
    let namespace = process.namespace(Kind::Pid).map_err(failed)?;
    Ok(Some(Target { id: namespaces.target_id.clone(), pid: record.pid, process, namespace }))
}
