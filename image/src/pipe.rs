//! The bridge between an async sender of bytes and a blocking reader: a pipe that holds a bounded
//! number of bytes.
//!
//! The reader sees the end only after [`Writer::finish`]; a dropped sender is an error for it. So a
//! cancelled download never looks like a short layer.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use crate::turns::LayerInput;

/// Pieces on the way. With [`PIECE`] this bounds a pipe to 2 MiB, enough to ride out a pause of
/// either side.
const PIECES: usize = 32;

/// How often a reader in a hurry looks for the next piece.
const GLANCE: Duration = Duration::from_millis(5);

/// Largest piece.
const PIECE: usize = 64 * 1024;

/// The reader is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the reader has ended")]
pub(crate) struct ReaderGone;

/// The writer was dropped before it finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the transfer was cancelled")]
pub(crate) struct Abandoned;

#[derive(Debug)]
enum Piece {
    Bytes(Bytes),
    End,
}

/// The async end.
#[derive(Debug)]
pub(crate) struct Writer(mpsc::Sender<Piece>);

/// The blocking end. Must not be read on an async thread.
#[derive(Debug)]
pub(crate) struct Reader {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    state: State,
    /// The deadline.
    deadline: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Ended,
    Abandoned,
    Late,
}

/// A new pipe.
pub(crate) fn pipe() -> (Writer, Reader) {
    let (sender, receiver) = mpsc::channel(PIECES);
    (Writer(sender), Reader { pieces: receiver, current: Bytes::new(), state: State::Open, deadline: None })
}

impl Writer {
    /// Sends bytes, waiting for room.
    ///
    /// # Errors
    /// [`ReaderGone`].
    pub(crate) async fn write(&self, mut bytes: Bytes) -> Result<(), ReaderGone> {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE));
            self.0.send(Piece::Bytes(piece)).await.map_err(|_| ReaderGone)?;
        }
        Ok(())
    }

    /// Marks the end of the data.
    ///
    /// # Errors
    /// [`ReaderGone`].
    pub(crate) async fn finish(self) -> Result<(), ReaderGone> {
        self.0.send(Piece::End).await.map_err(|_| ReaderGone)
    }
}

impl Reader {
    fn take(&mut self, piece: Option<Piece>) {
        match piece {
            Some(Piece::Bytes(bytes)) => self.current = bytes,
            Some(Piece::End) => self.state = State::Ended,
            None => self.state = State::Abandoned,
        }
    }
}

impl LayerInput for Reader {
    fn is_ready(&mut self) -> bool {
        while self.current.is_empty() && self.state == State::Open {
            match self.pieces.try_recv() {
                Ok(piece) => self.take(Some(piece)),
                Err(TryRecvError::Disconnected) => self.take(None),
                Err(TryRecvError::Empty) => return false,
            }
        }
        true
    }

    fn wait(&mut self) {
        let Some(deadline) = self.deadline else {
            while !self.is_ready() {
                let piece = self.pieces.blocking_recv();
                self.take(piece);
            }
            return;
        };
        while !self.is_ready() {
            if Instant::now() >= deadline {
                self.state = State::Late;
                return;
            }
            std::thread::sleep(GLANCE);
        }
    }

    fn hurry(&mut self, within: Duration) {
        self.deadline = Instant::now().checked_add(within);
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait();
        if self.current.is_empty() {
            return match self.state {
                State::Open | State::Ended => Ok(0),
                State::Abandoned => Err(io::Error::other(Abandoned)),
                State::Late => Err(io::ErrorKind::TimedOut.into()),
            };
        }
        let length = self.current.len().min(buffer.len());
        if let Some(target) = buffer.get_mut(..length) {
            self.current.copy_to_slice(target);
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn bytes_arrive_in_order_and_the_end_is_seen() {
        let (writer, mut reader) = pipe();
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        let sent: Vec<u8> = (0..5_000_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        for chunk in sent.chunks(1_234_567) {
            writer.write(Bytes::copy_from_slice(chunk)).await.unwrap();
        }
        writer.finish().await.unwrap();
        assert_eq!(reading.await.unwrap().unwrap(), sent);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_lost_writer_is_an_error_and_a_lost_reader_too() {
        let (writer, mut reader) = pipe();
        writer.write(Bytes::from_static(b"half")).await.unwrap();
        drop(writer);
        let read = tokio::task::spawn_blocking(move || reader.read_to_end(&mut Vec::new())).await.unwrap();
        assert!(read.unwrap_err().get_ref().unwrap().is::<Abandoned>());
        let (writer, reader) = pipe();
        drop(reader);
        assert_eq!(writer.write(Bytes::from_static(b"x")).await, Err(ReaderGone));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reader_in_a_hurry_waits_no_longer_than_it_said() {
        let (writer, mut reader) = pipe();
        writer.write(Bytes::from_static(b"half")).await.unwrap();
        let started = Instant::now();
        let (read, all) = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            reader.hurry(Duration::from_millis(50));
            (reader.read_to_end(&mut all), all)
        })
        .await
        .unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(all, b"half");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}
