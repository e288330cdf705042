//! Integration tests' fixtures.
#![forbid(unsafe_code)]

pub mod cgroup;
pub mod deadline;
pub mod kubelet;
pub mod peer;
pub mod skip;
