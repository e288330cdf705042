//! Copies bytes between the streams of a program and those of the daemon.
//!
//! ```text
//!  program  --inner pipe-->  shim  --outer pipe-->  daemon      output
//!  program  <--inner pipe--  shim  <--outer pipe--  daemon      input
//!  program  <---terminal-->  shim  <----socket--->  daemon      both
//! ```
//! A process that has a pipe or a terminal open can hold its lock for as long as it likes: the
//! kernel keeps the lock while it copies from or to memory, and if that is a page of a file, waits
//! for the file. Reading, writing, closing and resizing at the other end then wait too, and cannot
//! be killed. So no stream of a program ever reaches the daemon. A container can only stall its own
//! shim this way.
//!
//! Bytes are copied, not spliced: to splice from pipe to pipe, the kernel takes the locks of both
//! at once, and so a container could block the daemon after all.
//!
//! A flow reads only when the previous bytes have been written, so it holds at most one read, and
//! nothing while idle. At the end of its source it closes the other side once everything is
//! written; if the other side is closed, it closes the source, and a writer there notices as from
//! any closed pipe.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

use berth_sys::file;
use berth_sys::poll::{Interest, Poll, Ready};

/// Bytes read at a time. The buffer lives only while there is something to read.
const READ_BYTES: usize = 32 * 1024;

/// Reads or writes of one flow per turn, unless its program has ended.
const TURNS: usize = 16;

/// How many bytes of output are passed on after the end of its program before the end is reported:
/// at least the content of its pipe, which is all that the program itself can have left. Other
/// processes may write forever.
const SETTLE_BYTES: usize = 1024 * 1024;

/// The limit on that: a pipe can be enlarged to more than memory allows it to hold.
const MOST_SETTLE_BYTES: usize = 64 * 1024 * 1024;

/// How many bytes a program can have left in a stream when it ends.
pub(crate) fn left_in(stream: BorrowedFd<'_>) -> usize {
    file::pipe_size(stream).unwrap_or(0).clamp(SETTLE_BYTES, MOST_SETTLE_BYTES)
}

/// The direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// To the program.
    In,
    /// From the program.
    Out,
}

/// The two ends of a flow.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) way: Way,
    pub(crate) from: OwnedFd,
    pub(crate) to: OwnedFd,
}

/// What a flow waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// Something to read; and for the other side to be closed.
    Input,
    /// Room to write; the end of the source is noticed once.
    Room,
}

/// The most flows without a source or a running program that still wait for room: input for a
/// program that does not read. Some other process may go on to read it, so a few are kept.
const MOST_ORPHANS: usize = 8;

#[derive(Debug)]
struct Flow {
    group: u64,
    way: Way,
    /// `None` for the last bytes of a source that has ended.
    from: Option<File>,
    from_token: u64,
    to: File,
    to_token: u64,
    /// Read and not written yet.
    held: Vec<u8>,
    waits: Waits,
    /// The source has ended, with bytes still held; the number orders such flows by age. The source
    /// is no longer watched: its end would be reported again and again.
    orphaned: Option<u64>,
    /// After the end of the program: how much more of its output may follow before the end is
    /// reported.
    settling: Option<usize>,
}

#[derive(Debug, PartialEq, Eq)]
enum After {
    Open,
    Ended,
}

/// All flows of a shim. Those with one group belong together.
#[derive(Debug, Default)]
pub(crate) struct Relays {
    flows: Vec<Flow>,
    /// The number of sources that have ended with bytes still held.
    orphaned: u64,
}

/// How many tokens a flow takes.
pub(crate) const TOKENS: u64 = 2;

