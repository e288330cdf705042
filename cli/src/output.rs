//! What the command prints: results to standard output, remarks to standard error.
//!
//! The only place that writes to either. A reader that has gone away (`berth ps | head -1`) is an
//! error like any other here; `main` ends quietly on it.

use std::fmt::Display;
use std::io::{self, Write};

use crate::log_line::Stream;

/// Writing failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the output")]
pub(crate) struct OutputError(#[source] pub(crate) io::Error);

/// Writes text to standard output as it is.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn text(text: &str) -> Result<(), OutputError> {
    bytes(Stream::Stdout, text.as_bytes())
}

/// Writes a line to standard output.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn line(text: impl Display) -> Result<(), OutputError> {
    bytes(Stream::Stdout, format!("{text}\n").as_bytes())
}

/// Writes bytes as they are, unbuffered.
///
/// # Errors
/// When they cannot be written.
pub(crate) fn bytes(stream: Stream, bytes: impl AsRef<[u8]>) -> Result<(), OutputError> {
    let bytes = bytes.as_ref();
    let written = match stream {
        Stream::Stdout => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes).and_then(|()| stdout.flush())
        }
        Stream::Stderr => io::stderr().lock().write_all(bytes),
    };
    written.map_err(OutputError)
}

/// Prints a message that is not part of the result to standard error.
///
/// Errors are ignored: there is no other place to report them.
pub(crate) fn remark(text: impl Display) {
    let _unheard = writeln!(io::stderr().lock(), "berth: {text}");
}
