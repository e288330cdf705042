//! Capabilities and resource limits by number instead of by name.

use berth_shim_proto::launch::{Capabilities, Rlimit};
use berth_sys::credentials::{CapabilityBits, capability_number};
use oci_spec::runtime::{Capability, LinuxCapabilities, PosixRlimit, PosixRlimitType};

/// The set as bits by number: capabilities(7).
pub fn capability_bits<'a>(names: impl IntoIterator<Item = &'a Capability>) -> CapabilityBits {
    names
        .into_iter()
        .filter_map(|capability| capability_number(&capability.to_string()))
        .fold(0, |bits, number| bits | 1 << number)
}

/// The sets of the spec. An absent one is empty: OCI runtime-spec, `process.capabilities`.
pub(super) fn capabilities(sets: Option<&LinuxCapabilities>) -> Capabilities {
    let Some(sets) = sets else { return Capabilities::default() };
    let bits = |set: &Option<oci_spec::runtime::Capabilities>| capability_bits(set.iter().flatten());
    Capabilities {
        bounding: bits(sets.bounding()),
        effective: bits(sets.effective()),
        permitted: bits(sets.permitted()),
        inheritable: bits(sets.inheritable()),
        ambient: bits(sets.ambient()),
    }
}

/// The number of the limit: <asm-generic/resource.h>, the same on every architecture that Berth is
/// built for.
#[must_use]
pub fn rlimit_number(name: PosixRlimitType) -> u32 {
    match name {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    }
}

pub(super) fn rlimit(limit: &PosixRlimit) -> Rlimit {
    Rlimit { resource: rlimit_number(limit.typ()), soft: limit.soft(), hard: limit.hard() }
}

#[cfg(test)]
mod tests {
    use berth_sys::credentials::CAPABILITIES;

    use super::*;

    #[test]
    fn every_capability_of_the_kernel_keeps_its_number() {
        for (name, number) in CAPABILITIES.iter().zip(0_u32..) {
            let capability: Capability = name.parse().unwrap();
            assert_eq!(capability_bits([&capability]), 1 << number, "{name}");
        }
        assert_eq!(capability_bits([]), 0);
    }
}
