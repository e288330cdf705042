//! Commands over WebSocket (RFC 6455), and the tunnel that carries SPDY over it.
//!
//! A message is one byte for the channel and a payload: 0 standard input, 1 standard output, 2 standard
//! error, 3 the status, 4 sizes of the terminal. The base64 variants have the channel as a digit and the
//! payload in base64, in text messages. `v5` adds a message of two bytes, 255 and a channel: the sender has
//! no more for that channel.
//!
//! The server begins with an empty message on the lowest channel that it writes, as Kubernetes' own server
//! does to say that it is ready.

use crate::command::{Outcome, Output, Run, Session, Size, Sizes, Version, Wanted, status};
use crate::hangup::{self, Hangup};
use crate::spdy::connection::Closed;
use crate::{IDLE, LINGER};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

/// The longest message and frame of a client, in bytes. Those of the CRI's clients have at most 32 KiB of
/// payload.
pub(crate) const MAX_MESSAGE_BYTES: usize = 1024 * 1024;

/// Messages that wait to be sent.
const QUEUE: usize = 16;

/// Pieces of standard input that wait for the command.
const INPUT_QUEUE: usize = 16;

/// How often the client of a tunnel is pinged: load balancers drop what is silent.
const PING: Duration = Duration::from_secs(10);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// A sub-protocol for commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Protocol {
    version: Version,
    base64: bool,
}

/// The sub-protocols, by name. The empty name is that of a client that names none.
pub(crate) const FOR_COMMANDS: [(&str, Protocol); 6] = [
    ("v5.channel.k8s.io", Protocol { version: Version::V5, base64: false }),
    ("v4.channel.k8s.io", Protocol { version: Version::V4, base64: false }),
    ("v4.base64.channel.k8s.io", Protocol { version: Version::V4, base64: true }),
    ("channel.k8s.io", Protocol { version: Version::V1, base64: false }),
    ("base64.channel.k8s.io", Protocol { version: Version::V1, base64: true }),
    ("", Protocol { version: Version::V1, base64: false }),
];

/// The sub-protocol for port forwarding.
pub(crate) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES))
        .max_write_buffer_size(2 * MAX_MESSAGE_BYTES)
}

/// One channel on its way to the client.
#[derive(Debug)]
pub(crate) struct Channel {
    messages: mpsc::Sender<Message>,
    number: u8,
    base64: bool,
}

impl Channel {
    pub(crate) async fn send(&self, bytes: &[u8]) -> Result<(), Closed> {
        self.messages.send(encode(self.number, self.base64, bytes)).await.map_err(|_| Closed)
    }
}

fn encode(channel: u8, base64: bool, bytes: &[u8]) -> Message {
    if base64 {
        Message::text(format!("{channel}{}", STANDARD.encode(bytes)))
    } else {
        Message::binary([&[channel], bytes].concat())
    }
}

/// What a client said.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Data {
        channel: u8,
        bytes: Bytes,
    },
    /// There is no more for this channel.
    End {
        channel: u8,
    },
    /// Pings and the like, which are answered below.
    Nothing,
}

/// The message is not one of the sub-protocol.
#[derive(Debug, PartialEq, Eq)]
struct Malformed;

fn decode(protocol: Protocol, message: Message) -> Result<Said, Malformed> {
    let payload = match message {
        Message::Binary(bytes) => bytes,
        Message::Text(text) => Bytes::from(text),
        _ => return Ok(Said::Nothing),
    };
    let Some((first, rest)) = payload.split_first() else { return Ok(Said::Nothing) };
    if protocol.base64 {
        let channel = first.checked_sub(b'0').filter(|channel| *channel <= 9).ok_or(Malformed)?;
        let bytes = STANDARD.decode(rest).map_err(|_| Malformed)?.into();
        return Ok(Said::Data { channel, bytes });
    }
    match (*first, rest) {
        (CLOSE, [channel]) if protocol.version >= Version::V5 => Ok(Said::End { channel: *channel }),
        (channel, _) => Ok(Said::Data { channel, bytes: payload.slice(1..) }),
    }
}

/// Reads what the client sends, until it goes away or says what cannot be.
struct Reader {
    protocol: Protocol,
    stdin: Option<mpsc::Sender<Bytes>>,
    sizes: Option<watch::Sender<Option<Size>>>,
    parsed: Sizes,
    hangup: Option<Hangup>,
}

