//! Clients of `GetContainerEvents`, each with its own connection.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use berth_cri::v1;
use berth_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::runtime::Runtime;
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};

use crate::daemon::{Daemon, SOON};
use crate::deadline::patience;

/// The smallest window that HTTP/2 lets a connection begin with.
const SMALL_WINDOW: u32 = 65_535;

/// An event without the statuses in it: the object's id, and the kind of event.
pub type Brief = (String, v1::ContainerEventType);

/// A subscription. It ends when dropped, and its connection too.
#[derive(Debug)]
pub struct Events {
    stream: Streaming<v1::ContainerEventResponse>,
    tokio: Runtime,
}

impl Events {
    /// Subscribes: everything that happens after this returns is received.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn subscribe(daemon: &Daemon) -> Result<Self> {
        Self::with_window(daemon, None)
    }

    /// The same for a client that takes no more than 64 KiB before it reads.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn subscribe_and_wait(daemon: &Daemon) -> Result<Self> {
        Self::with_window(daemon, Some(SMALL_WINDOW))
    }

    fn with_window(daemon: &Daemon, bytes: Option<u32>) -> Result<Self> {
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("starting the async runtime")?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", daemon.socket().display()))
            .context("naming the socket")?
            .initial_stream_window_size(bytes)
            .initial_connection_window_size(bytes);
        let stream = tokio.block_on(async {
            let channel = endpoint.connect().await.context("connecting")?;
            let mut client = RuntimeServiceClient::new(channel);
            let answer = client.get_container_events(v1::GetEventsRequest {}).await;
            Ok::<_, anyhow::Error>(answer.context("subscribing to events")?.into_inner())
        })?;
        Ok(Self { stream, tokio })
    }

    /// The next event.
    ///
    /// # Errors
    /// When none comes in time, and at the end of the stream.
    pub fn receive(&mut self) -> Result<v1::ContainerEventResponse> {
        match self.received(SOON)? {
            Ok(Some(event)) => Ok(event),
            Ok(None) => bail!("the stream of events has ended"),
            Err(status) => Err(status).context("receiving an event"),
        }
    }

    /// Events up to the one that is `last`, that one included.
    ///
    /// # Errors
    /// Those of [`receive`](Self::receive).
    pub fn until(
        &mut self,
        last: impl Fn(&v1::ContainerEventResponse) -> bool,
    ) -> Result<Vec<v1::ContainerEventResponse>> {
        let mut all = Vec::new();
        loop {
            let event = self.receive().with_context(|| format!("after {} events", all.len()))?;
            let is_last = last(&event);
            all.push(event);
            if is_last {
                return Ok(all);
            }
        }
    }

    /// Reads to the end of the stream; returns the number of events until then, and the status that
    /// ended it.
    ///
    /// # Errors
    /// When the end does not come in time.
    pub fn end(&mut self) -> Result<(usize, Status)> {
        let mut events = 0;
        loop {
            match self.received(SOON)? {
                Ok(Some(_)) => events += 1,
                Ok(None) => return Ok((events, Status::new(Code::Ok, ""))),
                Err(status) => return Ok((events, status)),
            }
        }
    }

    fn received(&mut self, limit: Duration) -> Result<Result<Option<v1::ContainerEventResponse>, Status>> {
        let Self { stream, tokio } = self;
        tokio
            .block_on(async { tokio::time::timeout(patience(limit), stream.message()).await })
            .context("waiting for an event")
    }
}

/// An event without the statuses in it.
#[must_use]
pub fn brief(event: &v1::ContainerEventResponse) -> Brief {
    (event.container_id.clone(), event.container_event_type())
}
