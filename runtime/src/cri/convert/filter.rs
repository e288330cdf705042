//! Filters of the list calls. All that is set must match; an id is matched by its beginning; nothing set matches everything.

use berth_cri::v1;
use berth_model::state::{ContainerState, SandboxState};
use std::collections::BTreeMap;

use super::{ContainerView, SandboxView};

/// `PodSandboxFilter`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SandboxFilter {
    id: String,
    /// The number in the message: one that is no state matches nothing.
    state: Option<i32>,
    labels: BTreeMap<String, String>,
}

impl SandboxFilter {
    /// The filter of a list request; an absent one lets everything through.
    #[must_use]
    pub fn new(message: Option<v1::PodSandboxFilter>) -> Self {
        let message = message.unwrap_or_default();
        Self { id: message.id, state: message.state.map(|value| value.state), labels: message.label_selector }
    }

    /// The filter of a statistics request, which has no state.
    #[must_use]
    pub fn of_stats(message: Option<v1::PodSandboxStatsFilter>) -> Self {
        let message = message.unwrap_or_default();
        Self { id: message.id, state: None, labels: message.label_selector }
    }

    /// The sandbox is one of those asked for.
    #[must_use]
    pub fn matches(&self, sandbox: &SandboxView<'_>) -> bool {
        sandbox.id.as_str().starts_with(&self.id)
            && self.state.is_none_or(|state| state == i32::from(sandbox_state(sandbox.state)))
            && has_labels(&sandbox.config.labels, &self.labels)
    }
}

/// `ContainerFilter`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerFilter {
    id: String,
    sandbox_id: String,
    /// The number in the message: one that is no state matches nothing.
    state: Option<i32>,
    labels: BTreeMap<String, String>,
}

impl ContainerFilter {
    /// The filter of a list request; an absent one lets everything through.
    #[must_use]
    pub fn new(message: Option<v1::ContainerFilter>) -> Self {
        let message = message.unwrap_or_default();
        Self {
            id: message.id,
            sandbox_id: message.pod_sandbox_id,
            state: message.state.map(|value| value.state),
            labels: message.label_selector,
        }
    }

    /// The filter of a statistics request, which has no state.
    #[must_use]
    pub fn of_stats(message: Option<v1::ContainerStatsFilter>) -> Self {
        let message = message.unwrap_or_default();
        Self {
            id: message.id,
            sandbox_id: message.pod_sandbox_id,
            state: None,
            labels: message.label_selector,
        }
    }

    /// The container is one of those asked for.
    #[must_use]
    pub fn matches(&self, container: &ContainerView<'_>) -> bool {
        container.id.as_str().starts_with(&self.id)
            && container.sandbox_id.as_str().starts_with(&self.sandbox_id)
            && self.state.is_none_or(|state| state == i32::from(container_state(container.state)))
            && has_labels(&container.config.labels, &self.labels)
    }
}

fn has_labels(labels: &BTreeMap<String, String>, asked: &BTreeMap<String, String>) -> bool {
    asked.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The number of a sandbox's state.
pub(super) fn sandbox_state(state: SandboxState) -> v1::PodSandboxState {
    match state {
        SandboxState::Ready => v1::PodSandboxState::SandboxReady,
        SandboxState::NotReady => v1::PodSandboxState::SandboxNotready,
    }
}

/// The number of a container's state.
pub(super) fn container_state(state: &ContainerState) -> v1::ContainerState {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => v1::ContainerState::ContainerRunning,
        ContainerState::Exited(_) => v1::ContainerState::ContainerExited,
    }
}
