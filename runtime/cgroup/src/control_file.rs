//! Reading and writing control files: one `write(2)` per value, a limit on reads, the path in every
//! error.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use berth_sys::errno::ENODEV;

use crate::{Cgroup, Error, Files, OpenFor};

/// The most that is read from one file. The longest is `cgroup.procs`: 8 bytes for each of at most
/// 4,194,304 pids (`kernel.pid_max`, proc(5)).
const READ_LIMIT: u64 = 32 * 1024 * 1024;

/// Opens for writing and never creates: a control file that is missing must be an error, on a fake
/// tree as on the kernel's.
pub(crate) fn open_for_writing(files: &dyn Files, path: &Path) -> io::Result<File> {
    open(files, path, OpenFor::Writing)
}

fn open(files: &dyn Files, path: &Path, purpose: OpenFor) -> io::Result<File> {
    files.open(&[path.to_path_buf()], purpose).pop().unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))
}

/// Writes one value in one `write(2)`, as cgroups(7) asks.
pub(crate) fn write_value(files: &dyn Files, path: &Path, value: &str) -> io::Result<()> {
    write_to(&mut open_for_writing(files, path)?, value)
}

/// The same for a file that is open, for files that take many values one after another.
pub(crate) fn write_to(file: &mut File, value: &str) -> io::Result<()> {
    // Not write_all: the rest of a value, written alone, would be another value.
    let written = file.write(value.as_bytes())?;
    if written == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// [`write_value`] with the file and the value in the error.
pub(crate) fn write(files: &dyn Files, path: &Path, value: &str) -> Result<(), Error> {
    write_value(files, path, value).map_err(|source| Error::Write {
        path: path.into(),
        value: value.into(),
        source,
    })
}

/// Reads all of a control file.
pub(crate) fn read_bytes(files: &dyn Files, path: &Path) -> io::Result<Vec<u8>> {
    read_open(open(files, path, OpenFor::Reading)?)
}

/// The same for a file that is open.
pub(crate) fn read_open(file: File) -> io::Result<Vec<u8>> {
    // Control files have size 0 in stat(2), so no room is reserved by it; most fit into this.
    let mut bytes = Vec::with_capacity(2048);
    file.take(READ_LIMIT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// [`read_bytes`] with the file in the error.
pub(crate) fn read(files: &dyn Files, path: &Path) -> Result<Vec<u8>, Error> {
    read_bytes(files, path).map_err(|source| Error::Read { path: path.into(), source })
}

/// The value of a file, or nothing where the file or the whole cgroup does not exist.
///
/// `ENODEV` is what kernfs answers for an open control file of a removed cgroup.
pub(crate) fn read_if_there(files: &dyn Files, path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match read_bytes(files, path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(Error::Read { path: path.into(), source }),
    }
}

/// The same of a cgroup, by those who look for names in its directories.
impl Cgroup {
    pub(crate) fn open_for_writing(&self, path: &Path) -> io::Result<File> {
        open_for_writing(self.files.as_ref(), path)
    }

    pub(crate) fn write_value(&self, path: &Path, value: &str) -> io::Result<()> {
        write_value(self.files.as_ref(), path, value)
    }

    pub(crate) fn write(&self, path: &Path, value: &str) -> Result<(), Error> {
        write(self.files.as_ref(), path, value)
    }

    pub(crate) fn read_if_there(&self, path: &Path) -> Result<Option<Vec<u8>>, Error> {
        read_if_there(self.files.as_ref(), path)
    }

    pub(crate) fn read_number(&self, path: &Path) -> Result<Option<u64>, Error> {
        read_number(self.files.as_ref(), path)
    }
}

/// Whether the error says that the directory did not answer: a container may keep it locked.
pub(crate) fn is_silent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut
}

/// Whether the error says that the file, or its cgroup, does not exist.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ENODEV)
}

/// A file with one number, with or without a line end. `max` (v2) is nothing, and so is a missing
/// file.
pub(crate) fn read_number(files: &dyn Files, path: &Path) -> Result<Option<u64>, Error> {
    let Some(bytes) = read_if_there(files, path)? else { return Ok(None) };
    let text = bytes.trim_ascii();
    if text == b"max" {
        return Ok(None);
    }
    number(text).map(Some).ok_or(Error::Malformed { path: path.into(), expected: "a number" })
}

/// Decimal digits only: no sign, no space, no overflow.
pub(crate) fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The number behind `key` in a flat keyed file (`key value` lines),
/// Documentation/admin-guide/cgroup-v2.rst, "Format".
pub(crate) fn keyed(bytes: &[u8], key: &str) -> Option<u64> {
    bytes.split(|&byte| byte == b'\n').find_map(|line| {
        let rest = line.strip_prefix(key.as_bytes())?.strip_prefix(b" ")?;
        number(rest.trim_ascii())
    })
}

/// The directories directly below one: its sub-cgroups. Empty where it does not exist.
pub(crate) fn sub_directories(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(dir) {
        Err(error) if is_gone(&error) => return Ok(found),
        other => other?,
    };
    for entry in entries {
        match entry {
            // d_type is filled in by cgroupfs; a symbolic link, which only a fake tree can have, is
            // not followed.
            Ok(entry) if entry.file_type().is_ok_and(|kind| kind.is_dir()) => found.push(entry.path()),
            Ok(_) => {}
            Err(error) if is_gone(&error) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// A directory and all below it, parents before their children. The kernel's own limits on the tree
/// bound this.
pub(crate) fn tree(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = vec![dir.to_path_buf()];
    let mut next = 0;
    while let Some(at) = all.get(next).cloned() {
        all.extend(sub_directories(&at)?);
        next += 1;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Direct;

    #[test]
    fn numbers_are_plain_digits() {
        for (text, expected) in [
            (&b"0"[..], Some(0)),
            (b"18446744073709551615", Some(u64::MAX)),
            (b"18446744073709551616", None),
            (b"", None),
            (b"-1", None),
            (b"+1", None),
            (b" 1", None),
            (b"1\0", None),
            (b"\xff", None),
            (b"max", None),
        ] {
            assert_eq!(number(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_key_is_matched_whole() {
        let file = b"oom_kill_disable 0\nunder_oom 0\noom_kill 7\nempty\nbad x\n";
        assert_eq!(keyed(file, "oom_kill"), Some(7));
        assert_eq!(keyed(file, "oom"), None);
        assert_eq!(keyed(file, "empty"), None);
        assert_eq!(keyed(file, "bad"), None);
        assert_eq!(keyed(b"", "oom_kill"), None);
    }

    #[test]
    fn a_missing_file_is_not_created_by_a_write() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pids.max");
        assert!(matches!(write(&Direct, &file, "1"), Err(Error::Write { .. })));
        assert!(!file.exists());
    }
}
