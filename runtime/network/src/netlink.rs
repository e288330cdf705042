//! A synchronous netlink socket: requests go out together, and every one of them is answered before
//! the call returns.
//!
//! The kernel handles a netlink request inside `sendmsg`, so that the answers are in the socket's
//! queue when it returns (`netlink(7)`, "netlink is not reliable" concerns only overflow and
//! notifications, which are not subscribed to here). The socket is therefore non-blocking: an
//! answer that is not there will not come, and waiting for it would hang.
//!
//! Several requests travel in one message (RFC 3549, section 2.3.2.1); the kernel continues after
//! one that fails, and acks each. Requests are encoded by `netlink-packet-route`. Answers are
//! decoded here, and only the few attributes that are used: a full decoder fails on a whole message
//! when a newer kernel changes an attribute that was not requested.
//!
//! A socket belongs to the network namespace that the calling thread was in when it was opened,
//! keeps that namespace alive until it is dropped, and works from any thread.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkSerializable,
    NlaBuffer, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols};
use nix::errno::Errno;
use nix::libc;

/// Room for one datagram of answers. The kernel fills dumps in pieces of at most 32 KiB
/// (`netlink_dump`, net/netlink/af_netlink.c); twice that leaves room for growth.
const RECEIVE_BYTES: usize = 64 * 1024;

/// Most messages taken from one dump: more links or addresses than a node can have, yet a bound.
const MAX_DUMP_MESSAGES: usize = 1 << 18;

/// How often a dump is restarted when the tables changed while it was read (`NLM_F_DUMP_INTR`).
const DUMP_ATTEMPTS: u32 = 10;

/// Size of `struct nlmsghdr` (`linux/netlink.h`): length u32, type u16, flags u16, sequence u32,
/// port u32.
const HEADER_BYTES: usize = 16;

