//! StopContainer: the stop signal to the main process, once; after the grace period SIGKILL for all
//! processes.
//!
//! Concurrent stops: the first one sends the signal, and the shortest time counts. A stop whose
//! caller went away continues, because the edge runs it in its own task.

use std::sync::Arc;
use std::time::Duration;

use berth_model::state::ContainerState;
use berth_sys::process::SIGKILL;
use tokio::time::Instant;

use super::{Container, ContainerError};

/// How long the end may take after a kill: a process in uninterruptible sleep ends when its device
/// responds.
const KILLED: Duration = Duration::from_secs(10);

/// How long the shim may take to tell the end after that: it waits for the rest of the output, 2 s,
/// for its log, 2 s, and for its daemon, 1 s.
const TOLD: Duration = Duration::from_secs(7);

/// How long the shim may take to deliver a kill before the cgroup is killed without it.
const SHIM: Duration = Duration::from_secs(1);

/// Stops it, within little more than `grace`. Does nothing if it has ended.
pub(crate) async fn stop(container: &Arc<Container>, grace: Duration) -> Result<(), ContainerError> {
    if !matches!(container.state(), ContainerState::Exited(_)) {
        end(container, grace).await?;
    }
    // The caller may go on to report that the pod has stopped.
    container.reported();
    // Its namespaces and its pod's cgroup are released next.
    container.cleared().await;
    Ok(())
}

async fn end(container: &Arc<Container>, grace: Duration) -> Result<(), ContainerError> {
    // Before its start none of the image's code runs, so a grace period is pointless, and the
    // waiting child does not handle signals.
    let grace = if matches!(container.state(), ContainerState::Created) { Duration::ZERO } else { grace };
    let mine = Instant::now() + grace;
    let mut first = false;
    container.kill_at.send_if_modified(|kill_at| {
        first = kill_at.is_none();
        let earlier = kill_at.is_none_or(|set| mine < set);
        if earlier {
            *kill_at = Some(mine);
        }
        earlier
    });
    if first && !grace.is_zero() {
        signal(container, container.record.stop_signal).await;
    }
    wait_for_time(container).await;
    if matches!(container.state(), ContainerState::Exited(_)) {
        return Ok(());
    }
    kill(container).await
}

/// Waits until it has ended or the shortest grace period of all stops is over.
async fn wait_for_time(container: &Container) {
    let mut changes = container.kill_at.subscribe();
    let exited = container.exited();
    tokio::pin!(exited);
    loop {
        let kill_at = *changes.borrow_and_update();
        let Some(kill_at) = kill_at else { return };
        tokio::select! {
            () = &mut exited => return,
            () = tokio::time::sleep_until(kill_at) => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

async fn signal(container: &Container, signal: i32) {
    if let Some(shim) = container.shim() {
        // It may have ended on its own meanwhile; if the shim hangs, the time passes and the cgroup
        // is killed.
        let _ = tokio::time::timeout(SHIM, shim.signal(signal)).await;
    }
}

/// Kills all its processes and waits for the end.
pub(super) async fn kill(container: &Arc<Container>) -> Result<(), ContainerError> {
    // By the shim's pidfd: the kernel kills a whole pid namespace with its process 1. Without its
    // own namespace, the shim kills the rest when the main process has ended.
    signal(container, SIGKILL).await;
    if tokio::time::timeout(SHIM, container.exited()).await.is_ok() {
        return Ok(());
    }
    kill_all(container).await
}

/// The same without the shim, which may hang; it is waited for only to report the end.
pub(super) async fn kill_all(container: &Arc<Container>) -> Result<(), ContainerError> {
    let all = container.clone();
    tokio::task::spawn_blocking(move || all.cgroup.kill(KILLED))
        .await
        .map_err(|_| ContainerError::Stopping)??;
    if tokio::time::timeout(TOLD, container.exited()).await.is_ok() {
        return Ok(());
    }
    // None of its processes is left, and the shim, which should report that, does not.
    if let Some(shim) = container.shim() {
        tracing::warn!(container = %container.id(), "the container's shim does not answer; killing it");
        shim.kill();
        if tokio::time::timeout(TOLD, container.exited()).await.is_ok() {
            return Ok(());
        }
    }
    // It cannot be killed (waiting for a disk) or cannot be reached.
    container.given_up.notify_one();
    match tokio::time::timeout(KILLED, container.exited()).await {
        Ok(()) => Ok(()),
        Err(_) => Err(ContainerError::DoesNotEnd { id: container.id().clone() }),
    }
}
