//! What went through the network namespaces of pods, counted by the kernel.
//!
//! A namespace is looked at from inside: one thread, which is made for a list of them and ends
//! after it, goes from one into the next by the files that pin them. No thread that serves anything
//! else changes its namespace, and no socket keeps a namespace alive beyond the look.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use berth_network::Netlink;
use berth_network::interfaces::{self, InterfaceCounters};
use berth_sys::ns::{self, Kind};

use crate::network::MAIN_INTERFACE;

/// The number of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`,
/// `net/flow.h`).
const LOOPBACK: u32 = 1;

/// The counters of one pod's interfaces, loopback left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// The interface that CRI calls the default one: `eth0`, else the first.
    pub(crate) main: InterfaceCounters,
    /// The others.
    pub(crate) others: Vec<InterfaceCounters>,
}

impl Traffic {
    /// Nothing for a namespace with loopback only.
    fn of(mut interfaces: Vec<InterfaceCounters>) -> Option<Self> {
        interfaces.retain(|interface| interface.index != LOOPBACK);
        if interfaces.is_empty() {
            return None;
        }
        let main = interfaces.iter().position(|interface| interface.name == MAIN_INTERFACE);
        let main = interfaces.remove(main.unwrap_or(0));
        Some(Self { main, others: interfaces })
    }
}

/// The traffic of the namespaces that these files pin, in their order; nothing for one that is gone
/// or has no network. Blocking.
pub(crate) fn of_namespaces(files: &[PathBuf]) -> Vec<Option<Traffic>> {
    if files.is_empty() {
        return Vec::new();
    }
    let look = || files.iter().map(|file| of_namespace(file)).collect();
    ns::on_own_thread("traffic", look).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot start a thread to count the traffic of pods");
        vec![None; files.len()]
    })
}

/// To be called on its own thread. A pod may go at any moment, so what fails is nothing to tell.
fn of_namespace(file: &Path) -> Option<Traffic> {
    let namespace = ns::open(file).ok()?;
    ns::join(namespace.as_fd(), Kind::Network.flag()).ok()?;
    Traffic::of(interfaces::counters(Netlink::open().ok()?).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, name: &str) -> InterfaceCounters {
        InterfaceCounters {
            name: name.to_owned(),
            index,
            rx_bytes: 0,
            rx_packets: 0,
            rx_errors: 0,
            rx_dropped: 0,
            tx_bytes: 0,
            tx_packets: 0,
            tx_errors: 0,
            tx_dropped: 0,
        }
    }

    #[test]
    fn eth0_is_the_default_interface_and_loopback_is_none() {
        for (interfaces, expected) in [
            (vec![(1, "lo"), (2, "eth0"), (3, "net1")], Some(("eth0", vec!["net1"]))),
            (vec![(1, "lo"), (2, "net1"), (3, "eth0")], Some(("eth0", vec!["net1"]))),
            (vec![(1, "lo"), (7, "net1"), (8, "net2")], Some(("net1", vec!["net2"]))),
            // Loopback is known by its number: it can be given another name, and another interface
            // its name.
            (vec![(1, "eth0"), (2, "lo")], Some(("lo", vec![]))),
            (vec![(1, "lo")], None),
            (vec![], None),
        ] {
            let traffic =
                Traffic::of(interfaces.iter().map(|(index, name)| interface(*index, name)).collect());
            let found = traffic.as_ref().map(|traffic| {
                let others: Vec<&str> = traffic.others.iter().map(|other| other.name.as_str()).collect();
                (traffic.main.name.as_str(), others)
            });
            assert_eq!(found, expected, "{interfaces:?}");
        }
    }

    #[test]
    fn a_namespace_that_is_gone_has_no_traffic() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("net");
        std::fs::write(&plain, "").unwrap();
        assert_eq!(of_namespaces(&[plain, directory.path().join("absent")]), [None, None]);
        assert!(of_namespaces(&[]).is_empty());
    }
}
