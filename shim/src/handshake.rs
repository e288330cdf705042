//! What a new child and the shim say to each other before the child's exec.
//!
//! A pair of sockets that keep message boundaries. The child sends what it resolved in a packet `R` (with the terminal's
//! descriptor, if there is one); what does not fit goes ahead of it in packets `P`. It waits for one byte of the shim, then
//! executes its program; the socket is close-on-exec, so the end of the stream says that exec worked, and a packet `F`
//! says what failed.
//!
//! A child that goes on as another process ([`crate::init`]) says so in a packet `N` with that process's pid, and ends.
//!
//! # Who is believed
//!
//! A process that is born in a pid namespace where others live holds the socket too, and whoever may trace it there can
//! send in its place. So `R`, `P` and `N` count only from the maker, which lives outside of that namespace: the
//! kernel names the sender of each packet. What anyone else may say is `F`, a text of limited length about a process that is
//! then killed, and the end of the stream, after which that process is taken for the program that it could be anyway.

use crate::failure::{Step, refused};
use berth_shim_proto::control::{Created, Failed};
use berth_sys::socket;
use prost::Message;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The longest packet. A kernel socket buffer has some 200 KiB by default (`net.core.wmem_default`), its own bookkeeping included.
const MAX_PACKET: usize = 64 * 1024;

/// The longest report. Groups are most of it: at most 65536 (setgroups(2)), of five bytes.
const MAX_REPORT: usize = 1024 * 1024;

/// The longest detail of a failure, in characters: a path of the longest kind (`PATH_MAX`).
const MAX_DETAIL: usize = 4096;

/// The longest name of a step, in characters. Those of this program are shorter.
const MAX_STEP: usize = 128;

/// What is said of a process that ended without a word.
pub(crate) const KILLED: &str = "its process was killed while preparing";

/// What is being done when a packet is not as it should be.
const STEP: &str = "prepare the process";

/// The child's end.
#[derive(Debug)]
pub(crate) struct ChildEnd {
    /// Until [`ChildEnd::close`].
    socket: Option<OwnedFd>,
}

/// The shim's end, which never waits.
#[derive(Debug)]
pub(crate) struct ShimEnd {
    socket: OwnedFd,
    /// The packets `P` so far.
    report: Vec<u8>,
}

/// What the shim hears.
#[derive(Debug)]
pub(crate) enum Word {
    /// Everything up to exec is done.
    Ready { created: Box<Created>, terminal: Option<OwnedFd> },
    /// This process goes on in place of the maker.
    Successor(i32),
    /// A step failed.
    Failed(Failed),
    /// The end of the stream: exec, or a death.
    End,
}

pub(crate) fn pair() -> io::Result<(ShimEnd, ChildEnd)> {
    let (shim, child) = socket::packet_pair()?;
    socket::name_senders(shim.as_fd())?;
    berth_sys::file::set_nonblocking(shim.as_fd())?;
    Ok((ShimEnd { socket: shim, report: Vec::new() }, ChildEnd { socket: Some(child) }))
}

