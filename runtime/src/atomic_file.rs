//! Files that are there whole or not at all.
//!
//! Without `fsync`, on purpose: records of sandboxes and containers are written in the hot path, and after a power cut no container
//! runs any more. What a power cut tears is found by the record's checksum. (Images are another matter, and sync.)

use std::io;
use std::path::Path;

/// Writes `bytes` as `path`, over what is there.
///
/// # Errors
/// What the write or the rename says; the old content is still there then, and no temporary file.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let result = std::fs::write(partial, bytes).and_then(|()| std::fs::rename(partial, path));
    if result.is_err() {
        // It may not have come to exist; the error above is the one to tell.
        let _ = std::fs::remove_file(partial);
    }
    result
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
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert!(write(&directory.path().join("absent/file"), b"x").is_err());
        assert!(write(directory.path(), b"x").is_err());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
