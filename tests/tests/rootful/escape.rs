//! Attempts of hostile images and containers to reach the host: paths that change while the runtime
//! walks them, links where it expects directories, inspection of its own processes. The numbers of
//! known attacks on other runtimes are noted at the tests.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_tests::census::mounts_below;
use berth_tests::cri::image_spec;
use berth_tests::daemon::{Daemon, programs, rootful};
use berth_tests::forge::{Entry, Image, Layer, sha256};
use berth_tests::pod::{Container, container, idle, security, sharing, sharing_pod, shell, volume, words};
use berth_tests::repeats::repeats;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde_json::json;
use tonic::Code;

/// A directory of the host that no container was given: its contents must not change.
struct Canary {
    directory: PathBuf,
    before: Vec<String>,
}

impl Canary {
    /// Creates it, with a file or directory of every name that a runtime writes to in a root.
    fn new(daemon: &Daemon) -> Result<Self> {
        let directory = daemon.directory("canary")?;
        for name in ["hosts", "hostname", "resolv.conf", "mtab", "passwd", "group", "null", "console", "ptmx"]
        {
            fs::write(directory.join(name), format!("the host's {name}\n"))?;
        }
        for name in ["pts", "shm", "mqueue", "sys", "fs", "self"] {
            fs::create_dir(directory.join(name))?;
        }
        let before = listing(&directory)?;
        Ok(Self { directory, before })
    }

    /// Its path, as links of containers name it.
    fn path(&self) -> Result<&str> {
        self.directory.to_str().context("a path that is text")
    }

    /// Checks that nothing was created, changed, opened for writing or mounted in it.
    fn is_untouched(&self) -> Result<()> {
        let now = listing(&self.directory)?;
        ensure!(now == self.before, "the host was changed: {:?}, before {:?}", now, self.before);
        ensure!(mounts_below(&self.directory).is_empty(), "something is mounted on the host");
        Ok(())
    }
}

/// Everything in a directory: path, inode, links, mode, owner, times, content.
fn listing(directory: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let its = fs::metadata(&directory)?;
        found.push(format!("{} {:o} {}.{}", directory.display(), its.mode(), its.mtime(), its.mtime_nsec()));
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let its = fs::symlink_metadata(&path)?;
            if its.is_dir() {
                directories.push(path);
                continue;
            }
            let content =
                if its.is_file() { sha256(&fs::read(&path)?) } else { format!("{:?}", its.file_type()) };
            found.push(format!(
                "{} {} {} {:o} {}:{} {}.{} {content}",
                path.display(),
                its.ino(),
                its.nlink(),
                its.mode(),
                its.uid(),
                its.gid(),
                its.mtime(),
                its.mtime_nsec(),
            ));
        }
    }
    found.sort();
    Ok(found)
}

/// How long names rest between two exchanges, in microseconds; not at all at first. How far a
/// container gets then depends on the machine, and on some it is never created. So each refusal
/// makes them rest longer, and each created container shorter: on every machine the exchanges come
/// close to the decisive moments.
#[derive(Default)]
struct Pace(AtomicU64);

impl Pace {
    const LONGEST_US: u64 = 100_000;

    fn after<T, E>(&self, outcome: &Result<T, E>) {
        let rest = self.0.load(Ordering::Relaxed);
        let next = if outcome.is_ok() { rest / 4 } else { (rest * 4).clamp(16, Self::LONGEST_US) };
        self.0.store(next, Ordering::Relaxed);
    }

    fn rest(&self) {
        match self.0.load(Ordering::Relaxed) {
            0 => {}
            rest => thread::sleep(Duration::from_micros(rest)),
        }
    }
}

