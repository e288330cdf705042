//! What a cgroup uses: the numbers behind CRI's `ContainerStats` and `LinuxPodSandboxStats`.
//!
//! All files are read on each call and nothing is cached; the caller computes rates from two
//! samples. What the kernel does not offer is absent, never zero.

use std::path::Path;

use berth_sys::errno::EOPNOTSUPP;

use crate::cgroup::Place;
use crate::{Cgroup, Error, Files, Hierarchy, Parent, control_file, parse_oom_kills};

/// Devices whose reads and writes are reported. A cgroup has a line for each that it ever used; a
/// node with more disks than this gets its figures elsewhere.
const MAX_DEVICES: usize = 64;

/// One sample.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// Processor time.
    pub cpu: Option<CpuStats>,
    /// Memory.
    pub memory: Option<MemoryStats>,
    /// Swap.
    pub swap: Option<SwapStats>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// The maximum number, nothing without a limit; with [`Detail::All`].
    pub pids_limit: Option<u64>,
    /// Reads and writes by device, at most 64 of them; with [`Detail::All`]. On v1 only where the
    /// blkio hierarchy has the cgroup too.
    pub io: Vec<DeviceIo>,
    /// Time lost waiting for reads and writes: `io.pressure`, v2 only.
    pub io_pressure: Option<Pressure>,
}

/// Processor time since the cgroup was made.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CpuStats {
    /// All of it, ns.
    pub usage_ns: u64,
    /// In user mode, ns; with [`Detail::All`].
    pub user_ns: Option<u64>,
    /// In the kernel, ns; with [`Detail::All`].
    pub system_ns: Option<u64>,
    /// Periods that have passed, where there is a quota; with [`Detail::All`].
    pub periods: Option<u64>,
    /// Of these, the ones in which the quota was used up; with [`Detail::All`].
    pub throttled_periods: Option<u64>,
    /// Time spent waiting for the next period, ns; with [`Detail::All`].
    pub throttled_ns: Option<u64>,
    /// `cpu.pressure`, v2 only.
    pub pressure: Option<Pressure>,
}

/// Memory now, in bytes, and faults since the cgroup was made.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemoryStats {
    /// All that is charged, page cache too.
    pub usage_bytes: u64,
    /// Usage less the inactive page cache, which is what kubelet evicts by; not below 0.
    pub working_set_bytes: u64,
    /// Limit less working set, not below 0; nothing without a limit.
    pub available_bytes: Option<u64>,
    /// The limit.
    pub limit_bytes: Option<u64>,
    /// The most that was charged; with [`Detail::All`].
    pub peak_bytes: Option<u64>,
    /// Anonymous memory.
    pub rss_bytes: Option<u64>,
    /// Page cache.
    pub cache_bytes: Option<u64>,
    /// Files mapped.
    pub mapped_file_bytes: Option<u64>,
    /// Memory of the kernel; with [`Detail::All`].
    pub kernel_bytes: Option<u64>,
    /// Page faults.
    pub page_faults: Option<u64>,
    /// Of these, the ones that had to read.
    pub major_page_faults: Option<u64>,
    /// How often the limit was hit; with [`Detail::All`]. On v1 newer kernels (6.18 for one) leave
    /// it at 0.
    pub limit_hits: Option<u64>,
    /// Processes killed for memory; with [`Detail::All`]. On v1 those below the cgroup are not
    /// counted.
    pub oom_kills: Option<u64>,
    /// `memory.pressure`, v2 only.
    pub pressure: Option<Pressure>,
}

/// Swap now, in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SwapStats {
    /// In use.
    pub usage_bytes: u64,
    /// Limit less usage; nothing without a limit.
    pub available_bytes: Option<u64>,
}

/// What went to and from one block device since the cgroup was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// Its major number.
    pub major: u32,
    /// Its minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Pressure stall information: Documentation/accounting/psi.rst.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// At least one task waited.
    pub some: PressureLine,
    /// All tasks waited.
    pub full: PressureLine,
}

/// One line of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PressureLine {
    /// Percent of the last 10 s.
    pub avg10: f64,
    /// Percent of the last 60 s.
    pub avg60: f64,
    /// Percent of the last 300 s.
    pub avg300: f64,
    /// In all, ns (the kernel writes µs).
    pub total_ns: u64,
}

