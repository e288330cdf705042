//! One layer's tar stream -> one tree on disk, in the form that an overlay mount wants as a lower
//! directory.
//!
//! The tree is made without the layers below it. What that leaves open is written down in the
//! [`Summary`] and settled when an image is put together (module `patch`): directories that had no
//! entry of their own, and hard links to files of lower layers.
//!
//! Whiteouts become character devices 0:0 and opaque markers the attribute `trusted.overlay.opaque`
//! (Linux, Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"); an image
//! cannot bring either itself.
//!
//! Semantics follow the OCI image-spec 1.1, layer.md; where it is silent, containerd: a later entry
//! replaces an earlier one of the same name, directories over directories change only their
//! metadata, links in the directory part of a path are followed inside the layer.
//!
//! Synchronous and single-threaded; the caller runs it on a blocking thread. On an error the tree
//! is incomplete, to be removed.

pub mod archive;
pub(crate) mod decimal;
mod parents;
pub(crate) mod path;
pub(crate) mod pax;
pub(crate) mod sparse;
pub(crate) mod whiteout;

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use berth_sys::beneath::{self, Dir, FileType, MissingDir, Node, Root, Stat, Timestamp};
use berth_sys::xattr;

use archive::{Archive, ArchiveError, Entry, EntryKind, Piece};
use parents::{ParentError, Parents, Place};

pub use path::PathError;
pub use pax::PaxError;
pub use sparse::SparseError;
pub use whiteout::WhiteoutError;

/// Most inodes that one layer may make. Far above any image; below what wears an ext4 of 200 GB
/// out.
pub(crate) const MAX_INODES: u64 = 10_000_000;

/// Most bytes of path that are kept for directories without an entry and for links to lower layers
/// together. What a real layer has fits a thousand times.
const MAX_OPEN_QUESTIONS: usize = 64 << 20;

/// Longest target of a symbolic link: `PATH_MAX` with its NUL.
const MAX_LINK_TARGET: usize = 4095;

/// Content is moved in pieces of this size.
const COPY_BUFFER: usize = 128 * 1024;

/// So many inodes may be made until it is asked whether there is room for more.
const ROOM_INTERVAL: u64 = 1000;

/// The unit in which sizes on disk are counted: the block size of all common filesystems.
const DISK_BLOCK: u64 = 4096;

/// The attribute that makes a directory hide what lower layers have in it.
pub(crate) const OPAQUE_XATTR: &std::ffi::CStr = c"trusted.overlay.opaque";

/// Mode of a directory that no entry describes.
pub(crate) const IMPLICIT_MODE: u32 = 0o755;

/// What a layer's tree needs besides itself, and what it takes.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Bytes on disk: file sizes in whole blocks, and a block for each directory.
    pub bytes: u64,
    /// Inodes made.
    pub inodes: u64,
    /// Directories that had to be made for a path but had no entry, from the root of the layer and
    /// without links, sorted; the root itself is the empty path. They have mode 0755, owner 0:0 and
    /// time 0 until a lower layer says otherwise.
    pub implicit_dirs: Vec<PathBuf>,
    /// Hard links whose target is not in this layer.
    pub lower_links: Vec<LowerLink>,
    /// The layer hides everything below it.
    pub opaque_root: bool,
}

