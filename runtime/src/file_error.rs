//! What could not be done with which file.

use std::io;
use std::path::{Path, PathBuf};

/// An act on a file that failed.
#[derive(Debug, thiserror::Error)]
#[error("{action} {path}")]
pub struct FileError {
    /// The failed act, as `read`.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// For `map_err`: the system's error becomes one of `E` about this act and path.
    pub(crate) fn of<E: From<Self>>(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> E {
        let path = path.to_owned();
        move |source| E::from(Self { action, path, source })
    }
}
