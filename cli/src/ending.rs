//! Waiting for the end of a container across restarts of the daemon, and its exit code.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use berth_cri::v1::{ContainerState, ContainerStatus};

use crate::daemon::{CallError, Daemon};

/// Polling intervals: short at first, for programs that end at once.
const FIRST_PAUSE: Duration = Duration::from_millis(4);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How long a daemon may be away before we stop waiting for it. A restart takes less than a second;
/// a minute leaves room for an upgrade.
const DAEMON_PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the container has ended, across restarts of the daemon.
pub(crate) async fn wait_for_end(daemon: &Daemon, id: &str) -> Result<ContainerStatus, CallError> {
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

/// Whether the container is running, once the daemon answers again.
pub(crate) async fn runs_on(daemon: &Daemon, id: &str) -> Result<bool, CallError> {
    let since = Instant::now();
    loop {
        match daemon.container_status(id).await {
            Ok(status) => return Ok(status.state() == ContainerState::ContainerRunning),
            Err(error) if error.refusal.daemon_is_away() && since.elapsed() < DAEMON_PATIENCE => {}
            Err(error) => return Err(error),
        }
        tokio::time::sleep(LONGEST_PAUSE).await;
    }
}

/// The exit code of a container that has ended.
pub(crate) fn exit_code(status: &ContainerStatus) -> ExitCode {
    ExitCode::from(u8::try_from(status.exit_code).unwrap_or(u8::MAX))
}
