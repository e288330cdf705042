//! Unix sockets with descriptors: pairs, listening below a directory with a path of any length,
//! `SCM_RIGHTS`. And whether a TCP peer answers.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recv, recvmsg, sendmsg, setsockopt, socket, socketpair,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// The most descriptors that one message carries here.
pub const MAX_DESCRIPTORS: usize = 8;

/// The most that the kernel lets a message carry: `SCM_MAX_FD`, unix(7).
const KERNELS_MOST: usize = 253;

/// A connected pair of stream sockets, close-on-exec: `socketpair(2)`.
///
/// # Errors
/// `EMFILE` at the descriptor limit.
pub fn stream_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?)
}

/// A connected pair of sockets that keep message boundaries, close-on-exec: `SOCK_SEQPACKET` of
/// unix(7).
///
/// # Errors
/// `EMFILE` at the descriptor limit.
pub fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// A path of any length is made short enough for `sockaddr_un` (108 bytes) by going through the
/// directory's descriptor.
fn address_below(directory: BorrowedFd<'_>, name: &str) -> io::Result<UnixAddr> {
    let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()));
    Ok(UnixAddr::new(&path)?)
}

/// A non-blocking stream socket that listens as `name` in `directory`: unix(7).
///
/// # Errors
/// `EADDRINUSE` when the name exists.
pub fn listen_below(directory: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let listener = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    bind(listener.as_raw_fd(), &address_below(directory, name)?)?;
    listen(&listener, Backlog::new(8)?)?;
    Ok(listener)
}

/// A non-blocking stream socket connected to `name` in `directory`. It does not wait: unix(7).
///
/// # Errors
/// `ENOENT` when there is no such socket, `ECONNREFUSED` when nothing is listening, `EAGAIN` when
/// its queue of pending connections is full.
pub fn connect_below(directory: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &address_below(directory, name)?)?;
    Ok(socket)
}

/// Accepts one pending connection, non-blocking and close-on-exec: `accept4(2)`.
///
/// # Errors
/// `EAGAIN` when none is pending, `EMFILE` at the descriptor limit.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let raw = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: accept4 returned `raw` as a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The user id at the other end of a connected Unix socket, as of its connect: `SO_PEERCRED`,
/// unix(7).
///
/// # Errors
/// When `socket` is not one.
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(getsockopt(&socket, sockopt::PeerCredentials)?.uid())
}

/// The process at the other end of a connected Unix socket, as of its listen: `SO_PEERCRED`,
/// unix(7).
///
/// # Errors
/// When `socket` is not one.
pub fn peer_pid(socket: BorrowedFd<'_>) -> io::Result<i32> {
    Ok(getsockopt(&socket, sockopt::PeerCredentials)?.pid())
}

/// Makes receiving from `socket` fail with `EAGAIN` when nothing arrives for this long:
/// `SO_RCVTIMEO`, socket(7).
///
/// # Errors
/// `EDOM` for more time than the kernel can count.
pub fn limit_waits(socket: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let microseconds =
        i64::try_from(limit.as_micros()).map_err(|_| io::Error::from_raw_os_error(libc::EDOM))?;
    Ok(setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::microseconds(microseconds))?)
}

/// Has sending to `socket` fail with `EAGAIN` when there is no room for so long: `SO_SNDTIMEO`,
/// socket(7).
///
/// # Errors
/// As with [`limit_waits`].
pub fn limit_sends(socket: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let microseconds =
        i64::try_from(limit.as_micros()).map_err(|_| io::Error::from_raw_os_error(libc::EDOM))?;
    Ok(setsockopt(&socket, sockopt::SendTimeout, &TimeVal::microseconds(microseconds))?)
}

/// Sets how many bytes may be sent that the other end has not received: `SO_SNDBUF`, socket(7),
/// which the kernel doubles. More than the system-wide maximum takes `CAP_NET_ADMIN`.
///
/// # Errors
/// None in practice.
pub fn set_send_room(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    match setsockopt(&socket, sockopt::SndBufForce, &bytes) {
        Err(nix::errno::Errno::EPERM) => Ok(setsockopt(&socket, sockopt::SndBuf, &bytes)?),
        result => Ok(result?),
    }
}

/// Sends `bytes` with up to [`MAX_DESCRIPTORS`] descriptors; returns how many bytes were taken (the
/// descriptors go with the first): `sendmsg(2)`. No `SIGPIPE`.
///
/// # Errors
/// `EAGAIN` on a full non-blocking socket, `EPIPE` when the other end is closed.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// Receives bytes, and the descriptors that came with them, close-on-exec: `recvmsg(2)`. Zero bytes
/// mean the end.
///
/// # Errors
/// `EAGAIN` on an empty non-blocking socket; `EMFILE` when there was no room for a descriptor, and
/// `EMSGSIZE` when there are more than [`MAX_DESCRIPTORS`] (none is kept then).
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    // Room for as many as there can be: those that are cut off for lack of room would stay open
    // without an owner.
    let mut space = nix::cmsg_space!([RawFd; KERNELS_MOST]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel made each of these descriptors for this process in this call;
            // nothing else owns them.
            descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    // There was enough space, so the process could not take a descriptor.
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok((message.bytes, descriptors))
}

