//! `LinuxContainerResources` into [`Resources`], and back for a status.

use std::collections::{BTreeMap, BTreeSet};

use berth_cri::v1;
use berth_model::container::Resources;

use super::field::{Field, Rejected, at_most, no_longer_than, no_nul, quoted};

/// Limit on page sizes in one request; an architecture has at most a handful.
const MAX_HUGEPAGE_LIMITS: usize = 64;

/// Limit on entries of `unified`; cgroup v2 has about a hundred files.
const MAX_UNIFIED: usize = 256;

/// The longest value of `unified`, and of a list of processors.
const MAX_VALUE_BYTES: usize = 4096;

/// The longest name of a file: `NAME_MAX` of <linux/limits.h>.
const MAX_FILE_NAME_BYTES: usize = 255;

/// The period in microseconds, and the least quota: kernel/sched/core.c, 1 ms to 1 s.
const CPU_PERIOD_US: std::ops::RangeInclusive<i64> = 1_000..=1_000_000;

/// Shares: kernel/sched/sched.h, `MIN_SHARES` and `MAX_SHARES`. The kernel clamps others to this
/// range.
const MAX_CPU_SHARES: i64 = 262_144;

/// proc_pid_oom_score_adj(5).
const OOM_SCORE_ADJ: std::ops::RangeInclusive<i64> = -1_000..=1_000;

/// The limits of a new container. Zero and empty are "not set".
///
/// # Errors
/// [`Rejected`], with the first field that is wrong.
pub fn resources(field: &Field<'_>, message: &v1::LinuxContainerResources) -> Result<Resources, Rejected> {
    let resources = fields(field, message)?;
    check_together(field, &resources)?;
    Ok(resources)
}

/// The limits of `current`, changed by an `UpdateContainerResourcesRequest`.
///
/// `oom_score_adj` stays as it was set at the start. If only the memory limit is set, the limit of
/// memory and swap together moves by the same amount, so that the swap limit stays the same.
///
/// # Errors
/// [`Rejected`], with the first field that is wrong, alone or in combination with an unchanged one.
pub fn updated_resources(
    field: &Field<'_>,
    current: &Resources,
    message: &v1::LinuxContainerResources,
) -> Result<Resources, Rejected> {
    let asked = fields(field, message)?;
    let number = |asked: i64, current: i64| if asked == 0 { current } else { asked };
    let text = |asked: String, current: &String| if asked.is_empty() { current.clone() } else { asked };
    let memory_limit_bytes = number(asked.memory_limit_bytes, current.memory_limit_bytes);
    let memory_swap_limit_bytes = match (asked.memory_swap_limit_bytes, current.memory_swap_limit_bytes) {
        (0, together) if together > 0 && current.memory_limit_bytes > 0 && memory_limit_bytes > 0 => {
            let swap = together.saturating_sub(current.memory_limit_bytes);
            memory_limit_bytes.saturating_add(swap)
        }
        // Limited swap with unlimited memory does not exist.
        (0, together) if together > 0 && memory_limit_bytes < 0 => -1,
        (asked, current) => number(asked, current),
    };
    let mut hugepage_limits = current.hugepage_limits.clone();
    for (size, limit) in asked.hugepage_limits {
        match hugepage_limits.iter_mut().find(|(known, _)| *known == size) {
            Some((_, known)) => *known = limit,
            None => hugepage_limits.push((size, limit)),
        }
    }
    let mut unified = current.unified.clone();
    unified.extend(asked.unified);
    let updated = Resources {
        cpu_period_us: number(asked.cpu_period_us, current.cpu_period_us),
        cpu_quota_us: number(asked.cpu_quota_us, current.cpu_quota_us),
        cpu_shares: number(asked.cpu_shares, current.cpu_shares),
        memory_limit_bytes,
        memory_swap_limit_bytes,
        oom_score_adj: current.oom_score_adj,
        cpuset_cpus: text(asked.cpuset_cpus, &current.cpuset_cpus),
        cpuset_mems: text(asked.cpuset_mems, &current.cpuset_mems),
        hugepage_limits,
        unified,
    };
    check_together(field, &updated)?;
    Ok(updated)
}

