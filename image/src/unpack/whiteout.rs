//! Whiteout names: how a layer says that something of a lower layer is gone.
//!
//! `.wh.<name>` hides `<name>`; `.wh..wh..opq` hides everything that lower layers have in its
//! directory (OCI image-spec 1.1, layer.md, "Whiteouts"). Only the last component of a path may be
//! one.

/// Prefix of all names with a special meaning.
const PREFIX: &[u8] = b".wh.";

/// The opaque marker.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Prefix of AUFS's own files, which mean nothing elsewhere: old layers have them (`.wh..wh.aufs`,
/// `.wh..wh.plnk/`).
const AUFS: &[u8] = b".wh..wh.";

/// What a name means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name<'a> {
    /// Just a name.
    Plain,
    /// Hides this name of the lower layers.
    Whiteout(&'a [u8]),
    /// Hides all that lower layers have in the directory.
    Opaque,
    /// Bookkeeping of AUFS: no part of the image.
    Aufs,
}

/// A name that starts as a whiteout does and is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WhiteoutError {
    /// Nothing, `.` or `..` after the prefix: would hide the directory itself or its parent.
    #[error("a whiteout without the name of an entry")]
    NoTarget,
    /// `.wh.` in a component that is not the last.
    #[error("a whiteout is used as a directory")]
    Directory,
}

/// Says what the last component of a path means.
pub(crate) fn classify(name: &[u8]) -> Result<Name<'_>, WhiteoutError> {
    if name == OPAQUE {
        return Ok(Name::Opaque);
    }
    if is_aufs(name) {
        return Ok(Name::Aufs);
    }
    match name.strip_prefix(PREFIX) {
        None => Ok(Name::Plain),
        Some(b"" | b"." | b"..") => Err(WhiteoutError::NoTarget),
        Some(target) => Ok(Name::Whiteout(target)),
    }
}

/// Whether a component is bookkeeping of AUFS, and with it all that is below.
pub(crate) fn is_aufs(name: &[u8]) -> bool {
    name.starts_with(AUFS) && name != OPAQUE
}

/// Checks a component that is not the last one.
pub(crate) fn check_directory(name: &[u8]) -> Result<(), WhiteoutError> {
    if name.starts_with(PREFIX) { Err(WhiteoutError::Directory) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_told_apart() {
        for (name, meaning) in [
            (&b"a"[..], Ok(Name::Plain)),
            (b".wh", Ok(Name::Plain)),
            (b"wh.a", Ok(Name::Plain)),
            (b".WH.a", Ok(Name::Plain)),
            (b"a.wh.b", Ok(Name::Plain)),
            (b".wh.a", Ok(Name::Whiteout(b"a"))),
            (b".wh.\xff", Ok(Name::Whiteout(b"\xff"))),
            (b".wh....", Ok(Name::Whiteout(b"..."))),
            (b".wh..a", Ok(Name::Whiteout(b".a"))),
            (b".wh..wh", Ok(Name::Whiteout(b".wh"))),
            (b".wh..wh..opq", Ok(Name::Opaque)),
            (b".wh.", Err(WhiteoutError::NoTarget)),
            (b".wh..", Err(WhiteoutError::NoTarget)),
            (b".wh...", Err(WhiteoutError::NoTarget)),
            (b".wh..wh.", Ok(Name::Aufs)),
            (b".wh..wh..opq2", Ok(Name::Aufs)),
            (b".wh..wh.plnk", Ok(Name::Aufs)),
        ] {
            assert_eq!(classify(name), meaning, "{:?}", name.escape_ascii().to_string());
        }
        assert_eq!(check_directory(b".wh.a"), Err(WhiteoutError::Directory));
        assert_eq!(check_directory(b"a"), Ok(()));
    }

    proptest! {
        #[test]
        fn a_whiteout_never_hides_its_own_directory_or_parent(name in proptest::collection::vec(any::<u8>(), 0..20)) {
            let whiteout = [PREFIX, &name].concat();
            if let Ok(Name::Whiteout(target)) = classify(&whiteout) {
                prop_assert!(!matches!(target, b"" | b"." | b".."));
                prop_assert!(!target.starts_with(PREFIX));
            }
        }
    }
}
