//! `berth rm`: removes pods and containers, and the logs of pods that `berth run` made.
//!
//! Removing the last container of such a pod removes the pod. The logs of other pods belong
//! to their creators, and stay.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use berth_cri::v1::{Container, PodSandbox};

use super::stop::{report, runs};
use crate::args::RmArgs;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::names::{Inventory, Target, pod_name};
use crate::run_plan::log_directory_of;

/// Why something was not removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoveError {
    /// It is running, and force was not asked for.
    #[error("`{0}` is running; stop it first, or remove it with -f")]
    Runs(String),
    /// The pod is gone, its logs are not.
    #[error("cannot remove the logs in {path}")]
    Logs {
        /// Directory of the logs.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// Removes everything that was named, and prints the name of each.
///
/// # Errors
/// When something could not be removed; the rest was.
pub(crate) async fn remove(daemon: &Daemon, args: &RmArgs) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let mut outcomes = Vec::with_capacity(args.names.len());
    for name in &args.names {
        outcomes.push(remove_one(daemon, &inventory, name, args.force).await);
    }
    report(&args.names, outcomes)
}

async fn remove_one(daemon: &Daemon, inventory: &Inventory, name: &str, force: bool) -> Result<(), Error> {
    let target = if force { inventory.certain_target(name)? } else { inventory.target(name)? };
    match target {
        Target::Pod(pod) => remove_pod(daemon, inventory, pod, force).await,
        Target::Container(container) => match inventory.pod(&container.pod_sandbox_id) {
            Some(pod) if is_own(pod) && inventory.containers_of(&pod.id).count() == 1 => {
                remove_pod(daemon, inventory, pod, force).await
            }
            pod => remove_container(daemon, inventory, container, pod, force).await,
        },
    }
}

fn log_directory(pod: &PodSandbox) -> Option<PathBuf> {
    log_directory_of(pod.metadata.as_ref(), &pod.annotations)
}

fn is_own(pod: &PodSandbox) -> bool {
    log_directory(pod).is_some()
}

async fn remove_container(
    daemon: &Daemon,
    inventory: &Inventory,
    container: &Container,
    pod: Option<&PodSandbox>,
    force: bool,
) -> Result<(), Error> {
    if runs(container) && !force {
        return Err(RemoveError::Runs(inventory.label(container)).into());
    }
    let log = PathBuf::from(daemon.container_status(&container.id).await?.log_path);
    daemon.remove_container(&container.id).await?;
    match pod.and_then(log_directory) {
        // Only a file directly in the pod's own directory.
        Some(directory) if log.parent() == Some(&directory) => Ok(remove_log(&log)?),
        _ => Ok(()),
    }
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
    match log_directory(pod) {
        Some(directory) => Ok(remove_logs(&directory, fs::remove_dir_all(&directory))?),
        None => Ok(()),
    }
}

/// Removes the log of one container, including rotated files.
pub(super) fn remove_log(log: &Path) -> Result<(), RemoveError> {
    remove_logs(log, fs::remove_file(log))?;
    let (Some(directory), Some(name)) = (log.parent(), log.file_name()) else { return Ok(()) };
    let failed = |source| RemoveError::Logs { path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(failed)?,
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if is_rotated(&entry.file_name(), name) {
            let path = entry.path();
            remove_logs(&path, fs::remove_file(&path))?;
        }
    }
    Ok(())
}

/// Whether a file is a rotated one of `log`: its name and a number.
fn is_rotated(name: &OsStr, log: &OsStr) -> bool {
    let number = name.as_bytes().strip_prefix(log.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
    number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
}

/// The outcome of a removal; a missing file counts as removed.
pub(super) fn remove_logs(path: &Path, removed: io::Result<()>) -> Result<(), RemoveError> {
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RemoveError::Logs { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotated_logs_go_with_the_log_and_others_stay() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.log", "a.log.1", "a.log.3", "b.log", "a.logs", "a.log.", "a.log.1.gz", "b.log.1"] {
            fs::write(directory.path().join(name), "x").unwrap();
        }
        remove_log(&directory.path().join("a.log")).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a.log.", "a.log.1.gz", "a.logs", "b.log", "b.log.1"]);
    }

    #[test]
    fn logs_that_are_gone_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.log");
        fs::write(&path, "x").unwrap();
        for _ in 0..2 {
            remove_logs(&path, fs::remove_file(&path)).unwrap();
        }
        let error = remove_logs(directory.path(), fs::remove_file(directory.path())).unwrap_err();
        assert!(matches!(error, RemoveError::Logs { path, .. } if path == directory.path()));
    }
}
