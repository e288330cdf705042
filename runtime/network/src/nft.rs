//! Running the `nft` program.
//!
//! The program is started at set-up, repair and tear-down only. It is looked for in the system's
//! own directories, not in `PATH`, and gets the script on its standard input.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use berth_sys::program::{Ended, Run};

/// Where the program may be.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// How long one run may take. It needs some 10 ms; the rest is for a busy node, or a firewall with
/// many sets, which `nft` reads in whole before it acts.
const DEADLINE: Duration = Duration::from_secs(30);

/// Most bytes kept of what the program says about an error.
const MAX_MESSAGE: usize = 4096;

/// Why the firewall could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is in none of the system's directories.
    #[error("nft is not installed in /usr/sbin, /sbin, /usr/bin or /bin: install the package nftables")]
    Missing,
    /// The program could not be started, or its pipes failed.
    #[error("cannot run {}", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The program did not end in time and was killed.
    #[error("{} did not finish within {} s", program.display(), DEADLINE.as_secs())]
    Timeout {
        /// The program.
        program: PathBuf,
    },
    /// The program ended with an error. The message is its own, cut at 4 KiB.
    #[error("{} failed with {status}: {message}", program.display())]
    Failed {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error.
        message: String,
    },
}

/// Runs a script as one transaction: all of it or nothing (`nft(8)`).
///
/// # Errors
/// [`enum@Error`], by cause.
pub fn apply(script: &str) -> Result<(), Error> {
    run(script, &["-f", "-"])
}

/// Checks a script against the running kernel without changing anything.
///
/// # Errors
/// [`enum@Error`], by cause.
pub fn check(script: &str) -> Result<(), Error> {
    run(script, &["-c", "-f", "-"])
}

fn run(script: &str, arguments: &[&str]) -> Result<(), Error> {
    let program =
        DIRECTORIES.iter().map(|directory| Path::new(directory).join("nft")).find(|path| path.is_file());
    run_program(&program.ok_or(Error::Missing)?, arguments, script, DEADLINE)
}

fn run_program(
    program: &Path,
    arguments: &[impl AsRef<OsStr>],
    script: &str,
    deadline: Duration,
) -> Result<(), Error> {
    let run = Run {
        program,
        arguments,
        environment: &[],
        stdin: script.as_bytes(),
        deadline,
        max_output: None,
        max_message: MAX_MESSAGE,
        caller: None,
    };
    let ended = run.to_end().map_err(|source| Error::Run { program: program.to_owned(), source })?;
    match ended {
        None => Err(Error::Timeout { program: program.to_owned() }),
        Some(Ended { status, .. }) if status.success() => Ok(()),
        Some(Ended { status, message, .. }) => {
            let message = String::from_utf8_lossy(&message).trim_end().to_owned();
            Err(Error::Failed { program: program.to_owned(), status, message })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn shell(script: &str, deadline: Duration) -> Result<(), Error> {
        run_program(Path::new("/bin/sh"), &["-c", script], "input\n", deadline)
    }

    #[test]
    fn the_script_arrives_and_the_environment_does_not() {
        shell("read line && [ \"$line\" = input ] && [ -z \"$HOME$CARGO\" ]", DEADLINE).unwrap();
    }

    #[test]
    fn what_the_program_says_is_kept_up_to_a_bound() {
        let error = shell("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 3", DEADLINE).unwrap_err();
        let Error::Failed { status, message, .. } = error else { panic!("{error}") };
        assert_eq!((status.code(), message.len()), (Some(3), 4096));
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let begin = Instant::now();
        let error = shell("exec sleep 100", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let error = run_program(Path::new("/nonexistent/nft"), &["-v"], "", DEADLINE).unwrap_err();
        assert!(matches!(error, Error::Run { .. }), "{error}");
    }

    #[test]
    fn a_script_with_a_mistake_is_refused_with_nfts_own_words() {
        let error = check("table inet x { nonsense }\n").unwrap_err();
        assert!(matches!(&error, Error::Failed { message, .. } if message.contains("nonsense")), "{error}");
    }
}