/// Why an exchange with the kernel failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket could not be created; `EPROTONOSUPPORT` when the kernel lacks the protocol.
    #[error("cannot open a netlink socket")]
    Open {
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The request did not reach the kernel.
    #[error("cannot send the request to {operation}")]
    Send {
        /// The operation.
        operation: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The answer could not be read; `EAGAIN` when the kernel left none.
    #[error("cannot read the answer to the request to {operation}")]
    Receive {
        /// The operation.
        operation: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The kernel understood the request and refused it.
    #[error("cannot {operation}")]
    Refused {
        /// The operation.
        operation: &'static str,
        /// The reason.
        #[source]
        errno: Errno,
    },
    /// The answer is not valid netlink.
    #[error("the answer to the request to {operation} is malformed")]
    Malformed {
        /// The operation.
        operation: &'static str,
    },
    /// The tables changed during each of the attempts to list them.
    #[error("the list kept changing while trying to {operation}")]
    Unsteady {
        /// The operation.
        operation: &'static str,
    },
}

impl Error {
    /// The kernel's reason, when it refused a request.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// One request: its netlink type and flags, its body, and what it does, for the error message.
#[derive(Debug)]
pub(crate) struct Request {
    operation: &'static str,
    kind: u16,
    flags: u16,
    body: Vec<u8>,
    /// Whether the kernel is asked for an acknowledgement, and it is awaited.
    acknowledged: bool,
}

impl Request {
    /// A routing request. `flags` are added to `NLM_F_REQUEST`. `operation` completes the sentence
    /// "cannot ...".
    pub(crate) fn route(operation: &'static str, flags: u16, message: &RouteNetlinkMessage) -> Self {
        let mut body = vec![0; message.buffer_len()];
        message.serialize(&mut body);
        Self { operation, kind: message.message_type(), flags, body, acknowledged: true }
    }

    /// A request of another protocol, its body already encoded.
    pub(crate) fn raw(operation: &'static str, kind: u16, flags: u16, body: Vec<u8>) -> Self {
        Self { operation, kind, flags, body, acknowledged: true }
    }

    /// The same, for a message that the kernel answers only when it fails.
    pub(crate) fn unacknowledged(self) -> Self {
        Self { acknowledged: false, ..self }
    }
}

#[cfg(test)]
impl Request {
    /// The encoded body.
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }
}

/// One message of the kernel's that answers a request.
#[derive(Debug)]
pub(crate) struct Reply {
    body: Vec<u8>,
}

/// A socket that speaks rtnetlink in one network namespace.
pub struct Netlink {
    socket: Socket,
    /// Sequence number of the next request. Answers carry it back, so that a leftover of an
    /// earlier, failed conversation is distinguished from the awaited answer.
    sequence: u32,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Netlink {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Netlink").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Netlink {
    /// Opens an rtnetlink socket in the network namespace of the calling thread. Close-on-exec.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open() -> Result<Self, Error> {
        Self::open_protocol(protocols::NETLINK_ROUTE)
    }

    /// Opens a socket to the kernel's packet filter (`NETLINK_NETFILTER`).
    pub(crate) fn open_netfilter() -> Result<Self, Error> {
        Self::open_protocol(protocols::NETLINK_NETFILTER)
    }

    fn open_protocol(protocol: isize) -> Result<Self, Error> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(protocol)?;
            socket.bind_auto()?;
            // Connected to the kernel (port 0), so that no other process can slip in an answer.
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            // An error answer then carries the header of the request, not a copy of all of it.
            socket.set_cap_ack(true)?;
            Ok(socket)
        };
        let socket = open().map_err(|source| Error::Open { source })?;
        Ok(Self { socket, sequence: 1, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// Sends requests together and returns when the kernel has acknowledged each. The messages that
    /// answer requests for data are returned in order.
    ///
    /// # Errors
    /// The first request's failure, in the order given; the later ones have been carried out as far
    /// as they could be.
    pub(crate) fn request(&mut self, requests: &[Request]) -> Result<Vec<Reply>, Error> {
        let Some(last) = requests.last() else { return Ok(Vec::new()) };
        let first_sequence = self.send(requests, 0)?;
        let mut outcomes: Vec<Option<Result<(), Errno>>> =
            requests.iter().map(|request| (!request.acknowledged).then_some(Ok(()))).collect();
        let mut replies = Vec::new();
        // An error to a message that is not acknowledged stands for all of them: no answers to the
        // others follow.
        let mut refused = false;
        while !refused && outcomes.iter().any(Option::is_none) {
            for message in self.receive(last.operation)? {
                let position = message.sequence.wrapping_sub(first_sequence);
                let position = usize::try_from(position).unwrap_or(usize::MAX);
                let (Some(outcome), Some(request)) = (outcomes.get_mut(position), requests.get(position))
                else {
                    continue;
                };
                if message.kind == NLMSG_ERROR {
                    let result = message.error_code(last.operation)?;
                    refused |= result.is_err() && !request.acknowledged;
                    *outcome = Some(result);
                } else {
                    replies.push(Reply { body: message.body });
                }
            }
        }
        for (request, outcome) in requests.iter().zip(outcomes) {
            if let Some(Err(errno)) = outcome {
                return Err(Error::Refused { operation: request.operation, errno });
            }
        }
        Ok(replies)
    }

    /// Sends a request for a whole table and returns its entries as one consistent list.
    ///
    /// # Errors
    /// [`Error::Unsteady`] when the table kept changing; otherwise the kernel's error.
    pub(crate) fn dump(&mut self, request: &Request) -> Result<Vec<Reply>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let dump = self.dump_once(request, |body| Some(Reply { body }))?;
            if !dump.is_interrupted {
                return Ok(dump.kept);
            }
        }
        Err(Error::Unsteady { operation: request.operation })
    }

    /// Sends a request for a whole table and returns the first entries of it, as many as `most` or
    /// a datagram more. Entries that appear or disappear meanwhile may or may not be among them.
    /// What the kernel has not sent yet is discarded with the socket.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn beginning_of_dump(mut self, request: &Request, most: usize) -> Result<Vec<Reply>, Error> {
        let operation = request.operation;
        let sequence = self.send(std::slice::from_ref(request), NLM_F_DUMP)?;
        let mut replies = Vec::new();
        while replies.len() < most {
            for message in self.receive(operation)? {
                if message.sequence != sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        message
                            .error_code(operation)?
                            .map_err(|errno| Error::Refused { operation, errno })?;
                        return Ok(replies);
                    }
                    _ => replies.push(Reply { body: message.body }),
                }
            }
        }
        Ok(replies)
    }

    /// Sends a request for a whole table and returns what `wanted` makes of its entries, if
    /// anything. Entries that appear or disappear meanwhile may or may not be among them. For a
    /// table that others can fill: nothing else of it is kept.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn dump_wanted<T>(
        &mut self,
        request: &Request,
        wanted: impl FnMut(Vec<u8>) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        self.dump_once(request, wanted).map(|dump| dump.kept)
    }

    /// One attempt. It is read to its end also when there is too much of it: the kernel refuses to
    /// begin another one before that (`EBUSY`).
    fn dump_once<T>(
        &mut self,
        request: &Request,
        mut keep: impl FnMut(Vec<u8>) -> Option<T>,
    ) -> Result<Dump<T>, Error> {
        let operation = request.operation;
        let sequence = self.send(std::slice::from_ref(request), NLM_F_DUMP)?;
        let mut dump = Dump { kept: Vec::new(), is_interrupted: false };
        let mut is_too_long = false;
        loop {
            for message in self.receive(operation)? {
                if message.sequence != sequence {
                    continue;
                }
                dump.is_interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    // The end of a dump carries an errno like an error message does.
                    NLMSG_DONE | NLMSG_ERROR => {
                        message
                            .error_code(operation)?
                            .map_err(|errno| Error::Refused { operation, errno })?;
                        return if is_too_long { Err(Error::Malformed { operation }) } else { Ok(dump) };
                    }
                    _ if dump.kept.len() < MAX_DUMP_MESSAGES => dump.kept.extend(keep(message.body)),
                    _ => is_too_long = true,
                }
            }
        }
    }

    /// Puts requests into one datagram. Returns the sequence number of the first; the others follow
    /// it.
    fn send(&mut self, requests: &[Request], extra_flags: u16) -> Result<u32, Error> {
        let first_sequence = self.sequence;
        let mut datagram = Vec::new();
        for request in requests {
            let operation = request.operation;
            let length = u32::try_from(HEADER_BYTES + request.body.len())
                .map_err(|_| Error::Malformed { operation })?;
            datagram.extend_from_slice(&length.to_ne_bytes());
            datagram.extend_from_slice(&request.kind.to_ne_bytes());
            let acknowledge =
                if request.acknowledged && extra_flags & NLM_F_DUMP == 0 { NLM_F_ACK } else { 0 };
            let flags = request.flags | extra_flags | acknowledge | NLM_F_REQUEST;
            datagram.extend_from_slice(&flags.to_ne_bytes());
            datagram.extend_from_slice(&self.sequence.to_ne_bytes());
            datagram.extend_from_slice(&0_u32.to_ne_bytes());
            datagram.extend_from_slice(&request.body);
            datagram.resize(datagram.len().next_multiple_of(4), 0);
            self.sequence = self.sequence.wrapping_add(1);
        }
        let operation = requests.first().map_or("send nothing", |request| request.operation);
        match self.socket.send(&datagram, 0) {
            Ok(_) => Ok(first_sequence),
            Err(source) => Err(Error::Send { operation, source }),
        }
    }

    /// Takes one datagram of answers apart.
    fn receive(&mut self, operation: &'static str) -> Result<Vec<Message>, Error> {
        self.buffer.clear();
        let length = loop {
            match self.socket.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Receive { operation, source }),
                Ok(length) => break length,
            }
        };
        // With MSG_TRUNC the length is the datagram's own: if it is longer than what was stored, a
        // part is lost.
        if length != self.buffer.len() {
            return Err(Error::Malformed { operation });
        }
        parse_datagram(&self.buffer).ok_or(Error::Malformed { operation })
    }
}

