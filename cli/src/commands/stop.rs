//! `berth stop`: stops containers, and pods in which nothing else runs.

use berth_cri::v1::{Container, ContainerState, PodSandbox};
use futures_util::future::join_all;

use crate::args::StopArgs;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::names::{Inventory, Target};
use crate::output;

/// Stops everything that was named in parallel, and prints the name of each.
///
/// # Errors
/// When something could not be stopped; the rest was.
pub(crate) async fn stop(daemon: &Daemon, args: &StopArgs) -> Result<(), Error> {
    let inventory = &daemon.inventory().await?;
    let grace_seconds = i64::from(args.grace_seconds);
    let all =
        args.names.iter().map(|name| async move { stop_one(daemon, inventory, name, grace_seconds).await });
    report(&args.names, join_all(all).await)
}

async fn stop_one(
    daemon: &Daemon,
    inventory: &Inventory,
    name: &str,
    grace_seconds: i64,
) -> Result<(), Error> {
    match inventory.target(name)? {
        Target::Container(container) => Ok(daemon.stop_container(&container.id, grace_seconds).await?),
        Target::Pod(pod) => stop_pod(daemon, inventory, pod, grace_seconds).await,
    }
}

/// Stops every container gracefully, then takes down the pod's network: a pod never runs again.
async fn stop_pod(
    daemon: &Daemon,
    inventory: &Inventory,
    pod: &PodSandbox,
    grace_seconds: i64,
) -> Result<(), Error> {
    let running = inventory.containers_of(&pod.id).filter(|container| runs(container));
    let stops = running.map(|container| daemon.stop_container(&container.id, grace_seconds));
    join_all(stops).await.into_iter().collect::<Result<Vec<()>, _>>()?;
    Ok(daemon.stop_pod(&pod.id).await?)
}

/// Whether a program is running.
pub(super) fn runs(container: &Container) -> bool {
    container.state() == ContainerState::ContainerRunning
}

/// Prints the names that succeeded, and an error for each that failed.
pub(super) fn report(names: &[String], outcomes: Vec<Result<(), Error>>) -> Result<(), Error> {
    let all = outcomes.len();
    let mut failures = Vec::new();
    for (name, outcome) in names.iter().zip(outcomes) {
        match outcome {
            Ok(()) => output::line(name)?,
            Err(error) => failures.push(error),
        }
    }
    // A single failure is reported by the caller; of several, each is reported here.
    match failures.len() {
        0 => Ok(()),
        1 => failures.pop().map_or(Ok(()), Err),
        failed => {
            for error in &failures {
                output::remark(error.one_line());
            }
            Err(Error::Partly { failed, all })
        }
    }
}
