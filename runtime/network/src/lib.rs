//! The built-in bridge network, which gives a pod its addresses. CNI configuration is ignored.
//!
//! One Linux bridge per node, one veth pair per pod, IPv4 and (when the host has it) IPv6,
//! masquerading by nftables towards everything outside the pods' subnets. `docs/network.md` lists
//! what appears on a host and how to remove it by hand.
//!
//! | module | subject |
//! |---|---|
//! | [`bridge`] | the driver: set up, attach, detach, repair, reconcile, tear down |
//! | [`config`] | the checked settings |
//! | [`addresses`] | which sandbox owns which address: one file each |
//! | [`netlink`] | a synchronous rtnetlink socket |
//! | [`interfaces`] | traffic counters of a network namespace |
//! | [`nft`] | running the `nft` program |
//! | [`firewall`] | masquerading, host ports and what pods must not send: rules as text, elements of sets by netlink, tracked connections |
//! | [`host_ports`] | which sandbox has which port of the node |
//! | [`forwarding`] | the host's forwarding sysctls |
//! | `bridged` | the kernel's module that shows bridged packets to the firewall |
//! | [`identity`] | interface names and MAC addresses, derived rather than stored |
//!
//! Everything blocks and nothing changes a thread's namespaces: the caller enters a pod's network
//! namespace on its own thread, calls [`bridge::open_in_pod`] there, and hands the socket over.
//!
//! Not here: creating and pinning network namespaces, CNI plugins, network policy.
#![forbid(unsafe_code)]

pub mod addresses;
pub mod bridge;
mod bridged;
pub mod config;
pub mod firewall;
pub mod forwarding;
pub mod host_ports;
pub mod identity;
pub mod interfaces;
pub mod netlink;
pub mod nft;

pub use bridge::{Attachment, Bandwidth, Bridge, Dead, Known};
pub use config::BridgeConfig;
pub use host_ports::{HostPort, Protocol};
pub use netlink::Netlink;
