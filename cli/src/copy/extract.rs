//! Writes the entries of an archive below one directory.
//!
//! The archive may be hostile, and so may the directory, which a container can change meanwhile.
//! So:
//!
//! - a path is walked name by name from the directory's descriptor, without following links;
//! - `..` is refused, and the leading slash of an absolute path is dropped;
//! - anything outside the one requested name is refused;
//! - a file is created, never opened through an existing name, except one that something is mounted
//!   on;
//! - a hard link must lead to a file that this archive created;
//! - devices and FIFOs are skipped.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use berth_sys::beneath::{self, Dir, FileType, Timestamp, stat_fd};

use super::archive::{Archive, Entry, Kind};

/// How an archive is extracted.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    /// The first name of every path, which is replaced by `top`; `None` for any.
    pub(crate) expected: Option<OsString>,
    /// Its new name; `None` for the contents of a directory.
    pub(crate) top: Option<OsString>,
    /// Whether only one file is expected, and no directory.
    pub(crate) only_file: bool,
    /// Owner and group of everything; `None` for the caller's.
    pub(crate) owner: Option<(u32, u32)>,
}

/// Why an archive cannot be extracted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExtractError {
    /// The stream cannot be read, or is not an archive.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    /// An entry is outside what was requested.
    #[error("the archive has an unexpected entry: {0}")]
    Unexpected(String),
    /// An entry cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// Its path in the archive.
        path: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The requested path is not in it.
    #[error("the archive is empty")]
    Empty,
}

/// What was skipped.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Paths of devices and FIFOs.
    pub(crate) left_out: Vec<String>,
}

struct Extraction<'a> {
    into: &'a Dir,
    rules: &'a Rules,
    /// The last directory walked to: most entries are next to the previous one.
    last: Option<(Vec<OsString>, Dir)>,
    /// Device and inode numbers of the created files, for hard links.
    made: HashSet<(u64, u64)>,
    /// The created directories; their times are set at the end.
    directories: Vec<(Vec<OsString>, i64)>,
    report: Report,
}

/// Writes an archive below `into`, and reads its stream to the end.
///
/// # Errors
/// [`ExtractError`]; what was already written stays.
pub(crate) fn extract(from: impl Read, into: &Dir, rules: &Rules) -> Result<Report, ExtractError> {
    let mut archive = Archive::new(from);
    let mut extraction = Extraction {
        into,
        rules,
        last: None,
        made: HashSet::new(),
        directories: Vec::new(),
        report: Report::default(),
    };
    let mut is_empty = true;
    while let Some(entry) = archive.next().map_err(ExtractError::Read)? {
        is_empty = false;
        extraction.take(&entry, &mut archive)?;
    }
    archive.drain().map_err(ExtractError::Read)?;
    if is_empty && rules.expected.is_some() {
        return Err(ExtractError::Empty);
    }
    extraction.set_times_of_directories();
    Ok(extraction.report)
}

fn text(path: &[u8]) -> String {
    crate::table::printable(&String::from_utf8_lossy(path))
}

fn error(code: io::ErrorKind, text: &'static str) -> io::Error {
    io::Error::new(code, text)
}

/// The names in a path; `None` when it leads upwards.
fn names(path: &[u8]) -> Option<Vec<OsString>> {
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return None,
            name => names.push(OsStr::from_bytes(name).to_owned()),
        }
    }
    Some(names)
}

