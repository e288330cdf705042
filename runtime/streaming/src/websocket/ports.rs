//! Port forwarding on the channels of a WebSocket: `v4.channel.k8s.io` and
//! `v4.base64.channel.k8s.io`.
//!
//! The ports are those of the CRI's request, or of the query (`?port=80,81` or `?ports=80`) when
//! that names none. Each has one connection, which is made at once, and two channels: 2n for data
//! and 2n + 1 for the error. The server begins both with the port, two bytes with the lower one
//! first. There is no way to end one direction, but a client that closes the WebSocket has sent
//! everything. The WebSocket is closed when all connections have ended.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{Channel, Link, Protocol, Said, accepted, begin, decode, next};
use crate::budget::{Budget, End, QUEUE, Receiver, Sender};
use crate::command::Version;
use crate::forward::{self, Connect, PortSide};
use crate::hangup::{self, Hangup};
use crate::spdy::connection::Closed;
use crate::{IDLE, LINGER, STALL};

/// The most ports of one WebSocket: in base64 a channel is one character.
pub(crate) const MAX_PORTS: usize = 32;

/// Bytes read at a time from a forwarded connection.
const READ_BYTES: usize = 32 * 1024;

/// The ports that a query names; `None` when it names none, too many, or an invalid one.
pub(crate) fn ports_of_query(query: &str) -> Option<Vec<u16>> {
    let values =
        query.split('&').filter_map(|pair| pair.strip_prefix("port=").or(pair.strip_prefix("ports=")));
    let ports: Option<Vec<u16>> = values
        .flat_map(|value| value.split(',').flat_map(|value| value.split("%2C")))
        .map(|port| {
            // `parse` would accept "+80" as a number.
            let port: u16 = port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse().ok())??;
            (port != 0).then_some(port)
        })
        .collect();
    ports.filter(|ports| (1..=MAX_PORTS).contains(&ports.len()))
}

/// Where data for a port goes.
#[derive(Debug)]
struct Input {
    /// `None` when it is discarded.
    queue: Option<Sender>,
    /// It is not read, and holds up the others.
    unread: Arc<Notify>,
}

/// Forwards these ports, [`MAX_PORTS`] at most, until all connections have ended or the client goes
/// away.
pub(crate) async fn forward<T>(io: T, hangup: Option<Hangup>, base64: bool, ports: Vec<u16>, connect: Connect)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let link = Arc::new(Link::default());
    let (messages, mut writer, mut stream) = begin(accepted(io).await, link.clone());
    let (budget, mut inputs, mut forwards) = (Budget::default(), Vec::new(), JoinSet::new());
    for (port, number) in ports.into_iter().zip((0_u8..).step_by(2)) {
        let (queue, input) = budget.queue();
        let unread = Arc::new(Notify::new());
        inputs.push(Input { queue: Some(queue), unread: unread.clone() });
        let channel = |number| Channel { messages: messages.clone(), number, base64 };
        let (data, error) = (channel(number), channel(number + 1));
        let connect = connect.clone();
        forwards.spawn(async move {
            let ended = tokio::select! {
                ended = one(port, &connect, input, &data, &error) => ended,
                () = unread.notified() => Err(forward::unread(port)),
            };
            if let Err(text) = ended {
                tracing::debug!(port, error = text, "a forwarded connection failed");
                // A failure to send it does not matter.
                let _ = error.send(text.as_bytes()).await;
            }
        });
    }
    drop(messages);
    let reading = async {
        let protocol = Protocol { version: Version::V4, base64 };
        let mut has_closed = false;
        while let Some(message) = next(&mut stream, &link).await {
            has_closed = has_closed || matches!(message, Message::Close(_));
            let Ok(said) = decode(protocol, message) else {
                link.blame(CloseCode::Invalid);
                return false;
            };
            if !deliver(said, &mut inputs, hangup.as_ref()).await {
                return false;
            }
        }
        if has_closed {
            for queue in inputs.iter().filter_map(|input| input.queue.as_ref()) {
                queue.end(End::Finished);
            }
        }
        inputs.clear();
        has_closed
    };
    let mut reading = Box::pin(reading);
    let said = async {
        while forwards.join_next().await.is_some() {}
        // The writer sends Close after the rest, which the client may read as slowly as all before.
        tokio::time::timeout(IDLE, &mut writer).await.is_ok()
    };
    let (said, has_closed) = tokio::select! {
        has_closed = &mut reading => (false, has_closed),
        said = said => (said, false),
    };
    if said {
        // The client answers the Close.
        let _ = tokio::time::timeout(LINGER, reading).await;
        return;
    }
    drop(reading);
    if has_closed {
        // What it has sent before is passed on.
        let _ = tokio::time::timeout(LINGER, async { while forwards.join_next().await.is_some() {} }).await;
        return writer.abort();
    }
    // The writer sends Close when nobody else can send.
    forwards.shutdown().await;
    match tokio::time::timeout(LINGER, &mut writer).await {
        Ok(Ok(sink)) => link.see_off(sink, stream).await,
        _ => writer.abort(),
    }
}

