//! The files of a container: created, written, and removed if its creation fails.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use ::oci_spec::runtime::Spec;
use berth_cgroup::Cgroup;
use berth_image::StoredLayer;
use berth_model::layout::ContainerFiles;

use crate::cgroups::CGROUP_GONE;
use crate::container::{Container, ContainerError};
use crate::node::Node;
use crate::trash;

/// What to clean up on failure.
pub(super) struct Made {
    pub(super) files: ContainerFiles,
    pub(super) cgroup: Option<Cgroup>,
}

/// Creates the directories of a container; its root gets the mode and owner of the image's top
/// layer.
pub(super) fn make_directories(files: &ContainerFiles, layers: &[StoredLayer]) -> Result<(), ContainerError> {
    let make = |path: &Path, mode: u32| {
        std::fs::DirBuilder::new().mode(mode).create(path).map_err(ContainerError::file("create", path))
    };
    make(&files.durable, 0o700)?;
    make(&files.state, 0o700)?;
    make(&files.upper(), 0o755)?;
    if let Some(StoredLayer::Directory(top)) = layers.first() {
        copy_mode_and_owner(top, &files.upper())?;
    }
    make(&files.work(), 0o700)?;
    make(&files.rootfs(), 0o700)
}

/// An overlay shows its upper directory's mode and owner as those of its root, so the image's have
/// to be set there.
fn copy_mode_and_owner(from: &Path, to: &Path) -> Result<(), ContainerError> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(from).map_err(ContainerError::file("examine", from))?;
    // In this order: changing the owner clears set-user-id bits.
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))
        .and_then(|()| std::fs::set_permissions(to, metadata.permissions()))
        .map_err(ContainerError::file("set the mode of", to))
}

/// Writes the spec, that no end has been reported, then the record.
pub(super) fn write_files(container: &Container, spec: &Spec) -> Result<(), ContainerError> {
    let path = container.files.spec();
    // Only informational; not written atomically.
    let json =
        serde_json::to_vec(spec).map_err(|error| ContainerError::file("write", &path)(error.into()))?;
    std::fs::write(&path, json).map_err(ContainerError::file("write", &path))?;
    let untold = container.files.untold();
    std::fs::write(&untold, []).map_err(ContainerError::file("write", &untold))?;
    container
        .record_files()
        .write(container.record())
        .map_err(|source| ContainerError::Record { id: container.id().clone(), source })
}

/// Cleans up. Failures are logged; files are found again at the next start,
/// and the cgroup is retried.
pub(super) fn undo(node: &Node, made: &Made) {
    if let Some(cgroup) = &made.cgroup
        && let Err(error) = cgroup.kill(CGROUP_GONE).and_then(|()| cgroup.remove(CGROUP_GONE))
    {
        tracing::warn!(error = %crate::chain(&error), "cannot remove the cgroup of a container that could not be created; trying again");
        node.cgroups.keep_left(cgroup);
    }
    // A copy without a record would mean that the record was lost.
    let _ = std::fs::remove_file(made.files.record_copy());
    if let Err(error) = trash::discard(&node.layout, &made.files.durable) {
        tracing::warn!(path = %made.files.durable.display(), %error, "cannot remove the files of a container that could not be created");
    }
    match std::fs::remove_dir_all(&made.files.state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %made.files.state.display(), %error, "cannot remove the files of a container that could not be created");
        }
        _ => {}
    }
}
