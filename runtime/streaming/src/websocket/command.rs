//! Commands over WebSocket: exec and attach.
//!
//! The channels: 0 standard input, 1 standard output, 2 standard error, 3 the status, 4 sizes of
//! the terminal. The server begins with an empty message on the lowest channel that it writes, by
//! which Kubernetes' own server signals that it is ready.

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::SplitStream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{Channel, Link, Protocol, Said, accepted, begin, decode, next};
use crate::budget::{self, Budget, End};
use crate::command::{Input, Output, Run, Session, Size, Sizes, Wanted, hand_out, status};
use crate::hangup::{self, Hangup};
use crate::{IDLE, LINGER, PROBE};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// Reads what the client sends, until it goes away or violates the protocol.
struct Reader {
    protocol: Protocol,
    stdin: Option<budget::Sender>,
    sizes: Option<watch::Sender<Option<Size>>>,
    parsed: Sizes,
    hangup: Option<Hangup>,
    link: Arc<Link>,
    /// To the writer, which does not live for this.
    messages: mpsc::WeakSender<Message>,
}

impl Reader {
    /// Both are handed back: the reader so that the input does not end before its end can be
    /// distinguished from that of the connection.
    async fn run<T>(
        mut self,
        mut messages: SplitStream<WebSocketStream<T>>,
    ) -> (Self, SplitStream<WebSocketStream<T>>)
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        while let Some(message) = next(&mut messages, &self.link).await {
            let Ok(said) = decode(self.protocol, message) else {
                self.link.blame(CloseCode::Invalid);
                break;
            };
            match said {
                Said::Data { channel: STDIN, bytes } if !bytes.is_empty() => {
                    let Some(stdin) = &self.stdin else { continue };
                    let mut sending = pin!(stdin.send(&bytes));
                    let passing_on = async {
                        // If it is no longer read, it is discarded.
                        while tokio::time::timeout(PROBE, sending.as_mut()).await.is_err() {
                            if let Some(messages) = self.messages.upgrade() {
                                let _ = messages.try_send(Message::Ping(Bytes::new()));
                            }
                        }
                    };
                    tokio::select! {
                        biased;
                        () = passing_on => {}
                        () = hangup::of(self.hangup.as_ref()) => break,
                    }
                }
                Said::Data { channel: RESIZE, bytes } => {
                    if let Some(sizes) = &self.sizes {
                        match self.parsed.push(&bytes) {
                            Ok(Some(size)) => drop(sizes.send_replace(Some(size))),
                            Ok(None) => {}
                            Err(_) => {
                                self.link.blame(CloseCode::Invalid);
                                break;
                            }
                        }
                    }
                }
                Said::End { channel: STDIN } => {
                    if let Some(stdin) = self.stdin.take() {
                        stdin.end(End::Finished);
                    }
                }
                Said::Data { .. } | Said::End { .. } | Said::Nothing => {}
            }
        }
        (self, messages)
    }
}