/// How much detail a sample has. Each control file costs about 10 µs, and some calls take samples
/// of a hundred containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// What CRI's `ContainerStats` has.
    Essential,
    /// Also the fields that say "with [`Detail::All`]".
    All,
}

/// A sample of a parent, with all that is below it: a pod's, when the parent is one pod's. `None`
/// when it does not exist.
///
/// # Errors
/// [`Error::Read`] and [`Error::Malformed`] with the file.
pub fn stats_of_parent(
    hierarchy: &Hierarchy,
    parent: &Parent,
    detail: Detail,
) -> Result<Option<Stats>, Error> {
    Cgroup::of_parent(hierarchy, parent).stats(detail)
}

impl Cgroup {
    /// Takes a sample. `None` when the cgroup does not exist, as for a container that ends during a
    /// list.
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Malformed`] with the file.
    pub fn stats(&self, detail: Detail) -> Result<Option<Stats>, Error> {
        let stats = match &self.place {
            Place::Unified(dir) => unified(self.files.as_ref(), dir, detail)?,
            Place::Legacy(_) => self.legacy(detail)?,
        };
        Ok(Some(stats).filter(|stats| *stats != Stats::default()))
    }

    fn legacy(&self, detail: Detail) -> Result<Stats, Error> {
        let number = |controller: &str, file: &str| match self.dir_of(controller) {
            Some(dir) => self.read_number(&dir.join(file)),
            None => Ok(None),
        };
        let bytes = |controller: &str, file: &str| match self.dir_of(controller) {
            Some(dir) => self.read_if_there(&dir.join(file)),
            None => Ok(None),
        };
        let mut cpu =
            number("cpuacct", "cpuacct.usage")?.map(|usage_ns| CpuStats { usage_ns, ..CpuStats::default() });
        let mut memory = None;
        let mut swap = None;
        if let Some(usage_bytes) = number("memory", "memory.usage_in_bytes")? {
            let stat = bytes("memory", "memory.stat")?.unwrap_or_default();
            let limit_bytes =
                number("memory", "memory.limit_in_bytes")?.filter(|&limit| limit < V1_UNLIMITED);
            memory = Some(memory_stats(usage_bytes, limit_bytes, &stat, &LEGACY_KEYS));
            let both = number("memory", "memory.memsw.limit_in_bytes")?;
            swap = control_file::keyed(&stat, "total_swap").map(|usage_bytes| SwapStats {
                usage_bytes,
                available_bytes: both
                    .filter(|&limit| limit < V1_UNLIMITED)
                    .map(|both| both.saturating_sub(limit_bytes.unwrap_or(0)).saturating_sub(usage_bytes)),
            });
        }
        if detail == Detail::All {
            if let Some(cpu) = &mut cpu {
                let throttling = bytes("cpu", "cpu.stat")?.unwrap_or_default();
                cpu.user_ns = number("cpuacct", "cpuacct.usage_user")?;
                cpu.system_ns = number("cpuacct", "cpuacct.usage_sys")?;
                cpu.periods = control_file::keyed(&throttling, "nr_periods");
                cpu.throttled_periods = control_file::keyed(&throttling, "nr_throttled");
                cpu.throttled_ns = control_file::keyed(&throttling, "throttled_time");
            }
            if let Some(memory) = &mut memory {
                memory.peak_bytes = number("memory", "memory.max_usage_in_bytes")?;
                memory.kernel_bytes = number("memory", "memory.kmem.usage_in_bytes")?;
                memory.limit_hits = number("memory", "memory.failcnt")?;
                memory.oom_kills = self.oom_kills()?;
            }
        }
        let mut stats =
            Stats { cpu, memory, swap, pids: number("pids", "pids.current")?, ..Stats::default() };
        if detail == Detail::All {
            stats.pids_limit = number("pids", "pids.max")?;
            let served = bytes("blkio", "blkio.throttle.io_service_bytes_recursive")?.unwrap_or_default();
            let counted = bytes("blkio", "blkio.throttle.io_serviced_recursive")?.unwrap_or_default();
            stats.io = legacy_io(&served, &counted);
        }
        Ok(stats)
    }

    fn oom_kills(&self) -> Result<Option<u64>, Error> {
        let Some(source) = self.oom_source() else { return Ok(None) };
        let bytes = self.read_if_there(&source.file)?.unwrap_or_default();
        Ok(parse_oom_kills(&bytes, source.key))
    }
}

/// v1 shows "no limit" as the largest number of whole pages in a signed 64-bit number; with pages
/// of any size that is above this.
const V1_UNLIMITED: u64 = 0x7fff_ffff_0000_0000;

fn unified(files: &dyn Files, dir: &Path, detail: Detail) -> Result<Stats, Error> {
    let number = |file: &str| control_file::read_number(files, &dir.join(file));
    let cpu = match control_file::read_if_there(files, &dir.join("cpu.stat"))? {
        Some(stat) => {
            let ns = |key| control_file::keyed(&stat, key).map(|us| us.saturating_mul(1000));
            let usage_ns = ns("usage_usec")
                .ok_or_else(|| Error::Malformed { path: dir.join("cpu.stat"), expected: "usage_usec" })?;
            Some(CpuStats {
                usage_ns,
                user_ns: ns("user_usec"),
                system_ns: ns("system_usec"),
                periods: control_file::keyed(&stat, "nr_periods"),
                throttled_periods: control_file::keyed(&stat, "nr_throttled"),
                throttled_ns: ns("throttled_usec"),
                pressure: pressure(files, dir, "cpu.pressure")?,
            })
        }
        None => None,
    };
    let mut memory = None;
    let mut swap = None;
    if let Some(usage_bytes) = number("memory.current")? {
        let stat = control_file::read_if_there(files, &dir.join("memory.stat"))?.unwrap_or_default();
        let (mut peak_bytes, mut limit_hits, mut oom_kills) = (None, None, None);
        if detail == Detail::All {
            peak_bytes = number("memory.peak")?;
            let events = control_file::read_if_there(files, &dir.join("memory.events"))?.unwrap_or_default();
            limit_hits = control_file::keyed(&events, "max");
            oom_kills = parse_oom_kills(&events, "oom_kill");
        }
        memory = Some(MemoryStats {
            peak_bytes,
            kernel_bytes: control_file::keyed(&stat, "kernel"),
            limit_hits,
            oom_kills,
            pressure: pressure(files, dir, "memory.pressure")?,
            ..memory_stats(usage_bytes, number("memory.max")?, &stat, &UNIFIED_KEYS)
        });
        if let Some(usage_bytes) = number("memory.swap.current")? {
            let limit = number("memory.swap.max")?;
            swap = Some(SwapStats {
                usage_bytes,
                available_bytes: limit.map(|limit| limit.saturating_sub(usage_bytes)),
            });
        }
    }
    let io_pressure = pressure(files, dir, "io.pressure")?;
    let (mut pids_limit, mut io) = (None, Vec::new());
    if detail == Detail::All {
        pids_limit = number("pids.max")?;
        io = unified_io(&control_file::read_if_there(files, &dir.join("io.stat"))?.unwrap_or_default());
    }
    Ok(Stats { cpu, memory, swap, pids: number("pids.current")?, pids_limit, io, io_pressure })
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`: Documentation/admin-guide/cgroup-v2.rst,
/// `io.stat`.
fn unified_io(bytes: &[u8]) -> Vec<DeviceIo> {
    let text = String::from_utf8_lossy(bytes);
    let read = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = device(words.next()?)?;
        let mut io = DeviceIo { major, minor, ..DeviceIo::default() };
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let Some(value) = control_file::number(value.as_bytes()) else { continue };
            match name {
                "rbytes" => io.read_bytes = value,
                "wbytes" => io.write_bytes = value,
                "rios" => io.reads = value,
                "wios" => io.writes = value,
                _ => {}
            }
        }
        Some(io)
    };
    text.lines().filter_map(read).take(MAX_DEVICES).collect()
}

