//! The container's own streams: output from its pipes or terminal into the log and to clients, and
//! its input.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::SystemTime;

use berth_shim_proto::launch::Launch;
use berth_sys::poll::{Interest, Poll};

use crate::attached::{Clients, LastWords};
use crate::cri_log::{DEFAULT_MAX_CONTENT, Splitter, Stream, Time, timestamp};
use crate::log_queue::Log;
use crate::log_writer::MAX_PACKET;
use crate::relay;

/// Bytes read at a time: what a pipe holds by default, pipe(7). The buffer lives only while there
/// is something to read.
const READ_BYTES: usize = 64 * 1024;

/// Reads of one stream before the other and the daemon get their turn.
const READS_IN_A_ROW: usize = 16;

/// One of the container's streams that is still open.
#[derive(Debug)]
struct Source {
    file: File,
    token: u64,
    stream: Stream,
    splitter: Splitter,
    /// Read, but not written for lack of room in the log: until then nothing more is read.
    unwritten: Vec<u8>,
    /// When these bytes were read.
    time: Time,
    /// Nothing more can be read.
    over: bool,
    is_watched: bool,
}

/// The container's streams and its log.
#[derive(Debug)]
pub(crate) struct Output {
    sources: Vec<Source>,
    log: Option<Log>,
    clients: Clients,
    has_terminal: bool,
    /// The write end of standard input, kept open for as long as the container runs, unless it is
    /// closed when the first client leaves.
    input: Option<OwnedFd>,
}

/// The ends that the shim keeps of a container's streams.
#[derive(Debug)]
pub(crate) enum ShimStreams {
    Pipes { input: Option<OwnedFd>, output: OwnedFd, error: OwnedFd },
    Terminal(OwnedFd),
}

impl Output {
    /// Watches the streams under the tokens `first_token` and `first_token + 1`.
    pub(crate) fn watch(
        launch: &Launch,
        streams: ShimStreams,
        log: Option<Log>,
        poll: &Poll,
        first_token: u64,
    ) -> io::Result<Self> {
        let max = match usize::try_from(launch.max_log_line_bytes) {
            Ok(0) | Err(_) => DEFAULT_MAX_CONTENT,
            Ok(bytes) => bytes,
        };
        let has_terminal = matches!(streams, ShimStreams::Terminal(_));
        let (sources, input) = match streams {
            ShimStreams::Pipes { input, output, error } => {
                (vec![(output, Stream::Stdout, false), (error, Stream::Stderr, false)], input)
            }
            ShimStreams::Terminal(controller) => (vec![(controller, Stream::Stdout, true)], None),
        };
        let mut watched = Vec::new();
        for ((descriptor, stream, terminal), token) in sources.into_iter().zip(first_token..) {
            let source = Source {
                file: descriptor.into(),
                token,
                stream,
                splitter: Splitter::new(stream, max, terminal),
                unwritten: Vec::new(),
                time: timestamp(SystemTime::now()),
                over: false,
                is_watched: true,
            };
            let prepared = berth_sys::file::set_nonblocking(source.file.as_fd())
                .and_then(|()| poll.watch(source.file.as_fd(), token, Interest::Input));
            if let Err(error) = prepared {
                watched.iter_mut().for_each(|source: &mut Source| source.watch(false, poll));
                return Err(error);
            }
            watched.push(source);
        }
        Ok(Self { sources: watched, log, clients: Clients::default(), has_terminal, input })
    }

    /// Handles input on the stream of this token. Returns the rest of what clients get when the
    /// stream is over.
    pub(crate) fn readable(&mut self, token: u64, poll: &Poll) -> Vec<LastWords> {
        // A wake-up may be from before the log was full.
        if let Some(source) = self.sources.iter_mut().find(|source| source.token == token)
            && source.is_watched
        {
            source.read_some(&mut self.log, &mut self.clients, poll, READS_IN_A_ROW);
        }
        self.go_on(poll)
    }

