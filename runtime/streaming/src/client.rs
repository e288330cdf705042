//! A client of the URLs: the request, and the streams of a command or of a forwarded connection,
//! over SPDY.
//!
//! The caller connects: to the address in the URL, or to the server's local socket. Everything here
//! works on a connected stream; [`Target`] is what to request on it.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, UPGRADE};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::IDLE;
use crate::command::{self, Outcome, Size, Wanted};
use crate::spdy::connection::{Closed, Incoming, Outgoing, Role};
use crate::spdy::{Connection, Headers, Limits, Stream};
use crate::{forward, upgrade};

/// How long a server may take to answer the request.
const ANSWER: Duration = Duration::from_secs(30);

/// How often an idle connection is kept alive: well within [`IDLE`].
const KEEP_ALIVE: Duration = Duration::from_secs(15 * 60);

/// The limit on the text of a server's refusal.
const MAX_REFUSAL_BYTES: usize = 4096;

/// Why the connection failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The URL is not one of a streaming server.
    #[error("{0} is not the URL of a streaming server")]
    Url(String),
    /// The connection broke before the answer, or the answer is not HTTP.
    #[error("cannot send the request to the streaming server")]
    Http(#[source] hyper::Error),
    /// The answer takes too long.
    #[error("the streaming server does not answer")]
    Silent,
    /// The server refused.
    #[error("the streaming server refused: {status}: {text}")]
    Refused {
        /// The status of HTTP.
        status: StatusCode,
        /// The text of its answer.
        text: String,
    },
    /// The connection broke after the answer.
    #[error("cannot open the streams")]
    Streams(#[from] Closed),
}

/// Where a URL leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Host and port, as in the URL.
    pub authority: String,
    /// What to request there.
    path: String,
}

impl Target {
    /// Reads the URL of an answer of Exec, Attach or PortForward.
    ///
    /// # Errors
    /// [`ClientError::Url`].
    pub fn of_url(url: &str) -> Result<Self, ClientError> {
        let wrong = || ClientError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(wrong());
        }
        let authority = uri.authority().filter(|authority| authority.port().is_some()).ok_or_else(wrong)?;
        Ok(Self { authority: authority.to_string(), path: uri.path().to_owned() })
    }
}

/// Requests the upgrade and begins to speak SPDY.
async fn connect<T>(io: T, target: &Target, protocol: &'static str) -> Result<Connection, ClientError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = Request::post(target.path.as_str())
        .header(HOST, target.authority.as_str())
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, upgrade::SPDY)
        .header(upgrade::PROTOCOL_VERSION, protocol)
        .body(Empty::<Bytes>::new())
        .map_err(|_| ClientError::Url(target.path.clone()))?;
    let asking = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await?;
        // Ends with the connection, or when it is handed over.
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await
    };
    let answer = tokio::time::timeout(ANSWER, asking).await.map_err(|_| ClientError::Silent)?;
    let answer = answer.map_err(ClientError::Http)?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refused(answer).await);
    }
    let upgraded = hyper::upgrade::on(answer).await.map_err(ClientError::Http)?;
    let limits = Limits { streams: 0, idle: IDLE, stall: None };
    let connection = Connection::new(TokioIo::new(upgraded), Role::Client, limits, None);
    tokio::spawn(connection.keep_alive(KEEP_ALIVE));
    Ok(connection)
}

async fn refused(answer: Response<hyper::body::Incoming>) -> ClientError {
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_REFUSAL_BYTES).collect();
    let text = match tokio::time::timeout(ANSWER, body).await {
        Ok(Ok(body)) => String::from_utf8_lossy(&body.to_bytes()).trim().to_owned(),
        _ => "(no message)".to_owned(),
    };
    ClientError::Refused { status, text }
}

/// A command on the other side: its streams, and its outcome. It is given up when this is dropped.
#[derive(Debug)]
pub struct Command {
    /// Its standard input, if that was requested.
    pub stdin: Option<Outgoing>,
    /// Its standard output, if that was requested.
    pub stdout: Option<Incoming>,
    /// Its standard error, if that was requested.
    pub stderr: Option<Incoming>,
    /// Takes the size of its terminal, if it has one.
    pub resize: Option<Resize>,
    /// Its outcome.
    pub ending: Ending,
}

/// Takes the size of a terminal.
#[derive(Debug, Clone)]
pub struct Resize(Outgoing);

