//! The CRI edge: the only module that names CRI messages.

pub mod convert;
