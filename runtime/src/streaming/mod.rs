//! The streaming server of the daemon: what Exec, Attach and PortForward answer with, and what is
//! done when the client comes.
//!
//! - `exec`: a program in a container on the client's streams;
//! - `attach`: those of the container's own program;
//! - `port_forward`: connections into the network of a sandbox.
//!
//! The wire is `berth_streaming`'s. It listens on the loopback interface unless the configuration
//! says otherwise, and on a socket in the file system for the `berth` command; the URL's token is
//! what lets a client in.

mod attach;
mod exec;
mod pipes;
mod port_forward;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_streaming::command::Wanted;
use berth_streaming::server::Server;
use berth_streaming::tokens::{Endpoint, Task, TokenError};
use berth_sys::socket;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};
use tonic::metadata::MetadataMap;

use crate::config::StreamingConfig;
use crate::container::Container;
use crate::file_error::FileError;
use crate::listener;
use crate::lock;
use crate::sandbox::Sandbox;

/// Connections that wait to be accepted. The kernel takes the smaller of this and
/// `net.core.somaxconn`.
const BACKLOG: u32 = 1024;

/// How soon an address that cannot be listened on is tried again, and how rarely in the end.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Why there is no streaming server.
#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    /// A certificate or a key cannot be read.
    #[error("cannot read {path}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The certificate and the key cannot be used.
    #[error("cannot use streaming.tls_certificate with streaming.tls_key")]
    Tls(#[source] rustls::Error),
}

/// Why there is no URL.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UrlError {
    /// The server is not listening yet.
    #[error("the streaming server cannot listen on streaming.address {address}: {error}; trying again")]
    NotListening {
        /// As configured.
        address: SocketAddr,
        /// Why, the last time.
        error: String,
    },
    /// There is no token.
    #[error(transparent)]
    Token(#[from] TokenError),
}

/// How a client will reach the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// At the configured address.
    Address,
    /// Through the socket in the file system.
    Socket,
}

impl Reach {
    /// What the metadata of a call says.
    pub(crate) fn of(metadata: &MetadataMap) -> Self {
        match metadata.get(berth_api::STREAMS) {
            Some(value) if value == berth_api::STREAMS_SOCKET => Self::Socket,
            _ => Self::Address,
        }
    }
}

/// The server. It ends when this is dropped; what runs on its connections goes on until the daemon
/// ends.
#[derive(Debug)]
pub(crate) struct Streaming {
    server: Arc<Server>,
    address: SocketAddr,
    /// What every URL begins with, `http://127.0.0.1:40123`, or why there are none.
    base: Arc<Mutex<Result<String, String>>>,
    task: JoinHandle<()>,
}

impl Drop for Streaming {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Streaming {
    /// Begins to listen. An address that is in use, or that the node does not have yet, is tried
    /// again in the background: pods do not need it.
    ///
    /// # Errors
    /// [`StreamingError`].
    pub(crate) fn start(config: &StreamingConfig) -> Result<Self, StreamingError> {
        let tls = match &config.tls {
            Some(tls) => Some(acceptor(&tls.certificate, &tls.key)?),
            None => None,
        };
        let (server, address) = (Arc::new(Server::default()), config.address);
        let first = listen(address);
        let base = Arc::new(Mutex::new(Err(String::from("it is starting"))));
        if let Err(error) = &first {
            tracing::error!(%address, %error, "cannot listen on streaming.address; exec, attach and port forwarding fail until a later attempt succeeds");
            *lock(&base) = Err(error.to_string());
        } else if let Ok(listener) = &first {
            note(listener, tls.is_some(), &base);
        }
        let task = tokio::spawn(serve(server.clone(), address, first, tls, base.clone()));
        Ok(Self { server, address, base, task })
    }

    /// The same server for clients that are root on this host, whatever network they are in.
    pub(crate) fn local(&self) -> LocalStreaming {
        LocalStreaming { server: self.server.clone() }
    }

    /// A URL for a client that runs `command` in a container.
    ///
    /// # Errors
    /// [`UrlError`].
    pub(crate) fn exec(
        &self,
        reach: Reach,
        container: Arc<Container>,
        command: Vec<String>,
        wanted: Wanted,
    ) -> Result<String, UrlError> {
        // Unread output of a terminal is discarded; a closed pipe ends its program.
        let run = if reach == Reach::Socket && wanted.terminal { exec::run_detachable } else { exec::run };
        let run = Box::new(move |session| run(container, command, wanted, session));
        self.url(reach, Endpoint::Exec, Task::Command(wanted, run))
    }

