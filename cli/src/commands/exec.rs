//! `berth exec`: runs a program in a running container to its end.

use std::process::ExitCode;

use berth_cri::v1::{ContainerState, ExecSyncRequest};

use crate::args::ExecArgs;
use crate::daemon::{Daemon, answer};
use crate::error::Error;
use crate::log_line::Stream;
use crate::output;

/// Why a program is not run at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    /// There is no process to join.
    #[error("container `{0}` is not running")]
    NotRunning(String),
}

/// Runs a program; the exit code is the program's.
///
/// # Errors
/// When the program could not be run, or was killed for taking too long.
pub(crate) async fn exec(daemon: &Daemon, args: ExecArgs) -> Result<ExitCode, Error> {
    if args.interactive || args.tty {
        return Err(Error::Interactive);
    }
    let inventory = daemon.inventory().await?;
    let container = inventory.container(&args.container)?;
    if container.state() != ContainerState::ContainerRunning {
        return Err(ExecError::NotRunning(inventory.label(container)).into());
    }
    let request = ExecSyncRequest {
        container_id: container.id.clone(),
        cmd: args.command,
        timeout: args.timeout.map_or(0, i64::from),
    };
    let act = format!("run a program in {}", inventory.label(container));
    let done = answer(act, daemon.runtime.clone().exec_sync(request)).await?;
    output::bytes(Stream::Stdout, &done.stdout)?;
    output::bytes(Stream::Stderr, &done.stderr)?;
    Ok(ExitCode::from(u8::try_from(done.exit_code).unwrap_or(u8::MAX)))
}
