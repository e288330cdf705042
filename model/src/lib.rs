//! Plain data about pods: ids, configurations, states and their transitions, records on disk, and
//! paths of files.
//!
//! No I/O, no async, no CRI types: the daemon converts at its edge (`runtime::cri`), and everything
//! behind the edge speaks these types.
//!
//! - `id`: the ids of sandboxes and containers;
//! - `sandbox`, `container`, `security`: configurations;
//! - `limit`: limits on requests;
//! - `state`: states, events and the transition functions;
//! - `record`: their form on disk;
//! - `layout`: every path below the two roots;
//! - `text`: untrusted text, escaped for people.
#![forbid(unsafe_code)]

pub mod container;
pub mod id;
pub mod layout;
pub mod limit;
pub mod record;
pub mod sandbox;
pub mod security;
pub mod state;
pub mod text;
