//! The container's own streams: output from its pipes or terminal into the log and to clients, and its input.

use crate::attached::{Clients, LastWords};
use crate::cri_log::{DEFAULT_MAX_CONTENT, LogFile, Splitter, Stream, timestamp};
use berth_shim_proto::control::Failed;
use berth_shim_proto::launch::Launch;
use berth_sys::poll::{Interest, Poll};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::SystemTime;

use crate::failure::Step;
use crate::host_path::host_path;

/// Bytes read at a time: what a pipe holds by default, pipe(7). The buffer lives only while there is
/// something to read.
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
}

/// The container's streams and its log.
#[derive(Debug)]
pub(crate) struct Output {
    sources: Vec<Source>,
    log: Option<LogFile>,
    clients: Clients,
    has_terminal: bool,
    /// The write end of standard input, kept open for as long as the container runs, unless it is closed when
    /// the first client leaves.
    input: Option<OwnedFd>,
}

/// The ends that the shim keeps of a container's streams.
#[derive(Debug)]
pub(crate) enum ShimStreams {
    Pipes { input: Option<OwnedFd>, output: OwnedFd, error: OwnedFd },
    Terminal(OwnedFd),
}

impl Output {
    /// Opens the log of `launch`.
    pub(crate) fn open_log(launch: &Launch) -> Result<Option<LogFile>, Failed> {
        if launch.log_directory.is_empty() || launch.log_name.is_empty() {
            return Ok(None);
        }
        let path = host_path(&launch.log_directory).join(host_path(&launch.log_name));
        LogFile::open(&launch.log_directory, &launch.log_name).step("open the log", path.display()).map(Some)
    }

    /// Watches the streams under the tokens `first_token` and `first_token + 1`.
    pub(crate) fn watch(
        launch: &Launch,
        streams: ShimStreams,
        log: Option<LogFile>,
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
            berth_sys::file::set_nonblocking(descriptor.as_fd())?;
            poll.watch(descriptor.as_fd(), token, Interest::Input)?;
            let splitter = Splitter::new(stream, max, terminal);
            watched.push(Source { file: descriptor.into(), token, stream, splitter });
        }
        Ok(Self { sources: watched, log, clients: Clients::default(), has_terminal, input })
    }

    /// Something can be read from the stream of this token. What is still to be sent to clients when it is
    /// over.
    pub(crate) fn readable(&mut self, token: u64, poll: &Poll) -> Vec<LastWords> {
        let Some(index) = self.sources.iter().position(|source| source.token == token) else {
            return Vec::new();
        };
        if let Some(source) = self.sources.get_mut(index)
            && read_some(source, self.log.as_mut(), &mut self.clients, poll, READS_IN_A_ROW) == After::Ended
        {
            let stream = self.sources.remove(index).stream;
            return self.clients.end(stream, poll);
        }
        Vec::new()
    }

    /// Passes a stream on to a client as well, from now on.
    ///
    /// # Errors
    /// When the kernel cannot watch its pipe.
    pub(crate) fn attach(&mut self, stream: Stream, to: OwnedFd, token: u64, poll: &Poll) -> io::Result<()> {
        if self.sources.iter().any(|source| source.stream == stream) {
            return self.clients.add(stream, to, self.has_terminal, token, poll);
        }
        // It is over, as the client sees by its end.
        Ok(())
    }

    /// A client has closed its pipe, if there is one with this token.
    pub(crate) fn leave(&mut self, token: u64, poll: &Poll) -> bool {
        self.clients.leave(token, poll)
    }

    /// How many descriptors its clients take.
    pub(crate) fn descriptors_of_clients(&self) -> usize {
        self.clients.len()
    }

    /// Where input goes: `None` when the container has none, or it is closed.
    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd).or_else(|| self.terminal())
    }

    /// Closes the input, which is no terminal's.
    pub(crate) fn close_input(&mut self) {
        self.input = None;
    }

    /// The terminal, if it has one, and that is open.
    pub(crate) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.sources.first().filter(|_| self.has_terminal).map(|source| source.file.as_fd())
    }

    /// Every stream has come to its end.
    pub(crate) fn ended(&self) -> bool {
        self.sources.is_empty()
    }

    /// Takes what is there now and drops the rest: a process outside the container holds a stream open.
    pub(crate) fn cut(&mut self, poll: &Poll) -> Vec<LastWords> {
        let mut untold = Vec::new();
        for mut source in std::mem::take(&mut self.sources) {
            // Not for ever, whatever is written: a pipe's full buffer is in these reads.
            let (log, clients) = (self.log.as_mut(), &mut self.clients);
            if read_some(&mut source, log, clients, poll, READS_IN_A_ROW) != After::Ended {
                end_of(&mut source, self.log.as_mut());
            }
            untold.extend(self.clients.end(source.stream, poll));
        }
        untold
    }

    pub(crate) fn reopen_log(&mut self) -> Result<(), Failed> {
        match &mut self.log {
            Some(log) => log.reopen().step("reopen the log", ""),
            None => Ok(()),
        }
    }

    /// Bytes of log that the disk did not take.
    pub(crate) fn lost_bytes(&self) -> u64 {
        self.log.as_ref().map_or(0, |log| log.lost_bytes)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum After {
    Open,
    Ended,
}

fn read_some(
    source: &mut Source,
    mut log: Option<&mut LogFile>,
    clients: &mut Clients,
    poll: &Poll,
    reads: usize,
) -> After {
    let mut buffer = vec![0; READ_BYTES];
    let mut entries = Vec::new();
    for _ in 0..reads {
        match source.file.read(&mut buffer) {
            Ok(0) => return end_of(source, log),
            Ok(length) => {
                entries.clear();
                let time = timestamp(SystemTime::now());
                source.splitter.push(buffer.get(..length).unwrap_or_default(), &time, &mut entries);
                if let Some(log) = &mut log
                    && !entries.is_empty()
                {
                    log.write(&entries);
                }
                clients.pass(source.stream, buffer.get(..length).unwrap_or_default(), poll);
                if length < READ_BYTES {
                    // Most likely empty now; if not, the poll says so again.
                    return After::Open;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return After::Open,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // EIO: the last process has closed the terminal, pty(7). Nothing else is to be had from a stream
            // that fails.
            Err(_) => return end_of(source, log),
        }
    }
    After::Open
}

fn end_of(source: &mut Source, log: Option<&mut LogFile>) -> After {
    let mut entries = Vec::new();
    source.splitter.finish(&timestamp(SystemTime::now()), &mut entries);
    if let Some(log) = log
        && !entries.is_empty()
    {
        log.write(&entries);
    }
    After::Ended
}
