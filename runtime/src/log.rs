//! The daemon's log: one line for each event, whatever text it contains.
//!
//! Names and messages of images, registries and requests end up in log lines. Escaping them where
//! they are logged would be forgotten somewhere, so whole lines are escaped where they leave the
//! process.

use std::io::{self, IsTerminal as _, Stderr, Write};

use berth_model::text::printable;
use tracing_subscriber::fmt::MakeWriter;

/// Creates a writer for each event. With `colours`, sequences that set the colour of text are kept;
/// `tracing-subscriber` escapes those in fields.
#[derive(Debug, Clone, Copy)]
pub struct Lines {
    colours: bool,
}

impl Lines {
    /// For standard error, in colour if it is a terminal.
    #[must_use]
    pub fn to_stderr() -> Self {
        Self { colours: io::stderr().is_terminal() }
    }

    /// Whether lines are coloured.
    #[must_use]
    pub fn has_colours(self) -> bool {
        self.colours
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Line { out: io::stderr(), colours: self.colours }
    }
}

/// Writes a whole event as one line.
#[derive(Debug)]
pub struct Line<W> {
    out: W,
    colours: bool,
}

impl<W: Write> Write for Line<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write_all(one_line(&String::from_utf8_lossy(bytes), self.colours).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The text with everything escaped that `printable` escapes, but for the end of the line at its
/// end and, with `colours`, the sequences of ECMA-48's SGR (`ESC [ 1 ; 31 m`).
fn one_line(text: &str, colours: bool) -> String {
    let (mut rest, end) = match text.strip_suffix('\n') {
        Some(line) => (line, "\n"),
        None => (text, ""),
    };
    let mut line = String::with_capacity(text.len());
    while colours && let Some(escape) = rest.find('\u{1b}') {
        let (before, after) = rest.split_at(escape);
        line.push_str(&printable(before));
        let length = sgr_length(after).unwrap_or(0);
        let (sequence, after) = after.split_at(length);
        line.push_str(sequence);
        rest = after;
        if length == 0 {
            line.push_str(r"\u{1b}");
            rest = rest.strip_prefix('\u{1b}').unwrap_or(rest);
        }
    }
    line.push_str(&printable(rest));
    line + end
}

/// Length of the SGR sequence at the start.
fn sgr_length(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\u{1b}[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    parameters.get(end..)?.starts_with('m').then_some(2 + end + 1)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn an_event_is_one_line_of_printable_text() {
        for (text, colours, line) in [
            ("plain\n", false, "plain\n"),
            ("a\nERROR forged\n", false, "a\\nERROR forged\n"),
            ("a\u{2028}b\u{202e}c\r\n", false, "a\\u{2028}b\\u{202e}c\\r\n"),
            ("no end", false, "no end"),
            ("\u{1b}[32mINFO\u{1b}[0m x\n", true, "\u{1b}[32mINFO\u{1b}[0m x\n"),
            ("\u{1b}[32mINFO\u{1b}[0m x\n", false, "\\u{1b}[32mINFO\\u{1b}[0m x\n"),
            ("\u{1b}[2J\u{1b}]0;t\u{7}\u{1b}\n", true, "\\u{1b}[2J\\u{1b}]0;t\\u{7}\\u{1b}\n"),
            ("\u{1b}[1;31\n", true, "\\u{1b}[1;31\n"),
            ("\u{1b}[31\u{202e}m\n", true, "\\u{1b}[31\\u{202e}m\n"),
        ] {
            assert_eq!(one_line(text, colours), line, "{text:?}");
        }
    }

    #[derive(Clone, Default)]
    struct Collected(Arc<Mutex<Vec<u8>>>);

    impl Write for Collected {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_field_of_an_event_reaches_the_log_raw() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer {0}")]
        struct Outer(&'static str, #[source] io::Error);

        for colours in [false, true] {
            let out = Collected::default();
            let writer = out.clone();
            let log = tracing_subscriber::fmt()
                .with_writer(move || Line { out: writer.clone(), colours })
                .with_ansi(colours)
                .finish();
            let hostile = "x\u{202e}\u{2028}\n\u{1b}[2J\u{85}y";
            let error = Outer(hostile, io::Error::other(hostile));
            tracing::subscriber::with_default(log, || {
                tracing::warn!(name = %hostile, other = ?hostile, error = &error as &dyn std::error::Error, "said {hostile}");
            });
            let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
            let line = text.strip_suffix('\n').unwrap();
            for forbidden in ['\u{202e}', '\u{2028}', '\n', '\u{85}'] {
                assert!(!line.contains(forbidden), "{forbidden:?} in {line:?}");
            }
            assert!(!line.contains("\u{1b}[2J"), "{line:?}");
            assert_eq!(line.matches(r"\u{202e}").count(), 5, "{line}");
        }
    }
}