impl ChildEnd {
    pub(crate) fn socket(&self) -> Result<BorrowedFd<'_>, Failed> {
        self.socket.as_ref().map(AsFd::as_fd).ok_or_else(|| refused("report to the shim", "it was closed"))
    }

    /// Lets go of the socket, so that its end is another's.
    pub(crate) fn close(&mut self) {
        self.socket = None;
    }

    /// Says that everything up to exec is done.
    pub(crate) fn ready(&self, created: &Created, terminal: Option<BorrowedFd<'_>>) -> Result<(), Failed> {
        const STEP: &str = "report to the shim";
        let report = created.encode_to_vec();
        let mut rest = report.as_slice();
        while let Some((part, after)) =
            rest.split_at_checked(MAX_PACKET - 1).filter(|_| rest.len() >= MAX_PACKET)
        {
            socket::send(self.socket()?, &[b"P", part].concat(), &[]).step(STEP, "")?;
            rest = after;
        }
        let descriptors: Vec<BorrowedFd<'_>> = terminal.into_iter().collect();
        socket::send(self.socket()?, &[b"R", rest].concat(), &descriptors).step(STEP, "").map(drop)
    }

    /// Says which process goes on in place of this one.
    pub(crate) fn succeeded_by(&self, pid: i32) -> Result<(), Failed> {
        let packet = [b"N".as_slice(), &pid.to_le_bytes()].concat();
        socket::send(self.socket()?, &packet, &[]).step("report to the shim", "").map(drop)
    }

    /// Waits for the word to go on. The shim's end closed instead means that nobody wants the child any more.
    pub(crate) fn wait_for_go(&self) -> Result<(), Failed> {
        let mut byte = [0];
        match socket::receive(self.socket()?, &mut byte) {
            Ok((1, _)) => Ok(()),
            _ => Err(refused("start", "the shim has ended")),
        }
    }

    /// Says that a step failed. Whether anybody hears it does not matter to the child.
    pub(crate) fn failed(&self, failed: &Failed) {
        // It may quote the image, and what does not fit would not arrive at all.
        let packet = [b"F".as_slice(), &bounded(failed.clone()).encode_to_vec()].concat();
        if let Ok(socket) = self.socket() {
            let _ = socket::send(socket, &packet, &[]);
        }
    }
}

impl ShimEnd {
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes the next word, if there is one. `maker` is the process that is believed.
    ///
    /// # Errors
    /// When a packet is not one that its sender may send; the process is of no use then.
    pub(crate) fn hear(&mut self, maker: Option<i32>) -> Result<Option<Word>, Failed> {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let message = match socket::receive_message(self.as_fd(), &mut buffer) {
                Ok(message) => message,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A child killed with unread bytes in its socket resets it: an end like another.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Some(Word::End)),
                other => return other.step("hear from the container's process", "").map(|_| None),
            };
            let trusted = maker.is_some() && message.sender == maker;
            let packet = buffer.get(..message.length).unwrap_or_default();
            return match packet.split_first() {
                None => Ok(Some(Word::End)),
                Some((b'F', body)) => Ok(Some(Word::Failed(decode_failure(body)))),
                Some((b'P', part)) if trusted && self.report.len() <= MAX_REPORT => {
                    self.report.extend_from_slice(part);
                    continue;
                }
                Some((b'P', _)) if trusted => Err(refused(STEP, "its report has no end")),
                Some((b'R', part)) if trusted => {
                    self.report.extend_from_slice(part);
                    let created = Created::decode(std::mem::take(&mut self.report).as_slice())
                        .map_err(|_| refused(STEP, "its report is torn"))?;
                    let terminal = message.descriptors.into_iter().next();
                    Ok(Some(Word::Ready { created: Box::new(created), terminal }))
                }
                Some((b'N', number)) if trusted => match <[u8; 4]>::try_from(number) {
                    Ok(number) => Ok(Some(Word::Successor(i32::from_le_bytes(number)))),
                    Err(_) => Err(refused(STEP, "its report is torn")),
                },
                Some(_) => Err(refused(STEP, "somebody in the container interfered with it")),
            };
        }
    }

    /// Lets the child go on.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn go(&self) -> Result<(), Failed> {
        socket::send(self.as_fd(), b"g", &[]).step("start the container", "its process has ended").map(drop)
    }
}

fn decode_failure(body: &[u8]) -> Failed {
    bounded(Failed::decode(body).unwrap_or_else(|_| refused(STEP, "its report is torn")))
}

