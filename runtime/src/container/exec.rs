//! ExecSync: a program in a running container, its output and its exit code.
//!
//! The shim starts it; its output arrives through pipes that the program does not have. Each stream
//! is kept up to [`MAX_OUTPUT`] but read to its end, so that a program is never blocked by a full
//! pipe.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use berth_model::state::{ContainerState, ExitReason};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::output_room::{Kept, OutputRoom};
use super::{Container, ContainerError};
use crate::shim_client::ShimError;

/// The most that is kept of each stream, in bytes: `ExecSyncResponse` of the CRI says 16 MiB.
pub(crate) const MAX_OUTPUT: usize = 16 * 1024 * 1024;

/// How long output may continue after the program's end, from processes it left behind.
const DRAIN: Duration = Duration::from_millis(500);

/// How long it may take to find out why a connection to a shim ended.
const EXPLAINED: Duration = Duration::from_secs(5);

/// The result.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit_code: i32,
}

/// Runs `command` and waits for its end, at most `timeout`. Its output is kept as far as `room`
/// allows.
///
/// When the future is dropped the program is killed with its session, as containerd does when the
/// caller of ExecSync goes away: a probe without a time limit would otherwise leave one more
/// program behind each time that a kubelet restarts.
pub(crate) async fn exec_sync(
    container: &Arc<Container>,
    room: &OutputRoom,
    command: Vec<String>,
    timeout: Option<Duration>,
) -> Result<Output, ContainerError> {
    let shim = container.running_shim()?;
    let (stdout, stdout_end) = reader()?;
    let (stderr, stderr_end) = reader()?;
    let args = command.into_iter().map(String::into_bytes).collect();
    let mut running = shim.exec(args, stdout_end, stderr_end, None)?;
    let (mut out, mut err) = (room.stream(MAX_OUTPUT), room.stream(MAX_OUTPUT));
    let ended = {
        let collecting = async { tokio::join!(collect(stdout, &mut out), collect(stderr, &mut err)) };
        tokio::pin!(collecting);
        let end = async {
            match timeout {
                Some(limit) => tokio::time::timeout(limit, running.ended()).await,
                None => Ok(running.ended().await),
            }
        };
        tokio::pin!(end);
        let mut complete = false;
        let ended = loop {
            tokio::select! {
                ended = &mut end => break ended,
                _ = &mut collecting, if !complete => complete = true,
            }
        };
        if !complete && ended.is_ok() {
            // Late output is lost; the program itself has ended.
            let _ = tokio::time::timeout(DRAIN, collecting).await;
        }
        ended
    };
    match ended {
        Ok(ended) => {
            let exit_code = outcome(container, ended).await?;
            Ok(Output { stdout: out.into_bytes(), stderr: err.into_bytes(), exit_code })
        }
        Err(_) => {
            running.kill().await;
            Err(ContainerError::ExecTimeout { seconds: timeout.unwrap_or_default().as_secs() })
        }
    }
}

/// What came of a program, in words of its container where its shim has none.
pub(crate) async fn outcome(
    container: &Container,
    ended: Result<i32, ShimError>,
) -> Result<i32, ContainerError> {
    if !matches!(ended, Err(ShimError::Lost)) {
        return Ok(ended?);
    }
    // The connection ended. Why, is found out by whoever follows the container.
    let _ = tokio::time::timeout(EXPLAINED, container.exited()).await;
    let id = container.id().clone();
    Err(match container.state() {
        ContainerState::Exited(exit) if exit.reason == ExitReason::Unknown => {
            ContainerError::ShimGoneUnderExec { id }
        }
        ContainerState::Exited(_) => ContainerError::EndedUnderExec { id },
        _ => ContainerError::DisconnectedUnderExec { id },
    })
}

fn reader() -> Result<(pipe::Receiver, OwnedFd), ContainerError> {
    let open = || {
        let (read, write) = berth_sys::file::pipe()?;
        berth_sys::file::set_nonblocking(std::os::fd::AsFd::as_fd(&read))?;
        Ok((pipe::Receiver::from_owned_fd(read)?, write))
    };
    open().map_err(ContainerError::file("create", std::path::Path::new("a pipe")))
}

/// Reads a stream to its end.
async fn collect(mut stream: pipe::Receiver, kept: &mut Kept) {
    // On the heap, and only for as long as the stream lives; a future would carry an array along.
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => kept.add(buffer.get(..length).unwrap_or_default()),
        }
    }
}
