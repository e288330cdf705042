//! Streams over one connection.
//!
//! ```text
//!           reader task                                         writer task
//!  bytes ->  Decoder -> new streams -> Connection::accept       commands -> Encoder -> bytes
//!                    -> data        -> Stream::receive              ^
//!                                                                   Stream::send, finish, reset, reply
//! ```
//! Data waits for its reader in a short queue, and all queues of a connection share a budget. When
//! either is full the reader task waits, and with it the whole connection: the clients of the CRI
//! send without regard to SPDY's windows, so TCP is what slows the peer down. [`Limits::stall`]
//! limits this wait. A peer that goes away meanwhile is noticed by [`Hangup`].
//!
//! A peer that goes on after that gets FLOW_CONTROL_ERROR on the stream that is not read, and so
//! does one that sends more than [`WINDOW`] on a stream that has no reader at all. Other streams
//! continue.

use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::frame::{Decoder, Encoder, Frame, MAX_DATA_BYTES, ResetStatus};
use super::{Headers, ProtocolError};
use crate::activity::Activity;
use crate::budget::{self, Budget, End};
use crate::hangup::Hangup;
use crate::{LEAVING, PROBE};

/// Bytes read at a time while more than [`IDLE_READ_BYTES`] are available.
const READ_BYTES: usize = 16 * 1024;

/// Bytes read at a time, and room kept for them, on a connection with little traffic.
const IDLE_READ_BYTES: usize = 1024;

/// The id of pings of a server; an even number, and the answers are ignored.
const OWN_PING: u32 = 2;

/// What a peer may send on a stream that is only written here, in bytes: the initial window of
/// SPDY/3.1, which is never enlarged for such a stream.
pub const WINDOW: usize = 64 * 1024;

/// Commands that wait for the writer task.
const COMMANDS: usize = 16;

/// How long the last bytes may take when a connection is closed.
const CLOSE: Duration = Duration::from_secs(5);

/// Which end of the connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Accepts streams.
    Server,
    /// Opens streams.
    Client,
}

/// The limits on a peer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Open streams of the peer at the same time. More are refused with RST_STREAM.
    pub streams: usize,
    /// How long a connection lives without a frame in either direction.
    pub idle: Duration,
    /// How long the connection may wait for a stream that is not read. The stream is then given up,
    /// so that it does not hold up the others forever. `None` where the others are useless without
    /// it.
    pub stall: Option<Duration>,
}

/// The connection or the stream has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed")]
pub struct Closed;

#[derive(Debug)]
enum Command {
    Open {
        stream: u32,
        headers: Headers,
    },
    Reply {
        stream: u32,
    },
    Data {
        stream: u32,
        bytes: Bytes,
        last: bool,
    },
    Reset {
        stream: u32,
        status: ResetStatus,
    },
    /// The peer's, sent back, or the client's own.
    Ping(u32),
    /// Sends nothing; answered when everything before it has been written.
    Flush(oneshot::Sender<()>),
    Close {
        last_stream: u32,
    },
}

/// Why a stream ended before both had finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrokenOff {
    /// The peer has reset it.
    ByPeer,
    /// The peer has overrun it: it was not read for longer than [`Limits::stall`], or never is, and
    /// more than [`WINDOW`] came.
    Overrun,
}

/// What happens to data from the peer.
#[derive(Debug)]
enum Reading {
    Queued(budget::Sender),
    /// The peer has finished.
    Finished,
    /// It is discarded, up to so many more bytes.
    Unwanted(usize),
    /// It is discarded: the peer has overrun the stream.
    GivenUp,
}

/// An open stream, as shared by the two tasks and its owner.
#[derive(Debug)]
struct Entry {
    incoming: Reading,
    /// Whether this end has finished.
    finished: bool,
    broken_off: watch::Sender<Option<BrokenOff>>,
}

impl Entry {
    fn is_read(&self) -> bool {
        matches!(self.incoming, Reading::Queued(_))
    }

    fn give_up(&mut self) {
        self.incoming = Reading::GivenUp;
        self.broken_off.send_replace(Some(BrokenOff::Overrun));
    }
}

