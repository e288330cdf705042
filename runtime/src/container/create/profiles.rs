//! The AppArmor and seccomp profiles of a request.

use std::path::Path;

use ::oci_spec::runtime::LinuxSeccomp;
use berth_model::container::Config;
use berth_model::security::Profile;
use berth_seccomp::Circumstances;

use crate::apparmor;
use crate::container::ContainerError;
use crate::host_paths::HostPathError;
use crate::node::Node;
use crate::oci_spec;

/// The name of Berth's own profile, if the container gets it. Where `AppArmor` is enforced and the
/// profile is missing, the container is refused.
pub(super) fn default_apparmor_profile(
    node: &Node,
    config: &Config,
) -> Result<Option<&'static str>, ContainerError> {
    if config.security.privileged || config.security.apparmor != Profile::RuntimeDefault {
        return Ok(None);
    }
    node.default_apparmor_profile
        .name()
        .map_err(|error| ContainerError::AppArmor { reason: crate::chain(&error) })
}

/// Whether the profile that the request names can be applied.
pub(super) fn check_apparmor(node: &Node, config: &Config) -> Result<(), ContainerError> {
    match &config.security.apparmor {
        Profile::Localhost(name) if !node.facts.apparmor => Err(ContainerError::AppArmor {
            reason: format!("profile {name:?} cannot be applied: this kernel has no AppArmor"),
        }),
        Profile::Localhost(name) => match apparmor::is_loaded(name) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ContainerError::AppArmor {
                reason: format!("profile {name:?} is not loaded; load it on the node with apparmor_parser"),
            }),
            Err(error) => Err(ContainerError::AppArmor { reason: crate::chain(&error) }),
        },
        Profile::RuntimeDefault | Profile::Unconfined => Ok(()),
    }
}

/// The profile of the request as the spec has it; `None` for none.
pub(super) fn seccomp_profile(node: &Node, config: &Config) -> Result<Option<LinuxSeccomp>, ContainerError> {
    let security = &config.security;
    match &security.seccomp {
        Profile::Unconfined => Ok(None),
        _ if security.privileged => Ok(None),
        Profile::RuntimeDefault => {
            let names = oci_spec::granted_capabilities(security, node.facts.bounding)?;
            Ok(Some(berth_seccomp::default_profile(names)))
        }
        Profile::Localhost(path) => {
            let failed = |reason: String| ContainerError::Seccomp { reason: format!("{path}: {reason}") };
            let text = match node.host_paths.profile(Path::new(path)) {
                Err(HostPathError::Failed(error)) => return Err(failed(error.text)),
                read => read?,
            };
            let capabilities = oci_spec::granted_capabilities(security, node.facts.bounding)?;
            let circumstances = Circumstances { capabilities, kernel: node.facts.kernel };
            berth_seccomp::parse_profile(&text, &circumstances)
                .map(Some)
                .map_err(|error| failed(crate::chain(&error)))
        }
    }
}