/// A hard link to a file of a lower layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LowerLink {
    /// The new name. Its directory exists in the layer, unless a link leads there.
    pub name: PathBuf,
    /// The file, a path in the image.
    pub target: PathBuf,
    /// The layer has something else at `target` by now: only the new name is to be made.
    pub target_replaced: bool,
}

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The archive itself is bad, or the stream below it failed.
    #[error("entry {number} of the archive is invalid")]
    Archive {
        /// Counted from 1.
        number: u64,
        /// What is wrong.
        #[source]
        source: ArchiveError,
    },
    /// The path of an entry, or the target of a hard link.
    #[error("entry '{path}' is invalid")]
    Path {
        /// As written, escaped.
        path: String,
        /// What is wrong.
        #[source]
        source: PathError,
    },
    /// A whiteout.
    #[error("entry '{path}' is invalid")]
    Whiteout {
        /// As written, escaped.
        path: String,
        /// What is wrong.
        #[source]
        source: WhiteoutError,
    },
    /// The entry is well-formed but asks for something that an image must not have.
    #[error("entry '{path}': {reason}")]
    Refused {
        /// As written, escaped.
        path: String,
        /// Why it is refused.
        reason: Refusal,
    },
    /// More than ten million inodes.
    #[error("layer has more than {MAX_INODES} files")]
    TooManyInodes,
    /// Paths without entries, or links to lower layers, beyond 64 MiB.
    #[error("layer has too many directories without an entry or links to lower layers")]
    TooManyOpenQuestions,
    /// Paths through links that take more than two million steps.
    #[error("paths of the layer lead through too many links and directories")]
    TooManySteps,
    /// A file operation failed.
    #[error("cannot {operation} '{path}'")]
    File {
        /// The failed act.
        operation: &'static str,
        /// Entry, escaped.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Why an entry was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The root must be a directory.
    #[error("the root is not a directory")]
    RootNotDirectory,
    /// A device 0:0 is how overlayfs writes a whiteout.
    #[error("character device 0:0 would be read as a whiteout")]
    ForgedWhiteout,
    /// Numbers beyond 12 and 20 bits would be cut.
    #[error("device number is out of range")]
    DeviceNumber,
    /// A hard link to a directory.
    #[error("hard link to a directory")]
    LinkToDirectory,
    /// A hard link to something that this layer hides.
    #[error("hard link to a whiteout")]
    LinkToWhiteout,
    /// A symbolic link with no target, or one above 4095 bytes, or with a NUL.
    #[error("invalid target of a symbolic link")]
    LinkTarget,
    /// Whiteouts are empty files; AUFS made them hard links to each other.
    #[error("a whiteout is not a regular file")]
    WhiteoutType,
    /// A path leads through something that is no directory.
    #[error("a parent is not a directory")]
    FileInTheWay,
}

/// Unpacks a layer into the empty directory `root`.
///
/// # Errors
/// [`UnpackError`]; errors of `input` are inside as the source of [`ArchiveError::Read`].
pub fn unpack<R: Read>(input: R, root: &Root) -> Result<Summary, UnpackError> {
    unpack_while(input, root, &|| Ok(()))
}

/// The same; `has_room` is asked before anything is made and after every thousand inodes, and its
/// error ends the unpacking.
///
/// # Errors
/// As [`unpack`].
pub(crate) fn unpack_while<R: Read>(
    input: R,
    root: &Root,
    has_room: &dyn Fn() -> io::Result<()>,
) -> Result<Summary, UnpackError> {
    let mut archive = Archive::new(input);
    let mut tree = Tree::new(root, has_room)?;
    let mut number = 0;
    loop {
        number += 1;
        let at = |source| UnpackError::Archive { number, source };
        let Some(entry) = archive.next_entry().map_err(at)? else { break };
        tree.apply(&entry, |buffer| archive.read_content(buffer).map_err(at))?;
    }
    tree.finish()
}

/// Untrusted bytes as one line of printable text.
pub(crate) fn printable(bytes: &[u8]) -> String {
    const LONGEST: usize = 512;
    let start: String = String::from_utf8_lossy(bytes).chars().take(LONGEST).collect();
    let mut text = berth_model::text::printable(&start).into_owned();
    if bytes.len() > LONGEST {
        text.push('…');
    }
    text
}

/// A character device 0:0: what a whiteout is on disk.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    stat.file_type == FileType::CharDevice && stat.device == (0, 0)
}

fn is(error: &io::Error, kind: io::ErrorKind) -> bool {
    error.kind() == kind
}

/// The directory that the last entries went into.
///
/// A directory's time is part of the image, and each entry made inside changes it; so it is noted
/// when the directory is opened and put back when the unpacking moves on. This needs no list of all
/// directories.
#[derive(Debug)]
struct OpenDir {
    path: PathBuf,
    place: Place,
    modified: Timestamp,
}

struct Tree<'a> {
    root: &'a Root,
    parents: Parents<'a>,
    has_room: &'a dyn Fn() -> io::Result<()>,
    /// The number of inodes at which that is asked next.
    ask_at: u64,
    root_identity: (u64, u64),
    /// Dropped whenever a directory or link is removed, so that it never means a directory that its
    /// path does not mean any more.
    open: Option<OpenDir>,
    /// By device and inode, so that an entry finds its directory whatever links its path went
    /// through.
    implicit: HashMap<(u64, u64), PathBuf>,
    lower_links: HashMap<PathBuf, PathBuf>,
    open_question_bytes: usize,
    summary: Summary,
    buffer: Vec<u8>,
}

