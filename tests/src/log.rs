//! Container logs in the CRI format, read strictly: `<RFC 3339 time> <stdout|stderr> <P|F>
//! <content>` and a newline, one entry per line (the kubelet's `pkg/kubelet/kuberuntime/logs`).

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The time, as written.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the container's line continues in the next entry of its stream.
    pub partial: bool,
    /// What the container wrote, without the newline.
    pub content: Vec<u8>,
}

/// Reads a whole log.
///
/// # Errors
/// When the file cannot be read, or a line does not have exactly this format.
pub fn read(path: &Path) -> Result<Vec<Entry>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&bytes).with_context(|| format!("the log {}", path.display()))
}

/// The output of the container to `stream`, reassembled.
#[must_use]
pub fn text(entries: &[Entry], stream: &str) -> String {
    let mut text = Vec::new();
    for entry in entries.iter().filter(|entry| entry.stream == stream) {
        text.extend_from_slice(&entry.content);
        if !entry.partial {
            text.push(b'\n');
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Reads the bytes of a whole log.
///
/// # Errors
/// When a line does not have exactly this format.
pub fn parse(bytes: &[u8]) -> Result<Vec<Entry>> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let lines = bytes.strip_suffix(b"\n").context("it does not end with a newline")?;
    lines.split(|byte| *byte == b'\n').map(entry).collect()
}

fn entry(line: &[u8]) -> Result<Entry> {
    let shown = || format!("the line {:?}", String::from_utf8_lossy(line.get(..100).unwrap_or(line)));
    let mut parts = line.splitn(4, |byte| *byte == b' ').map(<[u8]>::to_vec);
    let mut word = |name: &str| {
        let part = parts.next().with_context(|| format!("no {name}")).with_context(shown)?;
        String::from_utf8(part).with_context(|| format!("a {name} that is not text")).with_context(shown)
    };
    let (time, stream, tag) = (word("time")?, word("stream")?, word("tag")?);
    let content = parts.next().context("no content").with_context(shown)?;
    // 2016-10-06T00:17:09.669794202Z, in UTC and with nine digits, so that entries also sort as
    // text.
    let form = "0000-00-00T00:00:00.000000000Z";
    let digits_in_place = time.len() == form.len()
        && time
            .bytes()
            .zip(form.bytes())
            .all(|(is, wanted)| if wanted == b'0' { is.is_ascii_digit() } else { is == wanted });
    ensure!(digits_in_place, "{}: the time {time:?}", shown());
    ensure!(["stdout", "stderr"].contains(&stream.as_str()), "{}: the stream {stream:?}", shown());
    ensure!(["P", "F"].contains(&tag.as_str()), "{}: the tag {tag:?}", shown());
    Ok(Entry { time, stream, partial: tag == "P", content })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart_and_put_together_again() {
        let log = b"2016-10-06T00:17:09.669794202Z stdout P one \n\
            2016-10-06T00:17:09.669794203Z stderr F \n\
            2016-10-06T00:17:09.669794204Z stdout F two\n";
        let entries = parse(log).unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!(text(&entries, "stdout"), "one two\n");
        assert_eq!(text(&entries, "stderr"), "\n");
        assert!(parse(b"").unwrap().is_empty());
    }

    #[test]
    fn what_is_not_in_the_format_is_refused() {
        for log in [
            "2016-10-06T00:17:09.669794202Z stdout F no newline",
            "2016-10-06T00:17:09.669794202Z stdout F\n",
            "2016-10-06T00:17:09.6697942Z stdout F few digits\n",
            "2016-10-06T00:17:09.669794202+00:00 stdout F offset\n",
            "2016-10-06T00:17:09.669794202Z stdin F stream\n",
            "2016-10-06T00:17:09.669794202Z stdout X tag\n",
            "\n",
        ] {
            assert!(parse(log.as_bytes()).is_err(), "{log:?}");
        }
    }
}
