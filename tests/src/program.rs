//! Programs that the tests run: to their end, or the end of their logs when they fail.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Runs a program without input to its end and returns its output.
///
/// # Errors
/// When it cannot be started or does not end with success; the message has its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {} {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program with a text on its standard input to its end.
///
/// # Errors
/// When it cannot be started or does not end with success.
pub fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut stdin = child.stdin.take().context("its input")?;
    stdin.write_all(input.as_bytes()).with_context(|| format!("writing to {program}"))?;
    drop(stdin);
    let status = child.wait()?;
    ensure!(status.success(), "{program} {arguments:?}: {status}");
    Ok(())
}

/// The end of a program's log file, for the message of a failed test.
#[must_use]
pub fn last_lines(whose: &str, log: &Path) -> String {
    /// Enough for the lines of some requests.
    const BYTES: u64 = 6000;
    let tail = || -> std::io::Result<Vec<u8>> {
        let file = fs::File::open(log)?;
        let from = file.metadata()?.len().saturating_sub(BYTES);
        let mut bytes = vec![0; usize::try_from(BYTES).unwrap_or_default()];
        let read = file.read_at(&mut bytes, from)?;
        bytes.truncate(read);
        Ok(bytes)
    };
    match tail() {
        Ok(bytes) => format!("{whose}'s last lines:\n{}", String::from_utf8_lossy(&bytes)),
        Err(error) => format!("{whose} has no log: {error}"),
    }
}