/// Exchanges two names of the host while `work` runs, at the pace that it sets.
fn while_exchanging<T>(one: &Path, other: &Path, work: impl FnOnce(&Pace) -> Result<T>) -> Result<T> {
    let over = AtomicBool::new(false);
    let pace = Pace::default();
    thread::scope(|scope| {
        let exchanging = scope.spawn(|| -> Result<u64> {
            let mut turns = 0;
            while !over.load(Ordering::Relaxed) {
                renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE)
                    .context("exchanging two names")?;
                turns += 1;
                pace.rest();
            }
            Ok(turns)
        });
        let result = work(&pace);
        over.store(true, Ordering::Relaxed);
        let turns = exchanging.join().map_err(|_| anyhow!("the exchanging thread panicked"))??;
        ensure!(turns > 100, "only {turns} exchanges: that is no race");
        result
    })
}

/// CVE-2021-30465, CVE-2024-45310: mount points lie in a volume in which another process exchanges
/// a directory and a link to the host while they are created. 2,000 of them.
#[test]
fn places_that_are_exchanged_for_links_while_things_are_mounted_on_them_do_not_lead_to_the_host() -> Result<()>
{
    const CONTAINERS: u32 = 13;
    const PLACES: u32 = 80;
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let given = daemon.directory("given")?;
        fs::write(given.join("file"), "given\n")?;
        let pod = daemon.pod("race")?;
        let mut made = 0;
        // Read from the root, and from the place of the link.
        for (turn, target) in [canary.path()?.to_owned(), climbing(canary.path()?)].iter().enumerate() {
            let shared = daemon.directory(&format!("shared-{turn}"))?;
            let (directory, link) = (shared.join("turn"), shared.join("link"));
            fs::create_dir(&directory)?;
            symlink(target, &link)?;
            while_exchanging(&directory, &link, |pace| {
                for number in 0..CONTAINERS {
                    let mut config = idle("main");
                    config.metadata.get_or_insert_default().attempt = number;
                    config.mounts = vec![volume(&shared, "/volume")];
                    for place in 0..PLACES {
                        let path = format!("/volume/turn/{number}-{place}");
                        match place % 10 {
                            5 => config.mounts.push(volume(&given.join("file"), &path)),
                            _ => config.mounts.push(volume(&given, &path)),
                        }
                    }
                    let expected = config.mounts.len() - 1;
                    // A refusal is right too: the place has changed.
                    let outcome = pod.create(config);
                    pace.after(&outcome);
                    if let Ok(container) = outcome {
                        made += 1;
                        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", container.pid()?))?;
                        let root = |line: &str| line.split(' ').nth(3).map(str::to_owned).unwrap_or_default();
                        let there = mounts.lines().filter(|line| root(line).contains("/given")).count();
                        ensure!(
                            there == expected,
                            "{there} of {expected} mounts are in the container: {mounts}"
                        );
                        container.remove()?;
                    }
                    canary.is_untouched()?;
                }
                Ok(())
            })?;
        }
        ensure!(made > 0, "not one container was made: nothing was tried");
        Ok(())
    })
}

/// CVE-2025-31133, CVE-2025-52565: `/dev` is a volume in which another process exchanges `null`,
/// `console` and the terminals for links to the host, while masks and the terminal are put in
/// place. 2,000 masks.
#[test]
fn masks_and_the_terminal_do_not_rest_on_a_dev_that_somebody_else_writes() -> Result<()> {
    const CONTAINERS: u32 = 10;
    const MASKS: usize = 200;
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let shared = daemon.directory("dev")?;
        // The exchanged path, and its original content.
        let names = ["null", "console", "ptmx", "pts"];
        let other = daemon.directory("dev/other")?;
        for name in names {
            symlink(canary.directory.join(name), other.join(name))?;
        }
        for name in ["null", "console", "ptmx"] {
            fs::write(shared.join(name), "")?;
        }
        fs::create_dir(shared.join("pts"))?;
        let pod = daemon.pod("race")?;
        let mut made = 0;
        let mut seen = Vec::new();
        for name in names {
            while_exchanging(&shared.join(name), &other.join(name), |pace| {
                for number in 0..CONTAINERS / 4 + 1 {
                    let script = "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c; ls -A /sys/firmware | wc -l; \
                        grep -c ' /proc/keys ' /proc/self/mountinfo";
                    let mut config = shell(&format!("{name}-{number}"), script);
                    // A terminal has to be on a devpts; this /dev has none, so it has to be
                    // refused.
                    config.tty = name != "null";
                    config.mounts = vec![volume(&shared, "/dev")];
                    let masks = ["/proc/kcore", "/proc/timer_list", "/sys/firmware", "/proc/keys"];
                    security(&mut config).masked_paths =
                        masks.iter().cycle().take(MASKS).map(|path| (*path).to_owned()).collect();
                    let outcome = pod.create(config);
                    pace.after(&outcome);
                    match outcome {
                        Ok(container) => {
                            container.start()?;
                            made += 1;
                            let said = container.ended()?.stdout;
                            let each = MASKS / masks.len();
                            ensure!(said == format!("0\n0\n{each}\n") && name == "null", "{name}: {said}");
                            container.remove()?;
                        }
                        Err(refused) => seen.push(format!("{name}: {}", refused.message())),
                    }
                    canary.is_untouched()?;
                }
                Ok(())
            })?;
        }
        ensure!(made > 0, "not one container was made: {seen:?}");
        Ok(())
    })
}

