//! The users of containers, what they may do, and which namespaces they share.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests::kubelet::ADDRESS;
use berth_tests::node::{Node, has_apparmor};

use crate::harness::tests;

tests![
    users_and_groups_are_those_of_the_pod_or_of_the_container,
    groups_of_the_image_are_left_out_where_the_pod_says_so,
    capabilities_are_dropped_and_added,
    a_privileged_container_may_do_everything,
    system_calls_are_filtered_as_the_profile_says,
    proc_is_masked,
    apparmor_is_in_force,
    namespaces_of_the_host_are_shared_where_asked_for,
    processes_are_seen_by_each_other_only_where_shared,
];

/// Linux's number of the capability to listen on low ports (`capabilities(7)`), and two more.
const NET_BIND_SERVICE: u32 = 10;
const SYS_TIME: u32 = 25;
const MKNOD: u32 = 27;

/// The set that containers have when their pod does not mention any: the same in all runtimes,
/// since images are made for it.
const USUAL: u64 = 0xa804_25fb;

fn users_and_groups_are_those_of_the_pod_or_of_the_container(node: &Node<'_>) -> Result<()> {
    node.ready_pod("users")?;
    let run = |container: &str, command: &str| node.kubelet.run("users", container, command);
    // The image makes user 1000 a member of group 50.
    for (container, uid, gid, groups) in
        [("of-the-pod", "1000", "2000", "50 2000 3000 4000"), ("of-its-own", "1234", "0", "0 3000 4000")]
    {
        for process in ["1", "self"] {
            let field = |name: &str| status(node, "users", container, process, name);
            ensure!(field("Uid")? == [uid; 4].join("\t"), "{container}: {}", field("Uid")?);
            ensure!(field("Gid")? == [gid; 4].join("\t"), "{container}: {}", field("Gid")?);
            let found = field("Groups")?;
            let mut found: Vec<u32> = found.split_whitespace().filter_map(|id| id.parse().ok()).collect();
            found.sort_unstable();
            found.dedup();
            let found = found.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
            ensure!(found == groups, "{container}: groups {found}");
        }
    }
    // fsGroup: volumes belong to the group, and so do files written to them.
    for volume in ["/disk", "/memory"] {
        let owner = run("of-the-pod", &format!("stat -c %g:%A {volume}"))?;
        ensure!(owner.starts_with("3000:drwxrws"), "{volume} is {owner:?}");
        run("of-the-pod", &format!("touch {volume}/file"))?;
        let owner = run("of-the-pod", &format!("stat -c %u:%g {volume}/file"))?;
        ensure!(owner == "1000:3000\n", "what is written to {volume} is {owner:?}");
    }
    for (sysctl, value) in [("net/ipv4/ip_unprivileged_port_start", "80"), ("kernel/shm_rmid_forced", "1")] {
        let found = run("of-its-own", &format!("cat /proc/sys/{sysctl}"))?;
        ensure!(found.trim_end() == value, "{sysctl} is {found:?}");
    }
    Ok(())
}

fn groups_of_the_image_are_left_out_where_the_pod_says_so(node: &Node<'_>) -> Result<()> {
    node.ready_pod("strict")?;
    let groups = status(node, "strict", "main", "1", "Groups")?;
    let mut groups: Vec<&str> = groups.split_whitespace().collect();
    groups.sort_unstable();
    ensure!(groups == ["1000", "4000"], "the groups are {groups:?}");
    Ok(())
}

fn capabilities_are_dropped_and_added(node: &Node<'_>) -> Result<()> {
    node.ready_pod("powers")?;
    let cases = [
        ("usual", USUAL, "0"),
        ("fewer", 1 << NET_BIND_SERVICE, "1"),
        ("more", USUAL & !(1 << MKNOD) | 1 << SYS_TIME, "0"),
    ];
    for (container, capabilities, no_new_privileges) in cases {
        for process in ["1", "self"] {
            for set in ["CapPrm", "CapEff", "CapBnd"] {
                let found = capability_set(node, container, process, set)?;
                ensure!(found == capabilities, "{set} of {container}: {found:#x}, not {capabilities:#x}");
            }
            let found = status(node, "powers", container, process, "NoNewPrivs")?;
            ensure!(found == no_new_privileges, "NoNewPrivs of {container}: {found}");
        }
    }
    Ok(())
}

/// It has what the daemon has, and the node's devices.
fn a_privileged_container_may_do_everything(node: &Node<'_>) -> Result<()> {
    node.ready_pod("powers")?;
    let host =
        fs::read_to_string(format!("/proc/{}/status", node.daemon_pid()?)).context("the daemon's status")?;
    let host = host.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).context("no CapBnd")?;
    let host = u64::from_str_radix(host, 16).context("CapBnd")?;
    let found = capability_set(node, "privileged", "1", "CapEff")?;
    ensure!(found == host, "its capabilities are {found:#x}, those of the daemon {host:#x}");
    let filtered = status(node, "powers", "privileged", "1", "Seccomp")?;
    ensure!(filtered == "0", "its system calls are filtered: {filtered}");
    let run = |command: &str| node.kubelet.run("powers", "privileged", command);
    run("test -c /dev/kmsg").context("a device of the node")?;
    run("mount -t tmpfs tmpfs /tmp").context("mounting")?;
    run("umount /tmp").context("unmounting")?;
    ensure!(
        node.kubelet.run("powers", "usual", "test -c /dev/kmsg").is_err(),
        "other containers do not have the node's devices"
    );
    Ok(())
}