/// A failure as it may be shown: not too long, and without characters that a log or a terminal would take for orders.
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

    /// This process, which is both ends.
    fn me() -> Option<i32> {
        i32::try_from(std::process::id()).ok()
    }

    #[test]
    fn reports_of_any_length_arrive_whole() {
        for count in [0, 1, 10_000, 13_105, 13_106, 13_107, 26_213, 65_536] {
            let (mut shim, child) = pair().unwrap();
            let groups: Vec<u32> = (0..count).map(|number| i32::MAX.unsigned_abs() - number).collect();
            let created = Created { uid: 7, groups, ..Created::default() };
            let sender = {
                let created = created.clone();
                std::thread::spawn(move || child.ready(&created, None).unwrap())
            };
            let heard = loop {
                match shim.hear(me()).unwrap() {
                    Some(Word::Ready { created, terminal }) => break (*created, terminal.is_some()),
                    Some(other) => panic!("{other:?}"),
                    None => std::thread::yield_now(),
                }
            };
            sender.join().unwrap();
            assert_eq!(heard, (created, false), "{count}");
        }
    }

    #[test]
    fn a_failure_arrives_bounded_and_without_orders_to_terminals() {
        let (mut shim, child) = pair().unwrap();
        child.failed(&refused("find the\nuser", "\u{1b}[31mä".repeat(100_000)));
        let Some(Word::Failed(failed)) = shim.hear(me()).unwrap() else { panic!("no failure") };
        assert_eq!(failed.step, "find the\u{fffd}user");
        assert_eq!(failed.detail.chars().count(), MAX_DETAIL + 1);
        assert!(failed.detail.starts_with("\u{fffd}[31mä"));
        // From inside it may come as it likes.
        let hostile = Failed { step: "x".repeat(60_000), errno: 1, detail: String::new() };
        let packet = [b"F".as_slice(), &hostile.encode_to_vec()].concat();
        socket::send(child.socket().unwrap(), &packet, &[]).unwrap();
        let Some(Word::Failed(failed)) = shim.hear(None).unwrap() else { panic!("no failure") };
        assert_eq!(failed.step.chars().count(), MAX_STEP + 1);
    }

    #[test]
    fn only_the_maker_is_believed() {
        let created = Created { pid: 1, ..Created::default() };
        for maker in [None, Some(1)] {
            for packet in [b"N\x01\0\0\0".to_vec(), [b"R".as_slice(), &created.encode_to_vec()].concat()] {
                let (mut shim, child) = pair().unwrap();
                socket::send(child.socket().unwrap(), &packet, &[]).unwrap();
                let refused = shim.hear(maker).unwrap_err();
                assert!(refused.detail.contains("interfered"), "{refused}");
            }
            let (mut shim, child) = pair().unwrap();
            socket::send(child.socket().unwrap(), b"P", &[]).unwrap();
            assert!(shim.hear(maker).is_err());
        }
        for torn in [b"N".as_slice(), b"N123", b"N12345", b"R\xff", b"X", b"\0"] {
            let (mut shim, child) = pair().unwrap();
            socket::send(child.socket().unwrap(), torn, &[]).unwrap();
            assert!(shim.hear(me()).is_err(), "{torn:?}");
        }
    }

    #[test]
    fn a_report_without_an_end_is_refused() {
        let (mut shim, child) = pair().unwrap();
        let part = [b"P".as_slice(), &vec![0; MAX_PACKET - 1]].concat();
        let mut refused = None;
        for _ in 0..2 * MAX_REPORT / MAX_PACKET {
            socket::send(child.socket().unwrap(), &part, &[]).unwrap();
            match shim.hear(me()) {
                Ok(None) => {}
                other => {
                    refused = other.err();
                    break;
                }
            }
        }
        assert!(refused.unwrap().detail.contains("no end"));
    }

    #[test]
    fn an_end_is_heard_and_nothing_is_waited_for() {
        let (mut shim, child) = pair().unwrap();
        assert!(shim.hear(me()).unwrap().is_none());
        drop(child);
        assert!(matches!(shim.hear(me()).unwrap(), Some(Word::End)));
    }
}
