//! StartContainer: one message to the shim, which lets the waiting process become its program.
//!
//! A caller that gets a failed start creates another container beside this one. So no caller gets
//! that while the program may be running: a start without an answer is made definite by killing the
//! container.

use std::sync::Arc;
use std::time::Duration;

use berth_model::layout::START_UNTOLD;
use berth_model::state::{ContainerEvent, ContainerState};

use super::{Container, ContainerError, stop};
use crate::clock::unix_ns;
use crate::shim_client::{START, ShimClient, ShimError};

/// How long a shim that reports a failed start may take to record the end: it waits for the rest of
/// the output, 2 s, and for its daemon, 1 s.
const ENDING: Duration = Duration::from_secs(5);

/// The longest time to settle the end of a container whose shim is gone: killing what is left in
/// its cgroup, and removing it.
const SETTLED: Duration = Duration::from_secs(25);

/// How long a start waits for clients that are to be attached before it.
const JOINED: Duration = Duration::from_secs(10);

/// Starts it. On return the program is running, or the container has ended with the reason;
/// [`ContainerError::StartUnknown`] is the exception.
pub(crate) async fn start(container: &Arc<Container>) -> Result<(), ContainerError> {
    // They would miss its first output. One that does not come is not waited for any longer.
    let _ = tokio::time::timeout(JOINED, container.joined()).await;
    let outcome = begin(container).await;
    if outcome.is_err() && matches!(container.state(), ContainerState::Exited(_)) {
        // Killed, but its last process may not be gone yet.
        container.cleared().await;
    }
    outcome
}

async fn begin(container: &Arc<Container>) -> Result<(), ContainerError> {
    let _alone = container.operation.lock().await;
    let state = container.state();
    let ContainerState::Created = state else {
        return Err(ContainerError::WrongState { id: container.id().clone(), state: state.name() });
    };
    let Some(shim) = container.shim() else {
        return Err(ContainerError::ShimUnreached { id: container.id().clone() });
    };
    // Before the shim is asked: a later daemon has to know that it may be running.
    note(container, unix_ns(), START_UNTOLD);
    let outcome = tokio::select! {
        // The answer first: a program that has already ended was started nevertheless.
        biased;
        outcome = shim.start() => outcome,
        // By a stop. Its exit says more than the loss of the shim.
        () = container.exited() => Err(ShimError::Lost),
    };
    match outcome {
        Ok(at_unix_ns) => {
            // A program that has already ended is past this state; its exit has the time, too.
            let _ = container.apply(ContainerEvent::Started { at_unix_ns });
            Ok(())
        }
        Err(error @ ShimError::Failed(_)) => {
            // It has ended, or the shim refused because of its state.
            if tokio::time::timeout(ENDING, container.exited()).await.is_err() {
                ask_how_it_is(container, &shim).await?;
            }
            Err(error.into())
        }
        Err(
            error @ (ShimError::Lost
            | ShimError::Unexpected
            | ShimError::Older
            | ShimError::Start { .. }
            | ShimError::TooLong(_)),
        ) => {
            // Without its shim it ends, and it must not be seen as created after this call.
            match tokio::time::timeout(SETTLED, container.exited()).await {
                Ok(()) if was_started(container) => Ok(()),
                Ok(()) => Err(error.into()),
                Err(_) => end_without_answer(container).await,
            }
        }
        Err(ShimError::Silent) => end_without_answer(container).await,
    }
}

/// Whether it has ended after its program ran.
fn was_started(container: &Container) -> bool {
    matches!(container.state(), ContainerState::Exited(exit) if exit.started_at_unix_ns != 0)
}

/// After a refusal that did not end it: whether it still waits, or runs.
async fn ask_how_it_is(container: &Arc<Container>, shim: &ShimClient) -> Result<(), ContainerError> {
    match shim.phase().await {
        Ok(phase) => match (phase.started, phase.created) {
            (Some(started), _) => {
                let _ = container.apply(ContainerEvent::Started { at_unix_ns: started.at_unix_ns });
                Ok(())
            }
            // An earlier start is in progress; `follow` reports its outcome.
            (None, Some(_)) if phase.starting => Ok(()),
            (None, Some(_)) => {
                forget_start(container);
                Ok(())
            }
            // It is draining.
            (None, None) => match tokio::time::timeout(ENDING, container.exited()).await {
                Ok(()) => Ok(()),
                Err(_) => end_without_answer(container).await,
            },
        },
        Err(_) => end_without_answer(container).await,
    }
}

/// Makes sure that the program is not running.
async fn end_without_answer(container: &Arc<Container>) -> Result<(), ContainerError> {
    let (id, seconds) = (container.id().clone(), START.as_secs());
    tracing::warn!(container = %id, seconds, "the shim does not report whether the program started; killing the container");
    match stop::kill_all(container).await {
        Ok(()) => Err(ContainerError::StartTimeout { id, seconds }),
        Err(error) => {
            tracing::error!(container = %id, error = %crate::chain(&error), "cannot kill the container; reporting it as running");
            // What becomes known later is reported by `follow`.
            container.presume();
            super::follow::ask_on(container);
            Err(ContainerError::StartUnknown { id, seconds })
        }
    }
}

/// Records that its start was asked for, and by `told` whether that has been reported.
pub(super) fn note(container: &Container, at_unix_ns: i64, told: &str) {
    let path = container.files.started();
    if let Err(error) = std::fs::write(&path, format!("{at_unix_ns}{told}")) {
        tracing::warn!(path = %path.display(), %error, "cannot record that the container was started");
    }
}

fn forget_start(container: &Container) {
    // At worst it stays, and the next daemon reports the container as running until its shim
    // answers.
    let _ = std::fs::remove_file(container.files.started());
}
