//! Port forwarding: `portforward.k8s.io` over SPDY.
//!
//! For each TCP connection the client opens two streams with the headers `streamType` (`error`,
//! then `data`), `port` and `requestID`, the same for both. Clients before Kubernetes 1.6 send no
//! `requestID`: the id of their data stream follows that of its error stream. A connection that
//! fails reports why on its error stream, and does not affect the others.
//!
//! The port sees an end only where its client, or the port itself, has ended: a client that
//! vanishes or gives up is seen as a broken connection, so that half a request is not mistaken for
//! a whole one.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::command::BoxFuture;
use crate::hangup::Hangup;
use crate::spdy::connection::{BrokenOff, Incoming, Outgoing, Role};
use crate::spdy::{Connection, Limits, ResetStatus, Stream};
use crate::{IDLE, STALL, STREAMS_WITHIN};

/// The sub-protocol.
pub(crate) const PROTOCOL: &str = "portforward.k8s.io";

/// Streams of one client: two for each forwarded connection.
const MAX_STREAMS: usize = 1000;

/// Bytes read at a time from a forwarded connection.
const READ_BYTES: usize = 32 * 1024;

/// Connects to a port inside the sandbox. An error is text for the client.
pub type Connect = Arc<dyn Fn(u16) -> BoxFuture<Result<TcpStream, String>> + Send + Sync>;

/// Identifies the streams that belong together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Request {
    Named(String),
    /// By the id of the error stream.
    Numbered(u32),
}

/// The role of a stream in its pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Error,
    Data,
}

#[derive(Debug)]
struct Half {
    part: Part,
    port: u16,
    stream: Stream,
    until: Instant,
}

/// Serves a client over a SPDY connection until it goes away.
pub(crate) async fn over_spdy<T>(io: T, hangup: Option<Hangup>, connect: Connect)
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let limits = Limits { streams: MAX_STREAMS, idle: IDLE, stall: Some(STALL) };
    let mut connection = Connection::new(io, Role::Server, limits, hangup);
    let mut halves: HashMap<Request, Half> = HashMap::new();
    let mut forwards = JoinSet::new();
    loop {
        let next = halves.values().map(|half| half.until).min();
        let too_late = async {
            match next {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            stream = connection.accept() => {
                let Some(stream) = stream else { break };
                if let Some(pair) = matched(stream, &mut halves).await {
                    forwards.spawn(forward(pair, connect.clone()));
                }
            }
            () = too_late => give_up_late(&mut halves).await,
            Some(_) = forwards.join_next() => {}
        }
    }
    // What is being forwarded ends when the set is dropped.
}

/// The two streams of a forwarded connection.
#[derive(Debug)]
struct Pair {
    port: u16,
    error: Stream,
    data: Stream,
}

/// Accepts a stream; returns the pair if it completes one.
async fn matched(stream: Stream, halves: &mut HashMap<Request, Half>) -> Option<Pair> {
    let Some((request, part, port)) = described(&stream) else {
        stream.outgoing.reset(ResetStatus::ProtocolError).await;
        return None;
    };
    if stream.outgoing.reply().await.is_err() {
        return None;
    }
    match halves.remove(&request) {
        None => {
            let until = Instant::now() + STREAMS_WITHIN;
            halves.insert(request, Half { part, port, stream, until });
            None
        }
        Some(first) if first.part != part && first.port == port => Some(match part {
            Part::Data => Pair { port, error: first.stream, data: stream },
            Part::Error => Pair { port, error: stream, data: first.stream },
        }),
        Some(first) => {
            // Two with the same role, or for two ports.
            stream.outgoing.reset(ResetStatus::ProtocolError).await;
            halves.insert(request, first);
            None
        }
    }
}