#[derive(Debug)]
struct Shared {
    streams: Mutex<HashMap<u32, Entry>>,
    /// The largest id that the peer has opened.
    last_stream: AtomicU32,
    activity: Activity,
    /// The budget of all streams for the peer's data.
    budget: Budget,
    /// Whether the connection has ended.
    closed: watch::Sender<bool>,
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        // First, so that a reader that sees its input end can distinguish this from an end that the
        // peer sent.
        self.closed.send_replace(true);
        self.streams().clear();
    }

    /// Records that this end has sent its last data.
    fn finish(&self, stream: u32) {
        let mut streams = self.streams();
        if let Some(entry) = streams.get_mut(&stream) {
            entry.finished = true;
            if !matches!(entry.incoming, Reading::Queued(_) | Reading::Unwanted(_)) {
                streams.remove(&stream);
            }
        }
    }

    /// Records that the peer has sent its last data.
    fn peer_finished(&self, stream: u32) {
        let mut streams = self.streams();
        if let Some(entry) = streams.get_mut(&stream) {
            if let Reading::Queued(queue) = &entry.incoming {
                queue.end(End::Finished);
            }
            entry.incoming = Reading::Finished;
            if entry.finished {
                streams.remove(&stream);
            }
        }
    }

    /// Whether no other stream waits for data of the peer.
    fn holds_up_none(&self, id: u32) -> bool {
        !self.streams().iter().any(|(other, entry)| *other != id && entry.is_read())
    }

    /// Gives up the stream with the most unread data, which is `full` if its own queue is full:
    /// while the connection stood still, active readers have emptied their queues.
    fn give_up(&self, full: u32) {
        let mut streams = self.streams();
        let waiting = |entry: &Entry| match &entry.incoming {
            Reading::Queued(queue) => queue.waiting(),
            Reading::Finished | Reading::Unwanted(_) | Reading::GivenUp => 0,
        };
        let most = match streams.get(&full) {
            Some(entry) if waiting(entry) == budget::QUEUE => Some(full),
            _ => streams.iter().max_by_key(|(_, entry)| waiting(entry)).map(|(id, _)| *id),
        };
        if let Some(entry) = most.and_then(|id| streams.get_mut(&id)) {
            entry.give_up();
        }
    }
}

/// A connection. Dropping it closes it at once.
#[derive(Debug)]
pub struct Connection {
    accepted: mpsc::Receiver<Stream>,
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    next_id: u32,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Connection {
    /// Begins to read and write `io`. `hangup` notices that the peer is gone while nothing is read.
    pub fn new<T>(io: T, role: Role, limits: Limits, hangup: Option<Hangup>) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (from, to) = tokio::io::split(io);
        let (commands, orders) = mpsc::channel(COMMANDS);
        let (opened, accepted) = mpsc::channel(limits.streams.max(1));
        let shared = Arc::new(Shared {
            streams: Mutex::default(),
            last_stream: AtomicU32::new(0),
            activity: Activity::default(),
            budget: Budget::default(),
            closed: watch::Sender::new(false),
        });
        let writer = tokio::spawn(write(to, orders, shared.clone()));
        let permits = Arc::new(Semaphore::new(limits.streams));
        let reading = Reader {
            opened,
            commands: commands.clone(),
            shared: shared.clone(),
            role,
            limits,
            permits,
            hangup,
        };
        let reader = tokio::spawn(reading.run(from));
        Self { accepted, commands, shared, next_id: 1, reader, writer }
    }

