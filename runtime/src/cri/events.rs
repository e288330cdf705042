//! `GetContainerEvents`: a stream without an end of what happens to containers and sandboxes, for a
//! kubelet with evented PLEG and for `crictl events`.
//!
//! A client that reads too slowly gets an error once it has missed events, and has to list
//! everything again, as after any other end of the stream; the CRI has no message for that. Until
//! then it costs its place in the queue and what HTTP/2 lets it leave unread.

use berth_cri::v1;
use berth_cri::v1::ContainerEventType as Kind;
use futures_util::{StreamExt as _, stream};
use tonic::Status;

use super::container::with_view;
use super::convert;
use super::error::{CallError, failed};
use super::pages::Items;
use super::runtime_service::RuntimeService;
use super::sandbox::view;
use crate::events::{ContainerChange, Event, Missed, SandboxChange, What};

impl RuntimeService {
    pub(super) fn get_container_events(
        &self,
        _request: v1::GetEventsRequest,
    ) -> Result<Items<v1::ContainerEventResponse>, CallError> {
        let subscription = self.node.events.subscribe().ok_or(CallError::Stopping)?;
        let messages = stream::unfold(Some(subscription), async |subscription| {
            let mut subscription = subscription?;
            let error = match subscription.next().await {
                Some(Ok(event)) => return Some((messages(&event), Some(subscription))),
                Some(Err(Missed(missed))) => CallError::MissedEvents { missed },
                None => CallError::Stopping,
            };
            Some((vec![Err(failed("GetContainerEvents", &error))], None))
        });
        Ok(Box::pin(messages.flat_map(stream::iter)))
    }
}

/// An event as the CRI has it: none, one or two messages.
fn messages(event: &Event) -> Vec<Result<v1::ContainerEventResponse, Status>> {
    let (id, kinds) = match &event.what {
        What::Sandbox(sandbox, change) => (sandbox.id.as_str(), kinds_of_sandbox(*change)),
        What::Container(record, change) => (record.id.as_str(), kinds_of_container(change)),
    };
    let message = |kind: &Kind| v1::ContainerEventResponse {
        container_id: id.to_owned(),
        container_event_type: (*kind).into(),
        created_at: event.at_unix_ns,
        pod_sandbox_status: event.pod.sandbox.as_ref().map(|sandbox| convert::sandbox_status(&view(sandbox))),
        containers_statuses: event
            .pod
            .containers
            .iter()
            .map(|container| with_view(container, convert::container_status))
            .collect(),
    };
    kinds.iter().map(|kind| Ok(message(kind))).collect()
}

/// A sandbox of other runtimes is a container that is created and then started. Ours is both at
/// once, and counts as stopped when it is not ready and a stop has ended its containers, whatever
/// it has to release after that.
fn kinds_of_sandbox(change: SandboxChange) -> &'static [Kind] {
    match change {
        SandboxChange::Ready => &[Kind::ContainerCreatedEvent, Kind::ContainerStartedEvent],
        SandboxChange::NotReady(_) => &[Kind::ContainerStoppedEvent],
        SandboxChange::Stopped => &[],
        SandboxChange::Removed => &[Kind::ContainerDeletedEvent],
    }
}

fn kinds_of_container(change: &ContainerChange) -> &'static [Kind] {
    match change {
        ContainerChange::Created => &[Kind::ContainerCreatedEvent],
        ContainerChange::Started => &[Kind::ContainerStartedEvent],
        ContainerChange::Ended(_) => &[Kind::ContainerStoppedEvent],
        ContainerChange::Removed => &[Kind::ContainerDeletedEvent],
    }
}