impl Extraction<'_> {
    /// The destination of a path in the archive; empty for the directory itself.
    fn place(&self, path: &[u8]) -> Option<Vec<OsString>> {
        let mut names = names(path)?;
        if let Some(expected) = &self.rules.expected {
            if names.first() != Some(expected) {
                return None;
            }
            names.remove(0);
        }
        if let Some(top) = &self.rules.top {
            names.insert(0, top.clone());
        }
        Some(names)
    }

    fn take<R: Read>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<(), ExtractError> {
        let unexpected = || ExtractError::Unexpected(text(&entry.path));
        let mut place = self.place(&entry.path).ok_or_else(unexpected)?;
        if self.rules.only_file && (entry.kind != Kind::File || place.len() != 1) {
            return Err(unexpected());
        }
        let whole = place.clone();
        let failed = |source| ExtractError::Write { path: text(&entry.path), source };
        // The end of the stream within a file is not about this file.
        let copying = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => ExtractError::Read(source),
            _ => ExtractError::Write { path: text(&entry.path), source },
        };
        let Some(name) = place.pop() else {
            // The destination directory, which exists.
            return if entry.kind == Kind::Directory { Ok(()) } else { Err(unexpected()) };
        };
        let link = match &entry.kind {
            Kind::HardLink(target) => Some(self.place(target).ok_or_else(unexpected)?),
            _ => None,
        };
        if entry.kind == Kind::Special {
            self.report.left_out.push(text(&entry.path));
            return Ok(());
        }
        self.walk(place).map_err(failed)?;
        let Some((_, parent)) = &self.last else { return Err(unexpected()) };
        match &entry.kind {
            Kind::Directory => {
                if make_directory(parent, &name, entry.mode, self.rules.owner).map_err(failed)? {
                    self.directories.push((whole, entry.modified));
                }
            }
            Kind::File => {
                if let Some(mut file) = mounted_file(parent, &name).map_err(failed)? {
                    archive.copy_content(&mut file).map_err(copying)?;
                } else {
                    make_way(parent, &name).map_err(failed)?;
                    let mut file = parent.create_file(&name, 0o600).map_err(failed)?;
                    archive.copy_content(&mut file).map_err(copying)?;
                    self.made.insert(finish_file(&file, entry, self.rules.owner).map_err(failed)?);
                }
            }
            Kind::Symlink(target) => {
                make_way(parent, &name).map_err(failed)?;
                parent.make_symlink(OsStr::from_bytes(target), &name).map_err(failed)?;
                if let Some((uid, gid)) = self.rules.owner {
                    parent.chown(&name, uid, gid).map_err(failed)?;
                }
            }
            Kind::HardLink(_) => {
                let parent = parent.as_root().and_then(|root| root.open_dir("".as_ref())).map_err(failed)?;
                self.link(&parent, &name, link.unwrap_or_default()).map_err(failed)?;
            }
            Kind::Special => {}
        }
        Ok(())
    }

    /// Makes `name` a hard link to a file created before.
    fn link(&mut self, parent: &Dir, name: &OsStr, mut target: Vec<OsString>) -> io::Result<()> {
        let wrong =
            || error(io::ErrorKind::InvalidData, "it is a hard link to a file that is not in the archive");
        let target_name = target.pop().ok_or_else(wrong)?;
        self.walk(target)?;
        let (_, from) = self.last.as_ref().ok_or_else(wrong)?;
        let stat = from.stat(&target_name)?;
        if stat.file_type != FileType::Regular || !self.made.contains(&stat.identity) {
            return Err(wrong());
        }
        make_way(parent, name)?;
        parent.make_hard_link(name, from, &target_name)?;
        // Another process may have put a different file there meanwhile.
        if parent.stat(name)?.identity != stat.identity {
            parent.unlink(name)?;
            return Err(wrong());
        }
        Ok(())
    }

    /// Opens a directory below the first, name by name, creating missing ones. Follows no links.
    fn walk(&mut self, place: Vec<OsString>) -> io::Result<()> {
        if self.last.as_ref().is_some_and(|(last, _)| *last == place) {
            return Ok(());
        }
        let mut directory = self.into.as_root()?.open_dir("".as_ref())?;
        for name in &place {
            directory = match directory.open_dir(name) {
                Err(missing) if missing.kind() == io::ErrorKind::NotFound => {
                    make_directory(&directory, name, 0o755, self.rules.owner)?;
                    directory.open_dir(name)?
                }
                opened => opened?,
            };
        }
        self.last = Some((place, directory));
        Ok(())
    }

    /// Best effort: errors are ignored.
    fn set_times_of_directories(&mut self) {
        for (mut place, seconds) in std::mem::take(&mut self.directories).into_iter().rev() {
            let Some(name) = place.pop() else { continue };
            if self.walk(place).is_ok()
                && let Some((_, parent)) = &self.last
            {
                let _ = parent.set_times(&name, Timestamp { seconds, nanoseconds: 0 });
            }
        }
    }
}