/// Passes on a client's message; `false` when the client is gone.
async fn deliver(said: Said, inputs: &mut [Input], hangup: Option<&Hangup>) -> bool {
    match said {
        Said::Data { channel, bytes } if channel.is_multiple_of(2) => {
            tokio::select! {
                biased;
                () = pass_on(usize::from(channel / 2), bytes, inputs) => true,
                () = hangup::of(hangup) => false,
            }
        }
        // Input on an error channel is ignored.
        _ => true,
    }
}

/// Waits for the reader of the input, within [`STALL`].
async fn pass_on(to: usize, bytes: Bytes, inputs: &mut [Input]) {
    // A connection that has ended reads no more: its further input is discarded.
    while let Some(queue) = inputs.get(to).and_then(|input| input.queue.as_ref()) {
        if tokio::time::timeout(STALL, queue.send(&bytes)).await.is_ok() {
            return;
        }
        let is_read = |input: &&Input| input.queue.as_ref().is_some_and(|queue| !queue.is_closed());
        if inputs.iter().filter(is_read).count() == 1 {
            // It holds up no other.
            continue;
        }
        let is_full = queue.waiting() == QUEUE;
        let waiting = |input: &Input| input.queue.as_ref().map_or(0, Sender::waiting);
        // An active reader has emptied its queue meanwhile.
        let most = if is_full { inputs.get_mut(to) } else { inputs.iter_mut().max_by_key(|it| waiting(it)) };
        if let Some(input) = most {
            input.queue = None;
            input.unread.notify_one();
        }
    }
}

/// One connection, to its end.
async fn one(
    port: u16,
    connect: &Connect,
    input: Receiver,
    data: &Channel,
    error: &Channel,
) -> Result<(), String> {
    let named = port.to_le_bytes();
    if data.send(&named).await.is_err() || error.send(&named).await.is_err() {
        return Ok(());
    }
    let mut side = PortSide::from(connect(port).await?);
    let (from, to, over) = side.split();
    // The client cannot say that it has finished, so the end of the other direction ends the
    // connection. A port that reads no more may still have answered.
    let mut downloading = pin!(download(from, data, over));
    let ended = tokio::select! {
        failed = upload(input, to, over) => downloading.await.and(failed),
        ended = &mut downloading => ended,
    };
    ended.map_err(|failed| format!("forward port {port}: {failed}"))
}

/// From the client to the port; resolves only when that fails.
async fn upload(mut from: Receiver, mut to: WriteHalf<'_>, over: &AtomicBool) -> io::Result<()> {
    while let Some(bytes) = from.receive().await {
        to.write_all(&bytes).await?;
    }
    if from.end() == End::Finished {
        over.store(true, Ordering::Relaxed);
        // The other side may have closed it already.
        let _ = to.shutdown().await;
    }
    std::future::pending().await
}

