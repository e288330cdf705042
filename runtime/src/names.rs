//! Names of sandboxes and containers, which must be unique like their ids.

use berth_model::id::SandboxId;
use berth_model::{container, sandbox};

/// A unique name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Name {
    /// Of a sandbox.
    Sandbox(sandbox::Metadata),
    /// Of a container in its sandbox.
    Container(SandboxId, container::Metadata),
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sandbox(metadata) => write!(f, "pod {metadata}"),
            Self::Container(sandbox, metadata) => {
                write!(f, "container {} (attempt {}) in sandbox {sandbox}", metadata.name, metadata.attempt)
            }
        }
    }
}

/// The name belongs to another object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} already exists, as {owner}")]
pub(crate) struct NameTaken {
    pub(crate) name: String,
    pub(crate) owner: String,
}
