//! The directories that the paths of a layer lead to.
//!
//! The kernel resolves a path without links in one call. One through links can take it 65,000 steps
//! (forty links of 4095 bytes each), so those are walked here. Where a link leads is remembered,
//! and the steps that it takes to find out are counted.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::io::ErrorKind::{InvalidFilename, NotADirectory, NotFound};
use std::ops::Bound;
use std::path::{Component, Path, PathBuf};

use berth_sys::beneath::{Dir, FileType, MissingDir, Root};
use berth_sys::errno::ELOOP;

use super::path::MAX_PATH;

/// Symbolic links followed for one path, as the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Most steps over the whole layer. One takes about two microseconds; real layers, whose paths
/// hardly ever lead through links, take some hundreds.
const MAX_STEPS: u64 = 2_000_000;

/// Opening a path from the root takes as long as another step for each so many bytes of it.
const BYTES_PER_STEP: usize = 64;

/// When more than that is remembered, all of it is forgotten.
const MAX_KNOWN_BYTES: usize = 4 << 20;

/// A directory, and its path from the root without links.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) dir: Dir,
    pub(super) real: PathBuf,
}

/// Why a directory was not opened.
#[derive(Debug)]
pub(super) enum ParentError {
    /// There are none of [`MAX_STEPS`] left.
    TooManySteps,
    /// A file operation failed.
    File(io::Error),
}

impl From<io::Error> for ParentError {
    fn from(error: io::Error) -> Self {
        Self::File(error)
    }
}

/// Where a link leads: a directory.
#[derive(Debug)]
struct Target {
    real: PathBuf,
    /// The links on the way, itself included.
    links: usize,
}

/// What one can say of a path from the links that are known.
enum Looked {
    Found(Place),
    /// Something on the way is missing or not a directory. The path has no links up to there; with
    /// how many were followed.
    Missing(io::Error, PathBuf, usize),
    /// A link on the way is not known.
    Unknown,
}

/// What is ahead in a walk.
enum Ahead {
    Name(OsString),
    /// The end of a link's target. `links` were followed before it.
    Reached {
        link: PathBuf,
        links: usize,
    },
}

#[derive(Debug)]
pub(super) struct Parents<'a> {
    root: &'a Root,
    /// By the link's path without links. None is the beginning of another: a link has nothing below
    /// it.
    known: BTreeMap<PathBuf, Target>,
    known_bytes: usize,
    steps_left: u64,
}

impl<'a> Parents<'a> {
    pub(super) fn new(root: &'a Root) -> Self {
        Self { root, known: BTreeMap::new(), known_bytes: 0, steps_left: MAX_STEPS }
    }

    /// To be called when a link or directory was removed: paths may lead elsewhere now.
    pub(super) fn forget(&mut self) {
        self.known.clear();
        self.known_bytes = 0;
    }

    /// Opens the directory at `path`.
    pub(super) fn find(&mut self, path: &Path) -> Result<Place, ParentError> {
        match self.look(path)? {
            Looked::Found(place) => Ok(place),
            Looked::Missing(error, ..) => Err(error.into()),
            Looked::Unknown => {
                let top = self.top()?;
                self.walk(top, path, 0, |missing| {
                    Err(missing.obstacle.map_or(NotFound, |_| NotADirectory).into())
                })
            }
        }
    }

