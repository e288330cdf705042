//! What a new child and the shim say to each other before the child's exec.
//!
//! A pair of sockets that keep message borders. The child sends one packet: `R` and what it resolved (with the terminal's
//! descriptor if there is one), or `F` and the failure; what is too long for a packet goes before in others, `P`. It waits for one byte of
//! the shim, then execs; the socket is close-on-exec, so the end of the stream says that exec worked, and an `F` packet that it did not.
//!
//! A child that goes on as another process ([`crate::init`]) says `N` and that one's pid before anything else, and ends.

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

/// What is said of a process that ended without a word.
pub(crate) const KILLED: &str = "its process was killed while preparing";

/// The child's end.
#[derive(Debug)]
pub(crate) struct ChildEnd(OwnedFd);

/// The shim's end.
#[derive(Debug)]
pub(crate) struct ShimEnd(OwnedFd);

pub(crate) fn pair() -> io::Result<(ShimEnd, ChildEnd)> {
    let (shim, child) = socket::packet_pair()?;
    Ok((ShimEnd(shim), ChildEnd(child)))
}

impl ChildEnd {
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Tells that everything up to exec is done.
    pub(crate) fn ready(&self, created: &Created, terminal: Option<BorrowedFd<'_>>) -> Result<(), Failed> {
        const STEP: &str = "report to the shim";
        let report = created.encode_to_vec();
        let mut rest = report.as_slice();
        while let Some((part, after)) =
            rest.split_at_checked(MAX_PACKET - 1).filter(|_| rest.len() >= MAX_PACKET)
        {
            socket::send(self.as_fd(), &[b"P", part].concat(), &[]).step(STEP, "")?;
            rest = after;
        }
        let descriptors: Vec<BorrowedFd<'_>> = terminal.into_iter().collect();
        socket::send(self.as_fd(), &[b"R", rest].concat(), &descriptors).step(STEP, "").map(drop)
    }

    /// Tells the pid of the process that goes on in place of this one.
    pub(crate) fn succeeded_by(&self, pid: i32) -> Result<(), Failed> {
        let packet = [b"N".as_slice(), &pid.to_le_bytes()].concat();
        socket::send(self.as_fd(), &packet, &[]).step("report to the shim", "").map(drop)
    }

    /// Waits for the word to go on. The shim's end closed instead means that nobody wants the child any more.
    pub(crate) fn wait_for_go(&self) -> Result<(), Failed> {
        let mut byte = [0];
        match socket::receive(self.as_fd(), &mut byte) {
            Ok((1, _)) => Ok(()),
            _ => Err(refused("start", "the shim has ended")),
        }
    }

    /// Tells that a step failed. Whether anybody hears it does not matter to the child.
    pub(crate) fn failed(&self, failed: &Failed) {
        let mut failed = failed.clone();
        // It may quote the image, and what does not fit would not arrive at all.
        if let Some((end, _)) = failed.detail.char_indices().nth(MAX_DETAIL) {
            failed.detail.truncate(end);
            failed.detail.push('…');
        }
        let packet = [b"F".as_slice(), &failed.encode_to_vec()].concat();
        let _ = socket::send(self.as_fd(), &packet, &[]);
    }
}

impl ShimEnd {
    /// The pid of the process that goes on in place of the first child.
    pub(crate) fn wait_for_successor(&self) -> Result<i32, Failed> {
        const STEP: &str = "prepare the process";
        let (packet, _) = self.packet()?;
        match packet.split_first() {
            Some((b'N', number)) => <[u8; 4]>::try_from(number)
                .map(i32::from_le_bytes)
                .map_err(|_| refused(STEP, "a torn report")),
            Some((b'F', body)) => Err(decode_failure(body)),
            _ => Err(refused(STEP, KILLED)),
        }
    }

    /// Waits for the child's report.
    pub(crate) fn wait_for_ready(&self) -> Result<(Created, Option<OwnedFd>), Failed> {
        const STEP: &str = "prepare the container";
        let mut report = Vec::new();
        loop {
            let (packet, descriptors) = self.packet()?;
            match packet.split_first() {
                Some((b'P', part)) if report.len() <= MAX_REPORT => report.extend_from_slice(part),
                Some((b'P', _)) => return Err(refused(STEP, "a report without an end")),
                Some((b'R', part)) => {
                    report.extend_from_slice(part);
                    let created =
                        Created::decode(report.as_slice()).map_err(|_| refused(STEP, "a torn report"))?;
                    return Ok((created, descriptors.into_iter().next()));
                }
                Some((b'F', body)) => return Err(decode_failure(body)),
                _ => return Err(refused(STEP, KILLED)),
            }
        }
    }

    /// Lets the child go on, and waits until it has become its program.
    pub(crate) fn go(&self) -> Result<(), Failed> {
        socket::send(self.0.as_fd(), b"g", &[]).step("start the container", "its process has ended")?;
        self.wait_for_exec()
    }

    /// Waits until the child has become its program.
    pub(crate) fn wait_for_exec(&self) -> Result<(), Failed> {
        let (packet, _) = self.packet()?;
        match packet.split_first() {
            None => Ok(()),
            Some((_, body)) => Err(decode_failure(body)),
        }
    }

    fn packet(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), Failed> {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            match socket::receive(self.0.as_fd(), &mut buffer) {
                Ok((length, descriptors)) => {
                    buffer.truncate(length);
                    return Ok((buffer, descriptors));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A child killed with unread bytes in its socket resets it: an end like another.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok((Vec::new(), Vec::new()));
                }
                other => other.step("hear from the container's process", "").map(drop)?,
            }
        }
    }
}

fn decode_failure(body: &[u8]) -> Failed {
    Failed::decode(body).unwrap_or_else(|_| refused("prepare the container", "a torn report"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_any_length_arrive_whole() {
        for count in [0, 1, 10_000, 13_105, 13_106, 13_107, 26_213, 65_536] {
            let (shim, child) = pair().unwrap();
            let groups: Vec<u32> = (0..count).map(|number| i32::MAX.unsigned_abs() - number).collect();
            let created = Created { uid: 7, groups, ..Created::default() };
            let (sent, received) = std::thread::scope(|scope| {
                let sending = scope.spawn(|| child.ready(&created, None));
                (shim.wait_for_ready(), sending.join().unwrap())
            });
            assert_eq!((sent.unwrap().0, received), (created, Ok(())), "{count}");
        }
    }

    #[test]
    fn a_successor_is_found_by_its_number() {
        let (shim, child) = pair().unwrap();
        child.succeeded_by(4_194_303).unwrap();
        assert_eq!(shim.wait_for_successor(), Ok(4_194_303));
        child.failed(&refused("test", "no successor"));
        assert_eq!(shim.wait_for_successor().unwrap_err().detail, "no successor");
        drop(child);
        assert_eq!(shim.wait_for_successor().unwrap_err().detail, KILLED);
    }

    #[test]
    fn a_failure_that_quotes_at_length_arrives_shortened() {
        let (shim, child) = pair().unwrap();
        child.failed(&refused("find the user", "ü".repeat(1 << 20)));
        let failed = shim.wait_for_ready().unwrap_err();
        assert_eq!((failed.step.as_str(), failed.detail.chars().count()), ("find the user", MAX_DETAIL + 1));
    }

    #[test]
    fn a_child_that_ends_without_a_word_was_killed() {
        let (shim, child) = pair().unwrap();
        drop(child);
        assert_eq!(shim.wait_for_ready().unwrap_err().detail, KILLED);
    }
}
