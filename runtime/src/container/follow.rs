//! Finding the shim of a container, and following it to the end.
//!
//! One task for each container that has not ended. It never ends a container for something unknown:
//! a shim that cannot be reached or does not answer is asked again, while the container is reported
//! in the state in which it was last known. Only two things say that a shim is gone: its socket has
//! no listener (unix(7), `ECONNREFUSED`), or there is no socket and the container's main process is
//! gone too.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use berth_model::record::ProcessRecord;
use berth_model::state::{ContainerEvent, ContainerState};
use berth_shim_proto::control::Phase;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

use super::end::{self, Evidence};
use super::{Container, lock};
use crate::shim_client::{ConnectError, ShimClient, ShimError};

/// Pauses between two attempts to reach a shim.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How often a shim is asked for the outcome of a start that a previous daemon requested.
const START_LOOK: Duration = Duration::from_millis(500);

/// How long reading an exit record is retried.
const UNREAD: Duration = Duration::from_secs(10);

/// Follows a container that was just created, with its shim.
pub(super) fn watch(container: &Arc<Container>) {
    container.followed.store(true, Ordering::Relaxed);
    let following = Following { container: container.clone(), room: None, permit: None, known: None };
    tokio::spawn(following.run(true));
}

/// Finds the shim of a container of a previous daemon. `room` limits the connections.
/// Resolves when the state of the container is known.
pub(crate) fn find(container: &Arc<Container>, room: &Arc<Semaphore>) -> oneshot::Receiver<()> {
    container.followed.store(true, Ordering::Relaxed);
    let (known, is_known) = oneshot::channel();
    let (container, room) = (container.clone(), Some(room.clone()));
    tokio::spawn(Following { container, room, permit: None, known: Some(known) }.run(false));
    is_known
}

/// Asks the shim of a container whose start has no known outcome, until it has one.
pub(super) fn ask_on(container: &Arc<Container>) {
    let container = container.clone();
    tokio::spawn(async move {
        let undecided = || matches!(*container.state.borrow(), ContainerState::Created);
        while undecided() {
            if let Some(shim) = container.shim()
                && let Ok(Phase { started: Some(started), .. }) = shim.phase().await
            {
                let _ = container.apply(ContainerEvent::Started { at_unix_ns: started.at_unix_ns });
                return;
            }
            tokio::time::sleep(LONGEST_PAUSE).await;
        }
    });
}

struct Following {
    container: Arc<Container>,
    /// For a connection to a shim that this daemon did not start.
    room: Option<Arc<Semaphore>>,
    permit: Option<OwnedSemaphorePermit>,
    /// The callers that wait for the result.
    known: Option<oneshot::Sender<()>>,
}

/// The outcome of an attempt to reach a shim.
enum Reached {
    Shim(ShimClient),
    Gone,
    NotNow(String),
}

