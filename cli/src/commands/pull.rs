//! `berth pull`: fetches an image and prints its id.

use std::io::{self, BufRead};

use crate::args::PullArgs;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::output;
use crate::pull::{Credentials, Narration};

/// The longest password, in bytes: some registries issue tokens of a few KiB.
const MAX_PASSWORD_BYTES: u64 = 64 * 1024;

/// The password could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PasswordError {
    /// Standard input cannot be read.
    #[error("cannot read the password from standard input")]
    Read(#[source] io::Error),
    /// Standard input ends before the first character.
    #[error("no password on standard input")]
    Empty,
}

/// Pulls an image.
///
/// # Errors
/// When the pull fails.
pub(crate) async fn pull(daemon: &Daemon, args: PullArgs) -> Result<(), Error> {
    let credentials = match args.username {
        Some(username) => Some(Credentials { username, password: read_password(io::stdin().lock())? }),
        None => None,
    };
    let narration = if args.quiet { Narration::Silent } else { Narration::Full };
    let id = crate::pull::pull(daemon, &args.image, credentials, narration).await?;
    Ok(output::line(id)?)
}

/// Reads the first line. A password on the command line would be visible to every user of the
/// machine.
fn read_password(input: impl BufRead) -> Result<String, PasswordError> {
    let mut line = String::new();
    input.take(MAX_PASSWORD_BYTES).read_line(&mut line).map_err(PasswordError::Read)?;
    let password = line.trim_end_matches(['\r', '\n']);
    if password.is_empty() { Err(PasswordError::Empty) } else { Ok(password.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_is_the_password() {
        for (input, password) in [("a b\n", "a b"), ("a", "a"), ("a\r\nb\n", "a"), (" a ", " a ")] {
            assert_eq!(read_password(input.as_bytes()).unwrap(), password);
        }
    }

    #[test]
    fn no_password_and_no_text_are_refused() {
        assert!(matches!(read_password(&b""[..]), Err(PasswordError::Empty)));
        assert!(matches!(read_password(&b"\n\nx"[..]), Err(PasswordError::Empty)));
        assert!(matches!(read_password(&b"\xff\n"[..]), Err(PasswordError::Read(_))));
    }
}