impl<'a> Tree<'a> {
    fn new(root: &'a Root, has_room: &'a dyn Fn() -> io::Result<()>) -> Result<Self, UnpackError> {
        let top = root.open_dir(Path::new("")).map_err(file_error("open", b"/"))?;
        let describe = || -> io::Result<(u64, u64)> {
            plain_directory(top.as_fd())?;
            Ok(beneath::stat_fd(top.as_fd())?.identity)
        };
        let root_identity = describe().map_err(file_error("set attributes of", b"/"))?;
        Ok(Self {
            root,
            parents: Parents::new(root),
            has_room,
            ask_at: 0,
            root_identity,
            open: None,
            implicit: HashMap::from([(root_identity, PathBuf::new())]),
            lower_links: HashMap::new(),
            open_question_bytes: 0,
            summary: Summary { bytes: DISK_BLOCK, inodes: 1, ..Summary::default() },
            buffer: vec![0; COPY_BUFFER],
        })
    }

    fn apply(
        &mut self,
        entry: &Entry,
        mut content: impl FnMut(&mut [u8]) -> Result<Piece, UnpackError>,
    ) -> Result<(), UnpackError> {
        let shown = || printable(&entry.path);
        let clean = path::clean(&entry.path).map_err(|source| UnpackError::Path { path: shown(), source })?;
        let Some((parent, name)) = path::split(&clean) else {
            return self.apply_root(entry);
        };
        let whiteout_error = |source| UnpackError::Whiteout { path: shown(), source };
        for component in parent.as_os_str().as_bytes().split(|&b| b == b'/') {
            if whiteout::is_aufs(component) {
                return Ok(());
            }
            whiteout::check_directory(component).map_err(whiteout_error)?;
        }
        let meaning = whiteout::classify(name.as_bytes()).map_err(whiteout_error)?;
        if meaning == whiteout::Name::Aufs {
            return Ok(());
        }
        if self.summary.inodes >= MAX_INODES {
            return Err(UnpackError::TooManyInodes);
        }
        if self.summary.inodes >= self.ask_at {
            (self.has_room)().map_err(file_error("make room for", &entry.path))?;
            self.ask_at = self.summary.inodes + ROOM_INTERVAL;
        }
        let open = self.enter(parent, &entry.path)?;
        let result = match meaning {
            whiteout::Name::Plain => self.make(&open, name, &clean, entry, &mut content),
            _ if !matches!(entry.kind, EntryKind::Regular | EntryKind::HardLink) => {
                Err(refused(entry, Refusal::WhiteoutType))
            }
            whiteout::Name::Whiteout(target) => self.hide(&open, OsStr::from_bytes(target), entry),
            whiteout::Name::Opaque | whiteout::Name::Aufs => self.make_opaque(&open, entry),
        };
        match result? {
            Keep::Yes => self.open = Some(open),
            Keep::No => {
                self.parents.forget();
                Self::leave(&open, &entry.path)?;
            }
        }
        Ok(())
    }

    /// An entry for the root of the layer itself.
    fn apply_root(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        if entry.kind != EntryKind::Directory {
            return Err(refused(entry, Refusal::RootNotDirectory));
        }
        if let Some(open) = self.open.take() {
            Self::leave(&open, &entry.path)?;
        }
        let dir = self.root.open_dir(Path::new("")).map_err(file_error("open", &entry.path))?;
        self.implicit.remove(&self.root_identity);
        describe(dir.as_fd(), entry)
    }

