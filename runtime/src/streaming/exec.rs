//! Exec: a program in a container on the streams of a client.
//!
//! The shim starts it, and passes bytes on between its streams and pipes, or a socket for a
//! terminal, that only the shim and the daemon have: a process that shares a stream with a
//! container can be kept waiting by it. A client that goes away takes its program along: the future
//! here is dropped, the program's session is killed, and only then its input ends, or its terminal
//! hangs up. The command `berth` can leave a program behind on purpose, when the keys to detach are
//! typed.
//!
//! When a client does not want output any more but has not gone away, a pipe is closed, and the
//! program learns it as it would from any closed pipe; of a terminal, what the program writes from
//! then on is thrown away.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_streaming::command::{BoxFuture, Input, Outcome, Output, Session, Size, Wanted};
use berth_sys::{socket, tty};
use bytes::BytesMut;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::pipes;
use crate::container::exec::outcome;
use crate::container::{Container, ContainerError};
use crate::shim_client::{Resizer, RunningExec, ShimError};

/// How long after the program's end more of its output is waited for, which what it left behind may
/// write.
const DRAIN: Duration = Duration::from_millis(500);

/// How much of it is passed on: at least what the pipe holds, which is what the program itself can
/// have written.
const DRAIN_BYTES: usize = 1024 * 1024;

/// The most of that: a pipe can be made larger than memory allows it to be filled.
const MOST_DRAIN_BYTES: usize = 64 * 1024 * 1024;

/// Output of the program.
struct Source {
    from: pipe::Receiver,
    /// Where it goes, if the client wants it.
    to: Option<Output>,
    /// What the client does not want any more is read all the same.
    discards: bool,
}

/// Who has the terminal of a program.
enum Terminal {
    OfShim(Resizer),
    /// A shim of before that: its other end is here.
    Own(OwnedFd),
}

/// A program that goes on without its client if that has detached.
struct Detachable {
    program: JoinHandle<Outcome>,
    detached: Arc<AtomicBool>,
}

impl Drop for Detachable {
    fn drop(&mut self) {
        if !self.detached.load(Ordering::Acquire) {
            self.program.abort();
        }
    }
}

/// The same as [`run`], for a client that may detach.
pub(super) fn run_detachable(
    container: Arc<Container>,
    command: Vec<String>,
    wanted: Wanted,
    session: Session,
) -> BoxFuture<Outcome> {
    Box::pin(async move {
        let detached = session.detached.clone();
        let program = tokio::spawn(run(container, command, wanted, session));
        let mut running = Detachable { program, detached };
        match (&mut running.program).await {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed(format!("the command was given up: {error}")),
        }
    })
}

/// Runs `command` until it has ended; how it did.
pub(super) fn run(
    container: Arc<Container>,
    command: Vec<String>,
    wanted: Wanted,
    session: Session,
) -> BoxFuture<Outcome> {
    Box::pin(async move {
        let args = command.into_iter().map(String::into_bytes).collect();
        let ended = if wanted.terminal {
            on_terminal(&container, args, session).await
        } else {
            on_pipes(&container, args, session).await
        };
        match ended {
            Ok(code) => Outcome::Exited(code),
            Err(error) => {
                let text = crate::chain(&error);
                tracing::debug!(container = %container.id(), error = text, "streamed command failed");
                match shell_code(&error) {
                    Some(code) => Outcome::NotRun { text, code },
                    None => Outcome::Failed(text),
                }
            }
        }
    })
}

fn shell_code(error: &ContainerError) -> Option<i32> {
    match error {
        ContainerError::Shim(ShimError::Failed(failed)) => failed.shell_code(),
        _ => None,
    }
}

fn file(action: &'static str, name: &'static str) -> impl Fn(io::Error) -> ContainerError + Copy {
    move |source| ContainerError::file(action, Path::new(name))(source)
}

async fn on_pipes(
    container: &Arc<Container>,
    args: Vec<Vec<u8>>,
    session: Session,
) -> Result<i32, ContainerError> {
    let shim = container.running_shim()?;
    let (stdout, stdout_end) = output(session.stdout)?;
    let (stderr, stderr_end) = output(session.stderr)?;
    let failed = file("create", "a pipe");
    let (stdin, stdin_end, held) = match session.stdin {
        Some(input) => {
            let (write, read) = pipes::input().map_err(failed)?;
            let held = write.as_fd().try_clone_to_owned().map_err(failed)?;
            (Some((input, write)), Some(read), Some(held))
        }
        None => (None, None, None),
    };
    let mut running = shim.exec(args, stdout_end, stderr_end, stdin_end)?;
    if let Some(held) = held {
        running.hold_input(held);
    }
    let (over, ended) = watch::channel(false);
    let copying = async {
        tokio::join!(copy_out(stdout, ended.clone()), copy_out(stderr, ended));
    };
    finish(container, running, over, copying, feed(stdin)).await
}

