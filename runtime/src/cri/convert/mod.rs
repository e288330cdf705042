//! CRI messages into plain data, checked, and back.
//!
//! Pure: no I/O, no clock. Turns a message into plain data of `berth-model`, or into a [`Rejected`]
//! that names the field. The result can be relied on: paths are absolute or relative as documented
//! and have no `..`, enums are known, numbers are in range, and everything is bounded. What the
//! request asks for and this runtime does not support is refused with an error, never ignored, if
//! ignoring it would leave a pod less confined or less limited than intended.
//!
//! Not checked here: whether named objects exist (images, users, host paths, profiles), and what
//! the image adds.
//!
//! Fields that are not read, and why: `windows` (this is Linux), `linux.overhead` and
//! `linux.resources` of a sandbox (for information; the kubelet limits the pod's cgroup), user,
//! groups, read-only root and profiles of a sandbox (they are for a process of the sandbox's own,
//! and nothing of the pod's runs in one), `selinux_relabel` (Berth labels nothing). Annotations are
//! kept and not read, those for CDI devices excepted: bandwidth, block I/O and RDT classes are
//! wishes to parts that a node may not have.

mod container;
mod field;
mod filter;
mod image;
mod resources;
mod sandbox;
mod security;
mod signal;
mod status;
mod sysctl;

pub use container::container_config;
pub use field::{Field, Rejected};
pub use filter::{ContainerFilter, SandboxFilter};
pub use image::{ImageUser, ImageView, image, image_user};
pub use resources::{resources, resources_message, updated_resources};
pub use sandbox::{port_protocol, sandbox_config};
pub use security::{SeLinux, namespace_options};
pub use signal::{signal_message, signal_number};
pub use status::{
    ContainerView, SandboxView, container, container_metadata, container_mounts, container_status, sandbox,
    sandbox_metadata, sandbox_status,
};

#[cfg(test)]
mod tests {
    use berth_cri::v1;
    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::handlers::Handlers;

    proptest! {
        #[test]
        fn any_message_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..64), number in any::<i32>()) {
            if let Ok(message) = v1::PodSandboxConfig::decode(bytes.as_slice()) {
                let _ = sandbox_config(message, "", &Handlers::own(), SeLinux::Off);
            }
            if let Ok(message) = v1::ContainerConfig::decode(bytes.as_slice()) {
                let _ = container_config(message, &berth_model::sandbox::Config::default(), SeLinux::Off);
            }
            if let Ok(Some(signal)) = signal_number(&Field::root("s"), number) {
                prop_assert!((1..=64).contains(&signal));
            }
            let _ = signal_message(number);
        }

        #[test]
        fn a_parameter_that_is_taken_is_a_path_below_its_namespace(text in "(net|kernel|fs)[./](\\PC|[./a-z]){0,12}") {
            let config = v1::PodSandboxConfig {
                metadata: Some(v1::PodSandboxMetadata {
                    name: "n".into(),
                    uid: "u".into(),
                    namespace: "s".into(),
                    attempt: 0,
                }),
                linux: Some(v1::LinuxPodSandboxConfig {
                    sysctls: [(text, "1".to_owned())].into(),
                    ..Default::default()
                }),
                ..Default::default()
            };
            if let Ok(config) = sandbox_config(config, "", &Handlers::own(), SeLinux::Off) {
                for name in config.sysctls.keys() {
                    prop_assert!(name.split('.').all(|part| {
                        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
                    }), "{name:?}");
                }
            }
        }
    }
}
