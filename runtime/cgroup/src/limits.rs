//! Resource limits: what they mean, and how they are written to the control files of v1 and v2.
//!
//! [`Limits`] follows the CRI message `LinuxContainerResources`, with its sentinels made explicit.
//! Turning it into writes is a pure function ([`plan`]); `apply` carries the writes out.

use std::collections::BTreeMap;
use std::fmt;

use crate::Error;
use crate::unit::{self, Property};

/// The longest value taken for one `unified` entry; the longest real ones are `io.max` lines of
/// about 100 bytes.
const MAX_UNIFIED_VALUE_BYTES: usize = 4096;

/// A limit that can also be "no limit".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ceiling {
    /// No limit.
    Unlimited,
    /// At most this much.
    At(u64),
}

impl Ceiling {
    /// The convention of CRI and OCI for their signed numbers: 0 is "not set", below 0 is
    /// "unlimited".
    #[must_use]
    pub fn from_signed(value: i64) -> Option<Self> {
        match u64::try_from(value) {
            Ok(0) => None,
            Ok(value) => Some(Self::At(value)),
            Err(_) => Some(Self::Unlimited),
        }
    }

    /// As v2 files have it.
    fn v2(self) -> String {
        match self {
            Self::Unlimited => "max".into(),
            Self::At(value) => value.to_string(),
        }
    }

    /// As v1 memory and cpu files have it.
    fn v1(self) -> String {
        match self {
            Self::Unlimited => "-1".into(),
            Self::At(value) => value.to_string(),
        }
    }
}

/// The limit for pages of one size: CRI `HugepageLimit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HugepageLimit {
    /// As in the names of the control files: `2MB`, `1GB`.
    pub page_size: String,
    /// Bytes.
    pub limit_bytes: u64,
}

/// Limits of a container. What is `None`, zero or empty is not set: left as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Relative weight in v1's scale, 2 to 262144, where 1024 is one processor's worth by
    /// Kubernetes' custom.
    pub cpu_shares: Option<u64>,
    /// Processor time in microseconds per period.
    pub cpu_quota_us: Option<Ceiling>,
    /// The period, 1000 to 1000000 microseconds; the kernel's default is 100000.
    pub cpu_period_us: Option<u64>,
    /// Memory in bytes.
    pub memory_limit_bytes: Option<Ceiling>,
    /// Memory *and* swap together in bytes. Not set with a memory limit means equal to it, so no
    /// swap: Kubernetes' custom, which other CRI runtimes follow.
    pub memory_swap_limit_bytes: Option<Ceiling>,
    /// Processes and threads.
    pub pids_limit: Option<Ceiling>,
    /// Processors, as a list like `0-3,7`.
    pub cpuset_cpus: String,
    /// Memory nodes, as a list.
    pub cpuset_mems: String,
    /// Huge pages. A limit of 0 means what it says here, since kubelet sends it for every size; it
    /// needs no controller.
    pub hugepages: Vec<HugepageLimit>,
    /// Raw v2 files, written last so that they win: OCI runtime-spec "Unified", CRI
    /// `LinuxContainerResources.unified`.
    pub unified: BTreeMap<String, String>,
}

/// Something that was not done as asked and is tolerated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// The kernel does not account swap, so memory alone is limited. On a machine without swap that
    /// is the same.
    NoSwapAccounting,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSwapAccounting => f.write_str("swap accounting is not available; only memory is limited"),
        }
    }
}

/// v1's shares (2 to 262144) as v2's weight (1 to 10000), with 1024 becoming 100, v2's default.
///
/// The curve is 10^((l² + 125 l) / 612 − 7/34) with l = log2(shares), rounded up: the one that crun
/// (since 1.23) and runc (since 1.3.2) use and Kubernetes documents. The earlier straight line gave
/// a container of one processor weight 39, less than a plain process.
#[must_use]
pub fn cpu_weight(shares: u64) -> u64 {
    const LEAST: u32 = 2;
    const MOST: u32 = 262_144;
    let shares = u32::try_from(shares).unwrap_or(MOST);
    if shares <= LEAST {
        return 1;
    }
    if shares >= MOST {
        return 10_000;
    }
    let l = f64::from(shares).log2();
    let weight = 10_f64.powf((l * l + 125.0 * l) / 612.0 - 7.0 / 34.0).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and 10000 for shares in range"
    )]
    let weight = weight as u64;
    weight.clamp(1, 10_000)
}

