//! The server: from a listening socket to upgraded connections.
//!
//! Any process on the node, and in a pod with the node's network, can connect to it. So before a
//! connection has shown a token it can use little, and only for a short time: it is one of at most
//! [`MAX_HALF_OPEN`], of which the oldest is closed for a new one, and ends after [`REQUEST`]. A
//! client with a token needs a millisecond for that. A connection that has shown one is never
//! closed for another: what is over [`MAX_CONNECTIONS`] is refused.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

use crate::hangup::Hangup;
use crate::tokens::{Endpoint, Task, Tokens};
use crate::upgrade::{self, Protocol, Refused, Upgrade};
use crate::vanished::{self, Unacknowledged};
use crate::websocket::MAX_PORTS;
use crate::{command, forward, websocket};

/// Connections that have not shown a token yet.
pub const MAX_HALF_OPEN: usize = 512;

/// How long a connection may take for its TLS handshake and its request.
pub const REQUEST: Duration = Duration::from_secs(10);

/// Connections with a token that are open at the same time: with a thousand idle ones there is room
/// for commands.
pub const MAX_CONNECTIONS: usize = 1100;

/// The limit on a request's head.
const MAX_REQUEST_BYTES: usize = 16 * 1024;

/// Headers of a request.
const MAX_HEADERS: usize = 64;

/// The pause after a connection that could not be accepted, for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// When a peer is probed, how often, and how many times without an answer: tcp(7). This takes half
/// a minute for one that has lost its network while nothing is sent; [`vanished`] is for the
/// others.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;

/// The connections that have not shown a token, by age.
#[derive(Debug, Default)]
struct HalfOpen {
    next: u64,
    open: BTreeMap<u64, AbortHandle>,
}

/// The server's state.
#[derive(Debug)]
pub struct Server {
    tokens: Tokens,
    half_open: Mutex<HalfOpen>,
    connections: Arc<Semaphore>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            tokens: Tokens::default(),
            half_open: Mutex::default(),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        }
    }
}

/// A connection's place among those that have not shown a token.
pub(crate) struct Place {
    server: Arc<Server>,
    number: u64,
}

impl Place {
    /// Leaves it, so that the connection is not closed for a newer one. `false` when that has
    /// happened already.
    fn leave(&self) -> bool {
        self.server.half_open().open.remove(&self.number).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Server {
    /// What the URLs stand for.
    #[must_use]
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    fn half_open(&self) -> std::sync::MutexGuard<'_, HalfOpen> {
        self.half_open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts connections forever, from peers that `admits` lets in. For clients on this machine,
    /// which need no address for it. Strangers cannot connect, so nobody is closed for another.
    pub async fn serve_local(self: Arc<Self>, listener: UnixListener, admits: impl Fn(&UnixStream) -> bool) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) if admits(&stream) => {
                    let hangup = Hangup::of(&stream).ok();
                    let server = self.clone();
                    tokio::spawn(async move {
                        // A local peer does not vanish without notice.
                        let request = server.answer(stream, hangup, |_| Ok(None), None);
                        let _ = tokio::time::timeout(REQUEST, request).await;
                    });
                }
                Ok(_) => tracing::warn!("refused a streaming client on the local socket: it is not root"),
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a local streaming connection");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Accepts connections forever. `secure` prepares each one for reading, with or without TLS.
    pub async fn serve<T, S, F>(
        self: Arc<Self>,
        listener: TcpListener,
        secure: S,
        unacknowledged: Unacknowledged,
    ) where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        S: Fn(TcpStream) -> F,
        F: Future<Output = io::Result<T>> + Send + 'static,
    {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a streaming connection");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            // Each of these options only speeds up a connection, or the detection of its end.
            let _ = stream.set_nodelay(true);
            let _ = SockRef::from(&stream).set_tcp_keepalive(
                &TcpKeepalive::new()
                    .with_time(KEEPALIVE_IDLE)
                    .with_interval(KEEPALIVE_INTERVAL)
                    .with_retries(KEEPALIVE_RETRIES),
            );
            let hangup = Hangup::of(&stream).ok();
            self.admit(secure(stream), hangup, unacknowledged);
        }
    }