    /// A URL for a client that attaches to a container.
    ///
    /// # Errors
    /// [`UrlError`].
    pub(crate) fn attach(
        &self,
        reach: Reach,
        container: Arc<Container>,
        wanted: Wanted,
    ) -> Result<String, UrlError> {
        // `berth run` starts the container when it has connected.
        let joining = (reach == Reach::Socket).then(|| container.expect_client());
        let run = Box::new(move |session| attach::run(container, session, joining));
        self.url(reach, Endpoint::Attach, Task::Command(wanted, run))
    }

    /// A URL for a client that connects to ports of a sandbox: to any, or to `ports` if it cannot
    /// say which.
    ///
    /// # Errors
    /// [`UrlError`].
    pub(crate) fn port_forward(
        &self,
        reach: Reach,
        sandbox: Arc<Sandbox>,
        ports: Vec<u16>,
    ) -> Result<String, UrlError> {
        let connect = Arc::new(move |port| port_forward::connect(sandbox.clone(), port));
        self.url(reach, Endpoint::PortForward, Task::Forward(connect, ports))
    }

    fn url(&self, reach: Reach, endpoint: Endpoint, task: Task) -> Result<String, UrlError> {
        let base = match reach {
            Reach::Address => lock(&self.base)
                .clone()
                .map_err(|error| UrlError::NotListening { address: self.address, error })?,
            Reach::Socket => LOCAL_BASE.to_owned(),
        };
        let token = self.server.tokens().insert(endpoint, task)?;
        Ok(format!("{base}/{}/{token}", endpoint.name()))
    }
}

/// What URLs begin with for clients of the local socket: none connects to it.
const LOCAL_BASE: &str = "http://localhost:80";

/// The mode of the local socket's file.
const LOCAL_MODE: u32 = 0o600;

/// What is served on the local socket.
#[derive(Debug)]
pub(crate) struct LocalStreaming {
    server: Arc<Server>,
}

impl LocalStreaming {
    /// Begins to listen at `path`, over whatever is there.
    ///
    /// # Errors
    /// [`FileError`].
    pub(crate) fn listen(self, path: &Path) -> Result<LocalSocket, FileError> {
        let listener = listener::bind(path, LOCAL_MODE)?;
        let task = tokio::spawn(self.server.serve_local(listener, listener::is_root));
        Ok(LocalSocket { path: path.to_owned(), task })
    }
}

/// A local socket that is served. Dropping it removes the file.
#[derive(Debug)]
pub(crate) struct LocalSocket {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        self.task.abort();
        // A client that sees no file knows that nothing is listening.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Notes that URLs can be given out.
fn note(listener: &TcpListener, tls: bool, base: &Mutex<Result<String, String>>) {
    let scheme = if tls { "https" } else { "http" };
    *lock(base) = match listener.local_addr() {
        Ok(address) => {
            tracing::info!(%address, scheme, "streaming server is listening");
            Ok(format!("{scheme}://{address}"))
        }
        Err(error) => Err(error.to_string()),
    };
}

/// Serves as soon as the address can be listened on.
async fn serve(
    server: Arc<Server>,
    address: SocketAddr,
    first: io::Result<TcpListener>,
    tls: Option<TlsAcceptor>,
    base: Arc<Mutex<Result<String, String>>>,
) {
    let mut pause = FIRST_PAUSE;
    let mut listener = first.ok();
    let listener = loop {
        if let Some(listener) = listener {
            break listener;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        listener = match listen(address) {
            Ok(listener) => {
                note(&listener, tls.is_some(), &base);
                Some(listener)
            }
            Err(error) => {
                *lock(&base) = Err(error.to_string());
                None
            }
        };
    };
    match tls {
        Some(acceptor) => {
            server.serve(listener, move |stream| acceptor.accept(stream), socket::unacknowledged).await;
        }
        None => {
            server.serve(listener, |stream| std::future::ready(Ok(stream)), socket::unacknowledged).await;
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A daemon that follows another on a fixed port must not wait for the connections of before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, StreamingError> {
    let pem = |path: &Path| {
        let path = path.to_owned();
        move |source| StreamingError::Pem { path, source }
    };
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect).map_err(pem(certificate))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(pem(key))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(StreamingError::Tls)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