    /// Opens the directory that an entry goes into and makes what is missing of it.
    fn enter(&mut self, parent: &Path, entry_path: &[u8]) -> Result<OpenDir, UnpackError> {
        let before = match self.open.take() {
            Some(open) if open.path == parent => return Ok(open),
            before => before,
        };
        if let Some(open) = &before {
            Self::leave(open, entry_path)?;
        }
        let near = before.map(|open| (open.path, open.place));
        let mut made: Vec<((u64, u64), Option<PathBuf>)> = Vec::new();
        let mut too_many = false;
        let mut inodes = self.summary.inodes;
        let (has_room, mut ask_at) = (self.has_room, self.ask_at);
        let opened = self.parents.make(near, parent, |missing| {
            inodes += 1;
            too_many = inodes > MAX_INODES;
            if too_many {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            if inodes >= ask_at {
                has_room()?;
                ask_at = inodes + ROOM_INTERVAL;
            }
            made.push(make_implicit(&missing)?);
            Ok(())
        });
        self.summary.inodes = inodes.min(MAX_INODES);
        self.ask_at = ask_at;
        if too_many {
            return Err(UnpackError::TooManyInodes);
        }
        for (identity, path) in made {
            self.summary.bytes += DISK_BLOCK;
            if let Some(path) = path {
                self.note(path.as_os_str().len())?;
                self.implicit.insert(identity, path);
            }
        }
        let failed = |operation| file_error(operation, entry_path);
        let place = opened.map_err(|error| match error {
            ParentError::TooManySteps => UnpackError::TooManySteps,
            ParentError::File(error) if is(&error, io::ErrorKind::NotADirectory) => {
                UnpackError::Refused { path: printable(entry_path), reason: Refusal::FileInTheWay }
            }
            ParentError::File(error) => failed("open the directory of")(error),
        })?;
        let stat = beneath::stat_fd(place.dir.as_fd()).map_err(failed("examine the directory of"))?;
        Ok(OpenDir { path: parent.to_owned(), place, modified: stat.modified })
    }

    fn leave(open: &OpenDir, entry_path: &[u8]) -> Result<(), UnpackError> {
        beneath::set_times(open.place.dir.as_fd(), open.modified)
            .map_err(file_error("set the time of the directory before", entry_path))
    }

    /// Counts bytes that are kept until the end.
    fn note(&mut self, bytes: usize) -> Result<(), UnpackError> {
        // The overhead of one map entry, so that many short paths count too.
        const OVERHEAD: usize = 64;
        self.open_question_bytes += bytes + OVERHEAD;
        if self.open_question_bytes > MAX_OPEN_QUESTIONS {
            return Err(UnpackError::TooManyOpenQuestions);
        }
        Ok(())
    }

    fn make(
        &mut self,
        open: &OpenDir,
        name: &OsStr,
        path: &Path,
        entry: &Entry,
        content: &mut impl FnMut(&mut [u8]) -> Result<Piece, UnpackError>,
    ) -> Result<Keep, UnpackError> {
        let dir = &open.place.dir;
        match entry.kind {
            EntryKind::Regular => {
                let (mut file, keep) = replacing(dir, name, || dir.create_file(name, 0o600))
                    .map_err(file_error("create", &entry.path))?;
                let failed = file_error("write", &entry.path);
                let mut written = 0;
                loop {
                    match content(&mut self.buffer)? {
                        Piece::Data(length) => {
                            let piece = self.buffer.get(..length).unwrap_or_default();
                            file.write_all(piece).map_err(&failed)?;
                            written += length as u64;
                        }
                        // Holes stay holes: `lastlog` of a user with a high number is 300 GB of
                        // them.
                        Piece::Hole(length) => {
                            let length = i64::try_from(length)
                                .map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
                            file.seek(SeekFrom::Current(length)).map_err(&failed)?;
                        }
                        Piece::End => break,
                    }
                }
                if entry.is_sparse {
                    file.set_len(entry.size).map_err(&failed)?;
                }
                describe(file.as_fd(), entry)?;
                self.count(written.div_ceil(DISK_BLOCK) * DISK_BLOCK);
                Ok(keep)
            }
            EntryKind::Directory => self.make_directory(dir, name, entry),
            EntryKind::HardLink => self.make_hard_link(dir, name, path, entry),
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > MAX_LINK_TARGET || entry.link.contains(&0) {
                    return Err(refused(entry, Refusal::LinkTarget));
                }
                let target = OsStr::from_bytes(&entry.link);
                let make = || -> io::Result<Keep> {
                    let ((), keep) = replacing(dir, name, || dir.make_symlink(target, name))?;
                    dir.chown(name, entry.uid, entry.gid)?;
                    dir.set_times(name, entry.mtime)?;
                    Ok(keep)
                };
                let keep = make().map_err(file_error("create the link", &entry.path))?;
                self.count(0);
                Ok(keep)
            }
            EntryKind::CharDevice | EntryKind::BlockDevice | EntryKind::Fifo => {
                let node = node_of(entry)?;
                let make = || -> io::Result<Keep> {
                    let ((), keep) = replacing(dir, name, || dir.make_node(name, node, 0o600))?;
                    dir.chown(name, entry.uid, entry.gid)?;
                    dir.chmod(name, entry.mode)?;
                    dir.set_times(name, entry.mtime)?;
                    Ok(keep)
                };
                let keep = make().map_err(file_error("create the node", &entry.path))?;
                self.count(0);
                Ok(keep)
            }
        }
    }

