//! The kernel, its settings, and the programs that Berth runs.

use std::path::{Path, PathBuf};

use crate::{Finding, Grade, finding, text};

/// The oldest supported kernel, as major and minor number.
const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// Where berthd looks for `nft`.
const PROGRAM_DIRECTORIES: [&str; 4] = ["usr/sbin", "sbin", "usr/bin", "bin"];

pub(crate) fn look(node: &Path) -> Vec<Finding> {
    vec![
        kernel(node),
        overlay(node),
        cgroups(node),
        nft(node),
        forwarding(node),
        bridge_filter(node),
        apparmor(node),
        programs_in_memory(node),
    ]
}

/// A program of the system.
pub(crate) fn program(node: &Path, name: &str) -> Option<PathBuf> {
    PROGRAM_DIRECTORIES.iter().map(|directory| node.join(directory).join(name)).find(|path| path.exists())
}

fn kernel(node: &Path) -> Finding {
    let Some(release) = text(node, "proc/sys/kernel/osrelease") else {
        return finding(Grade::Broken, "kernel", "cannot read its version: mount /proc");
    };
    match version(&release) {
        Some(version) if version >= OLDEST_KERNEL => finding(Grade::Good, "kernel", release),
        Some(_) => finding(Grade::Broken, "kernel", format!("{release} is too old: boot 5.15 or newer")),
        None => finding(
            Grade::Note,
            "kernel",
            format!("cannot parse the version {release}; 5.15 or newer is needed"),
        ),
    }
}

/// Major and minor number of a release like `6.12.48+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let minor = rest.split(|character: char| !character.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn overlay(node: &Path) -> Finding {
    let known = text(node, "proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        finding(Grade::Good, "overlay", "available")
    } else {
        finding(Grade::Note, "overlay", "not loaded yet; if pods cannot be created: modprobe overlay")
    }
}

fn cgroups(node: &Path) -> Finding {
    if let Some(controllers) = text(node, "sys/fs/cgroup/cgroup.controllers") {
        let has = |name: &&str| !controllers.split_whitespace().any(|controller| controller == *name);
        let missing: Vec<&str> = ["cpu", "memory", "pids"].into_iter().filter(has).collect();
        if missing.is_empty() {
            return finding(Grade::Good, "cgroups", "version 2");
        }
        let missing = missing.join(", ");
        let text = format!(
            "version 2 without {missing}: remove cgroup_disable= and v1 options from the kernel's command line"
        );
        return finding(Grade::Broken, "cgroups", text);
    }
    if node.join("sys/fs/cgroup/memory").is_dir() {
        // systemd's hybrid layout has version 2 beside it, without controllers: it counts as
        // version 1.
        let hybrid = if node.join("sys/fs/cgroup/unified").is_dir() { " (hybrid)" } else { "" };
        let text = format!(
            "version 1{hybrid}: works, but only with the cgroupfs driver, and newer kubelets need failCgroupV1: false; for version 2, boot with systemd.unified_cgroup_hierarchy=1"
        );
        return finding(Grade::Note, "cgroups", text);
    }
    finding(Grade::Broken, "cgroups", "none at /sys/fs/cgroup: mount cgroup2 there")
}

fn nft(node: &Path) -> Finding {
    if program(node, "nft").is_some() {
        finding(Grade::Good, "firewall", "nft is installed")
    } else {
        finding(Grade::Broken, "firewall", "nft is not installed: install the package nftables")
    }
}

fn forwarding(node: &Path) -> Finding {
    match text(node, "proc/sys/net/ipv4/ip_forward").as_deref() {
        Some("1") => finding(Grade::Good, "forwarding", "on"),
        Some(_) => finding(
            Grade::Broken,
            "forwarding",
            "off, so pods cannot reach other hosts: start berthd, or sysctl -w net.ipv4.ip_forward=1",
        ),
        None => finding(Grade::Broken, "forwarding", "cannot be read: mount /proc"),
    }
}

/// Packets between pods on one bridge pass the rules of kube-proxy, which change the address of a
/// Service into a pod's and back, only when the bridge shows them to the firewall. Berth sees to
/// that for its own bridge; CNI plugins that use one leave it to the node.
fn bridge_filter(node: &Path) -> Finding {
    match text(node, "proc/sys/net/bridge/bridge-nf-call-iptables").as_deref() {
        Some("1") => {
            finding(Grade::Good, "services", "the firewall sees the traffic between pods on this node")
        }
        Some(_) => finding(
            Grade::Note,
            "services",
            "pods on a CNI network with a Linux bridge may not reach Services with pods on this node: sysctl -w net.bridge.bridge-nf-call-iptables=1",
        ),
        None => finding(
            Grade::Note,
            "services",
            "pods on a CNI network with a Linux bridge may not reach Services with pods on this node: modprobe br_netfilter",
        ),
    }
}

