//! Writes a file or a directory as an archive, by descriptor.
//!
//! Links are written as links; only one at the end of the given path is followed, below the root.
//! Devices, FIFOs and sockets are skipped. The tree may change meanwhile: what is gone is skipped,
//! and a file that shrinks is padded with zeros, as tar(1) does. Of files that do not state their
//! length, such as those of `/proc`, everything is read first, as cat(1) would.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use berth_sys::beneath::{Dir, FileType, Root, Stat, stat_fd};
use berth_sys::errno::ESRCH;
use berth_sys::file::set_nonblocking;
use berth_sys::mount::states_no_lengths;
use tar::{Builder, EntryType, Header};

/// The most entries of a directory: its names are all held at once.
const MAX_NAMES: usize = 1_000_000;

/// The most that is read of a file that does not state its length, in bytes. The largest that is of
/// use, `/proc/kallsyms`, has less than 20 MiB; others have no end.
const MAX_UNSTATED: u64 = 64 * 1024 * 1024;

/// Why an archive cannot be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    /// A file or directory cannot be read.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// A file that does not state its length cannot be read.
    #[error("cannot read {0}")]
    Unstated(PathBuf, #[source] io::Error),
    /// A file cannot be read to its end.
    #[error("cannot read {0}")]
    Broken(PathBuf, #[source] io::Error),
    /// The archive cannot be written.
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
}

/// What was skipped.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Paths of devices, FIFOs and sockets.
    pub(crate) left_out: Vec<PathBuf>,
    /// Paths of directories whose contents the kernel makes, in a tree that is a real one.
    pub(crate) kernels: Vec<PathBuf>,
    /// Paths in such a directory that cannot be read, and why: much in `/proc` is not for reading.
    pub(crate) unread: Vec<(PathBuf, String)>,
    /// Paths of files that shrank while they were read.
    pub(crate) shrunk: Vec<PathBuf>,
}

/// Which mode bits are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Modes {
    /// All of them.
    Whole,
    /// Without set-user-id and similar bits: the files get another owner.
    Plain,
}

struct Packing<W: Write> {
    to: Builder<W>,
    modes: Modes,
    /// Paths of files with several names, by device and inode number.
    names: HashMap<(u64, u64), PathBuf>,
    report: Report,
}

/// A directory that is being written.
struct Level {
    directory: Dir,
    /// Its path in the archive.
    path: PathBuf,
    /// Entries not written yet, last first.
    names: Vec<OsString>,
}

/// Writes the file or directory at `path` below `root` under the name `top`. Without it, only the
/// contents of the directory are written, below `.`: an entry for the directory itself would change
/// the one it is unpacked in.
///
/// # Errors
/// [`PackError`].
pub(crate) fn pack(
    root: &Root,
    path: &Path,
    top: Option<&OsStr>,
    modes: Modes,
    to: impl Write,
) -> Result<Report, PackError> {
    let failed = |source| PackError::Read(path.to_owned(), source);
    let stat = root.resolve(path).and_then(|found| stat_fd(found.as_fd())).map_err(failed)?;
    let called = Path::new(top.unwrap_or(OsStr::new("."))).to_owned();
    let mut packing =
        Packing { to: Builder::new(to), modes, names: HashMap::new(), report: Report::default() };
    if stat.file_type == FileType::Directory {
        let directory = root.open_dir(path).map_err(failed)?;
        if top.is_some() {
            packing.entry(&stat, EntryType::Directory, 0, &called, io::empty())?;
        }
        packing.tree(directory, called)?;
    } else {
        let file = root.open_regular(path).map_err(failed)?;
        let stat = stat_fd(file.as_fd()).map_err(failed)?;
        packing.file(&stat, &called, file)?;
    }
    let mut to = packing.to.into_inner().map_err(PackError::Write)?;
    to.flush().map_err(PackError::Write)?;
    Ok(packing.report)
}

