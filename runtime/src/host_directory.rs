//! Host directories that are created for a pod because a request names them: log directories,
//! sources of mounts.

use std::io;
use std::path::{Path, PathBuf};

use berth_sys::host_path;

/// Creates `path` and missing parents, searchable by all (mode 0755): they are the pods'. The umask
/// is the caller's, and the daemon has a strict one for its own files: this is for its workers
/// ([`crate::host_paths`]), who can also be kept waiting forever.
///
/// Containers may own a directory on the way. Links that are there are followed, as the CRI asks
/// for `Mount.host_path`; nothing is looked up twice, and no mode is changed once a directory is
/// made (see [`host_path::make_dir_all`]).
///
/// # Errors
/// The directory that could not be created, and why.
pub(crate) fn make_missing(path: &Path) -> Result<(), (PathBuf, io::Error)> {
    if path.exists() {
        return Ok(());
    }
    host_path::make_dir_all(path, 0o755)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_missing_is_made_and_what_is_there_stays() {
        let directory = tempfile::tempdir().unwrap();
        let there = directory.path().join("there");
        std::fs::create_dir(&there).unwrap();
        std::fs::set_permissions(&there, std::fs::Permissions::from_mode(0o700)).unwrap();
        let deep = there.join("a/b");
        make_missing(&deep).unwrap();
        make_missing(&deep).unwrap();
        assert_eq!((mode(&there), mode(&there.join("a")), mode(&deep)), (0o700, 0o755, 0o755));
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(make_missing(&file.join("below")).unwrap_err().0, file);
    }

    /// The swap of a container that owns the parent: the directory just made becomes a link to
    /// another one.
    #[test]
    fn the_mode_of_what_a_swapped_link_leads_to_stays() {
        let directory = tempfile::tempdir().unwrap();
        let (place, victim) = (directory.path().join("x"), directory.path().join("victim"));
        std::fs::create_dir(&victim).unwrap();
        std::fs::set_permissions(&victim, std::fs::Permissions::from_mode(0o700)).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    if std::fs::remove_dir(&place).is_ok() && symlink(&victim, &place).is_ok() {
                        std::thread::yield_now();
                        let _ = std::fs::remove_file(&place);
                    }
                }
            });
            for _ in 0..3000 {
                let _ = make_missing(&place);
                if mode(&victim) != 0o700 {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(mode(&victim), 0o700);
    }
}
