//! Port forwarding: connections into the network of a sandbox.
//!
//! A socket belongs to the network namespace of the thread that makes it, wherever it is used
//! (network_namespaces(7)). So a separate thread enters the sandbox's namespace and makes a socket;
//! connecting it and all that follows is the async runtime's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_model::security::NamespaceMode;
use berth_model::state::SandboxState;
use berth_streaming::command::BoxFuture;
use berth_sys::ns::{self, Kind};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use crate::sandbox::Sandbox;

/// How long a connection may take: one to a listener whose queue is full is tried again by the
/// kernel for minutes.
const CONNECT: Duration = Duration::from_secs(10);

/// Where programs of a pod listen that are meant for this, in the order in which they are tried.
const ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// Connects to `port` on the loopback interface of a sandbox. An error is in words, for the client.
pub(super) fn connect(sandbox: Arc<Sandbox>, port: u16) -> BoxFuture<Result<TcpStream, String>> {
    Box::pin(async move {
        if sandbox.state() != SandboxState::Ready {
            return Err(format!("forward port {port}: sandbox {} is not ready", sandbox.id()));
        }
        let hosts = sandbox.config().namespaces.network == NamespaceMode::Node;
        let namespace = (!hosts).then(|| sandbox.files().namespace(Kind::Network.file_name()));
        let mut reasons = Vec::new();
        for address in ADDRESSES.map(|address| SocketAddr::new(address, port)) {
            match connect_to(namespace.clone(), address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => reasons.push(format!("{address}: {error}")),
            }
        }
        Err(format!("forward port {port} in sandbox {}: connect to {}", sandbox.id(), reasons.join("; ")))
    })
}

async fn connect_to(namespace: Option<PathBuf>, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = match namespace {
        None => make_socket(address)?,
        Some(namespace) => tokio::task::spawn_blocking(move || make_inside(&namespace, address))
            .await
            .map_err(io::Error::other)??,
    };
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(address);
    let stream = tokio::time::timeout(CONNECT, connecting).await.map_err(|_| io::ErrorKind::TimedOut)??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn make_inside(namespace: &Path, address: SocketAddr) -> io::Result<Socket> {
    let namespace = ns::open(namespace)?;
    ns::on_own_thread("port-forward", || {
        ns::join(namespace.as_fd(), Kind::Network.flag())?;
        make_socket(address)
    })?
}

fn make_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
