//! Patch layers: what could not be resolved when a layer was unpacked without the layers below it.
//!
//! Layers are unpacked separately and shared by diff id. When an image is put together, some need a
//! small layer of corrections, stacked directly above them and kept under the chain id of
//! everything up to there:
//!
//! - a directory without its own entry must show the lower layer's owner, mode, time and
//!   attributes, not the default ones;
//! - a hard link to a file of a lower layer becomes two names of one copy of that file;
//! - a directory without its own entry, where the lower layers have a symbolic link (`lib/x` over
//!   `lib -> usr/lib`): the link stays, and what the layer has below moves to where the link leads.
//!
//! A patch contains only these and the directories that lead to them. Names of a lower file other
//! than the target of a link keep the old inode: the copy has the new names only.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use berth_sys::beneath::{self, Dir, FileType, Node, Root, Stat, Timestamp};
use berth_sys::{file, xattr};

use crate::merged::{Effort, Found, Merged};
use crate::unpack::{self, IMPLICIT_MODE, OPAQUE_XATTR, Summary, printable};

/// Most names that are read from one directory while a layer's content is moved to where a link
/// leads.
const MAX_NAMES: usize = 1_000_000;

/// Why a patch could not be created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatchError {
    /// A hard link of the layer points at nothing.
    #[error("hard link '{name}' points to '{target}', which no lower layer contains")]
    MissingTarget {
        /// The link, escaped.
        name: String,
        /// Its target, escaped.
        target: String,
    },
    /// A hard link of the layer points at a directory of a lower one.
    #[error("hard link '{name}' points to the directory '{target}'")]
    LinkToDirectory {
        /// The link, escaped.
        name: String,
        /// Its target, escaped.
        target: String,
    },
    /// A link of a lower layer leads into the directory that it would replace.
    #[error("directory '{path}' hides a link of a lower layer that cannot be resolved")]
    LinkLoop {
        /// The directory, escaped.
        path: String,
    },
    /// A file operation failed.
    #[error("cannot patch '{path}'")]
    File {
        /// Path in the image, escaped.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What a directory of the patch looks like in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    modified: Timestamp,
    xattrs: Vec<(CString, Vec<u8>)>,
    opaque: bool,
}

impl Attributes {
    fn plain() -> Self {
        Self {
            mode: IMPLICIT_MODE,
            uid: 0,
            gid: 0,
            modified: Timestamp::default(),
            xattrs: Vec::new(),
            opaque: false,
        }
    }

    /// Of a directory; whether it is opaque is left out.
    fn of(layer: &Root, path: &Path) -> io::Result<Self> {
        let dir = layer.open_dir_no_links(path)?;
        let stat = beneath::stat_fd(dir.as_fd())?;
        Ok(Self {
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            modified: stat.modified,
            xattrs: image_xattrs(dir.as_fd())?,
            opaque: false,
        })
    }

    fn apply(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        beneath::chown(fd, self.uid, self.gid)?;
        beneath::chmod(fd, self.mode)?;
        for (name, value) in &self.xattrs {
            xattr::set(fd, name, value)?;
        }
        if self.opaque {
            xattr::set(fd, OPAQUE_XATTR, b"y")?;
        }
        beneath::set_times(fd, self.modified)
    }
}

