//! The shim's end of a container's log: entries wait here for the writer ([`crate::log_writer`]),
//! and nothing here waits for the writer.
//!
//! One run of entries that does not fit into the queue is held; then the log is full, and nothing
//! more is read from the container until there is room again: a program that writes faster than its
//! disk blocks in its own write.
//!
//! A writer that was killed is replaced, at most once per second. Packets in the queue wait for the
//! next one.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use berth_shim_proto::control::Failed;
use berth_shim_proto::launch::Launch;
use berth_sys::poll::{Interest, Poll, Ready};
use berth_sys::socket;

use crate::failure::{Step, refused};
use crate::host_path::host_path;
use crate::log_writer::{self, Answer, END, MAX_PACKET, OPEN, REOPEN, WRITE, Writer, path, path_of};

/// The room in the queue at the end, for the content of the container's pipes, as with
/// `QUEUE_BYTES` of [`crate::log_writer`]: at that point it cannot wait any more.
const LAST_ROOM: usize = 512 * 1024;

/// The most unanswered requests to reopen the log. A kubelet retries again and again.
const MOST_REOPENS: usize = 4;

/// The shortest time between two writers.
const PAUSE: Duration = Duration::from_secs(1);

/// The log of a container.
#[derive(Debug)]
pub(crate) struct Log {
    /// `None` when it is closed.
    writer: Option<Writer>,
    /// When to replace a writer that has ended.
    again: Option<Instant>,
    token: u64,
    directory: Vec<u8>,
    name: Vec<u8>,
    /// Entries that did not fit into the queue.
    held: VecDeque<Vec<u8>>,
    watches_room: bool,
    /// The numbers of unanswered requests to reopen it.
    reopens: VecDeque<u32>,
    last_reopen: u32,
    stage: Stage,
    /// Bytes of output that were not passed on.
    left_out: u64,
    /// A writer was killed, and its knowledge is lost.
    was_killed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Opening,
    Open,
    /// The end was requested.
    Ending,
    /// Everything is written, except for this many bytes.
    Ended(u64),
}

/// News about a log.
#[derive(Debug)]
pub(crate) enum Heard {
    Opened(Result<(), Failed>),
    Reopened(Result<(), Failed>),
    /// It has room, or has ended.
    Moved,
}

impl Log {
    /// Begins to open the log of `launch`, if it has one. Wake-ups come with `token`.
    ///
    /// # Errors
    /// When the kernel cannot watch it.
    pub(crate) fn open(
        launch: &Launch,
        writer: Writer,
        token: u64,
        poll: &Poll,
    ) -> Result<Option<Self>, Failed> {
        if launch.log_directory.is_empty() || launch.log_name.is_empty() {
            return Ok(None);
        }
        poll.watch(writer.queue(), token, Interest::Input).step("open the log", "")?;
        let again = writer.pid().is_none().then(|| writer.since() + PAUSE);
        let mut log = Self {
            writer: Some(writer),
            again,
            token,
            directory: launch.log_directory.clone(),
            name: launch.log_name.clone(),
            held: VecDeque::new(),
            watches_room: false,
            reopens: VecDeque::new(),
            last_reopen: 0,
            stage: Stage::Opening,
            left_out: 0,
            was_killed: false,
        };
        log.send(&log.open_packet(), poll);
        Ok(Some(log))
    }

    /// Whether it is open yet.
    pub(crate) fn is_open(&self) -> bool {
        self.stage != Stage::Opening
    }

    /// The error for a log that was not opened in time.
    pub(crate) fn late(&self) -> Failed {
        refused("open the log", format!("{}: its file system does not answer", self.path()))
    }

    /// Whether it takes nothing more now.
    pub(crate) fn is_full(&self) -> bool {
        !self.held.is_empty()
    }

    /// Queues a run of entries, which `entries` appends to its argument.
    pub(crate) fn write(&mut self, buffer: &mut Vec<u8>, entries: impl FnOnce(&mut Vec<u8>), poll: &Poll) {
        buffer.clear();
        // The header of the packet; that of the next one replaces a byte that was already sent.
        buffer.push(WRITE);
        entries(buffer);
        let mut packets = buffer.as_mut_slice();
        while packets.len() > 1 {
            let length = 1 + part(packets.get(1..).unwrap_or_default());
            self.send(packets.get(..length).unwrap_or_default(), poll);
            packets = packets.get_mut(length - 1..).unwrap_or_default();
            if let Some(head) = packets.first_mut() {
                *head = WRITE;
            }
        }
    }