    /// Opens the directory at `path`; `make` makes what is missing on the way, or fails. `near` is
    /// the directory that a path leads to which may be the beginning of this one.
    pub(super) fn make(
        &mut self,
        near: Option<(PathBuf, Place)>,
        path: &Path,
        make: impl FnMut(MissingDir<'_>) -> io::Result<()>,
    ) -> Result<Place, ParentError> {
        if let Some((above, place)) = near
            && let (Some(parent), Some(name)) = (path.parent(), path.file_name())
            && parent == above
        {
            match place.dir.open_dir(name) {
                Ok(dir) => return Ok(Place { dir, real: place.real.join(name) }),
                Err(error) if error.kind() == NotFound => {
                    return self.walk(place, Path::new(name), 0, make);
                }
                // It may be a link.
                Err(_) => {}
            }
        }
        let (path, links) = match self.look(path)? {
            Looked::Found(place) => return Ok(place),
            Looked::Unknown => {
                let top = self.top()?;
                return self.walk(top, path, 0, make);
            }
            Looked::Missing(_, path, links) => (path, links),
        };
        // What is missing is made, so these are not more than directories.
        for above in path.ancestors().skip(1) {
            match self.root.open_dir_no_links(above) {
                Ok(dir) => {
                    let place = Place { dir, real: above.to_owned() };
                    return self.walk(place, path.strip_prefix(above).unwrap_or(&path), links, make);
                }
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::from(NotFound).into())
    }

    fn top(&self) -> io::Result<Place> {
        Ok(Place { dir: self.root.open_dir_no_links(Path::new(""))?, real: PathBuf::new() })
    }

    /// Counts a step, and what it takes more to open `path` from the root.
    fn count(&mut self, path: &Path) -> Result<(), ParentError> {
        let steps = 1 + path.as_os_str().len() / BYTES_PER_STEP;
        self.steps_left = self.steps_left.checked_sub(steps as u64).ok_or(ParentError::TooManySteps)?;
        Ok(())
    }

    fn look(&mut self, path: &Path) -> Result<Looked, ParentError> {
        let mut path = Cow::Borrowed(path);
        let mut links = 0;
        while let Some((next, more)) = self.beyond_link(&path) {
            self.count(&next)?;
            links += more;
            if links > MAX_LINKS {
                return Err(too_many_links().into());
            }
            path = Cow::Owned(next);
        }
        match self.root.open_dir_no_links(&path) {
            Ok(dir) => Ok(Looked::Found(Place { dir, real: path.into_owned() })),
            Err(error) if is_missing(&error) => Ok(Looked::Missing(error, path.into_owned(), links)),
            Err(error) if error.raw_os_error() == Some(ELOOP) => Ok(Looked::Unknown),
            // It has become longer.
            Err(error) if error.kind() == InvalidFilename && links > 0 => Ok(Looked::Unknown),
            Err(error) => Err(error.into()),
        }
    }

    /// The same path with the known link that it begins with replaced, and how many links that is.
    fn beyond_link(&self, path: &Path) -> Option<(PathBuf, usize)> {
        // The greatest that is not after the path: if it begins with any, with this one.
        let until = (Bound::Unbounded, Bound::Included(path));
        let (link, target) = self.known.range::<Path, _>(until).next_back()?;
        let rest = path.strip_prefix(link).ok()?;
        let next = if rest.as_os_str().is_empty() { target.real.clone() } else { target.real.join(rest) };
        Some((next, target.links))
    }

    /// Walks from `place` by `path`, after so many `links`.
    fn walk(
        &mut self,
        place: Place,
        path: &Path,
        mut links: usize,
        mut make: impl FnMut(MissingDir<'_>) -> io::Result<()>,
    ) -> Result<Place, ParentError> {
        let Place { mut dir, real: mut here } = place;
        // Last first.
        let mut ahead: Vec<Ahead> = Vec::new();
        push(&mut ahead, path);
        while let Some(next) = ahead.pop() {
            let name = match next {
                Ahead::Name(name) => name,
                Ahead::Reached { link, links: before } => {
                    self.remember(link, Target { real: here.clone(), links: links - before });
                    continue;
                }
            };
            if name == ".." {
                here.pop();
                self.count(&here)?;
                dir = self.root.open_dir_no_links(&here)?;
                continue;
            }
            match dir.open_dir(&name) {
                Ok(next) => {
                    self.count(Path::new(""))?;
                    here.push(&name);
                    dir = next;
                    continue;
                }
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error.into()),
            }
            let found = match dir.stat(&name) {
                Ok(stat) => Some(stat),
                Err(error) if error.kind() == NotFound => None,
                Err(error) => return Err(error.into()),
            };
            here.push(&name);
            if found.is_none_or(|stat| stat.file_type != FileType::Symlink) {
                make(MissingDir { path: &here, parent: &dir, name: &name, obstacle: found })?;
                dir = dir.open_dir(&name)?;
                continue;
            }
            let known = self.known.get(&here).map(|target| (target.real.clone(), target.links));
            links += known.as_ref().map_or(1, |(_, links)| *links);
            if links > MAX_LINKS {
                return Err(too_many_links().into());
            }
            self.count(&here)?;
            if let Some((real, _)) = known {
                here = real;
                dir = self.root.open_dir_no_links(&here)?;
                continue;
            }
            let target = PathBuf::from(dir.read_link(&name)?);
            ahead.push(Ahead::Reached { link: here.clone(), links: links - 1 });
            if target.has_root() {
                here.clear();
                dir = self.root.open_dir_no_links(&here)?;
            } else {
                here.pop();
            }
            push(&mut ahead, &target);
        }
        Ok(Place { dir, real: here })
    }

    fn remember(&mut self, link: PathBuf, target: Target) {
        // The overhead of one map entry.
        const OVERHEAD: usize = 64;
        let (link_bytes, real_bytes) = (link.as_os_str().len(), target.real.as_os_str().len());
        // The kernel takes no longer path: there one can only walk.
        if real_bytes > MAX_PATH {
            return;
        }
        let bytes = link_bytes + real_bytes + OVERHEAD;
        if self.known_bytes + bytes > MAX_KNOWN_BYTES {
            self.forget();
        }
        self.known_bytes += bytes;
        self.known.insert(link, target);
    }
}

fn too_many_links() -> io::Error {
    io::Error::from_raw_os_error(ELOOP)
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), NotFound | NotADirectory)
}

