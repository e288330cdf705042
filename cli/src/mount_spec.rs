//! `SRC:DST[:OPTIONS]`, the text form of a mount.
//!
//! Pure parsing; `run` checks that the source exists.

use std::path::{Path, PathBuf};

use berth_cri::v1::MountPropagation;

/// A host path to mount in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountSpec {
    /// Path on the host; may be relative to the current directory.
    pub(crate) source: PathBuf,
    /// Absolute path in the container.
    pub(crate) target: String,
    /// Whether it is read-only.
    pub(crate) readonly: bool,
    /// Its propagation.
    pub(crate) propagation: MountPropagation,
}

/// Why a text is not a mount.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum MountSpecError {
    /// A part is missing or empty, or there are too many.
    #[error("`{0}` is not a mount; use SOURCE:TARGET or SOURCE:TARGET:OPTIONS")]
    Form(String),
    /// The target is relative, or contains `..`.
    #[error("the target `{0}` of a mount must be an absolute path without `..`")]
    Target(String),
    /// No such option.
    #[error("`{0}` is not a mount option; use ro, rw, rprivate, rslave or rshared")]
    Option(String),
}

impl std::str::FromStr for MountSpec {
    type Err = MountSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || MountSpecError::Form(text.to_owned());
        let mut parts = text.split(':');
        let (source, target) = parts.next().zip(parts.next()).ok_or_else(form)?;
        let options = parts.next().unwrap_or("rw");
        if source.is_empty() || target.is_empty() || text.contains('\0') || parts.next().is_some() {
            return Err(form());
        }
        if !target.starts_with('/') || Path::new(target).components().any(|part| part.as_os_str() == "..") {
            return Err(MountSpecError::Target(target.to_owned()));
        }
        let mut mount = Self {
            source: PathBuf::from(source),
            target: target.to_owned(),
            readonly: false,
            propagation: MountPropagation::PropagationPrivate,
        };
        for option in options.split(',') {
            match option {
                "ro" => mount.readonly = true,
                "rw" => mount.readonly = false,
                "rprivate" => mount.propagation = MountPropagation::PropagationPrivate,
                "rslave" => mount.propagation = MountPropagation::PropagationHostToContainer,
                "rshared" => mount.propagation = MountPropagation::PropagationBidirectional,
                unknown => return Err(MountSpecError::Option(unknown.to_owned())),
            }
        }
        Ok(mount)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(source: &str, target: &str, readonly: bool, propagation: MountPropagation) -> MountSpec {
        MountSpec { source: source.into(), target: target.into(), readonly, propagation }
    }

    #[test]
    fn mounts_are_read() {
        use MountPropagation::{PropagationHostToContainer, PropagationPrivate};
        for (text, expected) in [
            ("/a:/b", mount("/a", "/b", false, PropagationPrivate)),
            ("/a:/b:ro", mount("/a", "/b", true, PropagationPrivate)),
            ("/a:/b:rw", mount("/a", "/b", false, PropagationPrivate)),
            ("a b:/c d:ro,rslave", mount("a b", "/c d", true, PropagationHostToContainer)),
            ("../up:/b", mount("../up", "/b", false, PropagationPrivate)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_mount_is_refused() {
        for text in ["", ":", "/a", "/a:", ":/b", "::", "/a:/b:ro:x", "/a\0:/b"] {
            assert_eq!(text.parse::<MountSpec>(), Err(MountSpecError::Form(text.into())), "{text:?}");
        }
        for (text, target) in [("/a:b", "b"), ("/a:/b/../../c", "/b/../../c"), ("/a: /b", " /b")] {
            assert_eq!(text.parse::<MountSpec>(), Err(MountSpecError::Target(target.into())), "{text:?}");
        }
        for (text, option) in [("/a:/b:", ""), ("/a:/b:RO", "RO"), ("/a:/b:ro,z", "z")] {
            assert_eq!(text.parse::<MountSpec>(), Err(MountSpecError::Option(option.into())), "{text:?}");
        }
    }
}