    /// The next stream that the peer opens; `None` when the connection has ended.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.accepted.recv().await
    }

    /// Refuses all streams that the peer opens from now on, and frees the memory for reading their
    /// headers.
    pub fn accept_no_more(&mut self) {
        self.accepted.close();
    }

    /// Opens a stream, as a client.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn open(&mut self, headers: &Headers) -> Result<Stream, Closed> {
        let id = self.next_id;
        self.next_id += 2;
        let stream = new_stream(id, headers.clone(), &self.commands, &self.shared, false, None);
        self.commands
            .send(Command::Open { stream: id, headers: headers.clone() })
            .await
            .map_err(|_| Closed)?;
        Ok(stream)
    }

    /// Resolves when the connection has ended, whichever side ended it.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut closed = self.shared.closed.subscribe();
        async move {
            // The sender is dropped only with the connection.
            let _ = closed.wait_for(|closed| *closed).await;
        }
    }

    /// Waits until everything that was sent before has been written, however slowly the peer reads.
    ///
    /// # Errors
    /// [`Closed`] when it cannot be written any more.
    pub async fn written(&self) -> Result<(), Closed> {
        let (done, written) = oneshot::channel();
        self.commands.send(Command::Flush(done)).await.map_err(|_| Closed)?;
        written.await.map_err(|_| Closed)
    }

    /// Sends a ping after each `pause`, as a client, for as long as the connection lives: a server
    /// closes idle ones.
    pub fn keep_alive(&self, pause: Duration) -> impl Future<Output = ()> + Send + use<> {
        // Not a strong sender: the pings must not keep the writer alive.
        let commands = self.commands.downgrade();
        async move {
            loop {
                tokio::time::sleep(pause).await;
                let Some(commands) = commands.upgrade() else { return };
                if commands.send(Command::Ping(1)).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Sends GOAWAY and closes, after everything that was sent before.
    pub async fn close(mut self) {
        let last_stream = self.shared.last_stream.load(Ordering::Relaxed);
        let goodbye = async {
            if self.commands.send(Command::Close { last_stream }).await.is_ok() {
                let _ = (&mut self.writer).await;
            }
        };
        let _ = tokio::time::timeout(CLOSE, goodbye).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
        self.shared.close();
    }
}

fn new_stream(
    id: u32,
    headers: Headers,
    commands: &mpsc::Sender<Command>,
    shared: &Arc<Shared>,
    peer_finished: bool,
    permit: Option<OwnedSemaphorePermit>,
) -> Stream {
    let (sender, data) = shared.budget.queue();
    let incoming = if peer_finished {
        sender.end(End::Finished);
        Reading::Finished
    } else {
        Reading::Queued(sender)
    };
    let (broken_off, was_broken_off) = watch::channel(None);
    shared.streams().insert(id, Entry { incoming, finished: false, broken_off });
    let held = Arc::new(permit);
    let outgoing =
        Outgoing { id, commands: commands.clone(), shared: shared.clone(), was_broken_off, _held: held };
    Stream { headers, incoming: Incoming(data), outgoing }
}

/// One stream.
#[derive(Debug)]
pub struct Stream {
    /// The headers that it was opened with.
    pub headers: Headers,
    /// Data from the peer.
    pub incoming: Incoming,
    /// Data to the peer.
    pub outgoing: Outgoing,
}

impl Stream {
    /// The write half; what the peer sends is discarded from now on, and more than [`WINDOW`] ends
    /// the stream.
    #[must_use]
    pub fn without_input(self) -> Outgoing {
        if let Some(entry) = self.outgoing.shared.streams().get_mut(&self.outgoing.id)
            && entry.is_read()
        {
            entry.incoming = Reading::Unwanted(WINDOW);
        }
        self.outgoing
    }
}

/// The read half of a stream.
#[derive(Debug)]
pub struct Incoming(pub(crate) budget::Receiver);

impl Incoming {
    /// The next data; `None` when the peer has finished or reset the stream, or the connection has
    /// ended.
    pub async fn receive(&mut self) -> Option<Bytes> {
        self.0.receive().await
    }

    /// Whether the peer has finished the stream, so that none of its data is missing. Decided once
    /// [`receive`](Self::receive) has returned `None`.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.end() == End::Finished
    }
}

/// The write half of a stream.
#[derive(Debug, Clone)]
pub struct Outgoing {
    id: u32,
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    was_broken_off: watch::Receiver<Option<BrokenOff>>,
    /// The peer's allowance is counted by what its owner holds, not by what the peer claims to have
    /// ended.
    _held: Arc<Option<OwnedSemaphorePermit>>,
}

impl Outgoing {
    /// The stream's id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Resolves when the peer has reset or overrun the stream; never when it ends in another way.
    pub async fn broken_off(&self) -> BrokenOff {
        let mut broken_off = self.was_broken_off.clone();
        let found = broken_off.wait_for(Option::is_some).await.ok().and_then(|found| *found);
        match found {
            Some(found) => found,
            None => std::future::pending().await,
        }
    }

    /// Accepts the stream, as a server.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn reply(&self) -> Result<(), Closed> {
        self.command(Command::Reply { stream: self.id }).await
    }

    /// Sends data; waits while the peer is slow. If the future is dropped, only whole frames of it
    /// have been sent.
    ///
    /// # Errors
    /// [`Closed`] when the peer has reset the stream, or the connection has ended.
    pub async fn send(&self, mut bytes: Bytes) -> Result<(), Closed> {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(MAX_DATA_BYTES));
            self.command(Command::Data { stream: self.id, bytes: piece, last: false }).await?;
        }
        Ok(())
    }

    /// Ends this direction: no more data follows.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn finish(&self) -> Result<(), Closed> {
        self.command(Command::Data { stream: self.id, bytes: Bytes::new(), last: true }).await?;
        self.shared.finish(self.id);
        Ok(())
    }

    /// Gives the stream up in both directions, with FLOW_CONTROL_ERROR if the peer has overrun it.
    /// Does nothing when it has ended.
    pub async fn reset(&self, status: ResetStatus) {
        let overrun = *self.was_broken_off.borrow() == Some(BrokenOff::Overrun);
        let status = if overrun { ResetStatus::FlowControlError } else { status };
        // It does not matter whether the peer can still be reached.
        let _ = self.command(Command::Reset { stream: self.id, status }).await;
        self.shared.streams().remove(&self.id);
    }

    async fn command(&self, command: Command) -> Result<(), Closed> {
        if !self.shared.streams().contains_key(&self.id) {
            return Err(Closed);
        }
        self.commands.send(command).await.map_err(|_| Closed)
    }
}