/// The meaning of a stream's headers; `None` when they are invalid.
fn described(stream: &Stream) -> Option<(Request, Part, u16)> {
    let part = match stream.headers.get("streamtype")? {
        "error" => Part::Error,
        "data" => Part::Data,
        _ => return None,
    };
    let port = stream.headers.get("port")?;
    // `parse` would accept "+80" as a number.
    let port = port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse::<u16>().ok())??;
    let id = stream.outgoing.id();
    let request = match (stream.headers.get("requestid"), part) {
        (Some(name), _) => Request::Named(name.to_owned()),
        (None, Part::Error) => Request::Numbered(id),
        (None, Part::Data) => Request::Numbered(id.checked_sub(2)?),
    };
    (port != 0).then_some((request, part, port))
}

/// Gives up streams that have waited too long for their other half.
async fn give_up_late(halves: &mut HashMap<Request, Half>) {
    let now = Instant::now();
    let late: Vec<Request> =
        halves.iter().filter(|(_, half)| half.until <= now).map(|(request, _)| request.clone()).collect();
    for request in late {
        let Some(Half { part, port, stream, .. }) = halves.remove(&request) else { continue };
        if part == Part::Error {
            fail(
                &stream.outgoing,
                &format!("forward port {port}: no data stream was opened within {STREAMS_WITHIN:?}"),
            )
            .await;
        }
        stream.outgoing.reset(ResetStatus::Cancel).await;
    }
}

/// Reports on an error stream why there is no connection.
async fn fail(error: &Outgoing, text: &str) {
    // A failure to send it does not matter.
    if error.send(Bytes::copy_from_slice(text.as_bytes())).await.is_ok() {
        let _ = error.finish().await;
    }
}

/// The port's side of a connection. If this is dropped before either side has ended, the port sees
/// a broken connection.
#[derive(Debug)]
pub(crate) struct PortSide {
    stream: TcpStream,
    ended: AtomicBool,
}

impl From<TcpStream> for PortSide {
    fn from(stream: TcpStream) -> Self {
        Self { stream, ended: AtomicBool::new(false) }
    }
}

impl PortSide {
    /// Both directions, and a record of which side has ended.
    pub(crate) fn split(&mut self) -> (ReadHalf<'_>, WriteHalf<'_>, &AtomicBool) {
        let (from, to) = self.stream.split();
        (from, to, &self.ended)
    }
}

impl Drop for PortSide {
    fn drop(&mut self) {
        if !*self.ended.get_mut() {
            // A reset instead of an end, socket(7). A port that is gone needs neither.
            let _ = self.stream.set_zero_linger();
        }
    }
}

/// Why a connection ends whose port does not read.
pub(crate) fn unread(port: u16) -> String {
    format!(
        "forward port {port}: disconnected, because the port has read nothing for {STALL:?} and held up the \
         client's other connections"
    )
}

async fn forward(pair: Pair, connect: Connect) {
    let Pair { port, error, data } = pair;
    let Stream { incoming, outgoing, .. } = data;
    // Data on an error stream is ignored.
    let error = error.without_input();
    let (data, both) = (outgoing.clone(), outgoing.clone());
    let connected = async {
        let mut side = PortSide::from(connect(port).await?);
        let (from, to, ended) = side.split();
        // A port that reads no more may still have answered: that is passed on before the error is
        // reported.
        let uploading = async { Ok(upload(incoming, to, ended).await) };
        match tokio::try_join!(uploading, download(from, both, ended)) {
            Ok((Ok(()), ())) => Ok(()),
            Ok((Err(failed), ())) | Err(failed) => Err(format!("forward port {port}: {failed}")),
        }
    };
    // After a client's reset, the pod's side is not waited for: it may never send anything again.
    let result = tokio::select! {
        biased;
        result = connected => result,
        why = data.broken_off() => match why {
            BrokenOff::ByPeer => Ok(()),
            BrokenOff::Overrun => Err(unread(port)),
        },
    };
    match result {
        Ok(()) => {
            let _ = error.finish().await;
        }
        Err(text) => {
            tracing::debug!(port, error = text, "forwarded connection failed");
            fail(&error, &text).await;
        }
    }
    outgoing.reset(ResetStatus::Cancel).await;
    error.reset(ResetStatus::Cancel).await;
}