/// `8:0 Read 4096`, one line for each kind, once in bytes and once in requests:
/// Documentation/admin-guide/cgroup-v1/blkio-controller.rst.
fn legacy_io(bytes: &[u8], requests: &[u8]) -> Vec<DeviceIo> {
    let mut devices: Vec<DeviceIo> = Vec::new();
    for (is_bytes, file) in [(true, bytes), (false, requests)] {
        for line in String::from_utf8_lossy(file).lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(name), Some(kind), Some(value)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let (Some((major, minor)), Some(value)) = (device(name), control_file::number(value.as_bytes()))
            else {
                continue;
            };
            let known = devices.iter().position(|io| (io.major, io.minor) == (major, minor));
            let known = known.unwrap_or_else(|| {
                devices.push(DeviceIo { major, minor, ..DeviceIo::default() });
                devices.len() - 1
            });
            let Some(io) = devices.get_mut(known) else { continue };
            match (is_bytes, kind) {
                (true, "Read") => io.read_bytes = value,
                (true, "Write") => io.write_bytes = value,
                (false, "Read") => io.reads = value,
                (false, "Write") => io.writes = value,
                _ => {}
            }
        }
    }
    devices.truncate(MAX_DEVICES);
    devices
}

/// `8:0`
fn device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The names of the same things in `memory.stat`. v1's `total_` ones count sub-cgroups in, as v2
/// always does.
struct Keys {
    inactive_file: &'static str,
    anonymous: &'static str,
    cache: &'static str,
    mapped: &'static str,
    faults: &'static str,
    major_faults: &'static str,
}