/// A container of each hostile image has to see exactly what it sees in a good one.
const VIEW: &str = "awk '$2 ~ \"^/(proc|sys|dev)\" { print $2, $3 }' /proc/mounts; \
    cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c; ls -A /sys/firmware | wc -l; \
    stat -c %F:%t:%T /dev/null /dev/zero /dev/random; (echo x > /proc/sys/kernel/hostname) 2>/dev/null; echo $?; \
    touch /sys/x 2>/dev/null; echo $?; cat /etc/hosts /etc/hostname /etc/resolv.conf";

/// CVE-2019-19921, CVE-2024-5154, CVE-2025-54867, CVE-2026-41579: every place of the root that a
/// runtime fills is a link, a file, a pipe, or not there.
#[test]
fn a_root_with_links_files_and_pipes_in_place_of_what_belongs_there_leads_nowhere() -> Result<()> {
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let pod = daemon.pod("roots")?;
        let expected = pod.script(VIEW, |_| {})?;
        let host = canary.path()?.to_owned();
        let mut number = 0;
        for place in PLACES_OF_A_ROOT {
            let name = place.rsplit('/').next().unwrap_or(place);
            let target =
                if canary.directory.join(name).exists() { format!("{host}/{name}") } else { host.clone() };
            let up = climbing(&target);
            let gone = format!("{}.wh.{name}", place.strip_suffix(name).unwrap_or_default());
            for (form, path, entry) in [
                ("link", *place, Entry::Link(&target)),
                ("climbing link", place, Entry::Link(&up)),
                ("circle", place, Entry::Link(name)),
                ("file", place, Entry::File(b"of the image\n")),
                ("pipe", place, Entry::Fifo),
                ("directory", place, Entry::Directory),
                ("gap", gone.as_str(), Entry::File(b"")),
            ] {
                // Misplaced objects are refused by name; everything else runs as if they were
                // absent.
                let is_refused = matches!(
                    (*place, form),
                    ("proc" | "sys" | "dev", "link" | "climbing link" | "circle" | "file" | "pipe")
                        | ("etc", "circle" | "file" | "pipe")
                        | ("etc/hosts" | "etc/hostname" | "etc/resolv.conf", "circle" | "directory")
                        | ("etc/passwd" | "etc/group", "circle" | "pipe" | "directory")
                );
                number += 1;
                let what = format!("/{place} is a {form}");
                let image = format!("localhost/roots:r{number}");
                let directory = daemon.directory(&format!("layout-{number}"))?;
                Image::demo()?
                    .on_top(Layer::of_entries(&[(path, entry)]))
                    .write_layout(&directory, &image)?;
                daemon.client().import(&directory).with_context(|| what.clone())?;
                let mut config = shell(&format!("c{number}"), VIEW);
                config.image = Some(image_spec(&image));
                config.tty = number % 2 == 0;
                let console = |line: &&str| *line != "/dev/console devpts";
                match pod.run_container(config) {
                    Ok(ended) if !is_refused => {
                        let said: Vec<&str> = ended.stdout.lines().filter(console).collect();
                        assert_eq!((said, ended.status.exit_code), (expected.lines().collect(), 0), "{what}");
                    }
                    Err(refused) if is_refused => {
                        ensure!(refused.to_string().contains(place), "{what}: {refused}");
                    }
                    found => panic!("{what}: {found:?}"),
                }
                canary.is_untouched().with_context(|| what.clone())?;
            }
        }
        Ok(())
    })
}