/// Copies the next packet and leaves it in the queue: `recv(2)` with `MSG_PEEK`. Zero bytes mean
/// the end.
///
/// # Errors
/// `EAGAIN` when there is none on a non-blocking socket.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_PEEK)?)
}

/// Drops the next packet of a socket that keeps message boundaries: `recv(2)`.
///
/// # Errors
/// `EAGAIN` when there is none on a non-blocking socket.
pub fn drop_packet(socket: BorrowedFd<'_>) -> io::Result<()> {
    recv(socket.as_raw_fd(), &mut [0], MsgFlags::empty())?;
    Ok(())
}

/// How long the peer of a TCP connection has acknowledged nothing although something was sent to it
/// that needs an acknowledgement: data, or a window probe; `TCP_INFO` of tcp(7). `None` when it
/// owes no answer.
///
/// # Errors
/// `EOPNOTSUPP` for a socket that is not TCP's.
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<Option<Duration>> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let size = size_of::<libc::tcp_info>();
    let mut length = libc::socklen_t::try_from(size).unwrap_or(libc::socklen_t::MAX);
    // SAFETY: `info` has room for `length` bytes, both live through the call, and the kernel writes
    // no more than `length`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is made of integers only, all of which were zero before the kernel wrote.
    let info = unsafe { info.assume_init() };
    let owes = info.tcpi_unacked > 0 || info.tcpi_probes > 0 || info.tcpi_retransmits > 0;
    Ok(owes.then(|| Duration::from_millis(info.tcpi_last_ack_recv.into())))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn descriptors_travel_with_the_bytes() {
        let (left, right) = stream_pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(send(left.as_fd(), b"hello", &[file.as_fd(), file.as_fd()]).unwrap(), 5);
        let mut buffer = [0; 16];
        let (length, descriptors) = receive(right.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..length], descriptors.len()), (&b"hello"[..], 2));
        drop(left);
        assert_eq!(receive(right.as_fd(), &mut buffer).unwrap().0, 0);
    }

    #[test]
    fn a_packet_that_was_looked_at_is_still_there_until_it_is_dropped() {
        let (left, right) = packet_pair().unwrap();
        for packet in [b"one".as_slice(), b"second"] {
            send(left.as_fd(), packet, &[]).unwrap();
        }
        drop(left);
        let mut buffer = [0; 16];
        for length in [3, 3] {
            assert_eq!(peek(right.as_fd(), &mut buffer).unwrap(), length);
        }
        drop_packet(right.as_fd()).unwrap();
        assert_eq!(peek(right.as_fd(), &mut buffer).unwrap(), 6);
        drop_packet(right.as_fd()).unwrap();
        assert_eq!(peek(right.as_fd(), &mut buffer).unwrap(), 0);
    }

    #[test]
    fn of_too_many_descriptors_none_is_kept() {
        let (left, right) = packet_pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut buffer = [0; 16];
        for count in [MAX_DESCRIPTORS + 1, KERNELS_MOST] {
            // One pipe, which ends when its last copy is closed.
            let (read, write) = crate::file::pipe().unwrap();
            let mut many = vec![file.as_fd(); count - 1];
            many.push(write.as_fd());
            send(left.as_fd(), b"x", &many).unwrap();
            drop(many);
            drop(write);
            let error = receive(right.as_fd(), &mut buffer).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{count}");
            assert_eq!(io::Read::read(&mut std::fs::File::from(read), &mut buffer).unwrap(), 0, "{count}");
        }
    }

    #[test]
    fn a_wait_has_a_limit() {
        let (left, right) = packet_pair().unwrap();
        limit_waits(left.as_fd(), Duration::from_millis(50)).unwrap();
        let error = receive(left.as_fd(), &mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(right);
    }

    #[test]
    fn a_peer_that_has_everything_owes_nothing() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        io::Write::write_all(&mut near, b"x").unwrap();
        io::Read::read_exact(&mut far, &mut [0]).unwrap();
        while unacknowledged(near.as_fd()).unwrap().is_some() {
            std::thread::yield_now();
        }
        let (left, _right) = stream_pair().unwrap();
        assert!(unacknowledged(left.as_fd()).is_err());
    }

    #[test]
    fn a_socket_below_a_deep_directory_is_reachable() {
        let mut deep = std::env::temp_dir().join(format!("berth-socket-{}", std::process::id()));
        let top = deep.clone();
        for _ in 0..10 {
            deep = deep.join("a-directory-with-a-long-name");
        }
        std::fs::create_dir_all(&deep).unwrap();
        let directory = std::fs::File::open(&deep).unwrap();
        let listener = listen_below(directory.as_fd(), "sock").unwrap();
        let client = connect_below(directory.as_fd(), "sock").unwrap();
        let served = accept(listener.as_fd()).unwrap();
        assert_eq!(peer_uid(served.as_fd()).unwrap(), nix::unistd::getuid().as_raw());
        send(client.as_fd(), b"x", &[]).unwrap();
        let mut buffer = [0; 4];
        assert_eq!(receive(served.as_fd(), &mut buffer).unwrap().0, 1);
        std::fs::remove_dir_all(&top).unwrap();
    }
}
