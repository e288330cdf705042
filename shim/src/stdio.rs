//! The container's output: from its pipes or terminal into the log.

use crate::cri_log::{DEFAULT_MAX_CONTENT, LogFile, Splitter, Stream, timestamp};
use berth_shim_proto::control::Failed;
use berth_shim_proto::launch::Launch;
use berth_sys::poll::{Interest, Poll};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
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
    splitter: Splitter,
}

/// The container's streams and its log.
#[derive(Debug)]
pub(crate) struct Output {
    sources: Vec<Source>,
    log: Option<LogFile>,
    /// The write end of standard input, kept open for as long as the container runs.
    _input: Option<OwnedFd>,
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
            watched.push(Source { file: descriptor.into(), token, splitter });
        }
        Ok(Self { sources: watched, log, _input: input })
    }

    /// Something can be read from the stream of this token.
    pub(crate) fn readable(&mut self, token: u64) {
        let Some(index) = self.sources.iter().position(|source| source.token == token) else { return };
        if let Some(source) = self.sources.get_mut(index)
            && read_some(source, self.log.as_mut(), READS_IN_A_ROW) == After::Ended
        {
            self.sources.remove(index);
        }
    }

    /// Every stream has come to its end.
    pub(crate) fn ended(&self) -> bool {
        self.sources.is_empty()
    }

    /// Takes what is there now and gives up the rest: somebody outside of the container holds a stream open.
    pub(crate) fn cut(&mut self) {
        for mut source in std::mem::take(&mut self.sources) {
            // Not for ever, whoever writes: a pipe's full buffer is in these reads.
            if read_some(&mut source, self.log.as_mut(), READS_IN_A_ROW) != After::Ended {
                end_of(&mut source, self.log.as_mut());
            }
        }
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

fn read_some(source: &mut Source, mut log: Option<&mut LogFile>, reads: usize) -> After {
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
