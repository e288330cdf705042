//! What the daemon and a shim say to each other, and the exit record that a shim leaves on disk.
//!
//! The messages are protobuf (prost), so that a daemon of one version talks to shims of another:
//! fields are only added, numbers never used again. The page `docs/shim-protocol.md` draws the
//! wire.
//!
//! - `frame`: how a message becomes bytes on the socket;
//! - `launch`: the plan of a container, everything that a shim has to know to start it;
//! - `control`: requests, replies and events;
//! - `exit_record`: the file that says how a container ended.
#![forbid(unsafe_code)]

pub mod control;
pub mod exit_record;
pub mod frame;
pub mod launch;

/// The name of a shim's socket in its container's runtime directory.
pub const SOCKET: &str = "shim.sock";

/// The name of the process that writes a container's log, a child of its shim: `proc_pid_comm(5)`.
pub const LOG_WRITER: &str = "berth-shim-log";
