//! The messages between a new child and the shim before the child's exec.
//!
//! ```text
//!  report  socket, child to shim   `R` and what the child resolved, with the terminal's descriptor
//!                                  if there is one; what does not fit goes ahead of it in packets `P`
//!  words   pipe, child to shim     `Failed`, or nothing; its end alone means that exec worked
//!  go      pipe, shim to child     one byte: become the program
//! ```
//! All are close-on-exec. A child that continues as another process ([`crate::init`]), the *maker*,
//! names it by its own name (proc_pid_comm(5)), and ends: a name can be read as long as the process
//! has not been reaped, and only the process itself can write it.
//!
//! # Trust
//!
//! A process that is born in a pid namespace where others live has what its creator had open, and a
//! process that may trace it there has that, too. So the maker closes the report before it creates
//! the other, which has two pipes: it can be allowed to continue, and it can send a text of limited
//! length, after which it is killed. A pipe carries no descriptors, as a socket would: to close a
//! descriptor that hangs, such as a socket that lingers (socket(7)) or a file of a filesystem in
//! the container, the shim would have to wait.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_shim_proto::control::{Created, Failed};
use berth_sys::{file, socket};
use prost::Message;

use crate::failure::{Step, refused};

/// The longest packet. A kernel socket buffer has some 200 KiB by default
/// (`net.core.wmem_default`), its own bookkeeping included.
const MAX_PACKET: usize = 64 * 1024;

/// The longest report. Groups are most of it: at most 65536 (setgroups(2)), of five bytes.
const MAX_REPORT: usize = 1024 * 1024;

/// The longest failure as it is sent, in bytes; less than a pipe holds, pipe(7).
const MAX_FAILURE: usize = 32 * 1024;

/// The longest detail of a failure, in characters: a path of the longest kind (`PATH_MAX`).
const MAX_DETAIL: usize = 4096;

/// The longest name of a step, in characters. Those of this program are shorter.
const MAX_STEP: usize = 128;

/// The error for a process that ended without a message.
pub(crate) const KILLED: &str = "its process was killed while preparing";

/// The step of an invalid message.
const STEP: &str = "prepare the process";

/// The prefix of a maker's name once it has created another process; the pid follows.
const SUCCESSOR: char = '+';

/// The child's end.
#[derive(Debug)]
pub(crate) struct ChildEnd {
    /// The report of a main process, until it is sent.
    report: Option<OwnedFd>,
    words: File,
    go: File,
}

/// The shim's end, which never blocks.
#[derive(Debug)]
pub(crate) struct ShimEnd {
    /// The report of a main process, until it is sent.
    report: Option<OwnedFd>,
    words: File,
    go: File,
    /// The packets `P` so far.
    parts: Vec<u8>,
    /// The failure message so far.
    said: Vec<u8>,
}

/// The result of a prepared main process, and the other end of its terminal.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) created: Created,
    pub(crate) terminal: Option<OwnedFd>,
}

/// Creates the two ends; with a report for a main process.
pub(crate) fn pair(reports: bool) -> io::Result<(ShimEnd, ChildEnd)> {
    let (shim_report, child_report) = if reports {
        let (shim, child) = socket::packet_pair()?;
        file::set_nonblocking(shim.as_fd())?;
        (Some(shim), Some(child))
    } else {
        (None, None)
    };
    let (hear, say) = file::pipe()?;
    file::set_nonblocking(hear.as_fd())?;
    let (wait, go) = file::pipe()?;
    file::set_nonblocking(go.as_fd())?;
    Ok((
        ShimEnd {
            report: shim_report,
            words: hear.into(),
            go: go.into(),
            parts: Vec::new(),
            said: Vec::new(),
        },
        ChildEnd { report: child_report, words: say.into(), go: wait.into() },
    ))
}

/// The name of a maker that has created this process.
pub(crate) fn name_of_maker(successor: i32) -> String {
    format!("{SUCCESSOR}{successor}")
}

/// The process that a maker with this name has created, if any.
pub(crate) fn successor(maker: &str) -> Option<i32> {
    maker.trim_end().strip_prefix(SUCCESSOR)?.parse().ok()
}

