//! What a request names, looked up: layers, profiles, and paths of the host. Of a container nothing
//! is made.

use std::path::Path;

use ::oci_spec::runtime::LinuxSeccomp;
use berth_image::{Image, Lease, StoredLayer};
use berth_model::container::{Config, Mount};
use berth_model::limit::MAX_NAME_BYTES;

use super::profiles;
use crate::container::ContainerError;
use crate::container::target::{Target, verified_target};
use crate::host_paths::{HostPathError, HostPaths};
use crate::node::Node;
use crate::oci_spec::{ResolvedDevice, ResolvedMount, devices, mounts, stop_signal::stop_signal};
use crate::sandbox::Sandbox;

/// The resolved parts of a request.
pub(super) struct Resolved {
    /// The image's layers, the top one first; at least one.
    pub(super) layers: Vec<StoredLayer>,
    pub(super) stop_signal: i32,
    pub(super) target: Option<Target>,
    pub(super) mounts: Vec<ResolvedMount>,
    pub(super) devices: Vec<ResolvedDevice>,
    /// The host's, for a privileged container.
    pub(super) host_devices: Vec<ResolvedDevice>,
    /// The paths of the image's volumes.
    pub(super) volumes: Vec<String>,
    pub(super) default_apparmor_profile: Option<&'static str>,
    pub(super) seccomp: Option<LinuxSeccomp>,
}

/// Looks up what the request names. Blocking.
pub(super) fn resolve(
    node: &Node,
    sandbox: &Sandbox,
    lease: &Lease,
    config: &Config,
) -> Result<Resolved, ContainerError> {
    let image = lease.image();
    let layers = lease
        .stored_layers()
        .map_err(|source| ContainerError::Image { image: config.image.clone(), source })?;
    if layers.is_empty() {
        let reason = "it has no layers, so there is nothing to run".to_owned();
        return Err(ContainerError::ImageConfig { image: config.image.clone(), reason });
    }
    let stop_signal = effective_stop_signal(config, image)?;
    check_user(config, image)?;
    let target = verified_target(node, sandbox, config)?;
    let mounts = resolve_mounts(&node.host_paths, config)?;
    let devices = resolve_devices(&node.host_paths, config, &mounts)?;
    // Looked up each time: disks come and go.
    let host_devices = match config.security.privileged {
        true => node.host_paths.host_devices().map_err(|error| of_host("the host's devices", error))?,
        false => Vec::new(),
    };
    let volumes = mounts::image_volumes(config, image.config())?;
    let default_apparmor_profile = profiles::default_apparmor_profile(node, config)?;
    profiles::check_apparmor(node, config)?;
    let seccomp = profiles::seccomp_profile(node, config)?;
    Ok(Resolved {
        layers,
        stop_signal,
        target,
        mounts,
        devices,
        host_devices,
        volumes,
        default_apparmor_profile,
        seccomp,
    })
}

fn resolve_mounts(host: &HostPaths, config: &Config) -> Result<Vec<ResolvedMount>, ContainerError> {
    const FIELD: &str = "config.mounts";
    let find = |mount: &Mount| host.source(Path::new(&mount.host_path));
    let sources = config.mounts.iter().map(find).collect::<Result<_, _>>();
    mounts::resolve_mounts(&config.mounts, sources.map_err(|error| of_host(FIELD, error))?)
        .map_err(|error| unusable(FIELD, crate::chain(&error)))
}

fn resolve_devices(
    host: &HostPaths,
    config: &Config,
    mounts: &[ResolvedMount],
) -> Result<Vec<ResolvedDevice>, ContainerError> {
    const FIELD: &str = "config.devices";
    let devices = host.devices(&config.devices).map_err(|error| of_host(FIELD, error))?;
    for covered in devices::covered(&devices, mounts) {
        let found =
            host.device_below(covered.source(), &covered.below).map_err(|error| of_host(FIELD, error))?;
        covered.check(found.as_ref()).map_err(|error| unusable(FIELD, crate::chain(&error)))?;
    }
    Ok(devices)
}

/// Why the paths of a field of the request cannot be used.
fn of_host(field: &str, error: HostPathError) -> ContainerError {
    match error {
        HostPathError::Failed(failed) => unusable(field, failed.text),
        other => other.into(),
    }
}

fn unusable(field: &str, reason: String) -> ContainerError {
    ContainerError::Mount { path: field.to_owned(), reason }
}

fn effective_stop_signal(config: &Config, image: &Image) -> Result<i32, ContainerError> {
    if let Some(signal) = config.stop_signal {
        return Ok(signal);
    }
    stop_signal(&image.config().stop_signal).map_err(|error| ContainerError::ImageConfig {
        image: config.image.clone(),
        reason: error.to_string(),
    })
}

fn check_user(config: &Config, image: &Image) -> Result<(), ContainerError> {
    let length = image.user().len();
    if length <= MAX_NAME_BYTES {
        return Ok(());
    }
    let reason = format!("its User has {length} bytes; the limit is {MAX_NAME_BYTES}");
    Err(ContainerError::ImageConfig { image: config.image.clone(), reason })
}
