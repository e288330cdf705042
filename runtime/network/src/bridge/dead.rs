//! Remains of sandboxes that are gone.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use super::{Bridge, Error, lock, node};
use crate::firewall::Port;
use crate::identity;

/// What [`Bridge::reconcile`] found and removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reconciled {
    /// Addresses whose owners are dead.
    pub addresses: Vec<IpAddr>,
    /// Host interfaces whose sandboxes are dead.
    pub interfaces: Vec<String>,
}

/// The remains of dead sandboxes: [`Bridge::dead`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dead {
    /// Host interfaces.
    interfaces: Vec<String>,
    /// Addresses by their owners.
    owners: BTreeMap<String, Vec<IpAddr>>,
}

impl Bridge {
    /// Removes interfaces and frees addresses of all sandboxes that are not among the living.
    /// Sandboxes that are being created must be among them, so this is for startup, or for a time
    /// when no new ones can be created.
    ///
    /// # Errors
    /// The first failure, after everything was tried.
    pub fn reconcile<'a>(&self, living: impl IntoIterator<Item = &'a str>) -> Result<Reconciled, Error> {
        self.remove_dead(&self.dead(living)?)
    }

    /// The remains of sandboxes that are not among the living, for [`Bridge::remove_dead`] at a
    /// later time, when there may be new ones.
    ///
    /// # Errors
    /// [`Error::Node`].
    pub fn dead<'a>(&self, living: impl IntoIterator<Item = &'a str>) -> Result<Dead, Error> {
        let living: HashSet<&str> = living.into_iter().collect();
        let kept: HashSet<String> =
            living.iter().filter_map(|id| identity::host_interface(&self.name, id)).collect();
        let links = self.pod_links(&mut lock(&self.node))?;
        let interfaces = links.into_iter().map(|link| link.name).filter(|name| !kept.contains(name));
        Ok(Dead { interfaces: interfaces.collect(), owners: self.addresses.dead(&living) })
    }

    /// Removes the interfaces, permissions and addresses of dead sandboxes.
    ///
    /// # Errors
    /// The first failure, after everything was tried.
    pub fn remove_dead(&self, dead: &Dead) -> Result<Reconciled, Error> {
        let mut result = Reconciled::default();
        let mut failure = None;
        for interface in &dead.interfaces {
            match self.remove_link(interface) {
                Ok(()) => result.interfaces.push(interface.clone()),
                Err(error) => failure = failure.or(Some(node(error))),
            }
        }
        for (id, addresses) in &dead.owners {
            // Without a valid owner the firewall never let it through.
            if let Some(interface) = identity::host_interface(&self.name, id) {
                let host_ports = lock(&self.host_ports).of(id);
                let port = Port { interface, addresses: addresses.clone(), host_ports };
                if let Err(error) = self.withdraw(lock(&self.netfilter), id, &port) {
                    failure = failure.or(Some(error));
                    continue;
                }
            }
            match self.addresses.free_of(id, addresses) {
                Ok(addresses) => result.addresses.extend(addresses),
                Err(source) => failure = failure.or(Some(Error::Addresses { source })),
            }
        }
        failure.map_or(Ok(result), Err)
    }
}