impl Reader {
    async fn run<S, E>(mut self, mut messages: S)
    where
        S: StreamExt<Item = Result<Message, E>> + Unpin,
    {
        while let Ok(Some(Ok(message))) = tokio::time::timeout(IDLE, messages.next()).await {
            let Ok(said) = decode(self.protocol, message) else { return };
            match said {
                Said::Data { channel: STDIN, bytes } if !bytes.is_empty() => {
                    let Some(stdin) = &self.stdin else { continue };
                    tokio::select! {
                        biased;
                        // Nobody reads it any more: it is thrown away.
                        _ = stdin.send(bytes) => {}
                        () = hangup::of(self.hangup.as_ref()) => return,
                    }
                }
                Said::Data { channel: RESIZE, bytes } => {
                    if let Some(sizes) = &self.sizes {
                        match self.parsed.push(&bytes) {
                            Ok(Some(size)) => drop(sizes.send_replace(Some(size))),
                            Ok(None) => {}
                            Err(_) => return,
                        }
                    }
                }
                Said::End { channel: STDIN } => self.stdin = None,
                Said::Data { .. } | Said::End { .. } | Said::Nothing => {}
            }
        }
    }
}

/// Serves one command over a WebSocket whose handshake is done.
pub(crate) async fn command<T>(io: T, hangup: Option<Hangup>, wanted: Wanted, protocol: Protocol, run: Run)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config())).await;
    let (mut sink, stream) = socket.split();
    let (messages, mut waiting) = mpsc::channel(QUEUE);
    let writer = tokio::spawn(async move {
        while let Some(message) = waiting.recv().await {
            let sent = if waiting.is_empty() { sink.send(message).await } else { sink.feed(message).await };
            if sent.is_err() {
                return;
            }
        }
        let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        // The client may be gone.
        let _ = sink.send(Message::Close(Some(normal))).await;
    });
    let channel = |number| Channel { messages: messages.clone(), number, base64: protocol.base64 };
    let (stdin, input) = mpsc::channel(INPUT_QUEUE);
    let (sizes, size) = watch::channel(None);
    let reader = Reader {
        protocol,
        stdin: wanted.stdin.then_some(stdin),
        sizes: wanted.terminal.then_some(sizes),
        parsed: Sizes::default(),
        hangup,
    };
    let mut reader = tokio::spawn(reader.run(stream));
    let session = Session {
        stdin: wanted.stdin.then(|| crate::command::Input::new(input)),
        stdout: wanted.stdout.then(|| Output::over_websocket(channel(STDOUT))),
        stderr: wanted.stderr.then(|| Output::over_websocket(channel(STDERR))),
        size: wanted.terminal.then_some(size),
    };
    let lowest = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    let served = async {
        channel(lowest).send(&[]).await.ok()?;
        Some(run(session).await)
    };
    let outcome: Option<Outcome> = tokio::select! {
        outcome = served => outcome,
        _ = &mut reader => None,
    };
    if let Some(status) = outcome.as_ref().and_then(|outcome| status(protocol.version, outcome)) {
        let error = channel(ERROR);
        let _ = tokio::time::timeout(LINGER, error.send(&status)).await;
    }
    // The writer says goodbye when nothing is to be sent any more, and the client answers that.
    drop(messages);
    let abort = writer.abort_handle();
    let goodbye = async {
        let _ = writer.await;
        if outcome.is_some() {
            let _ = (&mut reader).await;
        }
    };
    let _ = tokio::time::timeout(LINGER, goodbye).await;
    abort.abort();
    reader.abort();
}