    /// Serves a connection that has just been accepted.
    fn admit<T>(
        self: &Arc<Self>,
        secured: impl Future<Output = io::Result<T>> + Send + 'static,
        hangup: Option<Hangup>,
        unacknowledged: Unacknowledged,
    ) where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut half_open = self.half_open();
        let number = half_open.next;
        half_open.next += 1;
        let place = Place { server: self.clone(), number };
        let server = self.clone();
        let task = tokio::spawn(async move {
            let request = async {
                let Ok(io) = secured.await else { return };
                server.answer(io, hangup, unacknowledged, Some(&place)).await;
            };
            // A peer that disconnected needs no answer; one that took too long is disconnected.
            let _ = tokio::time::timeout(REQUEST, request).await;
        });
        half_open.open.insert(number, task.abort_handle());
        let oldest = if half_open.open.len() > MAX_HALF_OPEN { half_open.open.pop_first() } else { None };
        drop(half_open);
        if let Some((_, oldest)) = oldest {
            oldest.abort();
        }
    }

    /// Reads one request and answers it. An upgraded connection continues in its own task.
    pub(crate) async fn answer<T>(
        self: Arc<Self>,
        io: T,
        hangup: Option<Hangup>,
        unacknowledged: Unacknowledged,
        place: Option<&Place>,
    ) where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let hangup = Mutex::new(hangup);
        let service = service_fn(|request| {
            let hangup = hangup.lock().unwrap_or_else(PoisonError::into_inner).take();
            let response = self.respond(request, hangup, unacknowledged, place);
            async { Ok::<_, Infallible>(response) }
        });
        // With keep-alive: without it hyper would add "close" to the answer 101, and Go's client
        // would then reject the upgrade. Refusals say themselves that they close.
        let connection = http1::Builder::new()
            .max_buf_size(MAX_REQUEST_BYTES)
            .max_headers(MAX_HEADERS)
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        if let Err(error) = connection.await {
            tracing::debug!(%error, "cannot read a streaming request");
        }
    }

    fn respond(
        &self,
        mut request: Request<Incoming>,
        hangup: Option<Hangup>,
        unacknowledged: Unacknowledged,
        place: Option<&Place>,
    ) -> Response<Full<Bytes>> {
        let upgrade = match self.judge(&request, place) {
            Ok(upgrade) => upgrade,
            Err(refused) => return refusal(refused),
        };
        let (Upgrade { protocol, headers }, task, permit) = upgrade;
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let _permit = permit;
            if let Ok(upgraded) = upgraded.await {
                let watched = hangup.as_ref().and_then(Hangup::again);
                tokio::select! {
                    () = run(TokioIo::new(upgraded), hangup, protocol, task) => {}
                    () = vanished::watch(watched, unacknowledged) => {}
                }
            }
        });
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        *response.headers_mut() = headers;
        response
    }

    fn judge(
        &self,
        request: &Request<Incoming>,
        place: Option<&Place>,
    ) -> Result<(Upgrade, Task, OwnedSemaphorePermit), Refused> {
        let refused = |status, text: &str| Refused { status, text: text.to_owned(), headers: Box::default() };
        let unknown = || refused(StatusCode::NOT_FOUND, "unknown URL, or one that was used or has expired");
        let (endpoint, token) = Endpoint::of_path(request.uri().path()).ok_or_else(unknown)?;
        if !matches!(*request.method(), Method::GET | Method::POST) {
            let mut refused = refused(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST are supported");
            refused.headers.insert(ALLOW, HeaderValue::from_static("GET, POST"));
            return Err(refused);
        }
        if !self.tokens.is_known(endpoint, token) {
            return Err(unknown());
        }
        // A malformed request does not use up the token.
        let upgrade = upgrade::negotiate(endpoint, request.method(), request.headers())?;
        let ports = match upgrade.protocol {
            Protocol::ForwardOverChannels(_) => self.ports(token, request.uri().query())?,
            _ => Vec::new(),
        };
        let permit = self.connections.clone().try_acquire_owned().map_err(|_| {
            let text = format!("too many streaming connections: {MAX_CONNECTIONS} are open");
            refused(StatusCode::SERVICE_UNAVAILABLE, &text)
        })?;
        if place.is_some_and(|place| !place.leave()) {
            // It is being closed, which must not use up the token.
            return Err(refused(StatusCode::SERVICE_UNAVAILABLE, "too many connections without a token"));
        }
        let task = match self.tokens.take(endpoint, token).ok_or_else(unknown)? {
            Task::Forward(connect, _) => Task::Forward(connect, ports),
            command @ Task::Command(..) => command,
        };
        Ok((upgrade, task, permit))
    }

    /// The ports to forward on channels, which have to be known in advance.
    fn ports(&self, token: &str, query: Option<&str>) -> Result<Vec<u16>, Refused> {
        let asked = self.tokens.ports(token);
        if (1..=MAX_PORTS).contains(&asked.len()) {
            return Ok(asked);
        }
        websocket::ports_of_query(query.unwrap_or_default()).ok_or_else(|| {
            let text = format!(
                "this sub-protocol needs 1 to {MAX_PORTS} ports, in PortForwardRequest.port or in the query: \
                 ?port=80"
            );
            Refused { status: StatusCode::BAD_REQUEST, text, headers: Box::default() }
        })
    }
}

