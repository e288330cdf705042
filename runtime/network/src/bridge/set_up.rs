//! Creates the bridge, or takes over an existing one; and removes it.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::links::find_link;
use super::{Bridge, Error, REMOVERS, lock, node};
use crate::addresses::AddressStore;
use crate::config::{BridgeConfig, Subnets};
use crate::host_ports::HostPort;
use crate::netlink::Netlink;
use crate::{firewall, forwarding, identity, nft};

/// How long the kernel may take to remove the links of pods that have gone, and how often to look.
/// It ends namespaces many at a time.
const GOING: Duration = Duration::from_secs(10);
const GOING_PAUSE: Duration = Duration::from_millis(20);

/// What is known of a sandbox that may have an interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Known {
    /// The addresses that it has.
    pub addresses: Vec<IpAddr>,
    /// The ports of the node that lead to it.
    pub host_ports: Vec<HostPort>,
}

impl Bridge {
    /// [`Bridge::set_up_for`] no sandboxes.
    ///
    /// # Errors
    /// As [`Bridge::set_up_for`].
    pub fn set_up(config: BridgeConfig, address_directory: &Path) -> Result<Self, Error> {
        Self::set_up_for(config, address_directory, &BTreeMap::new())
    }

    /// Creates the bridge, its addresses, the firewall tables, and turns forwarding on if allowed;
    /// or takes over what exists. To be called on a thread in the node's network namespace. Runs
    /// `nft` once.
    ///
    /// `address_directory` is the parent of the bridge's own directory of address records,
    /// `<address_directory>/<bridge name>`. `sandboxes` are those of the caller that may have an
    /// interface, each with the addresses that it is known to use: lost records are restored from
    /// them.
    ///
    /// # Errors
    /// [`Error::BridgeShared`], and then nothing was changed; [`Error::BridgeTaken`],
    /// [`Error::SubnetTaken`], [`Error::Node`], [`Error::Addresses`], [`Error::Firewall`],
    /// [`Error::Forwarding`]. What was created before the failure stays; another set-up continues
    /// from there.
    pub fn set_up_for(
        config: BridgeConfig,
        address_directory: &Path,
        sandboxes: &BTreeMap<String, Known>,
    ) -> Result<Self, Error> {
        let subnets = usable(config.subnets());
        let BridgeConfig { name, mtu, forwarding, non_masquerade, ipv4: _, ipv6: _ } = config;
        let directory = address_directory.join(name.as_str());
        let addresses = AddressStore::open(&directory, &subnets.ranges())
            .map_err(|source| Error::Addresses { source })?;
        let removers = (0..REMOVERS).map(|_| Netlink::open().map(Mutex::new)).collect::<Result<_, _>>();
        let bridge = Self {
            name,
            mtu,
            forwarding,
            non_masquerade,
            subnets: RwLock::new(subnets),
            addresses,
            node: Mutex::new(Netlink::open().map_err(node)?),
            removers: removers.map_err(node)?,
            next_remover: AtomicUsize::new(0),
            netfilter: Mutex::new(Netlink::open_netfilter().map_err(node)?),
            conntrack: Mutex::new(Netlink::open_netfilter().map_err(node)?),
            index: AtomicU32::new(0),
            former: Mutex::default(),
            released: Mutex::default(),
            host_ports: Mutex::default(),
            chain_uses: Mutex::default(),
        };
        bridge.restore_addresses(sandboxes)?;
        bridge.refuse_strangers(sandboxes)?;
        bridge.restore_host_ports(sandboxes);
        bridge.repair()?;
        Ok(bridge)
    }