/// Removes an existing file or link. Devices, FIFOs and sockets are kept: the system may need them;
/// and mounts, which a container would lose.
fn make_way(parent: &Dir, name: &OsStr) -> io::Result<()> {
    match parent.stat(name).map(|stat| stat.file_type) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(()),
        Ok(FileType::Regular | FileType::Symlink | FileType::Directory) => {}
        Ok(_) => {
            return Err(error(io::ErrorKind::AlreadyExists, "a device, FIFO or socket is in the way"));
        }
        Err(error) => return Err(error),
    }
    if parent.is_mounted_on(name)? {
        return Err(error(io::ErrorKind::ResourceBusy, "something is mounted on it"));
    }
    match parent.unlink(name) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Creates a directory unless it exists. Returns whether it was created.
fn make_directory(parent: &Dir, name: &OsStr, mode: u32, owner: Option<(u32, u32)>) -> io::Result<bool> {
    match parent.make_dir(name, 0o700) {
        Err(there) if there.kind() == io::ErrorKind::AlreadyExists => {
            parent.open_dir(name)?;
            return Ok(false);
        }
        made => made?,
    }
    let made = parent.open_dir(name)?;
    if let Some((uid, gid)) = owner {
        beneath::chown(made.as_fd(), uid, gid)?;
    }
    beneath::chmod(made.as_fd(), mode & 0o777)?;
    Ok(true)
}

/// A file that something is mounted on, emptied: it keeps its place, owner and mode.
fn mounted_file(parent: &Dir, name: &OsStr) -> io::Result<Option<File>> {
    match parent.is_mounted_on(name) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(false) => return Ok(None),
        is_mounted => is_mounted?,
    };
    let file = parent.open_to_overwrite(name)?;
    file.set_len(0)?;
    Ok(Some(file))
}

