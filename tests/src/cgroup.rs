//! A private cgroup for what a test starts: created below the root of every hierarchy, read, and
//! removed.
//!
//! Works on cgroup v1, on v2, and on hybrid machines, where the controllers are on v1 hierarchies
//! and the v2 one has none (`cgroups(7)`, "Cgroups version 2"); runtimes and kubelets create their
//! cgroups there all the same. Limits are read as numbers, from either version.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::program::output;

/// The controllers that a kubelet requires in the cgroup it is given.
const CONTROLLERS: &str = "+cpuset +cpu +io +memory +hugetlb +pids";

/// The creator of pods' cgroups: `[cgroup] driver` in a daemon's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// The daemon itself.
    Cgroupfs,
    /// systemd, which has to be process 1, on cgroup v2.
    Systemd,
}

impl Driver {
    /// The driver that `BERTH_TEST_CGROUP_DRIVER` names for daemons of tests: `cgroupfs`, which is
    /// also the default because it works everywhere, or `systemd`.
    ///
    /// # Errors
    /// When it names something else.
    pub fn of_the_environment() -> Result<Self> {
        match std::env::var("BERTH_TEST_CGROUP_DRIVER").as_deref() {
            Err(_) | Ok("cgroupfs") => Ok(Self::Cgroupfs),
            Ok("systemd") => Ok(Self::Systemd),
            Ok(other) => bail!("BERTH_TEST_CGROUP_DRIVER is {other:?}, not cgroupfs or systemd"),
        }
    }
}

/// A hierarchy of the machine.
#[derive(Debug)]
struct Hierarchy {
    /// Where it is mounted.
    mount: PathBuf,
    /// Its v1 controllers as the mount options name them; empty for v2 and for named hierarchies.
    controllers: Vec<String>,
}

/// A cgroup of one name in every hierarchy, removed on drop with everything below it and all
/// processes in it; or the machine's own root, which is only read.
#[derive(Debug)]
pub struct Cgroup {
    /// Empty for the root.
    name: String,
    hierarchies: Vec<Hierarchy>,
    unified: bool,
    driver: Driver,
}

/// How much CPU time a cgroup may use: `quota_us` in every `period_us`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuLimit {
    /// Microseconds of CPU time.
    pub quota_us: u64,
    /// Microseconds of a period.
    pub period_us: u64,
}