impl<W: Write> Packing<W> {
    /// Writes the contents of a directory. A stack, not recursion: trees may be of any depth.
    fn tree(&mut self, directory: Dir, path: PathBuf) -> Result<(), PackError> {
        let mut levels = vec![level(directory, path)?];
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.names.pop() else {
                levels.pop();
                continue;
            };
            let path = level.path.join(&name);
            match self.one(&level.directory, &name, &path) {
                Ok(None) => {}
                Ok(Some(directory)) => match self::level(directory, path) {
                    Err(PackError::Read(_, error)) if is_gone(&error) => {}
                    // Such as `net` of a process that has ended and was not waited for.
                    Err(PackError::Read(path, error)) if is_kernels(&level.directory) => {
                        self.report.unread.push((path, error.to_string()));
                    }
                    level => levels.push(level?),
                },
                Err(PackError::Read(_, error) | PackError::Unstated(_, error)) if is_gone(&error) => {}
                Err(PackError::Unstated(path, error)) => {
                    self.report.unread.push((path, error.to_string()));
                }
                Err(PackError::Read(path, error)) if is_kernels(&level.directory) => {
                    self.report.unread.push((path, error.to_string()));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes one entry of a directory; returns a directory to descend into.
    fn one(&mut self, parent: &Dir, name: &OsStr, path: &Path) -> Result<Option<Dir>, PackError> {
        let failed = |source| PackError::Read(path.to_owned(), source);
        let stat = parent.stat(name).map_err(failed)?;
        match stat.file_type {
            FileType::Directory => {
                let directory = parent.open_dir(name).map_err(failed)?;
                self.entry(&stat, EntryType::Directory, 0, path, io::empty())?;
                // As podman-cp(1): nobody who copies a container's root wants what the kernel says.
                if is_kernels(&directory) && !is_kernels(parent) {
                    self.report.kernels.push(path.to_owned());
                    return Ok(None);
                }
                return Ok(Some(directory));
            }
            FileType::Regular => {
                let file = parent.open_regular(name).map_err(failed)?;
                let stat = stat_fd(file.as_fd()).map_err(failed)?;
                match self.names.get(&stat.identity).cloned() {
                    Some(first) => self.link(&stat, EntryType::Link, path, &first)?,
                    None => {
                        if stat.links > 1 {
                            self.names.insert(stat.identity, path.to_owned());
                        }
                        self.file(&stat, path, file)?;
                    }
                }
            }
            FileType::Symlink => {
                let target = parent.read_link(name).map_err(failed)?;
                self.link(&stat, EntryType::Symlink, path, Path::new(&target))?;
            }
            FileType::CharDevice | FileType::BlockDevice | FileType::Fifo | FileType::Socket => {
                self.report.left_out.push(path.to_owned());
            }
        }
        Ok(None)
    }

    fn file(&mut self, stat: &Stat, path: &Path, file: File) -> Result<(), PackError> {
        let content = unstated(stat, &file).map_err(|error| PackError::Unstated(path.to_owned(), error))?;
        match content {
            Some(content) => {
                let length = u64::try_from(content.len()).unwrap_or(u64::MAX);
                self.entry(stat, EntryType::Regular, length, path, &content[..])
            }
            None => self.entry(stat, EntryType::Regular, stat.size, path, file),
        }
    }

    fn entry(
        &mut self,
        stat: &Stat,
        kind: EntryType,
        size: u64,
        path: &Path,
        content: impl Read,
    ) -> Result<(), PackError> {
        let mut header = header(stat, kind, size, self.modes);
        let mut content = Content { from: content, left: size, failure: None, shrank: false };
        let written = self.to.append_data(&mut header, path, &mut content);
        if content.shrank {
            self.report.shrunk.push(path.to_owned());
        }
        match content.failure {
            // Not skipped like a file that is gone: its entry has begun.
            Some(source) => Err(PackError::Broken(path.to_owned(), source)),
            None => written.map_err(PackError::Write),
        }
    }

    fn link(&mut self, stat: &Stat, kind: EntryType, path: &Path, target: &Path) -> Result<(), PackError> {
        let mut header = header(stat, kind, 0, self.modes);
        self.to.append_link(&mut header, path, target).map_err(PackError::Write)
    }
}

/// Whether the kernel makes what is in the directory.
fn is_kernels(directory: &Dir) -> bool {
    states_no_lengths(directory.as_fd()).unwrap_or(false)
}

/// Whether a file is gone. In procfs(5), `ESRCH` means that the process has ended.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH)
}

/// The content of a file that does not state its length; `None` for another one.
fn unstated(stat: &Stat, file: &File) -> io::Result<Option<Vec<u8>>> {
    if stat.size > 0 && !states_no_lengths(file.as_fd())? {
        return Ok(None);
    }
    // Some wait for what the kernel will say next.
    set_nonblocking(file.as_fd())?;
    let mut content = Vec::new();
    file.take(MAX_UNSTATED + 1).read_to_end(&mut content)?;
    if u64::try_from(content.len()).is_ok_and(|length| length <= MAX_UNSTATED) {
        return Ok(Some(content));
    }
    let text = format!("it has more than {} MiB and does not state how much", MAX_UNSTATED / 1024 / 1024);
    Err(io::Error::new(io::ErrorKind::FileTooLarge, text))
}

/// The content of a file: exactly as many bytes as announced, even if the file changes meanwhile.
struct Content<R> {
    from: R,
    left: u64,
    /// Why the file could not be read.
    failure: Option<io::Error>,
    shrank: bool,
}

impl<R: Read> Read for Content<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..wanted).filter(|buffer| !buffer.is_empty()) else { return Ok(0) };
        let mut length = 0;
        if !self.shrank {
            length = match self.from.read(buffer) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    let told = io::Error::from(error.kind());
                    self.failure = Some(error);
                    return Err(told);
                }
                read => read?,
            };
        }
        if length == 0 {
            self.shrank = true;
            buffer.fill(0);
            length = buffer.len();
        }
        self.left -= u64::try_from(length).unwrap_or(self.left);
        Ok(length)
    }
}

