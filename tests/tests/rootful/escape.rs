//! What hostile images and containers do to reach the host: paths that change while the runtime walks them, links where it
//! expects directories, looks at its own processes. The numbers of known attacks on other runtimes stand beside the tests.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_tests::census::mounts_below;
use berth_tests::cri::image_spec;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::forge::{Entry, Image, Layer, sha256};
use berth_tests::pod::{Container, idle, security, shell, words};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// A folder of the host that nobody was given: all that is in it has to stay as it is.
struct Canary {
    folder: PathBuf,
    before: Vec<String>,
}

impl Canary {
    /// Makes it, with a file or folder of every name that a runtime writes to in a root.
    fn new(daemon: &Daemon) -> Result<Self> {
        let folder = daemon.folder("canary")?;
        for name in ["hosts", "hostname", "resolv.conf", "mtab", "passwd", "group", "null", "console", "ptmx"]
        {
            fs::write(folder.join(name), format!("the host's {name}\n"))?;
        }
        for name in ["pts", "shm", "mqueue", "sys", "fs", "self"] {
            fs::create_dir(folder.join(name))?;
        }
        let before = listing(&folder)?;
        Ok(Self { folder, before })
    }

    /// Its path, as links of containers name it.
    fn path(&self) -> Result<&str> {
        self.folder.to_str().context("a path that is text")
    }

    /// Looks whether anything was made, changed, opened for writing or mounted in it.
    fn is_untouched(&self) -> Result<()> {
        let now = listing(&self.folder)?;
        ensure!(now == self.before, "the host was changed: {:?}, before {:?}", now, self.before);
        ensure!(mounts_below(&self.folder).is_empty(), "something is mounted on the host");
        Ok(())
    }
}

/// Everything in a folder: path, inode, links, mode, owner, times, content.
fn listing(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let its = fs::metadata(&folder)?;
        found.push(format!("{} {:o} {}.{}", folder.display(), its.mode(), its.mtime(), its.mtime_nsec()));
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let its = fs::symlink_metadata(&path)?;
            if its.is_dir() {
                folders.push(path);
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

/// Exchanges two names of the host as fast as the kernel does it, for as long as `work` takes.
fn while_exchanging<T>(one: &Path, other: &Path, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let exchanging = scope.spawn(|| -> Result<u64> {
            let mut turns = 0;
            while !over.load(Ordering::Relaxed) {
                renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE)
                    .context("exchanging two names")?;
                turns += 1;
            }
            Ok(turns)
        });
        let result = work();
        over.store(true, Ordering::Relaxed);
        let turns = exchanging.join().map_err(|_| anyhow!("the exchanging thread panicked"))??;
        ensure!(turns > 100, "only {turns} exchanges: that is no race");
        result
    })
}

