//! Limits and devices of the cgroup: `linux.resources` of the spec, from a request and for the
//! cgroup.
//!
//! The cgroup's settings are read from the finished spec, wherever it comes from. Properties that
//! cannot be enforced are refused.

use berth_cgroup::{Access, Ceiling, DeviceKind, DevicePolicy, DeviceRule, HugepageLimit, Limits};
use berth_model::container::Resources;
use oci_spec::runtime::{
    LinuxCpu, LinuxDeviceCgroup, LinuxDeviceType, LinuxHugepageLimit, LinuxMemory, LinuxResources, Spec,
};

use super::SpecError;

/// The limits of a request in the form of the spec. Zero, and a negative number where no limit is
/// possible, is "not set".
///
/// # Errors
/// [`SpecError::Resource`], for a number that is out of range for the spec.
pub fn resources(asked: &Resources) -> Result<LinuxResources, SpecError> {
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive(asked.cpu_shares))
        .set_quota(not_zero(asked.cpu_quota_us))
        .set_period(positive(asked.cpu_period_us))
        .set_cpus(not_empty(&asked.cpuset_cpus))
        .set_mems(not_empty(&asked.cpuset_mems));
    let mut memory = LinuxMemory::default();
    memory.set_limit(not_zero(asked.memory_limit_bytes)).set_swap(not_zero(asked.memory_swap_limit_bytes));
    let mut hugepages = Vec::new();
    for (page_size, bytes) in &asked.hugepage_limits {
        let limit = i64::try_from(*bytes)
            .map_err(|_| SpecError::Resource { field: "hugepage_limits", value: i128::from(*bytes) })?;
        let mut hugepage = LinuxHugepageLimit::default();
        hugepage.set_page_size(page_size.clone()).set_limit(limit);
        hugepages.push(hugepage);
    }
    let mut written = LinuxResources::default();
    // The kubelet limits the processes of the pod's cgroup; the CRI has no field for a container's.
    written
        .set_cpu(Some(cpu))
        .set_memory(Some(memory))
        .set_hugepage_limits(Some(hugepages).filter(|list| !list.is_empty()))
        .set_unified(
            Some(asked.unified.clone().into_iter().collect())
                .filter(|map: &std::collections::HashMap<_, _>| !map.is_empty()),
        );
    Ok(written)
}

/// The same with the device rules, in order.
pub(super) fn of_spec(asked: &Resources, devices: &DevicePolicy) -> Result<LinuxResources, SpecError> {
    let mut written = resources(asked)?;
    written.set_devices(Some(device_rules(devices)));
    Ok(written)
}

/// The settings of the cgroup for this spec. Without a list of devices, none may be used.
///
/// # Errors
/// [`SpecError::Resource`] for a number out of range; [`SpecError::Unsupported`] for a property
/// that the cgroup cannot enforce.
pub fn of_cgroup(spec: &Spec) -> Result<(Limits, DevicePolicy), SpecError> {
    match spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
        Some(resources) => Ok((limits(resources)?, device_policy(resources)?)),
        None => Ok((Limits::default(), DevicePolicy::Only(Vec::new()))),
    }
}

/// The limits in `linux.resources`, without the devices.
///
/// # Errors
/// As [`of_cgroup`].
pub fn limits(resources: &LinuxResources) -> Result<Limits, SpecError> {
    refuse_unsupported(resources)?;
    let mut limits = Limits {
        pids_limit: resources.pids().and_then(|pids| Ceiling::from_signed(pids.limit())),
        unified: resources.unified().clone().into_iter().flatten().collect(),
        ..Limits::default()
    };
    if let Some(cpu) = resources.cpu() {
        limits.cpu_shares = cpu.shares();
        limits.cpu_quota_us = cpu.quota().and_then(Ceiling::from_signed);
        limits.cpu_period_us = cpu.period();
        limits.cpuset_cpus = cpu.cpus().clone().unwrap_or_default();
        limits.cpuset_mems = cpu.mems().clone().unwrap_or_default();
    }
    if let Some(memory) = resources.memory() {
        limits.memory_limit_bytes = memory.limit().and_then(Ceiling::from_signed);
        limits.memory_swap_limit_bytes = memory.swap().and_then(Ceiling::from_signed);
    }
    for hugepage in resources.hugepage_limits().iter().flatten() {
        let limit_bytes = u64::try_from(hugepage.limit()).map_err(|_| SpecError::Resource {
            field: "hugepage_limits",
            value: i128::from(hugepage.limit()),
        })?;
        limits.hugepages.push(HugepageLimit { page_size: hugepage.page_size().clone(), limit_bytes });
    }
    Ok(limits)
}

