//! The record of an object and its copy: reading either of them, and writing both.
//!
//! ```text
//! <root>/…/<id>/record     the record; what is not here was never finished, or is being removed
//! <state>/…/<id>/record    its copy, in memory, for as long as the object can run
//! ```
//! The record is written first and the copy second; the copy is removed first and the record
//! second. So a copy without a record means that the record was lost, never that the object was
//! half made or half removed.
//!
//! "Cannot be read" has three meanings, which are distinguished: nothing is there; what is there is
//! proven damaged (its checksum); unknown (an error of the disk, no descriptor, no memory, a newer
//! version). Only the second is ever overwritten.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use berth_model::layout::Layout;
use berth_model::record::{self, Decoded, MAX_BYTES, RecordError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::atomic_file;

/// The first and the longest pause between attempts to read.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The paths of a record and its copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RecordFiles {
    /// The record cannot be written.
    pub(crate) record: PathBuf,
    /// Its copy.
    pub(crate) copy: PathBuf,
}

/// Why a record file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// It cannot be read now.
    #[error("cannot read {path}")]
    Unread {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Its content is not known, or damaged.
    #[error("cannot parse {path}")]
    Content {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: RecordError,
    },
    /// It is valid, but of a different object.
    #[error("{path} is the record of a different object")]
    Another {
        /// The file or directory.
        path: PathBuf,
    },
}

impl Fault {
    /// Whether the file is proven to be useless to this version and any other.
    fn is_damage(&self) -> bool {
        match self {
            Self::Unread { .. } => false,
            Self::Content { source, .. } => !matches!(source, RecordError::TooNew { .. }),
            Self::Another { .. } => true,
        }
    }
}

/// The outcome of reading a record.
#[derive(Debug)]
pub(crate) enum Found<T> {
    /// The content, from the record or from its copy.
    Whole {
        /// Its content.
        content: T,
        /// The state of the files.
        health: Health,
    },
    /// Neither file is there.
    Absent,
    /// The record cannot be used, and there is no usable copy.
    Unusable {
        /// What is wrong with it.
        fault: Fault,
        /// Whether it is proven damaged. If not, it may become readable, or is readable for another
        /// version.
        damaged: bool,
    },
}

/// The state of the files of a readable record.
#[derive(Debug)]
pub(crate) enum Health {
    /// Good.
    Good,
    /// The copy is missing or different: written by an earlier version of this daemon, or there was
    /// no room in memory.
    NoCopy,
    /// The record is lost or proven damaged; the content is the copy's.
    Lost(Option<Fault>),
    /// The record cannot be read now; the content is the copy's.
    Unread(Fault),
    /// The record is of this newer version, and read as far as it is understood.
    Newer(u32),
}

/// Time for retries, shared by all reads of a start: a failing disk must not delay the
/// daemon for long.
#[derive(Debug)]
pub(crate) struct Patience(AtomicU64);