impl ChildEnd {
    /// All its descriptors.
    pub(crate) fn all(&self) -> Vec<BorrowedFd<'_>> {
        self.report.iter().map(AsFd::as_fd).chain(self.rest()).collect()
    }

    /// The descriptors that have to stay open.
    pub(crate) fn rest(&self) -> [BorrowedFd<'_>; 2] {
        [self.words.as_fd(), self.go.as_fd()]
    }

    /// Reports that everything up to exec is done. Once only.
    pub(crate) fn ready(
        &mut self,
        created: &Created,
        terminal: Option<BorrowedFd<'_>>,
    ) -> Result<(), Failed> {
        const STEP: &str = "report to the shim";
        let socket = self.report.take().ok_or_else(|| refused(STEP, "it has already reported"))?;
        let report = created.encode_to_vec();
        let mut rest = report.as_slice();
        while let Some((part, after)) =
            rest.split_at_checked(MAX_PACKET - 1).filter(|_| rest.len() >= MAX_PACKET)
        {
            socket::send(socket.as_fd(), &[b"P", part].concat(), &[]).step(STEP, "")?;
            rest = after;
        }
        let descriptors: Vec<BorrowedFd<'_>> = terminal.into_iter().collect();
        socket::send(socket.as_fd(), &[b"R", rest].concat(), &descriptors).step(STEP, "").map(drop)
    }

    /// Waits for permission to continue. If the shim's end closes instead, the child is not wanted
    /// any more.
    pub(crate) fn wait_for_go(&self) -> Result<(), Failed> {
        (&self.go).read_exact(&mut [0]).step("start", "the shim has ended")
    }

    /// Reports a failed step. A failure to send it does not matter to the child.
    pub(crate) fn failed(&self, failed: &Failed) {
        // It may quote the image, and the pipe has limited room.
        let _ = (&self.words).write_all(&bounded(failed.clone()).encode_to_vec());
    }
}