fn refusal(refused: Refused) -> Response<Full<Bytes>> {
    let Refused { status, text, headers } = refused;
    let mut response = Response::new(Full::new(Bytes::from(text + "\n")));
    *response.status_mut() = status;
    *response.headers_mut() = *headers;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

async fn run<T>(io: T, hangup: Option<Hangup>, protocol: Protocol, task: Task)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match (protocol, task) {
        (Protocol::CommandOverSpdy(version), Task::Command(wanted, run)) => {
            command::over_spdy(io, hangup, wanted, version, run).await;
        }
        (Protocol::CommandOverWebSocket(protocol), Task::Command(wanted, run)) => {
            websocket::command(io, hangup, wanted, protocol, run).await;
        }
        (Protocol::ForwardOverSpdy, Task::Forward(connect, _)) => {
            forward::over_spdy(io, hangup, connect).await;
        }
        (Protocol::ForwardOverChannels(base64), Task::Forward(connect, ports)) => {
            websocket::forward(io, hangup, base64, ports, connect).await;
        }
        (Protocol::ForwardOverWebSocket, Task::Forward(connect, _)) => {
            let (near, far) = tokio::io::duplex(64 * 1024);
            tokio::join!(websocket::tunnel(io, near), forward::over_spdy(far, hangup, connect));
        }
        // An endpoint has protocols and tasks of one kind only.
        (_, Task::Command(..) | Task::Forward(..)) => {}
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::Instant;

    use super::*;
    use crate::command::{Outcome, Run, Wanted};

    /// A server on loopback, and its address.
    pub(crate) async fn served() -> (Arc<Server>, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (server, address) = (Arc::new(Server::default()), listener.local_addr().unwrap());
        tokio::spawn(server.clone().serve(listener, async |stream| Ok(stream), |_| Ok(None)));
        (server, address)
    }

    fn exec(server: &Server) -> String {
        let run: Run = Box::new(|_| Box::pin(async { Outcome::Exited(0) }));
        let wanted = Wanted { stdout: true, ..Wanted::default() };
        server.tokens().insert(Endpoint::Exec, Task::Command(wanted, run)).unwrap()
    }

    /// Sends a request with these headers and returns the answer up to the end of its head.
    async fn ask(address: SocketAddr, request: &str, headers: &str) -> String {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.windows(4).any(|end| end == b"\r\n\r\n") {
            if client.read_buf(&mut answer).await.unwrap() == 0 {
                break;
            }
        }
        String::from_utf8_lossy(&answer).into_owned()
    }

    const UPGRADE: &str =
        "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";

    #[tokio::test]
    async fn a_token_opens_one_connection_and_nothing_else_does() {
        let (server, address) = served().await;
        let token = exec(&server);
        for (request, headers, status) in [
            (format!("POST /attach/{token}"), UPGRADE, "404"),
            (format!("PUT /exec/{token}"), UPGRADE, "405"),
            (format!("GET /exec/{token}"), "", "400"),
            (format!("POST /exec/{token}x"), UPGRADE, "404"),
            ("GET /".to_owned(), "", "404"),
            (format!("POST /exec/{token}"), UPGRADE, "101"),
            (format!("POST /exec/{token}"), UPGRADE, "404"),
        ] {
            let answer = ask(address, &request, headers).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
            let connection = if status == "101" { "Upgrade" } else { "close" };
            assert!(answer.contains(&format!("connection: {connection}\r\n")), "{answer}");
        }
    }

    #[tokio::test]
    async fn connections_without_a_token_hold_nobody_up_and_are_few() {
        let (server, address) = served().await;
        let mut idle = Vec::new();
        for _ in 0..MAX_HALF_OPEN + 200 {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(b"GET /exec/").await.unwrap();
            idle.push(client);
        }
        let start = Instant::now();
        let token = exec(&server);
        let answer = ask(address, &format!("POST /exec/{token}"), UPGRADE).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        assert!(start.elapsed() < REQUEST / 2);
        assert!(server.half_open().open.len() <= MAX_HALF_OPEN);
        // The oldest was closed.
        let mut byte = [0];
        assert_eq!(idle[0].read(&mut byte).await.unwrap_or(0), 0);
    }

    #[tokio::test]
    async fn a_connection_that_has_shown_its_token_is_not_closed_for_newer_ones() {
        let server = Arc::new(Server::default());
        let token = exec(&server);
        // The answer does not fit, so it takes as long as the client does not read.
        let (mut near, far) = tokio::io::duplex(16);
        server.admit(async { Ok(far) }, None, |_| Ok(None));
        near.write_all(format!("POST /exec/{token} HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\n").as_bytes())
            .await
            .unwrap();
        while server.tokens().is_known(Endpoint::Exec, &token) {
            tokio::task::yield_now().await;
        }
        let mut newer = Vec::new();
        for _ in 0..2 * MAX_HALF_OPEN {
            let (near, far) = tokio::io::duplex(16);
            server.admit(async { Ok(far) }, None, |_| Ok(None));
            newer.push(near);
        }
        assert_eq!(newer[0].read(&mut [0]).await.unwrap(), 0, "the oldest of these is closed");
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            assert_ne!(near.read_buf(&mut answer).await.unwrap(), 0, "{}", String::from_utf8_lossy(&answer));
        }
        assert!(answer.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&answer));
        assert_eq!(server.connections.available_permits(), MAX_CONNECTIONS - 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_never_ends_is_let_go() {
        let (near, far) = tokio::io::duplex(1024);
        let server = Arc::new(Server::default());
        server.admit(async { Ok(far) }, None, |_| Ok(None));
        let (mut from, mut to) = tokio::io::split(near);
        let trickle = tokio::spawn(async move {
            while to.write_all(b"G").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let start = Instant::now();
        let mut answer = Vec::new();
        // Whether it notices depends on the HTTP library.
        let _ = from.read_to_end(&mut answer).await;
        assert!(start.elapsed() <= REQUEST);
        trickle.await.unwrap();
        assert!(server.half_open().open.is_empty());
    }

    /// The answer that a client on the local socket gets.
    async fn answer_on_local_socket(admits: fn(&UnixStream) -> bool) -> Vec<u8> {
        let path = std::env::temp_dir().join(format!("berth-streaming-{}", getrandom::u64().unwrap()));
        let listener = UnixListener::bind(&path).unwrap();
        let serving = tokio::spawn(Arc::new(Server::default()).serve_local(listener, admits));
        let mut client = UnixStream::connect(&path).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        // A peer that is not admitted may be gone already.
        let _ = client.write_all(b"GET /exec/none HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        serving.abort();
        answer
    }

    #[tokio::test]
    async fn a_local_client_is_not_closed_for_strangers() {
        let path = std::env::temp_dir().join(format!("berth-streaming-{}", getrandom::u64().unwrap()));
        let listener = UnixListener::bind(&path).unwrap();
        let (server, (accepted, mut seen)) = (Arc::new(Server::default()), tokio::sync::mpsc::channel(1));
        let serving =
            tokio::spawn(server.clone().serve_local(listener, move |_| accepted.try_send(()).is_ok()));
        let mut client = UnixStream::connect(&path).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        seen.recv().await.unwrap();
        let mut strangers = Vec::new();
        for _ in 0..2 * MAX_HALF_OPEN {
            let (near, far) = tokio::io::duplex(16);
            server.admit(async { Ok(far) }, None, |_| Ok(None));
            strangers.push(near);
        }
        assert_eq!(strangers[0].read(&mut [0]).await.unwrap(), 0, "the oldest of these is closed");
        client.write_all(b"GET /exec/none HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 404 "), "{}", String::from_utf8_lossy(&answer));
        serving.abort();
    }

    #[tokio::test]
    async fn a_local_client_is_answered_if_it_is_admitted() {
        assert!(answer_on_local_socket(|_| true).await.starts_with(b"HTTP/1.1 404 "));
        assert!(answer_on_local_socket(|_| false).await.is_empty());
    }
}