const LEGACY_KEYS: Keys = Keys {
    inactive_file: "total_inactive_file",
    anonymous: "total_rss",
    cache: "total_cache",
    mapped: "total_mapped_file",
    faults: "total_pgfault",
    major_faults: "total_pgmajfault",
};

const UNIFIED_KEYS: Keys = Keys {
    inactive_file: "inactive_file",
    anonymous: "anon",
    cache: "file",
    mapped: "file_mapped",
    faults: "pgfault",
    major_faults: "pgmajfault",
};

fn memory_stats(usage_bytes: u64, limit_bytes: Option<u64>, stat: &[u8], keys: &Keys) -> MemoryStats {
    let get = |key| control_file::keyed(stat, key);
    let working_set_bytes = usage_bytes.saturating_sub(get(keys.inactive_file).unwrap_or(0));
    MemoryStats {
        usage_bytes,
        working_set_bytes,
        available_bytes: limit_bytes.map(|limit| limit.saturating_sub(working_set_bytes)),
        limit_bytes,
        rss_bytes: get(keys.anonymous),
        cache_bytes: get(keys.cache),
        mapped_file_bytes: get(keys.mapped),
        page_faults: get(keys.faults),
        major_page_faults: get(keys.major_faults),
        ..MemoryStats::default()
    }
}

