//! Limits in force: in the cgroups' files, under the names that the kubelet expects, and as the
//! pods see them.

use anyhow::{Context as _, Result, ensure};
use berth_tests::cgroup::CpuLimit;
use berth_tests::kubelet::Pod;
use berth_tests::kubepods::Limits;
use berth_tests::node::{Node, soon};

use crate::harness::tests;

tests![
    a_guaranteed_pod_has_its_limits,
    containers_of_a_burstable_pod_have_each_their_own,
    a_best_effort_pod_has_none,
    limits_of_a_pod_as_a_whole_are_in_force,
    what_uses_more_than_it_may_is_throttled,
    limits_change_in_place,
];

/// The value of `podPidsLimit` in `node.conf`.
const POD_PIDS: u64 = 300;

/// Linux's number of the capability to lower one's own adjustment (`capabilities(7)`).
const SYS_RESOURCE: u32 = 24;

fn a_guaranteed_pod_has_its_limits(node: &Node<'_>) -> Result<()> {
    let pod = node.ready_pod("guaranteed")?;
    ensure!(pod.class == "Guaranteed", "{pod:?}");
    let whole = node.kubelet.pod_cgroup(&pod).limits()?;
    ensure!(whole.cpu == Some(milli_cpu(250)) && whole.memory_bytes == Some(48 << 20), "the pod: {whole:?}");
    ensure!(whole.pids == Some(POD_PIDS), "the pod: {whole:?}");
    let main = limits(node, &pod, "main")?;
    ensure!(main.cpu == whole.cpu && main.memory_bytes == whole.memory_bytes, "its container: {main:?}");
    // 250m are 256 shares. On v2 a runtime turns them into a weight by the formula that runc and
    // crun have since 2025, and the kubelet those of pods by an older one.
    let weight = if node.kubelet.cgroup().is_unified() { 35 } else { 256 };
    ensure!(main.cpu_weight == weight, "its container: {main:?}");
    let seen = seen_memory(node, "guaranteed", "main")?;
    ensure!(seen == (48 << 20).to_string(), "it sees {seen}");
    // Kubernetes, "Node-pressure Eviction", "Node out of memory behavior".
    oom_score(node, "guaranteed", "main", |score| score == -997)
}

fn containers_of_a_burstable_pod_have_each_their_own(node: &Node<'_>) -> Result<()> {
    let pod = node.ready_pod("burstable")?;
    ensure!(pod.class == "Burstable", "{pod:?}");
    let whole = node.kubelet.pod_cgroup(&pod).limits()?;
    ensure!(whole.cpu.is_none() && whole.memory_bytes.is_none(), "one has no limits: {whole:?}");
    let (limited, unlimited) = (limits(node, &pod, "limited")?, limits(node, &pod, "unlimited")?);
    // Not a whole percent.
    ensure!(limited.cpu == Some(milli_cpu(123)) && limited.memory_bytes == Some(64 << 20), "{limited:?}");
    ensure!(unlimited.cpu.is_none() && unlimited.memory_bytes.is_none(), "{unlimited:?}");
    ensure!(limited.cpu_weight > unlimited.cpu_weight, "requests weigh: {limited:?}, {unlimited:?}");
    oom_score(node, "burstable", "limited", |score| (3..1000).contains(&score))
}

fn a_best_effort_pod_has_none(node: &Node<'_>) -> Result<()> {
    let pod = node.ready_pod("best-effort")?;
    ensure!(pod.class == "BestEffort", "{pod:?}");
    let whole = node.kubelet.pod_cgroup(&pod).limits()?;
    let main = limits(node, &pod, "main")?;
    for limits in [whole, main] {
        ensure!(limits.cpu.is_none() && limits.memory_bytes.is_none(), "{limits:?}");
        // The minimum: two shares of v1, one of ten thousand of v2 (`cgroups(7)`).
        let least = if node.kubelet.cgroup().is_unified() { 1 } else { 2 };
        ensure!(limits.cpu_weight == least, "{limits:?}");
    }
    oom_score(node, "best-effort", "main", |score| score == 1000)
}

