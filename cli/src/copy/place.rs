//! One side of a copy as written: `CONTAINER:PATH`, a local path, or `-` for a stream.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The source or destination of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A path on this machine.
    Here(PathBuf),
    /// A path in a container.
    Container {
        /// The container's name.
        name: String,
        /// The path from its root.
        path: PathBuf,
    },
    /// An archive on standard input or output.
    Stream,
}

impl Place {
    /// Parses an argument. A local path with a colon must begin with `/` or `.`.
    pub(crate) fn of(argument: OsString) -> Result<Self, Infallible> {
        let bytes = argument.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        let (Some(colon), false) = (colon, matches!(bytes.first(), Some(b'/' | b'.' | b':'))) else {
            return Ok(Self::Here(argument.into()));
        };
        let (name, path) =
            (bytes.get(..colon).unwrap_or_default(), bytes.get(colon + 1..).unwrap_or_default());
        let Ok(name) = std::str::from_utf8(name) else { return Ok(Self::Here(argument.into())) };
        let path = PathBuf::from("/").join(OsStr::from_bytes(path));
        Ok(Self::Container { name: name.to_owned(), path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let inside = |name: &str, path: &str| Place::Container { name: name.into(), path: path.into() };
        for (argument, expected) in [
            ("-", Place::Stream),
            ("web:/etc/hosts", inside("web", "/etc/hosts")),
            ("web/main:tmp/.", inside("web/main", "/tmp/.")),
            ("web:", inside("web", "/")),
            ("web:a:b", inside("web", "/a:b")),
            ("file", Place::Here("file".into())),
            ("./a:b", Place::Here("./a:b".into())),
            ("/a:b", Place::Here("/a:b".into())),
            (":x", Place::Here(":x".into())),
            ("", Place::Here("".into())),
        ] {
            assert_eq!(Place::of(argument.into()), Ok(expected), "{argument}");
        }
    }
}