/// A pressure file, or `None` where the kernel has none (`EOPNOTSUPP` when it is switched off,
/// psi=0).
fn pressure(files: &dyn Files, dir: &Path, file: &str) -> Result<Option<Pressure>, Error> {
    match control_file::read_bytes(files, &dir.join(file)) {
        Ok(bytes) => Ok(parse_pressure(&bytes)),
        Err(error) if control_file::is_gone(&error) || error.raw_os_error() == Some(EOPNOTSUPP) => Ok(None),
        Err(source) => Err(Error::Read { path: dir.join(file), source }),
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and `full …`, which older kernels leave out
/// for cpu.
fn parse_pressure(bytes: &[u8]) -> Option<Pressure> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut pressure = Pressure::default();
    let mut found = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let slot = match words.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        for word in words {
            let (name, value) = word.split_once('=')?;
            match name {
                "avg10" => slot.avg10 = value.parse().ok()?,
                "avg60" => slot.avg60 = value.parse().ok()?,
                "avg300" => slot.avg300 = value.parse().ok()?,
                "total" => slot.total_ns = control_file::number(value.as_bytes())?.saturating_mul(1000),
                _ => {}
            }
        }
        found = true;
    }
    found.then_some(pressure)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{Hierarchy, Parent};

    #[test]
    fn pressure_is_in_nanoseconds_and_percent() {
        let parsed = parse_pressure(
            b"some avg10=1.50 avg60=0.25 avg300=0.00 total=7\nfull avg10=0.10 avg60=0.00 avg300=0.00 total=3\n",
        )
        .unwrap();
        assert_eq!(parsed.some, PressureLine { avg10: 1.5, avg60: 0.25, avg300: 0.0, total_ns: 7000 });
        assert_eq!(parsed.full.total_ns, 3000);
        for odd in [&b""[..], b"some", b"none avg10=1", b"some avg10=x", b"some avg10", b"\xff"] {
            let parsed = parse_pressure(odd);
            assert!(parsed.is_none() || parsed == Some(Pressure::default()), "{odd:?}");
        }
    }

    #[test]
    fn reads_and_writes_are_told_by_device() {
        let expected = vec![
            DeviceIo { major: 8, minor: 0, read_bytes: 1, write_bytes: 2, reads: 3, writes: 4 },
            DeviceIo { major: 254, minor: 16, read_bytes: 9, ..DeviceIo::default() },
        ];
        let unified = b"8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:16 rbytes=9\n";
        assert_eq!(unified_io(unified), expected);
        let bytes = b"8:0 Read 1\n8:0 Write 2\n8:0 Sync 7\n8:0 Total 3\n254:16 Read 9\nTotal 12\n";
        assert_eq!(legacy_io(bytes, b"8:0 Read 3\n8:0 Write 4\nTotal 7\n"), expected);
        for odd in [
            &b""[..],
            b"\n",
            b"8:0",
            b"8 rbytes=1",
            b"x:y rbytes=1",
            b"8:0 rbytes",
            b"\xff:\xff x",
            b"8:0 Read x",
        ] {
            assert!(unified_io(odd).iter().all(|io| io.read_bytes == 0), "{odd:?}");
            assert!(legacy_io(odd, odd).is_empty(), "{odd:?}");
        }
        let many: String = (0..1000).map(|minor| format!("8:{minor} rbytes=1\n")).collect();
        assert_eq!(unified_io(many.as_bytes()).len(), MAX_DEVICES);
    }

    #[test]
    fn a_working_set_is_never_negative() {
        let stats = memory_stats(100, Some(50), b"total_inactive_file 500\n", &LEGACY_KEYS);
        assert_eq!((stats.working_set_bytes, stats.available_bytes), (0, Some(50)));
        let stats = memory_stats(100, None, b"inactive_file 30\nanon 60\npgfault 5\n", &UNIFIED_KEYS);
        assert_eq!((stats.working_set_bytes, stats.available_bytes), (70, None));
        assert_eq!((stats.rss_bytes, stats.page_faults, stats.major_page_faults), (Some(60), Some(5), None));
    }

    #[test]
    fn v2_files_are_read_into_one_sample() {
        let root = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::Unified { mount: root.path().to_path_buf() };
        let cgroup =
            Cgroup::open(&hierarchy, &Parent::named(crate::Driver::Cgroupfs, "/").unwrap(), "c").unwrap();
        assert_eq!(cgroup.stats(Detail::All).unwrap(), None);
        let dir = root.path().join("c");
        fs::create_dir(&dir).unwrap();
        for (file, text) in [
            (
                "cpu.stat",
                "usage_usec 12\nuser_usec 7\nsystem_usec 5\nnr_periods 2\nnr_throttled 1\nthrottled_usec 3\n",
            ),
            ("memory.current", "1000\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 300\nfile 600\nkernel 100\ninactive_file 400\npgfault 9\npgmajfault 1\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 0\noom_kill 0\n"),
            ("memory.swap.current", "10\n"),
            ("memory.swap.max", "30\n"),
            ("pids.current", "3\n"),
            ("io.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"),
        ] {
            fs::write(dir.join(file), text).unwrap();
        }
        let stats = cgroup.stats(Detail::All).unwrap().unwrap();
        let cpu = stats.cpu.unwrap();
        assert_eq!((cpu.usage_ns, cpu.user_ns, cpu.throttled_ns), (12_000, Some(7000), Some(3000)));
        let memory = stats.memory.unwrap();
        assert_eq!((memory.usage_bytes, memory.working_set_bytes, memory.limit_bytes), (1000, 600, None));
        assert_eq!(
            (memory.rss_bytes, memory.kernel_bytes, memory.limit_hits),
            (Some(300), Some(100), Some(4))
        );
        assert_eq!(stats.swap.unwrap(), SwapStats { usage_bytes: 10, available_bytes: Some(20) });
        assert_eq!(stats.pids, Some(3));
        assert_eq!(stats.io_pressure.unwrap().some.total_ns, 1000);
        fs::write(dir.join("memory.current"), "many\n").unwrap();
        assert!(matches!(cgroup.stats(Detail::All), Err(Error::Malformed { .. })));
    }
}
