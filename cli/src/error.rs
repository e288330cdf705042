//! How a command fails, and its exit code.

use std::process::ExitCode;

use crate::commands::{attach, cp, exec, images, import, port_forward, pull, rm, run};
use crate::daemon::{CallError, ConnectError};
use crate::log_stream::LogStreamError;
use crate::names::NameError;
use crate::output::OutputError;
use crate::pull::PullError;
use crate::remote::RemoteError;
use crate::table::printable;

/// Exit code of a command that failed, where no other code applies.
pub(crate) const FAILURE: u8 = 1;

/// Exit code of `run` and `exec` when Berth failed, not the program, as with env(1), chroot(1) and
/// others.
pub(crate) const BERTH_FAILED: u8 = 125;

/// Exit code when the reader of our output has gone: as if SIGPIPE (13) had ended the command, as
/// it does by default.
pub(crate) const READER_GONE: u8 = 128 + 13;

/// Why a command failed. A transparent variant is the error of the module it
/// names.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Log(#[from] LogStreamError),
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Standard input cannot be read.
    #[error("cannot read standard input")]
    Input(#[source] std::io::Error),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Password(#[from] pull::PasswordError),
    #[error(transparent)]
    Run(#[from] run::RunError),
    #[error(transparent)]
    Exec(#[from] exec::ExecError),
    #[error(transparent)]
    Attach(#[from] attach::AttachError),
    #[error(transparent)]
    Cp(#[from] cp::CpError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    PortForward(#[from] port_forward::PortForwardError),
    #[error(transparent)]
    Import(#[from] import::ImportError),
    #[error(transparent)]
    Image(#[from] images::ImageError),
    #[error(transparent)]
    Remove(#[from] rm::RemoveError),
    /// Several things were asked for, and some failed; each failure was printed.
    #[error("{failed} of {all} failed")]
    Partly { failed: usize, all: usize },
    /// The name is neither a container's nor an image's.
    #[error("no pod, container or image named `{0}`")]
    Nothing(String),
    /// The image is not on this machine.
    #[error("no image `{0}` on this machine; `berth images` lists them")]
    NoImage(String),
    /// The container was created without a log.
    #[error("container `{0}` has no log: it was created without one")]
    NoLog(String),
}

impl Error {
    /// The exit code for this failure, in a command that runs a program or one that does not.
    pub(crate) fn exit_code(&self, runs_a_program: bool) -> ExitCode {
        let code = match self {
            Self::Run(run::RunError::NotStarted { exit_code: Some(code), .. }) => *code,
            Self::Exec(exec::ExecError::NotRun { code, .. }) => u8::try_from(*code).unwrap_or(BERTH_FAILED),
            _ if self.reader_is_gone() => READER_GONE,
            _ if runs_a_program => BERTH_FAILED,
            _ => FAILURE,
        };
        ExitCode::from(code)
    }

    /// Whether our output has lost its reader, so that the error cannot be shown either.
    pub(crate) fn reader_is_gone(&self) -> bool {
        let error = match self {
            Self::Output(error) | Self::Log(LogStreamError::Write(error)) => error,
            _ => return false,
        };
        error.0.kind() == std::io::ErrorKind::BrokenPipe
    }

    /// The error and its causes on one line. Texts from the daemon may hold anything; a terminal
    /// must not act on it.
    pub(crate) fn one_line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        printable(line.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    #[test]
    fn an_error_is_one_line_whatever_the_daemon_says() {
        let refusal = Status::internal("no\nsuch\u{1b}[31m thing\n").into();
        let error = Error::from(CallError { act: "pull x".into(), refusal });
        assert_eq!(error.one_line(), "cannot pull x: no?such?[31m thing");
    }
}