impl Cgroup {
    /// Creates the cgroup `name` below the root of every hierarchy.
    ///
    /// # Errors
    /// When no hierarchy is mounted or a directory cannot be created; also when a cgroup of that
    /// name already exists, since it may belong to someone else.
    pub fn create(name: &str) -> Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
        let (hierarchies, unified) = hierarchies(&mountinfo);
        if hierarchies.is_empty() {
            bail!("no cgroup hierarchy is mounted");
        }
        let cgroup = Self { name: name.to_owned(), hierarchies, unified, driver: Driver::Cgroupfs };
        for directory in cgroup.directories() {
            if cgroup.unified
                && let Some(root) = directory.parent()
            {
                // A controller that the kernel lacks makes the whole write fail, so they are
                // enabled one at a time; a missing one shows when a limit is read.
                for controller in CONTROLLERS.split(' ') {
                    let _ = fs::write(root.join("cgroup.subtree_control"), controller);
                }
            }
            fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
            if cgroup.unified {
                for controller in CONTROLLERS.split(' ') {
                    let _ = fs::write(directory.join("cgroup.subtree_control"), controller);
                }
            }
        }
        Ok(cgroup)
    }

    /// Creates a cgroup by `driver`: `name` itself for cgroupfs; for systemd a slice below the
    /// root, with the name without its dashes, which would nest it (`systemd.slice(5)`).
    ///
    /// # Errors
    /// Those of [`create`](Self::create); for systemd, when the machine has cgroup v1, or
    /// systemctl(1) fails.
    pub fn create_by(driver: Driver, name: &str) -> Result<Self> {
        if driver == Driver::Cgroupfs {
            return Self::create(name);
        }
        let mut slice = Self::of_the_machine()?;
        ensure!(slice.unified, "the systemd driver needs cgroup v2");
        slice.name = format!("{}.slice", name.replace('-', ""));
        slice.driver = driver;
        output(Command::new("systemctl").args(["start", &slice.name]))?;
        Ok(slice)
    }

    /// The driver that created it, and creates the cgroups below it.
    #[must_use]
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// Its name as `[cgroup] parent` has it: a path, or a slice.
    #[must_use]
    pub fn parent(&self) -> String {
        match self.driver {
            Driver::Cgroupfs => self.path(),
            Driver::Systemd => self.name.clone(),
        }
    }

    /// The root of every hierarchy, which is never changed.
    ///
    /// # Errors
    /// When no hierarchy is mounted.
    pub fn of_the_machine() -> Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
        let (hierarchies, unified) = hierarchies(&mountinfo);
        if hierarchies.is_empty() {
            bail!("no cgroup hierarchy is mounted");
        }
        Ok(Self { name: String::new(), hierarchies, unified, driver: Driver::Cgroupfs })
    }

    /// The directory of this cgroup in the hierarchy that has `controller`.
    ///
    /// # Errors
    /// When there is no such hierarchy.
    pub fn directory(&self, controller: &str) -> Result<PathBuf> {
        let hierarchy = self
            .hierarchies
            .iter()
            .find(|hierarchy| self.unified || hierarchy.controllers.iter().any(|name| name == controller))
            .with_context(|| format!("no hierarchy has the controller {controller}"))?;
        Ok(hierarchy.mount.join(&self.name))
    }

    /// Its path as the kernel and a kubelet's `cgroupRoot` name it.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/{}", self.name)
    }

    /// The memory limit in bytes of the cgroup below this one whose name contains `id`.
    ///
    /// # Errors
    /// When there is no such cgroup, or its limit is not a number (v2 writes `max` for none).
    pub fn memory_limit_bytes(&self, id: &str) -> Result<u64> {
        let file = if self.unified { "memory.max" } else { "memory.limit_in_bytes" };
        let text = self.read("memory", id, file)?;
        text.trim().parse().with_context(|| format!("{file} of {id} says {text:?}"))
    }

    /// The CPU limit of the cgroup below this one whose name contains `id`.
    ///
    /// # Errors
    /// When there is no such cgroup, or it has no limit (`-1` on v1, `max` on v2).
    pub fn cpu_limit(&self, id: &str) -> Result<CpuLimit> {
        let text = if self.unified {
            self.read("cpu", id, "cpu.max")?
        } else {
            let quota = self.read("cpu", id, "cpu.cfs_quota_us")?;
            quota.trim().to_owned() + " " + &self.read("cpu", id, "cpu.cfs_period_us")?
        };
        let mut numbers = text.split_whitespace().map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(quota_us)), Some(Ok(period_us))) => Ok(CpuLimit { quota_us, period_us }),
            _ => bail!("the cpu limit of {id} says {text:?}"),
        }
    }

    /// The names of every cgroup below this one that contain `part`, in any hierarchy.
    #[must_use]
    pub fn below(&self, part: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for directory in self.directories() {
            walk(&directory, &mut |path| {
                if path.file_name().is_some_and(|name| name.to_string_lossy().contains(part)) {
                    found.push(path.to_owned());
                }
            });
        }
        found
    }

    /// A file of the cgroup below this one whose name contains `id`, in the hierarchy of
    /// `controller`.
    ///
    /// # Errors
    /// When there is no such cgroup, or it has no such file.
    pub fn read(&self, controller: &str, id: &str, file: &str) -> Result<String> {
        let mut found = None;
        walk(&self.directory(controller)?, &mut |path| {
            if path.file_name().is_some_and(|name| name.to_string_lossy().contains(id)) {
                found.get_or_insert(path.join(file));
            }
        });
        let path = found.with_context(|| format!("no {controller} cgroup of {id} below {}", self.path()))?;
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Whether the machine has one v2 hierarchy and none of v1: then files have other names.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        self.unified
    }

    /// Kills every process in this cgroup and below.
    ///
    /// # Panics
    /// For the machine's own root.
    pub fn end_everything(&self) {
        assert!(!self.name.is_empty(), "the machine's own processes are not the test's");
        for directory in self.directories() {
            walk(&directory, &mut end_processes);
        }
    }

    /// Its directory in every hierarchy.
    #[must_use]
    pub fn directories(&self) -> Vec<PathBuf> {
        self.hierarchies.iter().map(|hierarchy| hierarchy.mount.join(&self.name)).collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Cgroup {
    /// Removes it from every hierarchy, with everything below it and all processes in it. It may be
    /// created again, by others too, and is then removed on drop.
    pub fn remove(&self) {
        if self.name.is_empty() {
            return;
        }
        if self.driver == Driver::Systemd {
            // Otherwise systemd asks its processes to end first, and waits.
            self.end_everything();
            let _ = output(Command::new("systemctl").args(["stop", &self.name]));
        }
        // A killed process leaves its cgroup a moment later, and only an empty cgroup can be
        // removed.
        for _ in 0..100 {
            let left: Vec<PathBuf> =
                self.directories().into_iter().filter(|directory| directory.exists()).collect();
            if left.is_empty() {
                return;
            }
            for directory in left {
                let mut depth_first = Vec::new();
                walk(&directory, &mut |path| depth_first.push(path.to_owned()));
                for path in depth_first.iter().rev() {
                    end_processes(path);
                    let _ = fs::remove_dir(path);
                }
            }
            sleep(Duration::from_millis(20));
        }
    }
}

/// Kills the processes in this cgroup itself.
fn end_processes(cgroup: &Path) {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    for pid in processes.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Calls `visit` with `directory` and every directory below it, parents first. Directories that
/// vanish meanwhile are skipped.
fn walk(directory: &Path, visit: &mut impl FnMut(&Path)) {
    visit(directory);
    let entries: io::Result<Vec<_>> = fs::read_dir(directory).and_then(Iterator::collect);
    for entry in entries.unwrap_or_default() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), visit);
        }
    }
}

