//! Why a network operation failed.

use std::io;
use std::path::PathBuf;

use crate::host_paths::HostPathError;

/// Why a network operation failed, of any kind of network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The built-in bridge.
    #[error(transparent)]
    Bridge(#[from] berth_network::bridge::Error),
    /// CNI's plugins, or the directories that they need.
    #[error(transparent)]
    Cni(#[from] HostPathError),
    /// The node's CNI configuration.
    #[error("{0}")]
    CniConfiguration(String),
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
    /// The kubelet's pod CIDR is none.
    #[error("pod_cidr {text:?} {reason}")]
    PodCidr {
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It is none that the built-in bridge can have.
    #[error("the built-in bridge cannot have the pod CIDR {pod_cidr}: {reason}")]
    PodCidrUnusable {
        /// The pod CIDR.
        pod_cidr: String,
        /// Why.
        reason: String,
    },
    /// The file in which it is kept.
    #[error("cannot {action} {}", path.display())]
    PodCidrFile {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
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

impl NetworkError {
    /// Whether a directory does not answer, which may end.
    pub(crate) fn is_silence(&self) -> bool {
        use HostPathError::{Silent, SilentBefore, TooMany, TooManyPlugins};
        matches!(
            self,
            Self::Cni(Silent { .. } | SilentBefore { .. } | TooMany { .. } | TooManyPlugins { .. })
        )
    }
}
