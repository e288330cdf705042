//! Data that a client has sent and that is not read yet: how much of it a connection may hold.
//!
//! Each stream of a connection has a queue, and all of them together have one [`Budget`] of bytes.
//! When it is used up, the connection is not read until a queue is read or dropped; TCP slows the
//! client down then.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Bytes of one connection that wait for their readers.
pub(crate) const CONNECTION_BYTES: usize = 1024 * 1024;

/// Pieces of data that wait for the reader of a stream.
pub(crate) const QUEUE: usize = 16;

/// The overhead of a piece beyond its bytes: one of a single byte takes room too.
const PIECE_BYTES: usize = 128;

/// The bytes that a connection may hold.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Semaphore>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(CONNECTION_BYTES)))
    }
}

#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    _held: OwnedSemaphorePermit,
}

/// The queue is no longer read.
#[derive(Debug)]
pub(crate) struct Unread;

impl Budget {
    /// A queue whose contents count.
    pub(crate) fn queue(&self) -> (Sender, Receiver) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let end = Arc::new(AtomicU8::new(0));
        (Sender { budget: self.clone(), queue: sender, end: end.clone() }, Receiver { queue: receiver, end })
    }
}

/// Why no more data comes into a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum End {
    /// The connection has ended, or the stream was given up here.
    Broken = 0,
    /// The peer has sent everything.
    Finished = 1,
    /// The peer has given the stream up.
    Reset = 2,
}

/// Fills a queue.
#[derive(Debug, Clone)]
pub(crate) struct Sender {
    budget: Budget,
    queue: mpsc::Sender<Piece>,
    end: Arc<AtomicU8>,
}

impl Sender {
    /// Waits for room, in the queue and in the budget.
    pub(crate) async fn send(&self, bytes: &[u8]) -> Result<(), Unread> {
        let room = self.queue.reserve().await.map_err(|_| Unread)?;
        let cost = u32::try_from((bytes.len() + PIECE_BYTES).min(CONNECTION_BYTES)).map_err(|_| Unread)?;
        let held = tokio::select! {
            biased;
            held = self.budget.0.clone().acquire_many_owned(cost) => held.map_err(|_| Unread)?,
            () = self.queue.closed() => return Err(Unread),
        };
        // A copy: a slice would keep the whole buffer that it was read into.
        room.send(Piece { bytes: Bytes::copy_from_slice(bytes), _held: held });
        Ok(())
    }

    /// Pieces that wait in the queue.
    pub(crate) fn waiting(&self) -> usize {
        QUEUE - self.queue.capacity()
    }

    /// Whether nobody reads it any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// Sets why no more data comes: to be called before the queue is dropped.
    pub(crate) fn end(&self, why: End) {
        self.end.store(why as u8, Ordering::Release);
    }
}

/// Empties a queue.
#[derive(Debug)]
pub(crate) struct Receiver {
    queue: mpsc::Receiver<Piece>,
    end: Arc<AtomicU8>,
}

impl Receiver {
    /// The next bytes; `None` when no more come.
    pub(crate) async fn receive(&mut self) -> Option<Bytes> {
        self.queue.recv().await.map(|piece| piece.bytes)
    }

    /// Why no more data comes. Set by the time [`receive`](Self::receive) has returned `None`.
    pub(crate) fn end(&self) -> End {
        match self.end.load(Ordering::Acquire) {
            1 => End::Finished,
            2 => End::Reset,
            _ => End::Broken,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn queues_share_a_budget_and_give_back_what_is_read_or_given_up() {
        let budget = Budget::default();
        let piece = vec![0; CONNECTION_BYTES / QUEUE - PIECE_BYTES];
        let (first, mut read) = budget.queue();
        for _ in 0..QUEUE {
            first.send(&piece).await.unwrap();
        }
        let (second, mut other) = budget.queue();
        assert!(second.send(b"x").now_or_never().is_none(), "nothing is left");
        assert_eq!(read.receive().await.unwrap(), piece);
        second.send(b"x").await.unwrap();
        assert_eq!(other.receive().await.unwrap(), "x");
        first.send(&piece).await.unwrap();
        let mut waiting = Box::pin(second.send(b"y"));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(read);
        waiting.await.unwrap();
        assert!(first.send(b"z").await.is_err());
    }

    #[tokio::test]
    async fn waiting_for_a_queue_that_is_given_up_ends() {
        let budget = Budget::default();
        let (full, _unread) = budget.queue();
        full.send(&vec![0; CONNECTION_BYTES]).await.unwrap();
        let (sender, receiver) = budget.queue();
        let mut waiting = Box::pin(sender.send(b"x"));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(receiver);
        assert!(waiting.await.is_err());
    }
}
