//! Limits: the CRI's `LinuxContainerResources` for the cgroup and for the spec.
//!
//! The cgroup is limited by [`limits`], before the process is born in it; the spec repeats them for those who read it.

use super::SpecError;
use berth_cgroup::{Access, Ceiling, DeviceKind, DevicePolicy, HugepageLimit, Limits};
use berth_model::container::Resources;
use oci_spec::runtime::{
    LinuxCpu, LinuxDeviceCgroup, LinuxDeviceType, LinuxHugepageLimit, LinuxMemory, LinuxResources,
};

/// The limits for the container's cgroup. Zero, and a negative number where no limit is possible, is "not set".
#[must_use]
pub fn limits(resources: &Resources) -> Limits {
    Limits {
        cpu_shares: positive(resources.cpu_shares),
        cpu_quota_us: Ceiling::from_signed(resources.cpu_quota_us),
        cpu_period_us: positive(resources.cpu_period_us),
        memory_limit_bytes: Ceiling::from_signed(resources.memory_limit_bytes),
        memory_swap_limit_bytes: Ceiling::from_signed(resources.memory_swap_limit_bytes),
        // The kubelet limits processes on the pod's cgroup; the CRI has no field for a container's.
        pids_limit: None,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepages: resources
            .hugepage_limits
            .iter()
            .map(|(page_size, limit_bytes)| HugepageLimit {
                page_size: page_size.clone(),
                limit_bytes: *limit_bytes,
            })
            .collect(),
        unified: resources.unified.clone(),
    }
}

fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

fn not_zero(number: i64) -> Option<i64> {
    Some(number).filter(|number| *number != 0)
}

fn not_empty(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

/// The same as `linux.resources` of the spec, with the device rules in the order in which they are allowed.
pub(super) fn of_spec(resources: &Resources, devices: &DevicePolicy) -> Result<LinuxResources, SpecError> {
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive(resources.cpu_shares))
        .set_quota(not_zero(resources.cpu_quota_us))
        .set_period(positive(resources.cpu_period_us))
        .set_cpus(not_empty(&resources.cpuset_cpus))
        .set_mems(not_empty(&resources.cpuset_mems));
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(not_zero(resources.memory_limit_bytes))
        .set_swap(not_zero(resources.memory_swap_limit_bytes));
    let mut hugepages = Vec::new();
    for (page_size, bytes) in &resources.hugepage_limits {
        let limit = i64::try_from(*bytes)
            .map_err(|_| SpecError::Resource { field: "hugepage_limits", value: i128::from(*bytes) })?;
        let mut hugepage = LinuxHugepageLimit::default();
        hugepage.set_page_size(page_size.clone()).set_limit(limit);
        hugepages.push(hugepage);
    }
    let mut written = LinuxResources::default();
    written
        .set_devices(Some(device_rules(devices)))
        .set_cpu(Some(cpu))
        .set_memory(Some(memory))
        .set_hugepage_limits(Some(hugepages).filter(|list| !list.is_empty()))
        .set_unified(
            Some(resources.unified.clone().into_iter().collect())
                .filter(|map: &std::collections::HashMap<_, _>| !map.is_empty()),
        );
    Ok(written)
}

/// OCI runtime-spec "Allowed Device list": everything is denied first, unless everything is allowed.
fn device_rules(policy: &DevicePolicy) -> Vec<LinuxDeviceCgroup> {
    let DevicePolicy::Only(allowed) = policy else {
        return vec![device_rule(true, LinuxDeviceType::A, None, None, Access::ALL)];
    };
    let mut rules = vec![device_rule(false, LinuxDeviceType::A, None, None, Access::ALL)];
    rules.extend(allowed.iter().map(|rule| {
        let kind = match rule.kind {
            DeviceKind::Char => LinuxDeviceType::C,
            DeviceKind::Block => LinuxDeviceType::B,
        };
        device_rule(true, kind, rule.major, rule.minor, rule.access)
    }));
    rules
}

fn device_rule(
    allow: bool,
    kind: LinuxDeviceType,
    major: Option<u32>,
    minor: Option<u32>,
    access: Access,
) -> LinuxDeviceCgroup {
    let letters = [(access.read, 'r'), (access.write, 'w'), (access.mknod, 'm')];
    let access: String = letters.into_iter().filter(|(has, _)| *has).map(|(_, letter)| letter).collect();
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow)
        .set_typ(Some(kind))
        .set_major(major.map(i64::from))
        .set_minor(minor.map(i64::from))
        .set_access(Some(access));
    rule
}