struct Reader {
    opened: mpsc::Sender<Stream>,
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    role: Role,
    limits: Limits,
    permits: Arc<Semaphore>,
    hangup: Option<Hangup>,
}

impl Reader {
    async fn run<T: AsyncRead>(self, mut io: ReadHalf<T>) {
        if let Err(error) = self.read(&mut io).await {
            tracing::debug!(%error, "closed a broken SPDY connection");
            let last_stream = self.shared.last_stream.load(Ordering::Relaxed);
            let _ = tokio::time::timeout(CLOSE, self.commands.send(Command::Close { last_stream })).await;
        }
        self.shared.close();
    }

    /// Reads to the end of the connection.
    async fn read<T: AsyncRead>(&self, io: &mut ReadHalf<T>) -> Result<(), ProtocolError> {
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
        let (mut room, mut accepts) = (IDLE_READ_BYTES, true);
        loop {
            buffer.reserve(room);
            let capacity = buffer.capacity();
            tokio::select! {
                biased;
                () = self.opened.closed(), if accepts => {
                    decoder.forget_headers();
                    accepts = false;
                    continue;
                }
                read = io.read_buf(&mut buffer) => match read {
                    Ok(0) | Err(_) => return Ok(()),
                    Ok(_) => self.shared.activity.note(),
                },
                () = self.shared.activity.ends(self.limits.idle) => return Ok(()),
            }
            let filled = buffer.len() == capacity;
            while let Some(frame) = decoder.next(&mut buffer)? {
                if !self.handle(frame).await? {
                    return Ok(());
                }
            }
            room = if filled { READ_BYTES } else { IDLE_READ_BYTES };
            if buffer.is_empty() && !filled {
                buffer = BytesMut::new();
            }
        }
    }

    /// Handles a frame; `false` when the connection has ended.
    async fn handle(&self, frame: Frame) -> Result<bool, ProtocolError> {
        match frame {
            Frame::SynStream { stream, headers, last, unidirectional } => {
                self.open(stream, headers, last || unidirectional).await
            }
            Frame::Data { stream, bytes, last } => {
                if !bytes.is_empty() && !self.deliver(stream, bytes).await? {
                    return Ok(false);
                }
                if last {
                    self.shared.peer_finished(stream);
                }
                Ok(true)
            }
            Frame::Reset { stream, .. } => {
                if let Some(entry) = self.shared.streams().remove(&stream) {
                    if let Reading::Queued(queue) = &entry.incoming {
                        queue.end(End::Reset);
                    }
                    entry.broken_off.send_replace(Some(BrokenOff::ByPeer));
                }
                Ok(true)
            }
            Frame::SynReply { stream, last, .. } | Frame::Headers { stream, last, .. } => {
                if last {
                    self.shared.peer_finished(stream);
                }
                Ok(true)
            }
            // Clients of the CRI use increasing odd numbers, like the ids of their streams. An even
            // one answers a ping of ours.
            Frame::Ping(id) if id.is_multiple_of(2) != (self.role == Role::Server) => {
                self.order(Command::Ping(id)).await
            }
            // The peer opens no more streams; open ones continue.
            Frame::Ping(_) | Frame::GoAway | Frame::Ignored => Ok(true),
        }
    }

