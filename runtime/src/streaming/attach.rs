//! Attach: the streams of a container's own program to and from a client.
//!
//! The shim passes output on as it comes, beside the log, and what it gets to the program. A client
//! that does not read loses what does not fit into the pipe, which the shim tells it; nothing waits
//! for it. Everything here can go at any time, by the client's end or the daemon's, and leaves the
//! container as it was, but for the input of one that wants that to be closed with the first
//! client.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;

use berth_streaming::command::{BoxFuture, Outcome, Output, Session, Size};
use bytes::BytesMut;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::pipes::{self, InputEnd};
use crate::container::{Container, ContainerError, Joining};
use crate::shim_client::{ShimClient, TERMINAL_OF_CONTAINER};

/// Serves a client until the container's output or the client's interest ends.
pub(super) fn run(
    container: Arc<Container>,
    session: Session,
    joining: Option<Joining>,
) -> BoxFuture<Outcome> {
    Box::pin(async move {
        match attach(&container, session, joining).await {
            // The end of the container is the client's too, however it ended: as with other
            // runtimes.
            Ok(()) => Outcome::Exited(0),
            Err(error) => {
                let text = crate::chain(&error);
                tracing::debug!(container = %container.id(), error = text, "attached stream failed");
                Outcome::Failed(text)
            }
        }
    })
}

async fn attach(
    container: &Arc<Container>,
    session: Session,
    joining: Option<Joining>,
) -> Result<(), ContainerError> {
    let shim = container.live_shim()?;
    let _place = container.attach()?;
    let failed = |error| ContainerError::file("create", Path::new("a pipe"))(error);
    let mut ends = [None, None, None];
    let [stdout_end, stderr_end, stdin_end] = &mut ends;
    let output = |wanted: Option<Output>, end: &mut Option<_>| {
        let Some(wanted) = wanted else { return Ok(None) };
        let (read, write) = pipes::output()?;
        *end = Some(write);
        Ok(Some((read, wanted)))
    };
    let stdout = output(session.stdout, stdout_end).map_err(failed)?;
    let stderr = output(session.stderr, stderr_end).map_err(failed)?;
    let stdin = match session.stdin {
        Some(input) => {
            let (write, read) = pipes::input().map_err(failed)?;
            *stdin_end = Some(read);
            Some((input, write))
        }
        None => None,
    };
    let has_output = stdout.is_some() || stderr.is_some();
    let [stdout_end, stderr_end, stdin_end] = ends;
    shim.attach(stdout_end, stderr_end, stdin_end).await?;
    drop(joining);

    let config = container.config();
    // A terminal is never closed, and input that stays open is the next client's.
    let stays_for_output = config.stdin_once && !config.tty && has_output;
    let mut copying = pin!(async {
        tokio::join!(copy_out(stdout), copy_out(stderr));
    });
    let mut feeding = pin!(async {
        match stdin {
            Some((from, to)) => pipes::copy_in(from, to).await,
            None => InputEnd::Program,
        }
    });
    let mut sizes = pin!(follow_size(session.size, &shim));
    let (mut fed, mut sized) = (false, false);
    loop {
        tokio::select! {
            () = &mut copying, if has_output => return Ok(()),
            // Without output, nothing else tells the end.
            () = shim.ended(), if !has_output => return Ok(()),
            end = &mut feeding, if !fed => match end {
                InputEnd::Client if !stays_for_output => return Ok(()),
                InputEnd::Client | InputEnd::Program => fed = true,
            },
            () = &mut sizes, if !sized => sized = true,
        }
    }
}

/// Copies output to the client, to its end.
async fn copy_out(stream: Option<(pipe::Receiver, Output)>) {
    let Some((from, to)) = stream else { return };
    let mut buffer = BytesMut::new();
    while let Ok(1..) = pipes::read(&from, &mut buffer).await {
        if to.send(buffer.split().freeze()).await.is_err() {
            return;
        }
    }
}

/// Gives the container's terminal the size of the client's, whenever that changes: the last one to
/// change it has its way.
async fn follow_size(size: Option<watch::Receiver<Option<Size>>>, shim: &ShimClient) {
    let Some(mut size) = size else { return };
    loop {
        let current = *size.borrow_and_update();
        if let Some(Size { width, height }) = current {
            shim.resize(TERMINAL_OF_CONTAINER, width, height).await;
        }
        if size.changed().await.is_err() {
            return;
        }
    }
}
