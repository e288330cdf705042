//! `berth port-forward`: forwards ports on this machine's loopback to ports of a pod.
//!
//! Each connection gets its own URL from the daemon, so that slow readers do not hold up the
//! others, and forwarding continues after a restart of the daemon.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use berth_cri::v1::{PodSandboxState, PortForwardRequest};
use berth_streaming::client::Forwarded;
use berth_streaming::spdy::connection::{Incoming, Outgoing};
use berth_sys::errno::EAFNOSUPPORT;
use futures_util::{FutureExt, TryFutureExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::args::PortForwardArgs;
use crate::daemon::{Daemon, answer, for_streams};
use crate::error::Error;
use crate::names::{Target, pod_name};
use crate::port_spec::PortSpec;
use crate::{output, remote};

/// Bytes read at a time from a connection.
const READ_BYTES: usize = 32 * 1024;

/// How many free IPv4 ports are tried to find one that is free for IPv6, too.
const TRIES: usize = 16;

/// Pause after a failed accept, which usually means that descriptors have run out for a moment.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Why forwarding failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortForwardError {
    /// The pod has ended.
    #[error("cannot forward ports to pod `{0}`: it is stopped")]
    PodIsOver(String),
    /// A local port is not available.
    #[error("cannot listen on {address}: {error}; choose another local port, or any with `:{remote}`")]
    Listen {
        /// The local address.
        address: SocketAddr,
        /// The port in the pod.
        remote: u16,
        /// What the system says.
        error: io::Error,
    },
}

/// The destination of connections.
#[derive(Debug, Clone)]
struct Destination {
    daemon: Daemon,
    pod_id: String,
    pod: String,
    port: u16,
}

/// Listens, prints the addresses, and forwards until interrupted.
///
/// # Errors
/// When there is no such pod, or a port cannot be listened on.
pub(crate) async fn port_forward(daemon: &Daemon, args: &PortForwardArgs) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let pod_id = match inventory.target(&args.pod)? {
        Target::Pod(pod) => &pod.id,
        Target::Container(container) => &container.pod_sandbox_id,
    };
    let pod = inventory.pod(pod_id).map_or(pod_id.as_str(), pod_name).to_owned();
    if inventory.pod(pod_id).is_none_or(|pod| pod.state() != PodSandboxState::SandboxReady) {
        return Err(PortForwardError::PodIsOver(pod).into());
    }
    let mut listeners = Vec::new();
    for spec in &args.ports {
        let to = Destination {
            daemon: daemon.clone(),
            pod_id: pod_id.clone(),
            pod: pod.clone(),
            port: spec.remote,
        };
        for listener in listen(*spec).await? {
            listeners.push((listener, to.clone()));
        }
    }
    // Announced only once all of them listen.
    let mut accepting = JoinSet::new();
    for (listener, to) in listeners {
        if let Ok(address) = listener.local_addr() {
            output::line(format_args!("{address} -> {}:{}", to.pod, to.port))?;
        }
        accepting.spawn(accept(listener, to));
    }
    // They never end.
    while accepting.join_next().await.is_some() {}
    Ok(())
}

/// Listens on both loopback addresses; only on that of IPv4 where there is no IPv6.
async fn listen(spec: PortSpec) -> Result<Vec<TcpListener>, PortForwardError> {
    let bind = async |address: IpAddr, port| {
        let address = SocketAddr::new(address, port);
        let bound = TcpListener::bind(address).await;
        bound.map_err(|error| PortForwardError::Listen { address, remote: spec.remote, error })
    };
    let mut tries = 0;
    loop {
        tries += 1;
        let first = bind(Ipv4Addr::LOCALHOST.into(), spec.local.unwrap_or(0)).await?;
        let Ok(port) = first.local_addr().map(|address| address.port()) else { continue };
        match bind(Ipv6Addr::LOCALHOST.into(), port).await {
            Ok(second) => return Ok(vec![first, second]),
            Err(PortForwardError::Listen { error, .. })
                if matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported)
                    || error.raw_os_error() == Some(EAFNOSUPPORT) =>
            {
                return Ok(vec![first]);
            }
            Err(_) if spec.local.is_none() && tries < TRIES => {}
            Err(error) => return Err(error),
        }
    }
}

