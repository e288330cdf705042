//! Relays between a program in a container and the caller: input, output, the terminal's size, and
//! the detach keys.
//!
//! Reading and writing our own streams blocks, so each has a thread: a stalled reader of our output
//! must not delay the handling of a signal. Queues are short, so a slow end slows down the other.

use std::convert::Infallible;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::thread;

use berth_streaming::client::{Command, Resize};
use berth_streaming::command::Outcome;
use berth_streaming::spdy::connection::{Incoming, Outgoing};
use berth_sys::poll::{Interest, Poll};
use tokio::sync::mpsc;

use crate::detach_keys::{DetachKeys, Typed, Watcher};
use crate::error::Error;
use crate::log_line::Stream;
use crate::output::{self, OutputError};
use crate::terminal::Terminal;

type Bytes = Vec<u8>;

/// Bytes read from standard input at a time.
const READ_BYTES: usize = 32 * 1024;

/// Chunks that wait for their reader.
const QUEUE: usize = 4;

/// Whose program it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// The container's, whose clients come and go. The end of the input to its terminal would make
    /// this client go.
    OfContainer,
    /// That of exec, which ends with its client, unless that says that it detaches.
    OfExec,
}

/// How the relay ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The program ended.
    Program(Outcome),
    /// The connection was lost.
    Lost,
    /// The detach keys were typed.
    Detached,
}

/// Relays until an end, or until this is dropped. The connection is closed then, which ends a
/// program that was started by it, and our terminal is restored. Detach keys only count when typed:
/// input that does not come from a terminal in raw mode may contain any bytes.
///
/// # Errors
/// When our output cannot be written, or our input cannot be read.
pub(crate) async fn relay(
    command: Command,
    mut terminal: Option<Terminal>,
    keys: DetachKeys,
    of: Program,
) -> Result<Ended, Error> {
    let stays = of == Program::OfContainer && terminal.is_some();
    let keys = Some(keys).filter(|_| terminal.as_ref().is_some_and(Terminal::is_raw));
    let Command { stdin, stdout, stderr, resize, mut ending } = command;
    let leaving = resize.clone().filter(|_| of == Program::OfExec);
    let program = async {
        tokio::try_join!(copy_out(stdout, Stream::Stdout), copy_out(stderr, Stream::Stderr))?;
        Ok::<_, OutputError>(ending.outcome().await)
    };
    let ended = tokio::select! {
        biased;
        outcome = program => outcome?.map_or(Ended::Lost, Ended::Program),
        detached = copy_in(stdin, keys, stays) => {
            detached.map_err(Error::Input)?;
            Ended::Detached
        }
        never = follow_size(terminal.as_mut(), resize) => match never {},
    };
    drop(terminal);
    if matches!(ended, Ended::Detached) {
        if let Some(leaving) = leaving {
            // One that is gone cannot be left.
            let _ = leaving.detach().await;
        }
        // What was typed before the keys has been sent.
        ending.close().await;
    }
    Ok(ended)
}

/// Sends standard input, to its end, and then that end, unless it `stays`. Returns only when the
/// detach keys are typed.
///
/// # Errors
/// When it cannot be read to its end.
async fn copy_in(to: Option<Outgoing>, keys: Option<DetachKeys>, stays: bool) -> io::Result<()> {
    if let Some(to) = to {
        let mut watcher = keys.map(Watcher::new);
        let mut input = read_input();
        while let Some(bytes) = input.recv().await {
            let bytes = bytes?;
            let (bytes, detach) = match watcher.as_mut().map(|watcher| watcher.take(&bytes)) {
                None => (bytes, false),
                Some(Typed::Input(bytes)) => (bytes, false),
                Some(Typed::Detach(bytes)) => (bytes, true),
            };
            // A program that takes no more input continues without it.
            let sent = to.send(bytes.into()).await;
            if detach {
                return Ok(());
            }
            if sent.is_err() {
                return std::future::pending().await;
            }
        }
        if let Some(watcher) = &watcher {
            let _ = to.send(watcher.rest().to_vec().into()).await;
        }
        if !stays {
            let _ = to.finish().await;
        }
    }
    std::future::pending().await
}

/// Reads standard input in a thread, to its end or an error.
fn read_input() -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    thread::spawn(move || {
        let is_terminal = io::stdin().is_terminal();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let piece = match read_piece(&mut io::stdin().lock(), &mut buffer) {
                Ok([]) => return,
                Ok(piece) => Ok(piece.to_vec()),
                // A terminal that is gone.
                Err(error) if is_terminal && error.raw_os_error() == Some(EIO) => return,
                Err(error) => Err(error),
            };
            let is_last = piece.is_err();
            if sender.blocking_send(piece).is_err() || is_last {
                return;
            }
        }
    });
    receiver
}

/// The same number on x86_64 and aarch64: errno(3).
const EIO: i32 = 5;

/// Reads the next input; empty at the end. Blocks even if another holder of the descriptor has made
/// it non-blocking.
fn read_piece<'a>(from: &mut (impl Read + AsFd), buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    loop {
        match from.read(buffer) {
            Ok(length) => return Ok(buffer.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let poll = Poll::new()?;
                poll.watch(from.as_fd(), 0, Interest::Input)?;
                poll.wait(None)?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Writes everything received to one of our streams.
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
            // It ends early only with an error.
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
        // It is never cancelled.
        Err(_) => Ok(()),
    }
}

/// Sends the size of our terminal to the program, now and whenever it changes. Never returns.
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A socket to which something comes when it was found empty.
    struct Late(UnixStream, Option<UnixStream>);

    impl Read for Late {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let found = self.0.read(buffer);
            if found.is_err()
                && let Some(mut far) = self.1.take()
            {
                far.write_all(b"late").unwrap();
            }
            found
        }
    }

    impl AsFd for Late {
        fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    #[test]
    fn input_that_does_not_block_is_waited_for() {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let (mut from, mut buffer) = (Late(near, Some(far)), [0; 16]);
        assert_eq!(read_piece(&mut from, &mut buffer).unwrap(), b"late");
        assert_eq!(read_piece(&mut from, &mut buffer).unwrap(), b"");
    }

    #[test]
    fn input_that_cannot_be_read_is_no_end() {
        let error = read_piece(&mut File::open("/").unwrap(), &mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::IsADirectory);
    }
}