    /// Continues as far as the log has room.
    pub(crate) fn go_on(&mut self, poll: &Poll) -> Vec<LastWords> {
        let mut untold = Vec::new();
        let mut sources = std::mem::take(&mut self.sources);
        for mut source in sources.extract_if(.., |source| source.go_on(&mut self.log, poll) == After::Ended) {
            source.watch(false, poll);
            untold.extend(self.clients.end(source.stream, poll));
        }
        let is_full = self.log.as_ref().is_some_and(Log::is_full);
        for source in &mut sources {
            source.watch(!is_full && !source.over, poll);
        }
        self.sources = sources;
        untold
    }

    /// Passes a stream on to a client as well, from now on.
    ///
    /// # Errors
    /// When the kernel cannot watch its pipe.
    pub(crate) fn attach(&mut self, stream: Stream, to: OwnedFd, token: u64, poll: &Poll) -> io::Result<()> {
        if self.sources.iter().any(|source| source.stream == stream) {
            return self.clients.add(stream, to, self.has_terminal, token, poll);
        }
        // It is over, which the client sees from the end of its pipe.
        Ok(())
    }

    /// Forgets the client with this token, if any, which has closed its pipe.
    pub(crate) fn leave(&mut self, token: u64, poll: &Poll) -> bool {
        self.clients.leave(token, poll)
    }

    /// How many descriptors its clients use.
    pub(crate) fn descriptors_of_clients(&self) -> usize {
        self.clients.len()
    }

    /// The input: `None` when the container has none, or it is closed.
    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd).or_else(|| self.terminal())
    }

    /// Closes the input, unless it is a terminal's.
    pub(crate) fn close_input(&mut self) {
        self.input = None;
    }

    /// The terminal, if it has one that is open.
    pub(crate) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.sources.first().filter(|_| self.has_terminal).map(|source| source.file.as_fd())
    }

    /// Whether every stream has come to its end.
    pub(crate) fn ended(&self) -> bool {
        self.sources.is_empty()
    }

    /// Takes what is available now and drops the rest: a process outside the container holds a
    /// stream open, or the log makes no progress.
    pub(crate) fn cut(&mut self, poll: &Poll) -> Vec<LastWords> {
        if let Some(log) = &mut self.log {
            log.make_last_room(poll);
        }
        let mut untold = Vec::new();
        for mut source in std::mem::take(&mut self.sources) {
            // A limited number of reads, whatever is written: what the program can have left is in
            // them.
            for _ in 0..=relay::left_in(source.file.as_fd()).div_ceil(READ_BYTES) {
                source.write_rest(&mut self.log, poll);
                source.leave_out_rest(&mut self.log);
                if source.over || !source.read_some(&mut self.log, &mut self.clients, poll, 1) {
                    break;
                }
            }
            source.over = true;
            source.leave_out_rest(&mut self.log);
            source.go_on(&mut self.log, poll);
            source.watch(false, poll);
            untold.extend(self.clients.end(source.stream, poll));
        }
        untold
    }

    /// The log, if it has one.
    pub(crate) fn log(&self) -> Option<&Log> {
        self.log.as_ref()
    }

    /// As [`log`](Self::log).
    pub(crate) fn log_mut(&mut self) -> Option<&mut Log> {
        self.log.as_mut()
    }
}

#[derive(Debug, PartialEq, Eq)]
enum After {
    Open,
    Ended,
}

