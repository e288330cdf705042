//! The control files of cgroups that containers see, opened without the daemon ever waiting.
//!
//! A container can keep its cgroup's directories locked ([`berth_cgroup::Files`]), and the kernel
//! does not say which names in them it can find without the lock. So a file is looked for by a
//! worker of [`crate::host_paths`], and if it is only read, once: afterwards it is opened by its
//! handle, which needs no name.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_cgroup::{Files, Hierarchy, OpenFor};
use berth_sys::errno::{ENOENT, ESTALE};
use berth_sys::file_handle::FileHandle;
use berth_sys::socket::MAX_DESCRIPTORS;

use crate::host_paths::{HostPathError, HostPaths};
use crate::lock;

/// How long a file that was missing is not looked for again: a kernel without it stays without, but
/// a controller may be enabled later.
const MISSING: Duration = Duration::from_secs(60);

/// The most files of one cgroup that are remembered, which is more than are ever asked for.
const MOST: usize = 64;

/// The roots of the hierarchies, where handles are opened.
#[derive(Debug)]
pub(super) struct Roots(Vec<(PathBuf, File)>);

impl Roots {
    pub(super) fn open(hierarchy: &Hierarchy) -> Self {
        let mounts: Vec<&Path> = match hierarchy {
            Hierarchy::Unified { mount } => vec![mount],
            Hierarchy::Legacy { mounts } => mounts.iter().map(|mount| mount.path.as_path()).collect(),
        };
        // Without one, the workers do more.
        let open = |mount: &Path| Some((mount.to_owned(), File::open(mount).ok()?));
        Self(mounts.into_iter().filter_map(open).collect())
    }

    fn of(&self, directory: &Path) -> Option<usize> {
        self.0.iter().position(|(mount, _)| directory.starts_with(mount))
    }
}

/// A file of one cgroup.
#[derive(Debug)]
struct Known {
    /// Which of its directories it is in.
    directory: usize,
    name: Box<str>,
    /// Nothing when it was missing then.
    file: Result<FileHandle, Instant>,
}

/// The files of one cgroup.
#[derive(Debug)]
pub(super) struct Guarded {
    host: Arc<HostPaths>,
    roots: Arc<Roots>,
    directories: Vec<PathBuf>,
    /// Of each directory, which root it is below.
    root_of: Vec<Option<usize>>,
    known: Mutex<Vec<Known>>,
}

impl Guarded {
    pub(super) fn new(host: Arc<HostPaths>, roots: Arc<Roots>, directories: Vec<PathBuf>) -> Self {
        let root_of = directories.iter().map(|directory| roots.of(directory)).collect();
        Self { host, roots, directories, root_of, known: Mutex::default() }
    }

    /// The directory and the name of a file that may be remembered.
    fn key<'a>(&self, path: &'a Path) -> Option<(usize, &'a str)> {
        let above = path.parent()?;
        // As text: both come from the same paths, of which there are many.
        let above = above.as_os_str();
        let directory = self.directories.iter().position(|directory| directory.as_os_str() == above)?;
        Some((directory, path.file_name()?.to_str()?))
    }

    /// Opens it if that needs no search.
    fn open_known(&self, path: &Path) -> Option<io::Result<File>> {
        let (directory, name) = self.key(path)?;
        let file = {
            let known = lock(&self.known);
            known.iter().find(|known| known.directory == directory && *known.name == *name)?.file
        };
        match file {
            Err(since) => (since.elapsed() < MISSING).then(|| Err(io::Error::from_raw_os_error(ENOENT))),
            Ok(handle) => {
                let (_, root) = self.roots.0.get((*self.root_of.get(directory)?)?)?;
                match handle.open(root.as_fd()) {
                    Ok(file) => Some(Ok(file)),
                    // The cgroup is gone.
                    Err(error) if error.raw_os_error() == Some(ESTALE) => {
                        Some(Err(io::Error::from_raw_os_error(ENOENT)))
                    }
                    Err(_) => None,
                }
            }
        }
    }

    fn remember(&self, path: &Path, opened: &io::Result<File>) {
        let Some((directory, name)) = self.key(path) else { return };
        let file = match opened {
            Ok(file) => match FileHandle::of(file.as_fd()) {
                Ok(handle) => Ok(handle),
                Err(_) => return,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Instant::now()),
            Err(_) => return,
        };
        let mut known = lock(&self.known);
        known.retain(|known| known.directory != directory || *known.name != *name);
        if known.len() < MOST {
            known.push(Known { directory, name: name.into(), file });
        }
    }

    fn search(&self, paths: &[PathBuf], purpose: OpenFor) -> Result<Vec<io::Result<File>>, HostPathError> {
        let above = |path: &PathBuf| self.directories.iter().find(|directory| path.starts_with(directory));
        let mut directories: Vec<PathBuf> = paths.iter().filter_map(above).cloned().collect();
        directories.dedup();
        let opened = self.host.open_control(&directories, paths, purpose)?;
        for (path, opened) in paths.iter().zip(&opened).filter(|_| purpose == OpenFor::Reading) {
            self.remember(path, opened);
        }
        Ok(opened)
    }
}

impl Files for Guarded {
    fn open(&self, paths: &[PathBuf], purpose: OpenFor) -> Vec<io::Result<File>> {
        let all: Vec<Option<io::Result<File>>> =
            paths.iter().map(|path| self.open_known(path).filter(|_| purpose == OpenFor::Reading)).collect();
        let unknown: Vec<PathBuf> = paths
            .iter()
            .zip(&all)
            .filter(|(_, known)| known.is_none())
            .map(|(path, _)| path.clone())
            .collect();
        let mut found = Vec::new();
        for paths in unknown.chunks(MAX_DESCRIPTORS) {
            match self.search(paths, purpose) {
                Ok(opened) => found.extend(opened),
                // Of a container that does not let one be found, the rest is not waited for.
                Err(error) => {
                    let text = crate::chain(&error);
                    found.resize_with(unknown.len(), || Err(unanswered(text.clone())));
                    break;
                }
            }
        }
        let mut found = found.into_iter();
        all.into_iter().filter_map(|known| known.or_else(|| found.next())).collect()
    }

    fn tree(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        self.host.tree(directory).map_err(|error| match error {
            HostPathError::Failed(failed) => failed.source(),
            error => unanswered(crate::chain(&error)),
        })
    }

    fn remove(&self, directories: &[PathBuf]) -> Vec<io::Result<()>> {
        self.host.remove_cgroup(directories).unwrap_or_else(|error| {
            let text = crate::chain(&error);
            directories.iter().map(|_| Err(unanswered(text.clone()))).collect()
        })
    }
}

/// It is not known.
fn unanswered(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, text)
}
