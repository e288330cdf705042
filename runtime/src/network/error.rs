//! Why a network operation failed.

use std::io;
use std::path::PathBuf;

/// Why a network operation failed, of any kind of network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The built-in bridge.
    #[error(transparent)]
    Bridge(#[from] berth_network::bridge::Error),
    /// CNI's plugins.
    #[error(transparent)]
    Cni(#[from] berth_cni::NetworkError),
    /// The node's CNI configuration.
    #[error(transparent)]
    CniConfiguration(#[from] berth_cni::DirectoryError),
    /// There is none, and the built-in bridge is not for this node.
    #[error("{0}")]
    NotConfigured(String),
    /// The plugins made no interface that a pod can be reached at.
    #[error("the plugins of CNI network {network} returned no address in the pod")]
    NoAddress {
        /// The network.
        network: String,
    },
    /// A limit of the pod's traffic.
    #[error("annotations[{annotation:?}]: {value:?} is not a quantity from 1k to 1P, in bits per second")]
    Bandwidth {
        /// Its key.
        annotation: &'static str,
        /// Its value.
        value: String,
    },
    /// A port of the host's, and a kind of network that has none to give.
    #[error("config.port_mappings: host ports are not offered by the built-in bridge")]
    HostPorts,
    /// The pod's namespace, where plugins look for it.
    #[error("cannot pin or unpin the pod's network namespace at {}", path.display())]
    Pin {
        /// The place.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Loopback in the pod.
    #[error("cannot bring loopback up in the pod")]
    Loopback(#[source] berth_network::netlink::Error),
    /// The pod's namespace, from inside.
    #[error("cannot open the pod's network namespace")]
    Namespace(#[source] io::Error),
}