/// What decides on a step, besides the limits.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Version {
    V1,
    V2,
}

/// What has to be known of a live cgroup to change it. A new one has the kernel's defaults: no
/// limits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Present {
    /// v1 `memory.memsw.limit_in_bytes`; nothing when not limited or not accounted.
    pub(crate) memory_and_swap_bytes: Option<u64>,
    /// v2 `memory.max`; nothing when not limited.
    pub(crate) memory_bytes: Option<u64>,
    /// v2 `cpu.max`, first word.
    pub(crate) cpu_quota: Option<String>,
    /// v2 `cpu.max`, second word.
    pub(crate) cpu_period_us: Option<u64>,
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) limit: &'static str,
    pub(crate) controller: &'static str,
    pub(crate) file: String,
    pub(crate) value: String,
    pub(crate) if_missing: IfMissing,
    /// A step that the kernel may refuse with `EINVAL` until the next one is done; both are then
    /// tried in reverse order.
    pub(crate) swaps_with_next: bool,
}

/// What to do when the control file does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfMissing {
    Fail,
    Skip,
    Tell(Note),
}

fn step(limit: &'static str, controller: &'static str, file: &str, value: String) -> Step {
    Step { limit, controller, file: file.into(), value, if_missing: IfMissing::Fail, swaps_with_next: false }
}

/// The writes for `limits`, in an order that the kernel accepts from the state `present`.
pub(crate) fn plan(version: Version, limits: &Limits, present: &Present) -> Result<Vec<Step>, Error> {
    let mut steps = Vec::new();
    let set = |value: Option<u64>| value.filter(|&value| value != 0);
    let set_ceiling = |value: Option<Ceiling>| value.filter(|&value| value != Ceiling::At(0));
    let (shares, period) = (set(limits.cpu_shares), set(limits.cpu_period_us));
    let quota = set_ceiling(limits.cpu_quota_us);
    match version {
        Version::V1 => {
            if let Some(shares) = shares {
                steps.push(step("cpu_shares", "cpu", "cpu.shares", shares.to_string()));
            }
            if let Some(period) = period {
                // A child's quota:period ratio may not exceed its parent's, at any moment between
                // the two writes either.
                let mut first = step("cpu_period_us", "cpu", "cpu.cfs_period_us", period.to_string());
                first.swaps_with_next = quota.is_some();
                steps.push(first);
            }
            if let Some(quota) = quota {
                steps.push(step("cpu_quota_us", "cpu", "cpu.cfs_quota_us", quota.v1()));
            }
        }
        Version::V2 => {
            if let Some(shares) = shares {
                steps.push(step("cpu_shares", "cpu", "cpu.weight", cpu_weight(shares).to_string()));
            }
            let quota_text = quota.map(Ceiling::v2);
            let max = match (quota_text, period) {
                // Without a second word the kernel keeps the period.
                (Some(quota), None) => Some(quota),
                (Some(quota), Some(period)) => Some(format!("{quota} {period}")),
                (None, Some(period)) => {
                    Some(format!("{} {period}", present.cpu_quota.as_deref().unwrap_or("max")))
                }
                (None, None) => None,
            };
            steps.extend(max.map(|max| step("cpu_quota_us", "cpu", "cpu.max", max)));
        }
    }
    for (limit, file, list) in [
        ("cpuset_cpus", "cpuset.cpus", &limits.cpuset_cpus),
        ("cpuset_mems", "cpuset.mems", &limits.cpuset_mems),
    ] {
        if list.is_empty() {
            continue;
        }
        if !list.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b',' | b'-')) {
            return Err(Error::InvalidLimit {
                limit,
                value: list.clone(),
                reason: "it is not a list such as 0-3,7",
            });
        }
        steps.push(step(limit, "cpuset", file, list.clone()));
    }
    let memory = set_ceiling(limits.memory_limit_bytes);
    let swap = set_ceiling(limits.memory_swap_limit_bytes);
    plan_memory(version, memory, swap, present, &mut steps)?;
    if let Some(pids) = set_ceiling(limits.pids_limit) {
        steps.push(step("pids_limit", "pids", "pids.max", pids.v2()));
    }
    for page in &limits.hugepages {
        plan_hugepages(version, page, &mut steps)?;
    }
    plan_unified(version, &limits.unified, &mut steps)?;
    Ok(steps)
}

