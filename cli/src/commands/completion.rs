//! `berth completion`: a script that completes our commands and options in a shell.

use clap::CommandFactory as _;
use clap_complete::{generate, shells};

use crate::args::{Cli, Shell};
use crate::output::{self, OutputError};

/// Prints the script for a shell.
///
/// # Errors
/// When it cannot be printed.
pub(crate) fn completion(shell: Shell) -> Result<(), OutputError> {
    output::text(&script(shell))
}

fn script(shell: Shell) -> String {
    let (mut command, mut script) = (Cli::command(), Vec::new());
    match shell {
        Shell::Bash => generate(shells::Bash, &mut command, "berth", &mut script),
        Shell::Zsh => generate(shells::Zsh, &mut command, "berth", &mut script),
        Shell::Fish => generate(shells::Fish, &mut command, "berth", &mut script),
    }
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shell_gets_the_commands_and_their_options() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            for word in ["port-forward", "detach-keys", "completion"] {
                assert!(script.contains(word), "{shell:?}: {word}");
            }
        }
    }
}
