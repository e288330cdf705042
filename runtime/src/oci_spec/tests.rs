//! The specs of containers, by what was asked for.
