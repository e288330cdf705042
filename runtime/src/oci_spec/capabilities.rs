//! The capability sets of a container: capabilities(7), CRI `Capability`.

use berth_model::security::ContainerSecurity;
use berth_sys::credentials::{CAPABILITIES, CapabilityBits, capability_number};
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use super::SpecError;

/// The default capabilities: the set of Docker and containerd, which images are written
/// for.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// CRI: `ALL` in a list stands for every capability.
const ALL: &str = "ALL";

/// The five sets. `available` is the daemon's own bounding set, which limits them, even for
/// explicit requests.
///
/// Lists with `ALL` are applied first, then single names, and dropped ones stay dropped.
/// Inheritable stays empty except for requested ambient capabilities, where the kernel needs it: a
/// file with inheritable capabilities would otherwise give them to any user (CVE-2022-24769).
pub(super) fn of_container(
    security: &ContainerSecurity,
    available: CapabilityBits,
) -> Result<LinuxCapabilities, SpecError> {
    let (granted, ambient) = granted_and_ambient(security, available)?;
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(names(granted)))
        .set_effective(Some(names(granted)))
        .set_permitted(Some(names(granted)))
        .set_inheritable(Some(names(ambient)))
        .set_ambient(Some(names(ambient)));
    Ok(sets)
}

/// The names of the capabilities that a container gets, without `CAP_`, on which RuntimeDefault of
/// seccomp depends.
///
/// # Errors
/// [`SpecError::Capability`].
pub fn granted_capabilities(
    security: &ContainerSecurity,
    available: CapabilityBits,
) -> Result<Vec<&'static str>, SpecError> {
    let (granted, _) = granted_and_ambient(security, available)?;
    Ok(CAPABILITIES
        .iter()
        .zip(0_u32..)
        .filter(|(_, number)| granted & (1 << number) != 0)
        .map(|(name, _)| *name)
        .collect())
}

fn granted_and_ambient(
    security: &ContainerSecurity,
    available: CapabilityBits,
) -> Result<(CapabilityBits, CapabilityBits), SpecError> {
    let add = Named::read("capabilities.add_capabilities", &security.add_capabilities)?;
    let drop = Named::read("capabilities.drop_capabilities", &security.drop_capabilities)?;
    let add_ambient =
        Named::read("capabilities.add_ambient_capabilities", &security.add_ambient_capabilities)?;

    Ok(if security.privileged {
        (available, 0)
    } else {
        let start = if drop.all {
            0
        } else if add.all || add_ambient.all {
            u64::MAX
        } else {
            defaults()
        };
        let ambient = if add_ambient.all && !drop.all { u64::MAX } else { add_ambient.single };
        ((start | add.single | ambient) & !drop.single & available, ambient & !drop.single & available)
    })
}

/// A list of the request.
struct Named {
    all: bool,
    single: CapabilityBits,
}

impl Named {
    /// An unknown name is an error in the list to drop, too: it is a typo, and keeping what was
    /// meant weakens the container.
    fn read(field: &'static str, list: &[String]) -> Result<Self, SpecError> {
        let mut named = Self { all: false, single: 0 };
        for name in list {
            if name.eq_ignore_ascii_case(ALL) {
                named.all = true;
            } else {
                let number = capability_number(name)
                    .ok_or_else(|| SpecError::Capability { field, name: name.clone() })?;
                named.single |= 1 << number;
            }
        }
        Ok(named)
    }
}

fn defaults() -> CapabilityBits {
    DEFAULT.iter().filter_map(|name| capability_number(name)).fold(0, |bits, number| bits | 1 << number)
}

fn names(bits: CapabilityBits) -> Capabilities {
    CAPABILITIES
        .iter()
        .zip(0_u32..)
        .filter(|(_, number)| bits & (1 << number) != 0)
        .filter_map(|(name, _)| name.parse::<Capability>().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_has_a_name_in_the_spec() {
        assert_eq!(names(u64::MAX).len(), CAPABILITIES.len());
        assert_eq!(defaults().count_ones(), 14);
    }
}