/// From the client to the port; its end is passed on.
async fn upload(mut from: Incoming, mut to: WriteHalf<'_>, ended: &AtomicBool) -> io::Result<()> {
    while let Some(bytes) = from.receive().await {
        to.write_all(&bytes).await?;
    }
    if !from.is_finished() {
        // The stream broke, which ends the whole connection.
        return std::future::pending().await;
    }
    ended.store(true, Ordering::Relaxed);
    // The other side may have closed it already.
    let _ = to.shutdown().await;
    Ok(())
}

/// From the port to the client; its end is passed on.
async fn download(from: ReadHalf<'_>, to: Outgoing, ended: &AtomicBool) -> io::Result<()> {
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    loop {
        // No buffer is kept for an idle connection.
        from.readable().await?;
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        match from.try_read_buf(&mut buffer) {
            Ok(0) => {
                ended.store(true, Ordering::Relaxed);
                return to.finish().await.map_err(gone);
            }
            Ok(length) if length < READ_BYTES / 4 => {
                to.send(Bytes::copy_from_slice(&buffer)).await.map_err(gone)?;
            }
            Ok(_) => to.send(buffer.freeze()).await.map_err(gone)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, duplex};
    use tokio::net::TcpListener;

    use super::*;
    use crate::spdy::Headers;

    async fn served(connect: Connect) -> (Connection, tokio::task::JoinHandle<()>) {
        let (near, far) = duplex(64 * 1024);
        let server = tokio::spawn(over_spdy(far, None, connect));
        let limits = Limits { streams: 100, idle: IDLE, stall: None };
        (Connection::new(near, Role::Client, limits, None), server)
    }

    async fn open(client: &mut Connection, headers: &[(&str, &str)]) -> Stream {
        client.open(&Headers::of(headers)).await.unwrap()
    }

    async fn pair(client: &mut Connection, port: u16, id: &str) -> (Stream, Stream) {
        let port = port.to_string();
        let error = open(client, &[("streamType", "error"), ("port", &port), ("requestID", id)]).await;
        let data = open(client, &[("streamType", "data"), ("port", &port), ("requestID", id)]).await;
        (error, data)
    }

    async fn all_of(stream: &mut Stream) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = stream.incoming.receive().await {
            all.extend_from_slice(&bytes);
        }
        all
    }

    fn connects() -> Connect {
        Arc::new(|port| {
            Box::pin(async move {
                TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| format!("port {port}: {error}"))
            })
        })
    }

    #[tokio::test]
    async fn connections_go_side_by_side_and_one_that_fails_takes_none_along() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    // The port answers only when the client has finished: the end has to be passed
                    // on separately.
                    let mut text = Vec::new();
                    socket.read_to_end(&mut text).await.unwrap();
                    text.reverse();
                    socket.write_all(&text).await.unwrap();
                });
            }
        });
        let (mut client, server) = served(connects()).await;
        let (mut first_error, mut first) = pair(&mut client, port, "0").await;
        let (mut broken_error, mut broken) = pair(&mut client, 1, "1").await;
        let (mut second_error, mut second) = pair(&mut client, port, "2").await;
        assert!(String::from_utf8(all_of(&mut broken_error).await).unwrap().starts_with("port 1: "));
        assert!(all_of(&mut broken).await.is_empty());
        for (stream, text) in [(&mut second, "abc"), (&mut first, "0123456789")] {
            stream.outgoing.send(text.into()).await.unwrap();
            stream.outgoing.finish().await.unwrap();
            let reversed: String = text.chars().rev().collect();
            assert_eq!(all_of(stream).await, reversed.as_bytes());
        }
        assert!(all_of(&mut first_error).await.is_empty() && all_of(&mut second_error).await.is_empty());
        client.close().await;
        server.await.unwrap();
    }

    #[tokio::test]
    async fn clients_without_request_ids_are_paired_by_stream_ids() {
        let (mut client, _server) =
            served(Arc::new(|port| Box::pin(async move { Err(port.to_string()) }))).await;
        for port in ["7", "8"] {
            let mut error = open(&mut client, &[("streamType", "error"), ("port", port)]).await;
            let _data = open(&mut client, &[("streamType", "data"), ("port", port)]).await;
            assert_eq!(all_of(&mut error).await, port.as_bytes());
        }
    }

    #[tokio::test]
    async fn streams_that_make_no_sense_are_reset() {
        let (mut client, _server) =
            served(Arc::new(|_| Box::pin(async { Err("connected".to_owned()) }))).await;
        for headers in [
            &[][..],
            &[("streamType", "error")],
            &[("streamType", "stdin"), ("port", "80")],
            &[("streamType", "error"), ("port", "0")],
            &[("streamType", "error"), ("port", "65536")],
            &[("streamType", "error"), ("port", "+80")],
            &[("streamType", "error"), ("port", "")],
        ] {
            let mut stream = open(&mut client, headers).await;
            assert!(all_of(&mut stream).await.is_empty(), "{headers:?}");
        }
        // Two with the same role, and one for another port; the first keeps waiting.
        let id = ("requestID", "0");
        let mut error = open(&mut client, &[("streamType", "error"), ("port", "80"), id]).await;
        for headers in
            [&[("streamType", "error"), ("port", "80"), id], &[("streamType", "data"), ("port", "81"), id]]
        {
            assert!(all_of(&mut open(&mut client, headers).await).await.is_empty());
        }
        let _data = open(&mut client, &[("streamType", "data"), ("port", "80"), id]).await;
        assert_eq!(all_of(&mut error).await, b"connected");
    }

    #[tokio::test]
    async fn a_reset_ends_a_connection_whose_other_side_says_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mut client, _server) = served(connects()).await;
        let (mut error, data) = pair(&mut client, port, "0").await;
        let (mut silent, _) = listener.accept().await.unwrap();
        data.outgoing.reset(ResetStatus::Cancel).await;
        assert_eq!(silent.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(all_of(&mut error).await.is_empty());
    }

    /// Half a request is not a whole one.
    #[tokio::test]
    async fn a_port_hears_of_a_client_that_vanishes_by_a_reset_and_not_by_an_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for finishes in [false, true] {
            let (mut client, server) = served(connects()).await;
            let (_error, data) = pair(&mut client, port, "0").await;
            let (mut socket, _) = listener.accept().await.unwrap();
            data.outgoing.send(Bytes::from_static(b"half")).await.unwrap();
            let mut half = [0; 4];
            socket.read_exact(&mut half).await.unwrap();
            if finishes {
                data.outgoing.finish().await.unwrap();
                assert_eq!(socket.read(&mut [0]).await.unwrap(), 0);
            }
            drop((client, data));
            server.await.unwrap();
            if finishes {
                continue;
            }
            assert_eq!(socket.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
    }

    /// A client that ignores flow-control windows, as all CRI clients do.
    #[tokio::test]
    async fn a_port_that_reads_nothing_is_given_up_and_the_others_go_on() {
        let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (deaf_port, port) = (deaf.local_addr().unwrap().port(), echo.local_addr().unwrap().port());
        let (mut client, _server) = served(connects()).await;
        let (mut error, data) = pair(&mut client, deaf_port, "0").await;
        let (_deaf, _) = deaf.accept().await.unwrap();
        let (_other_error, mut other) = pair(&mut client, port, "1").await;
        let (mut socket, _) = echo.accept().await.unwrap();
        // More than the sockets, the queue and the wire hold.
        let overrun = tokio::spawn(async move {
            let piece = Bytes::from(vec![7; 64 * 1024]);
            for _ in 0..1024 {
                if data.outgoing.send(piece.clone()).await.is_err() {
                    return;
                }
            }
        });
        tokio::time::pause();
        let said = String::from_utf8(all_of(&mut error).await).unwrap();
        assert_eq!(said, unread(deaf_port));
        overrun.await.unwrap();
        tokio::time::resume();
        other.outgoing.send(Bytes::from_static(b"hello")).await.unwrap();
        other.outgoing.finish().await.unwrap();
        let mut text = Vec::new();
        socket.read_to_end(&mut text).await.unwrap();
        assert_eq!(text, b"hello");
        drop(socket);
        assert!(all_of(&mut other).await.is_empty());
    }

    #[tokio::test]
    async fn a_port_that_pauses_and_holds_up_no_other_gets_everything() {
        const PIECE: usize = 64 * 1024;
        const PIECES: usize = 512;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut client, _server) = served(connects()).await;
        let (mut error, data) = pair(&mut client, listener.local_addr().unwrap().port(), "0").await;
        let (mut socket, _) = listener.accept().await.unwrap();
        let upload = tokio::spawn(async move {
            for _ in 0..PIECES {
                data.outgoing.send(Bytes::from(vec![7; PIECE])).await.unwrap();
            }
            data.outgoing.finish().await.unwrap();
            data
        });
        tokio::time::pause();
        tokio::time::sleep(10 * STALL).await;
        tokio::time::resume();
        assert!(!upload.is_finished(), "it all fits into the sockets");
        let mut received = Vec::new();
        socket.read_to_end(&mut received).await.unwrap();
        assert_eq!(received.len(), PIECES * PIECE);
        drop(socket);
        drop(upload.await.unwrap());
        assert!(all_of(&mut error).await.is_empty());
    }

    /// A server that refuses a request before it has read all of it.
    #[tokio::test]
    async fn an_answer_arrives_although_the_request_cannot_be_written() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mut client, _server) = served(Arc::new(move |_| {
            Box::pin(async move {
                let mut socket = TcpStream::connect(address).await.unwrap();
                // All later writes fail.
                socket.shutdown().await.unwrap();
                Ok(socket)
            })
        }))
        .await;
        let (mut error, mut data) = pair(&mut client, 80, "0").await;
        let (mut socket, _) = listener.accept().await.unwrap();
        data.outgoing.send(Bytes::from_static(b"request")).await.unwrap();
        // The server has had turns to write it, and has not given the connection up.
        for _ in 0..10 {
            assert!(all_of(&mut open(&mut client, &[]).await).await.is_empty());
        }
        socket.write_all(b"answer").await.unwrap();
        drop(socket);
        assert_eq!(all_of(&mut data).await, b"answer");
        assert!(String::from_utf8(all_of(&mut error).await).unwrap().starts_with("forward port 80: "));
    }

    #[tokio::test]
    async fn streams_that_were_reset_count_for_as_long_as_they_are_held() {
        let (mut client, _server) = served(Arc::new(|_| Box::pin(async { Err(String::new()) }))).await;
        // Halves of pairs, which wait for the others.
        let mut halves = Vec::new();
        for number in 1..MAX_STREAMS {
            let id = number.to_string();
            halves.push(
                open(&mut client, &[("streamType", "error"), ("port", "80"), ("requestID", &id)]).await,
            );
        }
        // Once the server has answered what follows, it has seen all of them.
        assert!(all_of(&mut open(&mut client, &[]).await).await.is_empty());
        for half in halves {
            half.outgoing.reset(ResetStatus::Cancel).await;
        }
        let error = |id| [("streamType", "error"), ("port", "80"), ("requestID", id)];
        let _last = open(&mut client, &error("last")).await;
        let mut refused = open(&mut client, &error("beyond")).await;
        let soon = tokio::time::timeout(STREAMS_WITHIN / 2, refused.incoming.receive()).await;
        assert_eq!(soon, Ok(None));
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_pair_is_given_up() {
        let (mut client, _server) = served(Arc::new(|_| Box::pin(async { Err(String::new()) }))).await;
        let start = Instant::now();
        let mut error =
            open(&mut client, &[("streamType", "error"), ("port", "80"), ("requestID", "x")]).await;
        assert!(String::from_utf8(all_of(&mut error).await).unwrap().contains("no data stream"));
        assert!(start.elapsed() >= STREAMS_WITHIN);
    }
}