/// What was kept of a table.
struct Dump<T> {
    kept: Vec<T>,
    /// The kernel marked it as changed while it was read.
    is_interrupted: bool,
}

/// One netlink message, as it came.
#[derive(Debug)]
struct Message {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: Vec<u8>,
}

impl Message {
    /// The errno at the start of an `NLMSG_ERROR` or `NLMSG_DONE` body: 0 or a negated errno
    /// (`struct nlmsgerr`).
    fn error_code(&self, operation: &'static str) -> Result<Result<(), Errno>, Error> {
        match read_i32(&self.body, 0) {
            Some(0) => Ok(Ok(())),
            Some(code) => Ok(Err(Errno::from_raw(code.wrapping_neg()))),
            None => Err(Error::Malformed { operation }),
        }
    }
}

/// Splits a datagram into messages; `None` when the lengths in it contradict each other.
fn parse_datagram(mut rest: &[u8]) -> Option<Vec<Message>> {
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let length = usize::try_from(read_u32(rest, 0)?).ok()?;
        let body = rest.get(HEADER_BYTES..length)?.to_vec();
        messages.push(Message {
            kind: read_u16(rest, 4)?,
            flags: read_u16(rest, 6)?,
            sequence: read_u32(rest, 8)?,
            body,
        });
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(messages)
}

