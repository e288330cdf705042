//! One entry of a container's log, in the format that the CRI defines.
//!
//! ```text
//! 2016-10-06T00:17:09.669794202Z stdout F The content of one line\n
//! time                           stream tags content
//! ```
//!
//! Tags are separated by `:`; the first is `F`, the entry ends a line, or `P`, the line continues
//! in the next entry of the same stream. The content is any bytes but a line feed. Pure parsing;
//! reading the file is `log_file`'s.

/// The longest head of an entry (everything before the content), in bytes.
///
/// A time with nine digits and an offset takes 35, the stream 6, and tags are one letter today; the
/// rest leaves room for future tags. Not part of the format.
pub(crate) const MAX_HEAD_BYTES: usize = 128;

/// The stream of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One entry, without the line feed that ends it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    /// When the entry was written, as text.
    pub(crate) time: &'a str,
    /// Its stream.
    pub(crate) stream: Stream,
    /// Whether the content ends a line of the program's output.
    pub(crate) ends_line: bool,
    /// What the program wrote.
    pub(crate) content: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Parses an entry; `None` if it is not in the format.
    ///
    /// Takes the entry without its line feed. The content may be truncated, so the head of a long
    /// entry can be parsed alone.
    pub(crate) fn parse(entry: &'a [u8]) -> Option<Self> {
        let (time, rest) = split_at_space(entry)?;
        let (stream, rest) = split_at_space(rest)?;
        // The space before empty content belongs there, but not every writer adds it.
        let (tags, content) = split_at_space(rest).unwrap_or((rest, &[]));
        let time = std::str::from_utf8(time).ok().filter(|time| looks_like_a_time(time))?;
        let stream = match stream {
            b"stdout" => Stream::Stdout,
            b"stderr" => Stream::Stderr,
            _ => return None,
        };
        let ends_line = match tags.split(|byte| *byte == b':').next() {
            Some(b"F") => true,
            Some(b"P") => false,
            _ => return None,
        };
        Some(Self { time, stream, ends_line, content })
    }
}

/// Splits at the first space, which has to be within the head.
fn split_at_space(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().take(MAX_HEAD_BYTES).position(|byte| *byte == b' ')?;
    let (before, from_space) = bytes.split_at(at);
    Some((before, from_space.get(1..)?))
}

/// Whether a text has the shape of an RFC 3339 time. The value is only displayed, so it is not
/// checked further.
fn looks_like_a_time(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_digit() || b"-:.+TZ".contains(&byte);
    text.len() >= "2016-10-06T00:17:09Z".len()
        && text.as_bytes().get(10) == Some(&b'T')
        && text.bytes().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "2016-10-06T00:17:09.669794202Z";

    fn entry(rest: &str) -> Vec<u8> {
        format!("{TIME} {rest}").into_bytes()
    }

    #[test]
    fn entries_are_taken_apart() {
        for (rest, stream, ends_line, content) in [
            ("stdout F hello world", Stream::Stdout, true, "hello world"),
            ("stderr P part", Stream::Stderr, false, "part"),
            ("stdout F ", Stream::Stdout, true, ""),
            ("stdout F", Stream::Stdout, true, ""),
            ("stdout F  two spaces ", Stream::Stdout, true, " two spaces "),
            ("stdout F:later:tags x", Stream::Stdout, true, "x"),
            ("stdout P:x y", Stream::Stdout, false, "y"),
        ] {
            let expected = Entry { time: TIME, stream, ends_line, content: content.as_bytes() };
            assert_eq!(Entry::parse(&entry(rest)), Some(expected), "{rest:?}");
        }
    }

    #[test]
    fn content_may_be_any_bytes() {
        let mut bytes = entry("stdout F ");
        bytes.extend([0, 0xff, b'\r', 0xc3]);
        assert_eq!(Entry::parse(&bytes).map(|entry| entry.content), Some(&[0, 0xff, b'\r', 0xc3][..]));
        bytes.resize(1 << 20, b' ');
        assert_eq!(Entry::parse(&bytes).map(|entry| entry.content.len()), Some((1 << 20) - TIME.len() - 10));
    }

    #[test]
    fn times_may_have_any_fraction_and_offset() {
        for time in
            ["2016-10-06T00:17:09Z", "2016-10-06T00:17:09.5+02:00", "2016-10-06T00:17:09.669794202-11:30"]
        {
            let bytes = format!("{time} stdout F x").into_bytes();
            assert_eq!(Entry::parse(&bytes).map(|entry| entry.time), Some(time));
        }
    }

    #[test]
    fn what_is_no_entry_is_told_apart() {
        let long = "9".repeat(1 << 16);
        for bytes in [
            "".as_bytes(),
            b" ",
            b"   ",
            b"hello",
            b"hello world it F",
            b"2016-10-06T00:17:09Z",
            b"2016-10-06T00:17:09Z stdout",
            b"2016-10-06T00:17:09Z stdin F x",
            b"2016-10-06T00:17:09Z stdout X x",
            b"2016-10-06T00:17:09Z stdout FP x",
            b"2016-10-06T00:17:09Z STDOUT F x",
            b"2016-10-06 00:17:09Z stdout F x",
            b"2016-10-06T00:17:0\xffZ stdout F x",
            b"{\"log\":\"x\\n\",\"stream\":\"stdout\",\"time\":\"2016-10-06T00:17:09Z\"}",
            long.as_bytes(),
        ] {
            assert_eq!(Entry::parse(bytes), None, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