/// A place where a runtime mounts, creates, writes or reads something.
const PLACES_OF_A_ROOT: &[&str] = &[
    "proc",
    "sys",
    "dev",
    "dev/pts",
    "dev/shm",
    "dev/mqueue",
    "dev/null",
    "dev/console",
    "dev/ptmx",
    "etc",
    "etc/hosts",
    "etc/hostname",
    "etc/resolv.conf",
    "etc/mtab",
    "etc/passwd",
    "etc/group",
    "run",
];

/// A link from a directory of the container's root to a path of the host.
fn climbing(path: &str) -> String {
    format!("{}{}", "../".repeat(12), path.trim_start_matches('/'))
}

/// Examines every process but the first from its first moment on, through /proc, until `/tmp/over`
/// exists; prints what it sees of the host. Only shell builtins, so that no look takes longer than
/// the moment that it is for.
fn look_for_the_host(canary: &str) -> String {
    format!(
        "while [ ! -e /tmp/over ]; do for p in /proc/[2-9]* /proc/1?*; do \
         [ -e $p/root{canary}/hosts ] && read -r line < $p/root{canary}/hosts && echo root: $line; \
         [ -e $p/cwd{canary} ] && echo directory; \
         for fd in 4 5 6 7 8 9 10 11 12; do [ -f $p/fd/$fd -o -d $p/fd/$fd ] && echo file $fd; done; done; done; echo over"
    )
}

fn may_trace(mut config: v1::ContainerConfig) -> v1::ContainerConfig {
    security(&mut config).capabilities =
        Some(v1::Capability { add_capabilities: words(&["SYS_PTRACE"]), ..Default::default() });
    config
}

/// The output of a container that looks, each line once.
fn seen_by(container: &Container) -> Result<BTreeSet<String>> {
    Ok(container.ended()?.stdout.lines().map(str::to_owned).collect())
}

/// CVE-2016-9962: process 1 looks at 500 processes of exec, with and without the capability to
/// trace.
#[test]
fn exec_brings_nothing_of_the_host_into_a_container() -> Result<()> {
    const EXECS: usize = 250;
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let look = look_for_the_host(canary.path()?);
        let pod = daemon.pod("look")?;
        for config in [shell("cannot-trace", &look), may_trace(shell("traces", &look))] {
            let main = pod.start(config)?;
            for _ in 0..repeats(EXECS)? {
                ensure!(main.exec(&["true"])?.code == 0);
            }
            main.call_off("/tmp/over");
            assert_eq!(seen_by(&main)?, BTreeSet::from(["over".to_owned()]));
        }
        canary.is_untouched()
    })
}

/// The same for containers that are created in a pid namespace where another process looks.
#[test]
fn a_new_container_brings_nothing_of_the_host_into_a_shared_pid_namespace() -> Result<()> {
    const CONTAINERS: usize = 30;
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("look")))?;
        let looks = pod.start(sharing(may_trace(shell("looks", &look_for_the_host(canary.path()?)))))?;
        for number in 0..repeats(CONTAINERS)? {
            pod.start(sharing(idle(&format!("c{number}"))))?.remove()?;
        }
        looks.call_off("/tmp/over");
        // They are in it all the same, with a matching /proc and, if requested, a terminal.
        let mut config =
            sharing(shell("terminal", "grep Name /proc/1/status; [ -e /proc/$$ ] && [ -t 0 ] && echo own"));
        config.tty = true;
        assert_eq!(pod.run_container(config)?.stdout, "Name:\tberth-pause\nown\n");
        assert_eq!(seen_by(&looks)?, BTreeSet::from(["over".to_owned()]));
        canary.is_untouched()
    })
}

