//! Events of sandboxes and containers: every change is reported here once, when it happens.
//!
//! Whoever wants to know subscribes ([`Events::subscribe`]); the log is always written. What an
//! event says can be seen: an object is in the lists when it is reported as created or ready, and a
//! program that has ended was reported as started before, however short its life. The events of one
//! object come in the order of its changes, and their times rise.
//!
//! Subscribers share a queue of [`CAPACITY`] events. One that falls behind by more is told how many
//! it missed; nothing waits for it, and no more is kept for it. Without subscribers a change only
//! costs its line in the log.
//!
//! State that a daemon merely finds is not an event, with one exception: an end that came while no
//! daemon was running is reported by the daemon that finds it, unless an earlier one has. The files
//! [`untold`](berth_model::layout::ContainerFiles::untold) say which.

use std::fmt;
use std::sync::{Arc, Mutex};

use berth_model::id::SandboxId;
use berth_model::record::ContainerRecord;
use berth_model::state::{Exit, SandboxEvent};
use tokio::sync::broadcast::{self, error::RecvError};

use crate::clock::unix_ns;
use crate::lock;
use crate::snapshot::{PodSnapshot, SandboxSnapshot};

/// How many events a subscriber may be behind. A node has some hundred containers, and each event
/// shares with them most of what it holds.
const CAPACITY: usize = 1024;

/// A change of one object.
#[derive(Debug)]
pub(crate) struct Event {
    /// Nanoseconds since the epoch; later than every event before.
    pub(crate) at_unix_ns: i64,
    pub(crate) what: What,
    /// The pod right after the change.
    pub(crate) pod: PodSnapshot,
}

/// What changed, and how.
#[derive(Debug)]
pub(crate) enum What {
    /// A sandbox, as it is now.
    Sandbox(SandboxSnapshot, SandboxChange),
    /// A container.
    Container(Arc<ContainerRecord>, ContainerChange),
}

/// What happened to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SandboxChange {
    /// It was created.
    Ready,
    /// It takes no more containers.
    NotReady(SandboxEvent),
    /// Everything that it held was released.
    Stopped,
    /// It was removed.
    Removed,
}

/// What happened to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ContainerChange {
    /// It was created.
    Created,
    /// Its program is running.
    Started,
    /// Its program has ended.
    Ended(Exit),
    /// It was removed.
    Removed,
}

/// Where changes are reported, and subscribed to.
#[derive(Clone)]
pub(crate) struct Events(Arc<Inner>);

struct Inner {
    pod: Box<dyn Fn(&SandboxId) -> PodSnapshot + Send + Sync>,
    queue: Mutex<Queue>,
}

struct Queue {
    last_unix_ns: i64,
    /// `None` once the daemon is stopping.
    sender: Option<broadcast::Sender<Arc<Event>>>,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// Events with a snapshot of their pod by `pod`, which must not block.
    pub(crate) fn new(pod: impl Fn(&SandboxId) -> PodSnapshot + Send + Sync + 'static) -> Self {
        let sender = Some(broadcast::Sender::new(CAPACITY));
        let queue = Mutex::new(Queue { last_unix_ns: 0, sender });
        Self(Arc::new(Inner { pod: Box::new(pod), queue }))
    }

    /// Reports a change that can be seen already. The caller orders the changes of one object.
    pub(crate) fn report(&self, what: What) {
        self.report_if(what, || true);
    }

    /// Lets a change become visible by `happen`, and reports it if that returns `true`; returns the
    /// same. No other event comes in between, so that of two removals the first is reported first.
    /// `happen` must not block.
    pub(crate) fn report_if(&self, what: What, happen: impl FnOnce() -> bool) -> bool {
        let mut queue = lock(&self.0.queue);
        if !happen() {
            return false;
        }
        let is_awaited = queue.sender.as_ref().is_some_and(|sender| sender.receiver_count() > 0);
        if !is_awaited {
            drop(queue);
            log(&what);
            return true;
        }
        let pod = match &what {
            What::Sandbox(sandbox, _) => {
                PodSnapshot { sandbox: Some(sandbox.clone()), ..(self.0.pod)(&sandbox.id) }
            }
            What::Container(record, _) => (self.0.pod)(&record.sandbox_id),
        };
        // After the states in it, which clocks may set back.
        queue.last_unix_ns = unix_ns().max(queue.last_unix_ns + 1);
        let event = Arc::new(Event { at_unix_ns: queue.last_unix_ns, what, pod });
        if let Some(sender) = &queue.sender {
            // The last subscriber may have just gone.
            let _ = sender.send(event.clone());
        }
        drop(queue);
        log(&event.what);
        true
    }