/// `LinuxContainerResources` again, as a status has it.
#[must_use]
pub fn resources_message(resources: &Resources) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_period: resources.cpu_period_us,
        cpu_quota: resources.cpu_quota_us,
        cpu_shares: resources.cpu_shares,
        memory_limit_in_bytes: resources.memory_limit_bytes,
        oom_score_adj: resources.oom_score_adj,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: resources
            .hugepage_limits
            .iter()
            .map(|(page_size, limit)| v1::HugepageLimit { page_size: page_size.clone(), limit: *limit })
            .collect(),
        unified: resources.unified.clone(),
        memory_swap_limit_in_bytes: resources.memory_swap_limit_bytes,
    }
}

/// Each field on its own.
fn fields(field: &Field<'_>, message: &v1::LinuxContainerResources) -> Result<Resources, Rejected> {
    if message.cpu_period != 0 && !CPU_PERIOD_US.contains(&message.cpu_period) {
        return Err(out_of_range(
            &field.of("cpu_period"),
            message.cpu_period,
            CPU_PERIOD_US.start(),
            CPU_PERIOD_US.end(),
        ));
    }
    let quota = message.cpu_quota;
    if quota < -1 || (1..*CPU_PERIOD_US.start()).contains(&quota) {
        return Err(field
            .of("cpu_quota")
            .invalid(format!("{quota} is neither -1 (no limit) nor at least {}", CPU_PERIOD_US.start())));
    }
    if !(0..=MAX_CPU_SHARES).contains(&message.cpu_shares) {
        return Err(out_of_range(&field.of("cpu_shares"), message.cpu_shares, &0, &MAX_CPU_SHARES));
    }
    for (name, value) in [
        ("memory_limit_in_bytes", message.memory_limit_in_bytes),
        ("memory_swap_limit_in_bytes", message.memory_swap_limit_in_bytes),
    ] {
        if value < -1 {
            return Err(field.of(name).invalid(format!("{value} is neither -1 (no limit) nor a size")));
        }
    }
    if !OOM_SCORE_ADJ.contains(&message.oom_score_adj) {
        return Err(out_of_range(
            &field.of("oom_score_adj"),
            message.oom_score_adj,
            OOM_SCORE_ADJ.start(),
            OOM_SCORE_ADJ.end(),
        ));
    }
    cpu_list(&field.of("cpuset_cpus"), &message.cpuset_cpus)?;
    cpu_list(&field.of("cpuset_mems"), &message.cpuset_mems)?;
    Ok(Resources {
        cpu_period_us: message.cpu_period,
        cpu_quota_us: quota,
        cpu_shares: message.cpu_shares,
        memory_limit_bytes: message.memory_limit_in_bytes,
        memory_swap_limit_bytes: message.memory_swap_limit_in_bytes,
        oom_score_adj: message.oom_score_adj,
        cpuset_cpus: message.cpuset_cpus.clone(),
        cpuset_mems: message.cpuset_mems.clone(),
        hugepage_limits: hugepage_limits(&field.of("hugepage_limits"), &message.hugepage_limits)?,
        unified: unified(&field.of("unified"), &message.unified)?,
    })
}

/// The limit of memory and swap together is no less than that of memory.
fn check_together(field: &Field<'_>, resources: &Resources) -> Result<(), Rejected> {
    let (memory, together) = (resources.memory_limit_bytes, resources.memory_swap_limit_bytes);
    let entry = field.of("memory_swap_limit_in_bytes");
    if together > 0 && memory <= 0 {
        return Err(entry.invalid("limits memory and swap together, but memory has no limit"));
    }
    if together > 0 && together < memory {
        return Err(entry.invalid(format!("{together} is less than the memory limit, {memory}")));
    }
    Ok(())
}

fn out_of_range(field: &Field<'_>, value: i64, least: &i64, most: &i64) -> Rejected {
    field.invalid(format!("{value} is not between {least} and {most}"))
}