impl Source {
    /// Reads what is available, passes it to clients, and queues it for the log as far as there is
    /// room. Returns whether there may be more.
    fn read_some(&mut self, log: &mut Option<Log>, clients: &mut Clients, poll: &Poll, reads: usize) -> bool {
        let (mut buffer, mut packet) = (vec![0; READ_BYTES], Vec::new());
        for _ in 0..reads {
            match self.file.read(&mut buffer) {
                Ok(0) => {
                    self.over = true;
                    return false;
                }
                Ok(length) => {
                    self.time = timestamp(SystemTime::now());
                    let read = buffer.get(..length).unwrap_or_default();
                    clients.pass(self.stream, read, poll);
                    let written = self.write(read, log, poll, &mut packet);
                    self.unwritten = read.get(written..).unwrap_or_default().to_vec();
                    if length < READ_BYTES || !self.unwritten.is_empty() {
                        // Most likely empty now; if not, the poll says so again.
                        return true;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // EIO: the last process has closed the terminal, pty(7). A stream that fails has
                // nothing more to give.
                Err(_) => {
                    self.over = true;
                    return false;
                }
            }
        }
        true
    }

    /// Queues `bytes` for the log as far as there is room, assembled in `packet`; returns how many
    /// were queued.
    fn write(&mut self, bytes: &[u8], log: &mut Option<Log>, poll: &Poll, packet: &mut Vec<u8>) -> usize {
        let Some(log) = log else { return bytes.len() };
        let mut written = 0;
        while !log.is_full() && written < bytes.len() {
            let entries = |entries: &mut Vec<u8>| {
                let rest = bytes.get(written..).unwrap_or_default();
                written += self.splitter.push(rest, &self.time, MAX_PACKET / 2, entries);
            };
            log.write(packet, entries, poll);
        }
        written
    }

    /// Queues the rest as far as there is room.
    fn write_rest(&mut self, log: &mut Option<Log>, poll: &Poll) {
        let rest = std::mem::take(&mut self.unwritten);
        let written = self.write(&rest, log, poll, &mut Vec::new());
        self.unwritten = rest.get(written..).unwrap_or_default().to_vec();
    }

    /// Gives up the rest.
    fn leave_out_rest(&mut self, log: &mut Option<Log>) {
        let rest = std::mem::take(&mut self.unwritten);
        if let Some(log) = log {
            log.leave_out(rest.len());
        }
    }

    /// Continues as far as there is room. Returns whether it is over.
    fn go_on(&mut self, log: &mut Option<Log>, poll: &Poll) -> After {
        self.write_rest(log, poll);
        if !self.over || !self.unwritten.is_empty() {
            return After::Open;
        }
        if let Some(log) = log {
            let last = |entries: &mut Vec<u8>| {
                self.splitter.finish(&timestamp(SystemTime::now()), entries);
            };
            log.write(&mut Vec::new(), last, poll);
        }
        After::Ended
    }

    /// Watches the stream for input, or not.
    fn watch(&mut self, wanted: bool, poll: &Poll) {
        if wanted == self.is_watched {
            return;
        }
        // The kernel may lack descriptors or memory; then it is tried again at the next turn.
        let changed = if wanted {
            poll.watch(self.file.as_fd(), self.token, Interest::Input)
        } else {
            poll.forget(self.file.as_fd())
        };
        if changed.is_ok() {
            self.is_watched = wanted;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use berth_sys::{file, tty};

    use super::*;

    const TOKEN: u64 = 2;

    /// What would wake the shim endlessly.
    fn wakes(poll: &Poll) -> bool {
        !poll.wait(Some(Duration::ZERO)).unwrap().is_empty()
    }

    /// A client's input goes to a copy of it.
    #[test]
    fn a_terminal_that_is_over_is_not_watched_whoever_has_a_copy_of_it() {
        let poll = Poll::new().unwrap();
        let controller = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        let copy = controller.try_clone().unwrap();
        let program = tty::open_other_end(controller.as_fd()).unwrap();
        let streams = ShimStreams::Terminal(controller.into());
        let mut output = Output::watch(&Launch::default(), streams, None, &poll, TOKEN).unwrap();
        File::from(program).write_all(b"x").unwrap();
        while wakes(&poll) && !output.ended() {
            output.readable(TOKEN, &poll);
        }
        assert!(output.ended() && !wakes(&poll));
        drop(copy);
    }

    #[test]
    fn a_stream_that_cannot_be_watched_leaves_no_other_watched() {
        let poll = Poll::new().unwrap();
        let (output, written) = file::pipe().unwrap();
        let copy = output.try_clone().unwrap();
        // epoll takes no regular file.
        let error = File::open("/proc/self/exe").unwrap().into();
        let streams = ShimStreams::Pipes { input: None, output, error };
        assert!(Output::watch(&Launch::default(), streams, None, &poll, TOKEN).is_err());
        File::from(written).write_all(b"x").unwrap();
        assert!(!wakes(&poll));
        drop(copy);
    }
}