impl Resize {
    /// Reports the current size of the client's terminal.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn send(&self, size: Size) -> Result<(), Closed> {
        let Size { width, height } = size;
        self.0.send(format!("{{\"Width\":{width},\"Height\":{height}}}").into()).await
    }
}

impl Resize {
    /// Says that the client detaches: on a server that lets it, the program goes on when the
    /// connection is closed.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn detach(&self) -> Result<(), Closed> {
        self.0.send("{\"Detach\":true}".into()).await
    }
}

/// The outcome of a command. It holds the connection.
#[derive(Debug)]
pub struct Ending {
    error: Incoming,
    connection: Connection,
}

/// The limit on the length of a status. One has some hundred bytes, and the message of an error.
const MAX_STATUS_BYTES: usize = 64 * 1024;

impl Ending {
    /// Waits for the outcome; `None` when the connection broke first. Cancel safe, except that a
    /// partly received status is lost.
    pub async fn outcome(&mut self) -> Option<Outcome> {
        let mut status = Vec::new();
        while let Some(bytes) = self.error.receive().await {
            status.extend_from_slice(&bytes);
            if status.len() > MAX_STATUS_BYTES {
                return None;
            }
        }
        command::outcome(&status)
    }

    /// Closes the connection with a GOAWAY.
    pub async fn close(self) {
        self.connection.close().await;
    }
}

/// Starts the command of an Exec URL, or joins the one of an Attach URL, on a connection to
/// `target`. `wanted` has to match the request that returned the URL.
///
/// # Errors
/// [`ClientError`].
pub async fn command<T>(io: T, target: &Target, wanted: Wanted) -> Result<Command, ClientError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = connect(io, target, "v4.channel.k8s.io").await?;
    let mut open = async |kind, wanted: bool| -> Result<Option<Stream>, Closed> {
        if !wanted {
            return Ok(None);
        }
        connection.open(&Headers::of(&[("streamType", kind)])).await.map(Some)
    };
    let error = open("error", true).await?.ok_or(Closed)?;
    let stdin = open("stdin", wanted.stdin).await?;
    let stdout = open("stdout", wanted.stdout).await?;
    let stderr = open("stderr", wanted.stderr).await?;
    let resize = open("resize", wanted.terminal).await?;
    Ok(Command {
        stdin: stdin.map(Stream::without_input),
        stdout: stdout.map(|stream| stream.incoming),
        stderr: stderr.map(|stream| stream.incoming),
        resize: resize.map(|stream| Resize(stream.without_input())),
        ending: Ending { error: error.incoming, connection },
    })
}

/// A connection to a port of a sandbox.
#[derive(Debug)]
pub struct Forwarded {
    /// Data from the port; ends when the port's side has finished.
    pub incoming: Incoming,
    /// Data to the port.
    pub outgoing: Outgoing,
    /// Its outcome.
    pub ending: ForwardEnding,
}

/// The outcome of a forwarded connection, which is given up when this is dropped.
#[derive(Debug)]
pub struct ForwardEnding {
    error: Incoming,
    _connection: Connection,
}

impl ForwardEnding {
    /// Waits for the end; returns why the connection failed, if it did.
    pub async fn failure(&mut self) -> Option<String> {
        let mut text = Vec::new();
        while let Some(bytes) = self.error.receive().await {
            text.extend_from_slice(&bytes);
            text.truncate(MAX_STATUS_BYTES);
        }
        (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
    }
}

/// Opens a connection to `port` by a URL of PortForward, on a connection to `target`.
///
/// A URL can carry many; with one URL each, slow readers do not hold up the others.
///
/// # Errors
/// [`ClientError`].
pub async fn forward<T>(io: T, target: &Target, port: u16) -> Result<Forwarded, ClientError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = connect(io, target, forward::PROTOCOL).await?;
    let port = port.to_string();
    let mut open = async |kind| {
        connection.open(&Headers::of(&[("streamType", kind), ("port", &port), ("requestID", "0")])).await
    };
    let error = open("error").await?;
    error.outgoing.finish().await?;
    let Stream { incoming, outgoing, .. } = open("data").await?;
    let ending = ForwardEnding { error: error.incoming, _connection: connection };
    Ok(Forwarded { incoming, outgoing, ending })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::command::Run;
    use crate::server::Server;
    use crate::server::tests::served;
    use crate::tokens::{Endpoint, Task};