/// From the port to the client.
async fn download(from: ReadHalf<'_>, to: &Channel, over: &AtomicBool) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        match from.try_read_buf(&mut buffer) {
            Ok(0) => {
                over.store(true, Ordering::Relaxed);
                return Ok(());
            }
            Ok(_) => to.send(&buffer).await.map_err(|Closed| io::Error::from(io::ErrorKind::BrokenPipe))?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::{SinkExt, StreamExt};
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

    use super::*;

    fn connects() -> Connect {
        Arc::new(|port| {
            Box::pin(async move {
                TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| format!("port {port}: {error}"))
            })
        })
    }

    async fn served(
        base64: bool,
        ports: Vec<u16>,
    ) -> (WebSocketStream<DuplexStream>, tokio::task::JoinHandle<()>) {
        let (near, far) = duplex(64 * 1024);
        let server = tokio::spawn(forward(far, None, base64, ports, connects()));
        (WebSocketStream::from_raw_socket(near, Role::Client, None).await, server)
    }

    /// A port whose connections answer with what was sent, up to a newline, and end then.
    async fn answers() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut text = Vec::new();
                    while !text.ends_with(b"\n") && socket.read_buf(&mut text).await.unwrap() > 0 {}
                    socket.write_all(&text).await.unwrap();
                });
            }
        });
        port
    }

    #[test]
    fn a_query_names_ports_or_is_refused() {
        for (query, ports) in [
            ("port=80", Some(vec![80])),
            ("port=80,81&x=y&port=82", Some(vec![80, 81, 82])),
            ("ports=80%2C443", Some(vec![80, 443])),
            ("", None),
            ("port=", None),
            ("port=0", None),
            ("port=+80", None),
            ("port=80,", None),
            ("port=65536", None),
            ("port=80&port=http", None),
        ] {
            assert_eq!(ports_of_query(query), ports, "{query}");
        }
        let many = vec!["1"; MAX_PORTS + 1].join(",");
        assert_eq!(ports_of_query(&format!("port={many}")), None);
    }

    #[tokio::test]
    async fn each_port_has_two_channels_that_begin_with_it() {
        for base64 in [false, true] {
            let (good, bad) = (answers().await, 1);
            let (mut client, server) = served(base64, vec![bad, good]).await;
            let said = super::super::encode(2, base64, b"hello\n");
            client.send(said).await.unwrap();
            let mut heard = vec![Vec::new(); 4];
            let protocol = Protocol { version: Version::V4, base64 };
            while let Some(Ok(message)) = client.next().await {
                if let Ok(Said::Data { channel, bytes }) = decode(protocol, message) {
                    heard[usize::from(channel)].extend_from_slice(&bytes);
                }
            }
            assert_eq!((&heard[0], &heard[3]), (&bad.to_le_bytes().to_vec(), &good.to_le_bytes().to_vec()));
            assert_eq!(heard[2], [&good.to_le_bytes()[..], b"hello\n"].concat());
            assert!(heard[1].starts_with(&[&bad.to_le_bytes()[..], b"port 1: "].concat()), "{heard:?}");
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_client_that_pauses_at_the_end_gets_everything() {
        // The writer's queue holds this, but the client's side of the connection does not.
        const LENGTH: usize = 300_000;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut client, server) = served(false, vec![listener.local_addr().unwrap().port()]).await;
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.write_all(&vec![b'x'; LENGTH]).await.unwrap();
        socket.shutdown().await.unwrap();
        assert_eq!(socket.read(&mut [0]).await.unwrap(), 0, "it has been read to its end");
        tokio::time::pause();
        tokio::time::sleep(10 * LINGER).await;
        let mut length = 0;
        while let Some(Ok(message)) = client.next().await {
            if let Message::Binary(bytes) = message
                && bytes[0] == 0
            {
                length += bytes.len() - 1;
            }
        }
        assert_eq!(length, 2 + LENGTH);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_goes_away_or_says_nonsense_ends_its_connections() {
        for nonsense in [None, Some(Message::text("!")), Some(Message::text("0a"))] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (mut client, server) = served(true, vec![listener.local_addr().unwrap().port()]).await;
            let (mut silent, _) = listener.accept().await.unwrap();
            match nonsense {
                Some(message) => {
                    client.send(message).await.unwrap();
                    let said = client.by_ref().filter_map(async |message| message.ok());
                    let close = said.collect::<Vec<_>>().await.pop();
                    let invalid = CloseFrame { code: CloseCode::Invalid, reason: "".into() };
                    assert_eq!(close, Some(Message::Close(Some(invalid))));
                }
                None => {
                    drop(client);
                    assert_eq!(
                        silent.read(&mut [0]).await.unwrap_err().kind(),
                        io::ErrorKind::ConnectionReset
                    );
                    server.await.unwrap();
                    continue;
                }
            }
            assert_eq!(silent.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            drop(client);
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_sent_before_a_goodbye_is_passed_on_and_then_its_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut client, server) = served(false, vec![listener.local_addr().unwrap().port()]).await;
        let (mut socket, _) = listener.accept().await.unwrap();
        client.send(Message::binary(vec![0, b'x'])).await.unwrap();
        client.close(None).await.unwrap();
        let mut text = Vec::new();
        socket.read_to_end(&mut text).await.unwrap();
        assert_eq!(text, b"x");
        drop(socket);
        while client.next().await.is_some_and(|message| message.is_ok()) {}
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_port_that_reads_nothing_is_given_up_and_the_others_go_on() {
        let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let deaf_port = deaf.local_addr().unwrap().port();
        let (client, _server) = served(false, vec![deaf_port, answers().await]).await;
        let (_deaf, _) = deaf.accept().await.unwrap();
        let (mut to, mut from) = client.split();
        // More than the sockets, the queue and the wire hold; then something for the other port.
        let overrun = tokio::spawn(async move {
            for _ in 0..1024 {
                to.send(Message::binary(vec![0; 64 * 1024])).await.unwrap();
            }
            to.send(Message::binary(vec![2, b'y', b'\n'])).await.unwrap();
            to
        });
        tokio::time::pause();
        let (mut said, mut answer) = (Vec::new(), Vec::new());
        while answer.len() < 4 {
            if let Message::Binary(bytes) = from.next().await.unwrap().unwrap() {
                match bytes[0] {
                    1 => said.extend_from_slice(&bytes[1..]),
                    2 => answer.extend_from_slice(&bytes[1..]),
                    _ => {}
                }
            }
        }
        assert_eq!(&said[2..], forward::unread(deaf_port).as_bytes());
        assert_eq!(&answer[2..], b"y\n");
        drop(overrun.await.unwrap());
    }

    #[tokio::test]
    async fn a_port_that_pauses_and_holds_up_no_other_gets_everything() {
        const PIECE: usize = 64 * 1024;
        const PIECES: usize = 512;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ended = answers().await;
        let (mut client, _server) = served(false, vec![listener.local_addr().unwrap().port(), ended]).await;
        let (mut socket, _) = listener.accept().await.unwrap();
        // One that has ended counts no more.
        client.send(Message::binary(vec![2, b'y', b'\n'])).await.unwrap();
        let (mut to, mut from) = client.split();
        let mut answer = 0;
        while answer < 4 {
            match from.next().await.unwrap().unwrap() {
                Message::Binary(bytes) if bytes[0] == 2 => answer += bytes.len() - 1,
                _ => {}
            }
        }
        let upload = tokio::spawn(async move {
            for _ in 0..PIECES {
                to.send(Message::binary([&[0][..], &[7; PIECE]].concat())).await.unwrap();
            }
            to
        });
        tokio::time::pause();
        tokio::time::sleep(10 * STALL).await;
        tokio::time::resume();
        assert!(!upload.is_finished(), "it all fits into the sockets");
        let mut received = vec![0; PIECES * PIECE];
        socket.read_exact(&mut received).await.unwrap();
        drop(upload.await.unwrap());
    }

    #[tokio::test]
    async fn channels_that_are_not_there_are_ignored() {
        let (mut client, server) = served(false, vec![answers().await]).await;
        for message in [vec![], vec![1, b'x'], vec![2, b'x'], vec![255, 0], vec![0, b'y', b'\n']] {
            client.send(Message::Binary(Bytes::from(message))).await.unwrap();
        }
        let mut data = Vec::new();
        while let Some(Ok(message)) = client.next().await {
            if let Message::Binary(bytes) = message
                && bytes[0] == 0
            {
                data.extend_from_slice(&bytes[1..]);
            }
        }
        assert_eq!(&data[2..], b"y\n");
        server.await.unwrap();
    }
}
