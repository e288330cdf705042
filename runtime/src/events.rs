//! Events of sandboxes and containers: each change passes here once, when it happens, and those of
//! one object in order. The only observer is the log.
//!
//! What an event says can be seen: an object is in the lists when it is reported as created or
//! ready, and a program that has ended was reported as started before, however short its life.
//!
//! State that a daemon merely discovers, such as that left by a previous daemon, is not an event.

use berth_model::id::{ContainerId, SandboxId};
use berth_model::sandbox::Metadata;
use berth_model::state::{Exit, SandboxEvent};

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
    /// It takes no more containers: it is being stopped, or its first process has ended.
    NotReady(SandboxEvent),
    /// Everything that it held was released.
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

/// Notifies all observers.
pub(crate) fn tell(event: Event<'_>) {
    match event {
        Event::Sandbox { id, pod, change } => match change {
            SandboxChange::Ready => tracing::info!(sandbox = %id, %pod, "sandbox ready"),
            SandboxChange::NotReady(SandboxEvent::Stopped) => {
                tracing::debug!(sandbox = %id, %pod, "sandbox not ready: it is being stopped");
            }
            SandboxChange::NotReady(SandboxEvent::ProcessEnded) => {
                tracing::warn!(sandbox = %id, %pod, "sandbox not ready: its first process ended");
            }
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

/// For tests: the events, in order.
#[cfg(test)]
pub(crate) mod heard {
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Dispatch, Event, Metadata, Subscriber};

    type BeforeHearing = Box<dyn Fn(&str) + Send + Sync>;

    /// Records the events of the threads on which it is the dispatch. `before` runs first, in the
    /// same thread.
    #[derive(Clone)]
    pub(crate) struct Heard(Arc<(Mutex<Vec<String>>, BeforeHearing)>);

    impl Heard {
        pub(crate) fn new(before: impl Fn(&str) + Send + Sync + 'static) -> Self {
            Self(Arc::new((Mutex::default(), Box::new(before))))
        }

        pub(crate) fn dispatch(&self) -> Dispatch {
            Dispatch::new(self.clone())
        }

        pub(crate) fn all(&self) -> Vec<String> {
            self.0.0.lock().unwrap().clone()
        }
    }

    struct Message(String);

    impl Visit for Message {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            if field.name() == "message" {
                self.0 = format!("{value:?}");
            }
        }
    }

    impl Subscriber for Heard {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, event: &Event<'_>) {
            if event.metadata().target() != "berth_runtime::events" {
                return;
            }
            let mut message = Message(String::new());
            event.record(&mut message);
            (self.0.1)(&message.0);
            self.0.0.lock().unwrap().push(message.0);
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }
}