    async fn open(&self, id: u32, headers: Headers, peer_finished: bool) -> Result<bool, ProtocolError> {
        // Streams of a client have odd ids, which only ever increase; a server opens none.
        if self.role == Role::Client
            || id.is_multiple_of(2)
            || id <= self.shared.last_stream.load(Ordering::Relaxed)
        {
            return Err(ProtocolError::StreamId(id));
        }
        self.shared.last_stream.store(id, Ordering::Relaxed);
        let Ok(permit) = self.permits.clone().try_acquire_owned() else {
            return self.order(Command::Reset { stream: id, status: ResetStatus::RefusedStream }).await;
        };
        let stream = new_stream(id, headers, &self.commands, &self.shared, peer_finished, Some(permit));
        if self.opened.try_send(stream).is_err() {
            // Streams are no longer accepted, or the queue has as many as may be open.
            self.shared.streams().remove(&id);
            return self.order(Command::Reset { stream: id, status: ResetStatus::RefusedStream }).await;
        }
        Ok(true)
    }

    async fn deliver(&self, id: u32, bytes: Bytes) -> Result<bool, ProtocolError> {
        enum To {
            Queue(budget::Sender),
            Finished,
            Nobody,
            Overrun,
        }
        let to = self.shared.streams().get_mut(&id).map(|entry| match &mut entry.incoming {
            Reading::Queued(queue) => To::Queue(queue.clone()),
            Reading::Finished => To::Finished,
            Reading::Unwanted(left) => match left.checked_sub(bytes.len()) {
                Some(less) => {
                    *left = less;
                    To::Nobody
                }
                None => {
                    entry.give_up();
                    To::Overrun
                }
            },
            Reading::GivenUp => To::Nobody,
        });
        match to {
            Some(To::Queue(queue)) => Ok(self.unless_gone(self.pass_on(id, queue, bytes)).await),
            Some(To::Nobody) => Ok(true),
            // The peer had said that it had finished.
            Some(To::Finished) => {
                self.shared.streams().remove(&id);
                self.order(Command::Reset { stream: id, status: ResetStatus::ProtocolError }).await
            }
            Some(To::Overrun) => {
                self.shared.streams().remove(&id);
                self.order(Command::Reset { stream: id, status: ResetStatus::FlowControlError }).await
            }
            None if self.role == Role::Server
                && (id > self.shared.last_stream.load(Ordering::Relaxed) || id.is_multiple_of(2)) =>
            {
                Err(ProtocolError::StreamId(id))
            }
            // It was reset while this was on its way.
            None => Ok(true),
        }
    }

    /// Waits for the reader of a stream, within [`Limits::stall`].
    async fn pass_on(&self, id: u32, queue: budget::Sender, bytes: Bytes) {
        let Some(stall) = self.limits.stall else {
            let mut sending = pin!(queue.send(&bytes));
            // If it is no longer read, it is discarded.
            while tokio::time::timeout(PROBE, sending.as_mut()).await.is_err() {
                // If there is no room, there is something else to send.
                let _ = self.commands.try_send(Command::Ping(OWN_PING));
            }
            return;
        };
        while tokio::time::timeout(stall, queue.send(&bytes)).await.is_err() {
            if self.shared.holds_up_none(id) {
                continue;
            }
            self.shared.give_up(id);
            if !self.shared.streams().get(&id).is_some_and(Entry::is_read) {
                return;
            }
        }
    }

    async fn order(&self, command: Command) -> Result<bool, ProtocolError> {
        let mut sent = false;
        let there = self.unless_gone(async { sent = self.commands.send(command).await.is_ok() }).await;
        Ok(there && sent)
    }

