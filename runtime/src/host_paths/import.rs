//! Images that are imported from a path of the host: an archive, or a directory with a layout.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_image::Layout;
use berth_sys::beneath::Root;
use berth_sys::file::READ_NONBLOCKING;

use super::{HostPathError, HostPaths};

/// A directory that is imported, whose files are opened by workers.
#[derive(Debug)]
pub(super) struct Imported {
    pub(super) host: Arc<HostPaths>,
    pub(super) top: PathBuf,
}

impl Layout for Imported {
    fn open(&self, member: &Path) -> io::Result<File> {
        self.host.member(&self.top, member).map_err(|error| match error {
            HostPathError::Failed(failed) => failed.source(),
            error => io::Error::new(io::ErrorKind::TimedOut, error),
        })
    }
}

/// Opens an archive. `None` for a directory.
pub(super) fn open(path: &Path) -> io::Result<Option<File>> {
    let file = File::options().read(true).custom_flags(READ_NONBLOCKING).open(path)?;
    match file.metadata()?.file_type() {
        kind if kind.is_dir() => Ok(None),
        kind if kind.is_file() => Ok(Some(file)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a directory")),
    }
}

/// Opens a file in the directory `top`. Links lead nowhere else.
pub(super) fn open_member(top: &Path, path: &Path) -> io::Result<File> {
    Root::open(top)?.open_regular(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_and_directories_are_opened_and_links_lead_nowhere_else() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        std::fs::write(at("archive"), "content").unwrap();
        symlink("archive", at("link")).unwrap();
        symlink("/etc/passwd", at("out")).unwrap();
        assert!(open(top.path()).unwrap().is_none());
        assert!(open(&at("link")).unwrap().is_some());
        assert_eq!(open(&at("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(open(Path::new("/dev/null")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let member = |name: &str| open_member(top.path(), Path::new(name)).map_err(|error| error.kind());
        assert!(member("archive").is_ok() && member("link").is_ok());
        assert_eq!(member("out").unwrap_err(), io::ErrorKind::NotFound);
    }
}
