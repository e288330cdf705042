//! What a node needs for Berth and has or lacks, from files alone.
//!
//! Every path is looked up below a folder, so that tests can make a node of plain files. Nothing is changed, no program is run.

use std::fs;
use std::path::Path;

/// The oldest kernel that berthd takes, as major and minor number.
const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// Where berthd looks for `nft`.
const PROGRAM_FOLDERS: [&str; 4] = ["usr/sbin", "sbin", "usr/bin", "bin"];

/// The sockets of other runtimes where kubeadm looks for them, with whose each is.
const OTHER_SOCKETS: [(&str, &str); 3] = [
    ("run/containerd/containerd.sock", "containerd"),
    ("run/crio/crio.sock", "CRI-O"),
    ("run/cri-dockerd.sock", "cri-dockerd"),
];

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grade {
    /// As it should be.
    Good,
    /// Works, and may surprise.
    Note,
    /// Pods will not run.
    Broken,
}

/// One line of the report: on what, and what is found; unless it is good, also what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) grade: Grade,
    pub(crate) subject: &'static str,
    pub(crate) text: String,
}

/// Makes a finding.
pub(crate) fn finding(grade: Grade, subject: &'static str, text: impl Into<String>) -> Finding {
    Finding { grade, subject, text: text.into() }
}

/// Looks at the node whose files are below `root`.
pub(crate) fn look(root: &Path) -> Vec<Finding> {
    let mut findings = vec![
        kernel(root),
        overlay(root),
        cgroups(root),
        nft(root),
        forwarding(root),
        apparmor(root),
        cni(root),
    ];
    findings.extend(OTHER_SOCKETS.iter().filter(|(path, _)| root.join(path).exists()).map(|(path, name)| {
        let text = format!(
            "{name} has a socket at /{path}: kubeadm finds it too; pass --cri-socket, or stop {name} and remove the file"
        );
        finding(Grade::Note, "runtimes", text)
    }));
    findings
}

/// The text of a small file, without its last line's end; none when it cannot be read.
fn text(root: &Path, path: &str) -> Option<String> {
    fs::read_to_string(root.join(path)).ok().map(|text| text.trim_end().to_owned())
}

fn has_program(root: &Path, name: &str) -> bool {
    PROGRAM_FOLDERS.iter().any(|folder| root.join(folder).join(name).exists())
}

fn kernel(root: &Path) -> Finding {
    let Some(release) = text(root, "proc/sys/kernel/osrelease") else {
        return finding(Grade::Broken, "kernel", "its version cannot be read: mount /proc");
    };
    match version(&release) {
        Some(version) if version >= OLDEST_KERNEL => finding(Grade::Good, "kernel", release),
        Some(_) => finding(Grade::Broken, "kernel", format!("{release} is too old: boot 5.15 or newer")),
        None => finding(Grade::Note, "kernel", format!("{release} is no version; 5.15 or newer is needed")),
    }
}

/// Major and minor number of a release like `6.12.48+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let minor = rest.split(|character: char| !character.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn overlay(root: &Path) -> Finding {
    let known = text(root, "proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        finding(Grade::Good, "overlay", "the kernel has it")
    } else {
        finding(Grade::Note, "overlay", "not loaded yet; if pods fail with it: modprobe overlay")
    }
}

fn cgroups(root: &Path) -> Finding {
    if let Some(controllers) = text(root, "sys/fs/cgroup/cgroup.controllers") {
        let has = |name: &&str| !controllers.split_whitespace().any(|controller| controller == *name);
        let missing: Vec<&str> = ["cpu", "memory", "pids"].into_iter().filter(has).collect();
        if missing.is_empty() {
            return finding(Grade::Good, "cgroups", "version 2");
        }
        let missing = missing.join(", ");
        let text = format!(
            "version 2 without {missing}: take cgroup_disable= and v1 options from the kernel's command line"
        );
        return finding(Grade::Broken, "cgroups", text);
    }
    if root.join("sys/fs/cgroup/memory").is_dir() {
        let text = "version 1: works, but a newer kubelet wants failCgroupV1: false, or boot with systemd.unified_cgroup_hierarchy=1";
        return finding(Grade::Note, "cgroups", text);
    }
    finding(Grade::Broken, "cgroups", "none at /sys/fs/cgroup: mount cgroup2 there")
}

fn nft(root: &Path) -> Finding {
    if has_program(root, "nft") {
        finding(Grade::Good, "firewall", "nft is there")
    } else {
        finding(Grade::Broken, "firewall", "there is no nft: install the package nftables")
    }
}

fn forwarding(root: &Path) -> Finding {
    match text(root, "proc/sys/net/ipv4/ip_forward").as_deref() {
        Some("1") => finding(Grade::Good, "forwarding", "on"),
        Some(_) => finding(
            Grade::Broken,
            "forwarding",
            "off, so pods reach nothing outside: start berthd, or sysctl -w net.ipv4.ip_forward=1",
        ),
        None => finding(Grade::Broken, "forwarding", "cannot be read: mount /proc"),
    }
}