/// Carries the bytes of `inner` in binary messages, until either side ends.
pub(crate) async fn tunnel<T>(io: T, inner: DuplexStream)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config())).await;
    let (mut sink, mut stream) = socket.split();
    let (mut from, mut to) = tokio::io::split(inner);
    let incoming = async {
        while let Some(Ok(message)) = stream.next().await {
            if let Message::Binary(bytes) = message
                && to.write_all(&bytes).await.is_err()
            {
                return;
            }
        }
    };
    let outgoing = async {
        let mut buffer = vec![0; 32 * 1024];
        let mut pings = tokio::time::interval(PING);
        loop {
            let sent = tokio::select! {
                read = from.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => {
                        let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
                        let _ = sink.send(Message::Close(Some(normal))).await;
                        return;
                    }
                    Ok(length) => {
                        let bytes = Bytes::copy_from_slice(buffer.get(..length).unwrap_or_default());
                        sink.send(Message::Binary(bytes)).await
                    }
                },
                _ = pings.tick() => sink.send(Message::Ping(Bytes::new())).await,
            };
            if sent.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = incoming => {}
        () = outgoing => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::duplex;

    fn protocol(name: &str) -> Protocol {
        FOR_COMMANDS.iter().find(|(found, _)| *found == name).unwrap().1
    }

    #[test]
    fn messages_are_channels_and_payloads() {
        let (v4, v5, base64) =
            (protocol("v4.channel.k8s.io"), protocol("v5.channel.k8s.io"), protocol("base64.channel.k8s.io"));
        let data =
            |channel, bytes: &'static [u8]| Ok(Said::Data { channel, bytes: Bytes::from_static(bytes) });
        for (protocol, message, expected) in [
            (v5, Message::binary(vec![255, 0]), Ok(Said::End { channel: 0 })),
            (v4, Message::binary(vec![255, 0]), data(255, &[0])),
            (v5, Message::binary(vec![255, 0, 1]), data(255, &[0, 1])),
            (v5, Message::binary(vec![0, b'a']), data(0, b"a")),
            (v5, Message::binary(vec![0]), data(0, b"")),
            (v5, Message::binary(vec![]), Ok(Said::Nothing)),
            (v4, Message::text("\0hello"), data(0, b"hello")),
            (base64, Message::text("0aGVsbG8="), data(0, b"hello")),
            (base64, Message::text("4"), data(4, b"")),
            (base64, Message::text("0a"), Err(Malformed)),
            (base64, Message::text(":aGVsbG8="), Err(Malformed)),
            (base64, Message::text("/aGVsbG8="), Err(Malformed)),
            (v5, Message::Ping(Bytes::new()), Ok(Said::Nothing)),
        ] {
            assert_eq!(decode(protocol, message.clone()), expected, "{message:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            bytes in prop::collection::vec(any::<u8>(), 0..300), channel in 0..5u8)
        {
            for (_, protocol) in FOR_COMMANDS {
                let message = encode(channel, protocol.base64, &bytes);
                let expected = Said::Data { channel, bytes: bytes.clone().into() };
                prop_assert_eq!(decode(protocol, message), Ok(expected));
            }
        }

        #[test]
        fn any_bytes_of_a_client_end_in_time(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (mut near, far) = duplex(64 * 1024);
                let run: Run = Box::new(|mut session| Box::pin(async move {
                    while session.stdin.as_mut().unwrap().receive().await.is_some() {}
                    Outcome::Exited(0)
                }));
                let wanted = Wanted { stdin: true, ..Wanted::default() };
                let server = tokio::spawn(command(far, None, wanted, protocol("v5.channel.k8s.io"), run));
                near.write_all(&bytes).await.unwrap();
                near.shutdown().await.unwrap();
                let mut answer = Vec::new();
                near.read_to_end(&mut answer).await.unwrap();
                server.await.unwrap();
            });
        }
    }

    async fn client(io: DuplexStream) -> WebSocketStream<DuplexStream> {
        WebSocketStream::from_raw_socket(io, Role::Client, None).await
    }

    #[tokio::test]
    async fn a_command_ends_with_its_status_and_a_normal_close() {
        let (near, far) = duplex(64 * 1024);
        let run: Run = Box::new(|mut session| {
            Box::pin(async move {
                let mut stdin = session.stdin.take().unwrap();
                let mut length = 0;
                while let Some(bytes) = stdin.receive().await {
                    length += bytes.len();
                }
                let size = session.size.unwrap().borrow().unwrap();
                let text = format!("{length} {}x{}", size.width, size.height);
                session.stdout.unwrap().send(text.into()).await.unwrap();
                Outcome::Exited(0)
            })
        });
        let wanted = Wanted { stdin: true, stdout: true, stderr: false, terminal: true };
        let server = tokio::spawn(command(far, None, wanted, protocol("v5.channel.k8s.io"), run));
        let mut client = client(near).await;
        let size = [&[RESIZE], br#"{"Width":80,"Height":24}"#.as_slice()].concat();
        for message in [vec![STDIN, b'a', b'b'], size, vec![STDIN, b'c'], vec![CLOSE, STDIN]] {
            client.send(Message::binary(message)).await.unwrap();
        }
        let mut seen = Vec::new();
        while let Some(Ok(message)) = client.next().await {
            seen.push(message);
        }
        let success = status(Version::V5, &Outcome::Exited(0)).unwrap();
        let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        assert_eq!(
            seen,
            [
                Message::binary(vec![STDOUT]),
                Message::binary([&[STDOUT], b"3 80x24".as_slice()].concat()),
                Message::binary([&[ERROR], success.as_ref()].concat()),
                Message::Close(Some(normal)),
            ]
        );
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_ends_the_connection() {
        let (near, far) = duplex(64 * 1024);
        let run: Run = Box::new(|_| Box::pin(std::future::pending()));
        let wanted = Wanted { stdin: true, ..Wanted::default() };
        let server = tokio::spawn(command(far, None, wanted, protocol("v5.channel.k8s.io"), run));
        let mut client = client(near).await;
        let long = Message::binary(vec![STDIN; MAX_MESSAGE_BYTES + 1]);
        let _ = client.send(long).await;
        server.await.unwrap();
    }
}