/// A kubelet requests no filter where the pod does not mention one (Kubernetes, "Seccomp and
/// Kubernetes").
fn system_calls_are_filtered_as_the_profile_says(node: &Node<'_>) -> Result<()> {
    node.ready_pod("filters")?;
    for (pod, container, mode) in [
        ("filters", "default", "2"),
        ("filters", "unconfined", "0"),
        ("filters", "own", "2"),
        ("powers", "usual", "0"),
    ] {
        node.ready_pod(pod)?;
        for process in ["1", "self"] {
            let found = status(node, pod, container, process, "Seccomp")?;
            ensure!(found == mode, "Seccomp of {container}: {found}");
        }
    }
    let run = |container: &str, command: &str| node.kubelet.run("filters", container, command);
    // New namespaces are refused by the default profile to those without CAP_SYS_ADMIN.
    run("unconfined", "unshare -U true")?;
    refused(run("default", "unshare -U true"), "Operation not permitted")?;
    run("default", "mkdir /tmp/directory")?;
    refused(run("own", "mkdir /tmp/directory"), "Operation not permitted")
}

/// Files that reveal the kernel or the machine are masked or cannot be written.
fn proc_is_masked(node: &Node<'_>) -> Result<()> {
    node.ready_pod("filters")?;
    let run = |command: &str| node.kubelet.run("filters", "default", command);
    // Not every kernel has each.
    let files = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/latency_stats"];
    let mut files = files.into_iter().filter(|file| fs::metadata(file).is_ok()).peekable();
    ensure!(files.peek().is_some(), "the kernel has nothing that is to be masked");
    for file in files {
        let masked = run(&format!("stat -c %t:%T {file}"))?;
        ensure!(masked == "1:3\n", "{file} is the device {masked:?}, not null");
    }
    for directory in ["/sys/firmware", "/proc/scsi"] {
        if fs::metadata(directory).is_ok() {
            let inside = run(&format!("ls {directory}"))?;
            ensure!(inside.is_empty(), "{directory} has {inside:?}");
        }
    }
    for file in ["/proc/sys/kernel/domainname", "/proc/sysrq-trigger", "/sys/power/state"] {
        if fs::metadata(file).is_ok() {
            refused(run(&format!("dd if=/etc/hostname of={file}")), "Read-only file system")?;
        }
    }
    Ok(())
}

fn apparmor_is_in_force(node: &Node<'_>) -> Result<()> {
    if !has_apparmor() {
        berth_tests::skip::skip("apparmor_is_in_force", "the kernel has no AppArmor");
        return Ok(());
    }
    node.ready_pod("apparmor")?;
    for (container, profile) in [("default", "berth-default (enforce)"), ("unconfined", "unconfined")] {
        for process in ["1", "self"] {
            let found =
                node.kubelet.run("apparmor", container, &format!("cat /proc/{process}/attr/current"))?;
            ensure!(found.trim_end() == profile, "{container} is confined by {found:?}");
        }
    }
    Ok(())
}

fn namespaces_of_the_host_are_shared_where_asked_for(node: &Node<'_>) -> Result<()> {
    node.ready_pod("host")?;
    node.ready_pod("apart")?;
    for kind in ["net", "pid", "ipc"] {
        let of_the_host = node.namespace(kind)?;
        let of = |pod: &str| node.kubelet.run(pod, "main", &format!("readlink /proc/self/ns/{kind}"));
        let (shared, apart) = (of("host")?, of("apart")?);
        ensure!(
            shared.trim_end() == of_the_host.to_string_lossy(),
            "{kind}: {shared:?}, not {of_the_host:?}"
        );
        ensure!(apart != shared, "{kind}: pods that do not ask for the host's have their own");
    }
    let page = node.kubelet.page(ADDRESS, 8097, "/")?;
    ensure!(page == "the node\n", "it serves {page:?}");
    Ok(())
}

fn processes_are_seen_by_each_other_only_where_shared(node: &Node<'_>) -> Result<()> {
    node.ready_pod("shared")?;
    node.ready_pod("apart")?;
    let processes = node.kubelet.run("shared", "main", "ps")?;
    ensure!(processes.contains("sleep 1234567"), "the other's process is there: {processes}");
    let processes = node.kubelet.run("apart", "main", "ps")?;
    let count = processes.lines().filter(|line| line.contains("sleep 1000000")).count();
    // The waiting shell, and the process it waits for.
    ensure!(count == 2, "only its own processes are there: {processes}");
    let ipc = |container: &str| node.kubelet.run("apart", container, "readlink /proc/self/ns/ipc");
    ensure!(ipc("main")? == ipc("other")?, "containers of a pod share memory");
    Ok(())
}

fn capability_set(node: &Node<'_>, container: &str, process: &str, set: &str) -> Result<u64> {
    let text = status(node, "powers", container, process, set)?;
    u64::from_str_radix(&text, 16).with_context(|| format!("{set} is {text:?}"))
}

/// A field of `/proc/PROCESS/status` in a container.
fn status(node: &Node<'_>, pod: &str, container: &str, process: &str, field: &str) -> Result<String> {
    let status = node.kubelet.run(pod, container, &format!("cat /proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {field} in {status}"))?.trim().to_owned())
}

fn refused(outcome: Result<String>, words: &str) -> Result<()> {
    match outcome {
        Ok(output) => bail!("it succeeds: {output}"),
        Err(error) => {
            ensure!(format!("{error:#}").contains(words), "it fails otherwise: {error:#}");
            Ok(())
        }
    }
}