/// Sets owner, mode and time, and returns device and inode number. Set-user-id and similar bits are
/// dropped: the file has a new owner.
fn finish_file(file: &File, entry: &Entry, owner: Option<(u32, u32)>) -> io::Result<(u64, u64)> {
    if let Some((uid, gid)) = owner {
        beneath::chown(file.as_fd(), uid, gid)?;
    }
    beneath::chmod(file.as_fd(), entry.mode & 0o777)?;
    beneath::set_times(file.as_fd(), Timestamp { seconds: entry.modified, nanoseconds: 0 })?;
    Ok(stat_fd(file.as_fd())?.identity)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;

    use berth_sys::beneath::Root;
    use tar::{EntryType, Header};

    use super::*;

    /// An archive of entries whose names are not looked at by the `tar` crate.
    fn archive(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, path, rest) in entries {
            let mut header = Header::new_gnu();
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            let content = if *kind == EntryType::Regular { *rest } else { "" };
            if content.is_empty() {
                header.as_gnu_mut().unwrap().linkname[..rest.len()].copy_from_slice(rest.as_bytes());
            }
            header.set_entry_type(*kind);
            header.set_size(content.len() as u64);
            header.set_mode(0o6755);
            header.set_mtime(1_000_000);
            header.set_uid(1234);
            header.set_gid(1234);
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(content.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes
    }

    /// `into/` to write to, beside `canary/` with a secret.
    fn place() -> (tempfile::TempDir, Dir) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("into")).unwrap();
        fs::create_dir(directory.path().join("canary")).unwrap();
        fs::write(directory.path().join("canary/secret"), "host").unwrap();
        let into = Root::open(&directory.path().join("into")).unwrap().open_dir(Path::new("")).unwrap();
        (directory, into)
    }

    fn rules(expected: Option<&str>, top: Option<&str>) -> Rules {
        let name = |text: Option<&str>| text.map(OsString::from);
        Rules { expected: name(expected), top: name(top), only_file: false, owner: None }
    }

    #[test]
    fn a_tree_is_written_under_its_new_name() {
        let (directory, into) = place();
        let bytes = archive(&[
            (EntryType::Directory, "a", ""),
            (EntryType::Regular, "a/file", "content"),
            (EntryType::Symlink, "a/link", "/etc/passwd"),
            (EntryType::Link, "a/second", "a/file"),
            (EntryType::Regular, "a/deep/er/file", "x"),
            (EntryType::Char, "a/device", ""),
            (EntryType::Fifo, "a/fifo", ""),
        ]);
        let report = extract(&bytes[..], &into, &rules(Some("a"), Some("new"))).unwrap();
        assert_eq!(report.left_out, ["a/device", "a/fifo"]);
        let new = directory.path().join("into/new");
        let file = fs::metadata(new.join("file")).unwrap();
        assert_eq!((file.len(), file.mode() & 0o7777, file.mtime(), file.nlink()), (7, 0o755, 1_000_000, 2));
        assert_eq!(file.uid(), fs::metadata(&new).unwrap().uid(), "the owner is who copies");
        assert_eq!(fs::read_link(new.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::metadata(new.join("second")).unwrap().ino(), file.ino());
        assert_eq!(fs::read(new.join("deep/er/file")).unwrap(), b"x");
        assert_eq!(fs::metadata(&new).unwrap().mtime(), 1_000_000);
        assert!(!new.join("device").exists() && !new.join("fifo").exists());
    }

    #[test]
    fn a_socket_is_not_replaced_by_a_file_or_link() {
        let (directory, into) = place();
        let socket = directory.path().join("into/socket");
        std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let before = fs::symlink_metadata(&socket).unwrap().ino();
        for kind in [EntryType::Regular, EntryType::Symlink] {
            let bytes = archive(&[(kind, "socket", "x")]);
            let error = extract(&bytes[..], &into, &rules(None, None)).unwrap_err();
            assert!(matches!(error, ExtractError::Write { .. }), "{error:?}");
            assert_eq!(fs::symlink_metadata(&socket).unwrap().ino(), before);
        }
    }

    #[test]
    fn hostile_archives_reach_nothing_outside() {
        const DIR: EntryType = EntryType::Directory;
        const FILE: EntryType = EntryType::Regular;
        let canary = |directory: &tempfile::TempDir| directory.path().join("canary").display().to_string();
        for case in 0..12 {
            let (directory, into) = place();
            let (outside, secret) = (canary(&directory), format!("{}/secret", canary(&directory)));
            symlink(&outside, directory.path().join("into/planted")).unwrap();
            let entries: Vec<(EntryType, &str, &str)> = match case {
                0 => vec![(FILE, "a/../../canary/secret", "x")],
                1 => vec![(FILE, "../canary/secret", "x")],
                2 => vec![(DIR, "a", ""), (EntryType::Symlink, "a/l", &outside), (FILE, "a/l/secret", "x")],
                3 => vec![(EntryType::Symlink, "a", &outside), (FILE, "a/secret", "x")],
                4 => vec![(EntryType::Symlink, "a", "../canary"), (DIR, "a", ""), (FILE, "a/secret", "x")],
                5 => vec![(DIR, "a", ""), (EntryType::Link, "a/l", &secret), (FILE, "a/l", "x")],
                6 => vec![(DIR, "a", ""), (EntryType::Link, "a/l", "a/../../canary/secret")],
                7 => vec![
                    (DIR, "a", ""),
                    (EntryType::Symlink, "a/s", &outside),
                    (EntryType::Link, "a/l", "a/s/secret"),
                ],
                8 => vec![
                    (DIR, "a", ""),
                    (EntryType::Symlink, "a/s", &secret),
                    (EntryType::Link, "a/l", "a/s"),
                ],
                9 => vec![(FILE, "b", "another name than was asked for")],
                10 => vec![(EntryType::Symlink, "a", &outside), (EntryType::Symlink, "a/secret", "x")],
                _ => vec![(FILE, ".", "x")],
            };
            let result = extract(&archive(&entries)[..], &into, &rules(Some("a"), Some("a")));
            assert!(result.is_err(), "{case}");
            assert_eq!(fs::read(&secret).unwrap(), b"host", "{case}");
            assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1, "{case}");
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{case}");
            assert!(!directory.path().join("into/b").exists());
        }
        // A link of before in the way of a file is replaced, not written through.
        let (directory, into) = place();
        symlink(directory.path().join("canary/secret"), directory.path().join("into/a")).unwrap();
        extract(&archive(&[(FILE, "a", "new")])[..], &into, &rules(Some("a"), Some("a"))).unwrap();
        assert_eq!(fs::read(directory.path().join("canary/secret")).unwrap(), b"host");
        assert_eq!(fs::read(directory.path().join("into/a")).unwrap(), b"new");
        // An absolute name is one below the directory.
        extract(&archive(&[(FILE, "/etc/passwd", "x")])[..], &into, &rules(None, None)).unwrap();
        assert_eq!(fs::read(directory.path().join("into/etc/passwd")).unwrap(), b"x");
    }

    #[test]
    fn hard_links_lead_to_files_of_the_archive_only() {
        let (directory, into) = place();
        fs::write(directory.path().join("into/mine"), "of the host").unwrap();
        let bytes = archive(&[(EntryType::Link, "theirs", "mine")]);
        assert!(extract(&bytes[..], &into, &rules(None, None)).is_err());
        assert!(!directory.path().join("into/theirs").exists());
    }

    #[test]
    fn one_file_is_one_file() {
        let (directory, into) = place();
        let rules = Rules { only_file: true, ..rules(Some("a"), Some("b")) };
        for entries in [
            &[(EntryType::Directory, "a", "")][..],
            &[(EntryType::Symlink, "a", "/etc/passwd")],
            &[(EntryType::Regular, "a/b", "x")],
        ] {
            assert!(matches!(
                extract(&archive(entries)[..], &into, &rules),
                Err(ExtractError::Unexpected(_))
            ));
        }
        assert!(matches!(extract(&[][..], &into, &rules), Err(ExtractError::Empty)));
        extract(&archive(&[(EntryType::Regular, "a", "x")])[..], &into, &rules).unwrap();
        let file = directory.path().join("into/b");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o755);
    }

    #[test]
    fn directories_that_are_there_stay_and_files_in_the_way_are_told() {
        let (directory, into) = place();
        fs::create_dir(directory.path().join("into/a")).unwrap();
        fs::write(directory.path().join("into/a/old"), "old").unwrap();
        fs::write(directory.path().join("into/file"), "old").unwrap();
        let bytes = archive(&[(EntryType::Directory, "a", ""), (EntryType::Regular, "a/new", "x")]);
        extract(&bytes[..], &into, &rules(None, None)).unwrap();
        assert_eq!(fs::read(directory.path().join("into/a/old")).unwrap(), b"old");
        for entries in [
            (EntryType::Directory, "file", ""),
            (EntryType::Regular, "a", "x"),
            (EntryType::Regular, "file/x", "y"),
        ] {
            assert!(extract(&archive(&[entries])[..], &into, &rules(None, None)).is_err(), "{entries:?}");
        }
    }
}