/// The hierarchies in the text of `/proc/PID/mountinfo` (`proc_pid_mountinfo(5)`), and whether
/// there is none of v1.
fn hierarchies(mountinfo: &str) -> (Vec<Hierarchy>, bool) {
    let mut found = Vec::new();
    let mut unified = true;
    for line in mountinfo.lines() {
        let Some((mount, source)) = line.split_once(" - ") else { continue };
        let Some(mount) = mount.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut source = source.split(' ');
        let kind = source.next().unwrap_or_default();
        let options = source.nth(1).unwrap_or_default();
        match kind {
            "cgroup" => {
                let controllers =
                    options.split(',').filter(|option| !option.contains('=')).map(str::to_owned).collect();
                found.push(Hierarchy { mount, controllers });
                unified = false;
            }
            "cgroup2" => found.push(Hierarchy { mount, controllers: Vec::new() }),
            _ => {}
        }
    }
    (found, unified)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_machine_has_its_controllers_on_v1() {
        let (found, unified) = hierarchies(
            "29 23 0:25 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
             30 29 0:26 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n\
             31 29 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
             32 29 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
             33 29 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
             garbage\n",
        );
        assert!(!unified);
        let mounts: Vec<_> = found.iter().map(|hierarchy| hierarchy.mount.to_string_lossy()).collect();
        assert_eq!(
            mounts,
            ["memory", "cpu,cpuacct", "systemd", "unified"].map(|name| format!("/sys/fs/cgroup/{name}"))
        );
        assert!(found[1].controllers.contains(&"cpu".to_owned()));
        assert!(!found[2].controllers.contains(&"systemd".to_owned()));
    }

    #[test]
    fn a_unified_machine_has_one_hierarchy() {
        let (found, unified) =
            hierarchies("30 29 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate");
        assert!(unified);
        assert_eq!(found.len(), 1);
    }
}
