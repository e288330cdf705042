//! Sandboxes and containers as they were at one moment, as plain data: for events, whose readers
//! come later.
//!
//! What never changes is shared with the object itself, so a snapshot is small.

use std::sync::Arc;

use berth_model::container::Resources;
use berth_model::id::SandboxId;
use berth_model::record::ContainerRecord;
use berth_model::sandbox::Config;
use berth_model::state::{ContainerState, SandboxState};

/// A sandbox at one moment.
#[derive(Debug, Clone)]
pub(crate) struct SandboxSnapshot {
    pub(crate) id: SandboxId,
    pub(crate) config: Arc<Config>,
    pub(crate) created_at_unix_ns: i64,
    /// The primary address first; empty with the host's network.
    pub(crate) addresses: Arc<[String]>,
    pub(crate) state: SandboxState,
}

/// A container at one moment.
#[derive(Debug, Clone)]
pub(crate) struct ContainerSnapshot {
    pub(crate) record: Arc<ContainerRecord>,
    /// The limits in force, if they are not those in the record.
    pub(crate) resources: Option<Resources>,
    pub(crate) state: ContainerState,
}

/// A whole pod at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct PodSnapshot {
    /// `None` for a sandbox that is not known.
    pub(crate) sandbox: Option<SandboxSnapshot>,
    /// Its containers, the newest first.
    pub(crate) containers: Vec<ContainerSnapshot>,
}
