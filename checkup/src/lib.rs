//! Checks what a node needs for Berth, from files alone.
//!
//! For `berth doctor`, which also works without a daemon, and for the daemon's log when it starts:
//! both report the same. Every path is resolved below a root directory, so that tests can build a
//! node from plain files. Nothing is changed, no program is run, no socket opened.
#![forbid(unsafe_code)]

mod cni;
mod disk;
mod firewall;
mod host;
mod kubelet;
mod runtimes;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grade {
    /// As it should be.
    Good,
    /// Works, but may surprise.
    Note,
    /// Some or all pods will not run.
    Broken,
}

/// One line of the report: the subject, the finding and, unless it is good, what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub grade: Grade,
    /// A word.
    pub subject: Cow<'static, str>,
    /// A sentence without line ends.
    pub text: String,
}

/// Makes a finding.
pub fn finding(grade: Grade, subject: &'static str, text: impl Into<String>) -> Finding {
    Finding { grade, subject: Cow::Borrowed(subject), text: text.into() }
}

/// What the checks need to know about the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Daemon {
    /// Its persistent directory.
    pub root: PathBuf,
    /// Its directory for state that does not survive a reboot.
    pub state: PathBuf,
    /// Its socket.
    pub socket: PathBuf,
    /// `cgroupfs` or `systemd`; empty where it is not known.
    pub cgroup_driver: String,
    /// Where its pods get their network from: `bridge` for the built-in one only; else the node's
    /// CNI configuration counts.
    pub network_kind: String,
    /// Its directory of CNI configurations.
    pub cni_config_directory: PathBuf,
    /// Its directories of CNI plugins.
    pub cni_plugin_directories: Vec<PathBuf>,
    /// The interface of its bridge.
    pub bridge: String,
    /// Bytes that images leave free, and the key of the configuration is `image.min_free_bytes`.
    pub min_free_bytes: u64,
    /// The same as a share in percent, `image.min_free_percent`. The larger one counts.
    pub min_free_percent: u8,
    /// The socket that it serves for cAdvisor, which has CRI-O's path.
    pub cadvisor_socket: Option<PathBuf>,
}

impl Default for Daemon {
    /// One without a configuration: docs/configuration.md.
    fn default() -> Self {
        Self {
            root: "/var/lib/berth".into(),
            state: "/run/berth".into(),
            socket: "/run/berth/berth.sock".into(),
            cgroup_driver: String::new(),
            network_kind: "auto".to_owned(),
            cni_config_directory: "/etc/cni/net.d".into(),
            cni_plugin_directories: ["/opt/cni/bin", "/usr/lib/cni"].map(PathBuf::from).into(),
            bridge: "berth0".to_owned(),
            min_free_bytes: 1 << 30,
            min_free_percent: 5,
            cadvisor_socket: None,
        }
    }
}

/// Checks the node whose files are below `node`, including the directories of `daemon`.
#[must_use]
pub fn look(node: &Path, daemon: &Daemon) -> Vec<Finding> {
    let mut findings = host::look(node);
    findings.extend(cni::look(node, daemon));
    findings.extend(firewall::look(node, daemon));
    findings.extend(disk::look(node, daemon));
    findings.extend(runtimes::look(node, daemon));
    findings.extend(kubelet::look(node, daemon));
    findings
}

/// A path of the node below `node`.
fn below(node: &Path, path: &Path) -> PathBuf {
    node.join(path.strip_prefix("/").unwrap_or(path))
}

/// A path as it is without the link `/var/run`.
fn without_var(path: &str) -> &str {
    match path.strip_prefix("/var") {
        Some(rest) if rest.starts_with("/run/") => rest,
        _ => path,
    }
}

/// The text of a small file, without its last line's end; none when it cannot be read.
fn text(node: &Path, path: &str) -> Option<String> {
    let text = std::fs::read_to_string(node.join(path)).ok()?;
    Some(text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// A node that lacks nothing.
    const NODE: [(&str, &str); 9] = [
        ("proc/sys/kernel/osrelease", "6.12.48+deb13-amd64\n"),
        ("proc/filesystems", "nodev\tsysfs\nnodev\toverlay\n"),
        ("proc/self/mountinfo", "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"),
        ("proc/sys/net/bridge/bridge-nf-call-iptables", "1\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n"),
        ("usr/sbin/nft", ""),
        ("proc/sys/net/ipv4/ip_forward", "1\n"),
        ("sys/module/apparmor/parameters/enabled", "N\n"),
        ("var/lib/berth/berthd.lock", ""),
    ];

    /// A daemon that takes the disk of the tests as it is.
    pub(crate) fn daemon() -> Daemon {
        Daemon {
            min_free_bytes: 0,
            min_free_percent: 0,
            cgroup_driver: "systemd".into(),
            ..Daemon::default()
        }
    }

    /// That node with these files besides or instead; without one where the text is none.
    pub(crate) fn node(changes: &[(&str, Option<&str>)]) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let whole = NODE.map(|(path, text)| (path, Some(text)));
        for (path, text) in whole.iter().chain(changes) {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match text {
                Some(text) => fs::write(path, text).unwrap(),
                None => fs::remove_file(path).unwrap(),
            }
        }
        directory
    }

    /// The findings on it that are not good.
    pub(crate) fn troubles(changes: &[(&str, Option<&str>)], daemon: &Daemon) -> Vec<Finding> {
        let mut findings = look(node(changes).path(), daemon);
        assert!(findings.iter().all(|finding| !finding.text.contains('\n')), "{findings:?}");
        findings.retain(|finding| finding.grade != Grade::Good);
        findings
    }

    /// That each file, instead or besides, makes this one trouble, with these words in its text.
    #[track_caller]
    pub(crate) fn each_is_named(cases: &[(&str, Option<&str>, Grade, &str, &str)]) {
        for (path, text, grade, subject, words) in cases {
            // A kubelet waits for a CNI configuration, which is another finding.
            let kind = if *subject == "kubelet" { "bridge" } else { "auto" };
            let daemon = Daemon { network_kind: kind.to_owned(), ..daemon() };
            let troubles = troubles(&[(path, *text)], &daemon);
            let [trouble] = troubles.as_slice() else { panic!("{path} {text:?}: {troubles:?}") };
            assert_eq!(
                (&trouble.grade, trouble.subject.as_ref()),
                (grade, *subject),
                "{path} {text:?}: {trouble:?}"
            );
            assert!(trouble.text.contains(words), "{path} {text:?}: {trouble:?}");
        }
    }

    #[test]
    fn a_whole_node_is_good() {
        assert_eq!(troubles(&[], &daemon()), []);
    }

    #[test]
    fn a_directory_without_anything_is_survived() {
        let empty = tempfile::tempdir().unwrap();
        assert!(look(empty.path(), &daemon()).iter().any(|finding| finding.grade == Grade::Broken));
        assert!(!look(Path::new("/no/such/directory"), &daemon()).is_empty());
    }
}
