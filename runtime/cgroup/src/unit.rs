//! Limits as properties of a systemd unit: what systemd has to know, so that when it rewrites a
//! unit's files (at a daemon-reload, when another property changes) it writes the same values as
//! the daemon did.
//!
//! The properties are derived from the writes that [`crate::limits`] plans for the v2 files, so
//! that every limit is interpreted in one place. What systemd has no property for (huge pages,
//! `io.cost.*`, devices) it leaves alone; it is written to the files only.
//!
//! Names and types: org.freedesktop.systemd1(5); their meaning: systemd.resource-control(5),
//! systemd 244 and later.

use std::time::Duration;

/// The value of a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    /// D-Bus type `s`.
    Text(String),
    /// `b`
    Flag(bool),
    /// `t`
    Number(u64),
    /// `ay`
    Bits(Vec<u8>),
    /// `au`
    Processes(Vec<u32>),
    /// `i`
    Signal(i32),
    /// `as`
    Units(Vec<String>),
    /// `a(st)`: devices by path, each with a number.
    Devices(Vec<(String, u64)>),
}

/// How systemd ends a scope when asked to, above all at shutdown: systemd.kill(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending<'a> {
    /// The signal that every process in it gets first.
    pub signal: i32,
    /// How long until the rest get SIGKILL. At least one second.
    pub grace: Duration,
    /// The id of another scope of the same parent, which is ended only after this one.
    pub before: Option<&'a str>,
}

/// A property of a unit.
pub(crate) type Property = (&'static str, Value);

/// systemd's "no limit", `CGROUP_LIMIT_MAX` and `USEC_INFINITY`.
const INFINITY: u64 = u64::MAX;

/// The kernel's default period, in microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// systemd keeps a quota in whole percents of a processor, 10 ms of each second. A part of one is
/// rounded up: the exact value is in the file, which is written afterwards.
const QUOTA_STEP_US: u64 = 10_000;

/// The unit that every packaging of kubelet has.
const KUBELET: &str = "kubelet.service";

/// The highest processor or memory node in a list; `CONFIG_NR_CPUS` is at most 8192 on the largest
/// machines.
const MAX_CPUSET_BIT: usize = 8191;

/// The properties of a new scope that follow from what it is, without its limits.
pub(crate) fn of_scope(description: String, slice: &str, process: u32) -> Vec<Property> {
    vec![
        ("Description", Value::Text(description)),
        ("Slice", Value::Text(slice.to_owned())),
        // What is below the scope is the container's; systemd enables every controller for it and
        // keeps out.
        ("Delegate", Value::Flag(true)),
        // No ordering against services that containers have nothing to do with. A shutdown still
        // ends them, with their slice.
        ("DefaultDependencies", Value::Flag(false)),
        // A unit that failed, such as by an OOM kill, is removed like any other.
        ("CollectMode", Value::Text("inactive-or-failed".to_owned())),
        ("CPUAccounting", Value::Flag(true)),
        ("MemoryAccounting", Value::Flag(true)),
        ("IOAccounting", Value::Flag(true)),
        // The default is 15 % of the machine's; kubelet limits the pod.
        ("TasksMax", Value::Number(INFINITY)),
        ("PIDs", Value::Processes(vec![process])),
    ]
}

/// The properties that say how a scope ends. `before` is the name of the scope that
/// [`Ending::before`] means.
pub(crate) fn of_ending(ending: &Ending<'_>, before: Option<String>) -> Vec<Property> {
    // 0 would be no limit.
    let grace = ending.grace.max(Duration::from_secs(1));
    // A kubelet that ends with the machine must end first, or it would see its containers die and
    // try to restart them.
    let mut properties = vec![
        ("KillSignal", Value::Signal(ending.signal)),
        ("TimeoutStopUSec", Value::Number(u64::try_from(grace.as_micros()).unwrap_or(INFINITY))),
        ("Before", Value::Units(vec![KUBELET.to_owned()])),
    ];
    // What starts later is stopped earlier: systemd.unit(5), "Before=, After=".
    properties.extend(before.map(|unit| ("After", Value::Units(vec![unit]))));
    properties
}

/// The properties for what is written to the v2 files. If one property occurs several times the
/// last counts, as with the writes. `period_us` is the period in force, which a quota without one
/// keeps.
pub(crate) fn of_files<'a>(
    files: impl Iterator<Item = (&'a str, &'a str)>,
    period_us: Option<u64>,
) -> Vec<Property> {
    let mut properties: Vec<Property> = Vec::new();
    for (file, value) in files {
        for (name, value) in of_file(file, value.trim(), period_us) {
            properties.retain(|(earlier, _)| *earlier != name);
            properties.push((name, value));
        }
    }
    properties
}

