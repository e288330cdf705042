//! The networks that a cluster has given to this node's pods, as the kubelet names them in
//! `UpdateRuntimeConfig`. It does so once, when the node gets them, and not again for a daemon that
//! has started anew: they are kept on disk.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use berth_network::BridgeConfig;
use berth_network::config::{self, Subnets};
use ipnet::IpNet;

use super::NetworkError;
use crate::config::ConfiguredSubnets;
use crate::{atomic_file, lock};

/// No name of a bridge has a dot, so no directory of address records is in the way.
const FILE: &str = "pod.cidr";

/// The node's pod CIDR, once it is known.
#[derive(Debug)]
pub(super) struct PodCidr {
    path: PathBuf,
    networks: Mutex<Vec<IpNet>>,
}

impl PodCidr {
    /// What was kept in the directory of the network's records.
    ///
    /// # Errors
    /// When that cannot be read now. What is damaged counts as none.
    pub(super) fn open(records: &Path) -> Result<Self, NetworkError> {
        let path = records.join(FILE);
        let networks = match std::fs::read_to_string(&path) {
            Ok(text) => parse(text.trim_end()).unwrap_or_else(|error| {
                tracing::warn!(%error, path = %path.display(), "the pod CIDR that was kept is damaged; the kubelet's next start brings it again");
                Vec::new()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(NetworkError::PodCidrFile { action: "read", path, source }),
        };
        Ok(Self { path, networks: Mutex::new(networks) })
    }

    /// One network, or one of each family, the main one first; none as long as it is not known.
    pub(super) fn networks(&self) -> Vec<IpNet> {
        lock(&self.networks).clone()
    }

    /// Keeps it, for later daemons too.
    pub(super) fn set(&self, networks: &[IpNet]) -> Result<(), NetworkError> {
        let mut current = lock(&self.networks);
        if *current == networks {
            return Ok(());
        }
        let text: Vec<String> = networks.iter().map(ToString::to_string).collect();
        let write = || {
            if let Some(directory) = self.path.parent() {
                std::fs::create_dir_all(directory)?;
            }
            atomic_file::write(&self.path, format!("{}\n", text.join(",")).as_bytes())
        };
        write().map_err(|source| NetworkError::PodCidrFile {
            action: "write",
            path: self.path.clone(),
            source,
        })?;
        networks.clone_into(&mut current);
        Ok(())
    }
}

/// Reads the kubelet's text: the node's `spec.podCIDRs`, separated by commas.
///
/// # Errors
/// [`NetworkError::PodCidr`].
pub(super) fn parse(text: &str) -> Result<Vec<IpNet>, NetworkError> {
    let fail = |reason| NetworkError::PodCidr { text: text.to_owned(), reason };
    let mut networks: Vec<IpNet> = Vec::new();
    for part in text.split(',').map(str::trim) {
        let network: IpNet = part.parse().map_err(|_| fail("is not a list of networks"))?;
        if network.addr() != network.network() {
            return Err(fail("has bits set after a prefix"));
        }
        if networks.iter().any(|other| other.addr().is_ipv4() == network.addr().is_ipv4()) {
            return Err(fail("has two networks of one family"));
        }
        networks.push(network);
    }
    Ok(networks)
}

/// The networks of the bridge: the configured ones, else those of the pod CIDR, else the default.
///
/// # Errors
/// [`NetworkError::PodCidrUnusable`] if the bridge cannot have those of the pod CIDR.
pub(super) fn subnets(configured: ConfiguredSubnets, pod_cidr: &[IpNet]) -> Result<Subnets, NetworkError> {
    let defaults = BridgeConfig::default().subnets();
    let fail = |reason: String| NetworkError::PodCidrUnusable { pod_cidr: show(pod_cidr), reason };
    let of_family = |is_ipv4: bool| pod_cidr.iter().find(|network| network.addr().is_ipv4() == is_ipv4);
    let ipv4 = match (configured.ipv4, of_family(true)) {
        (Some(ipv4), _) => ipv4,
        (None, Some(network)) => {
            network.to_string().parse().map_err(|error: config::Error| fail(error.to_string()))?
        }
        (None, None) if pod_cidr.is_empty() => defaults.ipv4,
        (None, None) => return Err(fail("the built-in bridge has no network without IPv4".to_owned())),
    };
    let ipv6 = match (configured.ipv6, of_family(false)) {
        (Some(ipv6), _) => ipv6,
        (None, Some(network)) => {
            Some(network.to_string().parse().map_err(|error: config::Error| fail(error.to_string()))?)
        }
        // A cluster without IPv6.
        (None, None) if !pod_cidr.is_empty() => None,
        (None, None) => defaults.ipv6,
    };
    Ok(Subnets { ipv4, ipv6 })
}

fn show(networks: &[IpNet]) -> String {
    networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
