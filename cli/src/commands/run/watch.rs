//! Watches a running container to its end: shows its output, stops it when asked to, and learns its exit
//! code.
//!
//! The first interrupt stops the container, the second kills it; the command goes on to wait, so that the
//! exit code is always the program's own. The daemon may be restarted meanwhile: the container does not
//! notice, and the command waits for the daemon's return.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_cri::v1::{ContainerState, ContainerStatus};

use crate::daemon::{CallError, Daemon};
use crate::error::Error;
use crate::interrupts::{GivenUp, Interrupts};
use crate::log_stream::{Following, Selection};
use crate::output;

use super::RunError;

/// What the first interrupt gives the program to end: as long as `berth stop` does.
const GRACE_SECONDS: i64 = 10;

/// Pauses between two looks at the container: short at first, for programs that end at once.
const FIRST_PAUSE: Duration = Duration::from_millis(4);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How long a daemon may be away before we stop waiting for it. A restart takes less than a second; a minute
/// leaves room for an upgrade.
const DAEMON_PATIENCE: Duration = Duration::from_secs(60);

/// Shows the output until the container has ended, and stops it when asked to.
pub(super) async fn watch(
    daemon: &Daemon,
    id: &str,
    interrupts: &mut Interrupts,
) -> Result<ContainerStatus, Error> {
    let log_path = daemon.container_status(id).await?.log_path;
    let mut following = Following::start(PathBuf::from(log_path), Selection::default());
    let mut log_failure = None;
    let ended = wait_for_end(daemon, id);
    tokio::pin!(ended);
    let status = loop {
        tokio::select! {
            status = &mut ended => break status?,
            failure = following.failed(), if log_failure.is_none() => {
                log_failure = Some(failure);
                stop_in_background(daemon, id, GRACE_SECONDS);
            }
            count = interrupts.next() => match count {
                1 => stop_in_background(daemon, id, GRACE_SECONDS),
                2 => stop_in_background(daemon, id, 0),
                _ => return Err(RunError::from(GivenUp).into()),
            },
        }
    };
    match log_failure {
        Some(failure) => return Err(failure.into()),
        // The reader of our output may be slow, or may have stopped reading.
        None => interrupts.shield(following.finish()).await.map_err(RunError::from)??,
    }
    Ok(status)
}

fn stop_in_background(daemon: &Daemon, id: &str, grace_seconds: i64) {
    let (daemon, id) = (daemon.clone(), id.to_owned());
    tokio::spawn(async move {
        if let Err(error) = daemon.stop_container(&id, grace_seconds).await {
            output::remark(format_args!("{error}: {}", error.refusal));
        }
    });
}

/// Waits until the container has ended, over restarts of the daemon.
pub(in crate::commands) async fn wait_for_end(
    daemon: &Daemon,
    id: &str,
) -> Result<ContainerStatus, CallError> {
    let mut pause = FIRST_PAUSE;
    let mut away_since: Option<Instant> = None;
    loop {
        match daemon.container_status(id).await {
            Ok(status) => {
                away_since = None;
                if matches!(
                    status.state(),
                    ContainerState::ContainerExited | ContainerState::ContainerUnknown
                ) {
                    return Ok(status);
                }
            }
            Err(error) if error.refusal.daemon_is_away() => {
                if away_since.get_or_insert_with(Instant::now).elapsed() > DAEMON_PATIENCE {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