fn read_u16(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk().copied().map(u16::from_ne_bytes)
}

fn read_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn read_i32(bytes: &[u8], offset: usize) -> Option<i32> {
    bytes.get(offset..)?.first_chunk().copied().map(i32::from_ne_bytes)
}

/// The parts of a link that are used: `struct ifinfomsg` and a few attributes (`rtnetlink(7)`,
/// `linux/if_link.h`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    /// Interface number within its namespace.
    pub(crate) index: u32,
    /// `IFF_*` bits.
    pub(crate) flags: u32,
    /// `IFLA_IFNAME`, without the NUL.
    pub(crate) name: String,
    /// `IFLA_ADDRESS`, when it is an Ethernet one.
    pub(crate) mac: Option<[u8; 6]>,
    /// `IFLA_MASTER`: number of the bridge that the link is a port of.
    pub(crate) master: Option<u32>,
    /// `IFLA_MTU`.
    pub(crate) mtu: u32,
    /// `IFLA_STATS64`: the first eight counters of `struct rtnl_link_stats64`, in its order:
    /// packets received, sent; bytes received, sent; errors received, sent; drops received, sent.
    pub(crate) counters: [u64; 8],
}

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_STATS64: u16 = 23;
/// Size of `struct ifinfomsg`.
const IFINFOMSG_BYTES: usize = 16;

impl Reply {
    /// What follows the netlink header.
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// Reads an `RTM_NEWLINK` message.
    pub(crate) fn link(&self, operation: &'static str) -> Result<Link, Error> {
        decode_link(&self.body).ok_or(Error::Malformed { operation })
    }

    /// Reads an `RTM_NEWADDR` message; `None` for one that is neither IPv4 nor IPv6.
    pub(crate) fn address(&self, operation: &'static str) -> Result<Option<LinkAddress>, Error> {
        decode_address(&self.body).ok_or(Error::Malformed { operation })
    }
}

fn decode_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: read_u32(body, 4)?,
        flags: read_u32(body, 8)?,
        name: String::new(),
        mac: None,
        master: None,
        mtu: 0,
        counters: [0; 8],
    };
    for attribute in NlasIterator::new(body.get(IFINFOMSG_BYTES..)?) {
        let attribute: NlaBuffer<&[u8]> = attribute.ok()?;
        let value = attribute.value();
        match attribute.kind() {
            IFLA_IFNAME => link.name = text(value)?,
            IFLA_ADDRESS => link.mac = value.try_into().ok(),
            IFLA_MASTER => link.master = Some(read_u32(value, 0)?),
            IFLA_MTU => link.mtu = read_u32(value, 0)?,
            IFLA_STATS64 => {
                for (counter, bytes) in link.counters.iter_mut().zip(value.as_chunks::<8>().0) {
                    *counter = u64::from_ne_bytes(*bytes);
                }
            }
            _ => {}
        }
    }
    Some(link)
}

/// A C string attribute. Interface names may be any bytes but `/`, `:` and blanks; one that is not
/// UTF-8 is not ours, and only has to differ from ours.
fn text(value: &[u8]) -> Option<String> {
    let bytes = value.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

/// An address of an interface: `struct ifaddrmsg` and its local address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LinkAddress {
    /// Number of the interface.
    pub(crate) index: u32,
    /// Length of the prefix in bits.
    pub(crate) prefix: u8,
    /// `RT_SCOPE_*`: 0 global, 253 link.
    pub(crate) scope: u8,
    /// The interface's own address.
    pub(crate) address: IpAddr,
}

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Size of `struct ifaddrmsg`.
const IFADDRMSG_BYTES: usize = 8;

