//! The states of sandboxes and containers, and the transition function of each.
//!
//! ```text
//! container:   Created --started--> Running --ended--> Exited
//!                 \-----------------ended----------------^
//!                 Removed from any of them; nothing goes back.
//! sandbox:     Ready --stopped, process ended, lost--> NotReady --removed--> (gone)
//! ```
//! Who triggers: `started` StartContainer; `ended` the shim (or the loss of it); `stopped`
//! StopPodSandbox; `process ended` the end of the pod's own process; `lost` a daemon that starts
//! after a reboot. On `ended` the cgroup is released, on `stopped` network and namespaces.

/// How a container ended, for `ContainerStatus`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255.
    pub code: i32,
    /// Nanoseconds since the epoch; 0 when its program never ran.
    pub started_at_unix_ns: i64,
    /// Nanoseconds since the epoch.
    pub finished_at_unix_ns: i64,
    /// One word: `Completed`, `Error`, `OOMKilled`, `StartError`, `Unknown`.
    pub reason: ExitReason,
    /// For people; may be empty.
    pub message: String,
}

/// `ContainerStatus.reason` of an exited container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// It exited with 0.
    Completed,
    /// It exited with another code, or a signal ended it.
    Error,
    /// The OOM killer killed in its cgroup.
    OomKilled,
    /// Its program could not be started.
    StartError,
    /// Unknown: its shim was lost.
    Unknown,
}

impl ExitReason {
    /// The word that kubelets compare.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OomKilled => "OOMKilled",
            Self::StartError => "StartError",
            Self::Unknown => "Unknown",
        }
    }
}

/// The state of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerState {
    /// Its process waits for the start.
    Created,
    /// Its program runs.
    Running {
        /// Nanoseconds since the epoch.
        started_at_unix_ns: i64,
    },
    /// It has ended.
    Exited(Exit),
}

/// What can happen to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerEvent {
    /// Its program runs since this time.
    Started {
        /// Nanoseconds since the epoch.
        at_unix_ns: i64,
    },
    /// It has ended.
    Ended(Exit),
}

impl ContainerState {
    /// The word for messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running { .. } => "running",
            Self::Exited(_) => "exited",
        }
    }
}

/// An event that is not possible in the current state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a container that is {from} cannot be {event}")]
pub struct Refused {
    /// The state that it is in.
    pub from: &'static str,
    /// The event.
    pub event: &'static str,
}

/// The state after `event`. A second end is not an error and changes nothing: the first one counts.
///
/// # Errors
/// [`Refused`] when the event cannot follow.
pub fn container_after(state: &ContainerState, event: ContainerEvent) -> Result<ContainerState, Refused> {
    match (state, event) {
        (ContainerState::Created, ContainerEvent::Started { at_unix_ns }) => {
            Ok(ContainerState::Running { started_at_unix_ns: at_unix_ns })
        }
        (ContainerState::Created | ContainerState::Running { .. }, ContainerEvent::Ended(exit)) => {
            Ok(ContainerState::Exited(exit))
        }
        (exited @ ContainerState::Exited(_), ContainerEvent::Ended(_)) => Ok(exited.clone()),
        (state, ContainerEvent::Started { .. }) => Err(Refused { from: state.name(), event: "started" }),
    }
}

/// The state of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxState {
    /// Fit for containers.
    Ready,
    /// Stopped, or lost what it needs.
    NotReady,
}

/// What can happen to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxEvent {
    /// It is to end.
    Stopped,
    /// Its own process has ended, and with it the pid namespace that its containers share.
    ProcessEnded,
    /// A new daemon finds that its namespaces or its own process are gone, as after a reboot.
    Lost,
}

/// The state after `event`. Nothing makes a sandbox ready again.
#[must_use]
pub fn sandbox_after(state: SandboxState, event: SandboxEvent) -> SandboxState {
    match (state, event) {
        (
            SandboxState::Ready | SandboxState::NotReady,
            SandboxEvent::Stopped | SandboxEvent::ProcessEnded | SandboxEvent::Lost,
        ) => SandboxState::NotReady,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exit(code: i32) -> Exit {
        Exit {
            code,
            started_at_unix_ns: 1,
            finished_at_unix_ns: 2,
            reason: ExitReason::Error,
            message: String::new(),
        }
    }

    #[test]
    fn every_pair_of_state_and_event_is_decided() {
        let running = ContainerState::Running { started_at_unix_ns: 5 };
        let exited = ContainerState::Exited(exit(1));
        let start = ContainerEvent::Started { at_unix_ns: 5 };
        let end = ContainerEvent::Ended(exit(1));
        let cases = [
            (ContainerState::Created, start.clone(), Ok(running.clone())),
            (ContainerState::Created, end.clone(), Ok(exited.clone())),
            (running.clone(), start.clone(), Err("running")),
            (running, end, Ok(exited.clone())),
            (exited.clone(), start, Err("exited")),
            (exited.clone(), ContainerEvent::Ended(exit(2)), Ok(exited)),
        ];
        for (state, event, expected) in cases {
            assert_eq!(
                container_after(&state, event.clone()).map_err(|refused| refused.from),
                expected,
                "{state:?} {event:?}"
            );
        }
    }

    #[test]
    fn a_sandbox_that_is_not_ready_stays_so() {
        for state in [SandboxState::Ready, SandboxState::NotReady] {
            for event in [SandboxEvent::Stopped, SandboxEvent::ProcessEnded, SandboxEvent::Lost] {
                assert_eq!(sandbox_after(state, event), SandboxState::NotReady, "{state:?} {event:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn nothing_comes_after_the_end(codes in prop::collection::vec(prop::option::of(0..256), 1..20)) {
            let mut state = ContainerState::Created;
            let mut first_end = None;
            for code in codes {
                let event = match code {
                    Some(code) => ContainerEvent::Ended(exit(code)),
                    None => ContainerEvent::Started { at_unix_ns: 9 },
                };
                if let Ok(next) = container_after(&state, event) {
                    state = next;
                }
                if let (ContainerState::Exited(end), None) = (&state, &first_end) {
                    first_end = Some(end.clone());
                }
                if let Some(end) = &first_end {
                    prop_assert_eq!(&state, &ContainerState::Exited(end.clone()));
                }
            }
        }
    }
}