fn of_file(file: &str, value: &str, period_us: Option<u64>) -> Vec<Property> {
    let amount = |name| amount(value).map(|amount| (name, Value::Number(amount))).into_iter().collect();
    let list = |name| bits(value).map(|bits| (name, Value::Bits(bits))).into_iter().collect();
    match file {
        "cpu.weight" => amount("CPUWeight"),
        // systemd's weight of 0 is what the kernel calls idle.
        "cpu.idle" if value == "1" => vec![("CPUWeight", Value::Number(0))],
        "cpu.max" => quota(value, period_us),
        "cpuset.cpus" => list("AllowedCPUs"),
        "cpuset.mems" => list("AllowedMemoryNodes"),
        "memory.max" => amount("MemoryMax"),
        "memory.high" => amount("MemoryHigh"),
        "memory.low" => amount("MemoryLow"),
        "memory.min" => amount("MemoryMin"),
        "memory.swap.max" => amount("MemorySwapMax"),
        "memory.zswap.max" => amount("MemoryZSwapMax"),
        "pids.max" => amount("TasksMax"),
        "io.weight" => {
            let weight = value.strip_prefix("default ").unwrap_or(value).trim().parse().ok();
            weight.map(|weight| ("IOWeight", Value::Number(weight))).into_iter().collect()
        }
        "io.max" => io_limits(value).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// A number, or `max`. Anything else that the kernel may understand (`1G`) is not passed to
/// systemd.
fn amount(value: &str) -> Option<u64> {
    if value == "max" { Some(INFINITY) } else { value.parse().ok() }
}

/// `cpu.max`: quota, and after a space the period.
fn quota(value: &str, present_period_us: Option<u64>) -> Vec<Property> {
    let mut words = value.split_ascii_whitespace();
    let Some(quota) = words.next().and_then(amount) else { return Vec::new() };
    let named: Option<u64> = words.next().and_then(|period| period.parse().ok()).filter(|&period| period > 0);
    let period = named.or(present_period_us).unwrap_or(DEFAULT_PERIOD_US);
    let per_second = if quota == INFINITY {
        INFINITY
    } else {
        let exact = u128::from(quota) * 1_000_000 / u128::from(period.max(1));
        let exact = u64::try_from(exact).unwrap_or(INFINITY);
        exact.checked_next_multiple_of(QUOTA_STEP_US).unwrap_or(INFINITY)
    };
    let mut properties = vec![("CPUQuotaPerSecUSec", Value::Number(per_second))];
    properties.extend(named.map(|period| ("CPUQuotaPeriodUSec", Value::Number(period))));
    properties
}

/// The keys of `io.max` (cgroup v2, "IO Interface Files") and the properties that have the same
/// limits.
const IO_LIMITS: [(&str, &str); 4] = [
    ("rbps", "IOReadBandwidthMax"),
    ("wbps", "IOWriteBandwidthMax"),
    ("riops", "IOReadIOPSMax"),
    ("wiops", "IOWriteIOPSMax"),
];

/// `io.max`: lines of `MAJOR:MINOR KEY=VALUE...`. Nothing for what is not of that form.
fn io_limits(value: &str) -> Option<Vec<Property>> {
    let mut properties: Vec<(&str, Vec<(String, u64)>)> =
        IO_LIMITS.iter().map(|(_, name)| (*name, Vec::new())).collect();
    for line in value.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(device) = words.next() else { continue };
        let (major, minor) = device.split_once(':')?;
        let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
        for word in words {
            let (key, limit) = word.split_once('=')?;
            let place = IO_LIMITS.iter().position(|(known, _)| *known == key)?;
            // systemd finds the device by any path to it; this one follows from its numbers.
            let path = format!("/dev/block/{major}:{minor}");
            properties.get_mut(place)?.1.push((path, amount(limit)?));
        }
    }
    let properties = properties.into_iter().filter(|(_, devices)| !devices.is_empty());
    Some(properties.map(|(name, devices)| (name, Value::Devices(devices))).collect())
}

/// A list like `0-3,7` as a bit mask, the lowest in the first byte. Nothing for what is not a list.
fn bits(list: &str) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last > MAX_CPUSET_BIT {
            return None;
        }
        for bit in first..=last {
            if mask.len() <= bit / 8 {
                mask.resize(bit / 8 + 1, 0_u8);
            }
            if let Some(byte) = mask.get_mut(bit / 8) {
                *byte |= 1 << (bit % 8);
            }
        }
    }
    Some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(name: &'static str, value: u64) -> Property {
        (name, Value::Number(value))
    }

    #[test]
    fn files_become_properties() {
        for (file, value, expected) in [
            ("cpu.weight", "39", vec![number("CPUWeight", 39)]),
            ("cpu.idle", "1", vec![number("CPUWeight", 0)]),
            ("cpu.idle", "0", vec![]),
            (
                "cpu.max",
                "50000 100000",
                vec![number("CPUQuotaPerSecUSec", 500_000), number("CPUQuotaPeriodUSec", 100_000)],
            ),
            ("cpu.max", "50000", vec![number("CPUQuotaPerSecUSec", 1_000_000)]),
            ("cpu.max", "max", vec![number("CPUQuotaPerSecUSec", u64::MAX)]),
            (
                "cpu.max",
                "max 1000",
                vec![number("CPUQuotaPerSecUSec", u64::MAX), number("CPUQuotaPeriodUSec", 1000)],
            ),
            // A third of a percent is rounded up.
            (
                "cpu.max",
                "12345 100000",
                vec![number("CPUQuotaPerSecUSec", 130_000), number("CPUQuotaPeriodUSec", 100_000)],
            ),
            ("cpu.max", "1000 0", vec![number("CPUQuotaPerSecUSec", 20_000)]),
            (
                "cpu.max",
                "18446744073709551614 1",
                vec![number("CPUQuotaPerSecUSec", u64::MAX), number("CPUQuotaPeriodUSec", 1)],
            ),
            ("cpu.max", "", vec![]),
            ("cpu.max", "x y", vec![]),
            ("cpuset.cpus", "0-2,9", vec![("AllowedCPUs", Value::Bits(vec![7, 2]))]),
            ("cpuset.mems", "0", vec![("AllowedMemoryNodes", Value::Bits(vec![1]))]),
            ("cpuset.cpus", "3-1", vec![]),
            ("cpuset.cpus", "0-99999999999", vec![]),
            ("cpuset.cpus", "", vec![]),
            ("cpuset.cpus", "1,,2", vec![]),
            ("memory.max", "max", vec![number("MemoryMax", u64::MAX)]),
            ("memory.max", "67108864", vec![number("MemoryMax", 67_108_864)]),
            ("memory.high", "1G", vec![]),
            ("memory.swap.max", "0", vec![number("MemorySwapMax", 0)]),
            ("memory.zswap.max", "1", vec![number("MemoryZSwapMax", 1)]),
            ("pids.max", "10\n", vec![number("TasksMax", 10)]),
            ("io.weight", "default 50", vec![number("IOWeight", 50)]),
            ("io.weight", "8:0 50", vec![]),
            (
                "io.max",
                "8:0 rbps=1",
                vec![("IOReadBandwidthMax", Value::Devices(vec![("/dev/block/8:0".into(), 1)]))],
            ),
            (
                "io.max",
                "8:0 wiops=120 rbps=max\n254:16 rbps=4096\n",
                vec![
                    (
                        "IOReadBandwidthMax",
                        Value::Devices(vec![
                            ("/dev/block/8:0".into(), u64::MAX),
                            ("/dev/block/254:16".into(), 4096),
                        ]),
                    ),
                    ("IOWriteIOPSMax", Value::Devices(vec![("/dev/block/8:0".into(), 120)])),
                ],
            ),
            ("io.max", "8:0", vec![]),
            ("io.max", "8:0 rbps", vec![]),
            ("io.max", "8:0 rbps=1 more=1", vec![]),
            ("io.max", "8:../x rbps=1", vec![]),
            ("io.max", "../sda rbps=1", vec![]),
            ("io.max", "8:0 rbps=-1", vec![]),
            ("hugetlb.2MB.max", "0", vec![]),
            ("", "", vec![]),
        ] {
            assert_eq!(of_files([(file, value)].into_iter(), Some(50_000)), expected, "{file} {value:?}");
        }
    }

    #[test]
    fn a_quota_without_a_period_uses_the_one_in_force_or_the_kernels() {
        assert_eq!(
            of_files([("cpu.max", "50000")].into_iter(), None),
            [number("CPUQuotaPerSecUSec", 500_000)]
        );
    }

    #[test]
    fn an_end_has_a_signal_a_time_and_an_order() {
        let before = || Value::Units(vec!["kubelet.service".to_owned()]);
        let ending = Ending { signal: 3, grace: Duration::from_millis(2500), before: Some("0a1") };
        assert_eq!(
            of_ending(&ending, Some("berth-0a1.scope".to_owned())),
            [
                ("KillSignal", Value::Signal(3)),
                number("TimeoutStopUSec", 2_500_000),
                ("Before", before()),
                ("After", Value::Units(vec!["berth-0a1.scope".to_owned()])),
            ]
        );
        for (grace, microseconds) in [(Duration::ZERO, 1_000_000), (Duration::MAX, u64::MAX)] {
            let ending = Ending { signal: 9, grace, before: None };
            assert_eq!(
                of_ending(&ending, None)[1..],
                [number("TimeoutStopUSec", microseconds), ("Before", before())]
            );
        }
    }

    #[test]
    fn the_last_of_several_values_counts() {
        let files = [("memory.max", "1"), ("pids.max", "5"), ("memory.max", "2")];
        assert_eq!(of_files(files.into_iter(), None), [number("TasksMax", 5), number("MemoryMax", 2)]);
    }
}
