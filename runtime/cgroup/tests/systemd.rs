//! The systemd driver against the systemd of this machine: needs root, systemd as process 1, and
//! cgroup v2. Elsewhere each test counts itself as skipped, in the file that `BERTH_SKIPS` names
//! and in its output.
//!
//! Each test has its own slice; scopes are removed when the test ends, and the empty slice with
//! them.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use berth_cgroup::{
    Ceiling, Cgroup, DevicePolicy, Driver, Ending, Error, Hierarchy, Limits, Parent, Scope, Systemd,
    SystemdError, default_devices, leftovers, parse_oom_kills,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// How the scopes here end when systemd ends them.
const ENDING: Ending<'_> = Ending { signal: 3, grace: Duration::from_secs(7), before: Some("0ff") };

/// Held alone by tests that make systemd reload or re-execute itself: it writes the files of all
/// scopes then, which others look at.
static TURN: RwLock<()> = RwLock::new(());

#[expect(dead_code, reason = "held, not read")]
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// A slice of the test's own, on a machine that systemd runs.
struct Place {
    hierarchy: Hierarchy,
    systemd: Systemd,
    parent: Parent,
    slice: String,
    _turn: Turn,
}

impl Place {
    /// `None`, and counted, where there is no systemd.
    fn new(test: &str) -> Option<Self> {
        Self::with(test, || Turn::Shared(TURN.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// The same for a test beside which no other runs.
    fn alone(test: &str) -> Option<Self> {
        Self::with(test, || Turn::Alone(TURN.write().unwrap_or_else(PoisonError::into_inner)))
    }

    fn with(test: &str, turn: impl FnOnce() -> Turn) -> Option<Self> {
        let hierarchy = Hierarchy::detect().unwrap();
        if Driver::detect(&hierarchy) != Driver::Systemd {
            skip(test, "systemd on cgroup v2 is not process 1 here");
            return None;
        }
        // A name in two parts, so that the slice is in another one.
        let slice = format!("berthtest-{test}_{}.slice", std::process::id());
        let parent = Parent::default_of_daemon(Driver::Systemd, &slice).unwrap();
        Some(Self { hierarchy, systemd: Systemd::new().unwrap(), parent, slice, _turn: turn() })
    }

    fn make(&self, id: &str, limits: &Limits) -> (Cgroup, Process) {
        let holder = Process::new();
        let process = holder.0.id();
        let scope = Scope { process, limits, ending: ENDING };
        let cgroup = Cgroup::create_scope(&self.hierarchy, &self.systemd, &self.parent, id, &scope).unwrap();
        cgroup.apply(limits).unwrap();
        (cgroup, holder)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for id in leftovers(&self.hierarchy, &self.parent).unwrap_or_default() {
            let cgroup = Cgroup::open(&self.hierarchy, &self.parent, &id).unwrap();
            let cgroup = cgroup.with_systemd(Some(&self.systemd));
            let _ = cgroup.kill(PATIENCE);
            let _ = cgroup.remove(PATIENCE);
        }
        let _ = Command::new("systemctl").args(["stop", &self.slice]).output();
    }
}

/// A process that does nothing until it is dropped.
struct Process(Child);

impl Process {
    fn new() -> Self {
        Self(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn skip(test: &str, reason: &str) {
    eprintln!("skipped: systemd::{test}: {reason}");
    if let Some(path) = std::env::var_os("BERTH_SKIPS") {
        let mut file = fs::File::options().append(true).create(true).open(path).unwrap();
        // In one call: several tests write to it at once.
        file.write_all(format!("systemd::{test}: {reason}\n").as_bytes()).unwrap();
    }
}

fn systemctl(arguments: &[&str]) -> String {
    let output = Command::new("systemctl").args(arguments).output().unwrap();
    assert!(output.status.success(), "systemctl {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// A property of the scope of `id`, as systemd knows it.
fn property(id: &str, name: &str) -> String {
    systemctl(&["show", "--value", "--property", name, &format!("berth-{id}.scope")])
}

fn value_of(cgroup: &Cgroup, file: &str) -> String {
    fs::read_to_string(cgroup.unified_dir().unwrap().join(file)).unwrap().trim_end().to_owned()
}

fn soon(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn some_limits() -> Limits {
    Limits {
        cpu_shares: Some(512),
        cpu_quota_us: Some(Ceiling::At(12_345)),
        cpu_period_us: Some(50_000),
        memory_limit_bytes: Some(Ceiling::At(64 << 20)),
        memory_swap_limit_bytes: Some(Ceiling::At(80 << 20)),
        pids_limit: Some(Ceiling::At(50)),
        cpuset_cpus: "0".into(),
        unified: [("memory.high".to_owned(), "50331648".to_owned())].into(),
        ..Limits::default()
    }
}

const SOME_FILES: [(&str, &str); 6] = [
    ("cpu.max", "12345 50000"),
    ("memory.max", "67108864"),
    ("memory.high", "50331648"),
    ("pids.max", "50"),
    ("cpuset.cpus", "0"),
    ("cpu.weight", "59"),
];

#[test]
fn a_scope_has_its_limits_before_anything_but_the_holder_is_in_it() {
    let Some(place) = Place::new("limits") else { return };
    let (cgroup, holder) = place.make("0a1", &some_limits());
    assert_eq!(cgroup.path(), format!("/berthtest.slice/{}/berth-0a1.scope", place.slice));
    assert_eq!(value_of(&cgroup, "cgroup.procs"), holder.0.id().to_string());
    for (file, value) in SOME_FILES {
        assert_eq!(value_of(&cgroup, file), value, "{file}");
    }
    // systemd keeps whole percents: 24.69 becomes 25.
    for (name, value) in [
        ("CPUQuotaPerSecUSec", "250ms"),
        ("MemoryMax", "67108864"),
        ("MemorySwapMax", "16777216"),
        ("MemoryHigh", "50331648"),
        ("TasksMax", "50"),
        ("AllowedCPUs", "0"),
        ("CPUWeight", "59"),
        ("Delegate", "yes"),
        ("DefaultDependencies", "no"),
        ("Slice", &place.slice),
        ("CollectMode", "inactive-or-failed"),
        ("KillSignal", "3"),
        ("TimeoutStopUSec", "7s"),
    ] {
        assert_eq!(property("0a1", name), value, "{name}");
    }
    for (name, unit) in [("Before", "kubelet.service"), ("After", "berth-0ff.scope")] {
        assert!(
            property("0a1", name).split(' ').any(|other| other == unit),
            "{name}: {}",
            property("0a1", name)
        );
    }
}

/// The numbers of the disk that the root is on, if that is a whole one: the kernel limits no
/// partitions.
fn root_disk() -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let device = table.lines().find_map(|line| {
        let mut words = line.split(' ');
        let device = words.nth(2)?;
        (words.nth(1) == Some("/")).then(|| device.to_owned())
    })?;
    let is_partition = fs::exists(format!("/sys/dev/block/{device}/partition")).unwrap();
    (fs::exists(format!("/dev/block/{device}")).unwrap() && !is_partition).then_some(device)
}

#[test]
fn limits_of_a_disk_are_systemds_too_and_survive_its_reexecution() {
    let Some(place) = Place::alone("disk") else { return };
    let Some(disk) = root_disk() else { return skip("disk", "the root is on no whole disk") };
    let io = |limits: &str| Limits {
        unified: [("io.max".to_owned(), format!("{disk} {limits}"))].into(),
        ..Limits::default()
    };
    let (cgroup, _holder) = place.make("0ab", &io("rbps=1048576 wiops=120"));
    let line = |limits: &str| format!("{disk} {limits}");
    assert_eq!(value_of(&cgroup, "io.max"), line("rbps=1048576 wbps=max riops=max wiops=120"));
    for (name, value) in [("IOReadBandwidthMax", "1048576"), ("IOWriteIOPSMax", "120")] {
        assert_eq!(property("0ab", name), format!("/dev/block/{disk} {value}"), "{name}");
    }
    cgroup.update(&io("rbps=2097152")).unwrap();
    systemctl(&["daemon-reexec"]);
    assert_eq!(value_of(&cgroup, "io.max"), line("rbps=2097152 wbps=max riops=max wiops=120"));
    assert_eq!(property("0ab", "IOReadBandwidthMax"), format!("/dev/block/{disk} 2097152"));
}

#[test]
fn a_scope_without_limits_has_none_of_systemds_defaults() {
    let Some(place) = Place::new("defaults") else { return };
    let (cgroup, _holder) = place.make("0a2", &Limits::default());
    for (file, value) in [("pids.max", "max"), ("memory.max", "max"), ("cpu.max", "max 100000")] {
        assert_eq!(value_of(&cgroup, file), value, "{file}");
    }
}

#[test]
fn limits_and_devices_survive_a_daemon_reload_and_a_daemon_reexec() {
    let Some(place) = Place::alone("reload") else { return };
    let (cgroup, holder) = place.make("0a3", &some_limits());
    cgroup.set_devices(&DevicePolicy::Only(default_devices())).unwrap();
    let dir = cgroup.unified_dir().unwrap();
    let opens = |path: &str| {
        let script = format!("echo 0 >{}/cgroup.procs && exec head -c 1 {path}", dir.display());
        Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).output().unwrap().status.success()
    };
    for verb in ["daemon-reload", "daemon-reexec"] {
        systemctl(&[verb]);
        for (file, value) in SOME_FILES {
            let now = value_of(&cgroup, file);
            // A systemd that re-executes itself writes every file again: a quota in whole percents
            // then.
            let rounded = file == "cpu.max" && verb == "daemon-reexec" && now == "12500 50000";
            assert!(now == value || rounded, "{file} after {verb}: {now}");
        }
        assert!(opens("/dev/zero"), "after {verb}");
        assert!(!opens("/dev/kmsg"), "the device filter is gone after {verb}");
        assert_eq!(property("0a3", "ActiveState"), "active", "after {verb}");
        // And the connection, or its successor, serves.
        let more = Limits { pids_limit: Some(Ceiling::At(51)), ..Limits::default() };
        cgroup.update(&more).unwrap();
        assert_eq!((value_of(&cgroup, "pids.max"), property("0a3", "TasksMax")), ("51".into(), "51".into()));
        cgroup.update(&Limits { pids_limit: Some(Ceiling::At(50)), ..Limits::default() }).unwrap();
        let (_other, _process) = place.make(&format!("0b{}", verb.len()), &Limits::default());
    }
    drop(holder);
}

/// As when packages are upgraded: every answer that is due is lost, that to the first call of a new
/// connection too.
#[test]
fn scopes_are_made_changed_and_stopped_while_systemd_executes_itself_anew() {
    let Some(mut place) = Place::alone("anew") else { return };
    let over = AtomicBool::new(false);
    let mut made = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..3 {
                systemctl(&["daemon-reexec"]);
            }
            over.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) {
            place.systemd = Systemd::new().unwrap();
            let (cgroup, holder) = place.make(&format!("0d{made}"), &some_limits());
            assert_eq!(value_of(&cgroup, "cgroup.procs"), holder.0.id().to_string());
            assert_eq!(value_of(&cgroup, "pids.max"), "50");
            cgroup.update(&Limits { pids_limit: Some(Ceiling::At(51)), ..Limits::default() }).unwrap();
            assert_eq!(value_of(&cgroup, "pids.max"), "51");
            drop(holder);
            cgroup.remove(PATIENCE).unwrap();
            made += 1;
        }
    });
    assert!(made > 0);
}

#[test]
fn an_update_reaches_the_files_exactly_and_systemd_too() {
    let Some(place) = Place::new("update") else { return };
    let (cgroup, _holder) = place.make("0a4", &some_limits());
    // The period stays: 20000 of 50000.
    let limits = Limits {
        cpu_quota_us: Some(Ceiling::At(20_001)),
        memory_limit_bytes: Some(Ceiling::At(32 << 20)),
        memory_swap_limit_bytes: Some(Ceiling::At(32 << 20)),
        ..Limits::default()
    };
    cgroup.update(&limits).unwrap();
    for (file, value) in [("cpu.max", "20001 50000"), ("memory.max", "33554432"), ("pids.max", "50")] {
        assert_eq!(value_of(&cgroup, file), value, "{file}");
    }
    for (name, value) in [("CPUQuotaPerSecUSec", "410ms"), ("MemoryMax", "33554432"), ("MemorySwapMax", "0")]
    {
        assert_eq!(property("0a4", name), value, "{name}");
    }
    let unlimited = Limits {
        cpu_quota_us: Some(Ceiling::Unlimited),
        memory_limit_bytes: Some(Ceiling::Unlimited),
        ..Limits::default()
    };
    cgroup.update(&unlimited).unwrap();
    assert_eq!(value_of(&cgroup, "memory.max"), "max");
    assert!(value_of(&cgroup, "cpu.max").starts_with("max "));
    assert_eq!(property("0a4", "MemoryMax"), "infinity");
}

#[test]
fn an_update_that_systemd_refuses_changes_nothing() {
    let Some(place) = Place::new("refused") else { return };
    let (cgroup, _holder) = place.make("0a5", &some_limits());
    let told = || ["MemoryMax", "TasksMax", "CPUQuotaPerSecUSec"].map(|name| property("0a5", name));
    let before = told();
    // The kernel lets no process in with a `pids.max` of 0, so that the files take all of this;
    // systemd's TasksMax begins at 1.
    let limits = Limits {
        cpu_quota_us: Some(Ceiling::At(20_000)),
        memory_limit_bytes: Some(Ceiling::At(32 << 20)),
        memory_swap_limit_bytes: Some(Ceiling::At(32 << 20)),
        unified: [("pids.max".to_owned(), "0".to_owned())].into(),
        ..Limits::default()
    };
    let error = cgroup.update(&limits).unwrap_err();
    assert!(matches!(&error, Error::Unit { source: SystemdError::Call { .. }, .. }), "{error:?}");
    for (file, value) in SOME_FILES {
        assert_eq!(value_of(&cgroup, file), value, "{file}");
    }
    assert_eq!(told(), before);
    // The next one is taken.
    cgroup.update(&Limits { unified: [("pids.max".to_owned(), "7".to_owned())].into(), ..limits }).unwrap();
    assert_eq!(
        (value_of(&cgroup, "memory.max"), value_of(&cgroup, "pids.max")),
        ("33554432".into(), "7".into())
    );
    assert_eq!((property("0a5", "MemoryMax"), property("0a5", "TasksMax")), ("33554432".into(), "7".into()));
}

#[test]
fn an_update_of_a_scope_that_is_gone_is_an_error() {
    let Some(place) = Place::new("gone") else { return };
    let (_cgroup, holder) = place.make("0a9", &some_limits());
    let lost =
        Cgroup::open(&place.hierarchy, &place.parent, "0a9").unwrap().with_systemd(Some(&place.systemd));
    drop(holder);
    soon("the unit is gone", || property("0a9", "LoadState") == "not-found");
    assert!(lost.update(&Limits { pids_limit: Some(Ceiling::At(9)), ..Limits::default() }).is_err());
}

#[test]
fn a_scope_goes_with_its_last_process_and_leaves_no_unit() {
    let Some(place) = Place::new("ends") else { return };
    let (cgroup, holder) = place.make("0a6", &Limits::default());
    drop(holder);
    let begin = Instant::now();
    cgroup.remove(PATIENCE).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert!(!cgroup.unified_dir().unwrap().exists());
    soon("the unit is gone", || property("0a6", "LoadState") == "not-found");
    // Again is no error.
    cgroup.remove(PATIENCE).unwrap();
}

#[test]
fn a_scope_with_processes_is_killed_and_removed() {
    let Some(place) = Place::new("kill") else { return };
    let (cgroup, _holder) = place.make("0a7", &Limits::default());
    cgroup.kill(PATIENCE).unwrap();
    cgroup.remove(PATIENCE).unwrap();
    assert_eq!(leftovers(&place.hierarchy, &place.parent).unwrap().len(), 0);
}

#[test]
fn an_oom_kill_is_counted_and_leaves_the_scope_and_no_failed_unit() {
    let Some(place) = Place::new("oom") else { return };
    let limits = Limits { memory_limit_bytes: Some(Ceiling::At(16 << 20)), ..Limits::default() };
    let (cgroup, holder) = place.make("0a8", &limits);
    let script =
        format!("echo 0 >{}/cgroup.procs && exec tail /dev/zero", cgroup.unified_dir().unwrap().display());
    assert!(!Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let source = cgroup.oom_source().unwrap();
    assert_eq!(parse_oom_kills(&fs::read(&source.file).unwrap(), source.key), Some(1));
    // The others go on: a container may outlive a child that was killed.
    assert_eq!(value_of(&cgroup, "cgroup.procs"), holder.0.id().to_string());
    drop(holder);
    cgroup.remove(PATIENCE).unwrap();
    soon("the unit is gone", || property("0a8", "LoadState") == "not-found");
}

#[test]
fn many_scopes_are_made_at_the_same_time() {
    let Some(place) = Place::new("many") else { return };
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..20 {
            let place = &place;
            scope.spawn(move || {
                let (cgroup, holder) = place.make(&format!("0c{number}"), &some_limits());
                assert_eq!(value_of(&cgroup, "cgroup.procs"), holder.0.id().to_string());
                drop(holder);
                cgroup.remove(PATIENCE).unwrap();
            });
        }
    });
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
}

#[test]
fn a_named_slice_that_does_not_exist_is_created() {
    let Some(place) = Place::new("missing") else { return };
    let slice = format!("berthtest-missing{}.slice", std::process::id());
    let parent = Parent::named(Driver::Systemd, &slice).unwrap();
    let holder = Process::new();
    let scope = Scope { process: holder.0.id(), limits: &Limits::default(), ending: ENDING };
    let cgroup = Cgroup::create_scope(&place.hierarchy, &place.systemd, &parent, "0a9", &scope).unwrap();
    assert!(cgroup.path().contains(&slice), "{}", cgroup.path());
    assert_eq!(value_of(&cgroup, "cgroup.procs"), holder.0.id().to_string());
    drop(holder);
    cgroup.remove(PATIENCE).unwrap();
    let stopped = Command::new("systemctl").args(["stop", &slice]).status().unwrap();
    assert!(stopped.success(), "{stopped}");
}

#[test]
fn a_process_that_is_gone_is_an_error_and_leaves_nothing() {
    let Some(place) = Place::new("gone") else { return };
    let mut process = Process::new();
    let id = process.0.id();
    process.0.kill().unwrap();
    process.0.wait().unwrap();
    let scope = Scope { process: id, limits: &Limits::default(), ending: ENDING };
    let made = Cgroup::create_scope(&place.hierarchy, &place.systemd, &place.parent, "0aa", &scope);
    let error = made.unwrap_err();
    assert!(
        matches!(&error, Error::Unit { source: SystemdError::Call { .. } | SystemdError::Job { .. }, .. }),
        "{error:?}"
    );
    soon("nothing is left", || leftovers(&place.hierarchy, &place.parent).unwrap().is_empty());
}