fn apparmor(node: &Path) -> Finding {
    let enabled =
        text(node, "sys/module/apparmor/parameters/enabled").is_some_and(|text| text.starts_with('Y'));
    match (enabled, program(node, "apparmor_parser").is_some()) {
        (true, true) => finding(Grade::Good, "apparmor", "enabled, and apparmor_parser is installed"),
        (true, false) => finding(
            Grade::Broken,
            "apparmor",
            "enabled, but the default profile cannot be loaded, so containers are refused: install the package apparmor",
        ),
        (false, _) => {
            finding(Grade::Good, "apparmor", "not in this kernel; pods that name a profile are refused")
        }
    }
}

/// proc_sys_vm(5), `memfd_noexec`, Linux 6.3; a setting of each pid namespace.
fn programs_in_memory(node: &Path) -> Finding {
    match text(node, "proc/sys/vm/memfd_noexec").as_deref() {
        Some("2") => finding(
            Grade::Note,
            "memfd",
            "vm.memfd_noexec is 2: the shim runs from a read-only tmpfs instead of a memory file, and pods cannot execute memory files",
        ),
        _ => finding(Grade::Good, "memfd", "memory files can be executed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{daemon, each_is_named, node, troubles};

    #[test]
    fn each_trouble_of_the_host_is_named_and_nothing_else() {
        use Grade::{Broken, Note};
        each_is_named(&[
            ("proc/sys/kernel/osrelease", Some("5.14.0-427.el9.x86_64"), Broken, "kernel", "boot 5.15"),
            ("proc/sys/kernel/osrelease", Some("4.19.0"), Broken, "kernel", "4.19.0 is too old"),
            ("proc/sys/kernel/osrelease", Some("six"), Note, "kernel", "cannot parse the version"),
            ("proc/sys/kernel/osrelease", Some(""), Note, "kernel", "cannot parse the version"),
            ("proc/sys/kernel/osrelease", None, Broken, "kernel", "mount /proc"),
            ("proc/filesystems", Some("nodev\tnot-overlay\n"), Note, "overlay", "modprobe overlay"),
            ("sys/fs/cgroup/cgroup.controllers", Some("cpu pids\n"), Broken, "cgroups", "without memory:"),
            ("sys/fs/cgroup/cgroup.controllers", Some(""), Broken, "cgroups", "cpu, memory, pids"),
            ("sys/fs/cgroup/cgroup.controllers", None, Broken, "cgroups", "mount cgroup2"),
            ("usr/sbin/nft", None, Broken, "firewall", "nftables"),
            ("proc/sys/net/ipv4/ip_forward", Some("0\n"), Broken, "forwarding", "net.ipv4.ip_forward=1"),
            ("proc/sys/net/ipv4/ip_forward", None, Broken, "forwarding", "mount /proc"),
            ("proc/sys/net/bridge/bridge-nf-call-iptables", Some("0"), Note, "services", "sysctl -w"),
            ("proc/sys/net/bridge/bridge-nf-call-iptables", None, Note, "services", "modprobe br_netfilter"),
            ("sys/module/apparmor/parameters/enabled", Some("Y\n"), Broken, "apparmor", "package apparmor"),
            ("proc/sys/vm/memfd_noexec", Some("2\n"), Note, "memfd", "vm.memfd_noexec is 2"),
        ]);
    }

    #[test]
    fn what_only_looks_like_trouble_is_none() {
        for (path, text) in [
            ("proc/sys/kernel/osrelease", "5.15.0"),
            ("proc/sys/kernel/osrelease", "6.1-rc1"),
            ("sbin/apparmor_parser", ""),
            ("proc/sys/vm/memfd_noexec", "1"),
        ] {
            assert_eq!(troubles(&[(path, Some(text))], &daemon()), [], "{path} {text:?}");
        }
        let parser = ("sbin/apparmor_parser", Some(""));
        let enabled = ("sys/module/apparmor/parameters/enabled", Some("Y"));
        assert_eq!(troubles(&[enabled, parser], &daemon()), []);
    }

    #[test]
    fn the_first_version_of_cgroups_is_told_from_none() {
        let v1 = ("sys/fs/cgroup/memory/tasks", Some(""));
        let unified = ("sys/fs/cgroup/unified/cgroup.procs", Some(""));
        let none = ("sys/fs/cgroup/cgroup.controllers", None);
        for (changes, hybrid) in [(&[none, v1][..], false), (&[none, v1, unified], true)] {
            let found = cgroups(node(changes).path());
            assert_eq!(found.grade, Grade::Note);
            assert!(
                found.text.contains("failCgroupV1: false") && found.text.contains("cgroupfs"),
                "{found:?}"
            );
            assert_eq!(found.text.contains("hybrid"), hybrid, "{found:?}");
        }
    }
}
