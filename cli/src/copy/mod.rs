//! Copying files between this machine and a container, as a stream in the tar format.
//!
//! ```text
//!  pack     a file or directory, by descriptor      \            / extract   by descriptor
//!  tar      of the container, through exec           > a stream <  tar       of the container
//!  stdin    for "-"                                 /            \ stdout    for "-"
//! ```
//! Data from a container may be hostile. `archive` reads it with limits, `extract` writes below
//! one directory only, and paths in a container are resolved by the kernel below the
//! container's root: no link leads to a file of the host.

pub(crate) mod archive;
pub(crate) mod extract;
pub(crate) mod pack;
pub(crate) mod place;

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use berth_sys::beneath::{FileType, Root, stat_fd};
use berth_sys::mount::states_no_lengths;

/// Why a path cannot be copied from or to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    /// It cannot be looked up.
    #[error("cannot look up {0}")]
    Look(PathBuf, #[source] io::Error),
    /// A device, FIFO or socket.
    #[error("{0} is neither a file nor a directory")]
    Kind(PathBuf),
    /// It is not a directory.
    #[error("{0} is not a directory")]
    NotDirectory(PathBuf),
    /// The directory to copy into does not exist.
    #[error("directory {0} does not exist")]
    NoDirectory(PathBuf),
}

/// What is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    /// Whether it is a directory.
    pub(crate) is_directory: bool,
    /// Only the contents of the directory: its path ends with `/.`.
    pub(crate) only_contents: bool,
    /// Its last name; `/` has none.
    pub(crate) name: Option<OsString>,
    /// Whether it is in `/proc` or `/sys`, or has them in it: files there state other lengths than
    /// they have, which tar(1) believes, or fails for.
    pub(crate) misleads_tar: bool,
}

/// The destination of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Destination {
    /// The existing directory.
    pub(crate) into: PathBuf,
    /// The name in that directory; `None` for the contents of a directory.
    pub(crate) top: Option<OsString>,
}

impl Destination {
    /// Whether something is mounted on what would be written: it can be written over, and nothing
    /// can take its place.
    ///
    /// # Errors
    /// [`PlanError::Look`].
    pub(crate) fn is_mounted_on(&self, root: &Root) -> Result<bool, PlanError> {
        let Some(top) = &self.top else { return Ok(false) };
        match root.open_dir(&self.into).and_then(|into| into.is_mounted_on(top)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            looked => looked.map_err(|error| PlanError::Look(self.into.join(top), error)),
        }
    }
}

fn ends_with(path: &Path, end: &str) -> bool {
    path.as_os_str().as_bytes().ends_with(end.as_bytes())
}

/// Examines the source, following a final link.
///
/// # Errors
/// [`PlanError`].
pub(crate) fn source(root: &Root, path: &Path) -> Result<Source, PlanError> {
    let failed = |error| PlanError::Look(path.to_owned(), error);
    let found = root.resolve(path).map_err(failed)?;
    let stat = stat_fd(found.as_fd()).map_err(failed)?;
    let is_directory = match stat.file_type {
        FileType::Directory => true,
        FileType::Regular => false,
        _ => return Err(PlanError::Kind(path.to_owned())),
    };
    if !is_directory && ends_with(path, "/") {
        return Err(PlanError::NotDirectory(path.to_owned()));
    }
    let only_contents = is_directory && (ends_with(path, "/.") || path == Path::new("."));
    let top = root.resolve(Path::new("/")).and_then(|top| stat_fd(top.as_fd())).map_err(failed)?;
    let misleads_tar = states_no_lengths(found.as_fd()).map_err(failed)? || stat.identity == top.identity;
    Ok(Source { is_directory, only_contents, name: path.file_name().map(ToOwned::to_owned), misleads_tar })
}

