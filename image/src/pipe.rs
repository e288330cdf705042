//! The bridge between an async sender of bytes and a blocking reader: a pipe that holds a bounded number of bytes.
//!
//! The reader sees the end only if the sender said [`Writer::finish`]; a sender that just goes away is an error for it. So a cancelled
//! download never looks like a short layer.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

/// Pieces on the way. With [`PIECE`] this bounds a pipe to 2 MiB, enough to ride out a pause of either side.
const PIECES: usize = 32;

/// Largest piece.
const PIECE: usize = 64 * 1024;

/// The reader is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the reader of the bytes is gone")]
pub(crate) struct ReaderGone;

/// The writer went away without saying that all was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the transfer was abandoned")]
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
    ended: bool,
}

/// A new pipe.
pub(crate) fn pipe() -> (Writer, Reader) {
    let (sender, receiver) = mpsc::channel(PIECES);
    (Writer(sender), Reader { pieces: receiver, current: Bytes::new(), ended: false })
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

    /// Says that everything was sent.
    ///
    /// # Errors
    /// [`ReaderGone`].
    pub(crate) async fn finish(self) -> Result<(), ReaderGone> {
        self.0.send(Piece::End).await.map_err(|_| ReaderGone)
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => self.current = bytes,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::other(Abandoned)),
            }
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
}