fn decode_address(body: &[u8]) -> Option<Option<LinkAddress>> {
    let (prefix, scope, index) = (*body.get(1)?, *body.get(3)?, read_u32(body, 4)?);
    // IFA_LOCAL is the interface's own address; IPv6 leaves it out when it equals IFA_ADDRESS
    // (rtnetlink(7)).
    let (mut local, mut address) = (None, None);
    for attribute in NlasIterator::new(body.get(IFADDRMSG_BYTES..)?) {
        let attribute: NlaBuffer<&[u8]> = attribute.ok()?;
        match attribute.kind() {
            IFA_LOCAL => local = ip(attribute.value()),
            IFA_ADDRESS => address = ip(attribute.value()),
            _ => {}
        }
    }
    Some(local.or(address).map(|address| LinkAddress { index, prefix, scope, address }))
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    let ipv4 = || <[u8; 4]>::try_from(value).ok().map(|octets| IpAddr::V4(Ipv4Addr::from(octets)));
    let ipv6 = || <[u8; 16]>::try_from(value).ok().map(|octets| IpAddr::V6(Ipv6Addr::from(octets)));
    ipv4().or_else(ipv6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&16_u16.to_ne_bytes());
        bytes.extend_from_slice(&0_u16.to_ne_bytes());
        bytes.extend_from_slice(&7_u32.to_ne_bytes());
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn a_datagram_is_split_at_its_aligned_lengths() {
        let mut datagram = message(18, b"ab\0\0");
        datagram.extend(message(16, b""));
        let messages = parse_datagram(&datagram).unwrap();
        let bodies: Vec<&[u8]> = messages.iter().map(|message| message.body.as_slice()).collect();
        assert_eq!(bodies, [b"ab".as_slice(), b""]);
        assert!(messages.iter().all(|message| message.sequence == 7));
    }

    #[test]
    fn datagrams_whose_lengths_lie_are_refused() {
        let cases = [
            vec![0],
            vec![0; 16],
            message(15, b""),
            message(17, b""),
            message(u32::MAX, b"x"),
            vec![0xff; 100],
        ];
        for datagram in cases {
            assert!(parse_datagram(&datagram).is_none(), "{datagram:?}");
        }
        assert!(parse_datagram(b"").unwrap().is_empty());
    }

    #[test]
    fn short_or_broken_link_and_address_messages_are_refused() {
        for length in 0..IFINFOMSG_BYTES {
            assert_eq!(decode_link(&vec![0; length]), None, "{length}");
        }
        for length in 0..IFADDRMSG_BYTES {
            assert_eq!(decode_address(&vec![0; length]), None, "{length}");
        }
        // An attribute that claims to be longer than the message.
        let mut body = vec![0; IFINFOMSG_BYTES];
        body.extend_from_slice(&[200, 0, 3, 0, b'x']);
        assert_eq!(decode_link(&body), None);
        // IFLA_MASTER with two bytes in place of four.
        let mut body = vec![0; IFINFOMSG_BYTES];
        body.extend_from_slice(&[6, 0, 10, 0, 1, 1, 0, 0]);
        assert_eq!(decode_link(&body), None);
    }

    #[test]
    fn a_link_message_of_loopback_is_understood() {
        let mut netlink = Netlink::open().unwrap();
        let mut message = netlink_packet_route::link::LinkMessage::default();
        message.header.index = 1;
        let request = Request::route("find lo", 0, &RouteNetlinkMessage::GetLink(message));
        let replies = netlink.request(&[request]).unwrap();
        let link = replies[0].link("find lo").unwrap();
        assert_eq!((link.index, link.name.as_str()), (1, "lo"));
    }

    #[test]
    fn a_refusal_names_the_request_and_does_not_disturb_the_next() {
        let mut netlink = Netlink::open().unwrap();
        let ask = |operation, index| {
            let mut message = netlink_packet_route::link::LinkMessage::default();
            message.header.index = index;
            Request::route(operation, 0, &RouteNetlinkMessage::GetLink(message))
        };
        let error = netlink
            .request(&[ask("find lo", 1), ask("find a ghost", 0x7fff_fff0), ask("find lo", 1)])
            .unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENODEV));
        assert_eq!(error.to_string(), "cannot find a ghost");
        assert_eq!(netlink.request(&[ask("find lo", 1)]).unwrap().len(), 1);
    }
}