fn plan_memory(
    version: Version,
    memory: Option<Ceiling>,
    swap: Option<Ceiling>,
    present: &Present,
    steps: &mut Vec<Step>,
) -> Result<(), Error> {
    if let (Some(swap @ Ceiling::At(total)), Some(memory)) = (swap, memory) {
        let too_low = match memory {
            Ceiling::At(memory) => total < memory,
            Ceiling::Unlimited => true,
        };
        if too_low {
            return Err(Error::InvalidLimit {
                limit: "memory_swap_limit_bytes",
                value: swap.v2(),
                reason: "memory and swap together are less than the memory limit",
            });
        }
    }
    match version {
        Version::V1 => {
            let total = swap.or(memory);
            let memory_step = memory
                .map(|memory| step("memory_limit_bytes", "memory", "memory.limit_in_bytes", memory.v1()));
            let total_step = total.map(|total| Step {
                // A swap limit above the memory limit makes nothing weaker by being absent.
                if_missing: IfMissing::Tell(Note::NoSwapAccounting),
                ..step("memory_swap_limit_bytes", "memory", "memory.memsw.limit_in_bytes", total.v1())
            });
            // At every moment memory ≤ memory+swap must hold, or the kernel answers EINVAL: raise
            // the sum first, lower it last.
            let raises = match (total, present.memory_and_swap_bytes) {
                (Some(Ceiling::At(new)), Some(now)) => new > now,
                (Some(Ceiling::Unlimited), Some(_)) => true,
                (_, None) | (None, _) => false,
            };
            if raises {
                steps.extend(total_step);
                steps.extend(memory_step);
            } else {
                steps.extend(memory_step);
                steps.extend(total_step);
            }
        }
        Version::V2 => {
            if let Some(memory) = memory {
                steps.push(step("memory_limit_bytes", "memory", "memory.max", memory.v2()));
            }
            let effective = match memory {
                Some(Ceiling::At(bytes)) => Some(bytes),
                Some(Ceiling::Unlimited) => None,
                None => present.memory_bytes,
            };
            let swap_only = match (swap, effective) {
                (Some(Ceiling::Unlimited), _) => Some("max".to_owned()),
                (Some(Ceiling::At(total)), Some(memory)) => match total.checked_sub(memory) {
                    Some(swap) => Some(swap.to_string()),
                    None => {
                        return Err(Error::InvalidLimit {
                            limit: "memory_swap_limit_bytes",
                            value: total.to_string(),
                            reason: "memory and swap together are less than the memory limit",
                        });
                    }
                },
                (Some(Ceiling::At(total)), None) => {
                    return Err(Error::InvalidLimit {
                        limit: "memory_swap_limit_bytes",
                        value: total.to_string(),
                        reason: "it limits memory and swap together, but memory has no limit",
                    });
                }
                (None, _) => match memory {
                    Some(Ceiling::At(_)) => Some("0".to_owned()),
                    Some(Ceiling::Unlimited) => Some("max".to_owned()),
                    None => None,
                },
            };
            steps.extend(swap_only.map(|value| Step {
                if_missing: IfMissing::Tell(Note::NoSwapAccounting),
                ..step("memory_swap_limit_bytes", "memory", "memory.swap.max", value)
            }));
        }
    }
    Ok(())
}

