//! The log file in the CRI format: `<RFC 3339 time> <stream> <P|F> <content>` and a newline, one
//! entry per line.
//!
//! The format is that of the kubelet's log reader (`pkg/kubelet/kuberuntime/logs`); its tags say
//! whether the content ends a line (`F`) or continues in the next entry of the same stream (`P`).
//! Entries are never torn: where a full disk cut one short, a newline and an entry with the number
//! of lost bytes repair it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_sys::beneath::Root;

/// The longest content of one entry by default, in bytes; longer lines are split. The same as
/// containerd's `max_container_log_line_size`.
pub(crate) const DEFAULT_MAX_CONTENT: usize = 16 * 1024;

/// One of a container's two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static [u8; 6] {
        match self {
            Self::Stdout => b"stdout",
            Self::Stderr => b"stderr",
        }
    }
}

/// Turns the bytes of one stream into entries. Holds at most one unfinished line.
#[derive(Debug)]
pub(crate) struct Splitter {
    stream: Stream,
    max_content: usize,
    /// A terminal ends its lines with `\r\n`; the `\r` is not part of the content.
    terminal: bool,
    pending: Vec<u8>,
}

impl Splitter {
    pub(crate) fn new(stream: Stream, max_content: usize, terminal: bool) -> Self {
        Self { stream, max_content: max_content.max(1), terminal, pending: Vec::new() }
    }

    /// Appends the entries that `bytes` complete to `out`, all stamped `time`, until `out` has at
    /// least `most` bytes. Returns how many of `bytes` are in these entries or held.
    pub(crate) fn push(&mut self, bytes: &[u8], time: &Time, most: usize, out: &mut Vec<u8>) -> usize {
        let head = self.head(time);
        let mut rest = bytes;
        while !rest.is_empty() && out.len() < most {
            let room = self.max_content - self.pending.len();
            match memchr::memchr(b'\n', &rest[..rest.len().min(room + 1)]) {
                Some(end) => {
                    let (line, next) = rest.split_at(end);
                    self.entry(head, b'F', line, out);
                    // The newline itself. `end` is in range, so `next` is not empty.
                    rest = next.get(1..).unwrap_or_default();
                }
                None if rest.len() > room => {
                    let (part, next) = rest.split_at(room);
                    self.entry(head, b'P', part, out);
                    rest = next;
                }
                None => {
                    self.pending.extend_from_slice(rest);
                    rest = &[];
                }
            }
        }
        bytes.len() - rest.len()
    }

    /// Ends the stream: the rest of a line without a newline becomes a partial entry.
    pub(crate) fn finish(&mut self, time: &Time, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.entry(self.head(time), b'P', b"", out);
        }
    }

    /// The part of an entry before its content, except for the tag. Entries are short and many, and
    /// one copy of a known length costs a fraction of copying the parts.
    fn head(&self, time: &Time) -> [u8; HEAD] {
        let mut head = [b' '; HEAD];
        let (in_time, rest) = head.split_at_mut(time.len());
        in_time.copy_from_slice(time);
        if let Some(name) = rest.get_mut(1..7) {
            name.copy_from_slice(self.stream.name());
        }
        head
    }

    /// An entry of the held bytes and `more`.
    fn entry(&mut self, mut head: [u8; HEAD], tag: u8, more: &[u8], out: &mut Vec<u8>) {
        let pending = std::mem::take(&mut self.pending);
        head[TAG] = tag;
        out.reserve(HEAD + pending.len() + more.len() + 1);
        out.extend_from_slice(&head);
        if !pending.is_empty() {
            out.extend_from_slice(&pending);
        }
        out.extend_from_slice(more);
        if self.terminal
            && tag == b'F'
            && !(pending.is_empty() && more.is_empty())
            && out.last() == Some(&b'\r')
        {
            out.pop();
        }
        out.push(b'\n');
    }
}

/// A time in the form that entries have.
pub(crate) type Time = [u8; 30];

