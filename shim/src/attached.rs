//! Clients that are attached to the output of the container.
//!
//! Each gets the output from now on, in addition to the log, and the shim waits for none of them:
//! what a client has not read stays in its pipe. When a pipe is full, it is enlarged as far as
//! [`MOST_BYTES`] and [`MOST_BYTES_OF_ALL`] allow; when it is full again, output is dropped for
//! this client. A line in its place says how much.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use berth_sys::file;
use berth_sys::poll::{Interest, Poll};

use crate::cri_log::Stream;

/// The limit on unread output of one stream. More is in transit: in the daemon and in sockets.
const MOST_BYTES: usize = 4 * 1024 * 1024;

/// The unread output of all clients together beyond which pipes are no longer enlarged, and new
/// ones are small.
const MOST_BYTES_OF_ALL: usize = 8 * 1024 * 1024;

/// The capacity of a small pipe.
const SMALL_BYTES: i32 = 16 * 1024;

/// A client and one of its streams.
#[derive(Debug)]
struct Attached {
    stream: Stream,
    to: File,
    token: u64,
    /// The capacity of its pipe.
    room: usize,
    /// Whether the container has a terminal, where lines end differently.
    terminal: bool,
    /// Bytes dropped since the last line that reported some.
    left_out: u64,
}

/// The rest of what a client gets when a stream is over.
#[derive(Debug)]
pub(crate) struct LastWords {
    pub(crate) to: File,
    pub(crate) token: u64,
    pub(crate) words: Vec<u8>,
}

/// All attached clients.
#[derive(Debug, Default)]
pub(crate) struct Clients(Vec<Attached>);

impl Clients {
    /// Adds a client's pipe. Closing it causes a wake-up with `token`.
    ///
    /// # Errors
    /// When the kernel cannot watch it.
    pub(crate) fn add(
        &mut self,
        stream: Stream,
        to: OwnedFd,
        terminal: bool,
        token: u64,
        poll: &Poll,
    ) -> io::Result<()> {
        file::set_nonblocking(to.as_fd())?;
        poll.watch(to.as_fd(), token, Interest::Failure)?;
        let mut room = file::pipe_size(to.as_fd()).unwrap_or(0);
        if self.room() + room > MOST_BYTES_OF_ALL {
            // If the kernel does not shrink it, it stays as it is.
            let _ = file::resize_pipe(to.as_fd(), SMALL_BYTES);
            room = file::pipe_size(to.as_fd()).unwrap_or(room);
        }
        self.0.push(Attached { stream, to: to.into(), token, room, terminal, left_out: 0 });
        Ok(())
    }

    /// The capacity of all pipes together.
    fn room(&self) -> usize {
        self.0.iter().map(|client| client.room).sum()
    }

    /// The number of pipes.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Passes `bytes` of a stream to every client of that stream.
    pub(crate) fn pass(&mut self, stream: Stream, bytes: &[u8], poll: &Poll) {
        let mut spare = MOST_BYTES_OF_ALL.saturating_sub(self.room());
        let mut passes = |client: &mut Attached| client.pass(bytes, &mut spare).is_ok();
        let gone = self.0.extract_if(.., |client| client.stream == stream && !passes(client));
        gone.for_each(|client| client.close(poll));
    }

    /// Forgets the client with this token, if any, after it has closed its pipe.
    pub(crate) fn leave(&mut self, token: u64, poll: &Poll) -> bool {
        let Some(index) = self.0.iter().position(|client| client.token == token) else { return false };
        self.0.swap_remove(index).close(poll);
        true
    }

    /// Ends a stream for all its clients. What they have not read stays in their pipes.
    pub(crate) fn end(&mut self, stream: Stream, poll: &Poll) -> Vec<LastWords> {
        let (mut untold, all) = (Vec::new(), self.0.extract_if(.., |client| client.stream == stream));
        for client in all {
            if client.left_out == 0 {
                client.close(poll);
            } else {
                let words = client.notice();
                untold.push(LastWords { to: client.to, token: client.token, words });
            }
        }
        untold
    }
}

