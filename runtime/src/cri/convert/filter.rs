//! Filters of the list calls. All set fields must match; an id is matched by prefix; an empty
//! filter matches everything.

use std::collections::BTreeMap;

use berth_cri::v1;

use super::status::{ContainerView, SandboxView, container_state, sandbox_state};

/// `PodSandboxFilter`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SandboxFilter {
    id: String,
    /// The number in the message: an unknown state matches nothing.
    state: Option<i32>,
    labels: BTreeMap<String, String>,
}

impl SandboxFilter {
    /// The filter of a list request; an absent one matches everything.
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

    /// Whether the sandbox matches.
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
    /// The number in the message: an unknown state matches nothing.
    state: Option<i32>,
    labels: BTreeMap<String, String>,
}

impl ContainerFilter {
    /// The filter of a list request; an absent one matches everything.
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

    /// Whether the container matches.
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

#[cfg(test)]
mod tests {
    use berth_model::id::{ContainerId, SandboxId};
    use berth_model::state::{ContainerState, SandboxState};
    use berth_model::{container, sandbox};

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_sandbox_matches_when_all_that_is_set_does() {
        let id = SandboxId::from_bytes([0xab; 32]);
        let config = sandbox::Config { labels: labels(&[("a", "1"), ("b", "")]), ..Default::default() };
        let view = SandboxView {
            id: &id,
            config: &config,
            created_at_unix_ns: 1,
            state: SandboxState::NotReady,
            addresses: &[],
        };
        assert!(SandboxFilter::new(None).matches(&view));
        let full = "ab".repeat(32);
        let long = "ab".repeat(33);
        type Case<'a> = (&'a str, Option<i32>, &'a [(&'a str, &'a str)], bool);
        let cases: &[Case<'_>] = &[
            ("", None, &[], true),
            ("ab", None, &[], true),
            (&full, Some(1), &[("a", "1"), ("b", "")], true),
            (&long, None, &[], false),
            ("b", None, &[], false),
            ("AB", None, &[], false),
            ("", Some(0), &[], false),
            ("", Some(9), &[], false),
            ("", None, &[("a", "2")], false),
            ("", None, &[("a", "")], false),
            ("", None, &[("c", "")], false),
            ("ab", Some(1), &[("a", "1"), ("c", "")], false),
        ];
        for (id, state, pairs, expected) in cases {
            let filter = SandboxFilter::new(Some(v1::PodSandboxFilter {
                id: (*id).into(),
                state: state.map(|state| v1::PodSandboxStateValue { state }),
                label_selector: labels(pairs),
            }));
            assert_eq!(filter.matches(&view), *expected, "{filter:?}");
        }
        let stats = |id: &str, pairs| {
            let message = v1::PodSandboxStatsFilter { id: id.into(), label_selector: labels(pairs) };
            SandboxFilter::of_stats(Some(message)).matches(&view)
        };
        assert!(stats("ab", &[("a", "1")]));
        assert!(!stats("b", &[]) && !stats("", &[("a", "2")]));
    }

    #[test]
    fn a_container_matches_when_all_that_is_set_does() {
        let (id, sandbox_id) = (ContainerId::from_bytes([0xcd; 32]), SandboxId::from_bytes([0xab; 32]));
        let config = container::Config { labels: labels(&[("a", "1")]), ..Default::default() };
        let view = ContainerView {
            id: &id,
            sandbox_id: &sandbox_id,
            config: &config,
            image_id: "i",
            image_name: "",
            image_ref: "",
            created_at_unix_ns: 1,
            state: &ContainerState::Running { started_at_unix_ns: 1 },
            log_path: "",
            uid: 0,
            gid: 0,
            groups: &[],
            stop_signal: 15,
        };
        assert!(ContainerFilter::new(None).matches(&view));
        type Case<'a> = (&'a str, &'a str, Option<i32>, &'a [(&'a str, &'a str)], bool);
        let cases: &[Case<'_>] = &[
            ("", "", None, &[], true),
            ("cd", "ab", Some(1), &[("a", "1")], true),
            ("ab", "", None, &[], false),
            ("", "cd", None, &[], false),
            ("", "", Some(0), &[], false),
            ("", "", Some(3), &[], false),
            ("", "", None, &[("a", "1"), ("b", "1")], false),
        ];
        for (id, sandbox, state, pairs, expected) in cases {
            let filter = ContainerFilter::new(Some(v1::ContainerFilter {
                id: (*id).into(),
                state: state.map(|state| v1::ContainerStateValue { state }),
                pod_sandbox_id: (*sandbox).into(),
                label_selector: labels(pairs),
            }));
            assert_eq!(filter.matches(&view), *expected, "{filter:?}");
        }
        let stats = |id: &str, sandbox: &str, pairs| {
            let message = v1::ContainerStatsFilter {
                id: id.into(),
                pod_sandbox_id: sandbox.into(),
                label_selector: labels(pairs),
            };
            ContainerFilter::of_stats(Some(message)).matches(&view)
        };
        assert!(stats("c", "a", &[("a", "1")]));
        assert!(!stats("", "c", &[]) && !stats("a", "", &[]) && !stats("", "", &[("a", "2")]));
    }
}
