//! What the command prints: results to standard output, remarks to standard error.
//!
//! The only place that writes to either. A reader that has gone away (`berth ps | head -1`) is an
//! error like any other here; `main` ends quietly on it.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use berth_sys::poll::{Interest, Poll};

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
        // Without its buffer, which would lose count when only a part is taken.
        Stream::Stdout => {
            io::stdout().lock().as_fd().try_clone_to_owned().and_then(|to| write_all(to, bytes))
        }
        Stream::Stderr => {
            io::stderr().lock().as_fd().try_clone_to_owned().and_then(|to| write_all(to, bytes))
        }
    };
    written.map_err(OutputError)
}

/// Writes all of it, also to a pipe that another program has made non-blocking.
fn write_all(to: OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    let mut to = File::from(to);
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let poll = Poll::new()?;
                poll.watch(to.as_fd(), 0, Interest::Room)?;
                poll.wait(None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Prints a message that is not part of the result to standard error.
///
/// Errors are ignored: there is no other place to report them.
pub(crate) fn remark(text: impl Display) {
    let _unheard = writeln!(io::stderr().lock(), "berth: {text}");
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn all_is_written_to_what_another_program_has_made_non_blocking() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        let reading = std::thread::spawn(move || {
            let mut read = Vec::new();
            reader.read_to_end(&mut read).map(|_| read)
        });
        write_all(writer.into(), &bytes).unwrap();
        assert!(reading.join().unwrap().unwrap() == bytes);
    }
}