fn level(directory: Dir, path: PathBuf) -> Result<Level, PackError> {
    let mut names = directory.names(MAX_NAMES).map_err(|source| PackError::Read(path.clone(), source))?;
    names.sort_by(|one, other| other.cmp(one));
    Ok(Level { directory, path, names })
}

fn header(stat: &Stat, kind: EntryType, size: u64, modes: Modes) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(match modes {
        Modes::Whole => stat.mode,
        Modes::Plain => stat.mode & 0o777,
    });
    header.set_uid(stat.uid.into());
    header.set_gid(stat.gid.into());
    header.set_mtime(u64::try_from(stat.modified.seconds).unwrap_or(0));
    header
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::super::archive::Archive;
    use super::super::extract::{Rules, extract};
    use super::*;

    #[test]
    fn what_is_packed_is_extracted_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let from = directory.path().join("from");
        fs::create_dir_all(from.join("sub/empty")).unwrap();
        fs::write(from.join("sub/file"), vec![7; 100_000]).unwrap();
        fs::hard_link(from.join("sub/file"), from.join("second")).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        let long = "n".repeat(250);
        fs::write(from.join(&long), "long").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
        let to = directory.path().join("to");
        fs::create_dir(&to).unwrap();
        let (root, into) = (Root::open(directory.path()).unwrap(), Root::open(&to).unwrap());
        let mut bytes = Vec::new();
        let report =
            pack(&root, Path::new("/from"), Some(OsStr::new("top")), Modes::Plain, &mut bytes).unwrap();
        assert_eq!(report.left_out, [Path::new("top/socket")]);
        let name = |text: &str| Some(OsString::from(text));
        let rules = Rules { expected: name("top"), top: name("copy"), only_file: false, owner: None };
        extract(&bytes[..], &into.open_dir(Path::new("")).unwrap(), &rules).unwrap();
        let copy = to.join("copy");
        assert_eq!(fs::read(copy.join("sub/file")).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::read(copy.join("second")).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::read(copy.join(&long)).unwrap(), b"long");
        assert_eq!(fs::read_link(copy.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert!(copy.join("sub/empty").is_dir());
    }

    #[test]
    fn files_that_do_not_state_their_length_are_read_to_their_end_or_named() {
        let root = Root::open(Path::new("/proc/self")).unwrap();
        let packed = |path: &str, top| {
            let mut bytes = Vec::new();
            let report = pack(&root, Path::new(path), top, Modes::Plain, &mut bytes);
            (report, String::from_utf8_lossy(&bytes).into_owned())
        };
        let (report, bytes) = packed("/status", Some(OsStr::new("status")));
        assert!(report.unwrap().unread.is_empty());
        assert!(bytes.contains("\nThreads:") && bytes.contains("\nPid:"), "{bytes}");
        // There is nothing at its beginning.
        let (report, _) = packed("/mem", Some(OsStr::new("mem")));
        assert!(matches!(report, Err(PackError::Unstated(..))), "{report:?}");
        let task = format!("/task/{}", std::process::id());
        let (report, bytes) = packed(&task, None);
        let unread = report.unwrap().unread;
        assert!(unread.iter().any(|(path, _)| path == Path::new("./mem")), "{unread:?}");
        assert!(bytes.contains("\nThreads:"));
    }

    #[test]
    fn plain_modes_set_no_user_or_group() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
        let root = Root::open(directory.path()).unwrap();
        for (modes, expected) in [(Modes::Whole, 0o6755), (Modes::Plain, 0o755)] {
            let mut bytes = Vec::new();
            pack(&root, Path::new("/file"), Some(OsStr::new("x")), modes, &mut bytes).unwrap();
            let entry = Archive::new(&bytes[..]).next().unwrap().unwrap();
            assert_eq!(entry.mode, expected, "{modes:?}");
        }
    }

    #[test]
    fn a_link_at_the_end_of_the_path_is_followed_below_the_root_only() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        fs::write(directory.path().join("secret"), "host").unwrap();
        let root = directory.path().join("root");
        fs::write(root.join("file"), "inside").unwrap();
        symlink("/file", root.join("good")).unwrap();
        symlink(directory.path().join("secret"), root.join("bad")).unwrap();
        symlink("../secret", root.join("worse")).unwrap();
        let root = Root::open(&root).unwrap();
        let mut bytes = Vec::new();
        pack(&root, Path::new("/good"), Some(OsStr::new("good")), Modes::Plain, &mut bytes).unwrap();
        assert!(bytes.windows(6).any(|window| window == b"inside"));
        for path in ["/bad", "/worse", "/../secret"] {
            let packed = pack(&root, Path::new(path), Some(OsStr::new("x")), Modes::Plain, io::sink());
            assert!(packed.is_err(), "{path}");
        }
    }

    #[test]
    fn a_file_that_becomes_shorter_is_filled_up_and_one_that_cannot_be_read_is_named() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("broken"))
            }
        }
        let content = |size, from: &'static [u8]| {
            let mut content = Content { from, left: size, failure: None, shrank: false };
            let mut all = Vec::new();
            content.read_to_end(&mut all).unwrap();
            (all, content.shrank)
        };
        assert_eq!(content(5, b"abc"), (b"abc\0\0".to_vec(), true));
        assert_eq!(content(2, b"abc"), (b"ab".to_vec(), false));
        assert_eq!(content(3, b"abc"), (b"abc".to_vec(), false));
        let mut content = Content { from: Broken, left: 5, failure: None, shrank: false };
        assert!(content.read(&mut [0; 8]).is_err() && content.failure.is_some());
    }
}
