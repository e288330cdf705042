//! The one error of the shim: a step that failed, as it is sent to the daemon.

use std::fmt::Display;
use std::io;

use berth_shim_proto::control::Failed;

/// Adds the step of a failed operation, for the daemon.
pub(crate) trait Step<T> {
    /// `step` follows the word "cannot"; `about` is a path or name, empty for none.
    fn step(self, step: &str, about: impl Display) -> Result<T, Failed>;
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, step: &str, about: impl Display) -> Result<T, Failed> {
        self.map_err(|error| from_io(&error, step, about))
    }
}

/// An error of the kernel in the step `step`.
pub(crate) fn from_io(error: &io::Error, step: &str, about: impl Display) -> Failed {
    let about = about.to_string();
    match error.raw_os_error() {
        Some(errno) => Failed { step: step.to_owned(), errno, detail: about },
        None if about.is_empty() => Failed { step: step.to_owned(), errno: 0, detail: error.to_string() },
        None => Failed { step: step.to_owned(), errno: 0, detail: format!("{about}: {error}") },
    }
}

/// A failure that is not the kernel's: the plan or the image is invalid.
pub(crate) fn refused(step: &str, detail: impl Display) -> Failed {
    Failed { step: step.to_owned(), errno: 0, detail: detail.to_string() }
}

/// A path as text for a message, with unprintable characters escaped.
pub(crate) fn shown(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}
