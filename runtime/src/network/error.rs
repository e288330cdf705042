//! Why something with the network failed.

use std::io;

/// Why something with the network failed, of whichever kind it is.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The built-in bridge.
    #[error(transparent)]
    Bridge(#[from] berth_network::bridge::Error),
    /// The pod's namespace, from inside.
    #[error("cannot open the pod's network namespace")]
    Namespace(#[source] io::Error),
}