async fn accept(listener: TcpListener, to: Destination) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => drop(tokio::spawn(serve(socket, to.clone()))),
            Err(error) => {
                output::remark(format_args!("cannot accept a connection: {error}"));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Forwards one connection, and prints why if that fails.
async fn serve(socket: TcpStream, to: Destination) {
    // Only an optimization.
    let _ = socket.set_nodelay(true);
    let failure = match connect(&to).await {
        Ok(forwarded) => forward(socket, forwarded).await,
        Err(error) => {
            let _ = socket.set_zero_linger();
            Some(error.one_line())
        }
    };
    if let Some(text) = failure {
        output::remark(format_args!(
            "cannot forward a connection to {}:{}: {}",
            to.pod,
            to.port,
            crate::table::printable(&text)
        ));
    }
}

async fn connect(to: &Destination) -> Result<Forwarded, Error> {
    let request = PortForwardRequest { pod_sandbox_id: to.pod_id.clone(), port: vec![i32::from(to.port)] };
    let url =
        answer("forward the port", to.daemon.runtime.clone().port_forward(for_streams(request))).await?.url;
    Ok(remote::forward(&to.daemon, &url, to.port).await?)
}

/// Copies both ways until both have ended. Returns why the pod's side failed, if it did. The local
/// client sees a reset if it has not received everything that the pod sent.
async fn forward(mut socket: TcpStream, forwarded: Forwarded) -> Option<String> {
    let is_whole = AtomicBool::new(false);
    let failure = copy(&mut socket, forwarded, &is_whole).await;
    if !is_whole.into_inner() {
        // A client that is gone needs none.
        let _ = socket.set_zero_linger();
    }
    failure
}

async fn copy(socket: &mut TcpStream, forwarded: Forwarded, is_whole: &AtomicBool) -> Option<String> {
    let Forwarded { incoming, outgoing, mut ending } = forwarded;
    let (from, to) = socket.split();
    let uploading = upload(from, outgoing).map_err(|_| Broken::Here);
    let downloading = download(incoming, to, is_whole).shared();
    let both = (uploading, downloading.clone());
    let copying = async { tokio::try_join!(both.0, both.1) };
    let failure = ending.failure();
    tokio::pin!(copying, failure);
    tokio::select! {
        failure = &mut failure => {
            // Data that the pod sent before its end is still in transit.
            match failure {
                Some(_) => _ = downloading.await,
                None => _ = copying.await,
            }
            failure
        }
        copied = &mut copying => match copied {
            // The connection closes with this function. The pod has received everything when its
            // side ends.
            Ok(_) | Err(Broken::There) => failure.await,
            // A local client that disconnects is not an error.
            Err(Broken::Here) => None,
        },
    }
}

/// Where a connection broke: on the side of the local client or of the pod.
#[derive(Debug, Clone, Copy)]
enum Broken {
    Here,
    There,
}

/// From the client to the pod; its end is passed on.
async fn upload(mut from: ReadHalf<'_>, to: Outgoing) -> io::Result<()> {
    loop {
        let mut buffer = vec![0; READ_BYTES];
        let length = from.read(&mut buffer).await?;
        buffer.truncate(length);
        let sent = if length == 0 { to.finish().await } else { to.send(buffer.into()).await };
        // The pod takes no more.
        if length == 0 || sent.is_err() {
            return Ok(());
        }
    }
}

/// From the pod to the client; its end is passed on.
async fn download(mut from: Incoming, mut to: WriteHalf<'_>, is_whole: &AtomicBool) -> Result<(), Broken> {
    while let Some(bytes) = from.receive().await {
        to.write_all(&bytes).await.map_err(|_| Broken::Here)?;
    }
    if !from.is_finished() {
        return Err(Broken::There);
    }
    is_whole.store(true, Ordering::Relaxed);
    to.shutdown().await.map_err(|_| Broken::Here)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_free_port_is_the_same_for_both_addresses_and_a_taken_one_is_named() {
        let listeners = listen(PortSpec { local: None, remote: 80 }).await.unwrap();
        let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        let port = addresses[0].port();
        assert!(port != 0 && addresses.iter().all(|address| address.port() == port), "{addresses:?}");
        assert!(addresses.iter().all(|address| address.ip().is_loopback()));
        let taken = listen(PortSpec { local: Some(port), remote: 80 }).await.unwrap_err();
        assert!(
            taken.to_string().contains(&port.to_string()) && taken.to_string().contains("`:80`"),
            "{taken}"
        );
    }
}
