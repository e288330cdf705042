//! Files that exist completely or not at all.
//!
//! Without `fsync`, on purpose: records of sandboxes and containers are written in the hot path,
//! and after a power cut no container is running. A torn record is detected by its checksum.
//! (Images do sync.)

use std::io;
use std::path::{Path, PathBuf};

/// Writes `bytes` to `path`, replacing any file there.
///
/// # Errors
/// That of the write or the rename; the old content is kept then, and no temporary file is left.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    prepare(path, bytes)?.commit()
}

/// Content that was written next to its place, so that a full disk is noticed before anything has
/// changed. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Pending {
    partial: PathBuf,
    path: PathBuf,
}

/// Writes `bytes` next to `path`.
///
/// # Errors
/// That of the write; no temporary file is left.
pub(crate) fn prepare(path: &Path, bytes: &[u8]) -> io::Result<Pending> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let pending = Pending { partial: PathBuf::from(partial), path: path.to_owned() };
    std::fs::write(&pending.partial, bytes)?;
    Ok(pending)
}

impl Pending {
    /// Moves it to its place, replacing any file there.
    ///
    /// # Errors
    /// That of the rename; the old content is kept then, and no temporary file is left.
    pub(crate) fn commit(self) -> io::Result<()> {
        std::fs::rename(&self.partial, &self.path)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // It may have been moved to its place, or never created; either error was reported.
        let _ = std::fs::remove_file(&self.partial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        drop(prepare(&path, b"three").unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert!(write(&directory.path().join("absent/file"), b"x").is_err());
        assert!(write(directory.path(), b"x").is_err());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
