//! Probes of every kind and transport: their results decide what the kubelet does.

use anyhow::{Context as _, Result, ensure};
use berth_tests::node::{Node, soon};

use crate::harness::tests;

tests![
    over_http_a_container_starts_is_ready_and_is_restarted,
    by_commands_a_container_is_ready_and_is_restarted,
    by_connections_a_container_is_restarted,
];

/// No other probe runs before the startup probe succeeds; readiness comes and goes without a
/// restart; a liveness probe that fails restarts the container, and the new instance starts over.
fn over_http_a_container_starts_is_ready_and_is_restarted(node: &Node<'_>) -> Result<()> {
    soon("the startup probe asks more than once", || {
        Ok((probed(node, "web", "Startup", "failed")? >= 2).then_some(()))
    })?;
    let web = node.kubelet.pod("probes")?.container("web")?.clone();
    ensure!(!web.started && !web.ready && web.restart_count == 0, "it has not started: {web:?}");
    for kind in ["Readiness", "Liveness"] {
        for result in ["successful", "failed"] {
            let times = probed(node, "web", kind, result)?;
            ensure!(times == 0, "{kind} was probed {times} times before the container had started");
        }
    }

    node.kubelet.run("probes", "web", "touch /srv/started")?;
    node.pod_that("probes", "web has started", |pod| Ok(pod.container("web")?.started))?;
    soon("web is asked whether it is ready", || {
        Ok((probed(node, "web", "Readiness", "failed")? >= 1).then_some(()))
    })?;
    ensure!(!node.kubelet.pod("probes")?.container("web")?.ready, "it is not ready");
    for (command, ready) in [("touch /srv/ready", true), ("rm /srv/ready", false), ("touch /srv/ready", true)]
    {
        node.kubelet.run("probes", "web", command)?;
        node.pod_that("probes", command, |pod| Ok(pod.container("web")?.ready == ready))?;
    }
    let web = node.kubelet.pod("probes")?.container("web")?.clone();
    ensure!(web.restart_count == 0, "readiness restarts nothing: {web:?}");

    node.kubelet.run("probes", "web", "rm /srv/alive")?;
    let pod = node.pod_that("probes", "web is restarted", |pod| {
        let now = pod.container("web")?;
        Ok(now.restart_count == 1 && !now.running_since.is_empty())
    })?;
    let now = pod.container("web")?;
    ensure!(now.id != web.id && now.previous_end.is_some(), "it is a new instance: {now:?}");
    ensure!(!now.ready, "it has to start anew: {now:?}");
    // Its files were those of the previous instance.
    node.kubelet.run("probes", "web", "touch /srv/started")?;
    node.kubelet.run("probes", "web", "touch /srv/ready")?;
    node.pod_that("probes", "web is ready again", |pod| Ok(pod.container("web")?.ready)).map(drop)
}

/// A command that exceeds its time counts as one that fails.
fn by_commands_a_container_is_ready_and_is_restarted(node: &Node<'_>) -> Result<()> {
    let first = node.pod_that("probes", "asked is ready", |pod| Ok(pod.container("asked")?.ready))?;
    node.kubelet.run("probes", "asked", "touch /tmp/slow")?;
    node.pod_that("probes", "asked is not ready", |pod| Ok(!pod.container("asked")?.ready))?;
    node.kubelet.run("probes", "asked", "rm /tmp/slow")?;
    let pod = node.pod_that("probes", "asked is ready again", |pod| Ok(pod.container("asked")?.ready))?;
    ensure!(
        pod.container("asked")?.id == first.container("asked")?.id,
        "readiness restarts nothing: {pod:?}"
    );
    soon("nothing is left of the command that took too long", || {
        let processes = node.kubelet.run("probes", "asked", "ps")?;
        ensure!(!processes.contains("sleep 1000\n"), "processes: {processes}");
        Ok(Some(()))
    })?;
    node.kubelet.run("probes", "asked", "rm /tmp/alive")?;
    node.pod_that("probes", "asked is restarted and ready", |pod| {
        let asked = pod.container("asked")?;
        Ok(asked.restart_count == 1 && asked.ready)
    })
    .map(drop)
}

/// The program is still running, but no longer listening.
fn by_connections_a_container_is_restarted(node: &Node<'_>) -> Result<()> {
    node.pod_that("probes", "listener runs", |pod| Ok(pod.container("listener")?.ready))?;
    soon("listener is asked", || {
        Ok((probed(node, "listener", "Liveness", "successful")? >= 1).then_some(()))
    })?;
    let listener = node.kubelet.run("probes", "listener", "cat /tmp/listener")?;
    node.kubelet.run("probes", "listener", &format!("kill {}", listener.trim()))?;
    node.pod_that("probes", "listener is restarted", |pod| {
        let listener = pod.container("listener")?;
        Ok(listener.restart_count == 1 && listener.ready)
    })
    .map(drop)
}

/// How often a probe of a container of the pod had this result, by the kubelet's counter
/// (`/metrics/probes`).
pub(crate) fn probed(node: &Node<'_>, container: &str, kind: &str, result: &str) -> Result<u64> {
    let metrics = node.kubelet.get("/metrics/probes")?;
    let labels = [
        format!("container=\"{container}\""),
        format!("probe_type=\"{kind}\""),
        format!("result=\"{result}\""),
        "pod=\"probes-".to_owned(),
    ];
    let line = metrics.lines().find(|line| {
        line.starts_with("prober_probe_total{") && labels.iter().all(|label| line.contains(label))
    });
    match line.and_then(|line| line.rsplit_once(' ')) {
        Some((line, count)) => count.parse().with_context(|| format!("{line} is {count:?}")),
        None => Ok(0),
    }
}
