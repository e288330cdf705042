//! Directories of the host that are made for a pod because a request names them: log directories, sources of mounts.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Makes `path` and its parents where they are absent, open to be passed through by everybody: they are the pods', and the daemon's strict
/// umask is for its own files.
///
/// # Errors
/// The directory that could not be made, and why.
pub(crate) fn make_missing(path: &Path) -> Result<(), (PathBuf, io::Error)> {
    let mut missing: Vec<&Path> = path.ancestors().take_while(|part| !part.exists()).collect();
    missing.reverse();
    for part in missing {
        match std::fs::create_dir(part)
            .and_then(|()| std::fs::set_permissions(part, std::fs::Permissions::from_mode(0o755)))
        {
            Ok(()) => {}
            // Two containers of a pod with one directory are made at the same time.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && part.is_dir() => {}
            Err(error) => return Err((part.to_owned(), error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_made_and_what_is_there_stays() {
        let directory = tempfile::tempdir().unwrap();
        let there = directory.path().join("there");
        std::fs::create_dir(&there).unwrap();
        std::fs::set_permissions(&there, std::fs::Permissions::from_mode(0o700)).unwrap();
        let deep = there.join("a/b");
        make_missing(&deep).unwrap();
        make_missing(&deep).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&there), mode(&there.join("a")), mode(&deep)), (0o700, 0o755, 0o755));
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(make_missing(&file.join("below")).unwrap_err().0, file.join("below"));
    }
}
