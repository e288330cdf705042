//! Paths of archive entries: from bytes to a clean relative path.
//!
//! This is tidiness and limits, not the defence against climbing out: that is `berth_sys::beneath`,
//! through which each path goes.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Longest path: the kernel's `PATH_MAX` of 4096 with its NUL.
pub(crate) const MAX_PATH: usize = 4095;

/// Most components. Enough for any real image (node_modules stays below 60); bounds what walks the
/// tree later.
pub(crate) const MAX_DEPTH: usize = 1024;

/// Longest component: `NAME_MAX` of the kernel's filesystems.
pub(crate) const MAX_NAME: usize = 255;

/// Why a path of an entry is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// No bytes at all.
    #[error("path is empty")]
    Empty,
    /// More than 4095 bytes.
    #[error("path is longer than 4095 bytes")]
    TooLong,
    /// More than 1024 components.
    #[error("path has more than 1024 components")]
    TooDeep,
    /// A component of more than 255 bytes.
    #[error("path has a component longer than 255 bytes")]
    NameTooLong,
    /// Readers disagree about what is left of a `..` behind a link.
    #[error("path has a '..' component")]
    Parent,
    /// A NUL byte.
    #[error("path has a NUL byte")]
    Nul,
}

/// Drops leading slashes, empty components and `.`; the result is empty for the root itself.
pub(crate) fn clean(bytes: &[u8]) -> Result<PathBuf, PathError> {
    if bytes.is_empty() {
        return Err(PathError::Empty);
    }
    if bytes.len() > MAX_PATH {
        return Err(PathError::TooLong);
    }
    if bytes.contains(&0) {
        return Err(PathError::Nul);
    }
    let mut path = Vec::with_capacity(bytes.len());
    let mut depth = 0;
    for component in bytes.split(|&b| b == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(PathError::Parent),
            _ if component.len() > MAX_NAME => return Err(PathError::NameTooLong),
            _ => {}
        }
        depth += 1;
        if depth > MAX_DEPTH {
            return Err(PathError::TooDeep);
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(component);
    }
    Ok(PathBuf::from(OsString::from_vec(path)))
}

/// Splits a clean path into the directory and the last component; `None` for the root.
pub(crate) fn split(path: &Path) -> Option<(&Path, &OsStr)> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return None;
    }
    let (parent, name) = match bytes.iter().rposition(|&b| b == b'/') {
        None => (&b""[..], bytes),
        Some(slash) => (bytes.get(..slash)?, bytes.get(slash + 1..)?),
    };
    Some((Path::new(OsStr::from_bytes(parent)), OsStr::from_bytes(name)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_become_relative_and_clean() {
        for (bytes, wanted) in [
            (&b"a/b"[..], "a/b"),
            (b"./a//b/./c/", "a/b/c"),
            (b"/a", "a"),
            (b"//", ""),
            (b".", ""),
            (b"./", ""),
            (b" ", " "),
            (b"...", "..."),
            (b"a/..b", "a/..b"),
        ] {
            assert_eq!(clean(bytes), Ok(PathBuf::from(wanted)), "{:?}", bytes.escape_ascii().to_string());
        }
        assert_eq!(clean(b"\xff/\n").unwrap().as_os_str().as_bytes(), b"\xff/\n");
    }

    #[test]
    fn odd_paths_are_refused() {
        let deep = b"a/".repeat(1025);
        for (bytes, why) in [
            (b"".to_vec(), PathError::Empty),
            (b"..".to_vec(), PathError::Parent),
            (b"a/../b".to_vec(), PathError::Parent),
            (b"/..".to_vec(), PathError::Parent),
            (b"a\0b".to_vec(), PathError::Nul),
            (vec![b'a'; 256], PathError::NameTooLong),
            (b"ab/".repeat(1366), PathError::TooLong),
            (deep, PathError::TooDeep),
        ] {
            assert_eq!(clean(&bytes), Err(why));
        }
        assert!(clean(&vec![b'a'; 255]).is_ok());
        assert!(clean(&b"a/".repeat(1024)).is_ok());
    }

    #[test]
    fn split_takes_the_last_component() {
        assert_eq!(split(Path::new("")), None);
        assert_eq!(split(Path::new("a")), Some((Path::new(""), OsStr::new("a"))));
        assert_eq!(split(Path::new("a/b/c")), Some((Path::new("a/b"), OsStr::new("c"))));
    }

    proptest! {
        #[test]
        fn a_clean_path_has_only_plain_components(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(path) = clean(&bytes) {
                prop_assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
                prop_assert!(path.is_relative());
                if !path.as_os_str().is_empty() {
                    prop_assert_eq!(clean(path.as_os_str().as_bytes()), Ok(path.clone()));
                }
            }
        }
    }
}