fn apparmor(root: &Path) -> Finding {
    let enabled =
        text(root, "sys/module/apparmor/parameters/enabled").is_some_and(|text| text.starts_with('Y'));
    match (enabled, has_program(root, "apparmor_parser")) {
        (true, true) => finding(Grade::Good, "apparmor", "on, with its parser"),
        (true, false) => finding(
            Grade::Note,
            "apparmor",
            "on, but pods run without a profile: install the package apparmor and restart berthd",
        ),
        (false, _) => {
            finding(Grade::Good, "apparmor", "not in this kernel; pods that name a profile are refused")
        }
    }
}

fn cni(root: &Path) -> Finding {
    let files = fs::read_dir(root.join("etc/cni/net.d")).map(|entries| {
        entries
            .flatten()
            .filter(|entry| {
                let extension = entry.path().extension().map(|text| text.to_string_lossy().into_owned());
                matches!(extension.as_deref(), Some("conf" | "conflist" | "json"))
            })
            .count()
    });
    match files {
        Ok(1..) => finding(
            Grade::Note,
            "network",
            "/etc/cni/net.d has a configuration, which is not used: Berth gives pods its own bridge",
        ),
        _ => finding(Grade::Good, "network", "Berth's own bridge; no CNI configuration is in the way"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node that lacks nothing.
    const NODE: [(&str, &str); 6] = [
        ("proc/sys/kernel/osrelease", "6.12.48+deb13-amd64\n"),
        ("proc/filesystems", "nodev\tsysfs\nnodev\toverlay\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n"),
        ("usr/sbin/nft", ""),
        ("proc/sys/net/ipv4/ip_forward", "1\n"),
        ("sys/module/apparmor/parameters/enabled", "N\n"),
    ];

    /// The findings that are not good, on that node with these files besides or instead; without one where the text is none.
    fn troubles(changes: &[(&str, Option<&str>)]) -> Vec<(Grade, &'static str)> {
        let folder = tempfile::tempdir().unwrap();
        let whole = NODE.map(|(path, text)| (path, Some(text)));
        for (path, text) in whole.iter().chain(changes) {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match text {
                Some(text) => fs::write(path, text).unwrap(),
                None => fs::remove_file(path).unwrap(),
            }
        }
        let findings = look(folder.path());
        assert!(findings.iter().all(|finding| !finding.text.contains('\n')), "{findings:?}");
        let bad = findings.iter().filter(|finding| finding.grade != Grade::Good);
        bad.map(|finding| (finding.grade, finding.subject)).collect()
    }

    #[test]
    fn a_whole_node_is_good() {
        assert_eq!(troubles(&[]), []);
    }

    #[test]
    fn each_trouble_is_named_and_nothing_else() {
        for (path, text, expected) in [
            ("proc/sys/kernel/osrelease", Some("5.14.0-427.el9.x86_64"), (Grade::Broken, "kernel")),
            ("proc/sys/kernel/osrelease", Some("4.19.0"), (Grade::Broken, "kernel")),
            ("proc/sys/kernel/osrelease", Some("six"), (Grade::Note, "kernel")),
            ("proc/sys/kernel/osrelease", Some(""), (Grade::Note, "kernel")),
            ("proc/sys/kernel/osrelease", None, (Grade::Broken, "kernel")),
            ("proc/filesystems", Some("nodev\tnot-overlay\n"), (Grade::Note, "overlay")),
            ("sys/fs/cgroup/cgroup.controllers", Some("cpu pids\n"), (Grade::Broken, "cgroups")),
            ("sys/fs/cgroup/cgroup.controllers", Some(""), (Grade::Broken, "cgroups")),
            ("sys/fs/cgroup/cgroup.controllers", None, (Grade::Broken, "cgroups")),
            ("usr/sbin/nft", None, (Grade::Broken, "firewall")),
            ("proc/sys/net/ipv4/ip_forward", Some("0\n"), (Grade::Broken, "forwarding")),
            ("proc/sys/net/ipv4/ip_forward", None, (Grade::Broken, "forwarding")),
            ("sys/module/apparmor/parameters/enabled", Some("Y\n"), (Grade::Note, "apparmor")),
            ("etc/cni/net.d/10-flannel.conflist", Some("{}"), (Grade::Note, "network")),
            ("run/containerd/containerd.sock", Some(""), (Grade::Note, "runtimes")),
            ("run/crio/crio.sock", Some(""), (Grade::Note, "runtimes")),
        ] {
            assert_eq!(troubles(&[(path, text)]), [expected], "{path} {text:?}");
        }
    }

    #[test]
    fn what_only_looks_like_trouble_is_none() {
        for (path, text) in [
            ("proc/sys/kernel/osrelease", "5.15.0"),
            ("proc/sys/kernel/osrelease", "6.1-rc1"),
            ("etc/cni/net.d/README", ""),
            ("sbin/apparmor_parser", ""),
        ] {
            assert_eq!(troubles(&[(path, Some(text))]), [], "{path} {text:?}");
        }
        let parser = ("sbin/apparmor_parser", Some(""));
        assert_eq!(troubles(&[("sys/module/apparmor/parameters/enabled", Some("Y")), parser]), []);
    }

    #[test]
    fn the_first_version_of_cgroups_is_told_from_none() {
        let v1 = ("sys/fs/cgroup/memory/tasks", Some(""));
        let none = ("sys/fs/cgroup/cgroup.controllers", None);
        assert_eq!(troubles(&[none, v1]), [(Grade::Note, "cgroups")]);
    }
}