async fn on_terminal(
    container: &Arc<Container>,
    args: Vec<Vec<u8>>,
    session: Session,
) -> Result<i32, ContainerError> {
    let shim = container.running_shim()?;
    let failed = file("use", "a terminal");
    let (near, far) = socket::stream_pair().map_err(failed)?;
    berth_sys::file::set_nonblocking(near.as_fd()).map_err(failed)?;
    let near = UnixStream::from_std(near.into()).map_err(failed)?;
    let (mut running, resizer) = shim.exec_on_terminal(args, far).await?;
    let taken = tokio::select! {
        biased;
        taken = take_descriptor(&near) => taken.map_err(failed)?,
        // It cannot end before it has its terminal: it could not be started.
        ended = running.ended() => return outcome(container, ended).await,
    };
    let Some(taken) = taken else { return outcome(container, running.ended().await).await };
    berth_sys::file::set_nonblocking(taken.as_fd()).map_err(failed)?;
    let copy = |taken: &OwnedFd| taken.try_clone().map_err(failed);
    let (reader, writer) = (copy(&taken)?, copy(&taken)?);
    running.hold_input(copy(&taken)?);
    // Neither a socket nor a terminal is a pipe, but they are read and written like one.
    let reader = pipe::Receiver::from_owned_fd_unchecked(reader).map_err(failed)?;
    let writer = pipe::Sender::from_owned_fd_unchecked(writer).map_err(failed)?;
    let terminal = match resizer {
        Some(resizer) => Terminal::OfShim(resizer),
        None => Terminal::Own(taken),
    };
    let (over, ended) = watch::channel(false);
    let copying = copy_out(Some(Source { from: reader, to: session.stdout, discards: true }), ended);
    let feeding = async {
        tokio::join!(feed(session.stdin.map(|input| (input, writer))), follow_size(session.size, terminal));
    };
    finish(container, running, over, copying, feeding).await
}

/// Waits for the end of the program, and then a little for what is left of its output.
async fn finish(
    container: &Container,
    mut running: RunningExec,
    over: watch::Sender<bool>,
    copying: impl Future<Output = ()>,
    feeding: impl Future<Output = ()>,
) -> Result<i32, ContainerError> {
    let (mut copying, mut feeding) = (pin!(copying), pin!(feeding));
    let (mut copied, mut fed) = (false, false);
    let ended = loop {
        tokio::select! {
            ended = running.ended() => break ended,
            () = &mut copying, if !copied => copied = true,
            () = &mut feeding, if !fed => {
                fed = true;
                running.release_input();
            }
        }
    };
    over.send_replace(true);
    if !copied {
        copying.await;
    }
    outcome(container, ended).await
}

/// A pipe for a stream that is wanted, else the null device. The second is for the program.
fn output(wanted: Option<Output>) -> Result<(Option<Source>, OwnedFd), ContainerError> {
    let Some(output) = wanted else {
        let null = File::options().write(true).open("/dev/null").map_err(file("open", "/dev/null"))?;
        return Ok((None, null.into()));
    };
    let (from, write) = pipes::output().map_err(file("create", "a pipe"))?;
    Ok((Some(Source { from, to: Some(output), discards: false }), write))
}

/// Copies output to the client, to its end; after the end of the program only what is there, or
/// comes soon. Output that the client does not want is read and thrown away.
async fn copy_out(stream: Option<Source>, mut ended: watch::Receiver<bool>) {
    let Some(Source { from, mut to, discards }) = stream else { return };
    let mut buffer = BytesMut::new();
    // Of a shim that shares its pipes, the program can have made it larger.
    let left = berth_sys::file::pipe_size(from.as_fd()).unwrap_or(0).clamp(DRAIN_BYTES, MOST_DRAIN_BYTES);
    let (mut is_over, mut patience, mut allowance) = (false, DRAIN, left);
    loop {
        // Looked at each time: output that never stops would always come first below.
        is_over = is_over || *ended.borrow();
        let read = if is_over {
            let start = Instant::now();
            let read = tokio::time::timeout(patience, pipes::read(&from, &mut buffer)).await;
            // Waiting for a client that is slow does not count.
            patience = patience.saturating_sub(start.elapsed());
            let Ok(read) = read else { return };
            read
        } else {
            tokio::select! {
                biased;
                read = pipes::read(&from, &mut buffer) => read,
                // The sender lives as long as this.
                _ = ended.wait_for(|ended| *ended) => {
                    is_over = true;
                    continue;
                }
            }
        };
        match read {
            // A terminal that no process has open any more is reported as EIO, pty(7).
            Ok(0) | Err(_) => return,
            Ok(length) if is_over => match allowance.checked_sub(length) {
                Some(rest) => allowance = rest,
                None => return,
            },
            Ok(_) => {}
        }
        let bytes = buffer.split().freeze();
        if let Some(wanted) = &to
            && wanted.send(bytes).await.is_err()
        {
            // The client has reset this stream.
            if !discards {
                return;
            }
            to = None;
        }
    }
}

async fn feed(stdin: Option<(Input, pipe::Sender)>) {
    if let Some((from, to)) = stdin {
        pipes::copy_in(from, to).await;
    }
}

/// Gives the terminal the size of the client's, whenever that changes.
async fn follow_size(size: Option<watch::Receiver<Option<Size>>>, terminal: Terminal) {
    let Some(mut size) = size else { return };
    loop {
        let current = *size.borrow_and_update();
        if let Some(Size { width, height }) = current {
            match &terminal {
                Terminal::OfShim(resizer) => resizer.resize(width, height).await,
                // One whose program has ended has no size to be set.
                Terminal::Own(terminal) => drop(tty::set_size(terminal.as_fd(), width, height)),
            }
        }
        if size.changed().await.is_err() {
            return;
        }
    }
}

/// The descriptor that comes on a socket; `None` when it is closed without one.
async fn take_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    loop {
        socket.readable().await?;
        let mut byte = [0];
        match socket.try_io(Interest::READABLE, || socket::receive(socket.as_fd(), &mut byte)) {
            Ok((_, descriptors)) => return Ok(descriptors.into_iter().next()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
