//! Containers that end or cannot start, and how the pod's status describes it.

use anyhow::{Result, ensure};
use berth_tests::kubelet::Instance;
use berth_tests::node::Node;

use crate::harness::tests;

tests![
    a_crash_loop_is_counted_and_its_logs_are_kept,
    ends_are_told_with_code_reason_and_message,
    a_pod_is_restarted_until_it_completes,
    a_container_over_its_memory_limit_is_oom_killed,
    what_cannot_start_says_why,
];

/// It waits before each start, is counted, and the log of the previous instance can be read.
fn a_crash_loop_is_counted_and_its_logs_are_kept(node: &Node<'_>) -> Result<()> {
    // Between its end and the kubelet's next look at the pod it is not waiting yet.
    node.pod_that("crash", "main waits", |pod| Ok(pod.container("main")?.waits_for("CrashLoopBackOff")))?;
    let pod = node.pod_that("crash", "main was started a third time, and its log is kept", |pod| {
        let lives = pod.container("main")?.restart_count + 1;
        ensure!(lives >= 3, "it was started {lives} times");
        let log = |instance| node.kubelet.log("crash", "main", instance);
        let (current, previous) = (log(Instance::Current)?, log(Instance::Previous)?);
        ensure!(current == format!("life {lives}\n"), "the log of life {lives}: {current:?}");
        // The previous instance is also the last one, while it waits. The volume outlives them all.
        let before = [format!("life {}\n", lives - 1), current];
        ensure!(before.contains(&previous), "the log before that of life {lives}: {previous:?}");
        Ok(true)
    })?;
    let main = pod.container("main")?;
    ensure!(main.previous_exit_code() == Some(7), "its exit code is kept: {main:?}");
    ensure!(pod.phase == "Running", "a pod that is to be restarted is not failed: {pod:?}");
    Ok(())
}

fn ends_are_told_with_code_reason_and_message(node: &Node<'_>) -> Result<()> {
    let pod = node.pod_that("ends", "it has ended", |pod| Ok(pod.phase == "Failed"))?;
    for (name, code, reason) in [("good", 0, "Completed"), ("bad", 3, "Error"), ("long", 0, "Completed")] {
        let end = pod.container(name)?.end.as_ref();
        ensure!(end.is_some_and(|end| end.exit_code == code && end.reason == reason), "{name}: {end:?}");
    }

    // 4096 bytes are the most of a message, 12 KiB of all of a pod, in equal parts (Kubernetes,
    // "Determine the Reason for Pod Failure").
    let end = pod.container("long")?.end.as_ref();
    let long = "0123456789abcde\n".repeat(4096 / 16);
    ensure!(end.is_some_and(|end| end.message == long), "the end of what was written: {end:?}");

    let pod = node.pod_that("messages", "it has ended", |pod| Ok(pod.phase == "Failed"))?;
    for (name, message) in [
        ("file", "these\nwords"),
        ("own-file", "from a file of its own"),
        ("log", "out\nerr\n"),
        ("success", ""),
    ] {
        let end = pod.container(name)?.end.as_ref();
        ensure!(end.is_some_and(|end| end.message == message), "{name}: {end:?}");
    }
    Ok(())
}

fn a_pod_is_restarted_until_it_completes(node: &Node<'_>) -> Result<()> {
    let pod = node.pod_that("completes", "it has succeeded", |pod| Ok(pod.phase == "Succeeded"))?;
    let main = pod.container("main")?;
    ensure!(main.restart_count == 1 && main.exit_code() == Some(0), "once again: {main:?}");
    Ok(())
}

/// On cgroup v2 the kubelet asks for a container to be killed as a whole; on v1 only the child is.
fn a_container_over_its_memory_limit_is_oom_killed(node: &Node<'_>) -> Result<()> {
    let whole = node.kubelet.cgroup().is_unified();
    let pod = node.pod_that("oom", "greedy has ended", |pod| Ok(pod.container("greedy")?.end.is_some()))?;
    let end = pod.container("greedy")?.end.as_ref();
    ensure!(end.is_some_and(|end| end.exit_code == 137 && end.reason == "OOMKilled"), "greedy: {end:?}");
    if whole {
        let pod =
            node.pod_that("oom", "parent has ended", |pod| Ok(pod.container("parent")?.end.is_some()))?;
        let end = pod.container("parent")?.end.as_ref();
        ensure!(end.is_some_and(|end| end.exit_code == 137 && end.reason == "OOMKilled"), "parent: {end:?}");
    } else {
        node.pod_that("oom", "parent tells of its child", |_| {
            // Its shell's message about the end of a child is in the log too.
            Ok(node.kubelet.log("oom", "parent", Instance::Current)?.ends_with("child 137\n"))
        })?;
        let pod = node.kubelet.pod("oom")?;
        ensure!(pod.container("parent")?.end.is_none(), "the parent runs on: {pod:?}");
    }
    let pod = node.kubelet.pod("oom")?;
    ensure!(pod.container("neighbour")?.end.is_none(), "the neighbour runs on: {pod:?}");
    Ok(())
}

fn what_cannot_start_says_why(node: &Node<'_>) -> Result<()> {
    let words = |container: &str| {
        let pod = node.kubelet.pod("refused")?;
        let container = pod.container(container)?.clone();
        Ok::<_, anyhow::Error>((format!("{container:?}"), container))
    };
    node.pod_that("refused", "no-program names its program", |_| {
        let (words, container) = words("no-program")?;
        let end = container.end.or(container.previous_end);
        Ok(words.contains("/no/such/program") && end.is_none_or(|end| end.exit_code != 0))
    })?;
    node.pod_that("refused", "no-image waits", |_| Ok(words("no-image")?.1.waits_for("ErrImageNeverPull")))?;
    node.pod_that("refused", "no-root waits", |_| {
        let (words, container) = words("no-root")?;
        Ok(container.waits_for("CreateContainerConfigError") && words.contains("run as root"))
    })
    .map(drop)
}