/// The "List format" of cpuset(7), `0-3,7`, without the kernel's extensions.
fn cpu_list(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    if text.is_empty() {
        return Ok(());
    }
    no_longer_than(field, text, MAX_VALUE_BYTES)?;
    let number = |text: &str| -> Option<u16> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
    };
    let range = |text: &str| match text.split_once('-') {
        Some((first, last)) => {
            matches!((number(first), number(last)), (Some(first), Some(last)) if first <= last)
        }
        None => number(text).is_some(),
    };
    if !text.split(',').all(range) {
        return Err(field.invalid(format!("{} is not a list such as 0-3,7", quoted(text))));
    }
    Ok(())
}

fn hugepage_limits(field: &Field<'_>, limits: &[v1::HugepageLimit]) -> Result<Vec<(String, u64)>, Rejected> {
    at_most(field, limits.len(), MAX_HUGEPAGE_LIMITS)?;
    let mut seen = BTreeSet::new();
    for (index, limit) in limits.iter().enumerate() {
        let entry = field.at(index);
        // It becomes part of a file name, hugetlb.2MB.max.
        let digits = ["KB", "MB", "GB"].iter().find_map(|unit| limit.page_size.strip_suffix(unit));
        let plain = digits.is_some_and(|digits| {
            (1..=4).contains(&digits.len())
                && !digits.starts_with('0')
                && digits.bytes().all(|byte| byte.is_ascii_digit())
        });
        if !plain {
            return Err(entry
                .of("page_size")
                .invalid(format!("{} is not a size such as 2MB", quoted(&limit.page_size))));
        }
        if !seen.insert(limit.page_size.as_str()) {
            return Err(entry.of("page_size").invalid("given twice"));
        }
    }
    Ok(limits.iter().map(|limit| (limit.page_size.clone(), limit.limit)).collect())
}

