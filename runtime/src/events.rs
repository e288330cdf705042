//! What happens to sandboxes and containers: each change passes here once, when it happens. The log is what
//! listens.
//!
//! What a daemon only learns, such as how it finds what the daemon before it has left, is no event.

use berth_model::id::{ContainerId, SandboxId};
use berth_model::sandbox::Metadata;
use berth_model::state::Exit;

/// A change of one object.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Event<'a> {
    /// Of a sandbox.
    Sandbox { id: &'a SandboxId, pod: &'a Metadata, change: SandboxChange },
    /// Of a container.
    Container { id: &'a ContainerId, sandbox: &'a SandboxId, name: &'a str, change: ContainerChange<'a> },
}

/// What happened to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SandboxChange {
    /// It was made.
    Ready,
    /// It takes no containers any more, and is about to end.
    NotReady,
    /// Everything that it held was given back.
    Stopped,
    /// It is gone.
    Removed,
}

/// What happened to a container.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ContainerChange<'a> {
    /// It was made.
    Created,
    /// Its program runs.
    Started,
    /// Its program has ended.
    Ended(&'a Exit),
    /// It is gone.
    Removed,
}

/// Tells everybody who listens.
pub(crate) fn tell(event: Event<'_>) {
    match event {
        Event::Sandbox { id, pod, change } => match change {
            SandboxChange::Ready => tracing::info!(sandbox = %id, %pod, "sandbox ready"),
            SandboxChange::NotReady => tracing::debug!(sandbox = %id, %pod, "sandbox not ready"),
            SandboxChange::Stopped => tracing::info!(sandbox = %id, %pod, "sandbox stopped"),
            SandboxChange::Removed => tracing::info!(sandbox = %id, %pod, "sandbox removed"),
        },
        Event::Container { id, sandbox, name, change } => match change {
            ContainerChange::Created => {
                tracing::info!(container = %id, name, %sandbox, "container created");
            }
            ContainerChange::Started => tracing::info!(container = %id, name, "container started"),
            ContainerChange::Ended(exit) => {
                let (code, reason) = (exit.code, exit.reason.as_str());
                tracing::info!(container = %id, code, reason, "container ended");
            }
            ContainerChange::Removed => tracing::info!(container = %id, name, "container removed"),
        },
    }
}
