//! One connection of a daemon: frames in, frames out, without blocking on a peer that does not
//! read.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use berth_shim_proto::control::{Reply, Request, request::Call};
use berth_shim_proto::frame;
use berth_shim_proto::launch::PidNamespace;
use berth_sys::poll::{Interest, Poll};
use berth_sys::socket;

/// Bytes that may be queued for a daemon that does not read. Replies are small, except for one with
/// many groups (65536 of five bytes); a daemon that lets this many pile up is stuck, and finds
/// everything in the exit record when it reconnects.
const MAX_WAITING: usize = 1024 * 1024;

/// A connection that may be closed at any time.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    token: u64,
    received: Vec<u8>,
    /// One group for each frame that carries descriptors, in the order of the frames.
    descriptors: VecDeque<Vec<OwnedFd>>,
    waiting: Vec<u8>,
    watching_writes: bool,
}

/// The state of a connection after reading.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// It is open, with these new requests, each with the descriptors of its frame.
    Requests(Vec<(Request, Vec<OwnedFd>)>),
    /// It is closed.
    Closed,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd, token: u64, poll: &Poll) -> io::Result<Self> {
        berth_sys::file::set_nonblocking(socket.as_fd())?;
        poll.watch(socket.as_fd(), token, Interest::Input)?;
        Ok(Self {
            socket,
            token,
            received: Vec::new(),
            descriptors: VecDeque::new(),
            waiting: Vec::new(),
            watching_writes: false,
        })
    }

    pub(crate) fn token(&self) -> u64 {
        self.token
    }

    /// Removes it from epoll: closing is not enough while a newly created child has a copy.
    pub(crate) fn forget(&self, poll: &Poll) {
        let _ = poll.forget(self.socket.as_fd());
    }

    /// Reads available data.
    pub(crate) fn read(&mut self) -> Incoming {
        let mut requests = Vec::new();
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match socket::receive(self.socket.as_fd(), &mut buffer) {
                Ok((0, _)) => return Incoming::Closed,
                Ok((length, descriptors)) => {
                    self.received.extend_from_slice(buffer.get(..length).unwrap_or_default());
                    // The kernel never joins two groups into one read: unix(7), "ancillary data
                    // forms a barrier".
                    if !descriptors.is_empty() {
                        self.descriptors.push_back(descriptors);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Incoming::Closed,
            }
            loop {
                match frame::take::<Request>(&mut self.received) {
                    Ok(Some(request)) => {
                        let carries = match &request.call {
                            Some(Call::Exec(_) | Call::Attach(_)) => true,
                            Some(Call::Create(launch)) => {
                                matches!(launch.namespaces.pid, Some(PidNamespace::Target(())))
                            }
                            _ => false,
                        };
                        let descriptors =
                            if carries { self.descriptors.pop_front() } else { None }.unwrap_or_default();
                        requests.push((request, descriptors));
                    }
                    Ok(None) => break,
                    Err(_) => return Incoming::Closed,
                }
            }
        }
        if self.received.is_empty() {
            self.received = Vec::new();
        }
        Incoming::Requests(requests)
    }

    /// Sends `reply`, now or as soon as there is room. `false` if the connection is closed.
    pub(crate) fn send(&mut self, reply: &Reply, poll: &Poll) -> bool {
        let Ok(bytes) = frame::encode(reply) else { return false };
        if self.waiting.len() + bytes.len() > MAX_WAITING {
            return false;
        }
        self.waiting.extend_from_slice(&bytes);
        self.flush(poll)
    }

    /// Sends queued data, as far as there is room.
    pub(crate) fn flush(&mut self, poll: &Poll) -> bool {
        while !self.waiting.is_empty() {
            match socket::send(self.socket.as_fd(), &self.waiting, &[]) {
                Ok(length) => {
                    self.waiting.drain(..length);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        let watch = !self.waiting.is_empty();
        if watch != self.watching_writes {
            let interest = if watch { Interest::InputAndRoom } else { Interest::Input };
            if poll.change(self.socket.as_fd(), self.token, interest).is_err() {
                return false;
            }
            self.watching_writes = watch;
        }
        true
    }

    /// Sends queued data before closing, for at most `limit`.
    pub(crate) fn flush_before_end(&mut self, poll: &Poll, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.flush(poll) && !self.waiting.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
