//! WebSocket (RFC 6455): messages on channels, and what goes over them.
//!
//! - `command`: exec and attach;
//! - `ports`: port forwarding without SPDY;
//! - `tunnel`: SPDY in binary messages, for port forwarding.
//!
//! A message is one byte for the channel and a payload. The base64 variants have the channel as a
//! digit and the payload in base64, in text messages. `v5` adds a message of two bytes, 255 and a
//! channel: the sender has no more for that channel.
//!
//! The code of the server's Close says why it ends: 1000 when everything was sent, 1002, 1003, 1007
//! or 1009 for what a client may not send, 1008 for a connection that was idle for too long.

mod command;
mod ports;
mod tunnel;

use std::sync::{Arc, OnceLock};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::LINGER;
use crate::activity::Activity;
use crate::command::Version;
use crate::spdy::connection::Closed;

pub(crate) use command::command;
pub(crate) use ports::{MAX_PORTS, forward, ports_of_query};
pub(crate) use tunnel::tunnel;

/// The longest message and frame of a client, in bytes. Those of the CRI's clients have at most 32
/// KiB of payload.
pub(crate) const MAX_MESSAGE_BYTES: usize = 128 * 1024;

/// Room for reading that each connection keeps. Longer messages take more while they come.
const READ_BYTES: usize = 4 * 1024;

/// Bytes that are collected before a write.
const WRITE_BYTES: usize = 16 * 1024;

/// Messages that wait to be sent.
const QUEUE: usize = 16;

/// The marker of a message that ends a channel.
const CLOSE: u8 = 255;

/// A sub-protocol of channels.
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

/// The sub-protocols for port forwarding on channels, by name, and whether they are in base64.
pub(crate) const FOR_PORTS: [(&str, bool); 3] =
    [("v4.channel.k8s.io", false), ("v4.base64.channel.k8s.io", true), ("", false)];

/// The sub-protocol for port forwarding over SPDY.
pub(crate) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES))
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(WRITE_BYTES)
        .max_write_buffer_size(WRITE_BYTES + 2 * MAX_MESSAGE_BYTES)
}

/// What both halves of a connection know of it.
#[derive(Debug, Default)]
struct Link {
    activity: Activity,
    /// What ended it, if that was not a normal end.
    fault: OnceLock<CloseCode>,
}

impl Link {
    /// Records why the connection is ended; the first reason counts.
    fn blame(&self, code: CloseCode) {
        let _ = self.fault.set(code);
    }

    fn close(&self) -> Message {
        let code = self.fault.get().copied().unwrap_or(CloseCode::Normal);
        Message::Close(Some(CloseFrame { code, reason: "".into() }))
    }

    /// The message, unless reading it has failed.
    fn message(&self, read: Result<Message, Error>) -> Option<Message> {
        read.inspect_err(|error| match error {
            Error::Protocol(_) => self.blame(CloseCode::Protocol),
            Error::Capacity(_) => self.blame(CloseCode::Size),
            Error::Utf8(_) => self.blame(CloseCode::Invalid),
            // The client is gone.
            _ => {}
        })
        .ok()
    }

    /// To be called when Close has been sent. Where the client is to blame, reads on until it
    /// closes too: to close a socket with unread data resets the connection, and the reset can
    /// overtake the Close.
    async fn see_off<T>(&self, sink: Sink<T>, stream: SplitStream<WebSocketStream<T>>)
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        if self.fault.get().is_none() {
            return;
        }
        let Ok(whole) = stream.reunite(sink) else { return };
        let mut io = whole.into_inner();
        let discarding = async {
            // It may be gone.
            let _ = io.shutdown().await;
            let mut bytes = vec![0; READ_BYTES];
            while io.read(&mut bytes).await.is_ok_and(|length| length > 0) {}
        };
        let _ = tokio::time::timeout(LINGER, discarding).await;
    }
}

/// The sending half.
type Sink<T> = SplitSink<WebSocketStream<T>, Message>;

/// The sending half of a server of channels, in a task: everything that is sent, then Close when no
/// sender is left. The other half is for reading.
fn begin<T>(
    io: WebSocketStream<T>,
    link: Arc<Link>,
) -> (Sender, JoinHandle<Sink<T>>, SplitStream<WebSocketStream<T>>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sink, stream) = io.split();
    let (messages, mut waiting) = mpsc::channel(QUEUE);
    let writer = tokio::spawn(async move {
        while let Some(message) = waiting.recv().await {
            let sent = if waiting.is_empty() { sink.send(message).await } else { sink.feed(message).await };
            if sent.is_err() {
                return sink;
            }
            link.activity.note();
        }
        // The client may be gone.
        let _ = sink.send(link.close()).await;
        sink
    });
    (messages, writer, stream)
}

/// A WebSocket whose handshake is done.
async fn accepted<T>(io: T) -> WebSocketStream<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config())).await
}

/// Messages on their way to the client.
type Sender = mpsc::Sender<Message>;

/// One channel on its way to the client.
#[derive(Debug)]
pub(crate) struct Channel {
    messages: Sender,
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
        Message::text(format!("{}{}", char::from(channel.saturating_add(b'0')), STANDARD.encode(bytes)))
    } else {
        Message::binary([&[channel], bytes].concat())
    }
}

/// A message from a client.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Data {
        channel: u8,
        bytes: Bytes,
    },
    /// This channel has ended.
    End {
        channel: u8,
    },
    /// Pings and the like, which are answered below.
    Nothing,
}

/// The next message of a client; `None` when it is gone, the connection is idle for too long, or
/// what comes is no message.
async fn next<T>(stream: &mut SplitStream<WebSocketStream<T>>, link: &Link) -> Option<Message>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    tokio::select! {
        message = stream.next() => {
            link.activity.note();
            link.message(message?)
        }
        () = link.activity.ends(crate::IDLE) => {
            link.blame(CloseCode::Policy);
            None
        }
    }
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
        // Kubernetes continues with the characters after the digits.
        let channel = first.checked_sub(b'0').ok_or(Malformed)?;
        let bytes = STANDARD.decode(rest).map_err(|_| Malformed)?.into();
        return Ok(Said::Data { channel, bytes });
    }
    match (*first, rest) {
        (CLOSE, [channel]) if protocol.version >= Version::V5 => Ok(Said::End { channel: *channel }),
        (channel, _) => Ok(Said::Data { channel, bytes: payload.slice(1..) }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
            (base64, Message::text(":aGVsbG8="), data(10, b"hello")),
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
    }
}