/// CVE-2019-5736: a program whose interpreter is `/proc/self/exe`, in place of the entrypoint and
/// of 200 commands, and a writer that may trace and opens the program of every process.
#[test]
fn the_programs_of_the_host_cannot_be_written_through_processes_that_run_them() -> Result<()> {
    const EXECS: usize = 200;
    rootful(|daemon| {
        let directory = programs()?;
        let hashes = || -> Result<Vec<String>> {
            ["berthd", "berth-shim", "berth"]
                .iter()
                .map(|name| Ok(sha256(&fs::read(directory.join(name))?)))
                .collect()
        };
        let before = hashes()?;
        let shared = daemon.directory("shared")?;
        fs::write(shared.join("evil"), "#!/proc/self/exe\n")?;
        fs::set_permissions(shared.join("evil"), fs::Permissions::from_mode(0o755))?;
        let pod = daemon.pod("write")?;
        let with_volume = |mut config: v1::ContainerConfig| {
            config.mounts = vec![volume(&shared, "/volume")];
            config
        };
        // It is stopped from outside: the program file of a process in the container may be written
        // once that has ended.
        let write = "while [ ! -e /volume/over ]; do for p in /proc/[0-9]*; do { echo evil > $p/exe; } 2>/dev/null && echo wrote $p; done; done; echo over";
        let main = pod.start(with_volume(may_trace(shell("writes", write))))?;
        let shim = main.shim_pid()?;
        let own = sha256(&fs::read(format!("/proc/{shim}/exe"))?);
        for _ in 0..repeats(EXECS)? {
            // Refused by the kernel or ended with an error; which one is up to the kernel.
            let _ = main.exec(&["/volume/evil"]);
        }
        let _ = pod.start(with_volume(container("entrypoint", &["/volume/evil"])));
        fs::write(shared.join("over"), "")?;
        assert_eq!(seen_by(&main)?, BTreeSet::from(["over".to_owned()]));
        assert_eq!(hashes()?, before);
        let mut next = pod.idle("next")?.shim_pid()?;
        assert_eq!(sha256(&fs::read(format!("/proc/{next}/exe"))?), own, "shims are what they were");
        daemon.crash()?;
        next = pod.idle("after")?.shim_pid()?;
        assert_eq!(sha256(&fs::read(format!("/proc/{next}/exe"))?), own, "those of the next daemon too");
        Ok(())
    })
}

/// The masks and read-only paths of a current kubelet.
const MASKED: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Root of a container without CAP_SYS_ADMIN removes masks, mounts over them, or mounts its own
/// procfs; also without a filter, and as root of a user namespace that it creates.
#[test]
fn masks_and_read_only_paths_cannot_be_taken_away_from_inside() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("masks")?;
        // How much of the masked content can be read, and whether read-only paths take writes.
        let state = "for p in $MASKED; do [ ! -e $p ] || [ -z \"$(ls -A $p/ 2>/dev/null; cat $p 2>/dev/null | head -c 1)\" ] || echo open $p; done; \
            for p in /proc/sys/kernel/hostname /proc/irq/default_smp_affinity /proc/sysrq-trigger; do { echo x > $p; } 2>/dev/null && echo wrote $p; done;";
        let tries = "for p in $MASKED /proc/sys /proc/irq /proc/sysrq-trigger; do \
            umount $p; umount -l $p; mount -o remount,rw $p; mount -o remount,rw,bind $p; mount --bind /tmp $p; mount --move $p /tmp/place; done 2>/dev/null;";
        let inside = format!(
            "mkdir -p /tmp/proc; mount -t proc proc /tmp/proc 2>/dev/null && echo a procfs of its own; {tries} {state}"
        );
        let script = format!(
            "mkdir -p /tmp/place; echo start; {state} {tries} {state} \
             unshare -U -r -m -p -f sh -c '{inside}' 2>/dev/null; unshare -m sh -c '{inside}' 2>/dev/null; {state} echo end"
        );
        for (name, unconfined) in [("filtered", false), ("without-a-filter", true)] {
            let mut config = shell(name, &script);
            config.envs =
                vec![v1::KeyValue { key: "MASKED".to_owned(), value: MASKED.join(" ").into_bytes() }];
            security(&mut config).masked_paths = words(MASKED);
            if unconfined {
                security(&mut config).seccomp = None;
            }
            let ended = pod.run_container(config)?;
            assert_eq!(ended.stdout, "start\nend\n", "{name}: {}", ended.stderr);
        }
        // The same script sees the content when nothing is masked.
        let mut config = shell("open", &format!("{state} echo end"));
        config.envs = vec![v1::KeyValue { key: "MASKED".to_owned(), value: MASKED.join(" ").into_bytes() }];
        security(&mut config).masked_paths.clear();
        security(&mut config).readonly_paths = words(&["/proc/sysrq-trigger", "/proc/irq"]);
        let said = pod.run_container(config)?.stdout;
        for line in ["open /proc/interrupts", "open /proc/timer_list", "wrote /proc/sys/kernel/hostname"] {
            ensure!(said.contains(line), "{line}: {said}");
        }
        Ok(())
    })
}