impl Following {
    /// `is_known`: the container has its shim, and its state is that of the shim.
    async fn run(mut self, mut is_known: bool) {
        let (mut pause, mut said) = (FIRST_PAUSE, false);
        loop {
            let Some(shim) = self.container.shim() else {
                match self.reach().await {
                    Reached::Shim(shim) => *lock(&self.container.shim) = Some(Arc::new(shim)),
                    Reached::Gone => return self.ended().await,
                    Reached::NotNow(reason) => {
                        if !said && pause >= LONGEST_PAUSE {
                            said = true;
                            tracing::warn!(
                                container = %self.container.id(), reason, state = self.container.state().name(),
                                "cannot reach the container's shim; trying again, and reporting the last known state"
                            );
                        }
                        if self.pause(pause).await.is_none() {
                            return self.ended().await;
                        }
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
                continue;
            };
            if !is_known {
                let asked = tokio::select! {
                    asked = ask(&self.container, &shim) => asked,
                    () = self.container.given_up.notified() => return self.ended().await,
                };
                match asked {
                    Ok(()) => is_known = true,
                    Err(ShimError::Silent) => {
                        if !said {
                            said = true;
                            tracing::warn!(
                                container = %self.container.id(), state = self.container.state().name(),
                                "the container's shim does not answer; asking again, and reporting the last known state"
                            );
                        }
                        continue;
                    }
                    // The connection ended, which the wait below notices.
                    Err(_) => {}
                }
                if is_known {
                    self.tell_known();
                }
            }
            tokio::select! {
                () = shim.ended() => {}
                () = self.container.given_up.notified() => return self.ended().await,
            }
            if let Some(record) = shim.end() {
                let container = self.container.clone();
                // The task fails only when the daemon stops.
                let _ =
                    tokio::task::spawn_blocking(move || end::settle(&container, Some(record), None)).await;
                return;
            }
            drop(shim);
            // Without a record, perhaps only the connection ended: a shim limits their number.
            if matches!(self.look().await, Some(Evidence::Told(_))) {
                return self.ended().await;
            }
            *lock(&self.container.shim) = None;
            if self.pause(pause).await.is_none() {
                return self.ended().await;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Connects to the shim, unless there is an exit record already.
    async fn reach(&mut self) -> Reached {
        if matches!(self.look().await, Some(Evidence::Told(_))) {
            return Reached::Gone;
        }
        if let Some(room) = &self.room
            && self.permit.is_none()
        {
            self.permit = room.clone().try_acquire_owned().ok();
            if self.permit.is_none() {
                return Reached::NotNow("out of file descriptors".to_owned());
            }
        }
        match ShimClient::connect(&self.container.files.state) {
            Ok(shim) => Reached::Shim(shim),
            Err(ConnectError::Gone) => Reached::Gone,
            Err(ConnectError::NoSocket) => match *lock(&self.container.process) {
                Some(process) => match berth_sys::process::is_there(process.pid, process.start_time) {
                    Ok(false) => Reached::Gone,
                    Ok(true) => Reached::NotNow("its socket is gone".to_owned()),
                    Err(error) => Reached::NotNow(error.to_string()),
                },
                None => Reached::Gone,
            },
            Err(ConnectError::NotNow(error)) => Reached::NotNow(error.to_string()),
        }
    }

    /// Waits; `None` when there is nothing left to wait for.
    async fn pause(&self, pause: Duration) -> Option<()> {
        tokio::select! {
            () = tokio::time::sleep(pause) => Some(()),
            () = self.container.given_up.notified() => None,
        }
    }

    async fn look(&self) -> Option<Evidence> {
        let container = self.container.clone();
        tokio::task::spawn_blocking(move || end::look(&container)).await.ok()
    }

    /// Publishes the end of a container whose shim is gone.
    async fn ended(mut self) {
        // The shim writes the record before it ends, so a missing record will never appear.
        let begun = Instant::now();
        let (told, unread) = loop {
            match self.look().await {
                Some(Evidence::Told(record)) => break (Some(record), None),
                Some(Evidence::Nothing) => break (None, None),
                Some(Evidence::Unread(error)) if begun.elapsed() >= UNREAD => break (None, Some(error)),
                Some(Evidence::Unread(error)) => {
                    tracing::warn!(container = %self.container.id(), %error, "cannot read the exit record of a container; trying again");
                    tokio::time::sleep(UNREAD / 10).await;
                }
                // The daemon is stopping.
                None => return,
            }
        };
        let container = self.container.clone();
        let settle = move |unread: Option<io::Error>| end::settle(&container, told, unread.as_ref());
        let _ = tokio::task::spawn_blocking(move || settle(unread)).await;
        self.tell_known();
    }

    fn tell_known(&mut self) {
        if let Some(known) = self.known.take() {
            // The caller may have stopped waiting.
            let _ = known.send(());
        }
    }
}

/// Takes over the shim's state. Resolves when it is definite.
async fn ask(container: &Container, shim: &ShimClient) -> Result<(), ShimError> {
    loop {
        let phase = shim.phase().await?;
        let under_way = phase.starting;
        // Otherwise it is draining. Its end is about to be recorded, and until then its last state
        // is reported.
        let Some(created) = phase.created else { return Ok(()) };
        *lock(&container.process) = Some(ProcessRecord { pid: created.pid, start_time: created.start_time });
        if let Some(started) = phase.started {
            // From Created, the first state of every recovered container.
            let _ = container.apply(ContainerEvent::Started { at_unix_ns: started.at_unix_ns });
            return Ok(());
        }
        if !under_way {
            *lock(&container.presumed_since_unix_ns) = None;
            return Ok(());
        }
        tokio::time::sleep(START_LOOK).await;
    }
}
