//! Feeds the bytes of a hostile peer to everything that reads them: called by the fuzz targets in
//! `fuzz/` and by the test that replays their corpus.
//!
//! Each function returns when the connection has ended. It panics when the code it calls does, when
//! the same bytes are read differently in pieces, and when a connection does not end although its
//! peer has closed it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};

use crate::command::{Outcome, Run, Size, Wanted};
use crate::forward::Connect;
use crate::server::Server;
use crate::spdy::{Decoder, Frame, Headers, ProtocolError};
use crate::tokens::{Endpoint, Task};
use crate::{client, command, forward, websocket};

/// A connection that takes longer counts as hung. Microseconds are usual.
const ENDS: Duration = Duration::from_secs(60);

/// What the wire holds: less than some frames.
const WIRE: usize = 4 * 1024;

/// Frames of SPDY: the same in pieces as in one. The first byte is the length of a piece.
pub fn spdy_frames(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let whole = frames(data, usize::MAX);
    assert_eq!(whole, frames(data, usize::from(*piece).max(1)), "read differently in pieces");
    // What the decoder cannot represent is not written again.
    if let Ok(headers) = Headers::decode(data) {
        assert_eq!(headers.encode(), data);
    }
}

/// The frames, with the pieces of one data frame joined, and the error that ends them.
fn frames(data: &[u8], piece: usize) -> (Vec<Frame>, Result<(), ProtocolError>) {
    let (mut decoder, mut buffer, mut frames) = (Decoder::default(), BytesMut::new(), Vec::new());
    let mut joins = false;
    for piece in data.chunks(piece) {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(Frame::Data { stream, bytes, last })) => {
                    match frames.last_mut() {
                        Some(Frame::Data { bytes: before, last: ended, .. }) if joins => {
                            *before = [&before[..], &bytes[..]].concat().into();
                            *ended = last;
                        }
                        _ => frames.push(Frame::Data { stream, bytes, last }),
                    }
                    joins = decoder.is_inside_data();
                }
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
    }
    (frames, Ok(()))
}

/// A connection that speaks SPDY. The first byte selects the other end: a command without or with a
/// terminal, with each version of the protocol, forwarded ports, or a client of ours.
pub fn spdy_connection(data: &[u8]) {
    let Some((to, data)) = data.split_first() else { return };
    match to % 16 {
        14 => attack(data, |io| forward::over_spdy(io, None, connect())),
        15 => attack(data, client),
        to => {
            let (_, version) = command::OVER_SPDY[usize::from(to % 4)];
            let wanted = if to % 8 < 4 { PIPES } else { TERMINAL };
            attack(data, |io| command::over_spdy(io, None, wanted, version, echo()));
        }
    }
}

/// A connection that speaks WebSocket. The first byte is the number of the sub-protocol: of
/// commands, of ports, or the tunnel for SPDY.
pub fn websocket(data: &[u8]) {
    let Some((to, data)) = data.split_first() else { return };
    let to = usize::from(*to);
    if let Some((_, protocol)) = websocket::FOR_COMMANDS.get(to % 16) {
        let wanted = if to & 16 == 0 { PIPES } else { TERMINAL };
        attack(data, |io| websocket::command(io, None, wanted, *protocol, echo()));
    } else if let Some((_, base64)) = websocket::FOR_PORTS.get(to % 16 - websocket::FOR_COMMANDS.len()) {
        attack(data, |io| websocket::forward(io, None, *base64, vec![1, 2], connect()));
    } else {
        attack(data, |io| async move {
            let (near, far) = duplex(WIRE);
            tokio::join!(websocket::tunnel(io, near), forward::over_spdy(far, None, connect()));
        });
    }
}

/// A connection to the server, from its first byte. The words `{exec}`, `{attach}` and
/// `{portforward}` stand for tokens.
pub fn request(data: &[u8]) {
    let server = Arc::new(Server::default());
    let mut data = data.to_vec();
    for endpoint in [Endpoint::Exec, Endpoint::Attach, Endpoint::PortForward] {
        let task = match endpoint {
            Endpoint::Exec => Task::Command(PIPES, echo()),
            Endpoint::Attach => Task::Command(TERMINAL, echo()),
            Endpoint::PortForward => Task::Forward(connect(), Vec::new()),
        };
        let token = server.tokens().insert(endpoint, task).expect("random bytes");
        let word = format!("{{{}}}", endpoint.name());
        if let Some(at) = data.windows(word.len()).position(|found| found == word.as_bytes()) {
            data.splice(at..at + word.len(), token.into_bytes());
        }
    }
    attack(&data, |io| server.answer(io, None, |_| Ok(None), None));
}

const PIPES: Wanted = Wanted { stdin: true, stdout: true, stderr: true, terminal: false };
const TERMINAL: Wanted = Wanted { stdin: true, stdout: true, stderr: false, terminal: true };

/// Echoes its input, and ends with it.
fn echo() -> Run {
    Box::new(|session| {
        Box::pin(async move {
            let (Some(mut stdin), Some(stdout)) = (session.stdin, session.stdout) else {
                return Outcome::Failed("without streams".to_owned());
            };
            while let Some(bytes) = stdin.receive().await {
                if stdout.send(bytes).await.is_err() {
                    break;
                }
            }
            Outcome::Exited(0)
        })
    })
}

/// An even port does not exist, an odd one echoes.
fn connect() -> Connect {
    static LISTENER: LazyLock<std::net::TcpListener> = LazyLock::new(|| {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        listener.set_nonblocking(true).expect("a listener that does not block");
        listener
    });
    Arc::new(|port| {
        Box::pin(async move {
            if port.is_multiple_of(2) {
                return Err(format!("port {port} is not there"));
            }
            let listener = LISTENER.try_clone().and_then(TcpListener::from_std).expect("a listener");
            let address: SocketAddr = listener.local_addr().expect("its address");
            let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
            tokio::spawn(async move {
                if let Ok((mut socket, _)) = listener.accept().await {
                    // Without ports that wait for the end of their connections.
                    let _ = socket.set_zero_linger();
                    let (mut from, mut to) = socket.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                }
            });
            Ok(stream)
        })
    })
}

/// A client of ours whose server sends this.
async fn client(io: DuplexStream) {
    let target = client::Target::of_url("http://127.0.0.1:1/exec/x").expect("a URL");
    let Ok(mut command) = client::command(io, &target, TERMINAL).await else { return };
    if let Some(resize) = &command.resize {
        let _ = resize.send(Size { width: 80, height: 24 }).await;
    }
    if let Some(stdout) = &mut command.stdout {
        while stdout.receive().await.is_some() {}
    }
    let _ = command.ending.outcome().await;
    command.ending.close().await;
}

/// Serves a peer that sends all of `data` and closes, while it reads what it gets.
fn attack<F>(data: &[u8], serve: impl FnOnce(DuplexStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (near, far) = duplex(WIRE);
        let server = tokio::spawn(serve(far));
        let (mut from, mut to) = tokio::io::split(near);
        let saying = async {
            // The server may have closed.
            let _ = to.write_all(data).await;
            let _ = to.shutdown().await;
        };
        let hearing = async {
            let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
        };
        let all = async { tokio::join!(saying, hearing, server).2 };
        let served = tokio::time::timeout(ENDS, all).await.expect("the connection does not end");
        served.expect("the server panicked");
    });
}