fn plan_hugepages(version: Version, page: &HugepageLimit, steps: &mut Vec<Step>) -> Result<(), Error> {
    let size = &page.page_size;
    if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(Error::InvalidLimit {
            limit: "hugepages",
            value: size.clone(),
            reason: "the page size is not a number with a unit, such as 2MB",
        });
    }
    let suffix = match version {
        Version::V1 => "limit_in_bytes",
        Version::V2 => "max",
    };
    let if_missing = if page.limit_bytes == 0 { IfMissing::Skip } else { IfMissing::Fail };
    steps.push(Step {
        if_missing,
        ..step("hugepages", "hugetlb", &format!("hugetlb.{size}.{suffix}"), page.limit_bytes.to_string())
    });
    // Reservations, without which a mapping fails only when it is touched, with SIGBUS. Since Linux
    // 5.7.
    steps.push(Step {
        if_missing: IfMissing::Skip,
        ..step("hugepages", "hugetlb", &format!("hugetlb.{size}.rsvd.{suffix}"), page.limit_bytes.to_string())
    });
    Ok(())
}

/// Checks and adds the raw v2 files. A key is the name of a file in the container's cgroup and
/// nothing else; those of the core that move processes or change the tree are not limits
/// (GHSA-5g49-rx9x-qfc6 was a key with `..`).
fn plan_unified(
    version: Version,
    unified: &BTreeMap<String, String>,
    steps: &mut Vec<Step>,
) -> Result<(), Error> {
    for (key, value) in unified {
        let invalid = |reason| Error::InvalidLimit { limit: "unified", value: key.clone(), reason };
        if matches!(version, Version::V1) {
            return Err(invalid("cgroup v1 has no such file"));
        }
        if !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
            || key.starts_with('.')
            || key.ends_with('.')
            || key.contains("..")
            || !key.contains('.')
        {
            return Err(invalid("it is not the name of a control file, such as memory.high"));
        }
        if key.starts_with("cgroup.") && !key.starts_with("cgroup.max.") {
            return Err(invalid("it is not a limit"));
        }
        if value.len() > MAX_UNIFIED_VALUE_BYTES || value.contains('\0') {
            return Err(invalid("its value is too long or contains a NUL byte"));
        }
        steps.push(step("unified", "unified", key, value.clone()));
    }
    Ok(())
}

/// The limits of a new scope, as systemd knows them.
pub(crate) fn properties(limits: &Limits) -> Result<Vec<Property>, Error> {
    let steps = plan(Version::V2, limits, &Present::default())?;
    Ok(properties_of(&steps, &Present::default()))
}