impl Relays {
    /// Begins a flow. Its wake-ups come with `token` and the one after it.
    ///
    /// # Errors
    /// When the kernel cannot watch it.
    pub(crate) fn add(&mut self, ends: Ends, group: u64, token: u64, poll: &Poll) -> io::Result<()> {
        let Ends { way, from, to } = ends;
        file::set_nonblocking(from.as_fd())?;
        file::set_nonblocking(to.as_fd())?;
        poll.watch(from.as_fd(), token, Interest::Input)?;
        if let Err(error) = poll.watch(to.as_fd(), token + 1, Interest::Failure) {
            let _ = poll.forget(from.as_fd());
            return Err(error);
        }
        self.flows.push(Flow {
            group,
            way,
            from: Some(from.into()),
            from_token: token,
            to: to.into(),
            to_token: token + 1,
            held: Vec::new(),
            waits: Waits::Input,
            orphaned: None,
            settling: None,
        });
        Ok(())
    }

    /// Passes on the remaining bytes for `to`, which is watched under `token`, and closes it. Does
    /// not block.
    pub(crate) fn add_last_words(&mut self, to: File, token: u64, words: Vec<u8>, poll: &Poll) {
        let settling = Some(SETTLE_BYTES);
        let waits = Waits::Room;
        let flow = Flow {
            group: token,
            way: Way::Out,
            from: None,
            from_token: token,
            to,
            to_token: token,
            held: words,
            waits,
            orphaned: None,
            settling,
        };
        if poll.change(flow.to.as_fd(), token, Interest::Room).is_ok() {
            self.flows.push(flow);
        } else {
            flow.close(poll);
        }
    }

    /// Whether the group has a flow.
    pub(crate) fn has(&self, group: u64) -> bool {
        self.flows.iter().any(|flow| flow.group == group)
    }

    /// How many descriptors they use.
    pub(crate) fn descriptors(&self) -> usize {
        self.flows.len() * 2
    }

    /// Handles a wake-up; returns the group of the flow that it was for, if any.
    pub(crate) fn ready(&mut self, ready: Ready, poll: &Poll) -> Option<u64> {
        let of = |flow: &Flow| flow.from_token == ready.token || flow.to_token == ready.token;
        let index = self.flows.iter().position(of)?;
        let flow = self.flows.get_mut(index)?;
        let group = flow.group;
        // A wake-up may date from before the flow began to wait for something else, and may report
        // room that it no longer waits for.
        let mut is_over = ready.token == flow.to_token && ready.failed && flow.waits == Waits::Input;
        if ready.token == flow.from_token && ready.failed && flow.waits == Waits::Room {
            self.orphaned += 1;
            is_over = flow.orphan(self.orphaned, poll) == After::Ended;
        }
        if is_over || flow.pump(poll) == After::Ended {
            self.flows.swap_remove(index).close(poll);
        }
        Some(group)
    }

    /// Drops the oldest flows that have lost their source and whose sink does not take the held
    /// bytes, if there are more than [`MOST_ORPHANS`]. Groups that are `in_use` do not count.
    pub(crate) fn drop_orphans(&mut self, in_use: impl Fn(u64) -> bool, poll: &Poll) {
        let mut orphans: Vec<u64> = self
            .flows
            .iter()
            .filter(|flow| flow.way == Way::In && flow.waits == Waits::Room && !in_use(flow.group))
            .filter_map(|flow| flow.orphaned)
            .collect();
        orphans.sort_unstable();
        let too_many = orphans.len().saturating_sub(MOST_ORPHANS);
        if let Some(last) = too_many.checked_sub(1).and_then(|last| orphans.get(last)).copied() {
            let dropped = |flow: &mut Flow| {
                flow.way == Way::In
                    && flow.waits == Waits::Room
                    && flow.orphaned.is_some_and(|number| number <= last)
                    && !in_use(flow.group)
            };
            for flow in self.flows.extract_if(.., dropped) {
                flow.close(poll);
            }
        }
    }

    /// The program of a group has ended: its output is passed on, and output of other processes is
    /// waited for only until then.
    pub(crate) fn settle(&mut self, group: u64, poll: &Poll) {
        self.settle_where(|flow| flow.group == group, poll);
    }

    /// As [`settle`](Self::settle), for all.
    pub(crate) fn settle_all(&mut self, poll: &Poll) {
        self.settle_where(|_| true, poll);
    }

