//! The streaming side of the CRI: exec, attach and port forwarding, from the wire formats up to a
//! server.
//!
//! A CRI call stores the task under a [`Token`](tokens::Tokens) and answers with a URL. The client
//! connects there by HTTP/1.1 and upgrades to SPDY/3.1 or WebSocket:
//!
//! ```text
//!  tokens   what a URL stands for: once, for a minute
//!  server   connections, the request, the answer 101          -> upgrade: which protocol
//!  command  exec and attach: streams, sizes, status           -> spdy, or websocket
//!  forward  port forwarding: pairs of streams, connections    -> spdy, also in a websocket
//! ```
//! `budget` bounds what one client can make the server hold; `hangup` and `vanished` notice that it
//! is gone, and `activity` that it is silent. `client` is the other end of a URL, over SPDY.
//!
//! Nothing in this crate belongs to the daemon, which passes in what runs a command on streams
//! ([`command::Run`]) and what connects to a port ([`forward::Connect`]).
#![forbid(unsafe_code)]

mod activity;
mod budget;
pub mod client;
pub mod command;
pub mod forward;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod hangup;
pub mod server;
pub mod spdy;
pub mod tokens;
mod upgrade;
pub mod vanished;
mod websocket;

use std::time::Duration;

/// How long a client may take to open the streams that it has requested. Kubernetes' own server has
/// the same limit.
pub const STREAMS_WITHIN: Duration = Duration::from_secs(30);

/// How long an idle connection lives. Kubernetes' own server has the same limit.
pub const IDLE: Duration = Duration::from_secs(4 * 3600);

/// How long one forwarded connection may hold up the others of its client when its port reads
/// nothing. A port that is slow reads a little in that time.
pub const STALL: Duration = Duration::from_secs(10);

/// How long a client may take to close after all output of its command has been written: handed to
/// the kernel, which continues to send it after the connection has been closed.
pub const LINGER: Duration = Duration::from_secs(10);

/// How often a client whose input is not read is sent a ping. One that has closed the connection
/// answers with a reset; its close itself comes only behind the input.
pub const PROBE: Duration = Duration::from_secs(10);

/// How long a command whose client has left may take to read what came before.
pub const LEAVING: Duration = Duration::from_secs(1);
