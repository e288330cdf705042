//! Watches a running container to its end: shows its output, stops it on request, and gets its exit
//! code.
//!
//! The first interrupt stops the container, the second kills it; the command keeps waiting, so that
//! the exit code is always the program's own. The daemon may restart in between: the container does
//! not notice, and the command waits for the daemon's return.

use std::path::PathBuf;

use berth_cri::v1::ContainerStatus;
use berth_streaming::client::Command;
use berth_streaming::command::Wanted;

use super::RunError;
use crate::daemon::Daemon;
use crate::detach_keys::DetachKeys;
use crate::ending::{runs_on, wait_for_end};
use crate::error::Error;
use crate::interrupts::{GivenUp, Interrupts};
use crate::log_stream::{Following, Selection};
use crate::output;
use crate::relay::{Ended, Program, relay};
use crate::terminal::Terminal;

/// The grace period of the first interrupt: that of `berth stop`.
const GRACE_SECONDS: i64 = 10;

/// Shows the output until the container has ended, and stops it on request.
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
            interrupt = interrupts.next() => match interrupt.count {
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

/// How a program with our input, output or terminal ended.
pub(super) enum Shared {
    /// On its own, or stopped.
    Ended(Box<ContainerStatus>),
    /// Detached: it keeps running.
    Detached,
    /// It keeps running, but the connection was lost.
    Lost,
}

/// Relays the streams of a container until it has ended, and stops it on request.
pub(super) async fn share(
    daemon: &Daemon,
    id: &str,
    command: Command,
    wanted: Wanted,
    keys: DetachKeys,
    interrupts: &mut Interrupts,
) -> Result<Shared, Error> {
    let terminal = Terminal::of_program(wanted).map_err(RunError::Terminal)?;
    let sharing = async {
        // If the reader of our output has gone away, the caller cleans up.
        match relay(command, terminal, keys, Program::OfContainer).await? {
            Ended::Detached => Ok(Shared::Detached),
            Ended::Lost if runs_on(daemon, id).await? => Ok(Shared::Lost),
            // The streams may end before the program does.
            Ended::Program(_) | Ended::Lost => Ok(Shared::Ended(Box::new(wait_for_end(daemon, id).await?))),
        }
    };
    tokio::pin!(sharing);
    loop {
        tokio::select! {
            shared = &mut sharing => return shared,
            interrupt = interrupts.next() => match interrupt.count {
                1 => stop_in_background(daemon, id, GRACE_SECONDS),
                2 => stop_in_background(daemon, id, 0),
                _ => return Err(RunError::from(GivenUp).into()),
            },
        }
    }
}

fn stop_in_background(daemon: &Daemon, id: &str, grace_seconds: i64) {
    let (daemon, id) = (daemon.clone(), id.to_owned());
    tokio::spawn(async move {
        if let Err(error) = daemon.stop_container(&id, grace_seconds).await {
            output::remark(format_args!("{error}: {}", error.refusal));
        }
    });
}
