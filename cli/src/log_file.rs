//! Reads a container's log file: all of it, its last lines, or continuously as it grows and is
//! rotated.
//!
//! The file belongs to the shim, which appends whole entries with one write each, and to its
//! rotator, by moving it away and asking for a new one at the same path. The reader keeps the open
//! file until that is read to its end, and only then checks for a new one at the path. One that has
//! become shorter is read from its beginning. It polls: a rotation is then no special case, and
//! there is no limit on watches to run into.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::log_line::{Entry, MAX_HEAD_BYTES};

/// Bytes read at a time.
const BLOCK_BYTES: usize = 64 * 1024;

/// The longest entry that is buffered, in bytes.
///
/// Berth's shim splits lines at 16 KiB and other runtimes may split them at any length; a file
/// without line feeds is not a log, and must not fill the memory. Longer entries are passed on in
/// pieces.
const MAX_ENTRY_BYTES: usize = 4 << 20;

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogFileError {
    /// The file cannot be opened.
    #[error("cannot open the log {path}")]
    Open {
        /// Path of the log.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read or looked up.
    #[error("cannot read the log {path}")]
    Read {
        /// Path of the log.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// A log that is being read.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    /// Its size when it was opened, in bytes.
    present: u64,
    /// The beginning of an incomplete entry.
    unfinished: Vec<u8>,
}

impl LogFile {
    /// Opens the log and places the reader before its last `lines` lines, or at its beginning.
    ///
    /// # Errors
    /// When the file cannot be opened or read.
    pub(crate) fn open(path: &Path, lines: Option<u64>) -> Result<Self, LogFileError> {
        let open = |path: &Path, source| LogFileError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(|source| open(path, source))?;
        let end = file.metadata().map_err(|source| open(path, source))?.len();
        let mut log = Self { path: path.to_owned(), file, present: end, unfinished: Vec::new() };
        if let Some(lines) = lines {
            let start = match log.seek_to_last_lines(end, lines) {
                // It was truncated meanwhile.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                start => start.map_err(|source| log.read_error(source))?,
            };
            log.present -= start;
        }
        Ok(log)
    }

    /// Passes the entries that existed when the log was opened to `each`, without their line feeds:
    /// no more than that, so that it ends however fast the log grows.
    ///
    /// # Errors
    /// When the file cannot be read, or `each` fails.
    pub(crate) fn read_present<E>(&mut self, mut each: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E>
    where
        E: From<LogFileError>,
    {
        self.read_to_end(self.present, &mut each)?;
        self.hand_out_unfinished(&mut each)
    }

    /// Passes all entries so far to `each`, without their line feeds, and switches to a new file
    /// at the path if there is one. Returns whether there were any.
    ///
    /// # Errors
    /// When the file cannot be read, or `each` fails; then the entry counts as read.
    pub(crate) fn read_available<E>(
        &mut self,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<bool, E>
    where
        E: From<LogFileError>,
    {
        let mut any = self.read_to_end(u64::MAX, &mut each)?;
        if self.is_cut()? {
            self.hand_out_unfinished(&mut each)?;
            self.rewind()?;
            any |= self.read_to_end(u64::MAX, &mut each)?;
        }
        // Checked before the old file is read to its end again: later writes to it come from
        // a writer that does not know of the new one, and rotation waits for the writer.
        while let Some(successor) = self.successor()? {
            any |= self.read_to_end(u64::MAX, &mut each)?;
            self.hand_out_unfinished(&mut each)?;
            self.file = successor;
            any |= self.read_to_end(u64::MAX, &mut each)?;
        }
        Ok(any)
    }

    /// Passes on an incomplete last entry. For a log that is no longer written.
    ///
    /// # Errors
    /// When `each` fails.
    pub(crate) fn hand_out_unfinished<E>(
        &mut self,
        each: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let rest = std::mem::take(&mut self.unfinished);
        if rest.is_empty() { Ok(()) } else { each(&rest) }
    }

    /// Reads at most `most` bytes. Returns whether there were any.
    fn read_to_end<E>(&mut self, most: u64, each: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<bool, E>
    where
        E: From<LogFileError>,
    {
        let mut block = vec![0; BLOCK_BYTES];
        let mut any = false;
        let mut left = most;
        loop {
            let length = match (&self.file).take(left).read(&mut block) {
                Ok(0) => return Ok(any),
                Ok(length) => {
                    left -= length as u64;
                    length
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.read_error(source).into()),
            };
            any = true;
            for piece in block.get(..length).unwrap_or_default().split_inclusive(|byte| *byte == b'\n') {
                self.unfinished.extend_from_slice(piece);
                let ended = piece.ends_with(b"\n");
                if ended || self.unfinished.len() > MAX_ENTRY_BYTES {
                    let entry = std::mem::take(&mut self.unfinished);
                    each(entry.strip_suffix(b"\n").unwrap_or(&entry))?;
                }
            }
        }
    }

    /// Whether the file is shorter than what was read of it: it was truncated, to rotate it
    /// without asking its writer.
    fn is_cut(&self) -> Result<bool, LogFileError> {
        let length = self.file.metadata().map_err(|source| self.read_error(source))?.len();
        let read = (&self.file).stream_position().map_err(|source| self.read_error(source))?;
        Ok(length < read)
    }

    fn rewind(&self) -> Result<(), LogFileError> {
        (&self.file).rewind().map_err(|source| self.read_error(source))
    }

    /// The file at the log's path, if it is not the open one.
    fn successor(&self) -> Result<Option<File>, LogFileError> {
        let named = match File::open(&self.path) {
            Ok(named) => named,
            // Between the move and the new file, or removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.read_error(source)),
        };
        let identity = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        let same = identity(&named).and_then(|named| Ok(named == identity(&self.file)?));
        Ok(if same.map_err(|source| self.read_error(source))? { None } else { Some(named) })
    }

    /// Seeks to the start of the last `lines` lines before `end`, and returns the offset. A line is
    /// what ends with an `F` entry, or the parts of one that has not ended yet; an entry that is
    /// not in the format counts as a line.
    fn seek_to_last_lines(&self, end: u64, lines: u64) -> io::Result<u64> {
        let mut start = end;
        let mut lines_behind = 0;
        // Walks backwards over the entries. `start` is the offset of the last one counted.
        while let Some(entry) = self.start_of_entry_before(start)? {
            let ends_line = self.ends_line(entry)?;
            if start == end && !ends_line {
                lines_behind = 1;
            }
            if ends_line {
                lines_behind += 1;
            }
            if lines_behind > lines {
                break;
            }
            start = entry;
        }
        (&self.file).seek(SeekFrom::Start(start))
    }

    /// The offset of the entry that ends at `end`; `None` at the start of the file.
    fn start_of_entry_before(&self, end: u64) -> io::Result<Option<u64>> {
        // The byte before `end` is this entry's own line feed, or its last byte if it is incomplete
        // yet.
        let Some(mut unseen) = end.checked_sub(1) else { return Ok(None) };
        let mut block = vec![0; 4096];
        while unseen > 0 {
            let length = usize::try_from(unseen).unwrap_or(usize::MAX).min(block.len());
            let from = unseen - length as u64;
            let Some(window) = block.get_mut(..length) else { break };
            self.file.read_exact_at(window, from)?;
            if let Some(at) = window.iter().rposition(|byte| *byte == b'\n') {
                return Ok(Some(from + at as u64 + 1));
            }
            unseen = from;
        }
        Ok(Some(0))
    }

    fn ends_line(&self, start: u64) -> io::Result<bool> {
        let mut head = [0; MAX_HEAD_BYTES];
        let length = self.file.read_at(&mut head, start)?;
        let head = head.get(..length).unwrap_or_default();
        let entry = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
        Ok(Entry::parse(entry).is_none_or(|entry| entry.ends_line))
    }

    fn read_error(&self, source: io::Error) -> LogFileError {
        LogFileError::Read { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    const HEAD: &str = "2016-10-06T00:17:09.669794202Z stdout";

    fn collect(log: &mut LogFile) -> Vec<String> {
        let mut entries = Vec::new();
        log.read_available::<LogFileError>(|entry| {
            entries.push(String::from_utf8_lossy(entry).replace(HEAD, "").trim_start().to_owned());
            Ok(())
        })
        .unwrap();
        entries
    }

    fn log_of(entries: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.log");
        let text: String = entries.iter().map(|entry| format!("{HEAD} {entry}\n")).collect();
        fs::write(&path, text).unwrap();
        (directory, path)
    }

    fn append(path: &Path, text: &str) {
        fs::OpenOptions::new().append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn a_whole_log_is_read_in_order() {
        let (_directory, path) = log_of(&["F one", "P two", "F three"]);
        assert_eq!(collect(&mut LogFile::open(&path, None).unwrap()), ["F one", "P two", "F three"]);
    }

    #[test]
    fn the_last_lines_are_counted_by_their_ends() {
        let entries = ["F one", "P two", "P two", "F two", "F three"];
        for (lines, expected) in [
            (0, &[][..]),
            (1, &["F three"][..]),
            (2, &["P two", "P two", "F two", "F three"][..]),
            (3, &["F one", "P two", "P two", "F two", "F three"][..]),
            (1000, &["F one", "P two", "P two", "F two", "F three"][..]),
            (u64::MAX, &["F one", "P two", "P two", "F two", "F three"][..]),
        ] {
            let (_directory, path) = log_of(&entries);
            assert_eq!(collect(&mut LogFile::open(&path, Some(lines)).unwrap()), expected, "{lines}");
        }
    }

    #[test]
    fn a_line_that_has_not_ended_is_a_last_line_too() {
        let entries = ["F one", "F two", "P three", "P three"];
        for (lines, expected) in
            [(0, &[][..]), (1, &["P three", "P three"][..]), (2, &["F two", "P three", "P three"][..])]
        {
            let (_directory, path) = log_of(&entries);
            assert_eq!(collect(&mut LogFile::open(&path, Some(lines)).unwrap()), expected, "{lines}");
        }
    }

    #[test]
    fn the_last_lines_of_odd_files_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.log");
        let long = "x".repeat(3 * 4096);
        for (text, lines, expected) in [
            (String::new(), 3, vec![]),
            ("\n".into(), 1, vec![String::new()]),
            ("no format\nat all\n".into(), 1, vec!["at all".to_owned()]),
            (format!("{HEAD} F {long}\n{HEAD} F {long}\n"), 1, vec![format!("F {long}")]),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(collect(&mut LogFile::open(&path, Some(lines)).unwrap()), expected);
        }
    }

    #[test]
    fn entries_that_come_later_are_read_later() {
        let (_directory, path) = log_of(&["F one"]);
        let mut log = LogFile::open(&path, None).unwrap();
        assert_eq!(collect(&mut log), ["F one"]);
        assert!(collect(&mut log).is_empty());
        append(&path, &format!("{HEAD} F tw"));
        assert!(collect(&mut log).is_empty(), "half an entry is not handed out");
        append(&path, "o\n");
        assert_eq!(collect(&mut log), ["F two"]);
    }

    #[test]
    fn what_comes_after_the_opening_is_not_present() {
        for (lines, expected) in [(None, &["F one", "F two"][..]), (Some(1), &["F two"][..]), (Some(0), &[])]
        {
            let (_directory, path) = log_of(&["F one", "F two"]);
            let mut log = LogFile::open(&path, lines).unwrap();
            append(&path, &format!("{HEAD} F three\n"));
            let mut entries = Vec::new();
            log.read_present::<LogFileError>(|entry| {
                entries.push(String::from_utf8_lossy(entry).replace(HEAD, "").trim_start().to_owned());
                // As fast as it is read.
                append(&path, &format!("{HEAD} F more\n"));
                Ok(())
            })
            .unwrap();
            assert_eq!(entries, expected, "{lines:?}");
        }
    }

    #[test]
    fn a_rotated_log_loses_nothing_and_repeats_nothing() {
        let (directory, path) = log_of(&["F one"]);
        let mut log = LogFile::open(&path, None).unwrap();
        assert_eq!(collect(&mut log), ["F one"]);
        let old = directory.path().join("a.log.1");
        fs::rename(&path, &old).unwrap();
        append(&old, &format!("{HEAD} F two\n"));
        assert_eq!(collect(&mut log), ["F two"], "the old file is still read while there is no new one");
        append(&old, &format!("{HEAD} F three\n"));
        fs::write(&path, format!("{HEAD} F four\n")).unwrap();
        assert_eq!(collect(&mut log), ["F three", "F four"]);
        append(&path, &format!("{HEAD} F five\n"));
        assert_eq!(collect(&mut log), ["F five"]);
    }

    #[test]
    fn a_log_that_is_emptied_is_read_from_its_beginning() {
        let (_directory, path) = log_of(&["F one", "F two"]);
        let mut log = LogFile::open(&path, None).unwrap();
        assert_eq!(collect(&mut log), ["F one", "F two"]);
        fs::OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
        assert!(collect(&mut log).is_empty());
        append(&path, &format!("{HEAD} F three\n"));
        assert_eq!(collect(&mut log), ["F three"]);
        append(&path, &format!("{HEAD} P half"));
        assert!(collect(&mut log).is_empty());
        fs::write(&path, format!("{HEAD} F x\n")).unwrap();
        assert_eq!(collect(&mut log), ["P half", "F x"]);
    }

    #[test]
    fn a_shorter_log_of_the_same_name_is_read_whole() {
        let (directory, path) = log_of(&["F a long first line", "F two"]);
        let mut log = LogFile::open(&path, Some(1)).unwrap();
        assert_eq!(collect(&mut log), ["F two"]);
        fs::remove_file(&path).unwrap();
        let shorter = directory.path().join("new");
        fs::write(&shorter, format!("{HEAD} F s\n")).unwrap();
        fs::rename(&shorter, &path).unwrap();
        assert_eq!(collect(&mut log), ["F s"]);
    }

    #[test]
    fn a_file_without_line_feeds_does_not_fill_the_memory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.log");
        fs::write(&path, vec![b'x'; 2 * MAX_ENTRY_BYTES + 7 * BLOCK_BYTES]).unwrap();
        let mut log = LogFile::open(&path, None).unwrap();
        let mut lengths = Vec::new();
        let mut keep = |entry: &[u8]| {
            lengths.push(entry.len());
            Ok::<_, LogFileError>(())
        };
        log.read_available(&mut keep).unwrap();
        log.hand_out_unfinished(&mut keep).unwrap();
        assert_eq!(lengths.iter().sum::<usize>(), 2 * MAX_ENTRY_BYTES + 7 * BLOCK_BYTES);
        assert!(lengths.iter().all(|length| *length <= MAX_ENTRY_BYTES + BLOCK_BYTES), "{lengths:?}");
    }

    #[test]
    fn a_missing_log_says_which_one() {
        let error = LogFile::open(Path::new("/nonexistent/a.log"), None).unwrap_err();
        assert_eq!(error.to_string(), "cannot open the log /nonexistent/a.log");
    }
}