    fn settle_where(&mut self, of: impl Fn(&Flow) -> bool, poll: &Poll) {
        for index in (0..self.flows.len()).rev() {
            let Some(flow) = self.flows.get_mut(index).filter(|flow| flow.way == Way::Out && of(flow)) else {
                continue;
            };
            flow.settling = Some(flow.from.as_ref().map_or(SETTLE_BYTES, |from| left_in(from.as_fd())));
            if flow.pump(poll) == After::Ended {
                self.flows.swap_remove(index).close(poll);
            }
        }
    }

    /// Whether everything that the program of a group has written is passed on.
    pub(crate) fn is_settled(&self, group: u64) -> bool {
        !self.flows.iter().any(|flow| flow.group == group && flow.settling.is_some())
    }

    /// As [`is_settled`](Self::is_settled), for all.
    pub(crate) fn are_settled(&self) -> bool {
        !self.flows.iter().any(|flow| flow.settling.is_some())
    }

    /// Ends all flows of a group.
    pub(crate) fn end(&mut self, group: u64, poll: &Poll) {
        for flow in self.flows.extract_if(.., |flow| flow.group == group) {
            flow.close(poll);
        }
    }

    /// The source of a group's output.
    pub(crate) fn source(&self, group: u64) -> Option<BorrowedFd<'_>> {
        let found = self.flows.iter().find(|flow| flow.group == group && flow.way == Way::Out);
        found?.from.as_ref().map(AsFd::as_fd)
    }
}