    /// Reopens the log by its path. The answer is [`Heard::Reopened`], in the order of the
    /// requests.
    ///
    /// # Errors
    /// When too many earlier requests are unanswered.
    pub(crate) fn reopen(&mut self, poll: &Poll) -> Result<(), Failed> {
        if self.writer.is_none() || self.reopens.len() >= MOST_REOPENS {
            return Err(self.late_again());
        }
        self.last_reopen = self.last_reopen.wrapping_add(1);
        self.reopens.push_back(self.last_reopen);
        self.send(&[[REOPEN].as_slice(), &self.last_reopen.to_le_bytes()].concat(), poll);
        Ok(())
    }

    /// The error for a log that was not reopened in time.
    pub(crate) fn late_again(&self) -> Failed {
        let why = "its file system does not answer; the old file stays in use until it does";
        refused("reopen the log", format!("{}: {why}", self.path()))
    }

    /// Makes room for the last entries, which cannot wait.
    pub(crate) fn make_last_room(&mut self, poll: &Poll) {
        self.set_room(LAST_ROOM);
        self.send_held(poll);
    }

    fn set_room(&self, bytes: usize) {
        if let Some(writer) = &self.writer {
            // Without it some may be dropped.
            let _ = socket::set_send_room(writer.queue(), bytes);
        }
    }

    /// Counts bytes of output that are not passed on.
    pub(crate) fn leave_out(&mut self, bytes: usize) {
        self.left_out = self.left_out.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// Requests the end; returns whether that is a new request.
    pub(crate) fn end(&mut self, poll: &Poll) -> bool {
        let is_new = matches!(self.stage, Stage::Opening | Stage::Open);
        if is_new {
            self.stage = Stage::Ending;
            self.send(&self.end_packet(), poll);
        }
        is_new
    }

    /// Whether everything that will ever be written is written.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended(_)) || self.writer.is_none()
    }

    /// Leaves the writer alone with the content of its queue.
    pub(crate) fn give_up(&mut self, poll: &Poll) {
        if self.has_ended() {
            return;
        }
        for packet in std::mem::take(&mut self.held) {
            if packet.first() == Some(&WRITE) {
                self.leave_out(packet.len() - 1);
            }
        }
        self.stage = Stage::Ending;
        // One more packet.
        self.set_room(LAST_ROOM + MAX_PACKET);
        self.send(&self.end_packet(), poll);
        self.held.clear();
        if self.again.is_some() {
            self.replace();
        }
    }

    /// The number of bytes that will never be in it.
    pub(crate) fn lost_bytes(&self) -> u64 {
        match self.stage {
            Stage::Ended(lost) => lost,
            _ => self.left_out,
        }
    }

    /// Whether it is known that nothing else is missing in it.
    pub(crate) fn is_complete(&self) -> bool {
        matches!(self.stage, Stage::Ended(_)) && !self.was_killed
    }

    /// Handles a wake-up.
    pub(crate) fn ready(&mut self, ready: Ready, poll: &Poll) -> Vec<Heard> {
        let mut heard = Vec::new();
        if ready.readable {
            self.hear(&mut heard, poll);
        }
        if ready.writable && !self.held.is_empty() {
            self.send_held(poll);
            heard.push(Heard::Moved);
        }
        heard
    }

    /// The process that writes it, until it is reaped.
    pub(crate) fn writer(&self) -> Option<i32> {
        self.writer.as_ref()?.pid()
    }

    /// Handles the end of a child. If it was the writer, it will be replaced.
    pub(crate) fn child_ended(&mut self, pid: i32, poll: &Poll) -> Option<Vec<Heard>> {
        let writer = self.writer.as_mut()?;
        if !writer.reaped(pid) {
            return None;
        }
        self.again = Some(writer.since() + PAUSE);
        let mut heard = Vec::new();
        // Read its last messages, which may say that it ends.
        self.hear(&mut heard, poll);
        self.was_killed |= self.writer.is_some();
        self.time_over(Instant::now());
        Some(heard)
    }

