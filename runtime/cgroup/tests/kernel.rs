//! The crate against the kernel of this machine: needs root, and works on cgroup v1 and v2.
//!
//! Each test has its own parent cgroup, `/berth-test-<pid>-<n>`, which goes away with everything in
//! it when the test ends, also by a panic. Processes are shells that put themselves into the
//! cgroup.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use berth_cgroup::{
    Ceiling, Cgroup, Detail, DevicePolicy, Driver, Error, Hierarchy, HugepageLimit, Limits, Note, Parent,
    create_parent, default_devices, leftovers, parse_oom_kills,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// A parent of the test's own.
struct Place {
    hierarchy: Hierarchy,
    parent: Parent,
}

impl Place {
    fn new() -> Self {
        Self::on(Hierarchy::detect().unwrap())
    }

    fn on(hierarchy: Hierarchy) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("/berth-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self { hierarchy, parent: Parent::default_of_daemon(Driver::Cgroupfs, &name).unwrap() }
    }

    fn create(&self, id: &str) -> Cgroup {
        Cgroup::create(&self.hierarchy, &self.parent, id).unwrap()
    }

    fn is_unified(&self) -> bool {
        self.hierarchy.is_unified()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for id in leftovers(&self.hierarchy, &self.parent).unwrap() {
            let cgroup = Cgroup::open(&self.hierarchy, &self.parent, &id).unwrap();
            cgroup.kill(PATIENCE).unwrap();
            cgroup.remove(PATIENCE).unwrap();
        }
        let root = Parent::named(Driver::Cgroupfs, "/").unwrap();
        let parent =
            Cgroup::open(&self.hierarchy, &root, self.parent.path().trim_start_matches('/')).unwrap();
        parent.remove(PATIENCE).unwrap();
    }
}

