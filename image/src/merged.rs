//! What an overlay mount of some layers would show, without mounting it.
//!
//! The rules are the kernel's (Documentation/filesystems/overlayfs.rst): the topmost layer that has a name
//! decides; directories of one name merge until one is opaque, a whiteout or something else is met. Links are
//! resolved in the merged view and cannot leave it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use berth_sys::beneath::{FileType, Root, Stat};
use berth_sys::xattr;

use crate::unpack::{self, OPAQUE_XATTR};

/// Symbolic links followed in one lookup, as the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Layers, top first.
#[derive(Debug)]
pub(crate) struct Merged<'a> {
    layers: Vec<&'a Root>,
}

/// An entry that the merged view shows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    /// Which layer it comes from, 0 = top.
    pub(crate) layer: usize,
    pub(crate) stat: Stat,
}

impl<'a> Merged<'a> {
    pub(crate) fn new(layers: Vec<&'a Root>) -> Self {
        Self { layers }
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

    /// The layers whose directory `path` is part of the merged one, top first; empty if that is no directory.
    pub(crate) fn directories(&self, path: &Path) -> io::Result<Vec<usize>> {
        let mut visible: Vec<usize> = (0..self.layers.len()).collect();
        let mut here = PathBuf::new();
        for component in path.components() {
            let Component::Normal(name) = component else { return Ok(Vec::new()) };
            visible = self.look(&here, name, &visible)?.1;
            here.push(name);
        }
        Ok(visible)
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
        for &index in visible {
            let Some(layer) = self.layer(index) else { continue };
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

    /// The path without links that `path` leads to; what does not exist is kept as it stands. A link in the
    /// last component is followed only if asked for. `None` after 40 links.
    pub(crate) fn real_path(&self, path: &Path, follow_last: bool) -> io::Result<Option<PathBuf>> {
        let mut ahead: Vec<OsString> = Vec::new();
        push(&mut ahead, path);
        let mut here = PathBuf::new();
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            if name == ".." {
                here.pop();
                continue;
            }
            here.push(&name);
            if ahead.is_empty() && !follow_last {
                break;
            }
            let Some(found) = self.entry(&here)? else { continue };
            if found.stat.file_type != FileType::Symlink {
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Ok(None);
            }
            here.pop();
            let Some(layer) = self.layer(found.layer) else { return Ok(None) };
            let target = PathBuf::from(layer.open_dir_no_links(&here)?.read_link(&name)?);
            if target.has_root() {
                here.clear();
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