pub(crate) fn properties_of(steps: &[Step], present: &Present) -> Vec<Property> {
    let files = steps.iter().map(|step| (step.file.as_str(), step.value.as_str()));
    unit::of_files(files, present.cpu_period_us)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(version: Version, limits: &Limits, present: &Present) -> Vec<(String, String)> {
        let steps = plan(version, limits, present).unwrap();
        steps.into_iter().map(|step| (step.file, step.value)).collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(file, value)| ((*file).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn shares_become_weights_on_the_curve() {
        for (shares, weight) in
            [(0, 1), (1, 1), (2, 1), (102, 17), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)]
        {
            assert_eq!(cpu_weight(shares), weight, "{shares}");
        }
        let mut last = 0;
        for shares in 2..=262_144 {
            let weight = cpu_weight(shares);
            assert!(weight >= last, "{shares}");
            last = weight;
        }
    }

    #[test]
    fn signed_numbers_have_two_sentinels() {
        for (signed, ceiling) in [
            (0, None),
            (-1, Some(Ceiling::Unlimited)),
            (i64::MIN, Some(Ceiling::Unlimited)),
            (1, Some(Ceiling::At(1))),
            (i64::MAX, Some(Ceiling::At(9_223_372_036_854_775_807))),
        ] {
            assert_eq!(Ceiling::from_signed(signed), ceiling);
        }
    }

    #[test]
    fn nothing_set_writes_nothing() {
        let zeros = Limits {
            cpu_shares: Some(0),
            cpu_quota_us: Some(Ceiling::At(0)),
            cpu_period_us: Some(0),
            memory_limit_bytes: Some(Ceiling::At(0)),
            memory_swap_limit_bytes: Some(Ceiling::At(0)),
            pids_limit: Some(Ceiling::At(0)),
            ..Limits::default()
        };
        for limits in [Limits::default(), zeros] {
            for version in [Version::V1, Version::V2] {
                assert_eq!(planned(version, &limits, &Present::default()), []);
            }
        }
    }

    #[test]
    fn all_limits_in_the_files_of_each_version() {
        let limits = Limits {
            cpu_shares: Some(512),
            cpu_quota_us: Some(Ceiling::At(20_000)),
            cpu_period_us: Some(50_000),
            memory_limit_bytes: Some(Ceiling::At(1000)),
            memory_swap_limit_bytes: Some(Ceiling::At(1500)),
            pids_limit: Some(Ceiling::Unlimited),
            cpuset_cpus: "0-1".into(),
            cpuset_mems: "0".into(),
            hugepages: vec![HugepageLimit { page_size: "2MB".into(), limit_bytes: 4096 }],
            unified: BTreeMap::new(),
        };
        assert_eq!(
            planned(Version::V1, &limits, &Present::default()),
            pairs(&[
                ("cpu.shares", "512"),
                ("cpu.cfs_period_us", "50000"),
                ("cpu.cfs_quota_us", "20000"),
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0"),
                ("memory.limit_in_bytes", "1000"),
                ("memory.memsw.limit_in_bytes", "1500"),
                ("pids.max", "max"),
                ("hugetlb.2MB.limit_in_bytes", "4096"),
                ("hugetlb.2MB.rsvd.limit_in_bytes", "4096"),
            ])
        );
        let v2 = Limits { unified: BTreeMap::from([("memory.high".into(), "900".into())]), ..limits };
        assert_eq!(
            planned(Version::V2, &v2, &Present::default()),
            pairs(&[
                ("cpu.weight", "59"),
                ("cpu.max", "20000 50000"),
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0"),
                ("memory.max", "1000"),
                ("memory.swap.max", "500"),
                ("pids.max", "max"),
                ("hugetlb.2MB.max", "4096"),
                ("hugetlb.2MB.rsvd.max", "4096"),
                ("memory.high", "900"),
            ])
        );
    }

    #[test]
    fn memory_and_swap_are_written_in_the_order_the_kernel_takes() {
        use Ceiling::{At, Unlimited};
        const MEMORY: &str = "memory.limit_in_bytes";
        const TOTAL: &str = "memory.memsw.limit_in_bytes";
        for (memory, swap, now, expected) in [
            (Some(At(10)), None, None, &[(MEMORY, "10"), (TOTAL, "10")][..]),
            (Some(At(10)), None, Some(5), &[(TOTAL, "10"), (MEMORY, "10")]),
            (Some(At(10)), None, Some(20), &[(MEMORY, "10"), (TOTAL, "10")]),
            (Some(At(10)), Some(At(30)), Some(20), &[(TOTAL, "30"), (MEMORY, "10")]),
            (Some(Unlimited), None, Some(20), &[(TOTAL, "-1"), (MEMORY, "-1")]),
            (Some(At(10)), Some(Unlimited), Some(20), &[(TOTAL, "-1"), (MEMORY, "10")]),
            (None, Some(At(30)), Some(20), &[(TOTAL, "30")]),
        ] {
            let limits =
                Limits { memory_limit_bytes: memory, memory_swap_limit_bytes: swap, ..Limits::default() };
            let present = Present { memory_and_swap_bytes: now, ..Present::default() };
            assert_eq!(
                planned(Version::V1, &limits, &present),
                pairs(expected),
                "{memory:?} {swap:?} {now:?}"
            );
        }
    }

    #[test]
    fn v2_swap_is_what_is_left_of_the_sum() {
        use Ceiling::{At, Unlimited};
        for (memory, swap, now, expected) in [
            (Some(At(10)), None, None, Some("0")),
            (Some(At(10)), Some(At(10)), None, Some("0")),
            (Some(At(10)), Some(At(30)), None, Some("20")),
            (Some(At(10)), Some(Unlimited), None, Some("max")),
            (Some(Unlimited), None, Some(10), Some("max")),
            (None, Some(At(30)), Some(10), Some("20")),
            (None, None, Some(10), None),
        ] {
            let limits =
                Limits { memory_limit_bytes: memory, memory_swap_limit_bytes: swap, ..Limits::default() };
            let present = Present { memory_bytes: now, ..Present::default() };
            let steps = planned(Version::V2, &limits, &present);
            let written =
                steps.iter().find(|(file, _)| file == "memory.swap.max").map(|(_, value)| value.as_str());
            assert_eq!(written, expected, "{memory:?} {swap:?} {now:?}");
        }
    }

    #[test]
    fn a_period_alone_keeps_the_quota() {
        let limits = Limits { cpu_period_us: Some(50_000), ..Limits::default() };
        let present = Present { cpu_quota: Some("30000".into()), ..Present::default() };
        assert_eq!(planned(Version::V2, &limits, &present), pairs(&[("cpu.max", "30000 50000")]));
        assert_eq!(planned(Version::V2, &limits, &Present::default()), pairs(&[("cpu.max", "max 50000")]));
    }

    #[test]
    fn senseless_limits_are_refused_by_name() {
        let unified = |key: &str| Limits {
            unified: BTreeMap::from([(key.to_owned(), "1".to_owned())]),
            ..Limits::default()
        };
        let mut cases = vec![
            (
                "memory_swap_limit_bytes",
                Limits {
                    memory_limit_bytes: Some(Ceiling::At(10)),
                    memory_swap_limit_bytes: Some(Ceiling::At(9)),
                    ..Limits::default()
                },
            ),
            (
                "memory_swap_limit_bytes",
                Limits {
                    memory_limit_bytes: Some(Ceiling::Unlimited),
                    memory_swap_limit_bytes: Some(Ceiling::At(9)),
                    ..Limits::default()
                },
            ),
            (
                "memory_swap_limit_bytes",
                Limits { memory_swap_limit_bytes: Some(Ceiling::At(9)), ..Limits::default() },
            ),
        ];
        for list in ["0 1", "a", "0\n1", "0\0", "../x", " "] {
            cases.push(("cpuset_cpus", Limits { cpuset_cpus: list.into(), ..Limits::default() }));
        }
        for size in ["", "..", "2MB/../x", "2 MB", "2MB\n"] {
            let hugepages = vec![HugepageLimit { page_size: size.into(), limit_bytes: 0 }];
            cases.push(("hugepages", Limits { hugepages, ..Limits::default() }));
        }
        for key in [
            "",
            "..",
            "../memory.max",
            "a/memory.max",
            "/etc/passwd",
            "memory..max",
            ".memory",
            "memory.",
            "memory",
            "memory.max\0",
            "memory max.",
            "cgroup.procs",
            "cgroup.kill",
            "cgroup.subtree_control",
            "cgroup.threads",
            "cgroup.freeze",
            "cgroup.type",
        ] {
            cases.push(("unified", unified(key)));
        }
        for (expected, limits) in cases {
            let error = plan(Version::V2, &limits, &Present::default()).unwrap_err();
            assert!(
                matches!(error, Error::InvalidLimit { limit, .. } if limit == expected),
                "{limits:?}: {error}"
            );
        }
        assert!(plan(Version::V2, &unified("cgroup.max.depth"), &Present::default()).is_ok());
        assert!(plan(Version::V1, &unified("memory.high"), &Present::default()).is_err());
    }
}