/// Where a name of the patch comes from.
#[derive(Debug)]
enum Origin<'a> {
    /// A copy of a lower file, which is not touched.
    Copy { layer: &'a Root, path: PathBuf, stat: Stat },
    /// Another name for what the patch has at this path.
    SameAs(PathBuf),
    /// Another name for a file of the layer itself.
    LinkTo { layer: &'a Root, path: PathBuf },
    /// A whiteout.
    Whiteout,
}

/// A planned patch.
#[derive(Debug, Default)]
pub(crate) struct Plan<'a> {
    dirs: BTreeMap<PathBuf, Attributes>,
    files: Vec<(PathBuf, Origin<'a>)>,
}

/// Bytes and inodes of a patch, counted as those of layers are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// Plans the patch above `layer`, which left `summary` open; `below` are the layers under it, top
/// first, patches included; `effort` is that of the image. `None` if nothing is to be corrected.
pub(crate) fn plan<'a>(
    layer: &'a Root,
    summary: &Summary,
    below: &[&'a Root],
    effort: &'a Effort,
) -> Result<Option<Plan<'a>>, PatchError> {
    // An opaque root hides what is below, but its own attributes still come from there.
    let seen = if summary.opaque_root { &[] } else { below };
    let mut planner = Planner {
        layer,
        summary,
        full: Merged::new(std::iter::once(layer).chain(seen.iter().copied()).collect(), effort),
        below: Merged::new(seen.to_vec(), effort),
        plan: Plan::default(),
    };
    for path in &summary.implicit_dirs {
        let failed = file_error(path);
        if path.as_os_str().is_empty() {
            if let Some(root) = below.first() {
                planner.correct_root(root).map_err(failed)?;
            }
            continue;
        }
        match planner.hidden_by(path).map_err(&failed)? {
            Some(found) if found.stat.file_type == FileType::Directory => {
                planner.correct(path, found).map_err(failed)?;
            }
            Some(found) if found.stat.file_type == FileType::Symlink => planner.move_content(path, found)?,
            _ => {}
        }
    }
    planner.link_to_lower()?;
    let mut plan = planner.plan;
    if plan.dirs.is_empty() && plan.files.is_empty() {
        return Ok(None);
    }
    // The root of the patch is seen too.
    if !plan.dirs.contains_key(Path::new("")) {
        let root = Attributes::of(layer, Path::new("")).map_err(file_error(Path::new("")))?;
        plan.dirs.insert(PathBuf::new(), root);
    }
    Ok(Some(plan))
}

struct Planner<'a, 's> {
    layer: &'a Root,
    summary: &'s Summary,
    /// The layer over everything below it.
    full: Merged<'a>,
    /// Everything below it.
    below: Merged<'a>,
    plan: Plan<'a>,
}