    fn make_directory(&mut self, dir: &Dir, name: &OsStr, entry: &Entry) -> Result<Keep, UnpackError> {
        let failed = |operation| file_error(operation, &entry.path);
        let mut keep = Keep::Yes;
        let mut over_whiteout = false;
        let new = match dir.make_dir(name, 0o700) {
            Ok(()) => true,
            Err(error) if is(&error, io::ErrorKind::AlreadyExists) => {
                let there = dir.stat(name).map_err(failed("examine"))?;
                if there.file_type == FileType::Directory {
                    false
                } else {
                    over_whiteout = is_whiteout(&there);
                    dir.unlink(name).map_err(failed("replace"))?;
                    dir.make_dir(name, 0o700).map_err(failed("create the directory"))?;
                    keep = Keep::without(&there);
                    true
                }
            }
            Err(error) => return Err(failed("create the directory")(error)),
        };
        let made = dir.open_dir(name).map_err(failed("open the directory"))?;
        if over_whiteout {
            // The whiteout hid a lower directory of that name; the new one must go on doing so.
            xattr::set(made.as_fd(), OPAQUE_XATTR, b"y").map_err(failed("make opaque"))?;
        }
        let identity = beneath::stat_fd(made.as_fd()).map_err(failed("examine"))?.identity;
        self.implicit.remove(&identity);
        describe(made.as_fd(), entry)?;
        if new {
            self.count(DISK_BLOCK);
        }
        Ok(keep)
    }

    fn make_hard_link(
        &mut self,
        dir: &Dir,
        name: &OsStr,
        path: &Path,
        entry: &Entry,
    ) -> Result<Keep, UnpackError> {
        let failed = |operation| file_error(operation, &entry.path);
        let target = path::clean(&entry.link)
            .map_err(|source| UnpackError::Path { path: printable(&entry.link), source })?;
        let Some((target_parent, target_name)) = path::split(&target) else {
            return Err(refused(entry, Refusal::LinkToDirectory));
        };
        let absent =
            |error: &io::Error| is(error, io::ErrorKind::NotFound) || is(error, io::ErrorKind::NotADirectory);
        let found = match self.parents.find(target_parent) {
            Ok(Place { dir: from, .. }) => match from.stat(target_name) {
                Ok(stat) => Some((from, stat)),
                Err(error) if absent(&error) => None,
                Err(error) => return Err(failed("examine the target of")(error)),
            },
            Err(ParentError::TooManySteps) => return Err(UnpackError::TooManySteps),
            Err(ParentError::File(error)) if absent(&error) => None,
            Err(ParentError::File(error)) => return Err(failed("open the target's directory of")(error)),
        };
        let Some((from, stat)) = found else {
            // A link to a link that waits for the lower layer waits for the same file.
            let target = self.lower_links.get(&target).cloned().unwrap_or(target);
            if target == path {
                return Ok(Keep::Yes);
            }
            self.note(path.as_os_str().len() + target.as_os_str().len())?;
            let keep = match dir.stat(name) {
                Ok(there) => {
                    dir.remove_all(name).map_err(failed("replace"))?;
                    Keep::without(&there)
                }
                Err(_) => Keep::Yes,
            };
            self.lower_links.insert(path.to_owned(), target);
            return Ok(keep);
        };
        if stat.file_type == FileType::Directory {
            return Err(refused(entry, Refusal::LinkToDirectory));
        }
        if is_whiteout(&stat) {
            return Err(refused(entry, Refusal::LinkToWhiteout));
        }
        if dir.stat(name).is_ok_and(|there| there.identity == stat.identity) {
            return Ok(Keep::Yes);
        }
        let ((), keep) = replacing(dir, name, || dir.make_hard_link(name, &from, target_name))
            .map_err(failed("create the hard link"))?;
        Ok(keep)
    }

