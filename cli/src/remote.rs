//! Connections to the daemon's streaming server, by the URLs that the daemon returns.
//!
//! Only a client of the daemon's socket gets a URL, and its token authorizes the connection. The
//! server is on this machine: on loopback, or on the configured address.

use std::io;

use berth_streaming::client::{self, ClientError, Command, Forwarded, Target};
use berth_streaming::command::Wanted;
use tokio::net::TcpStream;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteError {
    /// The address cannot be reached.
    #[error(
        "cannot connect to the daemon's streaming server at {address}: {error}; run this command on the daemon's host"
    )]
    Connect {
        /// Host and port.
        address: String,
        /// What the system says.
        error: io::Error,
    },
    /// The server uses TLS.
    #[error(
        "the daemon's streaming server at {0} uses TLS, which this command does not support; set \
         streaming.address to a loopback address in the daemon's configuration"
    )]
    Secure(String),
    /// The server, or the connection, failed.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Connects to the command of a URL.
///
/// # Errors
/// [`RemoteError`].
pub(crate) async fn command(url: &str, wanted: Wanted) -> Result<Command, RemoteError> {
    let target = Target::of_url(url)?;
    let io = connect(&target).await?;
    Ok(client::command(io, None, &target, wanted).await?)
}

/// Opens a connection to a port of a pod by a URL.
///
/// # Errors
/// [`RemoteError`].
pub(crate) async fn forward(url: &str, port: u16) -> Result<Forwarded, RemoteError> {
    let target = Target::of_url(url)?;
    let io = connect(&target).await?;
    Ok(client::forward(io, None, &target, port).await?)
}

/// Connects. The end of the server's side is not watched for while reading: it may come before
/// everything is read, and the data sent before it is wanted.
async fn connect(target: &Target) -> Result<TcpStream, RemoteError> {
    if target.is_secure {
        return Err(RemoteError::Secure(target.authority.clone()));
    }
    let failed = |error| RemoteError::Connect { address: target.authority.clone(), error };
    let io = TcpStream::connect(&target.authority).await.map_err(failed)?;
    // Only an optimization.
    let _ = io.set_nodelay(true);
    Ok(io)
}
