//! Files that are there whole or not at all.
//!
//! Without `fsync`, on purpose: records of sandboxes and containers are written in the hot path, and after a
//! power cut no container runs any more. What a power cut tears is found by the record's checksum. (Images
//! are another matter, and sync.)

use std::io;
use std::path::{Path, PathBuf};

/// Writes `bytes` as `path`, over what is there.
///
/// # Errors
/// What the write or the rename says; the old content is still there then, and no temporary file.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    prepare(path, bytes)?.commit()
}

/// Content that has been written beside its place, so that a full disk is known before anything has changed.
/// Dropped, it goes.
#[derive(Debug)]
pub(crate) struct Pending {
    partial: PathBuf,
    path: PathBuf,
}

/// Writes `bytes` beside `path`.
///
/// # Errors
/// What the write says; no temporary file is left.
pub(crate) fn prepare(path: &Path, bytes: &[u8]) -> io::Result<Pending> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let pending = Pending { partial: PathBuf::from(partial), path: path.to_owned() };
    std::fs::write(&pending.partial, bytes)?;
    Ok(pending)
}

impl Pending {
    /// Puts it in its place, over what is there.
    ///
    /// # Errors
    /// What the rename says; the old content is still there then, and no temporary file.
    pub(crate) fn commit(self) -> io::Result<()> {
        std::fs::rename(&self.partial, &self.path)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // It may have taken its place, or never have come to exist; an error of either was reported.
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