/// Devices that a node has, by kind and number: Linux's admin-guide/devices.txt.
const DEVICES: &[(&str, &str, &str)] = &[
    ("c", "1", "1"),
    ("c", "1", "4"),
    ("c", "1", "11"),
    ("c", "5", "1"),
    ("c", "10", "200"),
    ("c", "10", "229"),
    ("c", "10", "232"),
    ("c", "10", "237"),
    ("c", "10", "203"),
    ("b", "7", "0"),
    ("b", "8", "0"),
    ("b", "254", "0"),
];

#[test]
fn devices_stay_closed_for_program_and_exec_when_the_daemon_starts_anew_or_limits_change() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("devices")?;
        let nodes: String =
            DEVICES.iter().enumerate().fold(String::new(), |text, (number, (kind, major, minor))| {
                text + &format!("mknod /tmp/d{number} {kind} {major} {minor}; ")
            });
        // Opening without reading: some devices block.
        let open = "for d in /tmp/d*; do why=$( ( : < $d ) 2>&1 ) && echo opened $d; case $why in *'not permitted'*) ;; *) echo $d $why; esac; done";
        let main =
            pod.start(shell("main", &format!("{nodes} echo made; while :; do {open}; sleep 0.1; done")))?;
        main.says("made")?;
        assert_eq!(main.sh(open)?, "");
        daemon.crash()?;
        assert_eq!(main.sh(open)?, "", "for a new daemon");
        let resources = v1::LinuxContainerResources { cpu_shares: 512, ..Default::default() };
        daemon.client().update_container_resources(v1::UpdateContainerResourcesRequest {
            container_id: main.id.clone(),
            linux: Some(resources),
            ..Default::default()
        })?;
        assert_eq!(main.sh(open)?, "", "after an update");
        main.stop(0)?;
        assert_eq!(main.ended()?.stdout, "made\n", "the program itself opened none");
        Ok(())
    })
}

