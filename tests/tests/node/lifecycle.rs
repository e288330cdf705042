//! The order in which a pod's containers start, and their hooks. Their ends are in
//! [`crate::deletion`].

use anyhow::{Result, ensure};
use berth_tests::node::Node;

use crate::harness::tests;

tests![
    init_containers_and_the_sidecar_come_in_order_before_the_others,
    an_init_container_that_fails_is_run_again,
    a_hook_after_the_start_runs_in_the_container,
    a_hook_that_fails_ends_its_container,
];

/// The sidecar starts between the two that end, runs beside the main container, and is started
/// again when it ends, which leaves the others alone.
fn init_containers_and_the_sidecar_come_in_order_before_the_others(node: &Node<'_>) -> Result<()> {
    let pod = node.ready_pod("order")?;
    let order = node.evidence("order")?;
    ensure!(order == "first ran\nsidecar started\nsecond ran\nmain started\n", "the order was {order}");
    for name in ["first", "second"] {
        let end = pod.container(name)?.end.as_ref();
        ensure!(end.is_some_and(|end| end.exit_code == 0 && end.reason == "Completed"), "{name}: {end:?}");
    }
    let sidecar = pod.container("sidecar")?;
    ensure!(sidecar.started && sidecar.ready && sidecar.restart_count == 0, "it runs: {sidecar:?}");

    node.end("order", "sidecar");
    let again = node.pod_that("order", "the sidecar runs again and the pod is ready", |pod| {
        let sidecar = pod.container("sidecar")?;
        Ok(sidecar.restart_count == 1 && sidecar.started && pod.ready)
    })?;
    for name in ["first", "second", "main"] {
        let (before, after) = (pod.container(name)?, again.container(name)?);
        ensure!(before == after, "{name} is what it was: {before:?}, and now {after:?}");
    }
    Ok(())
}

fn an_init_container_that_fails_is_run_again(node: &Node<'_>) -> Result<()> {
    let pod = node.ready_pod("retry")?;
    let flaky = pod.container("flaky")?;
    ensure!(
        flaky.restart_count == 1 && flaky.exit_code() == Some(0),
        "the second time it succeeds: {flaky:?}"
    );
    Ok(())
}

/// It has the container's files and environment, and the container is not reported as running
/// before the hook has ended.
fn a_hook_after_the_start_runs_in_the_container(node: &Node<'_>) -> Result<()> {
    node.pod_that("hooks", "main runs", |pod| Ok(pod.container("main")?.ready))?;
    let hooks = node.evidence("hooks")?;
    ensure!(hooks == "after the start, with the environment of the container\n", "the hooks say {hooks:?}");
    Ok(())
}

fn a_hook_that_fails_ends_its_container(node: &Node<'_>) -> Result<()> {
    let pod = node.pod_that("hooks", "failing was ended and tried again", |pod| {
        let failing = pod.container("failing")?;
        Ok(failing.restart_count >= 1 && failing.previous_end.is_some())
    })?;
    let main = pod.container("main")?;
    ensure!(main.restart_count == 0, "the other one is left alone: {main:?}");
    Ok(())
}