fn volume(host: &Path, container: &str) -> v1::Mount {
    v1::Mount {
        container_path: container.to_owned(),
        host_path: host.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

/// CVE-2021-30465, CVE-2024-45310: places for mounts and devices lie in a volume in which somebody exchanges a folder and a
/// link to the host while they are made. 2,000 of them.
#[test]
fn places_that_are_exchanged_for_links_while_things_are_mounted_on_them_do_not_lead_to_the_host() -> Result<()>
{
    const CONTAINERS: u32 = 13;
    const PLACES: u32 = 80;
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let given = daemon.folder("given")?;
        fs::write(given.join("file"), "given\n")?;
        let pod = daemon.pod("race")?;
        let mut made = 0;
        // Read from the root, and from where the link lies.
        for (turn, target) in [canary.path()?.to_owned(), climbing(canary.path()?)].iter().enumerate() {
            let shared = daemon.folder(&format!("shared-{turn}"))?;
            let (folder, link) = (shared.join("turn"), shared.join("link"));
            fs::create_dir(&folder)?;
            symlink(target, &link)?;
            while_exchanging(&folder, &link, || {
                for number in 0..CONTAINERS {
                    let mut config = idle("main");
                    config.metadata.get_or_insert_default().attempt = number;
                    config.mounts = vec![volume(&shared, "/volume")];
                    for place in 0..PLACES {
                        let path = format!("/volume/turn/{number}-{place}");
                        match place % 10 {
                            0 => config.devices.push(device("/dev/null", &path)),
                            5 => config.mounts.push(volume(&given.join("file"), &path)),
                            _ => config.mounts.push(volume(&given, &path)),
                        }
                    }
                    let expected = config.mounts.len() - 1;
                    // A refusal is right too: the place is not what it was.
                    if let Ok(container) = pod.create(config) {
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

/// CVE-2025-31133, CVE-2025-52565: `/dev` is a volume in which somebody exchanges `null`, `console` and the terminals for links to the
/// host, while masks and the terminal are put in place. 2,000 masks.
#[test]
fn masks_and_the_terminal_do_not_rest_on_a_dev_that_somebody_else_writes() -> Result<()> {
    const CONTAINERS: u32 = 10;
    const MASKS: usize = 200;
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let shared = daemon.folder("dev")?;
        // What is exchanged, and what is there at first.
        let names = ["null", "console", "ptmx", "pts"];
        let other = daemon.folder("dev/other")?;
        for name in names {
            symlink(canary.folder.join(name), other.join(name))?;
        }
        for name in ["null", "console", "ptmx"] {
            fs::write(shared.join(name), "")?;
        }
        fs::create_dir(shared.join("pts"))?;
        let pod = daemon.pod("race")?;
        let mut made = 0;
        let mut seen = Vec::new();
        for name in names {
            while_exchanging(&shared.join(name), &other.join(name), || {
                for number in 0..CONTAINERS / 4 + 1 {
                    let script = "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c; ls -A /sys/firmware | wc -l; \
                        grep -c ' /proc/keys ' /proc/self/mountinfo";
                    let mut config = shell(&format!("{name}-{number}"), script);
                    // A terminal is of a devpts or none; this /dev has none, so it has to be refused.
                    config.tty = name != "null";
                    config.mounts = vec![volume(&shared, "/dev")];
                    let masks = ["/proc/kcore", "/proc/timer_list", "/sys/firmware", "/proc/keys"];
                    security(&mut config).masked_paths =
                        masks.iter().cycle().take(MASKS).map(|path| (*path).to_owned()).collect();
                    match pod.create(config) {
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

/// What a container of each hostile image sees has to be what it sees in a good one.
const VIEW: &str = "awk '$2 ~ \"^/(proc|sys|dev)\" { print $2, $3 }' /proc/mounts; \
    cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c; ls -A /sys/firmware | wc -l; \
    stat -c %F:%t:%T /dev/null /dev/zero /dev/random; (echo x > /proc/sys/kernel/hostname) 2>/dev/null; echo $?; \
    touch /sys/x 2>/dev/null; echo $?; cat /etc/hosts /etc/hostname /etc/resolv.conf";

/// CVE-2019-19921, CVE-2024-5154, CVE-2025-54867, CVE-2026-41579: every place of the root that a runtime fills is a link, a file, a pipe, or
/// not there.
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
                if canary.folder.join(name).exists() { format!("{host}/{name}") } else { host.clone() };
            let up = climbing(&target);
            let gone = format!("{}.wh.{name}", place.strip_suffix(name).unwrap_or_default());
            for (form, path, entry) in [
                ("link", *place, Entry::Link(&target)),
                ("climbing link", place, Entry::Link(&up)),
                ("circle", place, Entry::Link(name)),
                ("file", place, Entry::File(b"of the image\n")),
                ("pipe", place, Entry::Fifo),
                ("folder", place, Entry::Directory),
                ("gap", gone.as_str(), Entry::File(b"")),
            ] {
                // What does not belong there is refused by name; everything else runs as if it were not there.
                let is_refused = matches!(
                    (*place, form),
                    ("proc" | "sys" | "dev", "link" | "climbing link" | "circle" | "file" | "pipe")
                        | ("etc", "circle" | "file" | "pipe")
                        | ("etc/hosts" | "etc/hostname" | "etc/resolv.conf", "circle" | "folder")
                        | ("etc/passwd" | "etc/group", "circle" | "pipe" | "folder")
                );
                number += 1;
                let what = format!("/{place} is a {form}");
                let image = format!("localhost/roots:r{number}");
                let folder = daemon.folder(&format!("layout-{number}"))?;
                Image::demo()?.on_top(Layer::of_entries(&[(path, entry)])).write_layout(&folder, &image)?;
                daemon.client().import(&folder).with_context(|| what.clone())?;
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

/// Where a runtime mounts, makes, writes or reads something.
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

/// A link from a folder of the container's root to a path of the host.
fn climbing(path: &str) -> String {
    format!("{}{}", "../".repeat(12), path.trim_start_matches('/'))
}

fn device(host: &str, container: &str) -> v1::Device {
    v1::Device {
        container_path: container.to_owned(),
        host_path: host.to_owned(),
        permissions: "rw".to_owned(),
    }
}

/// Looks at every process but the first from its first moment on, by what /proc says of it, until `/tmp/over` is there; says what it
/// sees of the host. Only builtins of the shell, so that no look takes longer than the moment that it is for.
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

/// What a container that looks said, each line once.
fn seen_by(container: &Container) -> Result<BTreeSet<String>> {
    Ok(container.ended()?.stdout.lines().map(str::to_owned).collect())
}

/// CVE-2016-9962: process 1 looks at 500 processes of exec, with and without the capability to trace.
#[test]
fn exec_brings_nothing_of_the_host_into_a_container() -> Result<()> {
    const EXECS: usize = 250;
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let look = look_for_the_host(canary.path()?);
        let pod = daemon.pod("look")?;
        for config in [shell("cannot-trace", &look), may_trace(shell("traces", &look))] {
            let main = pod.start(config)?;
            for _ in 0..EXECS {
                ensure!(main.exec(&["true"])?.code == 0);
            }
            main.sh("touch /tmp/over")?;
            assert_eq!(seen_by(&main)?, BTreeSet::from(["over".to_owned()]));
        }
        canary.is_untouched()
    })
}

/// The same for containers that are made in a pid namespace where somebody looks.
#[test]
fn a_new_container_brings_nothing_of_the_host_into_a_shared_pid_namespace() -> Result<()> {
    const CONTAINERS: usize = 30;
    rootful(|daemon| {
        let canary = Canary::new(daemon)?;
        let shared = v1::NamespaceOption { pid: v1::NamespaceMode::Pod.into(), ..Default::default() };
        let mut config = daemon.pod_config("look");
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().namespace_options = Some(shared.clone());
        let pod = daemon.pod_of(config)?;
        let in_shared = |mut config: v1::ContainerConfig| {
            security(&mut config).namespace_options = Some(shared.clone());
            config
        };
        let looks = pod.start(in_shared(may_trace(shell("looks", &look_for_the_host(canary.path()?)))))?;
        for number in 0..CONTAINERS {
            pod.start(in_shared(idle(&format!("c{number}"))))?.remove()?;
        }
        looks.sh("touch /tmp/over")?;
        // They are in it all the same, with a /proc that says so and a terminal if they asked for one.
        let mut config =
            in_shared(shell("terminal", "grep Name /proc/1/status; [ -e /proc/$$ ] && [ -t 0 ] && echo own"));
        config.tty = true;
        assert_eq!(pod.run_container(config)?.stdout, "Name:\tberth-pause\nown\n");
        assert_eq!(seen_by(&looks)?, BTreeSet::from(["over".to_owned()]));
        canary.is_untouched()
    })
}
