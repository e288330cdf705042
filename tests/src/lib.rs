//! Fixtures of the integration tests.
#![forbid(unsafe_code)]

pub mod apparmor;
pub mod census;
pub mod cgroup;
pub mod cluster;
pub mod cni;
pub mod cri;
pub mod critest;
pub mod daemon;
pub mod deadline;
pub mod events;
pub mod forge;
pub mod fuse;
pub mod held;
pub mod host;
pub mod interrupts;
pub mod kubelet;
pub mod kubepods;
pub mod log;
pub mod node;
pub mod peer;
pub mod peers;
pub mod pod;
pub mod program;
pub mod registry;
pub mod repeats;
pub mod skip;
pub mod streams;
pub mod terminal;
pub mod tracer;
