//! When the manifests go, so do the pods: in their own time if that is within their grace period,
//! and without a trace.

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::node::{Node, soon};

use crate::harness::tests;

tests![pods_end_when_their_manifests_go, nothing_is_left_of_them];

/// A container that ends on its own does so, in the right order; one that does not is killed when
/// its grace period is over, and not before.
fn pods_end_when_their_manifests_go(node: &Node<'_>) -> Result<()> {
    let lines_before = node.evidence("order")?.lines().count();
    node.kubelet.delete_pods()?;
    // The kubelet's API forgets static pods at once.
    soon("no container runs", || {
        let running = v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning.into() };
        let filter = v1::ContainerFilter { state: Some(running), ..Default::default() };
        let left = node.client().containers(filter)?;
        let left: Vec<_> = left.iter().filter_map(|container| container.metadata.as_ref()).collect();
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(Some(()))
    })?;
    soon("the kubelet has no pod any more", || Ok(node.kubelet.pods()?.is_empty().then_some(())))?;

    ensure!(node.evidence("graceful")? == "ended\n", "the graceful one had its time");
    let stubborn = node.evidence("stubborn")?;
    let times: Vec<f64> = stubborn.lines().filter_map(|line| line.parse().ok()).collect();
    let (Some(first), Some(last)) = (times.first(), times.last()) else {
        anyhow::bail!("the stubborn one was not asked to end")
    };
    // It had six seconds. On a slow machine its last output may come a while before its end.
    let time = last - first;
    ensure!((3.0..12.0).contains(&time), "the stubborn one had {time} s");

    let order = node.evidence("order")?;
    let ends: Vec<&str> = order.lines().skip(lines_before).collect();
    ensure!(ends == ["main ended", "sidecar ended"], "the order of the ends was {ends:?}");
    let hooks = node.evidence("hooks")?;
    let hooks: Vec<&str> = hooks.lines().skip(1).collect();
    ensure!(hooks == ["before the stop", "signal"], "the hook, and then the signal: {hooks:?}");
    Ok(())
}

fn nothing_is_left_of_them(node: &Node<'_>) -> Result<()> {
    // The kubelet collects ended containers once a minute.
    soon("the kubelet has the runtime remove everything", || {
        let containers = node.client().containers(v1::ContainerFilter::default())?;
        let sandboxes = node.client().sandboxes(v1::PodSandboxFilter::default())?;
        ensure!(containers.is_empty() && sandboxes.is_empty(), "{containers:?} {sandboxes:?}");
        Ok(Some(()))
    })?;
    soon("nothing of the pods is on the machine", || {
        let left = node.remains()?;
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(Some(()))
    })
    .context("after their end")
}
