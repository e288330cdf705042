//! The plan by which the shim creates the container of the spec.

use std::path::Path;

use ::oci_spec::runtime::Spec;
use berth_cgroup::Cgroup;
use berth_model::layout::ContainerFiles;
use berth_shim_proto::launch::{ENTERING, LAST_FILTER, Launch};

use super::resolve::Resolved;
use super::spec::Subject;
use crate::container::{ContainerError, cgroup_plan};
use crate::plan::{self, Extra, PidPath};

/// The plan, and the path of the log (empty without one).
pub(super) fn launch(
    subject: &Subject<'_>,
    spec: &Spec,
    resolved: &Resolved,
    files: &ContainerFiles,
    cgroup: &Cgroup,
) -> Result<(Launch, String), ContainerError> {
    let Subject { node, sandbox, image, id, config } = *subject;
    let failed = |error: &dyn std::error::Error| ContainerError::Seccomp { reason: crate::chain(error) };
    // The spec has the last word: a privileged container has no profile in it.
    let filter = match spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) {
        Some(profile) => Some(node.filters.get(profile).map_err(|error| failed(&error))?),
        None => None,
    };
    let entry = match &filter {
        Some(filter) => filter.for_entering(&ENTERING, LAST_FILTER).map_err(|error| failed(&error))?,
        None => Vec::new(),
    };
    let procfs = sandbox.files().procfs();
    let sandbox_log = Path::new(&sandbox.config().log_directory);
    let has_log = !sandbox.config().log_directory.is_empty() && !config.log_path.is_empty();
    let plan = plan::launch(
        spec,
        &Extra {
            container_id: id,
            user: &config.security.user,
            image_user: image.user(),
            layers: &resolved.layers,
            upper_dir: &files.upper(),
            work_dir: &files.work(),
            volumes: &resolved.volumes,
            log: has_log.then_some((sandbox_log, Path::new(&config.log_path))),
            exit_record: &files.exit_record(),
            stdin: config.stdin,
            stdin_once: config.stdin_once,
            cgroup: &cgroup_plan(cgroup),
            seccomp: filter.as_ref().map(|filter| plan::Filter {
                program: &filter.bytes,
                flags: filter.flags,
                entry: &entry,
            }),
            pid_namespace: if resolved.target.is_some() { PidPath::Target } else { PidPath::Pod(&procfs) },
        },
    )?;
    let log_path =
        if has_log { sandbox_log.join(&config.log_path).display().to_string() } else { String::new() };
    Ok((plan, log_path))
}