/// Files of the controllers. Those of the cgroup itself (`cgroup.procs`, `cgroup.kill`) are not
/// limits.
fn unified(
    field: &Field<'_>,
    entries: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, Rejected> {
    at_most(field, entries.len(), MAX_UNIFIED)?;
    for (file, value) in entries {
        let entry = field.key(file);
        no_longer_than(&entry, file, MAX_FILE_NAME_BYTES)?;
        let plain = |part: &str| {
            !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let is_control_file = file.split_once('.').is_some_and(|(controller, name)| {
            plain(controller) && controller != "cgroup" && name.split('.').all(plain)
        });
        if !is_control_file {
            return Err(entry.invalid("not a control file such as memory.high"));
        }
        no_longer_than(&entry, value, MAX_VALUE_BYTES)?;
        no_nul(&entry, value)?;
        if value.contains('\n') {
            return Err(entry.invalid("the value has more than one line"));
        }
    }
    Ok(entries.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(message: &v1::LinuxContainerResources) -> Result<Resources, Rejected> {
        resources(&Field::root("r"), message)
    }

    fn everything() -> v1::LinuxContainerResources {
        v1::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: 999,
            cpuset_cpus: "0-3,7".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: vec![
                v1::HugepageLimit { page_size: "2MB".into(), limit: 0 },
                v1::HugepageLimit { page_size: "1GB".into(), limit: 1 << 30 },
            ],
            unified: BTreeMap::from([
                ("memory.swap.max".into(), "0".into()),
                ("io.max".into(), "8:0 rbps=1".into()),
            ]),
            memory_swap_limit_in_bytes: 64 << 20,
        }
    }

    #[test]
    fn what_is_asked_for_comes_back_in_the_status() {
        for message in [everything(), v1::LinuxContainerResources::default()] {
            assert_eq!(resources_message(&checked(&message).unwrap()), message);
        }
    }

    #[test]
    fn numbers_have_their_ranges() {
        type Set = fn(&mut v1::LinuxContainerResources, i64);
        let cases: &[(&str, Set, &[i64], &[i64])] = &[
            (
                "r.cpu_period",
                |m, v| m.cpu_period = v,
                &[0, 1_000, 1_000_000],
                &[-1, 1, 999, 1_000_001, i64::MAX],
            ),
            ("r.cpu_quota", |m, v| m.cpu_quota = v, &[-1, 0, 1_000, i64::MAX], &[-2, 1, 999, i64::MIN]),
            ("r.cpu_shares", |m, v| m.cpu_shares = v, &[0, 1, 2, 262_144], &[-1, 262_145, i64::MIN]),
            (
                "r.memory_limit_in_bytes",
                |m, v| m.memory_limit_in_bytes = v,
                &[-1, 0, 1, i64::MAX],
                &[-2, i64::MIN],
            ),
            (
                "r.memory_swap_limit_in_bytes",
                |m, v| {
                    m.memory_limit_in_bytes = 100;
                    m.memory_swap_limit_in_bytes = v;
                },
                &[-1, 0, 100, i64::MAX],
                &[-2, 1, 99],
            ),
            (
                "r.memory_swap_limit_in_bytes",
                |m, v| m.memory_swap_limit_in_bytes = v,
                &[-1, 0],
                &[1, i64::MAX],
            ),
            ("r.oom_score_adj", |m, v| m.oom_score_adj = v, &[-1_000, 0, 1_000], &[-1_001, 1_001, i64::MAX]),
        ];
        for (field, set, good, bad) in cases {
            for value in *good {
                let mut message = v1::LinuxContainerResources::default();
                set(&mut message, *value);
                assert_eq!(checked(&message).err(), None, "{field} {value}");
            }
            for value in *bad {
                let mut message = v1::LinuxContainerResources::default();
                set(&mut message, *value);
                match checked(&message) {
                    Err(Rejected::Invalid { field: found, .. }) => assert_eq!(found, *field, "{value}"),
                    other => panic!("{field} {value}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn lists_of_processors_are_numbers_and_ranges() {
        let long = "0,".repeat(4096);
        let cases = [
            ("", true),
            ("0", true),
            ("0-3,7,9-9", true),
            ("3-0", false),
            ("-1", false),
            ("0-", false),
            ("0,,1", false),
            ("0,", false),
            ("0-1-2", false),
            ("+1", false),
            ("0 1", false),
            ("0\n", false),
            ("65536", false),
            ("all", false),
            (&long, false),
        ];
        for (text, good) in cases {
            assert_eq!(cpu_list(&Field::root("c"), text).is_ok(), good, "{text:?}");
        }
    }

    #[test]
    fn page_sizes_cannot_name_another_file() {
        let one = |size: &str| {
            hugepage_limits(&Field::root("h"), &[v1::HugepageLimit { page_size: size.into(), limit: 1 }])
        };
        for size in ["64KB", "2MB", "1GB", "512MB"] {
            assert!(one(size).is_ok(), "{size}");
        }
        for size in [
            "", "MB", "2", "2mb", "2MiB", "02MB", "+2MB", "-2MB", "2.0MB", "../2MB", "2MB/../x", "2MB\n",
            "99999MB", " 2MB",
        ] {
            assert!(one(size).is_err(), "{size:?}");
        }
        let twice = vec![v1::HugepageLimit { page_size: "2MB".into(), limit: 1 }; 2];
        assert!(hugepage_limits(&Field::root("h"), &twice).is_err());
    }

    #[test]
    fn unified_entries_are_limits_and_nothing_else() {
        let one = |file: &str, value: &str| {
            unified(&Field::root("u"), &BTreeMap::from([(file.to_owned(), value.to_owned())]))
        };
        for (file, value) in [
            ("memory.high", "max"),
            ("hugetlb.2MB.max", "0"),
            ("io.bfq.weight", "default 100"),
            ("memory.low", ""),
        ] {
            assert!(one(file, value).is_ok(), "{file}");
        }
        for file in [
            "",
            "memory",
            ".memory",
            "memory.",
            "memory..high",
            "cgroup.procs",
            "cgroup.kill",
            "cgroup.subtree_control",
            "../memory.high",
            "memory.high/../../cgroup.procs",
            "/memory.high",
            "memory.high\n",
            "memory high.x",
            "memory.high\0",
        ] {
            assert!(one(file, "1").is_err(), "{file:?}");
        }
        for value in ["1\n2", "1\0", &"1".repeat(MAX_VALUE_BYTES + 1)] {
            assert!(one("memory.high", value).is_err(), "{} bytes", value.len());
        }
        let many = (0..=MAX_UNIFIED).map(|number| (format!("memory.x{number}"), String::new())).collect();
        assert!(unified(&Field::root("u"), &many).is_err());
    }

    #[test]
    fn an_update_changes_what_it_sets() {
        let current = checked(&everything()).unwrap();
        let none = v1::LinuxContainerResources::default();
        assert_eq!(updated_resources(&Field::root("r"), &current, &none), Ok(current.clone()));

        let cpus = v1::LinuxContainerResources { cpuset_cpus: "2".into(), ..none.clone() };
        let expected = Resources { cpuset_cpus: "2".into(), ..current.clone() };
        assert_eq!(updated_resources(&Field::root("r"), &current, &cpus), Ok(expected));

        let score = v1::LinuxContainerResources { oom_score_adj: -5, ..none.clone() };
        assert_eq!(updated_resources(&Field::root("r"), &current, &score), Ok(current.clone()));

        let message = v1::LinuxContainerResources {
            cpu_quota: -1,
            hugepage_limits: vec![
                v1::HugepageLimit { page_size: "2MB".into(), limit: 7 },
                v1::HugepageLimit { page_size: "64KB".into(), limit: 8 },
            ],
            unified: BTreeMap::from([("io.max".into(), "8:0 rbps=2".into())]),
            ..none
        };
        let updated = updated_resources(&Field::root("r"), &current, &message).unwrap();
        assert_eq!(updated.cpu_quota_us, -1);
        let pages = [("2MB".to_owned(), 7), ("1GB".to_owned(), 1 << 30), ("64KB".to_owned(), 8)];
        assert_eq!(updated.hugepage_limits, pages);
        assert_eq!(updated.unified["io.max"], "8:0 rbps=2");
        assert_eq!(updated.unified["memory.swap.max"], "0");
    }

    #[test]
    fn an_update_keeps_the_swap_when_only_memory_changes() {
        // Memory and together before; memory and together asked; memory and together after.
        type Case = ([i64; 2], [i64; 2], Option<[i64; 2]>);
        let cases: &[Case] = &[
            ([100, 100], [200, 0], Some([200, 200])),
            ([100, 150], [200, 0], Some([200, 250])),
            ([100, 150], [50, 0], Some([50, 100])),
            ([100, 0], [200, 0], Some([200, 0])),
            ([100, -1], [200, 0], Some([200, -1])),
            ([100, 150], [-1, 0], Some([-1, -1])),
            ([100, 150], [0, 120], Some([100, 120])),
            ([100, 150], [200, 300], Some([200, 300])),
            ([100, i64::MAX], [200, 0], Some([200, i64::MAX])),
            ([0, 0], [200, 0], Some([200, 0])),
            ([100, 150], [0, 99], None),
            ([0, 0], [0, 100], None),
            ([100, 150], [200, 150], None),
            ([100, 150], [-2, 0], None),
        ];
        for (before, asked, after) in cases {
            let current = Resources {
                memory_limit_bytes: before[0],
                memory_swap_limit_bytes: before[1],
                ..Resources::default()
            };
            let message = v1::LinuxContainerResources {
                memory_limit_in_bytes: asked[0],
                memory_swap_limit_in_bytes: asked[1],
                ..Default::default()
            };
            let found = updated_resources(&Field::root("r"), &current, &message)
                .ok()
                .map(|updated| [updated.memory_limit_bytes, updated.memory_swap_limit_bytes]);
            assert_eq!(found, *after, "{before:?} {asked:?}");
        }
    }
}
