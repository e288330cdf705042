//! A census of everything that a daemon and its pods hold on a machine, to check that they left
//! nothing behind.
//!
//! Processes, mounts, links, firewall rules, cgroups, files, and the daemon's own descriptors, each
//! as a sorted list of texts that stay the same as long as the object exists. Network namespaces
//! show up as mounts (pinned), as processes (in use) or as descriptors (held).

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use berth_cri::v1;

use crate::daemon::{Daemon, SOON};
use crate::deadline::within;

/// The lists that a restart of the daemon changes by itself.
const OF_THE_DAEMON: [&str; 2] = ["daemon", "descriptors"];

/// The objects that exist at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(Vec<(&'static str, Vec<String>)>);

impl Census {
    /// Counts everything that belongs to `daemon`, once the kernel has removed the links of pods
    /// that are gone, and the daemon their addresses and files; both take their time.
    ///
    /// # Errors
    /// When a tool that lists something fails, more links stay than there are pods, or the trash is
    /// not emptied.
    pub fn take(daemon: &Daemon) -> Result<Self> {
        let client = daemon.client();
        within(SOON, "links are there for pods that are there only", || {
            let mut pods = 0;
            for sandbox in client.sandboxes(v1::PodSandboxFilter::default())? {
                let network = client.sandbox(&sandbox.id)?.network.unwrap_or_default();
                let ready = sandbox.state() == v1::PodSandboxState::SandboxReady;
                pods += usize::from(ready && !network.ip.is_empty());
            }
            let links = daemon.host().run("ip", &["-oneline", "link", "show", "type", "veth"])?;
            Ok((links.lines().count() <= pods && pod_addresses(daemon)? <= pods).then_some(()))
        })?;
        within(SOON, "the trash is empty", || {
            Ok(daemon.root().join("trash").read_dir()?.next().is_none().then_some(()))
        })?;
        within(SOON, "shims are there for containers that are there only", || {
            let containers = client.containers(v1::ContainerFilter::default())?;
            let living = containers
                .iter()
                .filter(|found| found.state() != v1::ContainerState::ContainerExited)
                .count();
            let is_shim = |process: &&String| process.contains(" berth-shim");
            // Each has one child for its log.
            Ok((processes(daemon)?.iter().filter(is_shim).count() <= 2 * living).then_some(()))
        })?;
        Self::now(daemon)
    }

    fn now(daemon: &Daemon) -> Result<Self> {
        let host = daemon.host();
        let links = host.run("ip", &["-oneline", "link", "show"])?;
        let links = links.lines().filter_map(|line| line.split(": ").nth(1)).map(str::to_owned).collect();
        // Stateless: without packet counters, which change by themselves.
        let rules = host.run("nft", &["-s", "list", "ruleset"])?.lines().map(str::to_owned).collect();
        let text = |paths: Vec<PathBuf>| paths.iter().map(|path| path.display().to_string()).collect();
        let mut cgroups: Vec<String> = text(daemon.cgroup().below(""));
        cgroups.sort();
        Ok(Self(vec![
            ("daemon", vec![daemon.pid()?.to_string()]),
            ("processes", processes(daemon)?),
            ("mounts", text(mounts_below(daemon.dir()))),
            ("links", links),
            ("firewall rules", rules),
            ("cgroups", cgroups),
            ("files", files(daemon)),
            ("descriptors", descriptors(daemon.pid()?)),
        ]))
    }

    /// The same without the daemon's own process and descriptors: for tests that restart it.
    #[must_use]
    pub fn without_the_daemon(mut self) -> Self {
        self.0.retain(|(kind, _)| !OF_THE_DAEMON.contains(kind));
        self
    }

    /// Waits until everything is the same as in this census. Some objects disappear a moment after
    /// the call that ended them has answered.
    ///
    /// # Errors
    /// When objects are still missing or left over after that; the message names them.
    pub fn stays(&self, daemon: &Daemon) -> Result<()> {
        within(SOON, "what is there is what was there before", || {
            let mut now = Self::now(daemon)?;
            now.0.retain(|(kind, _)| self.0.iter().any(|(counted, _)| counted == kind));
            if now == *self {
                return Ok(Some(()));
            }
            bail!("{}", self.difference(&now).join("; "))
        })
    }

    fn difference(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for ((kind, before), (_, after)) in self.0.iter().zip(&now.0) {
            for (word, gone) in [("missing", lacking(before, after)), ("left", lacking(after, before))] {
                if !gone.is_empty() {
                    found.push(format!("{kind} {word}: {}", gone.join(", ")));
                }
            }
        }
        found
    }
}

/// The elements that `of` has and `from` lacks, counting repetitions.
fn lacking(of: &[String], from: &[String]) -> Vec<String> {
    let mut rest = from.to_vec();
    let mut lacking = Vec::new();
    for one in of {
        match rest.iter().position(|other| other == one) {
            Some(at) => drop(rest.swap_remove(at)),
            None => lacking.push(one.clone()),
        }
    }
    lacking
}