/// The length of the part before the content: time, stream and tag, each with a space.
const HEAD: usize = 40;
/// The position of the tag in that part.
const TAG: usize = 38;

/// `time` as RFC 3339 in UTC with nine digits of the second.
pub(crate) fn timestamp(time: SystemTime) -> Time {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let days = since.as_secs() / 86_400;
    let in_day = since.as_secs() % 86_400;
    // Days to year, month and day in the proleptic Gregorian calendar, in eras of 400 years that
    // begin on 1 March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);

    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    let mut put = |end: usize, digits: usize, mut value: u64| {
        for position in (end - digits..end).rev() {
            text[position] = b'0' + u8::try_from(value % 10).unwrap_or(0);
            value /= 10;
        }
    };
    put(4, 4, year);
    put(7, 2, month);
    put(10, 2, day);
    put(13, 2, in_day / 3600);
    put(16, 2, in_day / 60 % 60);
    put(19, 2, in_day % 60);
    put(29, 9, u64::from(since.subsec_nanos()));
    text
}

/// The open log file.
#[derive(Debug)]
pub(crate) struct LogFile {
    directory: PathBuf,
    name: PathBuf,
    /// `None` when it could not be opened yet.
    file: Option<File>,
    /// The previous writer was killed, and the log does not say so yet.
    replaced: bool,
    /// That writer may have written part of what comes next.
    overlaps: bool,
    /// Bytes that could not be written since the last entry that was.
    gap_bytes: u64,
    /// The file ends inside an entry.
    torn: bool,
    /// The next bytes are the rest of an entry whose first part is lost.
    skips: bool,
    /// All bytes that could not be written.
    lost_bytes: u64,
}

impl LogFile {
    /// Opens or creates the file `name` below `directory`, for appending. Only `directory` itself
    /// may be reached through symbolic links, and only a regular file with one link is accepted:
    /// pods can create links in their log directory.
    pub(crate) fn open((directory, name): (PathBuf, PathBuf)) -> io::Result<Self> {
        let mut log = Self::unopened(directory, name);
        log.reopen()?;
        Ok(log)
    }

    /// Continues a log whose writer was killed, and says so in it.
    pub(crate) fn go_on((directory, name): (PathBuf, PathBuf)) -> Self {
        Self { replaced: true, overlaps: true, ..Self::unopened(directory, name) }
    }

    fn unopened(directory: PathBuf, name: PathBuf) -> Self {
        Self {
            directory,
            name,
            file: None,
            replaced: false,
            overlaps: false,
            gap_bytes: 0,
            torn: false,
            skips: false,
            lost_bytes: 0,
        }
    }

    /// Whether it is open; tries to open it if not.
    fn is_open(&mut self) -> bool {
        self.file.is_some() || self.reopen_path().is_ok()
    }

