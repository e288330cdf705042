//! `berth rm`: removes pods and containers, and the logs of pods that `berth run` made.
//!
//! Such a pod is its one container, so naming either removes both. In other pods a container goes by itself; their
//! logs belong to whoever made them.

use std::fs;
use std::io;
use std::path::PathBuf;

use berth_cri::v1::{Container, PodSandbox};

use crate::args::RmArgs;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::names::{Inventory, Target, pod_name};
use crate::run_plan::log_folder_of;

use super::stop::{report, runs};

/// Why something is still there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoveError {
    /// It runs, and force was not asked for.
    #[error("`{0}` runs; stop it first, or remove it with -f")]
    Runs(String),
    /// The pod is gone, its logs are not.
    #[error("remove logs {path}")]
    Logs {
        /// Folder of the logs.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// Removes everything that was named, and prints each name that was.
///
/// # Errors
/// When something could not be removed; the rest is.
pub(crate) async fn remove(daemon: &Daemon, args: &RmArgs) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let mut outcomes = Vec::with_capacity(args.names.len());
    for name in &args.names {
        outcomes.push(remove_one(daemon, &inventory, name, args.force).await);
    }
    report(&args.names, outcomes)
}

async fn remove_one(daemon: &Daemon, inventory: &Inventory, name: &str, force: bool) -> Result<(), Error> {
    match inventory.target(name)? {
        Target::Pod(pod) => remove_pod(daemon, inventory, pod, force).await,
        Target::Container(container) => match inventory.pod(&container.pod_sandbox_id) {
            Some(pod) if is_own(pod) => remove_pod(daemon, inventory, pod, force).await,
            _ => remove_container(daemon, inventory, container, force).await,
        },
    }
}

fn is_own(pod: &PodSandbox) -> bool {
    log_folder_of(pod.metadata.as_ref(), &pod.annotations).is_some()
}

async fn remove_container(
    daemon: &Daemon,
    inventory: &Inventory,
    container: &Container,
    force: bool,
) -> Result<(), Error> {
    if runs(container) && !force {
        return Err(RemoveError::Runs(inventory.label(container)).into());
    }
    Ok(daemon.remove_container(&container.id).await?)
}

async fn remove_pod(
    daemon: &Daemon,
    inventory: &Inventory,
    pod: &PodSandbox,
    force: bool,
) -> Result<(), Error> {
    if !force && inventory.containers_of(&pod.id).any(runs) {
        return Err(RemoveError::Runs(pod_name(pod).to_owned()).into());
    }
    daemon.stop_pod(&pod.id).await?;
    daemon.remove_pod(&pod.id).await?;
    if let Some(path) = log_folder_of(pod.metadata.as_ref(), &pod.annotations) {
        match fs::remove_dir_all(&path) {
            // Removed by hand before.
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(RemoveError::Logs { path, source }.into()),
            Ok(()) => {}
        }
    }
    Ok(())
}
