//! Connections to the daemon's streaming server, by the URLs that it answers with.
//!
//! Only who may use the daemon's socket gets a URL, and its token is the key to what it is for. The server is
//! on this machine: on loopback, or on the address of the configuration.

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
    /// TLS would be needed.
    #[error(
        "the daemon's streaming server at {0} uses TLS, which this command does not support; set \
         streaming.address to a loopback address in the daemon's configuration"
    )]
    Secure(String),
    /// The server, or the connection, failed.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Runs or joins the command of a URL.
///
/// # Errors
/// [`RemoteError`].
pub(crate) async fn command(url: &str, wanted: Wanted) -> Result<Command, RemoteError> {
    let target = Target::of_url(url)?;
    let io = connect(&target).await?;
    Ok(client::command(io, None, &target, wanted).await?)
}

/// Opens a connection to a port of the pod of a URL.
///
/// # Errors
/// [`RemoteError`].
pub(crate) async fn forward(url: &str, port: u16) -> Result<Forwarded, RemoteError> {
    let target = Target::of_url(url)?;
    let io = connect(&target).await?;
    Ok(client::forward(io, None, &target, port).await?)
}

/// Connects. The end of the server's side is not watched for beside the reading: it may come before all is
/// read, and what was sent before it is wanted.
async fn connect(target: &Target) -> Result<TcpStream, RemoteError> {
    if target.is_secure {
        return Err(RemoteError::Secure(target.authority.clone()));
    }
    let failed = |error| RemoteError::Connect { address: target.authority.clone(), error };
    let io = TcpStream::connect(&target.authority).await.map_err(failed)?;
    // Only makes it quicker.
    let _ = io.set_nodelay(true);
    Ok(io)
}