impl<'a> Planner<'a, '_> {
    /// What the lower layers would show at `path` if the layer had nothing there.
    fn hidden_by(&self, path: &Path) -> io::Result<Option<Found>> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
        let mut visible = self.full.directories(parent)?;
        visible.retain(|&index| index != 0);
        Ok(self.full.look(parent, name, &visible)?.0)
    }

    /// The time of the root is meaningless: no image tool records it.
    fn correct_root(&mut self, below: &Root) -> io::Result<()> {
        let wanted = Attributes::of(below, Path::new(""))?;
        if wanted != (Attributes { modified: wanted.modified, ..Attributes::plain() }) {
            self.plan.dirs.insert(PathBuf::new(), wanted);
        }
        Ok(())
    }

    fn correct(&mut self, path: &Path, found: Found) -> io::Result<()> {
        let Some(layer) = self.full.layer(found.layer) else { return Ok(()) };
        let wanted = Attributes::of(layer, path)?;
        if wanted != Attributes::plain() {
            self.lead_to(path)?;
            self.plan.dirs.insert(path.to_owned(), wanted);
        }
        Ok(())
    }

    /// Plans the directories that `path` lies in, with the attributes that they show anyway.
    fn lead_to(&mut self, path: &Path) -> io::Result<()> {
        for dir in path.ancestors().skip(1) {
            if self.plan.dirs.contains_key(dir) {
                continue;
            }
            let attributes = match self.full.entry(dir)? {
                Some(found) if found.stat.file_type == FileType::Directory => {
                    match self.full.layer(found.layer) {
                        Some(layer) => Attributes::of(layer, dir)?,
                        None => Attributes::plain(),
                    }
                }
                _ => Attributes::plain(),
            };
            self.plan.dirs.insert(dir.to_owned(), attributes);
        }
        Ok(())
    }

    /// `path` is an implicit directory of the layer, over a link: brings the link back, and the
    /// content to where it leads.
    fn move_content(&mut self, path: &Path, link: Found) -> Result<(), PatchError> {
        let failed = file_error(path);
        let looped = || PatchError::LinkLoop { path: shown(path) };
        let target = self.below.real_path(path, true).map_err(&failed)?.ok_or_else(looped)?;
        if target.starts_with(path) {
            return Err(looped());
        }
        let Some(layer) = self.full.layer(link.layer) else { return Ok(()) };
        self.lead_to(path).map_err(&failed)?;
        self.plan
            .files
            .push((path.to_owned(), Origin::Copy { layer, path: path.to_owned(), stat: link.stat }));
        let mut ahead = vec![(path.to_owned(), target)];
        while let Some((from, to)) = ahead.pop() {
            self.lead_to(&to.join("entry")).map_err(&failed)?;
            let dir = self.layer.open_dir_no_links(&from).map_err(&failed)?;
            for name in dir.names(MAX_NAMES).map_err(&failed)? {
                let stat = dir.stat(&name).map_err(&failed)?;
                let (from, to) = (from.join(&name), to.join(&name));
                if unpack::is_whiteout(&stat) {
                    self.plan.files.push((to, Origin::Whiteout));
                } else if stat.file_type == FileType::Directory {
                    let to = self.directory_target(&from, to).map_err(&failed)?.ok_or_else(looped)?;
                    ahead.push((from, to));
                } else {
                    self.plan.files.push((to, Origin::LinkTo { layer: self.layer, path: from }));
                }
            }
        }
        Ok(())
    }

    /// Where the content of a moved directory goes, and what that directory looks like.
    fn directory_target(&mut self, from: &Path, to: PathBuf) -> io::Result<Option<PathBuf>> {
        let implicit = self.summary.implicit_dirs.binary_search_by(|dir| dir.as_path().cmp(from)).is_ok();
        if implicit {
            return self.below.real_path(&to, true);
        }
        let mut attributes = Attributes::of(self.layer, from)?;
        let dir = self.layer.open_dir_no_links(from)?;
        attributes.opaque = xattr::get(dir.as_fd(), OPAQUE_XATTR)?.is_some();
        self.plan.dirs.insert(to.clone(), attributes);
        Ok(Some(to))
    }

    fn link_to_lower(&mut self) -> Result<(), PatchError> {
        let mut copies: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
        for link in &self.summary.lower_links {
            let failed = file_error(&link.name);
            let missing =
                || PatchError::MissingTarget { name: shown(&link.name), target: shown(&link.target) };
            let view = if link.target_replaced { &self.below } else { &self.full };
            let target = view.real_path(&link.target, false).map_err(&failed)?.ok_or_else(missing)?;
            let found = view.entry(&target).map_err(&failed)?.ok_or_else(missing)?;
            if found.stat.file_type == FileType::Directory {
                return Err(PatchError::LinkToDirectory {
                    name: shown(&link.name),
                    target: shown(&link.target),
                });
            }
            let layer = view.layer(found.layer).ok_or_else(missing)?;
            let name = self.full.real_path(&link.name, false).map_err(&failed)?.ok_or_else(missing)?;
            self.lead_to(&name).map_err(&failed)?;
            let copy = Origin::Copy { layer, path: target.clone(), stat: found.stat };
            let origin = match copies.get(&target) {
                Some(first) => Origin::SameAs(first.clone()),
                None if link.target_replaced => {
                    copies.insert(target, name.clone());
                    copy
                }
                None => {
                    self.lead_to(&target).map_err(&failed)?;
                    self.plan.files.push((target.clone(), copy));
                    copies.insert(target.clone(), target.clone());
                    Origin::SameAs(target)
                }
            };
            self.plan.files.push((name, origin));
        }
        Ok(())
    }
}

impl Plan<'_> {
    /// Makes the patch in the empty directory `root`.
    pub(crate) fn make(&self, root: &Root) -> Result<Size, PatchError> {
        let mut size = Size::default();
        for path in self.dirs.keys() {
            root.make_dir_all(path, 0o700).map_err(file_error(path))?;
            size.inodes += 1;
            size.bytes += 4096;
        }
        for (path, origin) in &self.files {
            make_file(root, path, origin, &mut size).map_err(file_error(path))?;
        }
        // Deepest first: what is made inside a directory changes its time.
        for (path, attributes) in self.dirs.iter().rev() {
            let set = || attributes.apply(root.open_dir_no_links(path)?.as_fd());
            set().map_err(file_error(path))?;
        }
        Ok(size)
    }
}