/// Serves one command over a WebSocket whose handshake is done.
pub(crate) async fn command<T>(io: T, hangup: Option<Hangup>, wanted: Wanted, protocol: Protocol, run: Run)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let link = Arc::new(Link::default());
    let (messages, writer, stream) = begin(accepted(io).await, link.clone());
    let channel = |number| Channel { messages: messages.clone(), number, base64: protocol.base64 };
    let (stdin, input) = Budget::default().queue();
    let (sizes, size) = watch::channel(None);
    let reader = Reader {
        protocol,
        stdin: wanted.stdin.then_some(stdin),
        sizes: wanted.terminal.then_some(sizes),
        parsed: Sizes::default(),
        hangup,
        link: link.clone(),
        messages: messages.downgrade(),
    };
    let mut reader = tokio::spawn(reader.run(stream));
    let (stdin, drained) = wanted.stdin.then(|| Input::new(input)).unzip();
    let session = Session {
        stdin,
        stdout: wanted.stdout.then(|| Output::over_websocket(channel(STDOUT))),
        stderr: wanted.stderr.then(|| Output::over_websocket(channel(STDERR))),
        size: wanted.terminal.then_some(size),
        // Only the project's own command detaches, and it speaks SPDY.
        detached: Arc::default(),
    };
    let lowest = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    let first = channel(lowest);
    // `Err` when the connection ends first, with its reading half.
    let is_there = tokio::select! {
        biased;
        read = &mut reader => Err(read),
        sent = first.send(&[]) => Ok(sent.is_ok()),
    };
    drop(first);
    let outcome = match is_there {
        Ok(true) => {
            let mut running = run(session);
            let outcome = tokio::select! {
                // First: the command must not mistake a broken connection for the end of its input.
                biased;
                read = &mut reader => Err(read.map(|(_, stream)| stream)),
                outcome = &mut running => Ok(outcome),
            };
            if outcome.is_err() {
                hand_out(running, drained).await;
            }
            Some(outcome)
        }
        Ok(false) => None,
        Err(read) => Some(Err(read.map(|(_, stream)| stream))),
    };
    let abort = writer.abort_handle();
    match outcome {
        Some(Ok(outcome)) => {
            let error = channel(ERROR);
            let say = async {
                if let Some(status) = status(protocol.version, &outcome) {
                    // The writer is gone only with the client.
                    let _ = error.send(&status).await;
                }
                // The writer sends Close when nothing is left to send, and the client answers it.
                drop((error, messages));
                let _ = writer.await;
            };
            // The client may read the rest as slowly as it read while the program ran.
            let said = tokio::select! {
                said = tokio::time::timeout(IDLE, say) => said.is_ok(),
                _ = &mut reader => false,
            };
            if said {
                let _ = tokio::time::timeout(LINGER, &mut reader).await;
            }
        }
        broken => {
            drop(messages);
            let closed = tokio::time::timeout(LINGER, writer).await;
            if let (Ok(Ok(sink)), Some(Err(Ok(stream)))) = (closed, broken) {
                link.see_off(sink, stream).await;
            }
        }
    }
    abort.abort();
    reader.abort();
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::{SinkExt, StreamExt};
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::Instant;
    use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

    use super::super::{CLOSE, FOR_COMMANDS, MAX_MESSAGE_BYTES};
    use super::*;
    use crate::command::Outcome;
    use crate::command::Version;
    use crate::command::tests::reading_its_input;

    fn protocol(name: &str) -> Protocol {
        FOR_COMMANDS.iter().find(|(found, _)| *found == name).unwrap().1
    }

    proptest! {
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

    #[tokio::test(start_paused = true)]
    async fn a_client_that_pauses_at_the_end_gets_all_output_and_the_status() {
        let (near, far) = duplex(1024);
        const PIECES: usize = 16;
        let (sender, ended) = tokio::sync::oneshot::channel::<()>();
        let run: Run = Box::new(move |session| {
            Box::pin(async move {
                // They fit into the writer's queue, and leave no room for the status.
                let stdout = session.stdout.unwrap();
                for _ in 0..PIECES {
                    stdout.send(vec![b'x'; 32 * 1024].into()).await.unwrap();
                }
                drop(sender);
                Outcome::Exited(3)
            })
        });
        let wanted = Wanted { stdout: true, ..Wanted::default() };
        let server = tokio::spawn(command(far, None, wanted, protocol("v5.channel.k8s.io"), run));
        let mut client = client(near).await;
        assert!(ended.await.is_err());
        tokio::time::sleep(10 * LINGER).await;
        let (mut length, mut said) = (0, Vec::new());
        while let Some(Ok(message)) = client.next().await {
            match decode(protocol("v5.channel.k8s.io"), message).unwrap() {
                Said::Data { channel: STDOUT, bytes } => length += bytes.len(),
                Said::Data { channel: ERROR, bytes } => said.extend_from_slice(&bytes),
                _ => {}
            }
        }
        assert_eq!(length, PIECES * 32 * 1024);
        assert_eq!(said, status(Version::V5, &Outcome::Exited(3)).unwrap());
        server.await.unwrap();
    }

    /// Some programs act on what they have read once their input ends.
    #[tokio::test]
    async fn a_connection_that_breaks_is_not_the_end_of_the_input() {
        let (near, far) = duplex(64 * 1024);
        let (sender, input_ended) = tokio::sync::oneshot::channel::<()>();
        let run = reading_its_input(sender);
        let wanted = Wanted { stdin: true, ..Wanted::default() };
        let server = tokio::spawn(command(far, None, wanted, protocol("v5.channel.k8s.io"), run));
        let mut client = client(near).await;
        client.send(Message::binary(vec![STDIN, b'x'])).await.unwrap();
        drop(client);
        assert!(input_ended.await.is_err());
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_ends_the_connection() {
        let (near, far) = duplex(64 * 1024);
        let run: Run = Box::new(|_| Box::pin(std::future::pending()));
        let wanted = Wanted { stdin: true, ..Wanted::default() };
        let server = tokio::spawn(command(far, None, wanted, protocol("v5.channel.k8s.io"), run));
        let mut client = client(near).await;
        // More than the wire holds: the server reads on, or the client would not get to its answer.
        client.send(Message::binary(vec![STDIN; 4 * MAX_MESSAGE_BYTES])).await.unwrap();
        let mut last = None;
        while let Some(Ok(message)) = client.next().await {
            last = Some(message);
        }
        let size = CloseFrame { code: CloseCode::Size, reason: "".into() };
        assert_eq!(last, Some(Message::Close(Some(size))));
        drop(client);
        server.await.unwrap();
    }

    /// Bytes that no client sends end the connection, and with it the command.
    #[tokio::test]
    async fn frames_that_cannot_be_end_the_connection() {
        let length = |bytes: u64| [&[0x82, 0xff][..], &bytes.to_be_bytes(), &[0; 4]].concat();
        let size = |text: &str| {
            let masked = 0x80 | u8::try_from(text.len() + 1).unwrap();
            [&[0x82, masked, 0, 0, 0, 0, RESIZE][..], text.as_bytes()].concat()
        };
        for (code, bytes) in [
            // Not masked.
            (1002_u16, vec![0x82, 2, STDIN, b'x']),
            // A reserved bit, a reserved kind, a fragmented ping, a long ping.
            (1002, vec![0xc2, 0x81, 0, 0, 0, 0, STDIN]),
            (1002, vec![0x83, 0x81, 0, 0, 0, 0, STDIN]),
            (1002, vec![0x09, 0x80, 0, 0, 0, 0]),
            (1002, [&[0x89, 0xfe, 0, 126][..], &[0; 4 + 126]].concat()),
            // Longer than a message may be, and than any memory.
            (1009, length(u64::try_from(MAX_MESSAGE_BYTES).unwrap() + 1)),
            (1009, length(u64::MAX)),
            // The continuation of a message that has not begun.
            (1002, vec![0x80, 0x81, 0, 0, 0, 0, STDIN]),
            // Neither text nor a size.
            (1007, vec![0x81, 0x81, 0, 0, 0, 0, 0xff]),
            (1007, size("80x24")),
        ] {
            let (mut near, far) = duplex(64 * 1024);
            let (sender, ended) = tokio::sync::oneshot::channel::<()>();
            let run: Run = Box::new(move |_| {
                Box::pin(async move {
                    let _sender = sender;
                    std::future::pending().await
                })
            });
            let wanted = Wanted { stdin: true, terminal: true, ..Wanted::default() };
            let server = tokio::spawn(command(far, None, wanted, protocol("v5.channel.k8s.io"), run));
            near.write_all(&bytes).await.unwrap();
            assert!(ended.await.is_err(), "{bytes:?}");
            let mut said = Vec::new();
            near.read_to_end(&mut said).await.unwrap();
            // The empty message of the beginning, and Close.
            let [high, low] = code.to_be_bytes();
            assert_eq!(said, [0x82, 1, ERROR, 0x88, 2, high, low], "{bytes:?}");
            drop(near);
            server.await.unwrap();
        }
    }

    /// What a client receives from a program that runs forever, while it keeps sending this.
    async fn lives(said: Option<&'static str>) -> Duration {
        let (near, far) = duplex(64 * 1024);
        let run: Run = Box::new(move |session| {
            Box::pin(async move {
                loop {
                    tokio::time::sleep(IDLE / 3).await;
                    if let Some(said) = said {
                        session.stdout.as_ref().unwrap().send(said.into()).await.unwrap();
                    }
                    if said.is_none() {
                        std::future::pending::<()>().await;
                    }
                }
            })
        });
        let wanted = Wanted { stdout: true, ..Wanted::default() };
        let start = Instant::now();
        let server = tokio::spawn(command(far, None, wanted, protocol("v5.channel.k8s.io"), run));
        let mut client = client(near).await;
        let hearing = async { while client.next().await.is_some_and(|message| message.is_ok()) {} };
        let _ = tokio::time::timeout(3 * IDLE, hearing).await;
        let lived = start.elapsed();
        drop(client);
        server.await.unwrap();
        lived
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_that_only_writes_is_not_idle_and_one_that_is_silent_is() {
        assert!(lives(Some("x")).await >= 3 * IDLE);
        let silent = lives(None).await;
        assert!((IDLE..2 * IDLE).contains(&silent), "{silent:?}");
    }
}