/// A shell that joins the cgroup as a container's first process does, then runs `script`.
struct Shell {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Shell {
    fn start(cgroup: &Cgroup, script: &str) -> Self {
        let mut files = cgroup.join_files();
        files.extend(cgroup.unified_dir().map(|dir| dir.join("cgroup.procs")));
        assert!(!files.is_empty());
        let mut child = Command::new("/bin/sh")
            .args(["-c", &format!("for file; do echo 0 >\"$file\" || exit 99; done; {script}"), "sh"])
            .args(&files)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdin, stdout }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    fn end(mut self) -> ExitStatus {
        drop(self.stdin);
        self.child.wait().unwrap()
    }
}

fn file_of(cgroup: &Cgroup, name: &str) -> PathBuf {
    cgroup
        .directories()
        .map(|dir| dir.join(name))
        .find(|file| file.exists())
        .unwrap_or_else(|| panic!("no {name}"))
}

fn value_of(cgroup: &Cgroup, name: &str) -> String {
    fs::read_to_string(file_of(cgroup, name)).unwrap().trim_end().to_owned()
}

fn oom_kills(cgroup: &Cgroup) -> u64 {
    let source = cgroup.oom_source().unwrap();
    parse_oom_kills(&fs::read(source.file).unwrap(), source.key).unwrap()
}

fn memory(bytes: u64) -> Limits {
    Limits { memory_limit_bytes: Some(Ceiling::At(bytes)), ..Limits::default() }
}

#[test]
fn a_process_over_its_memory_limit_is_killed_and_counted() {
    let place = Place::new();
    let cgroup = place.create("greedy");
    cgroup.apply(&memory(16 << 20)).unwrap();
    assert_eq!(oom_kills(&cgroup), 0);
    // tail keeps the last line, and /dev/zero has only one.
    let status = Shell::start(&cgroup, "exec tail /dev/zero").end();
    assert_eq!(status.signal(), Some(9));
    assert!(oom_kills(&cgroup) >= 1);
    assert_eq!(cgroup.stats(Detail::All).unwrap().unwrap().memory.unwrap().peak_bytes, Some(16 << 20));
}

#[test]
fn a_fork_over_the_pids_limit_is_refused() {
    let place = Place::new();
    let cgroup = place.create("forky");
    cgroup.apply(&Limits { pids_limit: Some(Ceiling::At(1)), ..Limits::default() }).unwrap();
    assert_eq!(Shell::start(&cgroup, "/bin/true; echo forked").end().code(), Some(2), "dash exits with 2");
    cgroup.update(&Limits { pids_limit: Some(Ceiling::At(2)), ..Limits::default() }).unwrap();
    let mut shell = Shell::start(&cgroup, "/bin/true; echo forked");
    assert_eq!(shell.line(), "forked");
    assert!(shell.end().success());
}

#[test]
fn limits_are_in_the_kernels_files_and_can_be_changed() {
    let place = Place::new();
    let cgroup = place.create("limited");
    let hugepages =
        ["2MB", "1GB", "64MB"].map(|size| HugepageLimit { page_size: size.into(), limit_bytes: 0 }).to_vec();
    let limits = Limits {
        cpu_shares: Some(512),
        cpu_quota_us: Some(Ceiling::At(20_000)),
        cpu_period_us: Some(50_000),
        memory_limit_bytes: Some(Ceiling::At(64 << 20)),
        pids_limit: Some(Ceiling::At(77)),
        cpuset_cpus: "0".into(),
        hugepages,
        ..Limits::default()
    };
    let notes = cgroup.apply(&limits).unwrap();
    assert!(notes.iter().all(|note| *note == Note::NoSwapAccounting));
    let check = |expected: &[(&str, &str)]| {
        for (file, value) in expected {
            assert_eq!(value_of(&cgroup, file), *value, "{file}");
        }
    };
    if place.is_unified() {
        check(&[("cpu.weight", "59"), ("cpu.max", "20000 50000"), ("memory.max", "67108864")]);
    } else {
        check(&[("cpu.shares", "512"), ("cpu.cfs_quota_us", "20000"), ("cpu.cfs_period_us", "50000")]);
        check(&[("memory.limit_in_bytes", "67108864"), ("memory.memsw.limit_in_bytes", "67108864")]);
    }
    check(&[("pids.max", "77"), ("cpuset.cpus", "0")]);

    // Up, down, and away, with memory and swap moving together.
    for (bytes, text) in [(128 << 20, "134217728"), (32 << 20, "33554432")] {
        cgroup.update(&memory(bytes)).unwrap();
        if place.is_unified() {
            check(&[("memory.max", text), ("cpu.max", "20000 50000")]);
        } else {
            check(&[
                ("memory.limit_in_bytes", text),
                ("memory.memsw.limit_in_bytes", text),
                ("cpu.shares", "512"),
            ]);
        }
    }
    cgroup
        .update(&Limits {
            memory_limit_bytes: Some(Ceiling::Unlimited),
            cpu_quota_us: Some(Ceiling::Unlimited),
            ..Limits::default()
        })
        .unwrap();
    assert_eq!(cgroup.stats(Detail::All).unwrap().unwrap().memory.unwrap().limit_bytes, None);
    if place.is_unified() {
        check(&[("cpu.max", "max 50000")]);
    } else {
        check(&[("cpu.cfs_quota_us", "-1")]);
    }
}

#[test]
fn a_cpu_quota_holds() {
    let place = Place::new();
    let cgroup = place.create("slow");
    let quota =
        Limits { cpu_quota_us: Some(Ceiling::At(10_000)), cpu_period_us: Some(100_000), ..Limits::default() };
    cgroup.apply(&quota).unwrap();
    let mut shell = Shell::start(&cgroup, "echo in; while :; do :; done");
    assert_eq!(shell.line(), "in");
    let throttled = || cgroup.stats(Detail::All).unwrap().unwrap().cpu.unwrap().throttled_periods.unwrap();
    let until = Instant::now() + PATIENCE;
    while throttled() < 3 {
        assert!(Instant::now() < until, "never throttled");
        std::thread::sleep(Duration::from_millis(20));
    }
    cgroup.kill(PATIENCE).unwrap();
    assert_eq!(shell.end().signal(), Some(9));
}

#[test]
fn a_refused_update_leaves_the_earlier_limits_and_the_process_alive() {
    let place = Place::new();
    let cgroup = place.create("full");
    cgroup.apply(&Limits { pids_limit: Some(Ceiling::At(50)), ..memory(128 << 20) }).unwrap();
    let mut shell = Shell::start(
        &cgroup,
        "x=$(head -c 40000000 /dev/zero | tr '\\0' x); echo full; read line; echo ${#x}",
    );
    assert_eq!(shell.line(), "full");
    let stats = cgroup.stats(Detail::All).unwrap().unwrap();
    let used = stats.memory.unwrap();
    assert!(used.rss_bytes.unwrap() >= 40_000_000, "{used:?}");
    assert_eq!(used.limit_bytes, Some(128 << 20));
    assert!(used.working_set_bytes <= used.usage_bytes);
    assert_eq!(stats.pids, Some(1));
    assert!(stats.cpu.unwrap().usage_ns > 0);

    let lower = Limits { cpu_shares: Some(100), pids_limit: Some(Ceiling::At(9)), ..memory(8 << 20) };
    let error = cgroup.update(&lower).unwrap_err();
    assert!(matches!(error, Error::Write { .. } | Error::LimitBelowUsage { .. }), "{error}");
    assert_eq!(cgroup.stats(Detail::All).unwrap().unwrap().memory.unwrap().limit_bytes, Some(128 << 20));
    assert_eq!(value_of(&cgroup, "pids.max"), "50");
    let shares = if place.is_unified() { ("cpu.weight", "100") } else { ("cpu.shares", "1024") };
    assert_eq!(value_of(&cgroup, shares.0), shares.1);
    assert_eq!(oom_kills(&cgroup), 0);
    shell.say("");
    assert_eq!(shell.line(), "40000000");
    assert!(shell.end().success());
}

#[test]
fn a_child_quota_and_period_move_together_under_a_parents_quota() {
    let place = Place::new();
    let above = place.create("pod");
    let limit = |quota, period| Limits {
        cpu_quota_us: Some(Ceiling::At(quota)),
        cpu_period_us: Some(period),
        ..Limits::default()
    };
    above.apply(&limit(50_000, 100_000)).unwrap();
    let parent = Parent::named(Driver::Cgroupfs, above.path()).unwrap();
    let cgroup = Cgroup::create(&place.hierarchy, &parent, "c").unwrap();
    cgroup.apply(&limit(50_000, 100_000)).unwrap();
    // The period alone would make the ratio 5.0, above the parent's 0.5: quota and period have to
    // change places.
    cgroup.update(&limit(5_000, 10_000)).unwrap();
    cgroup.update(&limit(40_000, 80_000)).unwrap();
    cgroup.remove(PATIENCE).unwrap();
}

#[test]
fn a_tree_that_keeps_forking_is_killed_to_the_last() {
    let place = Place::new();
    let cgroup = place.create("bomb");
    cgroup.apply(&Limits { pids_limit: Some(Ceiling::At(300)), ..Limits::default() }).unwrap();
    // Every process is followed by another before it ends, in its own session.
    let mut shell = Shell::start(
        &cgroup,
        "trap '' TERM INT HUP; \
         spread() { while :; do setsid sleep 0.02 & sleep 0.01; (sleep 0.01; setsid sleep 30) & done; }; \
         spread & spread & echo on; wait",
    );
    assert_eq!(shell.line(), "on");
    let until = Instant::now() + PATIENCE;
    while cgroup.processes().unwrap().len() < 20 {
        assert!(Instant::now() < until, "it does not fork");
        std::thread::sleep(Duration::from_millis(5));
    }
    cgroup.kill(PATIENCE).unwrap();
    assert!(cgroup.is_empty().unwrap());
    assert_eq!(shell.end().signal(), Some(9));
    cgroup.remove(PATIENCE).unwrap();
    assert_eq!(cgroup.directories().filter(|dir| dir.exists()).count(), 0);
}

#[test]
fn sub_cgroups_that_the_container_made_are_killed_and_removed_too() {
    let place = Place::new();
    let cgroup = place.create("nested");
    // As a privileged container may do it: in one hierarchy only.
    let inner = cgroup.directories().last().unwrap().join("a/b");
    fs::create_dir_all(&inner).unwrap();
    let join = inner.join("cgroup.procs");
    let mut shell = Shell::start(&cgroup, &format!("echo 0 >'{}'; echo in; exec sleep 100", join.display()));
    assert_eq!(shell.line(), "in");
    assert!(!cgroup.is_empty().unwrap());
    assert!(matches!(cgroup.remove(Duration::from_millis(20)), Err(Error::Remove { .. })));
    cgroup.kill(PATIENCE).unwrap();
    assert_eq!(shell.end().signal(), Some(9));
    cgroup.remove(PATIENCE).unwrap();
    assert!(!inner.exists());
    cgroup.remove(PATIENCE).unwrap();
    cgroup.kill(PATIENCE).unwrap();
    assert_eq!(cgroup.stats(Detail::All).unwrap(), None);
}

#[test]
fn what_is_planned_is_what_is_made() {
    let place = Place::new();
    let directories =
        |cgroup: &Cgroup| cgroup.directories().map(Path::to_path_buf).collect::<BTreeSet<PathBuf>>();
    let planned = Cgroup::planned(&place.hierarchy, &place.parent, "one").unwrap();
    assert!(!planned.is_there());
    let made = place.create("one");
    assert_eq!((planned.path(), directories(&planned)), (made.path(), directories(&made)));
    assert!(matches!(
        Cgroup::planned(&place.hierarchy, &place.parent, "../one"),
        Err(Error::InvalidId { .. })
    ));
    // A parent that its owner has made in the hierarchies with limits only.
    let Hierarchy::Legacy { mounts } = &place.hierarchy else { return };
    let named = Parent::named(Driver::Cgroupfs, &format!("{}/named", place.parent.path())).unwrap();
    let parents: Vec<PathBuf> = mounts
        .iter()
        .filter(|mount| !mount.controllers.iter().any(|name| name.starts_with("name=")))
        .map(|mount| mount.path.join(named.path().trim_start_matches('/')))
        .collect();
    for parent in &parents {
        fs::create_dir(parent).unwrap();
    }
    for file in ["cpuset.cpus", "cpuset.mems"] {
        for parent in parents.iter().filter(|parent| parent.join(file).exists()) {
            let above = fs::read(parent.parent().unwrap().join(file)).unwrap();
            fs::write(parent.join(file), above).unwrap();
        }
    }
    let planned = Cgroup::planned(&place.hierarchy, &named, "two").unwrap();
    let made = Cgroup::create(&place.hierarchy, &named, "two").unwrap();
    let both = (directories(&planned), directories(&made));
    made.remove(PATIENCE).unwrap();
    assert_eq!(both.0, both.1);
}

#[test]
fn a_parent_that_does_not_exist_is_named_and_not_made() {
    let place = Place::new();
    let missing = format!("{}/no/such", place.parent.path());
    let error = Cgroup::create(&place.hierarchy, &Parent::named(Driver::Cgroupfs, &missing).unwrap(), "c")
        .unwrap_err();
    assert!(
        matches!(&error, Error::ParentMissing { path } if path.ends_with(missing.trim_start_matches('/'))),
        "{error}"
    );
    assert!(leftovers(&place.hierarchy, &place.parent).unwrap().is_empty());
}

#[test]
fn a_named_parent_is_created_when_asked_for() {
    let place = Place::new();
    let parent = Parent::named(Driver::Cgroupfs, &format!("{}/new/pod", place.parent.path())).unwrap();
    create_parent(&place.hierarchy, &parent).unwrap();
    create_parent(&place.hierarchy, &parent).unwrap();
    let cgroup = Cgroup::create(&place.hierarchy, &parent, "c").unwrap();
    let limits = Limits { memory_limit_bytes: Some(Ceiling::At(64 << 20)), ..Limits::default() };
    assert!(cgroup.apply(&limits).unwrap().is_empty());
    cgroup.remove(PATIENCE).unwrap();
}

#[test]
fn leftovers_are_what_was_created_and_not_removed() {
    let place = Place::new();
    let (a, b) = (place.create("a"), place.create("b"));
    assert!(matches!(Cgroup::create(&place.hierarchy, &place.parent, "a"), Err(Error::AlreadyExists { .. })));
    a.remove(PATIENCE).unwrap();
    assert_eq!(leftovers(&place.hierarchy, &place.parent).unwrap().into_iter().collect::<Vec<_>>(), ["b"]);
    b.remove(PATIENCE).unwrap();
    assert!(leftovers(&place.hierarchy, &place.parent).unwrap().is_empty());
}

/// Opens /dev/null, then a node of the same test for /dev/kmsg (1:11), which no container may open,
/// then makes a node.
fn devices_are_kept(cgroup: &Cgroup) {
    // Nodes there do open: systemd mounts /tmp with nodev, where everything would be refused.
    let dir = tempfile::tempdir_in("/dev").unwrap();
    let node = dir.path().join("kmsg");
    let made = Command::new("mknod").arg(&node).args(["c", "1", "11"]).status().unwrap();
    assert!(made.success());
    let script = format!(
        "(: </dev/null) && echo null; (: <'{node}') && echo kmsg || echo refused; \
         mknod '{node}2' c 1 12 && echo made; read again; (: <'{node}') && echo kmsg || echo refused; read end",
        node = node.display()
    );
    cgroup.set_devices(&DevicePolicy::Only(default_devices())).unwrap();
    let mut shell = Shell::start(cgroup, &script);
    assert_eq!([shell.line(), shell.line(), shell.line()], ["null", "refused", "made"]);
    cgroup.set_devices(&DevicePolicy::All).unwrap();
    shell.say("again");
    assert_eq!(shell.line(), "kmsg");
    shell.end();
}

#[test]
fn only_listed_devices_open() {
    let place = Place::new();
    devices_are_kept(&place.create("devices"));
}

/// The v2 mount of this machine, which on a hybrid one has no controllers but takes device filters
/// all the same.
fn unified_mount() -> PathBuf {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .expect("cgroup v2 is mounted on this machine");
    Path::new(line.split(' ').nth(4).unwrap()).to_path_buf()
}

/// Made by hand at the top, so that the root's own settings stay as they are.
fn unified_place() -> Place {
    let place = Place::on(Hierarchy::Unified { mount: unified_mount() });
    fs::create_dir(unified_mount().join(place.parent.path().trim_start_matches('/'))).unwrap();
    place
}

#[test]
fn v2_device_programs_decide_as_v1_does() {
    let place = unified_place();
    let named = Parent::named(Driver::Cgroupfs, place.parent.path()).unwrap();
    devices_are_kept(&Cgroup::create(&place.hierarchy, &named, "devices").unwrap());
}

#[test]
fn v2_kill_reaches_sub_cgroups() {
    let place = unified_place();
    let named = Parent::named(Driver::Cgroupfs, place.parent.path()).unwrap();
    let cgroup = Cgroup::create(&place.hierarchy, &named, "c").unwrap();
    let inner = cgroup.unified_dir().unwrap().join("inner");
    fs::create_dir(&inner).unwrap();
    let mut shell = Shell::start(
        &cgroup,
        &format!("sleep 100 & echo 0 >'{}'; echo in; exec sleep 100", inner.join("cgroup.procs").display()),
    );
    assert_eq!(shell.line(), "in");
    assert_eq!(cgroup.processes().unwrap().len(), 2);
    cgroup.kill(PATIENCE).unwrap();
    assert!(cgroup.is_empty().unwrap());
    assert_eq!(shell.end().signal(), Some(9));
    cgroup.remove(PATIENCE).unwrap();
    assert!(!inner.exists());
}