fn make_file(root: &Root, path: &Path, origin: &Origin<'_>, size: &mut Size) -> io::Result<()> {
    let (dir, name) = parent_in(root, path)?;
    match origin {
        Origin::Copy { layer, path: from, stat } => {
            let (from_dir, from_name) = parent_in(layer, from)?;
            let written = copy_file(&from_dir, from_name, stat, &dir, name)?;
            size.inodes += 1;
            size.bytes += written.next_multiple_of(4096);
            Ok(())
        }
        Origin::SameAs(first) => {
            let (from_dir, from_name) = parent_in(root, first)?;
            dir.make_hard_link(name, &from_dir, from_name)
        }
        Origin::LinkTo { layer, path: from } => {
            let (from_dir, from_name) = parent_in(layer, from)?;
            dir.make_hard_link(name, &from_dir, from_name)
        }
        Origin::Whiteout => dir.make_node(name, Node::CharDevice(0, 0), 0o600),
    }
}

fn parent_in<'p>(root: &Root, path: &'p Path) -> io::Result<(Dir, &'p OsStr)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    Ok((root.open_dir_no_links(path.parent().unwrap_or(Path::new("")))?, name))
}

/// Copies one inode that is not a directory, with everything that belongs to it. Returns the bytes
/// of content, without holes.
fn copy_file(from: &Dir, from_name: &OsStr, stat: &Stat, to: &Dir, name: &OsStr) -> io::Result<u64> {
    let node = match stat.file_type {
        FileType::Regular => {
            let source = from.open_regular(from_name)?;
            let copy = to.create_file(name, 0o600)?;
            let written = copy_content(&source, &copy, stat.size)?;
            beneath::chown(copy.as_fd(), stat.uid, stat.gid)?;
            beneath::chmod(copy.as_fd(), stat.mode)?;
            for (name, value) in image_xattrs(source.as_fd())? {
                xattr::set(copy.as_fd(), &name, &value)?;
            }
            beneath::set_times(copy.as_fd(), stat.modified)?;
            return Ok(written);
        }
        FileType::Symlink => {
            to.make_symlink(&from.read_link(from_name)?, name)?;
            to.chown(name, stat.uid, stat.gid)?;
            to.set_times(name, stat.modified)?;
            return Ok(0);
        }
        FileType::CharDevice => Node::CharDevice(stat.device.0, stat.device.1),
        FileType::BlockDevice => Node::BlockDevice(stat.device.0, stat.device.1),
        FileType::Fifo => Node::Fifo,
        FileType::Directory | FileType::Socket => return Err(io::ErrorKind::InvalidInput.into()),
    };
    to.make_node(name, node, 0o600)?;
    to.chown(name, stat.uid, stat.gid)?;
    to.chmod(name, stat.mode)?;
    to.set_times(name, stat.modified)?;
    Ok(0)
}

/// Copies everything but holes.
fn copy_content(mut source: &File, mut copy: &File, size: u64) -> io::Result<u64> {
    let (mut at, mut written) = (0, 0);
    while let Some((start, end)) = file::next_data(source, at)? {
        source.seek(SeekFrom::Start(start))?;
        copy.seek(SeekFrom::Start(start))?;
        written += io::copy(&mut source.take(end - start), &mut copy)?;
        at = end;
    }
    copy.set_len(size)?;
    Ok(written)
}

/// The attributes that belong to the image, sorted; not overlayfs's own.
fn image_xattrs(fd: BorrowedFd<'_>) -> io::Result<Vec<(CString, Vec<u8>)>> {
    let mut found = Vec::new();
    for name in xattr::names(fd)? {
        if unpack::is_wanted_xattr(name.to_bytes())
            && let Some(value) = xattr::get(fd, &name)?
        {
            found.push((name, value));
        }
    }
    found.sort();
    Ok(found)
}

fn shown(path: &Path) -> String {
    printable(path.as_os_str().as_encoded_bytes())
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> PatchError + '_ {
    move |source| PatchError::File { path: shown(path), source }
}
