//! Tests that cannot run on a machine: reported and counted, never silently passed over.

use std::fs::OpenOptions;
use std::io::Write as _;

/// Notes that the test of this name did not run, and why. The test has to return afterwards.
///
/// The line goes to the file that the environment variable `BERTH_SKIPS` names; `scripts/run-tests`
/// sets it and moves every line there from the count of passed tests to that of skipped ones.
/// Without the variable it goes to standard error, which the test harness shows with
/// `--show-output`. Each line is one write(2), since several tests and programs write at the same
/// time.
///
/// # Panics
/// When the file cannot be written: a skip that is not counted would look like a pass.
#[expect(clippy::print_stderr, reason = "without a file to count in, the person at the terminal is told")]
pub fn skip(test: &str, reason: &str) {
    let line = format!("{test}: {}\n", reason.replace('\n', " "));
    match std::env::var_os("BERTH_SKIPS") {
        Some(path) => {
            let written = OpenOptions::new()
                .append(true)
                .create(true)
                .open(&path)
                .and_then(|mut file| file.write_all(line.as_bytes()));
            if let Err(error) = written {
                panic!("cannot note in {} that {test} was skipped: {error}", path.display());
            }
        }
        None => eprint!("skipped {line}"),
    }
}
