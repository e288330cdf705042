//! The files of a log that is rotated.
//!
//! ```text
//!  main.log.3 -> main.log.4      main.log.1 -> main.log.2      main.log -> main.log.1
//! ```

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;

use berth_sys::beneath::{Dir, FileType, Root};

/// Rotated files that are kept.
const KEPT: u32 = 4;

/// Moves away a log that exceeds the limit. Returns whether the shim has to reopen it, which is
/// also the case if it is missing. Pods can create links in their log directory, so none is
/// followed.
pub(super) fn rotate_if_large(directory: &Path, name: &Path, limit: u64) -> io::Result<bool> {
    let below = name.parent().unwrap_or(Path::new(""));
    let Some(name) = name.file_name() else { return Ok(false) };
    let directory = Root::open(directory)?.open_dir_no_links(below)?;
    match directory.stat(name) {
        Ok(stat) if stat.file_type != FileType::Regular || stat.size <= limit => Ok(false),
        Ok(_) => rotate(&directory, name).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

fn rotate(directory: &Dir, name: &OsStr) -> io::Result<()> {
    let numbered = |number: u32| -> OsString {
        let mut name = name.to_owned();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        name
    };
    for number in (0..KEPT).rev() {
        match directory.rename(&numbered(number), directory, &numbered(number + 1)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && number > 0 => {}
            renamed => renamed?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_log_that_is_too_large_is_moved_and_the_oldest_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let look = || rotate_if_large(directory.path(), Path::new("main.log"), 3).unwrap();
        assert!(look(), "there is none");
        for round in 0..7 {
            fs::write(path("main.log"), "abc").unwrap();
            assert!(!look());
            fs::write(path("main.log"), format!("log {round}")).unwrap();
            assert!(look());
            assert!(!path("main.log").exists());
        }
        for (number, round) in [(1, 6), (2, 5), (3, 4), (4, 3)] {
            let log = fs::read_to_string(path(&format!("main.log.{number}"))).unwrap();
            assert_eq!(log, format!("log {round}"));
        }
        assert!(!path("main.log.5").exists());
    }

    #[test]
    fn planted_links_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("main.log"), "of the host").unwrap();
        let look = |name: &str| rotate_if_large(directory.path(), Path::new(name), 3);
        std::os::unix::fs::symlink(outside.path().join("main.log"), directory.path().join("main.log"))
            .unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("sub")).unwrap();
        assert!(!look("main.log").unwrap());
        assert!(look("sub/main.log").is_err());
        assert!(outside.path().join("main.log").exists());
    }
}
