//! The daemon.
//!
//! `docs/ARCHITECTURE.md` has the map. In short: `cri` is the edge, where requests become plain
//! data, and `api` the same for Berth's own service; `sandbox` and `container` own the objects,
//! `registry` finds them by id and name; `oci_spec` and `plan` turn a request into what a shim
//! does; `shim_client` talks to the shims; `recovery` restores what the previous daemon left.
#![forbid(unsafe_code)]

mod api;
mod apparmor;
mod atomic_file;
mod cadvisor;
mod call_deadline;
mod cgroups;
mod clock;
pub mod config;
mod container;
pub mod cri;
pub mod daemon;
mod directory_lock;
mod events;
pub mod file_error;
pub mod handlers;
mod host_directory;
pub mod host_paths;
mod housekeeping;
mod http2;
mod listener;
pub mod log;
mod log_rotation;
mod names;
mod network;
mod node;
mod notify;
pub mod oci_spec;
pub mod plan;
mod random;
mod record_files;
mod recovery;
mod registry;
pub mod reload;
pub mod reload_request;
pub mod rlimits;
mod sandbox;
mod selinux;
mod server;
mod shim_client;
mod snapshot;
mod streaming;
mod trash;
mod usage;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose value is always consistent, so that a panic elsewhere leaves it usable.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with all its causes, as one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Transparent errors repeat their cause.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
