//! The container's OCI runtime spec, from what was looked up.

use std::path::Path;

use ::oci_spec::runtime::Spec;
use berth_cgroup::Cgroup;
use berth_image::Image;
use berth_model::container::Config;
use berth_model::id::ContainerId;
use berth_model::layout::ContainerFiles;

use super::resolve::Resolved;
use crate::container::ContainerError;
use crate::container::target::Target;
use crate::node::Node;
use crate::oci_spec::{self, CgroupDirectory, Inputs};
use crate::sandbox::Sandbox;
use crate::sandbox::hostname;

/// The container's identity and place.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) node: &'a Node,
    pub(super) sandbox: &'a Sandbox,
    pub(super) image: &'a Image,
    pub(super) id: &'a ContainerId,
    pub(super) config: &'a Config,
}

/// The spec of the container. `cgroup` is the one that will be made for it.
pub(super) fn build(
    subject: &Subject<'_>,
    resolved: &Resolved,
    files: &ContainerFiles,
    cgroup: &Cgroup,
) -> Result<Spec, ContainerError> {
    let Subject { node, sandbox, image, id, config } = *subject;
    let target_namespace = resolved.target.as_ref().map(Target::namespace_path);
    let hostname =
        sandbox.hostname().map_err(ContainerError::file("read", Path::new(hostname::HOST_FILE)))?;
    let inputs = Inputs {
        container_id: id,
        config,
        files,
        sandbox_id: sandbox.id(),
        sandbox: sandbox.config(),
        sandbox_files: sandbox.files(),
        hostname: &hostname,
        image: image.config(),
        image_name: image.repo_tags().first().map_or(config.image.as_str(), String::as_str),
        mounts: &resolved.mounts,
        devices: &resolved.devices,
        host_devices: &resolved.host_devices,
        default_apparmor_profile: resolved.default_apparmor_profile,
        cgroup_path: cgroup.path(),
        cgroup_directories: &cgroup_directories(node, cgroup),
        target_pid_namespace: target_namespace.as_deref(),
        seccomp: resolved.seccomp.as_ref(),
        rlimits: &node.config().rlimits,
        host: &node.facts,
    };
    Ok(oci_spec::build(&inputs)?)
}

/// Its directory in each v1 hierarchy, by the hierarchy's name below `/sys/fs/cgroup`.
fn cgroup_directories(node: &Node, cgroup: &Cgroup) -> Vec<CgroupDirectory> {
    let berth_cgroup::Hierarchy::Legacy { mounts } = &node.cgroups.hierarchy else { return Vec::new() };
    let directories: Vec<&Path> = cgroup.directories().collect();
    mounts
        .iter()
        .filter_map(|mount| {
            let directory = directories.iter().find(|directory| directory.starts_with(&mount.path))?;
            let name = mount.path.file_name()?.to_str()?.to_owned();
            Some(CgroupDirectory { name, directory: directory.to_path_buf() })
        })
        .collect()
}
