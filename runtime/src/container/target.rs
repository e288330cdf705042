//! The container whose pid namespace another one joins: `NamespaceMode.TARGET`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use berth_model::container::Config;
use berth_model::security::NamespaceMode;
use berth_sys::errno::{ENOENT, ESRCH};
use berth_sys::identity::Identified;
use berth_sys::ns::Kind;

use super::ContainerError;
use crate::node::Node;
use crate::registry::Found;
use crate::sandbox::Sandbox;
use crate::shim_client;

/// The main process of the target, by pidfd.
#[derive(Debug)]
pub(super) struct Target {
    /// Its pid on the host, at the time of the record.
    pid: i32,
    process: Identified,
    /// Its pid namespace.
    namespace: OwnedFd,
}

impl Target {
    /// The pid namespace's path in the spec, for information: the pid may be reused later.
    pub(super) fn namespace_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/pid", self.pid))
    }

    /// The descriptors for the shim of the new container.
    pub(super) fn into_descriptors(self) -> shim_client::Target {
        shim_client::Target { process: self.process.into_pidfd(), pid_namespace: self.namespace }
    }
}

/// Finds the target that the request names, if any, and makes sure that the process of its record
/// is still that process.
///
/// # Errors
/// [`ContainerError::NoTarget`] when it is not a running container of this sandbox, or its main
/// process has ended, even if its pid has been reused.
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
        // One that waits for its start still has its privileges, and must not be looked into.
        Found::One(target) if target.sandbox_id() == sandbox.id() && target.is_running() => target,
        _ => return Err(none()),
    };
    let record = container.record().process.ok_or_else(none)?;
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(ESRCH | ENOENT) => none(),
        _ => ContainerError::file("examine", &PathBuf::from(format!("/proc/{}", record.pid)))(error),
    };
    let process = Identified::find(record.pid, record.start_time).map_err(failed)?;
    let namespace = process.namespace(Kind::Pid).map_err(failed)?;
    Ok(Some(Target { pid: record.pid, process, namespace }))
}
