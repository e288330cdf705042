//! The streaming server of the daemon: what Exec and PortForward answer with, and what is done when the
//! client comes.
//!
//! - `exec`: a program in a container on the client's streams;
//! - `port_forward`: connections into the network of a sandbox.
//!
//! The wire is `berth_streaming`'s. It listens on the loopback interface unless the configuration says
//! otherwise; the URL's token is what lets a client in.

mod exec;
mod port_forward;

use crate::config::StreamingConfig;
use crate::container::Container;
use crate::sandbox::Sandbox;
use berth_streaming::command::Wanted;
use berth_streaming::server::Server;
use berth_streaming::tokens::{Endpoint, Task, TokenError};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

/// Connections that wait to be accepted. The kernel takes the smaller of this and `net.core.somaxconn`.
const BACKLOG: u32 = 1024;

/// Why there is no streaming server.
#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    /// The address cannot be listened on.
    #[error("listen on streaming.address {address}")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A certificate or a key cannot be read.
    #[error("read {path}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The certificate and the key cannot be used.
    #[error("use streaming.tls_certificate with streaming.tls_key")]
    Tls(#[source] rustls::Error),
}

/// The server. It ends when this is dropped; what runs on its connections goes on until the daemon ends.
#[derive(Debug)]
pub(crate) struct Streaming {
    server: Arc<Server>,
    /// What every URL begins with: `http://127.0.0.1:40123`.
    base: String,
    task: JoinHandle<()>,
}

impl Drop for Streaming {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Streaming {
    /// Begins to listen.
    ///
    /// # Errors
    /// [`StreamingError`].
    pub(crate) fn start(config: &StreamingConfig) -> Result<Self, StreamingError> {
        let failed = |source| StreamingError::Listen { address: config.address, source };
        let tls = match &config.tls {
            Some(tls) => Some(acceptor(&tls.certificate, &tls.key)?),
            None => None,
        };
        let listener = listen(config.address).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let server = Arc::new(Server::default());
        let (scheme, task) = match tls {
            Some(acceptor) => {
                let secure = move |stream| acceptor.accept(stream);
                ("https", tokio::spawn(server.clone().serve(listener, secure)))
            }
            None => {
                let plain = |stream| std::future::ready(Ok(stream));
                ("http", tokio::spawn(server.clone().serve(listener, plain)))
            }
        };
        tracing::info!(%address, scheme, "streaming server listens");
        Ok(Self { server, base: format!("{scheme}://{address}"), task })
    }

    /// A URL for a client that runs `command` in a container.
    ///
    /// # Errors
    /// [`TokenError`].
    pub(crate) fn exec(
        &self,
        container: Arc<Container>,
        command: Vec<String>,
        wanted: Wanted,
    ) -> Result<String, TokenError> {
        let run = Box::new(move |session| exec::run(container, command, wanted, session));
        self.url(Endpoint::Exec, Task::Command(wanted, run))
    }

    /// A URL for a client that connects to ports of a sandbox.
    ///
    /// # Errors
    /// [`TokenError`].
    pub(crate) fn port_forward(&self, sandbox: Arc<Sandbox>) -> Result<String, TokenError> {
        let connect = Arc::new(move |port| port_forward::connect(sandbox.clone(), port));
        self.url(Endpoint::PortForward, Task::Forward(connect))
    }

    fn url(&self, endpoint: Endpoint, task: Task) -> Result<String, TokenError> {
        let token = self.server.tokens().insert(endpoint, task)?;
        Ok(format!("{}/{}/{token}", self.base, endpoint.name()))
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
