//! Between a program in a container and whoever started the command: input, output, the terminal's size, and
//! the keys that detach.
//!
//! Reading and writing our own streams blocks, so each has a thread: a reader of ours that does not read must
//! not keep a signal from ending us. Nothing is held beyond short queues; a slow end slows the other down.

use std::convert::Infallible;
use std::io::{self, Read};
use std::thread;

use berth_streaming::client::{Command, Resize};
use berth_streaming::command::Outcome;
use berth_streaming::spdy::connection::{Incoming, Outgoing};
use tokio::sync::mpsc;

use crate::detach_keys::{DetachKeys, Typed, Watcher};
use crate::log_line::Stream;
use crate::output::{self, OutputError};
use crate::terminal::Terminal;

type Bytes = Vec<u8>;

/// Bytes read from standard input at a time.
const READ_BYTES: usize = 32 * 1024;

/// Pieces that wait for their reader.
const QUEUE: usize = 4;

/// How it ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The program has.
    Program(Outcome),
    /// The connection broke before.
    Lost,
    /// The keys to detach were typed.
    Detached,
}

/// Passes everything on until an end, or until this is dropped. The connection is closed then, which ends a
/// program that was started by it, and our terminal is what it was before.
///
/// # Errors
/// When our output cannot be written.
pub(crate) async fn relay(
    command: Command,
    mut terminal: Option<Terminal>,
    keys: Option<DetachKeys>,
) -> Result<Ended, OutputError> {
    let Command { stdin, stdout, stderr, resize, mut ending } = command;
    let program = async {
        tokio::try_join!(copy_out(stdout, Stream::Stdout), copy_out(stderr, Stream::Stderr))?;
        Ok::<_, OutputError>(ending.outcome().await)
    };
    let ended = tokio::select! {
        biased;
        outcome = program => outcome?.map_or(Ended::Lost, Ended::Program),
        () = copy_in(stdin, keys) => Ended::Detached,
        never = follow_size(terminal.as_mut(), resize) => match never {},
    };
    drop(terminal);
    if matches!(ended, Ended::Detached) {
        // What was typed before the keys is on its way.
        ending.close().await;
    }
    Ok(ended)
}

/// Sends standard input, to its end. Returns when the keys to detach are typed, and only then.
async fn copy_in(to: Option<Outgoing>, keys: Option<DetachKeys>) {
    if let Some(to) = to {
        let mut watcher = keys.map(Watcher::new);
        let mut input = read_input();
        while let Some(bytes) = input.recv().await {
            let (bytes, detach) = match watcher.as_mut().map(|watcher| watcher.take(&bytes)) {
                None => (bytes, false),
                Some(Typed::Input(bytes)) => (bytes, false),
                Some(Typed::Detach(bytes)) => (bytes, true),
            };
            // A program that takes no more input goes on without it.
            let sent = to.send(bytes.into()).await;
            if detach {
                return;
            }
            if sent.is_err() {
                return std::future::pending().await;
            }
        }
        if let Some(watcher) = &watcher {
            let _ = to.send(watcher.rest().to_vec().into()).await;
        }
        let _ = to.finish().await;
    }
    std::future::pending().await
}

/// Reads standard input in a thread, to its end. One that cannot be read has ended.
fn read_input() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    thread::spawn(move || {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default().to_vec();
                    if sender.blocking_send(bytes).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

/// Writes what comes to one of our streams, to its end.
async fn copy_out(from: Option<Incoming>, stream: Stream) -> Result<(), OutputError> {
    let Some(mut from) = from else { return Ok(()) };
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    let writing = tokio::task::spawn_blocking(move || {
        while let Some(bytes) = receiver.blocking_recv() {
            output::bytes(stream, bytes)?;
        }
        Ok(())
    });
    tokio::pin!(writing);
    loop {
        let bytes = tokio::select! {
            bytes = from.receive() => bytes,
            // Before the end of what comes it ends only with an error.
            written = &mut writing => return finished(written),
        };
        let Some(bytes) = bytes else { break };
        if sender.send(bytes).await.is_err() {
            break;
        }
    }
    drop(sender);
    finished(writing.await)
}

fn finished(written: Result<Result<(), OutputError>, tokio::task::JoinError>) -> Result<(), OutputError> {
    match written {
        Ok(written) => written,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Nobody cancels it.
        Err(_) => Ok(()),
    }
}

/// Tells the program the size of our terminal, now and whenever it changes. Never returns.
async fn follow_size(terminal: Option<&mut Terminal>, resize: Option<Resize>) -> Infallible {
    if let (Some(terminal), Some(resize)) = (terminal, resize) {
        loop {
            if let Some(size) = Terminal::size()
                && resize.send(size).await.is_err()
            {
                break;
            }
            terminal.changed().await;
        }
    }
    std::future::pending().await
}