    /// Gives new pods addresses in other networks. Pods keep theirs, and the bridge the gateway
    /// addresses that they need. To be called on a thread in the node's network namespace. Runs
    /// `nft` once.
    ///
    /// # Errors
    /// As [`Bridge::set_up`]. With [`Error::SubnetTaken`], [`Error::SubnetWithin`] and
    /// [`Error::GatewayTaken`] nothing was changed, otherwise [`Bridge::repair`] completes it.
    pub fn change_subnets(&self, subnets: Subnets) -> Result<(), Error> {
        let subnets = usable(subnets);
        if subnets == self.subnets() {
            return Ok(());
        }
        let mut netlink = lock(&self.node);
        let present = find_link(&mut netlink, self.name.as_str()).map_err(node)?;
        self.refuse_taken_subnet(&mut netlink, subnets, present.map(|link| link.index))?;
        drop(netlink);
        {
            let mut current = self.subnets.write().unwrap_or_else(PoisonError::into_inner);
            // A pod may have been given one meanwhile.
            self.refuse_taken_gateways(subnets)?;
            let kept = lock(&self.former).clone();
            let gateways = kept.into_iter().chain(current.gateways()).chain(subnets.gateways());
            self.addresses.reserve(gateways.map(|gateway| gateway.address));
            self.addresses.change_ranges(&subnets.ranges());
            *current = subnets;
        }
        self.repair()
    }

    /// Restores the address records of sandboxes that have an interface and lack them.
    fn restore_addresses(&self, sandboxes: &BTreeMap<String, Known>) -> Result<(), Error> {
        if sandboxes.is_empty() {
            return Ok(());
        }
        let links = self.pod_links(&mut lock(&self.node))?;
        let links: HashSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
        for (id, sandbox) in sandboxes {
            let interface = self.host_interface(id)?;
            if links.contains(interface.as_str()) {
                let known = |owner: &str| sandboxes.contains_key(owner);
                self.addresses
                    .restore(id, &sandbox.addresses, known)
                    .map_err(|source| Error::Addresses { source })?;
            }
        }
        Ok(())
    }

    /// Remembers the host ports of the sandboxes that have addresses.
    fn restore_host_ports(&self, sandboxes: &BTreeMap<String, Known>) {
        let mut host_ports = lock(&self.host_ports);
        for (id, sandbox) in sandboxes {
            if !self.addresses.of(id).is_empty() {
                // They were taken without a conflict once; of two that are in conflict now, because
                // a record was changed, the first has them.
                let _ = host_ports.take(id, &sandbox.host_ports);
            }
        }
    }

    /// Refuses a bridge with pods when no address of any is recorded, and none of them is the
    /// caller's: a second daemon would assign their addresses again. It waits for the links of pods
    /// that have just ended.
    fn refuse_strangers(&self, sandboxes: &BTreeMap<String, Known>) -> Result<(), Error> {
        let own: HashSet<String> =
            sandboxes.keys().filter_map(|id| identity::host_interface(&self.name, id)).collect();
        let end = Instant::now() + GOING;
        loop {
            if self.addresses.taken() > 0 {
                return Ok(());
            }
            let links = self.pod_links(&mut lock(&self.node))?;
            if links.iter().any(|link| own.contains(&link.name)) {
                return Ok(());
            }
            match links.into_iter().next() {
                None => return Ok(()),
                Some(link) if Instant::now() >= end => {
                    return Err(Error::BridgeShared { name: self.name.to_string(), interface: link.name });
                }
                Some(_) => std::thread::sleep(GOING_PAUSE),
            }
        }
    }

    /// Removes the bridge, the firewall tables and the directory of address records. The forwarding
    /// sysctls stay as they are: others may have come to rely on them. Runs `nft` once.
    ///
    /// [`Error::InUse`], and then nothing was removed; otherwise the first failure, after
    /// everything was tried.
    pub fn tear_down(self) -> Result<(), Error> {
        // What cannot be cleared is still in use.
        let _ = self.clear(Duration::ZERO);
        let taken = self.addresses.taken();
        if taken != 0 {
            return Err(Error::InUse { addresses: taken });
        }
        let link = self.remove_link(self.name.as_str()).map_err(node);
        let firewall =
            nft::apply(&firewall::rules::removal(&self.name)).map_err(|source| Error::Firewall { source });
        let directory = self.addresses.remove().map_err(|source| Error::Addresses { source });
        link.and(firewall).and(directory)
    }
}

/// Without IPv6 where the host has none.
fn usable(subnets: Subnets) -> Subnets {
    Subnets { ipv6: subnets.ipv6.filter(|_| forwarding::has_ipv6()), ..subnets }
}
