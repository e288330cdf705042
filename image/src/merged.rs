//! The merged view of some layers, as an overlay mount would show it, without mounting it.
//!
//! The rules are the kernel's (Documentation/filesystems/overlayfs.rst): the topmost layer that has
//! a name decides; directories of one name merge until one is opaque, a whiteout or something else
//! is met. Links are resolved in the merged view and cannot leave it.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use berth_sys::beneath::{FileType, Root, Stat};
use berth_sys::xattr;

use crate::unpack::{self, OPAQUE_XATTR};

/// Symbolic links followed in one lookup, as the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Looks into one directory of one layer that the patches of one image may take. Real images take
/// some thousands. A look takes some microseconds, and nothing else is entered into the store
/// meanwhile.
const MOST_LOOKS: u64 = 2_000_000;

/// What a look takes more with each so many levels of its path.
const LEVELS: u64 = 64;

/// How many looks were taken for an image: layers decide how deep directories are, and where links
/// lead.
#[derive(Debug, Default)]
pub(crate) struct Effort(Cell<u64>);

impl Effort {
    fn look(&self, levels: usize) -> io::Result<()> {
        self.0.set(self.0.get() + 1 + levels as u64 / LEVELS);
        if self.0.get() > MOST_LOOKS {
            return Err(io::Error::other("the layers of the image take too long to be compared"));
        }
        Ok(())
    }
}

/// Layers, top first.
#[derive(Debug)]
pub(crate) struct Merged<'a> {
    layers: Vec<&'a Root>,
    effort: &'a Effort,
}

/// An entry that the merged view shows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    /// Which layer it comes from, 0 = top.
    pub(crate) layer: usize,
    pub(crate) stat: Stat,
}

impl<'a> Merged<'a> {
    pub(crate) fn new(layers: Vec<&'a Root>, effort: &'a Effort) -> Self {
        Self { layers, effort }
    }

    pub(crate) fn layer(&self, index: usize) -> Option<&'a Root> {
        self.layers.get(index).copied()
    }

    /// The entry at a path without links in its directory part.
    pub(crate) fn entry(&self, path: &Path) -> io::Result<Option<Found>> {
        let Some(name) = path.file_name() else {
            let Some(top) = self.layers.first() else { return Ok(None) };
            let stat = berth_sys::beneath::stat_fd(top.as_fd())?;
            return Ok(Some(Found { layer: 0, stat }));
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        let visible = self.directories(parent)?;
        Ok(self.look(parent, name, &visible)?.0)
    }

    /// The layers whose directory `path` is part of the merged one, top first; empty if that is no
    /// directory.
    pub(crate) fn directories(&self, path: &Path) -> io::Result<Vec<usize>> {
        let mut visible = self.all();
        let mut here = PathBuf::new();
        for component in path.components() {
            let Component::Normal(name) = component else { return Ok(Vec::new()) };
            visible = self.look(&here, name, &visible)?.1;
            here.push(name);
        }
        Ok(visible)
    }

    fn all(&self) -> Vec<usize> {
        (0..self.layers.len()).collect()
    }

    /// Looks for `name` in the directory `parent` of the layers `visible`.
    pub(crate) fn look(
        &self,
        parent: &Path,
        name: &OsStr,
        visible: &[usize],
    ) -> io::Result<(Option<Found>, Vec<usize>)> {
        let mut found = None;
        let mut merged = Vec::new();
        let levels = parent.as_os_str().len() / 2;
        for &index in visible {
            let Some(layer) = self.layer(index) else { continue };
            self.effort.look(levels)?;
            let dir = layer.open_dir_no_links(parent)?;
            let stat = match dir.stat(name) {
                Ok(stat) => stat,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if unpack::is_whiteout(&stat) {
                break;
            }
            if stat.file_type != FileType::Directory {
                if found.is_none() {
                    found = Some(Found { layer: index, stat });
                }
                break;
            }
            found.get_or_insert(Found { layer: index, stat });
            merged.push(index);
            if xattr::get(dir.open_dir(name)?.as_fd(), OPAQUE_XATTR)?.as_deref() == Some(b"y") {
                break;
            }
        }
        Ok((found, merged))
    }

    /// The path without links that `path` leads to; what does not exist is kept as it stands. A
    /// link in the last component is followed only if asked for. `None` after 40 links.
    pub(crate) fn real_path(&self, path: &Path, follow_last: bool) -> io::Result<Option<PathBuf>> {
        let mut ahead: Vec<OsString> = Vec::new();
        push(&mut ahead, path);
        let mut here = PathBuf::new();
        // The layers that have the directory `here`, and those above it.
        let mut visible = vec![self.all()];
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            if name == ".." {
                here.pop();
                visible.truncate(visible.len().saturating_sub(1).max(1));
                continue;
            }
            if ahead.is_empty() && !follow_last {
                here.push(&name);
                break;
            }
            let (found, merged) = self.look(&here, &name, visible.last().map_or(&[], Vec::as_slice))?;
            let Some(found) = found.filter(|found| found.stat.file_type == FileType::Symlink) else {
                here.push(&name);
                visible.push(merged);
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return Ok(None);
            }
            let Some(layer) = self.layer(found.layer) else { return Ok(None) };
            let target = PathBuf::from(layer.open_dir_no_links(&here)?.read_link(&name)?);
            if target.has_root() {
                here.clear();
                visible.truncate(1);
            }
            push(&mut ahead, &target);
        }
        Ok(Some(here))
    }
}

fn push(stack: &mut Vec<OsString>, path: &Path) {
    for component in path.components().rev() {
        match component {
            Component::Normal(name) => stack.push(name.to_owned()),
            Component::ParentDir => stack.push(OsString::from("..")),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
}