fn limits_of_a_pod_as_a_whole_are_in_force(node: &Node<'_>) -> Result<()> {
    let pod = node.ready_pod("whole")?;
    let whole = node.kubelet.pod_cgroup(&pod).limits()?;
    ensure!(whole.cpu == Some(milli_cpu(300)) && whole.memory_bytes == Some(96 << 20), "the pod: {whole:?}");
    let (limited, unlimited) = (limits(node, &pod, "limited")?, limits(node, &pod, "unlimited")?);
    ensure!(limited.memory_bytes == Some(24 << 20), "{limited:?}");
    // None, or the pod's limit.
    ensure!(unlimited.memory_bytes.is_none_or(|bytes| bytes == 96 << 20), "{unlimited:?}");
    ensure!(unlimited.cpu.is_none_or(|cpu| cpu == milli_cpu(300)), "{unlimited:?}");
    Ok(())
}

fn what_uses_more_than_it_may_is_throttled(node: &Node<'_>) -> Result<()> {
    let pod = node.ready_pod("busy")?;
    let cgroup = node.kubelet.pod_cgroup(&pod).container(&pod.container("main")?.id)?;
    let throttled = || -> Result<u64> {
        let stat = cgroup.read("cpu", "cpu.stat")?;
        let count = stat.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        count.context("no nr_throttled")?.parse().context("nr_throttled")
    };
    let before = throttled()?;
    soon("it is throttled in several periods", || Ok((throttled()? >= before + 5).then_some(())))
}

/// Up and down, for the pod and its container, which sees it too and is not started again.
fn limits_change_in_place(node: &Node<'_>) -> Result<()> {
    let before = node.ready_pod("resized")?;
    // In whole percent: with systemd a kubelet rounds the quota of a pod up to that.
    for (cpu, milli, memory, bytes) in [("250m", 250, "96Mi", 96 << 20), ("120m", 120, "48Mi", 48 << 20)] {
        node.resize(cpu, memory)?;
        soon(&format!("{cpu} and {memory} are in force"), || {
            for limits in [node.kubelet.pod_cgroup(&before).limits()?, limits(node, &before, "main")?] {
                ensure!(
                    limits.cpu == Some(milli_cpu(milli)) && limits.memory_bytes == Some(bytes),
                    "{limits:?}"
                );
            }
            Ok(Some(()))
        })?;
        let seen = seen_memory(node, "resized", "main")?;
        ensure!(seen == bytes.to_string(), "it sees {seen}");
    }
    let pod = node.kubelet.pod("resized")?;
    let (before, after) = (before.container("main")?, pod.container("main")?);
    ensure!(before == after, "it is the same container: {before:?}, and now {after:?}");
    Ok(())
}

fn limits(node: &Node<'_>, pod: &Pod, container: &str) -> Result<Limits> {
    node.kubelet.pod_cgroup(pod).container(&pod.container(container)?.id)?.limits()
}

/// The limit for this many thousandths of a processor, in the period that a kubelet asks for.
fn milli_cpu(milli: u64) -> CpuLimit {
    CpuLimit { quota_us: milli * 100, period_us: 100_000 }
}

/// The memory limit in bytes as a program in the container finds it.
fn seen_memory(node: &Node<'_>, pod: &str, container: &str) -> Result<String> {
    let file = if node.kubelet.cgroup().is_unified() { "memory.max" } else { "memory/memory.limit_in_bytes" };
    let text = node.kubelet.run(pod, container, &format!("cat /sys/fs/cgroup/{file}"))?;
    Ok(text.trim_end().to_owned())
}

/// The container's first process and one that is run in it both have this adjustment. A daemon that
/// may not lower its own leaves containers that should have less with it
/// (`proc_pid_oom_score_adj(5)`).
fn oom_score(node: &Node<'_>, pod: &str, container: &str, is: impl Fn(i64) -> bool) -> Result<()> {
    for process in ["1", "self"] {
        let text = node.kubelet.run(pod, container, &format!("cat /proc/{process}/oom_score_adj"))?;
        let score = text.trim().parse().with_context(|| format!("oom_score_adj is {text:?}"))?;
        ensure!(
            is(score) || score == 0 && is(-997) && !node.daemon_has(SYS_RESOURCE)?,
            "process {process} of {pod} has the adjustment {score}"
        );
    }
    Ok(())
}