impl Flow {
    fn pump(&mut self, poll: &Poll) -> After {
        let mut buffer = Vec::new();
        let mut turns = 0;
        // When a program has ended and another still has its stream, only a read says that there is
        // nothing more: no wake-up does.
        while turns < TURNS || self.settling.is_some() {
            turns += 1;
            if !self.held.is_empty() {
                match self.to.write(&self.held) {
                    Ok(length) => drop(self.held.drain(..length)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // It is no longer read.
                    Err(_) => return After::Ended,
                }
                continue;
            }
            let Some(from) = &mut self.from else { return After::Ended };
            buffer.resize(READ_BYTES, 0);
            match from.read(&mut buffer) {
                Ok(0) => return After::Ended,
                Ok(length) => {
                    let read = buffer.get(..length).unwrap_or_default();
                    let written = match self.to.write(read) {
                        Ok(written) => written,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                        Err(_) => return After::Ended,
                    };
                    self.held = read.get(written..).unwrap_or_default().to_vec();
                    self.settling = self.settling.and_then(|left| left.checked_sub(length));
                    if length < READ_BYTES && self.held.is_empty() && self.settling.is_none() {
                        // Most likely empty now; if not, the poll says so again.
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.settling = None;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // EIO: no process has the terminal open any more, pty(7).
                Err(_) => return After::Ended,
            }
        }
        if self.held.is_empty() {
            self.held = Vec::new();
        }
        let waits = if self.held.is_empty() { Waits::Input } else { Waits::Room };
        // A flow that is not watched would hang.
        if self.wait_for(waits, poll).is_ok() { After::Open } else { After::Ended }
    }

    fn wait_for(&mut self, waits: Waits, poll: &Poll) -> io::Result<()> {
        if waits == self.waits {
            return Ok(());
        }
        self.waits = waits;
        let Some(from) = &self.from else { return Ok(()) };
        match waits {
            Waits::Input => {
                poll.change(self.to.as_fd(), self.to_token, Interest::Failure)?;
                match self.orphaned.take() {
                    Some(_) => poll.watch(from.as_fd(), self.from_token, Interest::Input),
                    None => poll.change(from.as_fd(), self.from_token, Interest::Input),
                }
            }
            Waits::Room => {
                poll.change(from.as_fd(), self.from_token, Interest::Failure)?;
                poll.change(self.to.as_fd(), self.to_token, Interest::Room)
            }
        }
    }

    /// Its source has ended, with bytes still held.
    fn orphan(&mut self, number: u64, poll: &Poll) -> After {
        let Some(from) = &self.from else { return After::Open };
        // The socket of a terminal, which hangs up together with it.
        let hangs_up = from.metadata().is_ok_and(|metadata| metadata.file_type().is_socket());
        if hangs_up && self.way == Way::In {
            return After::Ended;
        }
        if self.orphaned.is_none() && poll.forget(from.as_fd()).is_ok() {
            self.orphaned = Some(number);
        }
        After::Open
    }

    /// Removes it from epoll: closing is not enough while a newly created child has a copy.
    fn close(self, poll: &Poll) {
        for end in self.from.iter().chain([&self.to]) {
            let _ = poll.forget(end.as_fd());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const GROUP: u64 = 7;

    /// A relay between two pipes: one end for the program or the daemon to write to, and one for
    /// the other to read from.
    struct Pair {
        poll: Poll,
        relays: Relays,
        near: Option<File>,
        far: Option<File>,
    }

    impl Pair {
        fn new(way: Way) -> Self {
            let (from, near) = file::pipe().unwrap();
            let (far, to) = file::pipe().unwrap();
            file::set_nonblocking(near.as_fd()).unwrap();
            file::set_nonblocking(far.as_fd()).unwrap();
            let (poll, mut relays) = (Poll::new().unwrap(), Relays::default());
            relays.add(Ends { way, from, to }, GROUP, 20, &poll).unwrap();
            Self { poll, relays, near: Some(near.into()), far: Some(far.into()) }
        }

        /// Handles wake-ups until there are none.
        fn turn(&mut self) {
            // More than a pipe takes; a relay that is woken endlessly would never stop.
            for _ in 0..10_000 {
                let ready = self.poll.wait(Some(Duration::ZERO)).unwrap();
                if ready.is_empty() {
                    return;
                }
                for ready in ready {
                    assert_eq!(self.relays.ready(ready, &self.poll), Some(GROUP));
                }
            }
            panic!("it is woken again and again");
        }

        /// Writes as much as fits.
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.near.as_mut().unwrap().write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                written => written,
            }
        }

        /// Reads what is available; returns whether it has ended.
        fn read(&mut self, all: &mut Vec<u8>) -> bool {
            match self.far.as_mut().unwrap().read_to_end(all) {
                Ok(_) => true,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    false
                }
            }
        }

        fn held(&self) -> usize {
            self.relays.flows.iter().map(|flow| flow.held.capacity()).sum()
        }
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|number| u8::try_from(number % 251).unwrap()).collect()
    }

    #[test]
    fn all_bytes_arrive_in_order_and_then_the_end_whoever_is_faster() {
        let all = bytes(1_000_003);
        for (way, reads_every) in [(Way::In, 1), (Way::Out, 1), (Way::Out, 7)] {
            let mut pair = Pair::new(way);
            let (mut sent, mut read, mut turns) = (0, Vec::new(), 0);
            while sent < all.len() {
                sent += pair.write(&all[sent..]).unwrap();
                pair.turn();
                turns += 1;
                if turns % reads_every == 0 {
                    assert!(!pair.read(&mut read));
                }
            }
            pair.near = None;
            loop {
                pair.turn();
                if pair.read(&mut read) {
                    break;
                }
            }
            assert!(read == all, "{way:?}");
            assert_eq!(pair.relays.descriptors(), 0);
        }
    }

    #[test]
    fn what_nobody_reads_is_held_once_and_wakes_nobody() {
        let mut pair = Pair::new(Way::Out);
        let mut sent = 0;
        loop {
            let written = pair.write(&[b'x'; 4096]).unwrap();
            pair.turn();
            sent += written;
            if written == 0 {
                break;
            }
        }
        assert!(pair.held() <= READ_BYTES, "{}", pair.held());
        // Also after the program has ended, whose pipe then reports its end forever.
        pair.near = None;
        pair.turn();
        let mut read = Vec::new();
        while !pair.read(&mut read) {
            pair.turn();
        }
        assert_eq!(read.len(), sent);
    }

    #[test]
    fn an_idle_flow_holds_nothing() {
        let mut pair = Pair::new(Way::Out);
        for _ in 0..64 {
            pair.write(&[b'x'; 4096]).unwrap();
            pair.turn();
        }
        while pair.relays.flows[0].waits == Waits::Room {
            pair.read(&mut Vec::new());
            pair.turn();
        }
        assert_eq!(pair.held(), 0);
    }

    #[test]
    fn a_side_that_is_closed_closes_the_other() {
        // Idle, and with bytes that wait.
        for fill in [false, true] {
            let mut pair = Pair::new(Way::Out);
            while fill && pair.write(&[b'x'; 4096]).unwrap() > 0 {
                pair.turn();
            }
            pair.far = None;
            pair.turn();
            assert_eq!(pair.relays.descriptors(), 0);
            assert_eq!(pair.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        }
    }

    #[test]
    fn what_was_typed_by_who_has_left_is_kept_for_a_program_that_reads_on() {
        let mut pair = Pair::new(Way::In);
        let mut sent = 0;
        while let written @ 1.. = pair.write(&[b'x'; 4096]).unwrap() {
            sent += written;
            pair.turn();
        }
        pair.near = None;
        // Without endless wake-ups.
        pair.turn();
        pair.relays.drop_orphans(|_| false, &pair.poll);
        let mut read = Vec::new();
        while !pair.read(&mut read) {
            pair.turn();
        }
        assert_eq!((read.len(), pair.relays.descriptors()), (sent, 0));
    }

    #[test]
    fn who_has_left_and_is_not_read_is_dropped_once_there_are_many() {
        let (poll, mut relays) = (Poll::new().unwrap(), Relays::default());
        let (_read, to) = file::pipe().unwrap();
        let in_use = 1;
        for group in 1..=100 {
            let (from, near) = file::pipe().unwrap();
            file::set_nonblocking(near.as_fd()).unwrap();
            let to = to.try_clone().unwrap();
            relays.add(Ends { way: Way::In, from, to }, group, group * 2, &poll).unwrap();
            let mut near = Some(File::from(near));
            loop {
                let ready = poll.wait(Some(Duration::ZERO)).unwrap();
                for ready in &ready {
                    relays.ready(*ready, &poll);
                }
                relays.drop_orphans(|group| group == in_use, &poll);
                let typed = near.as_mut().map(|near| near.write(&[b'x'; 4096]));
                match typed {
                    Some(Ok(_)) => {}
                    Some(Err(_)) => near = None,
                    None if ready.is_empty() => break,
                    None => {}
                }
            }
            assert!(relays.descriptors() <= 2 * (MOST_ORPHANS + 1), "{}", relays.descriptors());
        }
        // A flow of a running program waits as long as that runs.
        assert!(relays.has(in_use) && relays.has(100) && !relays.has(2));
    }

    #[test]
    fn a_group_ends_and_others_go_on() {
        let mut pair = Pair::new(Way::Out);
        let (from, _near) = file::pipe().unwrap();
        let (_far, to) = file::pipe().unwrap();
        pair.relays.add(Ends { way: Way::Out, from, to }, GROUP + 1, 30, &pair.poll).unwrap();
        assert!(pair.relays.source(GROUP).is_some() && pair.relays.source(GROUP + 2).is_none());
        pair.relays.end(GROUP, &pair.poll);
        assert_eq!(pair.relays.descriptors(), 2);
        assert!(pair.relays.source(GROUP).is_none());
        assert_eq!(pair.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn the_last_words_of_a_program_are_passed_on_before_its_end_is_told() {
        let mut pair = Pair::new(Way::Out);
        assert!(pair.relays.is_settled(GROUP));
        // More than is passed on at once; another process still has the pipe open.
        let mut sent = 0;
        while let written @ 1.. = pair.write(&[b'x'; 4096]).unwrap() {
            sent += written;
            pair.turn();
        }
        pair.relays.settle(GROUP, &pair.poll);
        assert!(!pair.relays.is_settled(GROUP) && !pair.relays.are_settled());
        let mut read = Vec::new();
        while !pair.relays.is_settled(GROUP) {
            assert!(!pair.read(&mut read));
            pair.turn();
        }
        pair.read(&mut read);
        assert_eq!(read.len(), sent);
        // What the other process writes is still passed on.
        pair.write(b"more").unwrap();
        pair.turn();
        pair.read(&mut read);
        assert!(read.ends_with(b"more"));
    }

    /// However many reads that takes: nothing says afterwards that there is no more.
    #[test]
    fn what_is_left_in_a_large_pipe_is_passed_on_while_another_process_has_it() {
        let size = 1 << 20;
        for left in (READ_BYTES..=size).step_by(READ_BYTES) {
            let mut pair = Pair::new(Way::Out);
            for pipe in [&pair.near, &pair.far] {
                file::resize_pipe(pipe.as_ref().unwrap().as_fd(), i32::try_from(size).unwrap()).unwrap();
            }
            assert_eq!(pair.write(&bytes(left)).unwrap(), left);
            pair.relays.settle(GROUP, &pair.poll);
            pair.turn();
            assert!(pair.relays.is_settled(GROUP), "{left} bytes");
            let mut read = Vec::new();
            assert!(!pair.read(&mut read));
            assert_eq!(read.len(), left);
        }
    }

    #[test]
    fn one_that_never_stops_to_write_does_not_keep_an_end_from_being_told() {
        let poll = Poll::new().unwrap();
        let mut flow = Flow {
            group: GROUP,
            way: Way::Out,
            from: Some(File::open("/dev/zero").unwrap()),
            from_token: 20,
            to: File::options().write(true).open("/dev/null").unwrap(),
            to_token: 21,
            held: Vec::new(),
            waits: Waits::Input,
            orphaned: None,
            settling: Some(SETTLE_BYTES),
        };
        assert_eq!(flow.pump(&poll), After::Open);
        assert_eq!(flow.settling, None);
    }

    #[test]
    fn both_ways_of_a_terminal_go_by_one_socket() {
        let terminal = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        let program = File::from(berth_sys::tty::open_other_end(terminal.as_fd()).unwrap());
        let (ours, theirs) = berth_sys::socket::stream_pair().unwrap();
        let (poll, mut relays) = (Poll::new().unwrap(), Relays::default());
        let copies = (terminal.try_clone().unwrap(), ours.try_clone().unwrap());
        let out = Ends { way: Way::Out, from: terminal.into(), to: ours };
        let back = Ends { way: Way::In, from: copies.1, to: copies.0.into() };
        relays.add(out, GROUP, 20, &poll).unwrap();
        relays.add(back, GROUP, 22, &poll).unwrap();
        let mut turn = || {
            for ready in poll.wait(Some(Duration::from_millis(50))).unwrap() {
                relays.ready(ready, &poll);
            }
            relays.descriptors()
        };
        file::set_nonblocking(theirs.as_fd()).unwrap();
        let mut daemon = File::from(theirs);
        daemon.write_all(b"in\n").unwrap();
        (&program).write_all(b"out\n").unwrap();
        let (mut line, mut all) = ([0; 64], Vec::new());
        while all.len() < "in\r\nout\r\n".len() {
            assert_eq!(turn(), 4);
            if let Ok(length) = daemon.read(&mut line) {
                all.extend_from_slice(&line[..length]);
            }
        }
        assert!(all.starts_with(b"in\r\n") || all.starts_with(b"out\r\n"), "{}", all.escape_ascii());
        let length = (&program).read(&mut line).unwrap();
        assert_eq!(&line[..length], b"in\n");
        // The daemon closes its end, and the terminal hangs up: there is nothing more to read,
        // pty(7).
        drop(daemon);
        while turn() > 0 {}
        assert_eq!((&program).read(&mut line).unwrap(), 0);
    }
}