impl ShimEnd {
    /// The descriptor that becomes readable when there is a message.
    pub(crate) fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.report.iter().map(AsFd::as_fd).chain([self.words.as_fd()])
    }

    /// Reads the report, if it has arrived.
    ///
    /// # Errors
    /// When it is truncated or does not end.
    pub(crate) fn hear_report(&mut self) -> Result<Option<Report>, Failed> {
        let Some(socket) = &self.report else { return Ok(None) };
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let (length, descriptors) = match socket::receive(socket.as_fd(), &mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A child killed in between resets it: treated as an end, which the other pipe
                // explains.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => (0, Vec::new()),
                other => other.step("get an answer from the container's process", "")?,
            };
            match buffer.get(..length).and_then(<[u8]>::split_first) {
                Some((b'P', part)) if self.parts.len() <= MAX_REPORT => self.parts.extend_from_slice(part),
                Some((b'P', _)) => return Err(refused(STEP, "its report does not end")),
                Some((b'R', part)) => {
                    self.parts.extend_from_slice(part);
                    let created = Created::decode(std::mem::take(&mut self.parts).as_slice())
                        .map_err(|_| refused(STEP, "its report is truncated"))?;
                    self.report = None;
                    return Ok(Some(Report { created, terminal: descriptors.into_iter().next() }));
                }
                Some(_) => return Err(refused(STEP, "its report is truncated")),
                None => {
                    self.report = None;
                    return Ok(None);
                }
            }
        }
    }

    /// Whether the failure pipe has ended: `None` if not, else the failure that was sent,
    /// if any.
    pub(crate) fn hear_words(&mut self) -> Option<Option<Failed>> {
        let mut buffer = [0; 4096];
        loop {
            match self.words.read(&mut buffer) {
                Ok(0) if self.said.is_empty() => return Some(None),
                Ok(0) => return Some(Some(decode_failure(&self.said))),
                // Our own messages are shorter.
                Ok(length) if self.said.len() + length > MAX_FAILURE => {
                    return Some(Some(refused(STEP, "its report is too long")));
                }
                Ok(length) => self.said.extend_from_slice(buffer.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    /// Lets the child continue.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn go(&self) -> Result<(), Failed> {
        (&self.go).write_all(b"g").step("start the container", "its process has ended")
    }
}

fn decode_failure(body: &[u8]) -> Failed {
    bounded(Failed::decode(body).unwrap_or_else(|_| refused(STEP, "its report is truncated")))
}

/// A failure that may be shown: not too long, and without characters that a log or a terminal would
/// interpret as commands.
fn bounded(failed: Failed) -> Failed {
    let shown = |text: &str, most: usize| {
        let mut shown: String = text
            .chars()
            .take(most)
            .map(|character| if character.is_control() { '\u{fffd}' } else { character })
            .collect();
        if text.chars().nth(most).is_some() {
            shown.push('…');
        }
        shown
    };
    Failed {
        step: shown(&failed.step, MAX_STEP),
        errno: failed.errno,
        detail: shown(&failed.detail, MAX_DETAIL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_any_length_arrive_whole() {
        for count in [0, 1, 10_000, 13_105, 13_106, 13_107, 26_213, 65_536] {
            let (mut shim, mut child) = pair(true).unwrap();
            let groups: Vec<u32> = (0..count).map(|number| i32::MAX.unsigned_abs() - number).collect();
            let created = Created { uid: 7, groups, ..Created::default() };
            let sender = {
                let created = created.clone();
                std::thread::spawn(move || {
                    child.ready(&created, None).unwrap();
                    assert!(child.ready(&created, None).is_err(), "there is one report");
                })
            };
            let report = loop {
                if let Some(report) = shim.hear_report().unwrap() {
                    break report;
                }
                std::thread::yield_now();
            };
            sender.join().unwrap();
            assert_eq!((report.created, report.terminal.is_some()), (created, false), "{count}");
        }
    }

    #[test]
    fn a_terminal_comes_with_the_report() {
        let (mut shim, mut child) = pair(true).unwrap();
        let file = File::open("/dev/null").unwrap();
        child.ready(&Created::default(), Some(file.as_fd())).unwrap();
        assert!(shim.hear_report().unwrap().unwrap().terminal.is_some());
        assert!(shim.hear_report().unwrap().is_none());
    }

    #[test]
    fn a_failure_arrives_bounded_and_without_orders_to_terminals() {
        let (mut shim, child) = pair(false).unwrap();
        child.failed(&refused("find the\nuser", "\u{1b}[31mä".repeat(100_000)));
        assert!(shim.hear_words().is_none(), "there may be more");
        drop(child);
        let failed = shim.hear_words().unwrap().unwrap();
        assert_eq!(failed.step, "find the\u{fffd}user");
        assert_eq!(failed.detail.chars().count(), MAX_DETAIL + 1);
        assert!(failed.detail.starts_with("\u{fffd}[31mä"));
    }

    #[test]
    fn whatever_comes_from_inside_is_a_failure_of_limited_length() {
        let hostile = Failed { step: "x".repeat(20_000), errno: 1, detail: String::new() }.encode_to_vec();
        for said in [hostile.as_slice(), b"+1234", b"R", b"\0", &[0xff; 60_000]] {
            let (mut shim, child) = pair(false).unwrap();
            (&child.words).write_all(said).unwrap();
            drop(child);
            let failed = shim.hear_words().unwrap().unwrap();
            assert!(failed.step.chars().count() <= MAX_STEP + 1 && shim.said.len() <= MAX_FAILURE);
        }
    }

    #[test]
    fn a_report_without_an_end_is_refused() {
        let (mut shim, child) = pair(true).unwrap();
        let socket = child.report.as_ref().unwrap();
        let part = [b"P".as_slice(), &vec![0; MAX_PACKET - 1]].concat();
        let mut refused = None;
        for _ in 0..2 * MAX_REPORT / MAX_PACKET {
            socket::send(socket.as_fd(), &part, &[]).unwrap();
            match shim.hear_report() {
                Ok(None) => {}
                other => {
                    refused = other.err();
                    break;
                }
            }
        }
        assert!(refused.unwrap().detail.contains("does not end"));
        for torn in [b"R\xff".as_slice(), b"X", b"N1"] {
            let (mut shim, child) = pair(true).unwrap();
            socket::send(child.report.as_ref().unwrap().as_fd(), torn, &[]).unwrap();
            assert!(shim.hear_report().is_err(), "{torn:?}");
        }
    }

    #[test]
    fn an_end_is_heard_and_nothing_is_waited_for() {
        let (mut shim, child) = pair(true).unwrap();
        assert!(shim.hear_report().unwrap().is_none() && shim.hear_words().is_none());
        assert_eq!(shim.sources().count(), 2);
        shim.go().unwrap();
        child.wait_for_go().unwrap();
        drop(child);
        assert!(shim.hear_report().unwrap().is_none());
        assert_eq!(shim.sources().count(), 1);
        assert_eq!(shim.hear_words(), Some(None));
        assert!(shim.go().is_err());
        let (shim, child) = pair(false).unwrap();
        drop(shim);
        assert!(child.wait_for_go().is_err());
    }

    #[test]
    fn a_maker_names_its_successor_and_nothing_else_does() {
        assert_eq!(successor(&name_of_maker(i32::MAX)), Some(i32::MAX));
        assert!(name_of_maker(i32::MAX).len() <= 15, "proc_pid_comm(5)");
        assert_eq!(successor("+12\n"), Some(12));
        for other in ["", "berth-shim", "12", "+", "+x", "+1 2", "+99999999999", "-1"] {
            assert_eq!(successor(other), None, "{other}");
        }
    }
}