/// The resources with the limits `now`, otherwise unchanged.
#[must_use]
pub fn in_force(earlier: Resources, now: Limits) -> Resources {
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let signed = |ceiling| match ceiling {
        Some(Ceiling::At(value)) => number(value),
        Some(Ceiling::Unlimited) => -1,
        None => 0,
    };
    Resources {
        cpu_period_us: now.cpu_period_us.map_or(0, number),
        cpu_quota_us: signed(now.cpu_quota_us),
        cpu_shares: now.cpu_shares.map_or(0, number),
        memory_limit_bytes: signed(now.memory_limit_bytes),
        memory_swap_limit_bytes: signed(now.memory_swap_limit_bytes),
        cpuset_cpus: now.cpuset_cpus,
        cpuset_mems: now.cpuset_mems,
        hugepage_limits: now.hugepages.into_iter().map(|page| (page.page_size, page.limit_bytes)).collect(),
        unified: now.unified,
        ..earlier
    }
}

/// Properties of the OCI runtime spec that Berth does not apply to cgroups. [`resources`] never
/// sets them.
fn refuse_unsupported(resources: &LinuxResources) -> Result<(), SpecError> {
    let cpu = resources.cpu().clone().unwrap_or_default();
    let memory = resources.memory().unwrap_or_default();
    let set = [
        ("cpu.idle", cpu.idle().is_some()),
        ("cpu.burst", cpu.burst().is_some()),
        ("cpu.realtimeRuntime", cpu.realtime_runtime().is_some()),
        ("cpu.realtimePeriod", cpu.realtime_period().is_some()),
        ("memory.reservation", memory.reservation().is_some()),
        ("memory.kernel", memory.kernel().is_some()),
        ("memory.kernelTCP", memory.kernel_tcp().is_some()),
        ("memory.swappiness", memory.swappiness().is_some()),
        ("memory.disableOOMKiller", memory.disable_oom_killer().is_some()),
        ("blockIO", resources.block_io().is_some()),
        ("network", resources.network().is_some()),
        ("rdma", resources.rdma().is_some()),
    ];
    match set.into_iter().find(|(_, is_set)| *is_set) {
        Some((property, _)) => Err(SpecError::Unsupported { property }),
        None => Ok(()),
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

/// The rules of `linux.resources` as an allow list. A rule that denies anything but everything is
/// refused: a deny list allows what it forgets.
fn device_policy(resources: &LinuxResources) -> Result<DevicePolicy, SpecError> {
    let unsupported = SpecError::Unsupported { property: "devices" };
    let mut policy = DevicePolicy::Only(Vec::new());
    for rule in resources.devices().iter().flatten() {
        let letters = rule.access().as_deref().unwrap_or("rwm");
        let access = Access::parse(letters).ok_or_else(|| unsupported.clone())?;
        let kinds: &[DeviceKind] = match rule.typ() {
            None | Some(LinuxDeviceType::A) => &[DeviceKind::Char, DeviceKind::Block],
            Some(LinuxDeviceType::B) => &[DeviceKind::Block],
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => &[DeviceKind::Char],
            Some(LinuxDeviceType::P) => return Err(unsupported),
        };
        let (major, minor) = (device_number(rule.major())?, device_number(rule.minor())?);
        let is_all = kinds.len() == 2 && (major, minor, access) == (None, None, Access::ALL);
        match (&mut policy, rule.allow()) {
            (_, true) if is_all => policy = DevicePolicy::All,
            (_, false) if is_all => policy = DevicePolicy::Only(Vec::new()),
            (_, false) => return Err(unsupported),
            (DevicePolicy::All, true) => {}
            (DevicePolicy::Only(allowed), true) => {
                allowed.extend(kinds.iter().map(|&kind| DeviceRule { kind, major, minor, access }));
            }
        }
    }
    Ok(policy)
}

/// -1 is any number, as in other runtimes.
fn device_number(number: Option<i64>) -> Result<Option<u32>, SpecError> {
    let Some(number) = number.filter(|number| *number != -1) else { return Ok(None) };
    u32::try_from(number)
        .map(Some)
        .map_err(|_| SpecError::Resource { field: "devices", value: i128::from(number) })
}

/// OCI runtime-spec "Allowed Device list": everything is denied first, unless everything is
/// allowed.
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
