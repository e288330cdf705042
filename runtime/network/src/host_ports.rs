//! Ports of the node that lead to pods: which pod has which.
//!
//! They are kept in memory only. A daemon that starts takes them from the records of its sandboxes.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// A transport protocol that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Its number in an IP header (`netinet/in.h`).
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A port of the node that leads to a port of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPort {
    /// Of both ports.
    pub protocol: Protocol,
    /// The address of the node that it is on. `None`: every address of both families; an
    /// unspecified address (`0.0.0.0`, `::`): every address of its family.
    pub address: Option<IpAddr>,
    /// The port on the node, not 0.
    pub host_port: u16,
    /// The port in the pod, not 0.
    pub container_port: u16,
}

impl HostPort {
    /// The one address of the node that it is on; `None` for all.
    pub(crate) fn bound_to(&self) -> Option<IpAddr> {
        self.address.filter(|address| !address.is_unspecified())
    }

    /// Whether it leads to this address of its pod: one of the same family.
    pub(crate) fn leads_to(&self, pod: IpAddr) -> bool {
        self.address.is_none_or(|address| address.is_ipv4() == pod.is_ipv4())
    }

    /// Whether a packet could be meant for either.
    fn overlaps(&self, other: &Self) -> bool {
        let addresses = match (self.address, other.address) {
            (Some(one), Some(other)) => {
                one == other
                    || one.is_ipv4() == other.is_ipv4() && (one.is_unspecified() || other.is_unspecified())
            }
            _ => true,
        };
        addresses && self.protocol == other.protocol && self.host_port == other.host_port
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(formatter, "[{address}]:")?,
            Some(address) => write!(formatter, "{address}:")?,
            None => {}
        }
        write!(formatter, "{}/{}", self.host_port, self.protocol)
    }
}

/// Why a sandbox does not get its host ports.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Another sandbox has one.
    #[error("host port {port} is in use by sandbox {owner}")]
    Taken {
        /// The port.
        port: HostPort,
        /// The other sandbox.
        owner: String,
    },
    /// Two of its own are for the same packets.
    #[error("host port {port} is requested twice")]
    Twice {
        /// The second of them.
        port: HostPort,
    },
}

/// The host ports in use.
#[derive(Debug, Default)]
pub(crate) struct HostPorts {
    by_number: BTreeMap<(Protocol, u16), Vec<(HostPort, String)>>,
    by_owner: BTreeMap<String, Vec<HostPort>>,
}

impl HostPorts {
    /// Gives a sandbox all of these ports, or none. It has no others.
    pub(crate) fn take(&mut self, sandbox_id: &str, ports: &[HostPort]) -> Result<(), Conflict> {
        for (index, port) in ports.iter().enumerate() {
            let there = self.by_number.get(&(port.protocol, port.host_port)).into_iter().flatten();
            if let Some((_, owner)) = there.clone().find(|(other, _)| port.overlaps(other)) {
                let owner = owner.clone();
                self.free(sandbox_id);
                return Err(if owner == sandbox_id {
                    Conflict::Twice { port: *port }
                } else {
                    Conflict::Taken { port: *port, owner }
                });
            }
            if index == 0 {
                self.by_owner.insert(sandbox_id.to_owned(), ports.to_vec());
            }
            let numbered = self.by_number.entry((port.protocol, port.host_port)).or_default();
            numbered.push((*port, sandbox_id.to_owned()));
        }
        Ok(())
    }

    /// The ports of a sandbox.
    pub(crate) fn of(&self, sandbox_id: &str) -> Vec<HostPort> {
        self.by_owner.get(sandbox_id).cloned().unwrap_or_default()
    }

    /// Whether no sandbox has any.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_owner.is_empty()
    }

    /// Frees the ports of a sandbox.
    pub(crate) fn free(&mut self, sandbox_id: &str) {
        for port in self.by_owner.remove(sandbox_id).unwrap_or_default() {
            let key = (port.protocol, port.host_port);
            let Some(numbered) = self.by_number.get_mut(&key) else { continue };
            numbered.retain(|(_, owner)| owner != sandbox_id);
            if numbered.is_empty() {
                self.by_number.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str, number: u16) -> HostPort {
        let address = (!text.is_empty()).then(|| text.parse().unwrap());
        HostPort { protocol: Protocol::Tcp, address, host_port: number, container_port: 80 }
    }

    #[test]
    fn ports_for_the_same_packets_are_given_once() {
        let same = [
            ("", ""),
            ("", "0.0.0.0"),
            ("", "::"),
            ("", "192.0.2.1"),
            ("0.0.0.0", "192.0.2.1"),
            ("::", "2001:db8::1"),
            ("192.0.2.1", "192.0.2.1"),
        ];
        for (one, other) in same {
            for (one, other) in [(one, other), (other, one)] {
                let mut ports = HostPorts::default();
                ports.take("a", &[port(one, 80)]).unwrap();
                let error = ports.take("b", &[port("", 81), port(other, 80)]).unwrap_err();
                assert!(matches!(&error, Conflict::Taken { owner, .. } if owner == "a"), "{error}");
                // None of them was kept.
                ports.take("c", &[port("", 81)]).unwrap();
                ports.free("a");
                ports.take("b", &[port(other, 80)]).unwrap();
                assert_eq!(ports.of("b"), [port(other, 80)]);
            }
        }
    }

    #[test]
    fn ports_for_different_packets_are_independent() {
        let mut ports = HostPorts::default();
        ports.take("a", &[port("0.0.0.0", 80), port("2001:db8::1", 80), port("", 81)]).unwrap();
        ports.take("b", &[port("2001:db8::2", 80)]).unwrap();
        ports.take("c", &[HostPort { protocol: Protocol::Udp, ..port("", 80) }]).unwrap();
        for owner in ["a", "b", "c"] {
            ports.free(owner);
        }
        assert!(ports.is_empty() && ports.by_number.is_empty());
    }

    #[test]
    fn one_sandbox_asks_for_a_port_once() {
        let mut ports = HostPorts::default();
        let error = ports.take("a", &[port("", 80), port("192.0.2.1", 80)]).unwrap_err();
        assert_eq!(error.to_string(), "host port 192.0.2.1:80/TCP is requested twice");
        assert!(ports.is_empty() && ports.by_number.is_empty());
    }
}
