//! A layer as a container's root filesystem is made from it.

use std::path::PathBuf;

/// A layer, or a patch, in the form that it has on disk. A mount depends on the form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredLayer {
    /// An unpacked tree, which overlayfs takes as a lower directory.
    Directory(PathBuf),
}