    /// Hides `target` of the lower layers, unless this layer has something there that hides it
    /// anyway.
    fn hide(&mut self, open: &OpenDir, target: &OsStr, entry: &Entry) -> Result<Keep, UnpackError> {
        let failed = |operation| file_error(operation, &entry.path);
        match open.place.dir.stat(target) {
            Ok(there) if there.file_type == FileType::Directory => {
                let dir = open.place.dir.open_dir(target).map_err(failed("open the directory"))?;
                xattr::set(dir.as_fd(), OPAQUE_XATTR, b"y").map_err(failed("make opaque"))?;
                self.implicit.remove(&there.identity);
            }
            Ok(_) => {}
            Err(error) if is(&error, io::ErrorKind::NotFound) => {
                open.place
                    .dir
                    .make_node(target, Node::CharDevice(0, 0), 0o600)
                    .map_err(failed("create the whiteout"))?;
                self.count(0);
            }
            Err(error) => return Err(failed("examine")(error)),
        }
        Ok(Keep::Yes)
    }

    fn make_opaque(&mut self, open: &OpenDir, entry: &Entry) -> Result<Keep, UnpackError> {
        let failed = |operation| file_error(operation, &entry.path);
        let identity = beneath::stat_fd(open.place.dir.as_fd()).map_err(failed("examine"))?.identity;
        if identity == self.root_identity {
            // Overlayfs does not read the attribute on the root of a layer: the mount leaves the
            // lower layers out.
            self.summary.opaque_root = true;
        } else {
            xattr::set(open.place.dir.as_fd(), OPAQUE_XATTR, b"y").map_err(failed("make opaque"))?;
        }
        Ok(Keep::Yes)
    }

    fn count(&mut self, bytes: u64) {
        self.summary.inodes += 1;
        self.summary.bytes += bytes;
    }

    fn finish(mut self) -> Result<Summary, UnpackError> {
        if let Some(open) = self.open.take() {
            Self::leave(&open, b"")?;
        }
        // Replaced directories took implicit ones with them, and their inode numbers may be another
        // file's by now.
        let root = self.root;
        let mut implicit: Vec<PathBuf> = self
            .implicit
            .into_iter()
            .filter(|(identity, path)| {
                root.open_dir_no_links(path)
                    .and_then(|dir| beneath::stat_fd(dir.as_fd()))
                    .is_ok_and(|stat| stat.identity == *identity)
            })
            .map(|(_, path)| path)
            .collect();
        implicit.sort();
        let mut links: Vec<(PathBuf, PathBuf)> = self.lower_links.into_iter().collect();
        links.sort();
        for (name, target) in links {
            if !exists(&mut self.parents, &name)? {
                let target_replaced = exists(&mut self.parents, &target)?;
                self.summary.lower_links.push(LowerLink { name, target, target_replaced });
            }
        }
        self.summary.implicit_dirs = implicit;
        Ok(self.summary)
    }
}

/// Whether there is anything at a path.
fn exists(parents: &mut Parents<'_>, path: &Path) -> Result<bool, UnpackError> {
    let Some((parent, name)) = path::split(path) else { return Ok(true) };
    match parents.find(parent) {
        Ok(place) => Ok(place.dir.stat(name).is_ok()),
        Err(ParentError::TooManySteps) => Err(UnpackError::TooManySteps),
        Err(ParentError::File(_)) => Ok(false),
    }
}

/// Whether paths still lead where they led before an entry was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    Yes,
    No,
}

impl Keep {
    /// After this was removed.
    fn without(removed: &Stat) -> Self {
        match removed.file_type {
            FileType::Directory | FileType::Symlink => Self::No,
            _ => Self::Yes,
        }
    }
}

/// Makes an entry; if the name is taken, removes what has it first.
fn replacing<T>(dir: &Dir, name: &OsStr, mut make: impl FnMut() -> io::Result<T>) -> io::Result<(T, Keep)> {
    match make() {
        Err(error) if is(&error, io::ErrorKind::AlreadyExists) => {
            let keep = Keep::without(&dir.stat(name)?);
            dir.remove_all(name)?;
            make().map(|made| (made, keep))
        }
        made => made.map(|made| (made, Keep::Yes)),
    }
}

