//! Running a plugin: sections 2 and 4 of the specification.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_sys::program::Run;
use serde::Deserialize;
use serde_json::Value;

use crate::config::PluginConfig;
use crate::host::{Host, Step};
use crate::result::ResultError;

/// Most bytes of an answer. Real ones have a few KiB.
const MAX_ANSWER: usize = 1 << 20;

/// Most bytes kept of what a plugin writes to standard error.
const MAX_MESSAGE: usize = 4096;

/// Most characters of a plugin's words in an error.
const MAX_SAID: usize = 1024;

/// Where plugins find the programs that they run, such as `iptables`. They get nothing else of the
/// daemon's environment.
const PROGRAM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a plugin is asked to do: `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Attach.
    Add,
    /// Detach.
    Del,
    /// Look whether an attachment is as it was made.
    Check,
    /// Give back what belongs to no attachment.
    Gc,
    /// Say whether attaching would work.
    Status,
}

impl fmt::Display for Command {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
        })
    }
}

/// Why a plugin did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// Its program is in none of the directories.
    #[error("it is not installed in {}", list(directories))]
    Missing {
        /// Where it was looked for.
        directories: Vec<PathBuf>,
    },
    /// Its program does not start.
    #[error("cannot run {program}")]
    Run {
        /// The program.
        program: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It did not end and was killed.
    #[error("it did not finish within {} s and was killed", after.as_secs_f32().ceil())]
    Late {
        /// How long it had.
        after: Duration,
    },
    /// It says so.
    #[error("{}{message}{}", code_prefix(*code), in_parentheses(details))]
    Failed {
        /// Of the specification when below 100, else its own; 0 when it said none.
        code: i64,
        /// Its words.
        message: String,
        /// More of them.
        details: String,
    },
    /// It printed too much.
    #[error("it printed more than 1 MiB and was killed")]
    Flood,
    /// It printed something else than a result.
    #[error(transparent)]
    Result(#[from] ResultError),
}

fn list(directories: &[PathBuf]) -> String {
    directories.iter().map(|directory| directory.display().to_string()).collect::<Vec<_>>().join(" or ")
}

fn code_prefix(code: i64) -> String {
    if code == 0 { String::new() } else { format!("code {code}: ") }
}

fn in_parentheses(details: &str) -> String {
    if details.is_empty() { String::new() } else { format!(" ({details})") }
}

/// The error object of a plugin: section 5 of the specification, "Error".
#[derive(Deserialize)]
struct Said {
    #[serde(default)]
    code: Value,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: Value,
}

/// One run of a plugin.
#[derive(Debug)]
pub(crate) struct Invocation<'a> {
    pub(crate) plugin: &'a PluginConfig,
    pub(crate) host: Host<'a>,
    pub(crate) command: Command,
    /// Variables besides the command and the path.
    pub(crate) environment: Vec<(&'static str, OsString)>,
    pub(crate) stdin: &'a [u8],
    pub(crate) deadline: Instant,
}

impl Invocation<'_> {
    /// Runs it, and returns what it printed.
    pub(crate) fn run(&self) -> Result<Vec<u8>, PluginError> {
        let program = self.program()?;
        let command = self.command.to_string();
        let path = std::env::join_paths(self.host.directories).map_err(|error| PluginError::Run {
            program: program.clone(),
            source: io::Error::other(error),
        })?;
        let mut environment: Vec<(&str, &OsStr)> =
            vec![("PATH", PROGRAM_PATH.as_ref()), ("CNI_COMMAND", command.as_ref()), ("CNI_PATH", &path)];
        environment.extend(self.environment.iter().map(|(name, value)| (*name, value.as_os_str())));
        let arguments: &[&str] = &[];
        let time = self.deadline.saturating_duration_since(Instant::now());
        let run = Run {
            program: &program,
            arguments,
            environment: &environment,
            stdin: self.stdin,
            deadline: time,
            max_output: Some(MAX_ANSWER),
            max_message: MAX_MESSAGE,
            caller: self.host.caller,
        };
        (self.host.announce)(Step::Plugin(&program, time));
        let ended = run
            .to_end()
            .map_err(|source| PluginError::Run { program: program.clone(), source })?
            .ok_or(PluginError::Late { after: time })?;
        if ended.flooded {
            return Err(PluginError::Flood);
        }
        if !ended.status.success() {
            return Err(failure(&ended.output, &ended.message, &ended.status.to_string()));
        }
        Ok(ended.output)
    }

    fn program(&self) -> Result<PathBuf, PluginError> {
        self.host
            .directories
            .iter()
            .map(|directory| directory.join(self.plugin.program()))
            .find(|path| {
                (self.host.announce)(Step::Path(path));
                path.is_file()
            })
            .ok_or_else(|| PluginError::Missing { directories: self.host.directories.to_vec() })
    }
}

/// What a plugin that failed said, on standard output as it should, or else on standard error.
fn failure(output: &[u8], message: &[u8], status: &str) -> PluginError {
    match serde_json::from_slice(output) {
        Ok(Said { code, msg, details }) if !msg.is_empty() || !code.is_null() => {
            let code = code.as_i64().unwrap_or(0);
            let message = if msg.is_empty() { status.to_owned() } else { words(&msg) };
            let details = details.as_str().map(words).unwrap_or_default();
            PluginError::Failed { code, message, details }
        }
        _ => {
            let text = String::from_utf8_lossy(if message.is_empty() { output } else { message });
            let text = words(&text);
            let message = if text.is_empty() { status.to_owned() } else { format!("{status}: {text}") };
            PluginError::Failed { code: 0, message, details: String::new() }
        }
    }
}

/// A plugin's words on one line, and not too many.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MAX_SAID).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_plugin_says_of_its_failure_is_kept() {
        let object =
            br#"{"cniVersion": "1.0.0", "code": 7, "msg": "Invalid\nConfiguration", "details": "ip"}"#;
        for (output, message, says) in [
            (&object[..], &b"noise"[..], "code 7: Invalid Configuration (ip)"),
            (br#"{"code": -1, "msg": "no code of its own"}"#, b"", "code -1: no code of its own"),
            (br#"{"msg": "none", "details": null}"#, b"", "none"),
            (br#"{"code": "x", "msg": "odd", "details": {}}"#, b"", "odd"),
            (br#"{"code": 7}"#, b"", "code 7: exit status: 1"),
            (b"", b"panic: x\n\ngoroutine 1", "exit status: 1: panic: x goroutine 1"),
            (b"not json", b"", "exit status: 1: not json"),
            (b"{}", b"", "exit status: 1: {}"),
            (b"", b"", "exit status: 1"),
        ] {
            assert_eq!(failure(output, message, "exit status: 1").to_string(), says);
        }
    }
}
