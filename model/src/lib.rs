//! Plain data about pods: ids, what was asked for, states and their transitions, records on disk,
//! and where files lie.
//!
//! No I/O, no async, no CRI types: the daemon converts at its edge (`runtime::cri`), and everything
//! behind the edge speaks these types.
//!
//! - `id`: the ids of sandboxes and containers;
//! - `sandbox`, `container`, `security`: what was asked for;
//! - `limit`: how much may be asked for;
//! - `state`: states, events and the transition functions;
//! - `record`: how the above lies on disk;
//! - `layout`: every path below the two roots;
//! - `text`: text of strangers for people to read.
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
