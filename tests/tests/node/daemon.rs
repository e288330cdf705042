//! The daemon is replaced under all the pods, and so is the kubelet, and none of the pods notices.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use berth_tests::kubelet::PodContainer;
use berth_tests::node::{Node, soon};

use crate::harness::tests;
use crate::logs::lines;
use crate::probes::probed;

tests![
    the_kubelet_says_that_it_is_well,
    containers_live_through_a_restart_of_the_daemon,
    containers_live_through_a_kill_of_the_daemon,
    containers_live_through_another_build_of_the_daemon,
    containers_live_through_a_restart_of_the_kubelet,
    the_new_daemon_starts_and_ends_containers,
];

/// Pods whose containers change on their own.
const RESTLESS: [&str; 3] = ["crash-", "refused-", "hooks-"];

/// Answers of `/healthz`, which a node's supervisor requests.
fn the_kubelet_says_that_it_is_well(node: &Node<'_>) -> Result<()> {
    soon("the kubelet is well", || Ok((node.kubelet.get("/healthz")? == "ok").then_some(())))
}

fn containers_live_through_a_restart_of_the_daemon(node: &Node<'_>) -> Result<()> {
    nothing_changes_while(node, |node| node.restart_daemon())
}

fn containers_live_through_a_kill_of_the_daemon(node: &Node<'_>) -> Result<()> {
    nothing_changes_while(node, |node| node.kill_daemon())
}

fn containers_live_through_another_build_of_the_daemon(node: &Node<'_>) -> Result<()> {
    nothing_changes_while(node, |node| node.replace_daemon())
}

/// From the runtime's answers it sees that there is nothing to do.
fn containers_live_through_a_restart_of_the_kubelet(node: &Node<'_>) -> Result<()> {
    nothing_changes_while(node, |node| node.kubelet.restart())
}

/// Commands run in containers that earlier daemons have started, and ended ones are started again.
fn the_new_daemon_starts_and_ends_containers(node: &Node<'_>) -> Result<()> {
    let before = node.ready_pod("burstable")?.container("unlimited")?.clone();
    node.end("burstable", "unlimited");
    let pod = node.pod_that("burstable", "the container runs again", |pod| {
        let now = pod.container("unlimited")?;
        Ok(now.restart_count == before.restart_count + 1 && now.ready)
    })?;
    ensure!(pod.container("unlimited")?.id != before.id, "it is a new one: {pod:?}");
    Ok(())
}

/// The same containers, with the same ids and no more restarts, ready as before; the log of one
/// continues without a gap; and the kubelet has listed the new daemon's containers several times.
fn nothing_changes_while(node: &Node<'_>, act: impl FnOnce(&Node<'_>) -> Result<()>) -> Result<()> {
    let before = soon("the pods have come to rest", || {
        let first = containers(node)?;
        let looks = relists(node)?;
        soon("the kubelet looks at the runtime", || Ok((relists(node)? > looks + 1).then_some(())))?;
        Ok((containers(node)? == first).then_some(first))
    })?;
    let counted = soon("the steady one counts", || lines(node, "steady").map(Some))?.len();

    act(node)?;

    // Those that it had requested before the end may still be on their way.
    let (looks, probes) = (relists(node)?, probed(node, "asked", "Liveness", "successful")?);
    soon("the kubelet looks at the runtime again", || Ok((relists(node)? > looks + 5).then_some(())))?;
    soon("probes by command go on", || {
        Ok((probed(node, "asked", "Liveness", "successful")? > probes + 1).then_some(()))
    })?;
    soon("the steady one counts on", || Ok((lines(node, "steady")?.len() > counted + 10).then_some(())))?;
    soon("everything is ready as before", || {
        let after = containers(node)?;
        for (name, before) in &before {
            let after = after.get(name).with_context(|| format!("{name} is gone"))?;
            ensure!(before == after, "{name} is what it was: {before:?}, and now {after:?}");
        }
        Ok(Some(()))
    })
}

/// Every container of the pods that do not change on their own, without the kubelet's memory of
/// earlier instances: it has these removed, and forgets them when it ends.
fn containers(node: &Node<'_>) -> Result<BTreeMap<String, PodContainer>> {
    let mut pods = node.kubelet.pods()?;
    pods.retain(|pod| !RESTLESS.iter().any(|name| pod.name.starts_with(name)));
    let all = pods.iter().flat_map(|pod| {
        pod.all_containers().map(|container| {
            let container = PodContainer { previous_end: None, ..container.clone() };
            (format!("{}/{}", pod.name, container.name), container)
        })
    });
    let all: BTreeMap<_, _> = all.collect();
    ensure!(all.len() > 30, "there are many: {}", all.len());
    Ok(all)
}

/// How often the kubelet has asked the runtime for all its containers.
fn relists(node: &Node<'_>) -> Result<u64> {
    let metrics = node.kubelet.get("/metrics")?;
    let count =
        metrics.lines().find_map(|line| line.strip_prefix("kubelet_pleg_relist_duration_seconds_count "));
    count.context("the kubelet does not count its looks")?.parse().context("their number")
}