    /// When to call [`time_over`](Self::time_over).
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.again
    }

    /// Replaces the writer if that is due.
    pub(crate) fn time_over(&mut self, now: Instant) {
        if self.again.is_some_and(|again| again <= now) {
            self.replace();
        }
    }

    /// Replaces a writer that has ended.
    fn replace(&mut self) {
        let Some(writer) = &mut self.writer else { return };
        // Before it is open, the path is in the queue.
        let log = (self.stage != Stage::Opening).then(|| path(&path_of(&self.directory, &self.name)));
        self.again = match writer.replace(log) {
            Ok(()) => None,
            Err(_) => Some(writer.since() + PAUSE),
        };
    }

    fn hear(&mut self, heard: &mut Vec<Heard>, poll: &Poll) {
        let mut packet = [0; 512];
        while let Some(writer) = &self.writer {
            match socket::receive(writer.queue(), &mut packet) {
                Ok((length, _)) => match log_writer::answer(packet.get(..length).unwrap_or_default()) {
                    Some(Answer::Opened(result)) => self.opened(result, heard),
                    // Not when a writer repeats an answer of the one that it has replaced.
                    Some(Answer::Reopened(number, result)) if self.reopens.front() == Some(&number) => {
                        self.reopens.pop_front();
                        heard.push(Heard::Reopened(result.step("reopen the log", self.path())));
                    }
                    Some(Answer::Ended(lost)) => {
                        self.stage = Stage::Ended(lost);
                        self.close(poll);
                        heard.push(Heard::Moved);
                    }
                    Some(Answer::Reopened(..)) | None => {}
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing more for now.
                Err(_) => return,
            }
        }
    }

    fn opened(&mut self, result: io::Result<()>, heard: &mut Vec<Heard>) {
        if self.stage == Stage::Opening {
            if result.is_ok() {
                self.stage = Stage::Open;
            }
            heard.push(Heard::Opened(result.step("open the log", self.path())));
        }
    }

    fn open_packet(&self) -> Vec<u8> {
        [&[OPEN], path_of(&self.directory, &self.name).as_slice()].concat()
    }

    fn end_packet(&self) -> Vec<u8> {
        [[END].as_slice(), &self.left_out.to_le_bytes()].concat()
    }

    /// Sends a packet, now or as soon as there is room.
    fn send(&mut self, packet: &[u8], poll: &Poll) {
        let Some(writer) = &self.writer else {
            if packet.first() == Some(&WRITE) {
                self.leave_out(packet.len() - 1);
            }
            return;
        };
        if self.held.is_empty() && socket::send(writer.queue(), packet, &[]).is_ok() {
            return;
        }
        self.held.push_back(packet.to_vec());
        self.send_held(poll);
    }

    fn send_held(&mut self, poll: &Poll) {
        let Some(writer) = &self.writer else { return };
        while let Some(packet) = self.held.front() {
            match socket::send(writer.queue(), packet, &[]) {
                Ok(_) => drop(self.held.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No room.
                Err(_) => break,
            }
        }
        let watch = !self.held.is_empty();
        if watch != self.watches_room {
            let interest = if watch { Interest::InputAndRoom } else { Interest::Input };
            // Without it nothing would be received any more; it is watched already, so this cannot
            // fail.
            let _ = poll.change(writer.queue(), self.token, interest);
            self.watches_room = watch;
        }
    }

    /// Closes the connection to the writer, which writes what it has and ends.
    pub(crate) fn close(&mut self, poll: &Poll) {
        if let Some(writer) = self.writer.take() {
            let _ = poll.forget(writer.queue());
        }
        self.again = None;
    }

    fn path(&self) -> String {
        host_path(&self.directory).join(host_path(&self.name)).display().to_string()
    }
}

/// How many bytes of a run of entries go into one packet: whole entries, if at least one fits.
fn part(entries: &[u8]) -> usize {
    const MOST: usize = MAX_PACKET - 1;
    if entries.len() <= MOST {
        return entries.len();
    }
    let most = entries.get(..MOST).unwrap_or_default();
    memchr::memrchr(b'\n', most).map_or(MOST, |end| end + 1)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;

    /// A log whose writer is this test.
    fn log(poll: &Poll) -> (Log, OwnedFd) {
        let (writer, end) = Writer::of_test();
        let launch = Launch { log_directory: b"/d".into(), log_name: b"n".into(), ..Launch::default() };
        (Log::open(&launch, writer, 1, poll).unwrap().unwrap(), end)
    }

    fn packet(writer: &OwnedFd) -> Option<Vec<u8>> {
        let mut packet = vec![0; MAX_PACKET];
        let (length, _) = socket::receive(writer.as_fd(), &mut packet).ok()?;
        packet.truncate(length);
        Some(packet)
    }

    fn heard(log: &mut Log, poll: &Poll) -> Vec<Heard> {
        let ready = poll.wait(Some(Duration::ZERO)).unwrap();
        ready.into_iter().flat_map(|ready| log.ready(ready, poll)).collect()
    }

    fn entries(count: usize) -> Vec<u8> {
        (0..count).flat_map(|number| format!("T stdout F {number}\n").into_bytes()).collect()
    }

    #[test]
    fn what_has_no_room_waits_and_arrives_in_order() {
        let poll = Poll::new().unwrap();
        let (mut log, writer) = log(&poll);
        assert_eq!(packet(&writer).unwrap(), b"O/d\0n");
        assert!(!log.is_open());
        socket::send(writer.as_fd(), b"o\0\0\0\0", &[]).unwrap();
        assert!(matches!(heard(&mut log, &poll).as_slice(), [Heard::Opened(Ok(()))]));
        assert!(log.is_open());
        let mut written = Vec::new();
        while !log.is_full() {
            let some = entries(5000);
            log.write(&mut Vec::new(), |buffer| buffer.extend_from_slice(&some), &poll);
            written.extend(some);
        }
        assert!(written.len() < 4 << 20, "{}", written.len());
        log.reopen(&poll).unwrap();
        let (mut read, mut packets) = (Vec::new(), 0);
        let reopened = loop {
            match packet(&writer) {
                Some(packet) if packet[0] == REOPEN => break packet,
                Some(packet) => {
                    assert!(packet[0] == WRITE && packet.ends_with(b"\n"), "whole entries");
                    assert!(packet[1..].starts_with(b"T stdout"), "{:?}", &packet[..9]);
                    packets += 1;
                    read.extend_from_slice(&packet[1..]);
                }
                None => {
                    assert!(heard(&mut log, &poll).iter().any(|heard| matches!(heard, Heard::Moved)));
                }
            }
        };
        assert_eq!((&reopened[1..], packets > 1, read == written), (&b"\x01\0\0\0"[..], true, true));
        assert!(!log.is_full() && heard(&mut log, &poll).is_empty());
        // Each is answered once, even if a second writer repeats the answer.
        for _ in 0..2 {
            socket::send(writer.as_fd(), b"r\x01\0\0\0\x02\0\0\0", &[]).unwrap();
        }
        let [Heard::Reopened(Err(failed))] = &heard(&mut log, &poll)[..] else { panic!("no answer") };
        assert_eq!((failed.errno, failed.detail.as_str()), (2, "/d/n"));
        assert!(log.end(&poll) && !log.end(&poll) && !log.has_ended());
        assert_eq!(packet(&writer).unwrap(), b"E\0\0\0\0\0\0\0\0");
        socket::send(writer.as_fd(), b"e\x03\0\0\0\0\0\0\0", &[]).unwrap();
        assert_eq!(heard(&mut log, &poll).len(), 1);
        assert!(log.has_ended() && log.is_complete() && log.lost_bytes() == 3);
    }

    #[test]
    fn attempts_to_reopen_it_do_not_pile_up() {
        let poll = Poll::new().unwrap();
        let (mut log, _writer) = log(&poll);
        let taken = (0..100).filter(|_| log.reopen(&poll).is_ok()).count();
        assert_eq!(taken, MOST_REOPENS);
    }

    #[test]
    fn what_a_writer_does_not_take_at_the_end_is_counted_and_the_writer_is_told() {
        let poll = Poll::new().unwrap();
        let (mut log, writer) = log(&poll);
        let mut bytes = 0;
        while !log.is_full() {
            log.write(&mut Vec::new(), |buffer| buffer.extend(entries(5000)), &poll);
            bytes += entries(5000).len();
        }
        log.make_last_room(&poll);
        while !log.is_full() {
            log.write(&mut Vec::new(), |buffer| buffer.extend(entries(5000)), &poll);
            bytes += entries(5000).len();
        }
        assert!(log.end(&poll));
        log.leave_out(7);
        log.give_up(&poll);
        assert!(!log.is_complete() && !log.is_full());
        let lost = log.lost_bytes();
        log.close(&poll);
        let (mut read, mut end) = (0, None);
        while let Some(packet) = packet(&writer).filter(|packet| !packet.is_empty()) {
            match packet[0] {
                WRITE => read += packet.len() - 1,
                END => end = Some(u64::from_le_bytes(packet[1..].try_into().unwrap())),
                _ => {}
            }
        }
        assert_eq!(usize::try_from(lost).unwrap(), bytes - read + 7);
        // Only a privileged process can have room for one more packet than allowed.
        assert!(end.is_none_or(|end| end == lost), "{end:?} {lost}");
    }

    #[test]
    fn what_is_in_the_queue_outlasts_a_writer() {
        let poll = Poll::new().unwrap();
        let (mut log, writer) = log(&poll);
        log.write(&mut Vec::new(), |buffer| buffer.extend_from_slice(b"T stdout F x\n"), &poll);
        drop(writer);
        let soon = log.deadline();
        assert!(heard(&mut log, &poll).is_empty() && soon.is_none());
        assert!(!log.is_full() && !log.has_ended() && log.lost_bytes() == 0);
        log.close(&poll);
        assert!(log.has_ended());
        // What is written then is lost, and nothing waits.
        log.write(&mut Vec::new(), |buffer| buffer.extend_from_slice(b"T stdout F x\n"), &poll);
        assert!(!log.is_full() && log.lost_bytes() == 13);
    }
}