fn push(stack: &mut Vec<Ahead>, path: &Path) {
    for component in path.components().rev() {
        match component {
            Component::Normal(name) => stack.push(Ahead::Name(name.to_owned())),
            Component::ParentDir => stack.push(Ahead::Name(OsString::from(".."))),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use berth_sys::beneath::stat_fd;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    fn make_plain(missing: &MissingDir<'_>) -> io::Result<()> {
        match missing.obstacle {
            None => missing.parent.make_dir(missing.name, 0o755),
            Some(_) => Err(NotADirectory.into()),
        }
    }

    /// All that is in a tree.
    fn listing(root: &Root, path: &Path, lines: &mut Vec<String>) {
        for name in root.open_dir_no_links(path).unwrap().names(100).unwrap() {
            let inside = path.join(&name);
            let stat = root.open_dir_no_links(path).unwrap().stat(&name).unwrap();
            lines.push(format!("{inside:?} {:?}", stat.file_type));
            if stat.file_type == FileType::Directory {
                listing(root, &inside, lines);
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Act {
        Make(PathBuf),
        Find(PathBuf),
        Link(PathBuf, PathBuf),
        File(PathBuf),
        Remove(PathBuf),
    }

    fn paths(names: &'static [&'static str], most: usize) -> impl Strategy<Value = PathBuf> {
        vec(select(names), 1..=most).prop_map(|names| names.join("/").into())
    }

    fn act() -> impl Strategy<Value = Act> {
        let path = || paths(&["a", "b", "c"], 4);
        let target = (any::<bool>(), paths(&["a", "b", "c", "..", "."], 5))
            .prop_map(|(absolute, path)| if absolute { Path::new("/").join(path) } else { path });
        prop_oneof![
            3 => path().prop_map(Act::Make),
            3 => path().prop_map(Act::Find),
            2 => (path(), target).prop_map(|(path, target)| Act::Link(path, target)),
            1 => path().prop_map(Act::File),
            1 => path().prop_map(Act::Remove),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn paths_lead_where_the_kernel_says(acts in vec(act(), 1..40)) {
            let directory = tempfile::tempdir_in("/dev/shm").unwrap();
            let [ours, plain] = ["ours", "plain"].map(|name| {
                std::fs::create_dir(directory.path().join(name)).unwrap();
                Root::open(&directory.path().join(name)).unwrap()
            });
            let mut parents = Parents::new(&ours);
            let mut last: Option<(PathBuf, Place)> = None;
            for act in acts {
                let (theirs, mine) = match &act {
                    Act::Make(path) => {
                        let theirs = plain.make_dir_all_with(path, |missing| make_plain(&missing));
                        let mine = parents.make(last.take(), path, |missing| make_plain(&missing));
                        (theirs, mine)
                    }
                    Act::Find(path) => (plain.open_dir(path), parents.find(path)),
                    Act::Link(path, _) | Act::File(path) | Act::Remove(path) => {
                        let above = path.parent().unwrap();
                        (plain.open_dir(above), parents.find(above))
                    }
                };
                let (theirs, place) = match (theirs, mine) {
                    (Ok(theirs), Ok(mine)) => (theirs, mine),
                    (Err(theirs), Err(ParentError::File(mine))) => {
                        prop_assert_eq!(theirs.kind(), mine.kind(), "{:?}", act);
                        continue;
                    }
                    (theirs, mine) => panic!("{act:?}: {theirs:?}, {mine:?}"),
                };
                // The path without links leads to the same directory.
                let identity = |dir: &Dir| stat_fd(dir.as_fd()).unwrap().identity;
                prop_assert_eq!(
                    identity(&ours.open_dir_no_links(&place.real).unwrap()), identity(&place.dir));
                match act {
                    Act::Make(path) => last = Some((path, place)),
                    Act::Find(_) => {}
                    Act::Link(path, target) => {
                        for dir in [&theirs, &place.dir] {
                            let _ = dir.make_symlink(target.as_os_str(), path.file_name().unwrap());
                        }
                    }
                    Act::File(path) => {
                        for dir in [&theirs, &place.dir] {
                            let _ = dir.create_file(path.file_name().unwrap(), 0o600);
                        }
                    }
                    Act::Remove(path) => {
                        for dir in [&theirs, &place.dir] {
                            dir.remove_all(path.file_name().unwrap()).unwrap();
                        }
                        (last, _) = (None, parents.forget());
                    }
                }
                let (mut of_ours, mut of_plain) = (Vec::new(), Vec::new());
                listing(&ours, Path::new(""), &mut of_ours);
                listing(&plain, Path::new(""), &mut of_plain);
                of_ours.sort();
                of_plain.sort();
                prop_assert_eq!(of_ours, of_plain);
            }
        }
    }
}
