//! `berth logs`: the output of a container so far, and as it is written.

use std::path::{Path, PathBuf};

use berth_cri::v1::ContainerState;

use crate::args::LogsArgs;
use crate::daemon::Daemon;
use crate::ending::wait_for_end;
use crate::error::Error;
use crate::log_stream::{self, Following, Selection};

/// Prints a container's log.
///
/// # Errors
/// When there is no such container, it has no log, or the log cannot be read.
pub(crate) async fn logs(daemon: &Daemon, args: LogsArgs) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let container = inventory.container(&args.container)?;
    let status = daemon.container_status(&container.id).await?;
    if status.log_path.is_empty() {
        return Err(Error::NoLog(inventory.label(container)));
    }
    let selection = Selection { last_lines: args.tail, with_times: args.timestamps };
    let lives = matches!(status.state(), ContainerState::ContainerCreated | ContainerState::ContainerRunning);
    if !(args.follow && lives) {
        return Ok(log_stream::print(Path::new(&status.log_path), selection)?);
    }
    let mut following = Following::start(PathBuf::from(status.log_path), selection);
    tokio::select! {
        ended = wait_for_end(daemon, &container.id) => {
            // Removal while following is an end, too.
            if let Err(error) = ended && error.refusal.code != tonic::Code::NotFound {
                return Err(error.into());
            }
        }
        failure = following.failed() => return Err(failure.into()),
    }
    Ok(following.finish().await?)
}