impl Patience {
    pub(crate) fn of(time: Duration) -> Self {
        Self(AtomicU64::new(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Sleeps for `pause`, if that much time is left. Blocking.
    fn wait(&self, pause: Duration) -> bool {
        let wanted = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let taken =
            self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(wanted));
        if taken.is_ok() {
            std::thread::sleep(pause);
        }
        taken.is_ok()
    }
}

/// Retries `attempt` while it fails with a temporary error and there is `patience`. Absence is
/// not temporary. Blocking.
///
/// # Errors
/// That of the last attempt.
pub(crate) fn patiently<T>(patience: &Patience, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut pause = FIRST_PAUSE;
    loop {
        match attempt() {
            Err(error) if may_pass(&error) && patience.wait(pause) => {
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            result => return result,
        }
    }
}

/// Whether the error may be temporary. In doubt, yes.
pub(crate) fn may_pass(error: &io::Error) -> bool {
    !matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory
    )
}

impl RecordFiles {
    /// Reads the record, or its copy. `is_own` returns whether the content is that of the object
    /// whose files these are. Blocking.
    pub(crate) fn read<T: DeserializeOwned>(
        &self,
        patience: &Patience,
        is_own: impl Fn(&T) -> bool,
    ) -> Found<T> {
        let once = Patience::of(Duration::ZERO);
        let (mut record, mut copy) = (read(&self.record, &once, &is_own), read(&self.copy, &once, &is_own));
        // If either can be read, there is nothing to wait for.
        if !matches!(record, Ok(Some(_))) && !matches!(copy, Ok(Some(_))) {
            for (found, path) in [(&mut record, &self.record), (&mut copy, &self.copy)] {
                if matches!(found, Err(Fault::Unread { .. })) {
                    *found = read(path, patience, &is_own);
                }
            }
        }
        match (record, copy) {
            (Ok(Some(Decoded { content, newer: Some(version) })), _) => {
                Found::Whole { content, health: Health::Newer(version) }
            }
            (Ok(Some(Decoded { content, .. })), copy) => {
                let health = if matches!(copy, Ok(Some(_))) { Health::Good } else { Health::NoCopy };
                Found::Whole { content, health }
            }
            (record, Ok(Some(Decoded { content, newer }))) => {
                let health = match (record, newer) {
                    (_, Some(version)) => Health::Newer(version),
                    (Err(fault), None) if !fault.is_damage() => Health::Unread(fault),
                    (record, None) => Health::Lost(record.err()),
                };
                Found::Whole { content, health }
            }
            (Ok(None), Ok(None)) => Found::Absent,
            // An existing copy proves that there was a record.
            (Ok(None), Err(fault)) => Found::Unusable { damaged: fault.is_damage(), fault },
            (Err(fault), copy) => {
                let damaged = fault.is_damage() && copy.err().is_none_or(|fault| fault.is_damage());
                Found::Unusable { fault, damaged }
            }
        }
    }

    /// Writes both. A missing copy is not an error. Blocking.
    ///
    /// # Errors
    /// When the record cannot be written; then neither file has changed.
    pub(crate) fn write<T: Serialize>(&self, content: &T) -> Result<(), WriteError> {
        self.prepare(content)?.commit().map_err(|source| self.failed(source))
    }

    /// Writes the record next to its place, so that only a rename is left to do.
    ///
    /// # Errors
    /// When that fails; nothing has changed then.
    pub(crate) fn prepare<T: Serialize>(&self, content: &T) -> Result<Prepared<'_>, WriteError> {
        let bytes = record::encode(content)?;
        let pending = atomic_file::prepare(&self.record, &bytes).map_err(|source| self.failed(source))?;
        Ok(Prepared { files: self, pending, bytes })
    }

    /// Writes the copy. If that fails it is removed: an old one would be worse than none.
    pub(crate) fn write_copy(&self, bytes: &[u8]) {
        if let Err(error) = atomic_file::write(&self.copy, bytes) {
            tracing::debug!(path = %self.copy.display(), %error, "cannot copy a record");
            let _ = std::fs::remove_file(&self.copy);
        }
    }

    /// Removes the copy, which has to come before removing the record.
    ///
    /// # Errors
    /// When it cannot be removed; absence is not an error.
    pub(crate) fn remove_copy(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.copy) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn failed(&self, source: io::Error) -> WriteError {
        WriteError::File { path: self.record.clone(), source }
    }
}

/// Why a record was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// The content cannot be encoded.
    #[error(transparent)]
    Content(#[from] RecordError),
    /// The file.
    #[error("cannot write {path}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A record that is ready to be moved to its place; removed when dropped.
#[derive(Debug)]
pub(crate) struct Prepared<'a> {
    files: &'a RecordFiles,
    pending: atomic_file::Pending,
    bytes: Vec<u8>,
}

impl Prepared<'_> {
    /// Moves it to its place, and writes the copy.
    ///
    /// # Errors
    /// That of the rename; nothing has changed then.
    pub(crate) fn commit(self) -> io::Result<()> {
        self.pending.commit()?;
        self.files.write_copy(&self.bytes);
        Ok(())
    }
}