    /// All events from now on; `None` once the daemon is stopping.
    pub(crate) fn subscribe(&self) -> Option<Subscription> {
        lock(&self.0.queue).sender.as_ref().map(|sender| Subscription(sender.subscribe()))
    }

    /// Ends all subscriptions, when their subscribers have read what was reported so far.
    pub(crate) fn close(&self) {
        lock(&self.0.queue).sender = None;
    }
}

/// A subscriber's place in the queue.
#[derive(Debug)]
pub(crate) struct Subscription(broadcast::Receiver<Arc<Event>>);

/// A subscriber was so far behind that this many events are no longer there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Missed(pub(crate) u64);

impl Subscription {
    /// The next event; `None` once the daemon is stopping.
    pub(crate) async fn next(&mut self) -> Option<Result<Arc<Event>, Missed>> {
        match self.0.recv().await {
            Ok(event) => Some(Ok(event)),
            Err(RecvError::Lagged(missed)) => Some(Err(Missed(missed))),
            Err(RecvError::Closed) => None,
        }
    }
}

fn log(what: &What) {
    match what {
        What::Sandbox(SandboxSnapshot { id, config, .. }, change) => {
            let pod = &config.metadata;
            match change {
                SandboxChange::Ready => tracing::info!(sandbox = %id, %pod, "sandbox ready"),
                SandboxChange::NotReady(SandboxEvent::Stopped) => {
                    tracing::debug!(sandbox = %id, %pod, "sandbox not ready: it is being stopped");
                }
                SandboxChange::NotReady(SandboxEvent::ProcessEnded) => {
                    tracing::warn!(sandbox = %id, %pod, "sandbox not ready: its first process ended");
                }
                SandboxChange::NotReady(SandboxEvent::Lost) => {
                    tracing::warn!(sandbox = %id, %pod, "sandbox not ready: its namespaces or first process are gone");
                }
                SandboxChange::Stopped => tracing::info!(sandbox = %id, %pod, "sandbox stopped"),
                SandboxChange::Removed => tracing::info!(sandbox = %id, %pod, "sandbox removed"),
            }
        }
        What::Container(record, change) => {
            let (id, sandbox, name) = (&record.id, &record.sandbox_id, &record.config.metadata.name);
            match change {
                ContainerChange::Created => {
                    tracing::info!(container = %id, name, %sandbox, "container created");
                }
                ContainerChange::Started => tracing::info!(container = %id, name, "container started"),
                ContainerChange::Ended(exit) => {
                    let (code, reason) = (exit.code, exit.reason.as_str());
                    tracing::info!(container = %id, code, reason, "container ended");
                }
                ContainerChange::Removed => tracing::info!(container = %id, name, "container removed"),
            }
        }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn change() -> What {
        What::Container(Arc::default(), ContainerChange::Started)
    }

    #[tokio::test]
    async fn a_slow_subscriber_hears_how_many_it_missed_and_a_quick_one_all() {
        let events = Events::new(|_| PodSnapshot::default());
        let (mut slow, mut quick) = (events.subscribe().unwrap(), events.subscribe().unwrap());
        let mut before = 0;
        for _ in 0..CAPACITY + 5 {
            events.report(change());
            let at = quick.next().await.unwrap().unwrap().at_unix_ns;
            assert!(at > before, "{at} after {before}");
            before = at;
        }
        assert_eq!(slow.next().await.unwrap().unwrap_err(), Missed(5));
        events.close();
        assert!(events.subscribe().is_none());
        for _ in 0..CAPACITY {
            assert!(slow.next().await.unwrap().is_ok());
        }
        assert!(slow.next().await.is_none() && quick.next().await.is_none());
    }

    #[tokio::test]
    async fn pods_are_looked_at_for_subscribers_only() {
        let looked = Arc::new(AtomicUsize::new(0));
        let count = looked.clone();
        let events = Events::new(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            PodSnapshot::default()
        });
        let looked = || looked.load(Ordering::Relaxed);
        events.report(change());
        assert_eq!(looked(), 0);
        let first = events.subscribe().unwrap();
        let mut second = events.subscribe().unwrap();
        events.report(change());
        assert_eq!(looked(), 1, "once for all of them");
        assert!(!events.report_if(change(), || false));
        assert_eq!(looked(), 1, "what did not happen is no event");
        assert!(second.next().await.is_some());
        drop((first, second));
        events.report(change());
        assert_eq!(looked(), 1, "they are gone");
    }
}
