//! `berth exec`: runs a program in a running container, with our input, output and terminal.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use berth_cri::v1::{ContainerState, ExecRequest};
use berth_streaming::command::{Outcome, Wanted};

use crate::args::ExecArgs;
use crate::daemon::{Daemon, answer, for_streams};
use crate::error::Error;
use crate::interrupts::Interrupts;
use crate::output;
use crate::relay::{Ended, Program, relay};
use crate::remote;
use crate::terminal::Terminal;

/// Why a program was not run to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    /// The container is not running.
    #[error("container `{0}` is not running")]
    NotRunning(String),
    /// The program was not found, or cannot be run.
    #[error("cannot run the program in {container}: {text}")]
    NotRun {
        /// The container.
        container: String,
        /// What the daemon says.
        text: String,
        /// The exit code that a shell would use.
        code: i32,
    },
    /// Any other failure.
    #[error("cannot run the program in {container}: {text}")]
    Failed {
        /// The container.
        container: String,
        /// What the daemon says.
        text: String,
    },
    /// The connection was lost before the program ended.
    #[error("lost the connection to the program in {0} before it ended; is berthd still running?")]
    Lost(String),
    /// The program took longer than allowed.
    #[error("the program in {container} did not end within {seconds} s and was killed")]
    TooLong {
        /// The container.
        container: String,
        /// The limit.
        seconds: u32,
    },
    /// Signal handlers or the terminal cannot be set up.
    #[error("cannot set up the terminal")]
    Terminal(#[source] io::Error),
}

/// Runs a program; the exit code is the program's.
///
/// # Errors
/// When the program could not be run or was killed for taking too long, or its outcome is unknown.
pub(crate) async fn exec(daemon: &Daemon, args: ExecArgs) -> Result<ExitCode, Error> {
    let inventory = daemon.inventory().await?;
    let container = inventory.container(&args.container)?;
    let label = inventory.label(container);
    if container.state() != ContainerState::ContainerRunning {
        return Err(ExecError::NotRunning(label).into());
    }
    let wanted = Wanted { stdin: args.interactive, stdout: true, stderr: !args.tty, terminal: args.tty };
    let request = ExecRequest {
        container_id: container.id.clone(),
        cmd: args.command,
        tty: wanted.terminal,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
    };
    let mut interrupts = Interrupts::listen().map_err(ExecError::Terminal)?;
    let act = format!("run the program in {label}");
    let starting = async {
        let url = answer(act, daemon.runtime.clone().exec(for_streams(request))).await?.url;
        Ok::<_, Error>(remote::command(daemon, &url, wanted).await?)
    };
    let command = tokio::select! {
        command = starting => command?,
        // Dropping the connection ends the program.
        interrupt = interrupts.next() => return Ok(ExitCode::from(interrupt.exit_code())),
    };
    let terminal = Terminal::of_program(wanted).map_err(ExecError::Terminal)?;
    let too_long = async {
        match args.timeout {
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds.into())).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = relay(command, terminal, args.detach_keys, Program::OfExec) => ended?,
        interrupt = interrupts.next() => return Ok(ExitCode::from(interrupt.exit_code())),
        () = too_long => {
            let seconds = args.timeout.unwrap_or_default();
            return Err(ExecError::TooLong { container: label, seconds }.into());
        }
    };
    match ended {
        Ended::Program(Outcome::Exited(code)) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))),
        Ended::Program(Outcome::NotRun { text, code }) => {
            Err(ExecError::NotRun { container: label, text, code }.into())
        }
        Ended::Program(Outcome::Failed(text)) => Err(ExecError::Failed { container: label, text }.into()),
        Ended::Lost => Err(ExecError::Lost(label).into()),
        Ended::Detached => {
            output::remark(format_args!("detached from the program in {label}, which keeps running"));
            Ok(ExitCode::SUCCESS)
        }
    }
}