    /// Reopens the same path, after the old file was renamed. On an error the old file stays in
    /// use.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        self.reopen_path()?;
        self.overlaps = false;
        Ok(())
    }

    fn reopen_path(&mut self) -> io::Result<()> {
        self.file = Some(open_below(&self.directory, &self.name)?);
        self.torn = false;
        Ok(())
    }

    /// Writes entries, the last of which may continue in the next call. Never fails: bytes that a
    /// full or broken disk does not take are counted.
    pub(crate) fn write(&mut self, mut entries: &[u8]) {
        if self.skips {
            let end = memchr::memchr(b'\n', entries).map_or(entries.len(), |end| end + 1);
            let (rest, next) = entries.split_at(end);
            self.lose(rest);
            entries = next;
        }
        if entries.is_empty() {
            return;
        }
        if !self.is_open() {
            self.lose(entries);
            return;
        }
        let there = if std::mem::take(&mut self.overlaps) { self.find_at_end(entries) } else { 0 };
        entries = entries.get(there..).unwrap_or_default();
        // Never behind entries and before the next ones are requested: the successor of a killed
        // writer could then not find them at the end.
        if there == 0 && (self.replaced || self.gap_bytes > 0) && !self.mend() {
            self.lose(entries);
            return;
        }
        let Some(file) = &mut self.file else { return };
        while !entries.is_empty() {
            match file.write(entries) {
                Ok(0) => break,
                Ok(length) => {
                    let (written, rest) = entries.split_at(length);
                    self.torn = written.last() != Some(&b'\n');
                    entries = rest;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.lose(entries);
    }

    /// How many bytes of `entries` the previous writer has written: the file ends with these. Where
    /// entries repeat, it may also end with fewer; then the smaller number counts, so that none is
    /// lost. Without any, an entry that is cut off at the end of the file stays as it is.
    fn find_at_end(&mut self, entries: &[u8]) -> usize {
        let end = end_of(&self.directory, &self.name, entries.len()).unwrap_or_default();
        let first = memchr::memchr(b'\n', entries).map_or(entries.len(), |end| end + 1);
        let (first, others) = entries.split_at(first);
        let is_at_end = |length: &usize| entries.get(..*length).is_some_and(|part| end.ends_with(part));
        let mut lengths = 1..=entries.len();
        let there = if others.split_inclusive(|byte| *byte == b'\n').any(|other| other == first) {
            lengths.find(is_at_end)
        } else {
            lengths.rfind(is_at_end)
        };
        self.torn = there.is_none() && end.last().is_some_and(|last| *last != b'\n');
        there.unwrap_or(0)
    }

    /// Counts bytes that were lost before they reached this writer, and reports them in the log.
    /// Returns the bytes that are lost in all.
    pub(crate) fn end(&mut self, more: u64) -> u64 {
        self.count(more);
        if (self.replaced || self.gap_bytes > 0) && self.is_open() {
            if std::mem::take(&mut self.overlaps) {
                self.find_at_end(b"");
            }
            self.mend();
        }
        self.lost_bytes
    }

    /// Writes entries about lost bytes and replaced writers; returns whether that worked.
    fn mend(&mut self) -> bool {
        let mend = self.notices();
        let written = self.file.as_mut().and_then(|file| file.write(&mend).ok()).unwrap_or(0);
        if written == mend.len() {
            (self.gap_bytes, self.replaced, self.torn) = (0, false, false);
            return true;
        }
        self.torn |= written > 0;
        false
    }

    fn lose(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            self.skips = *last != b'\n';
        }
        self.count(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    }

    fn count(&mut self, bytes: u64) {
        self.gap_bytes = self.gap_bytes.saturating_add(bytes);
        self.lost_bytes = self.lost_bytes.saturating_add(bytes);
    }

    fn notices(&self) -> Vec<u8> {
        let mut entries = if self.torn { b"\n".to_vec() } else { Vec::new() };
        let mut say = |what: &str| {
            entries.extend_from_slice(&timestamp(SystemTime::now()));
            entries.extend_from_slice(format!(" stderr F [berth: {what}]\n").as_bytes());
        };
        if self.replaced {
            say("the process that writes this log was killed and replaced");
        }
        if self.gap_bytes > 0 {
            say(&format!("{} bytes of log were lost: the disk did not accept them", self.gap_bytes));
        }
        entries
    }
}

fn open_below(directory: &Path, name: &Path) -> io::Result<File> {
    Root::open(directory)?.open_append(name)
}

/// The last bytes of the file, at most this many.
fn end_of(directory: &Path, name: &Path, most: usize) -> io::Result<Vec<u8>> {
    let file = Root::open(directory)?.open_regular(name)?;
    let length = file.metadata()?.len();
    let mut end = vec![0; usize::try_from(length).unwrap_or(most).min(most.max(1))];
    let place = length.saturating_sub(u64::try_from(end.len()).unwrap_or(u64::MAX));
    file.read_exact_at(&mut end, place)?;
    Ok(end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TIME: &Time = b"TTTTTTTTTTTTTTTTTTTTTTTTTTTTTT";

    fn entries(splitter: &mut Splitter, pieces: &[&[u8]]) -> String {
        let mut out = Vec::new();
        for piece in pieces {
            splitter.push(piece, TIME, usize::MAX, &mut out);
        }
        splitter.finish(TIME, &mut out);
        String::from_utf8_lossy(&out).replace(&"T".repeat(TIME.len()), "T")
    }

    #[test]
    fn lines_become_entries() {
        let cases: &[(&[&[u8]], &str)] = &[
            (&[], ""),
            (&[b""], ""),
            (&[b"a\n"], "T stdout F a\n"),
            (&[b"a", b"b\n"], "T stdout F ab\n"),
            (&[b"\n\n"], "T stdout F \nT stdout F \n"),
            (&[b"a\nb"], "T stdout F a\nT stdout P b\n"),
            (&[b"1234\n"], "T stdout F 1234\n"),
            (&[b"12345\n"], "T stdout P 1234\nT stdout F 5\n"),
            (&[b"1234", b"\n"], "T stdout F 1234\n"),
            (&[b"1234", b"5\n"], "T stdout P 1234\nT stdout F 5\n"),
            (&[b"123456789"], "T stdout P 1234\nT stdout P 5678\nT stdout P 9\n"),
            (&[b"a\r\n"], "T stdout F a\r\n"),
        ];
        for (pieces, expected) in cases {
            assert_eq!(
                entries(&mut Splitter::new(Stream::Stdout, 4, false), pieces),
                *expected,
                "{pieces:?}"
            );
        }
    }

    #[test]
    fn a_terminal_loses_its_carriage_return() {
        let cases: &[(&[&[u8]], &str)] = &[
            (&[b"a\r\n"], "T stderr F a\n"),
            (&[b"a\r", b"\n"], "T stderr F a\n"),
            (&[b"\r\n"], "T stderr F \n"),
            (&[b"\n"], "T stderr F \n"),
            (&[b"a\rb\r\n"], "T stderr F a\rb\n"),
        ];
        for (pieces, expected) in cases {
            assert_eq!(
                entries(&mut Splitter::new(Stream::Stderr, 64, true), pieces),
                *expected,
                "{pieces:?}"
            );
        }
    }

    #[test]
    fn times_are_written_as_rfc_3339() {
        for (seconds, nanos, expected) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (1_475_712_429, 669_794_202, "2016-10-06T00:07:09.669794202Z"),
            (4_107_542_399, 999_999_999, "2100-02-28T23:59:59.999999999Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z"),
        ] {
            let time = UNIX_EPOCH + Duration::new(seconds, nanos);
            assert_eq!(String::from_utf8_lossy(&timestamp(time)), expected);
        }
    }

    /// A pipe stands in for a disk: it takes a part, and more when it was read.
    #[test]
    fn what_a_disk_does_not_take_is_counted_between_whole_entries() {
        let (read, write) = berth_sys::file::pipe().unwrap();
        for end in [&read, &write] {
            berth_sys::file::set_nonblocking(std::os::fd::AsFd::as_fd(end)).unwrap();
        }
        let mut log =
            LogFile { file: Some(write.into()), ..LogFile::unopened(PathBuf::new(), PathBuf::new()) };
        let (mut disk, mut out) = (File::from(read), Vec::new());
        let mut read = |out: &mut Vec<u8>| {
            let error = io::Read::read_to_end(&mut disk, out).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        };
        let entries: Vec<String> =
            (0..3000).map(|number| format!("T stdout F {}.\n", "x".repeat(number % 997))).collect();
        let all = entries.concat();
        // Calls may end anywhere.
        for (index, part) in all.as_bytes().chunks(1009).enumerate() {
            log.write(part);
            if index % 150 == 0 {
                read(&mut out);
            }
        }
        read(&mut out);
        let lost = log.end(5);
        read(&mut out);
        let (mut kept, mut told) = (0, 0);
        for line in String::from_utf8(out).unwrap().split_inclusive('\n') {
            match line.split_once("[berth: ") {
                Some((_, rest)) => told += rest.split(' ').next().unwrap().parse::<u64>().unwrap(),
                None if entries.iter().any(|entry| entry == line) => kept += line.len(),
                // The beginning of one, and the newline that repairs it.
                None => {
                    assert!(all.contains(line.trim_end()), "{line:?}");
                    kept += line.len() - 1;
                }
            }
        }
        assert!(told > 5 && told == lost, "{told} {lost}");
        assert_eq!(u64::try_from(all.len() - kept).unwrap() + 5, lost);
    }

    /// Killed anywhere in a write, with lines that repeat and lines that do not.
    #[test]
    fn what_a_killed_writer_has_begun_is_continued_and_nothing_is_lost() {
        let directory = std::env::temp_dir().join(format!("berth-shim-log-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (first, packet) = ("T stdout F a\n", "T stdout F b\nT stdout P b\nT stdout F a\nT stdout F c\n");
        for cut in 0..=packet.len() {
            let path = (directory.clone(), PathBuf::from(format!("{cut}.log")));
            let text = || std::fs::read_to_string(path.0.join(&path.1)).unwrap();
            let mut log = LogFile::open(path.clone()).unwrap();
            log.write(first.as_bytes());
            log.write(&packet.as_bytes()[..cut]);
            let mut log = LogFile::go_on(path.clone());
            log.write(packet.as_bytes());
            assert!(text().starts_with(first) && text().ends_with(packet), "{}", text());
            log.write(first.as_bytes());
            let (notes, entries): (Vec<_>, Vec<_>) =
                text().split_inclusive('\n').map(str::to_owned).partition(|line| line.contains("berth"));
            assert_eq!(entries.concat(), format!("{first}{packet}{first}"), "after {cut} bytes");
            assert!(notes.len() == 1 && notes[0].ends_with("was killed and replaced]\n"), "{notes:?}");
            assert_eq!(log.end(0), 0);
        }
        // Identical entries, and the rest of another file.
        for (file, more) in [("T stdout F b\nT stdout F b\n", ""), ("T stdout F b\nT 17", "\n")] {
            let path = (directory.clone(), PathBuf::from(format!("other{}.log", more.len())));
            LogFile::open(path.clone()).unwrap().write(file.as_bytes());
            let same = "T stdout F b\n".repeat(3);
            let mut log = LogFile::go_on(path.clone());
            log.write(same.as_bytes());
            assert_eq!(log.end(0), 0);
            let text = std::fs::read_to_string(path.0.join(path.1)).unwrap();
            let count = text.lines().filter(|line| *line == "T stdout F b").count();
            assert_eq!((count, text.lines().count()), (4, if more.is_empty() { 5 } else { 6 }), "{text}");
        }
        std::fs::remove_dir_all(directory).unwrap();
    }

    proptest! {
        #[test]
        fn the_contents_joined_are_the_input(
            pieces in prop::collection::vec(prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..40), 0..20),
            max in 1_usize..20,
            most in 1_usize..200,
        ) {
            let mut splitter = Splitter::new(Stream::Stdout, max, false);
            let mut out = Vec::new();
            for piece in &pieces {
                let mut rest = piece.as_slice();
                while !rest.is_empty() {
                    let mut some = Vec::new();
                    let length = splitter.push(rest, TIME, most, &mut some);
                    prop_assert!((length > 0 || !some.is_empty()) && some.len() < most + HEAD + max + 1);
                    rest = &rest[length..];
                    out.extend(some);
                }
            }
            splitter.finish(TIME, &mut out);
            let mut joined = Vec::new();
            // Contents have no newline, so entries end exactly at newlines.
            for entry in out.split_inclusive(|byte| *byte == b'\n') {
                let content = entry[TIME.len()..].strip_prefix(b" stdout ".as_slice()).unwrap();
                prop_assert!(content.len() - 3 <= max);
                joined.extend_from_slice(&content[2..content.len() - 1]);
                if content[0] == b'F' {
                    joined.push(b'\n');
                }
            }
            prop_assert_eq!(joined, pieces.concat());
        }
    }
}