/// Makes a directory that no entry has described yet. Returns its identity, and its path if a lower
/// layer may know it better.
fn make_implicit(missing: &MissingDir<'_>) -> io::Result<((u64, u64), Option<PathBuf>)> {
    let before = beneath::stat_fd(missing.parent.as_fd())?.modified;
    let over_whiteout = match missing.obstacle {
        None => false,
        Some(stat) if is_whiteout(&stat) => {
            missing.parent.unlink(missing.name)?;
            true
        }
        Some(_) => return Err(io::ErrorKind::NotADirectory.into()),
    };
    missing.parent.make_dir(missing.name, 0o700)?;
    let made = missing.parent.open_dir(missing.name)?;
    plain_directory(made.as_fd())?;
    if over_whiteout {
        xattr::set(made.as_fd(), OPAQUE_XATTR, b"y")?;
    }
    beneath::set_times(missing.parent.as_fd(), before)?;
    let identity = beneath::stat_fd(made.as_fd())?.identity;
    Ok((identity, (!over_whiteout).then(|| missing.path.to_owned())))
}

/// Gives a directory the attributes of one without an entry: a fixed time, so that the same layer
/// is the same everywhere.
pub(crate) fn plain_directory(fd: BorrowedFd<'_>) -> io::Result<()> {
    beneath::chown(fd, 0, 0)?;
    beneath::chmod(fd, IMPLICIT_MODE)?;
    beneath::set_times(fd, Timestamp::default())
}

/// Gives an open file or directory what its entry says. Owner before mode before capabilities: each
/// clears the next (chown(2)).
fn describe(fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), UnpackError> {
    let failed = |operation| file_error(operation, &entry.path);
    beneath::chown(fd, entry.uid, entry.gid).map_err(failed("set the owner of"))?;
    beneath::chmod(fd, entry.mode).map_err(failed("set the mode of"))?;
    for (name, value) in &entry.xattrs {
        if !is_wanted_xattr(name) {
            continue;
        }
        let Ok(name) = CString::new(name.as_slice()) else { continue };
        match xattr::set(fd, &name, value) {
            // A filesystem without user attributes is no reason to refuse an image; losing a
            // capability is.
            Err(error) if is(&error, io::ErrorKind::Unsupported) && name.to_bytes().starts_with(b"user.") => {
            }
            set => set.map_err(failed("set an extended attribute of"))?,
        }
    }
    beneath::set_times(fd, entry.mtime).map_err(failed("set the time of"))
}

/// `user.*` and file capabilities. Not `trusted.*` (overlayfs, and only the host's root may trust
/// it), not `security.selinux`, `security.ima` and the like (the host's policy), not
/// `user.overlay.*` (overlayfs mounted with `userxattr`).
pub(crate) fn is_wanted_xattr(name: &[u8]) -> bool {
    name == b"security.capability"
        || (name.starts_with(b"user.") && name.len() > 5 && !name.starts_with(b"user.overlay."))
}

fn node_of(entry: &Entry) -> Result<Node, UnpackError> {
    if entry.kind == EntryKind::Fifo {
        return Ok(Node::Fifo);
    }
    let number = |wide: u64, bits: u32| {
        u32::try_from(wide)
            .ok()
            .filter(|n| n >> bits == 0)
            .ok_or_else(|| refused(entry, Refusal::DeviceNumber))
    };
    let (major, minor) = (number(entry.device.0, 12)?, number(entry.device.1, 20)?);
    match entry.kind {
        EntryKind::BlockDevice => Ok(Node::BlockDevice(major, minor)),
        _ if (major, minor) == (0, 0) => Err(refused(entry, Refusal::ForgedWhiteout)),
        _ => Ok(Node::CharDevice(major, minor)),
    }
}

fn refused(entry: &Entry, reason: Refusal) -> UnpackError {
    UnpackError::Refused { path: printable(&entry.path), reason }
}

fn file_error(operation: &'static str, path: &[u8]) -> impl Fn(io::Error) -> UnpackError {
    move |source| UnpackError::File { operation, path: printable(path), source }
}