/// Repairs the files of the `kind` named `id` according to their state, and logs it. Blocking.
pub(crate) fn mend<T: Serialize>(
    layout: &Layout,
    kind: &'static str,
    id: &str,
    files: &RecordFiles,
    health: &Health,
    content: &T,
) {
    match health {
        Health::Good => {}
        Health::NoCopy => {
            if let Ok(bytes) = record::encode(content) {
                files.write_copy(&bytes);
            }
        }
        Health::Lost(fault) => {
            let reason = fault.as_ref().map_or_else(|| "it is gone".to_owned(), |fault| crate::chain(fault));
            tracing::error!(kind, id, reason, "a record is lost; restoring it from its copy");
            set_aside(layout, kind, id, &files.record);
            let directory = files.record.parent().unwrap_or(Path::new("/"));
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
            let written = made.map_err(|source| files.failed(source)).and_then(|()| files.write(content));
            if let Err(error) = written {
                tracing::warn!(kind, id, error = %crate::chain(&error), "cannot restore a record");
            }
        }
        Health::Unread(fault) => {
            tracing::error!(kind, id, reason = %crate::chain(fault), "cannot read a record; using its copy");
        }
        Health::Newer(version) => {
            tracing::warn!(
                kind,
                id,
                version,
                known = record::VERSION,
                "a record was written by a newer version; using the parts that this version knows, and leaving the file alone"
            );
        }
    }
}

/// Moves a damaged record to quarantine. Absence is not an error.
pub(crate) fn set_aside(layout: &Layout, kind: &str, id: &str, record: &Path) {
    let target = layout.quarantine().join(format!("{id}.{kind}"));
    match std::fs::rename(record, &target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %record.display(), %error, "cannot move a damaged record to quarantine");
        }
        _ => {}
    }
}

fn read<T: DeserializeOwned>(
    path: &Path,
    patience: &Patience,
    is_own: impl Fn(&T) -> bool,
) -> Result<Option<Decoded<T>>, Fault> {
    let bytes = match patiently(patience, || bytes_of(path)) {
        Ok(bytes) => bytes,
        Err(error) if !may_pass(&error) && error.kind() != io::ErrorKind::IsADirectory => return Ok(None),
        Err(source) => return Err(Fault::Unread { path: path.to_owned(), source }),
    };
    match record::decode(&bytes) {
        Ok(decoded) if is_own(&decoded.content) => Ok(Some(decoded)),
        Ok(_) => Err(Fault::Another { path: path.to_owned() }),
        Err(source) => Err(Fault::Content { path: path.to_owned(), source }),
    }
}

fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than the longest record, whose checksum then cannot match.
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use berth_model::id::ContainerId;
    use berth_model::record::ContainerRecord;

    use super::*;

    fn content(image_id: &str) -> ContainerRecord {
        ContainerRecord { image_id: image_id.to_owned(), ..ContainerRecord::default() }
    }

    fn files(directory: &Path) -> RecordFiles {
        RecordFiles { record: directory.join("record"), copy: directory.join("copy") }
    }

    fn found(files: &RecordFiles) -> (String, String) {
        let zero = ContainerId::from_bytes([0; 32]);
        match files.read(&Patience::of(Duration::ZERO), |record: &ContainerRecord| record.id == zero) {
            Found::Whole { content, health } => {
                let health = format!("{health:?}");
                (content.image_id, health.split([' ', '(', '{']).next().unwrap_or_default().to_owned())
            }
            Found::Absent => ("absent".to_owned(), String::new()),
            Found::Unusable { damaged, .. } => ("unusable".to_owned(), format!("damaged: {damaged}")),
        }
    }

    #[test]
    fn only_what_is_proven_damaged_counts_as_damaged() {
        let good = record::encode(&content("a")).unwrap();
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let newer = String::from_utf8(good.clone()).unwrap().replacen("record 1", "record 9", 1).into_bytes();
        let unknown = b"berth-record 9 0\nof the future".to_vec();
        let other = record::encode(&ContainerRecord { id: ContainerId::from_bytes([7; 32]), ..content("b") })
            .unwrap();
        // A directory stands for what cannot be read: neither absent nor damaged.
        const UNREADABLE: &[u8] = b"a directory";
        type Case<'a> = (Option<&'a [u8]>, Option<&'a [u8]>, &'a str, &'a str);
        let cases: [Case<'_>; 17] = [
            (Some(&good), Some(&good), "a", "Good"),
            (Some(&good), None, "a", "NoCopy"),
            (Some(&good), Some(&flipped), "a", "NoCopy"),
            (Some(&good), Some(UNREADABLE), "a", "NoCopy"),
            (Some(&flipped), Some(&good), "a", "Lost"),
            (Some(&other), Some(&good), "a", "Lost"),
            (None, Some(&good), "a", "Lost"),
            (Some(UNREADABLE), Some(&good), "a", "Unread"),
            (Some(&newer), None, "a", "Newer"),
            (Some(&newer), Some(&good), "a", "Newer"),
            (Some(&unknown), Some(&newer), "a", "Newer"),
            (Some(&unknown), None, "unusable", "damaged: false"),
            (Some(UNREADABLE), None, "unusable", "damaged: false"),
            (Some(&flipped), Some(UNREADABLE), "unusable", "damaged: false"),
            (Some(&flipped), Some(&flipped), "unusable", "damaged: true"),
            (Some(b""), None, "unusable", "damaged: true"),
            (None, None, "absent", ""),
        ];
        for (record, copy, content, health) in cases {
            let directory = tempfile::tempdir().unwrap();
            let files = files(directory.path());
            for (path, bytes) in [(&files.record, record), (&files.copy, copy)] {
                match bytes {
                    Some(UNREADABLE) => std::fs::create_dir(path).unwrap(),
                    Some(bytes) => std::fs::write(path, bytes).unwrap(),
                    None => {}
                }
            }
            let as_text = |bytes: Option<&[u8]>| bytes.map(|bytes| bytes.escape_ascii().to_string());
            let (seen, how) = found(&files);
            assert_eq!(
                (seen.as_str(), how.as_str()),
                (content, health),
                "{:?} {:?}",
                as_text(record),
                as_text(copy)
            );
        }
    }

    #[test]
    fn both_files_are_written_and_a_copy_that_would_be_old_goes() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(directory.path());
        files.write(&content("one")).unwrap();
        assert_eq!(found(&files), ("one".to_owned(), "Good".to_owned()));
        drop(files.prepare(&content("dropped")).unwrap());
        assert_eq!(found(&files), ("one".to_owned(), "Good".to_owned()));
        // Where the copy's partial file would be is a directory.
        std::fs::create_dir(directory.path().join("copy.partial")).unwrap();
        files.write(&content("two")).unwrap();
        assert_eq!(found(&files), ("two".to_owned(), "NoCopy".to_owned()));
        files.remove_copy().unwrap();
        assert!(!files.copy.exists());
    }

    #[test]
    fn patience_is_shared_and_ends() {
        let patience = Patience::of(Duration::from_millis(60));
        let begun = Instant::now();
        let mut attempts = 0;
        for _ in 0..3 {
            let result: io::Result<()> = patiently(&patience, || {
                attempts += 1;
                Err(io::Error::from_raw_os_error(5))
            });
            assert_eq!(result.unwrap_err().raw_os_error(), Some(5));
        }
        assert!(attempts > 3 && begun.elapsed() < Duration::from_secs(5), "{attempts}");
        let absent = patiently(&Patience::of(Duration::from_secs(60)), || File::open("/nowhere"));
        assert_eq!(absent.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