/// What a user without rights on the host, and root in a container on the host's network, can
/// reach.
#[test]
fn neither_users_of_the_host_nor_its_network_lead_to_the_daemon_or_its_files() -> Result<()> {
    rootful(|daemon| {
        // Not through the directory of the test itself.
        fs::set_permissions(daemon.dir(), fs::Permissions::from_mode(0o755))?;
        let pod = daemon.pod("closed")?;
        let main = pod.idle("main")?;
        let listed =
            Command::new("find").args([daemon.root(), daemon.state(), daemon.socket()]).output()?.stdout;
        let listed = String::from_utf8_lossy(&listed).into_owned();
        for part in ["shim.sock", "record", "layers", "hosts"] {
            ensure!(listed.contains(part), "{part} is not among what is looked for");
        }
        let list = daemon.dir().join("list");
        fs::write(&list, &listed)?;
        fs::set_permissions(&list, fs::Permissions::from_mode(0o644))?;
        let look =
            "while read -r p; do for how in r w x; do [ -$how \"$p\" ] && echo \"$how $p\"; done; done";
        let nobody = |program: &str| -> Result<String> {
            let output = Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", program])
                .stdin(fs::File::open(&list)?)
                .output()?;
            ensure!(
                output.status.success() || !output.stdout.is_empty() || output.stderr.is_empty(),
                "{output:?}"
            );
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        // The directory that systemd creates for root and state may be entered; nothing in it.
        assert_eq!(nobody(&format!("{look}; true"))?, "");
        assert_eq!(
            nobody(&format!(
                "find {} {} -mindepth 1 2>/dev/null; true",
                daemon.root().display(),
                daemon.state().display()
            ))?,
            ""
        );
        let file = daemon.dir().join("list");
        assert_eq!(
            nobody(&format!("[ -r {} ] && echo r", file.display()))?,
            "r\n",
            "what is open is seen as open"
        );

        let mut config = daemon.pod_config("hosts");
        let linux = config.linux.get_or_insert_default();
        let hosts_network = v1::NamespaceOption {
            network: v1::NamespaceMode::Node.into(),
            pid: v1::NamespaceMode::Container.into(),
            ..Default::default()
        };
        linux.security_context.get_or_insert_default().namespace_options = Some(hosts_network.clone());
        let on_host = daemon.pod_of(config)?;
        let said = on_host.script(
            "cat /proc/net/unix | grep -c '@'; ls /proc/net/unix; \
             cat /proc/net/tcp /proc/net/tcp6 /proc/net/udp /proc/net/udp6 | grep -v local_address \
             | while read -r _ local _ state _; do \
             echo $state ${local%:*}; wget -O - http://127.0.0.1:$((0x${local#*:}))/exec/x 2>&1; done; true",
            |config| security(config).namespace_options = Some(hosts_network.clone()),
        )?;
        // One is listening (0A), on loopback: the streaming server, which answers no request
        // without a token. The kernel keeps the closed connections of wget for a while, but they
        // came after the list was read.
        let mut lines = said.lines();
        assert_eq!(
            (lines.next(), lines.next(), lines.next()),
            (Some("0"), Some("/proc/net/unix"), Some("0A 0100007F")),
            "no abstract socket, and one port: {said}"
        );
        let answers: Vec<&str> = lines.filter(|line| !line.starts_with("Connecting to ")).collect();
        assert_eq!(answers, ["wget: server returned error: HTTP/1.1 404 Not Found"]);
        main.remove()?;
        Ok(())
    })
}

/// Words that other runtimes and tools interpret as orders; to Berth they are text.
const ORDERS: &[(&str, &str)] = &[
    ("org.systemd.property.ExecStart", "'/bin/touch'"),
    ("run.oci.handler", "krun"),
    ("run.oci.hooks.stdout", "/etc/passwd"),
    ("run.oci.keep_original_groups", "1"),
    ("run.oci.systemd.subgroup", "../../x"),
    ("io.kubernetes.cri-o.userns-mode", "auto"),
    ("io.kubernetes.cri-o.Devices", "/dev/mem:/dev/mem:rwm"),
    ("io.kubernetes.cri-o.UnifiedCgroup.main", "memory.max=max"),
    ("io.kubernetes.cri-o.cgroup2-mount-hierarchy-rw", "true"),
    ("io.katacontainers.config.hypervisor.path", "/bin/sh"),
    ("io.kubernetes.cri.untrusted-workload", "true"),
    ("containerd.io/restart.status", "running"),
    ("containerd.io/restart.loguri", "binary:///bin/sh"),
    ("io.containerd.image.config.stop-signal", "9"),
    ("io.cri-containerd.image", "managed"),
    ("berth.v1/privileged", "true"),
    ("seccomp.security.alpha.kubernetes.io/pod", "unconfined"),
    ("container.apparmor.security.beta.kubernetes.io/main", "unconfined"),
    ("io.kubernetes.container.terminationMessagePath", "/etc/passwd"),
];

/// CVE-2024-3154, CVE-2026-44210, CVE-2026-53488: annotations of a pod and a container, and labels
/// of an image.
#[test]
fn annotations_and_an_images_labels_order_nothing_and_stay_where_they_are() -> Result<()> {
    const VIEW: &str = "cat /proc/self/status | grep -e Umask -e id: -e Groups -e Sig[BIC] -e Cap -e NoNew -e Seccomp -e Cpus; cat /proc/self/limits; \
        cat /proc/mounts | cut -d' ' -f2-3; ls /dev; cat /proc/self/cgroup | wc -l; env; id; cat /proc/self/attr/current 2>/dev/null; umask";
    rootful(|daemon| {
        let orders: std::collections::BTreeMap<String, String> =
            ORDERS.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let plain = daemon.pod("same")?;
        let expected = plain.script(VIEW, |_| {})?;
        plain.remove()?;
        let labels: serde_json::Map<String, serde_json::Value> =
            ORDERS.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        let ports: serde_json::Map<String, serde_json::Value> =
            (1..=65_535).map(|port| (format!("{port}/tcp"), json!({}))).collect();
        let directory = daemon.directory("labelled")?;
        Image::demo()?
            .with("Labels", json!(labels))
            .with("ExposedPorts", json!(ports))
            .with("ArgsEscaped", json!(true))
            .with("Shell", json!(["/bin/false", "-c"]))
            .with("OnBuild", json!(["RUN touch /x"]))
            .with("Healthcheck", json!({"Test": ["CMD-SHELL", "touch /x"], "Interval": 1}))
            .write_layout(&directory, "localhost/labelled:1")?;
        daemon.client().import(&directory)?;
        let mut config = daemon.pod_config("same");
        config.log_directory.push_str("-labelled");
        config.annotations.clone_from(&orders);
        let pod = daemon.pod_of(config)?;
        let said = pod.script(VIEW, |config| {
            config.annotations.clone_from(&orders);
            config.image = Some(image_spec("localhost/labelled:1"));
        })?;
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        for (now, before) in lines(&said).into_iter().zip(lines(&expected)) {
            assert_eq!(now, before);
        }
        assert_eq!(said.len(), expected.len());
        for container in daemon.client().containers(v1::ContainerFilter::default())? {
            assert_eq!(
                (container.labels.len(), container.annotations.len()),
                (0, ORDERS.len()),
                "{container:?}"
            );
        }
        // A request for devices by name is not supported, and not ignored either.
        let mut config = idle("cdi");
        config.annotations.insert("cdi.k8s.io/device".to_owned(), "vendor.com/class=all".to_owned());
        assert_eq!(pod.create(config).err().map(|refused| refused.code()), Some(Code::Unimplemented));
        // This many ports are more than a configuration may have.
        let directory = daemon.directory("ports")?;
        let ports: serde_json::Map<String, serde_json::Value> =
            (0..400_000).map(|port| (format!("{port}/tcp"), json!({}))).collect();
        Image::demo()?.with("ExposedPorts", json!(ports)).write_layout(&directory, "localhost/ports:1")?;
        let refused = daemon.client().import(&directory).err().context("too long a configuration")?;
        ensure!(refused.message().contains("4 MiB"), "{refused}");
        for (number, signal) in
            ["SIGNOTHING", "-9", "0", "99999999999", "kill; touch /x", "SIGKILL\n"].iter().enumerate()
        {
            let (directory, name) =
                (daemon.directory(&format!("signal-{number}"))?, format!("localhost/signal:{number}"));
            Image::demo()?.with("StopSignal", json!(signal)).write_layout(&directory, &name)?;
            daemon.client().import(&directory)?;
            let mut config = idle(&format!("signal-{number}"));
            config.image = Some(image_spec(&name));
            // Refused with a clear error, or ignored: it ends at the usual signal.
            match pod.start(config) {
                Ok(main) => {
                    main.stop(20)?;
                    assert_eq!(main.ended()?.status.exit_code, 0, "{signal:?}");
                }
                Err(refused) => ensure!(refused.message().contains("ignal"), "{signal:?}: {refused}"),
            }
        }
        Ok(())
    })
}
