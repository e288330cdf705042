//! The container's cgroup, with the limits and devices of its spec in force before it has a
//! process.

use ::oci_spec::runtime::Spec;
use berth_cgroup::Cgroup;

use super::spec::Subject;
use crate::container::{ContainerError, shutdown};
use crate::oci_spec;
use crate::shim_client::Holder;

/// Creates the cgroup, which is in `made` as soon as it may need cleanup. Blocking.
pub(super) fn make(
    subject: &Subject<'_>,
    spec: &Spec,
    stop_signal: i32,
    made: &mut Option<Cgroup>,
) -> Result<(Cgroup, Option<Holder>), ContainerError> {
    let Subject { node, sandbox, id, config, .. } = *subject;
    let (limits, devices) = oci_spec::of_cgroup(spec)?;
    let ending = shutdown::ending(config, stop_signal, sandbox.id().as_str());
    let (cgroup, holder) =
        node.cgroups.make(&node.shim, sandbox.cgroup_parent(), id.as_str(), &limits, ending)?;
    let cgroup = made.insert(cgroup);
    cgroup.set_devices(&devices)?;
    Ok((cgroup.clone(), holder))
}