    /// Waits for `work`; `false` when the peer goes away first.
    async fn unless_gone(&self, work: impl Future<Output = ()>) -> bool {
        tokio::select! {
            biased;
            () = work => true,
            () = crate::hangup::of(self.hangup.as_ref()) => false,
        }
    }
}

async fn write<T: AsyncWrite>(
    mut io: WriteHalf<T>,
    mut commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
) {
    let (mut encoder, mut head) = (Encoder::default(), BytesMut::new());
    let mut closing = false;
    while let Some(command) = commands.recv().await {
        closing = matches!(command, Command::Close { .. });
        let written = write_one(&mut io, &mut encoder, command, &mut head).await;
        let flushed = match written {
            // More can be written at once.
            Ok(()) if !closing && !commands.is_empty() => Ok(()),
            Ok(()) => io.flush().await,
            Err(error) => Err(error),
        };
        shared.activity.note();
        if closing || flushed.is_err() {
            break;
        }
    }
    // The peer may be gone already.
    let _ = io.shutdown().await;
    drop(commands);
    if !closing {
        // It is; what it sent before is read to its end first.
        let mut closed = shared.closed.subscribe();
        let _ = tokio::time::timeout(LEAVING, closed.wait_for(|closed| *closed)).await;
    }
    shared.close();
}

