//! `berth attach`: joins the streams of a container's main program.

use std::io;
use std::process::ExitCode;

use berth_cri::v1::{AttachRequest, ContainerState};
use berth_streaming::client::Command;
use berth_streaming::command::{Outcome, Wanted};
use serde_json::Value;

use crate::args::AttachArgs;
use crate::daemon::{Daemon, answer, for_streams};
use crate::ending::{exit_code, wait_for_end};
use crate::error::Error;
use crate::interrupts::Interrupts;
use crate::output;
use crate::relay::{Ended, Program, relay};
use crate::remote;
use crate::terminal::Terminal;

/// Why attaching to a container failed or ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    /// It is not running.
    #[error("container `{0}` is not running; `berth logs {0}` shows what it wrote")]
    NotRunning(String),
    /// The streams failed.
    #[error("cannot attach to {container}: {text}")]
    Failed {
        /// The container.
        container: String,
        /// What the daemon says.
        text: String,
    },
    /// The connection was lost; the container keeps running.
    #[error("lost the connection to {0}, which keeps running; `berth attach {0}` joins it again")]
    Lost(String),
    /// Signal handlers or the terminal cannot be set up.
    #[error("cannot set up the terminal")]
    Terminal(#[source] io::Error),
}

/// Relays streams until the container ends or the detach keys are typed.
///
/// # Errors
/// When there is no such container, it is not running, or the connection is lost.
pub(crate) async fn attach(daemon: &Daemon, args: AttachArgs) -> Result<ExitCode, Error> {
    let inventory = daemon.inventory().await?;
    let container = inventory.container(&args.container)?;
    let label = inventory.label(container);
    if container.state() != ContainerState::ContainerRunning {
        return Err(AttachError::NotRunning(label).into());
    }
    let details = daemon.container_details(&container.id).await?;
    let is = |key: &str| details.pointer(&format!("/config/{key}")).and_then(Value::as_bool).unwrap_or(false);
    let mut wanted = streams(is("stdin"), is("tty"));
    wanted.stdin &= !args.no_stdin;
    let mut interrupts = Interrupts::listen().map_err(AttachError::Terminal)?;
    let command = connect(daemon, &container.id, &label, wanted).await?;
    let terminal = Terminal::of_program(wanted).map_err(AttachError::Terminal)?;
    let ended = tokio::select! {
        ended = relay(command, terminal, args.detach_keys, Program::OfContainer) => ended?,
        interrupt = interrupts.next() => return Ok(ExitCode::from(interrupt.exit_code())),
    };
    match ended {
        Ended::Program(Outcome::Exited(_)) => tokio::select! {
            status = wait_for_end(daemon, &container.id) => Ok(exit_code(&status?)),
            interrupt = interrupts.next() => Ok(ExitCode::from(interrupt.exit_code())),
        },
        Ended::Program(Outcome::NotRun { text, .. } | Outcome::Failed(text)) => {
            Err(AttachError::Failed { container: label, text }.into())
        }
        Ended::Lost => Err(AttachError::Lost(label).into()),
        Ended::Detached => {
            output::remark(format_args!("detached from {label}, which keeps running"));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The streams of a container's main program that can be joined.
pub(super) fn streams(stdin: bool, terminal: bool) -> Wanted {
    Wanted { stdin, stdout: true, stderr: !terminal, terminal }
}

/// Joins the streams of the container `label`.
///
/// # Errors
/// When the daemon refuses, or cannot be reached.
pub(super) async fn connect(
    daemon: &Daemon,
    id: &str,
    label: &str,
    wanted: Wanted,
) -> Result<Command, Error> {
    let request = AttachRequest {
        container_id: id.to_owned(),
        stdin: wanted.stdin,
        tty: wanted.terminal,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
    };
    let url =
        answer(format!("attach to {label}"), daemon.runtime.clone().attach(for_streams(request))).await?.url;
    Ok(remote::command(daemon, &url, wanted).await?)
}
