//! The end of a container: from its shim's record, or from the loss of its shim, to the state that everybody sees.

use super::{Container, lock};
use berth_model::state::{ContainerEvent, Exit, ExitReason};
use berth_shim_proto::exit_record::{self, ExitRecord};
use std::sync::Arc;
use std::time::Duration;

/// The code of a container whose end nobody saw: containerd's.
const EXIT_CODE_LOST: i32 = 255;

/// How long the cgroup may take to be empty after a kill, and to be removed.
const CGROUP_GONE: Duration = Duration::from_secs(10);

/// Waits for the shim's end and then settles the container.
pub(super) fn watch(container: Arc<Container>) {
    tokio::spawn(async move {
        let Some(shim) = container.shim() else { return };
        shim.ended().await;
        drop(shim);
        let settled = container.clone();
        // Reading a file and removing a cgroup wait for the kernel. The task fails only when the daemon stops.
        let exit = tokio::task::spawn_blocking(move || settle(&settled)).await;
        if let Ok(exit) = exit {
            tracing::info!(container = %container.id(), code = exit.code, reason = exit.reason.as_str(), "container has ended");
            *lock(&container.shim) = None;
            // Nothing but an end follows a state, and a second end changes nothing.
            let _ = container.apply(ContainerEvent::Ended(exit));
        }
    });
}

/// Ends whatever is left of it and says how it ended. Blocking.
pub(super) fn settle(container: &Container) -> Exit {
    let recorded = read_record(container);
    // Processes that are not in a pid namespace that died with its process 1, or all of them when the shim was lost.
    let gone = container.cgroup.kill(CGROUP_GONE).and_then(|()| container.cgroup.remove(CGROUP_GONE));
    if let Err(error) = gone {
        tracing::warn!(container = %container.id(), error = %crate::chain(&error), "the cgroup could not be removed");
    }
    let record = recorded.unwrap_or_else(|| {
        let record = lost(container);
        let path = container.files.exit_record();
        if let Err(error) = crate::atomic_file::write(&path, &exit_record::encode(&record)) {
            tracing::warn!(path = %path.display(), %error, "could not write the exit record");
        }
        record
    });
    exit(&record)
}

/// The record that the shim wrote, if it is there and whole.
pub(super) fn read_record(container: &Container) -> Option<ExitRecord> {
    let path = container.files.exit_record();
    match std::fs::read(&path) {
        Ok(bytes) => match exit_record::decode(&bytes) {
            Ok(record) => Some(record),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the exit record is damaged");
                None
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the exit record cannot be read");
            None
        }
    }
}

fn lost(container: &Container) -> ExitRecord {
    let started_at_unix_ns = match container.state() {
        berth_model::state::ContainerState::Running { started_at_unix_ns } => started_at_unix_ns,
        _ => 0,
    };
    ExitRecord {
        exit_code: EXIT_CODE_LOST,
        lost: true,
        started_at_unix_ns,
        finished_at_unix_ns: crate::node::unix_ns(),
        ..ExitRecord::default()
    }
}

/// What `ContainerStatus` says about the end that `record` describes.
pub(super) fn exit(record: &ExitRecord) -> Exit {
    let (reason, message) = if !record.start_error.is_empty() {
        (ExitReason::StartError, record.start_error.clone())
    } else if record.oom_killed {
        (ExitReason::OomKilled, String::new())
    } else if record.lost {
        (ExitReason::Unknown, "its shim was lost, so nobody saw it end".to_owned())
    } else if record.exit_code == 0 {
        (ExitReason::Completed, String::new())
    } else {
        (ExitReason::Error, String::new())
    };
    Exit {
        code: record.exit_code,
        started_at_unix_ns: record.started_at_unix_ns,
        finished_at_unix_ns: record.finished_at_unix_ns,
        reason,
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_follow_from_the_record() {
        let ended = ExitRecord { started_at_unix_ns: 1, finished_at_unix_ns: 2, ..ExitRecord::default() };
        let cases = [
            (ended.clone(), ExitReason::Completed),
            (ExitRecord { exit_code: 3, ..ended.clone() }, ExitReason::Error),
            (ExitRecord { exit_code: 255, ..ended.clone() }, ExitReason::Error),
            (ExitRecord { exit_code: 137, signal: 9, ..ended.clone() }, ExitReason::Error),
            (
                ExitRecord { exit_code: 137, signal: 9, oom_killed: true, ..ended.clone() },
                ExitReason::OomKilled,
            ),
            (ExitRecord { exit_code: 1, oom_killed: true, ..ended.clone() }, ExitReason::OomKilled),
            (ExitRecord { exit_code: 255, lost: true, ..ended.clone() }, ExitReason::Unknown),
            (ExitRecord { exit_code: 128, start_error: "no".to_owned(), ..ended }, ExitReason::StartError),
        ];
        for (record, reason) in cases {
            assert_eq!(exit(&record).reason, reason, "{record:?}");
        }
    }
}
