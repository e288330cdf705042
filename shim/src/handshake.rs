//! What a new child and the shim say to each other before the child's exec.
//!
//! A pair of sockets that keep message borders. The child sends one packet: `R` and what it resolved (with the terminal's
//! descriptor if there is one), or `F` and the failure. It waits for one byte of the shim, then execs; the socket is
//! close-on-exec, so the end of the stream says that exec worked, and an `F` packet that it did not.

use crate::failure::{Step, refused};
use berth_shim_proto::control::{Created, Failed};
use berth_sys::socket;
use prost::Message;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A packet holds a list of notes and groups (at most 65536 of 4 bytes, which a kernel socket buffer takes).
const MAX_PACKET: usize = 128 * 1024;

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
        let packet = [b"R".as_slice(), &created.encode_to_vec()].concat();
        let descriptors: Vec<BorrowedFd<'_>> = terminal.into_iter().collect();
        socket::send(self.as_fd(), &packet, &descriptors).step("report to the shim", "").map(drop)
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
        let packet = [b"F".as_slice(), &failed.encode_to_vec()].concat();
        let _ = socket::send(self.as_fd(), &packet, &[]);
    }
}

impl ShimEnd {
    /// Waits for the child's first packet.
    pub(crate) fn wait_for_ready(&self) -> Result<(Created, Option<OwnedFd>), Failed> {
        let (packet, descriptors) = self.packet()?;
        match packet.split_first() {
            Some((b'R', body)) => {
                let created =
                    Created::decode(body).map_err(|_| refused("prepare the container", "a torn report"))?;
                Ok((created, descriptors.into_iter().next()))
            }
            Some((b'F', body)) => Err(decode_failure(body)),
            _ => Err(refused("prepare the container", "its process was killed while preparing")),
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