/// The mount points at and below `dir`, in the order of mounting, and more than once where mounts
/// are stacked.
#[must_use]
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    places.filter(|place| place.starts_with(dir)).collect()
}

/// How many IPv4 addresses of the built-in bridge are taken.
///
/// # Errors
/// When the records cannot be listed.
pub fn pod_addresses(daemon: &Daemon) -> Result<usize> {
    let mut taken = 0;
    for bridge in fs::read_dir(daemon.root().join("network")).into_iter().flatten() {
        let path = bridge?.path();
        for record in fs::read_dir(path).into_iter().flatten() {
            let name = record?.file_name();
            taken += usize::from(name.to_str().is_some_and(|name| name.parse::<Ipv4Addr>().is_ok()));
        }
    }
    Ok(taken)
}

/// The processes in the network namespace with this number, in any cgroup.
#[must_use]
pub fn processes_in_network(number: u64) -> Vec<i32> {
    let inside = |pid: &i32| {
        fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|namespace| namespace.ino() == number)
    };
    all_processes().filter(inside).collect()
}

/// A process's parent (`proc_pid_status(5)`, `PPid`).
#[must_use]
pub fn parent(pid: i32) -> Option<i32> {
    status_field(pid, "PPid").and_then(|text| text.parse().ok())
}

/// Whether a process has a child of this name: proc_pid_task(5), `children`. Also `true` when the
/// process has ended.
#[must_use]
pub fn has_child(pid: i32, name: &str) -> bool {
    let Ok(children) = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")) else { return true };
    children.split_whitespace().any(|child| {
        fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|comm| comm.trim_end() == name)
    })
}

/// The children of a process: proc_pid_task(5), `children`, of all its threads.
///
/// # Errors
/// When it has ended.
pub fn children(pid: i32) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let listed = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
        found.extend(listed.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
    }
    Ok(found)
}

/// How many processes of the container `id` wait in the kernel and ignore every signal.
///
/// # Errors
/// When it has none.
pub fn waiting_in_kernel(daemon: &Daemon, id: &str) -> Result<usize> {
    let listed = daemon.cgroup().read("memory", id, "cgroup.procs")?;
    let state = |pid: &str| status_field(pid.parse().ok()?, "State");
    Ok(listed.lines().filter_map(state).filter(|state| state.starts_with('D')).count())
}

/// A field of `/proc/PID/status`, without surrounding white space.
#[must_use]
pub fn status_field(pid: i32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

fn all_processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(std::result::Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The name of the daemon's workers, which look at host paths. It keeps one, not always the same.
pub const WORKER: &str = "berthd-hostpath";

/// Processes on the daemon's host, in its cgroup, or its children; including dead ones, since a
/// process has to wait for them.
fn processes(daemon: &Daemon) -> Result<Vec<String>> {
    let (host, cgroup) = (daemon.host().number()?, daemon.cgroup().path());
    let parent_pid = i32::try_from(daemon.pid()?)?;
    let on_host = processes_in_network(host);
    let mut found = Vec::new();
    for pid in all_processes().filter(|pid| *pid != parent_pid) {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if on_host.contains(&pid) || cgroups.contains(&cgroup) || parent(pid) == Some(parent_pid) {
            let name = status_field(pid, "Name").unwrap_or_default();
            let state = status_field(pid, "State").unwrap_or_default();
            let dead = if state.starts_with('Z') { " (dead)" } else { "" };
            if name == WORKER && dead.is_empty() {
                continue;
            }
            found.push(format!("{pid} {name}{dead}"));
        }
    }
    found.sort();
    Ok(found)
}

/// The files that the daemon keeps below its root and its state.
fn files(daemon: &Daemon) -> Vec<String> {
    let mut found = Vec::new();
    for top in [daemon.root(), daemon.state()] {
        walk(&top, &mut found);
    }
    let mut found: Vec<String> = found
        .iter()
        .map(|path| path.strip_prefix(daemon.dir()).unwrap_or(path).display().to_string())
        .collect();
    found.sort();
    found
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().filter_map(std::result::Result::ok) {
        found.push(entry.path());
        // The content of layers comes from the image, and is large.
        let is_layers = entry.file_name() == "layers" || directory.ends_with("layers");
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !(is_layers && directory.ends_with("layers"))
        {
            walk(&entry.path(), found);
        }
    }
}

/// The open files of a process, without the numbers that differ from one socket or pipe to the
/// next.
fn descriptors(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let mut found: Vec<String> = targets
        .map(|target| {
            let target = target.display().to_string();
            target.split_once(":[").map(|(kind, _)| kind.to_owned()).unwrap_or(target)
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn census(processes: &[&str]) -> Census {
        Census(vec![("processes", processes.iter().map(|name| (*name).to_owned()).collect())])
    }

    #[test]
    fn a_difference_is_told_in_both_directions_and_counts() {
        let before = census(&["a", "b", "b"]);
        assert!(before.difference(&before).is_empty());
        assert_eq!(before.difference(&census(&["b", "c"])), ["processes missing: a, b", "processes left: c"]);
    }
}
