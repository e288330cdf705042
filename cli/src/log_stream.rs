//! Prints a container's log: its standard output to ours, its standard error to ours.
//!
//! Following runs on its own thread, because a reader of our output that is slow
//! (`berth run app | less`) must not delay the handling of Ctrl-C.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::log_file::{LogFile, LogFileError};
use crate::log_line::{Entry, Stream};
use crate::output::{self, OutputError};

/// How long to wait before looking for new entries: short enough for people, and cheap.
const PAUSE: Duration = Duration::from_millis(20);

/// How long to wait for the log file to appear. The daemon creates it before it reports that the
/// container started; this is for the moment of a rotation, when there is no file at the path.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why printing a log failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogStreamError {
    /// The log cannot be read.
    #[error(transparent)]
    Read(#[from] LogFileError),
    /// Our output has no reader.
    #[error(transparent)]
    Write(#[from] OutputError),
}

/// What part of a log to print.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Selection {
    /// Only this many lines from the end, and later ones.
    pub(crate) last_lines: Option<u64>,
    /// Print the time before each line.
    pub(crate) with_times: bool,
}

/// Prints the log so far.
///
/// # Errors
/// When the log cannot be read, or the output cannot be written.
pub(crate) fn print(path: &Path, selection: Selection) -> Result<(), LogStreamError> {
    let mut log = LogFile::open(path, selection.last_lines)?;
    let mut printer = Printer::new(selection);
    log.read_present(|entry| printer.take(entry).map_err(LogStreamError::from))?;
    Ok(printer.flush()?)
}

/// A log that is being printed as it grows.
#[derive(Debug)]
pub(crate) struct Following {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), LogStreamError>>,
}

impl Following {
    /// Starts to print a log as it grows.
    pub(crate) fn start(path: PathBuf, selection: Selection) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let told_of_end = Arc::clone(&ended);
        let thread = tokio::task::spawn_blocking(move || follow(&path, selection, &told_of_end));
        Self { ended, thread }
    }

    /// Waits until printing fails. Never returns otherwise; may be dropped and called again.
    pub(crate) async fn failed(&mut self) -> LogStreamError {
        match (&mut self.thread).await {
            Ok(Err(error)) => error,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // It ends only with an error, and is never cancelled.
            Ok(Ok(())) | Err(_) => std::future::pending().await,
        }
    }

    /// Prints the rest and ends. For a container that has ended: all its output is in the log.
    ///
    /// # Errors
    /// When the log cannot be read, or the output cannot be written.
    pub(crate) async fn finish(self) -> Result<(), LogStreamError> {
        self.ended.store(true, Ordering::Release);
        match self.thread.await {
            Ok(outcome) => outcome,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // It is never cancelled.
            Err(_) => Ok(()),
        }
    }
}

fn follow(path: &Path, selection: Selection, ended: &AtomicBool) -> Result<(), LogStreamError> {
    let mut log = open_patiently(path, selection.last_lines, ended)?;
    let mut printer = Printer::new(selection);
    loop {
        // Checked before reading, so that everything written before the end is read.
        let last_time = ended.load(Ordering::Acquire);
        let any = log.read_available(|entry| printer.take(entry).map_err(LogStreamError::from))?;
        printer.flush()?;
        if last_time {
            log.hand_out_unfinished(&mut |entry: &[u8]| printer.take(entry))?;
            return Ok(printer.flush()?);
        }
        if !any {
            thread::sleep(PAUSE);
        }
    }
}

fn open_patiently(path: &Path, last_lines: Option<u64>, ended: &AtomicBool) -> Result<LogFile, LogFileError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match LogFile::open(path, last_lines) {
            Err(LogFileError::Open { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound
                    && Instant::now() < deadline
                    && !ended.load(Ordering::Acquire) =>
            {
                thread::sleep(PAUSE);
            }
            opened => return opened,
        }
    }
}

/// Collects the content of entries and writes it in large pieces, in order.
#[derive(Debug)]
struct Printer {
    selection: Selection,
    stream: Stream,
    collected: Vec<u8>,
    /// Whether the last entry of each stream left its line open; the next then gets no timestamp.
    line_is_open: [bool; 2],
}

/// Bytes collected before a write.
const COLLECT_BYTES: usize = 64 * 1024;

impl Printer {
    fn new(selection: Selection) -> Self {
        Self { selection, stream: Stream::Stdout, collected: Vec::new(), line_is_open: [false; 2] }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), OutputError> {
        // Anything not in the format is printed as is: a damaged log is better than none.
        let entry = Entry::parse(bytes).unwrap_or(Entry {
            time: "",
            stream: Stream::Stdout,
            ends_line: true,
            content: bytes,
        });
        if entry.stream != self.stream || self.collected.len() > COLLECT_BYTES {
            self.flush()?;
            self.stream = entry.stream;
        }
        let [stdout_is_open, stderr_is_open] = &mut self.line_is_open;
        let line_is_open = match entry.stream {
            Stream::Stdout => stdout_is_open,
            Stream::Stderr => stderr_is_open,
        };
        if self.selection.with_times && !*line_is_open {
            self.collected.extend_from_slice(entry.time.as_bytes());
            self.collected.push(b' ');
        }
        *line_is_open = !entry.ends_line;
        self.collected.extend_from_slice(entry.content);
        if entry.ends_line {
            self.collected.push(b'\n');
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), OutputError> {
        if self.collected.is_empty() {
            return Ok(());
        }
        let written = output::bytes(self.stream, &self.collected);
        self.collected.clear();
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "2016-10-06T00:17:09.5Z";

    fn collected(selection: Selection, entries: &[&str]) -> String {
        let mut printer = Printer::new(selection);
        for entry in entries {
            printer.take(entry.as_bytes()).unwrap();
        }
        String::from_utf8(printer.collected).unwrap()
    }

    #[test]
    fn partial_entries_are_joined() {
        let entries = [
            &format!("{TIME} stdout P one, "),
            &format!("{TIME} stdout F two"),
            &format!("{TIME} stdout F "),
            &format!("{TIME} stdout P no end"),
        ];
        assert_eq!(
            collected(Selection::default(), &entries.map(|entry| entry.as_str())),
            "one, two\n\nno end"
        );
    }

    #[test]
    fn times_go_before_lines_and_not_before_their_parts() {
        let entries = [
            &format!("{TIME} stdout P one, "),
            &format!("{TIME} stdout F two"),
            &format!("{TIME} stdout F x"),
        ];
        let selection = Selection { with_times: true, ..Selection::default() };
        assert_eq!(
            collected(selection, &entries.map(|entry| entry.as_str())),
            format!("{TIME} one, two\n{TIME} x\n")
        );
    }

    #[test]
    fn what_is_not_in_the_format_is_shown_as_it_is() {
        assert_eq!(collected(Selection::default(), &["{\"log\": 1}", "plain"]), "{\"log\": 1}\nplain\n");
    }

    #[test]
    fn a_missing_log_of_an_ended_container_is_not_waited_for() {
        let before = Instant::now();
        let ended = AtomicBool::new(true);
        assert!(follow(Path::new("/nonexistent/log"), Selection::default(), &ended).is_err());
        assert!(before.elapsed() < PATIENCE);
    }
}