impl Attached {
    /// `spare`: by how many bytes pipes may grow.
    ///
    /// # Errors
    /// When the client has closed its pipe.
    fn pass(&mut self, mut bytes: &[u8], spare: &mut usize) -> io::Result<()> {
        if self.left_out > 0 {
            // All of it or nothing, since it is short: pipe(7), `PIPE_BUF`.
            match self.to.write(&self.notice()) {
                Ok(_) => self.left_out = 0,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.leave_out(bytes);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        while !bytes.is_empty() {
            match self.to.write(bytes) {
                Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.enlarge(spare) {
                        self.leave_out(bytes);
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Enlarges its pipe, if it may grow; returns whether it did.
    fn enlarge(&mut self, spare: &mut usize) -> bool {
        let most = MOST_BYTES.min(self.room + *spare);
        if !i32::try_from(most).is_ok_and(|most| file::enlarge_pipe(self.to.as_fd(), most)) {
            return false;
        }
        let room = file::pipe_size(self.to.as_fd()).unwrap_or(self.room);
        *spare = spare.saturating_sub(room.saturating_sub(self.room));
        self.room = room;
        true
    }

    fn leave_out(&mut self, bytes: &[u8]) {
        self.left_out = self.left_out.saturating_add(bytes.len().try_into().unwrap_or(u64::MAX));
    }

    fn notice(&self) -> Vec<u8> {
        let end = if self.terminal { "\r\n" } else { "\n" };
        format!("{end}[berth: {} bytes dropped: not read in time]{end}", self.left_out).into_bytes()
    }

    /// As with [`crate::connection::Connection::forget`].
    fn close(self, poll: &Poll) {
        let _ = poll.forget(self.to.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use super::*;

    const MOST: usize = MOST_BYTES;

    fn pipe() -> (File, OwnedFd) {
        let (read, write) = file::pipe().unwrap();
        file::set_nonblocking(read.as_fd()).unwrap();
        (read.into(), write)
    }

    fn read(from: &mut File) -> Vec<u8> {
        let mut all = Vec::new();
        let ended = from.read_to_end(&mut all);
        assert!(ended.is_ok() || ended.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock));
        all
    }

    #[test]
    fn everybody_gets_the_stream_that_was_asked_for_from_then_on() {
        let (poll, mut clients) = (Poll::new().unwrap(), Clients::default());
        let ((mut first, end), (mut second, other_end), (mut error, error_end)) = (pipe(), pipe(), pipe());
        clients.add(Stream::Stdout, end, false, 1, &poll).unwrap();
        clients.pass(Stream::Stdout, b"one ", &poll);
        clients.add(Stream::Stdout, other_end, false, 2, &poll).unwrap();
        clients.add(Stream::Stderr, error_end, false, 3, &poll).unwrap();
        clients.pass(Stream::Stdout, b"two", &poll);
        clients.pass(Stream::Stderr, b"err", &poll);
        assert_eq!((read(&mut first), read(&mut second)), (b"one two".to_vec(), b"two".to_vec()));
        assert_eq!(read(&mut error), b"err");
        assert!(clients.end(Stream::Stdout, &poll).is_empty());
        assert_eq!((first.read(&mut [0]).unwrap(), clients.len()), (0, 1));
    }

    #[test]
    fn one_that_leaves_is_noticed_and_hurts_nobody() {
        let (poll, mut clients) = (Poll::new().unwrap(), Clients::default());
        let ((first, end), (mut second, other_end)) = (pipe(), pipe());
        clients.add(Stream::Stdout, end, false, 1, &poll).unwrap();
        clients.add(Stream::Stdout, other_end, false, 2, &poll).unwrap();
        assert!(poll.wait(Some(Duration::ZERO)).unwrap().is_empty());
        drop(first);
        let tokens: Vec<u64> = poll.wait(None).unwrap().iter().map(|ready| ready.token).collect();
        assert_eq!(tokens, [1]);
        assert!(clients.leave(1, &poll) && !clients.leave(1, &poll));
        clients.pass(Stream::Stdout, b"x", &poll);
        assert_eq!(read(&mut second), b"x");
        // This also holds for a client that is written to first.
        drop(second);
        clients.pass(Stream::Stdout, b"x", &poll);
        assert_eq!(clients.len(), 0);
    }

    #[test]
    fn what_does_not_fit_is_left_out_counted_and_told() {
        for terminal in [false, true] {
            let (poll, mut clients) = (Poll::new().unwrap(), Clients::default());
            let (mut slow, end) = pipe();
            clients.add(Stream::Stdout, end, terminal, 1, &poll).unwrap();
            let (mut written, block) = (0, [b'x'; 50_000]);
            while written < 2 * MOST {
                clients.pass(Stream::Stdout, &block, &poll);
                written += block.len();
            }
            let mut all = read(&mut slow);
            // Without the privilege to enlarge it further: 1 MiB, pipe(7), and not every page of it
            // is full.
            assert!((900_000..=MOST).contains(&all.len()), "{}", all.len());
            clients.pass(Stream::Stdout, b"again", &poll);
            all.extend(read(&mut slow));
            let all = String::from_utf8(all).unwrap();
            let line = if terminal { "\r\n" } else { "\n" };
            let end = format!(" bytes dropped: not read in time]{line}");
            assert!(all.ends_with(&format!("{end}again")), "{}", &all[all.len() - 100..]);
            // Its first part may have found room behind the last bytes.
            let begin = format!("{line}[berth: ");
            let counts = all.split(&begin).skip(1);
            let left_out: usize =
                counts.map(|rest| rest.split(' ').next().unwrap().parse::<usize>().unwrap()).sum();
            assert_eq!(all.matches('x').count() + left_out, written);
        }
    }

    #[test]
    fn all_who_do_not_read_have_no_more_than_there_is_for_all() {
        let (poll, mut clients) = (Poll::new().unwrap(), Clients::default());
        let mut slow = Vec::new();
        for token in 1..=200 {
            let (read, end) = pipe();
            clients.add(Stream::Stdout, end, false, token, &poll).unwrap();
            slow.push(read);
        }
        let before = clients.room();
        assert!(before < MOST_BYTES_OF_ALL + 200 * 16 * 1024, "{before}");
        for _ in 0..MOST.div_ceil(50_000) {
            clients.pass(Stream::Stdout, &[b'x'; 50_000], &poll);
        }
        let unread: usize = slow.iter_mut().map(|slow| read(slow).len()).sum();
        assert!(unread <= before.max(MOST_BYTES_OF_ALL), "{unread}");
        // Clients that have left make room.
        drop(slow);
        clients.pass(Stream::Stdout, b"x", &poll);
        assert_eq!(clients.room(), 0);
    }

    #[test]
    fn one_that_was_not_told_by_the_end_is_told_then() {
        let (poll, mut clients) = (Poll::new().unwrap(), Clients::default());
        let (mut slow, end) = pipe();
        clients.add(Stream::Stdout, end, false, 1, &poll).unwrap();
        clients.pass(Stream::Stdout, &vec![b'x'; 2 * MOST], &poll);
        let mut last = clients.end(Stream::Stdout, &poll);
        let LastWords { to, token, words } = last.pop().unwrap();
        assert!(last.is_empty() && String::from_utf8(words.clone()).unwrap().contains("dropped"));
        let mut relays = crate::relay::Relays::default();
        relays.add_last_words(to, token, words.clone(), &poll);
        assert!(!relays.are_settled());
        let mut all = read(&mut slow);
        for ready in poll.wait(None).unwrap() {
            relays.ready(ready, &poll);
        }
        all.extend(read(&mut slow));
        assert!(all.ends_with(&words) && relays.are_settled());
        assert_eq!((slow.read(&mut [0]).unwrap(), relays.descriptors()), (0, 0));
    }
}