    fn target(server: &Server, address: SocketAddr, endpoint: Endpoint, task: Task) -> Target {
        let token = server.tokens().insert(endpoint, task).unwrap();
        Target::of_url(&format!("http://{address}/{}/{token}", endpoint.name())).unwrap()
    }

    #[test]
    fn a_url_says_where_to_connect() {
        let target = Target::of_url("https://[::1]:10010/exec/abc").unwrap();
        assert_eq!((target.authority.as_str(), target.path.as_str()), ("[::1]:10010", "/exec/abc"));
        for url in ["", "x", "/exec/abc", "ftp://127.0.0.1:1/x", "http://127.0.0.1/exec/abc"] {
            assert!(matches!(Target::of_url(url), Err(ClientError::Url(_))), "{url}");
        }
    }

    #[tokio::test]
    async fn a_command_has_its_streams_and_an_outcome() {
        let (server, address) = served().await;
        let run: Run = Box::new(|mut session| {
            Box::pin(async move {
                let (mut stdin, stdout) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
                while let Some(bytes) = stdin.receive().await {
                    stdout.send(bytes).await.unwrap();
                }
                session.stderr.unwrap().send(Bytes::from_static(b"done")).await.unwrap();
                Outcome::NotRun { text: "no such program".to_owned(), code: 127 }
            })
        });
        let wanted = Wanted { stdin: true, stdout: true, stderr: true, terminal: false };
        let target = target(&server, address, Endpoint::Exec, Task::Command(wanted, run));
        let io = TcpStream::connect(address).await.unwrap();
        let mut command = command(io, &target, wanted).await.unwrap();
        let stdin = command.stdin.take().unwrap();
        stdin.send(Bytes::from_static(b"hello")).await.unwrap();
        assert_eq!(command.stdout.as_mut().unwrap().receive().await.unwrap(), "hello");
        stdin.finish().await.unwrap();
        assert_eq!(command.stderr.as_mut().unwrap().receive().await.unwrap(), "done");
        let outcome = command.ending.outcome().await;
        assert_eq!(outcome, Some(Outcome::NotRun { text: "no such program".to_owned(), code: 127 }));
        command.ending.close().await;
        // The token is used up.
        let io = TcpStream::connect(address).await.unwrap();
        let again = super::command(io, &target, wanted).await;
        assert!(
            matches!(again, Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. })),
            "{again:?}"
        );
    }

    #[tokio::test]
    async fn a_server_that_goes_away_leaves_no_outcome() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut server, _) = listener.accept().await.unwrap();
            let mut byte = [0; 1024];
            let _request = server.read(&mut byte).await;
            let answer =
                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n";
            server.write_all(answer.as_bytes()).await.unwrap();
        });
        let target = Target::of_url(&format!("http://{address}/exec/x")).unwrap();
        let wanted = Wanted { stdout: true, ..Wanted::default() };
        let io = TcpStream::connect(address).await.unwrap();
        match command(io, &target, wanted).await {
            Ok(mut command) => assert_eq!(command.ending.outcome().await, None),
            Err(error) => assert!(matches!(error, ClientError::Streams(_)), "{error:?}"),
        }
    }

    #[tokio::test]
    async fn a_forwarded_connection_ends_with_the_reason() {
        let (server, address) = served().await;
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = echo.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut socket, _) = echo.accept().await.unwrap();
            let mut text = Vec::new();
            socket.read_to_end(&mut text).await.unwrap();
            socket.write_all(&text).await.unwrap();
        });
        let connect: forward::Connect = Arc::new(|port| {
            Box::pin(async move {
                TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| format!("port {port}: {error}"))
            })
        });
        for (port, said, failed) in [(port, &b"hello"[..], false), (1, b"", true)] {
            let task = Task::Forward(connect.clone(), vec![port]);
            let target = target(&server, address, Endpoint::PortForward, task);
            let io = TcpStream::connect(address).await.unwrap();
            let mut forwarded = forward(io, &target, port).await.unwrap();
            let _maybe_reset = forwarded.outgoing.send(Bytes::from_static(b"hello")).await;
            let _maybe_reset = forwarded.outgoing.finish().await;
            let mut heard = Vec::new();
            while let Some(bytes) = forwarded.incoming.receive().await {
                heard.extend_from_slice(&bytes);
            }
            assert_eq!(heard, said);
            assert_eq!(forwarded.ending.failure().await.is_some_and(|text| text.contains("port 1")), failed);
        }
    }
}
