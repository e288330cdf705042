//! The built-in bridge network.