async fn write_one<T: AsyncWrite>(
    io: &mut WriteHalf<T>,
    encoder: &mut Encoder,
    command: Command,
    head: &mut BytesMut,
) -> io::Result<()> {
    head.clear();
    let mut body = Bytes::new();
    match command {
        Command::Open { stream, headers } => encoder.syn_stream(stream, &headers, head),
        Command::Reply { stream } => encoder.syn_reply(stream, head),
        Command::Reset { stream, status } => Encoder::reset(stream, status, head),
        Command::Ping(id) => Encoder::ping(id, head),
        Command::Flush(done) => {
            io.flush().await?;
            // The caller may have stopped waiting.
            let _ = done.send(());
        }
        Command::Close { last_stream } => Encoder::go_away(last_stream, head),
        Command::Data { stream, bytes, last } => {
            Encoder::data(stream, bytes.len(), last, head);
            body = bytes;
        }
    }
    io.write_all_buf(&mut (&mut *head).chain(body)).await
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::time::Instant;

    use super::*;

    const LIMITS: Limits = Limits { streams: 4, idle: Duration::from_secs(60), stall: None };

    fn pair() -> (Connection, Connection) {
        let (client, server) = duplex(64 * 1024);
        (
            Connection::new(client, Role::Client, LIMITS, None),
            Connection::new(server, Role::Server, LIMITS, None),
        )
    }

    /// A server and the raw bytes of its client.
    fn raw() -> (DuplexStream, Connection) {
        let (client, server) = duplex(64 * 1024);
        (client, Connection::new(server, Role::Server, LIMITS, None))
    }

    async fn frames(io: &mut DuplexStream) -> Vec<Frame> {
        let (mut decoder, mut buffer, mut frames) = (Decoder::default(), BytesMut::new(), Vec::new());
        while io.read_buf(&mut buffer).await.unwrap() > 0 {
            while let Some(frame) = decoder.next(&mut buffer).unwrap() {
                frames.push(frame);
            }
        }
        frames
    }

    #[tokio::test]
    async fn data_goes_both_ways_and_each_way_ends_by_itself() {
        let (mut client, mut server) = pair();
        let mut near = client.open(&Headers::of(&[("streamType", "stdin")])).await.unwrap();
        let mut far = server.accept().await.unwrap();
        assert_eq!(far.headers.get("streamtype"), Some("stdin"));
        far.outgoing.reply().await.unwrap();
        near.outgoing.send(Bytes::from_static(b"in")).await.unwrap();
        near.outgoing.finish().await.unwrap();
        assert_eq!(far.incoming.receive().await.unwrap(), "in");
        assert_eq!(far.incoming.receive().await, None);
        let long = Bytes::from(vec![7; 3 * MAX_DATA_BYTES + 1]);
        far.outgoing.send(long.clone()).await.unwrap();
        far.outgoing.finish().await.unwrap();
        let mut received = Vec::new();
        while let Some(bytes) = near.incoming.receive().await {
            received.extend_from_slice(&bytes);
        }
        assert!(received == long);
        assert!(server.shared.streams().is_empty(), "a stream that both have finished is forgotten");
        client.close().await;
        assert!(server.accept().await.is_none());
    }

    #[tokio::test]
    async fn streams_over_the_limit_are_refused_and_room_comes_back() {
        let (mut client, mut server) = pair();
        let mut open = Vec::new();
        for _ in 0..LIMITS.streams {
            open.push(client.open(&Headers::default()).await.unwrap());
        }
        let mut refused = client.open(&Headers::default()).await.unwrap();
        assert_eq!(refused.incoming.receive().await, None);
        assert_eq!(refused.outgoing.send(Bytes::from_static(b"x")).await, Err(Closed));
        let mut accepted = Vec::new();
        for _ in 0..LIMITS.streams {
            accepted.push(server.accept().await.unwrap());
        }
        accepted[0].outgoing.reset(ResetStatus::Cancel).await;
        assert_eq!(open[0].incoming.receive().await, None);
        let mut refused = client.open(&Headers::default()).await.unwrap();
        assert_eq!(refused.incoming.receive().await, None, "its owner holds it still");
        drop(accepted.remove(0));
        client.open(&Headers::default()).await.unwrap();
        assert!(server.accept().await.is_some());
    }

    #[tokio::test]
    async fn ids_that_are_even_or_go_down_end_the_connection() {
        for ids in [&[2][..], &[1, 1], &[5, 3], &[0x7fff_fffe]] {
            let (mut client, mut server) = raw();
            let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
            for id in ids {
                encoder.syn_stream(*id, &Headers::default(), &mut bytes);
            }
            client.write_all(&bytes).await.unwrap();
            assert_eq!(frames(&mut client).await.last(), Some(&Frame::GoAway), "{ids:?}");
            while server.accept().await.is_some() {}
            server.closed().await;
        }
    }

    #[tokio::test]
    async fn data_for_a_stream_that_was_never_opened_ends_the_connection() {
        let (mut client, server) = raw();
        let mut bytes = BytesMut::new();
        Encoder::data(1, 1, false, &mut bytes);
        client.write_all(&[&bytes[..], b"x"].concat()).await.unwrap();
        assert_eq!(frames(&mut client).await, [Frame::GoAway]);
        server.closed().await;
    }

    #[tokio::test]
    async fn pings_of_the_client_are_answered_and_others_are_not() {
        let (mut client, server) = raw();
        let mut bytes = BytesMut::new();
        for id in [1, 2, 3] {
            Encoder::ping(id, &mut bytes);
        }
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        server.closed().await;
        server.close().await;
        assert_eq!(frames(&mut client).await, [Frame::Ping(1), Frame::Ping(3), Frame::GoAway]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_frame_is_closed() {
        let (client, mut server) = pair();
        let start = Instant::now();
        assert!(server.accept().await.is_none());
        assert_eq!(start.elapsed(), LIMITS.idle);
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_kept_alive_outlives_the_limit() {
        let (client, mut server) = pair();
        let keep_alive = tokio::spawn(client.keep_alive(LIMITS.idle / 3));
        let closed = tokio::time::timeout(LIMITS.idle * 5, server.accept()).await;
        assert!(closed.is_err(), "{closed:?}");
        drop(client);
        keep_alive.await.unwrap();
    }

    #[tokio::test]
    async fn a_stream_that_nobody_reads_holds_a_bounded_amount() {
        let (mut client, mut server) = pair();
        let near = client.open(&Headers::default()).await.unwrap();
        let far = server.accept().await.unwrap();
        let all = 64 * 1024 * 1024;
        let sending = near.outgoing.send(Bytes::from(vec![0; all]));
        assert!(tokio::time::timeout(Duration::from_millis(300), sending).await.is_err());
        drop(client);
        let mut held = 0;
        let mut far = far;
        while let Some(bytes) = far.incoming.receive().await {
            held += bytes.len();
        }
        assert!(held <= budget::QUEUE * READ_BYTES, "{held}");
    }

    /// A raw client's data frame.
    fn data(stream: u32, length: usize) -> Vec<u8> {
        let mut bytes = BytesMut::new();
        Encoder::data(stream, length, false, &mut bytes);
        bytes.resize(bytes.len() + length, b'x');
        bytes.to_vec()
    }

    #[tokio::test]
    async fn a_stream_that_is_only_written_is_reset_when_its_window_is_overrun() {
        let (mut client, mut server) = raw();
        let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
        for stream in [1, 3, 5] {
            encoder.syn_stream(stream, &Headers::default(), &mut bytes);
        }
        client.write_all(&bytes).await.unwrap();
        let within = server.accept().await.unwrap().without_input();
        let overrun = server.accept().await.unwrap().without_input();
        let mut read = server.accept().await.unwrap();
        client.write_all(&data(1, WINDOW)).await.unwrap();
        client.write_all(&data(3, WINDOW)).await.unwrap();
        client.write_all(&data(3, 1)).await.unwrap();
        client.write_all(&data(5, 1)).await.unwrap();
        assert_eq!(read.incoming.receive().await.unwrap(), "x", "it goes on");
        assert_eq!(overrun.broken_off().await, BrokenOff::Overrun);
        assert_eq!(overrun.send(Bytes::from_static(b"x")).await, Err(Closed));
        within.finish().await.unwrap();
        // What is still on its way is no offence.
        client.write_all(&data(3, 1)).await.unwrap();
        client.shutdown().await.unwrap();
        server.closed().await;
        server.close().await;
        let reset = Frame::Reset { stream: 3, status: ResetStatus::FlowControlError as u32 };
        let end = Frame::Data { stream: 1, bytes: Bytes::new(), last: true };
        assert_eq!(frames(&mut client).await, [reset, end, Frame::GoAway]);
    }

    const WIRE: usize = 64 * 1024;

    /// How many pieces of this length a server accepts on 1,000 unread streams.
    async fn taken(length: usize) -> usize {
        const STREAMS: u32 = 1000;
        let (mut client, server) = duplex(WIRE);
        let limits = Limits { streams: 1000, ..LIMITS };
        let _server = Connection::new(server, Role::Server, limits, None);
        let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
        for stream in 0..STREAMS {
            encoder.syn_stream(2 * stream + 1, &Headers::default(), &mut bytes);
        }
        client.write_all(&bytes).await.unwrap();
        let mut taken = 0;
        for stream in (0..STREAMS).cycle() {
            bytes.clear();
            Encoder::data(2 * stream + 1, length, false, &mut bytes);
            bytes.resize(bytes.len() + length, 0);
            if tokio::time::timeout(LIMITS.idle / 2, client.write_all(&bytes)).await.is_err() {
                break;
            }
            taken += 1;
        }
        taken
    }

    #[tokio::test(start_paused = true)]
    async fn all_streams_together_hold_a_bounded_amount() {
        let bytes = taken(READ_BYTES).await * READ_BYTES;
        let most = budget::CONNECTION_BYTES;
        assert!((most / 2..most + 2 * WIRE).contains(&bytes), "{bytes}");
        // Small ones count with their overhead.
        let pieces = taken(1).await;
        assert!((1000..(most + 2 * WIRE) / 64).contains(&pieces), "{pieces}");
    }

    #[tokio::test]
    async fn a_connection_that_accepts_no_more_refuses_streams_without_reading_their_headers() {
        let (mut client, mut server) = raw();
        let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
        encoder.syn_stream(1, &Headers::default(), &mut bytes);
        client.write_all(&bytes).await.unwrap();
        let stream = server.accept().await.unwrap();
        server.accept_no_more();
        // Not a header block at all.
        client.write_all(&[0x80, 3, 0, 1, 0, 0, 0, 11, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 7]).await.unwrap();
        bytes.clear();
        Encoder::data(1, 1, true, &mut bytes);
        client.write_all(&[&bytes[..], b"x"].concat()).await.unwrap();
        let mut incoming = stream.incoming;
        assert_eq!(incoming.receive().await.unwrap(), "x");
        client.shutdown().await.unwrap();
        server.closed().await;
        server.close().await;
        let refused = Frame::Reset { stream: 3, status: ResetStatus::RefusedStream as u32 };
        assert_eq!(frames(&mut client).await.first(), Some(&refused));
    }
}