/// The destination of a copy to `path`, by the rules of cp(1) and podman-cp(1).
///
/// # Errors
/// [`PlanError`].
pub(crate) fn destination(root: &Root, path: &Path, source: &Source) -> Result<Destination, PlanError> {
    match kind(root, path)? {
        Some(FileType::Directory) => {
            let top = if source.only_contents { None } else { source.name.clone() };
            Ok(Destination { into: path.to_owned(), top })
        }
        Some(_) if source.is_directory || ends_with(path, "/") => {
            Err(PlanError::NotDirectory(path.to_owned()))
        }
        // It would be replaced by a file, and /dev/null is needed as it is.
        Some(kind) if kind != FileType::Regular => Err(PlanError::Kind(path.to_owned())),
        None if !source.is_directory && ends_with(path, "/") => Err(PlanError::NoDirectory(path.to_owned())),
        // The contents of a directory go into a new directory.
        _ => {
            let name = path.file_name().ok_or_else(|| PlanError::NoDirectory(path.to_owned()))?;
            let into = path.parent().unwrap_or(Path::new("")).to_owned();
            match kind(root, &into)? {
                Some(FileType::Directory) => Ok(Destination { into, top: Some(name.to_owned()) }),
                Some(_) => Err(PlanError::NotDirectory(into)),
                None => Err(PlanError::NoDirectory(into)),
            }
        }
    }
}

/// The type of the file at a path, following links; `None` if there is none.
fn kind(root: &Root, path: &Path) -> Result<Option<FileType>, PlanError> {
    match root.resolve(path).and_then(|found| stat_fd(found.as_fd())) {
        Ok(stat) => Ok(Some(stat.file_type)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(PlanError::Look(path.to_owned(), error)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::create_dir_all(path.join("dir/sub")).unwrap();
        fs::write(path.join("file"), "x").unwrap();
        symlink("dir", path.join("to-dir")).unwrap();
        symlink("/etc/passwd", path.join("out")).unwrap();
        symlink("socket", path.join("to-socket")).unwrap();
        std::os::unix::net::UnixListener::bind(path.join("socket")).unwrap();
        let root = Root::open(path).unwrap();
        (directory, root)
    }

    #[test]
    fn a_source_is_a_file_or_a_directory_or_what_is_in_it() {
        let (_directory, root) = tree();
        for (path, is_directory, only_contents, name) in [
            ("/file", false, false, Some("file")),
            ("/dir", true, false, Some("dir")),
            ("/dir/", true, false, Some("dir")),
            ("/to-dir", true, false, Some("to-dir")),
            ("/dir/.", true, true, Some("dir")),
            ("/", true, false, None),
            ("/.", true, true, None),
        ] {
            let misleads_tar = name.is_none();
            let name = name.map(OsString::from);
            let expected = Source { is_directory, only_contents, name, misleads_tar };
            assert_eq!(source(&root, Path::new(path)).unwrap(), expected, "{path}");
        }
        for path in ["/none", "/out", "/file/", "/file/x"] {
            assert!(source(&root, Path::new(path)).is_err(), "{path}");
        }
        let kernels = Root::open(Path::new("/")).unwrap();
        for path in ["/proc/version", "/proc/self", "/sys/kernel"] {
            assert!(source(&kernels, Path::new(path)).unwrap().misleads_tar, "{path}");
        }
    }

    #[test]
    fn a_destination_is_what_cp_and_podman_make_of_it() {
        let (_directory, root) = tree();
        let file =
            Source { is_directory: false, only_contents: false, name: Some("a".into()), misleads_tar: false };
        let tree = Source { is_directory: true, ..file.clone() };
        let contents = Source { only_contents: true, ..tree.clone() };
        for (source, path, expected) in [
            (&file, "/new", Some(("/", Some("new")))),
            (&file, "/file", Some(("/", Some("file")))),
            (&file, "/dir", Some(("/dir", Some("a")))),
            (&file, "/to-dir/", Some(("/to-dir/", Some("a")))),
            (&file, "/socket", None),
            (&file, "/to-socket", None),
            (&file, "/out", Some(("/", Some("out")))),
            (&file, "/dir/sub/new", Some(("/dir/sub", Some("new")))),
            (&file, "/new/", None),
            (&file, "/none/new", None),
            (&file, "/file/", None),
            (&file, "/file/new", None),
            (&tree, "/new", Some(("/", Some("new")))),
            (&tree, "/new/", Some(("/", Some("new")))),
            (&tree, "/dir", Some(("/dir", Some("a")))),
            (&tree, "/file", None),
            (&contents, "/dir", Some(("/dir", None))),
            (&contents, "/new", Some(("/", Some("new")))),
            (&contents, "/file", None),
        ] {
            let found = destination(&root, Path::new(path), source).ok();
            let expected =
                expected.map(|(into, top)| Destination { into: into.into(), top: top.map(OsString::from) });
            assert_eq!(found, expected, "{source:?} to {path}");
        }
    }
}
