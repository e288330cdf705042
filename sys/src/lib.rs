//! Thin safe wrappers over Linux: the one crate with unsafe code.
