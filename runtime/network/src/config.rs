//! The settings of the built-in network, checked on construction: a [`BridgeConfig`] that exists is
//! usable.
//!
//! The daemon reads them from a file; these are the types that a string has to be parsed into.
//! Because the names and subnets end up inside firewall rules and paths, their character sets are
//! closed: nothing in them ever needs escaping.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;

use crate::addresses::Range;

/// Longest interface name in bytes: `IFNAMSIZ` (16, `linux/if.h`) less the closing NUL.
pub const MAX_INTERFACE_NAME: usize = 15;

/// Smallest MTU accepted: below 1280 the kernel takes IPv6 off an interface (RFC 8200 section 5).
pub const MIN_MTU: u32 = 1280;

/// Largest MTU accepted: what a bridge and a veth take (`ETH_MAX_MTU`, `linux/if_ether.h`).
pub const MAX_MTU: u32 = 65535;

/// Why a setting was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a name that a bridge may have.
    #[error("bridge name {name:?} must be 1 to 15 of the characters a-z A-Z 0-9 _ - and not a reserved word")]
    BridgeName {
        /// The name as given.
        name: String,
    },
    /// Not `address/prefix`.
    #[error("subnet {text:?} does not have the form address/prefix")]
    SubnetForm {
        /// The refused text.
        text: String,
    },
    /// A prefix outside the range that leaves room for a gateway and pods.
    #[error("subnet {text:?}: the prefix must be from {shortest} to {longest}")]
    SubnetPrefix {
        /// The refused text.
        text: String,
        /// Smallest prefix accepted.
        shortest: u8,
        /// Largest prefix accepted.
        longest: u8,
    },
    /// Bits are set to the right of the prefix: probably an address was meant to be a network.
    #[error("subnet {text:?} has bits set after its prefix")]
    SubnetHostBits {
        /// The refused text.
        text: String,
    },
    /// Loopback, link-local, multicast or reserved space.
    #[error("subnet {text:?} is in address space that pods cannot use")]
    SubnetReserved {
        /// The refused text.
        text: String,
    },
    /// Not a usable MTU.
    #[error("mtu {bytes} must be from {MIN_MTU} to {MAX_MTU}")]
    Mtu {
        /// The value as given.
        bytes: u32,
    },
}

/// The name of the bridge interface: 1 to 15 bytes of `[A-Za-z0-9_-]`.
///
/// The kernel allows more (`dev_valid_name`, net/core/dev.c); a dot is left out because a name is
/// also a sysctl path, and `all`, `default` and `lo` because they mean something else there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeName(String);

impl BridgeName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`Error::BridgeName`].
    pub fn new(name: &str) -> Result<Self, Error> {
        let length_fits = (1..=MAX_INTERFACE_NAME).contains(&name.len());
        let characters_fit =
            name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
        // A leading dash would read as an option when a person types the name after `ip link`.
        let reserved = matches!(name, "all" | "default" | "lo") || name.starts_with('-');
        if length_fits && characters_fit && !reserved {
            Ok(Self(name.to_owned()))
        } else {
            Err(Error::BridgeName { name: name.to_owned() })
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for BridgeName {
    /// `berth0`.
    fn default() -> Self {
        Self("berth0".to_owned())
    }
}

impl fmt::Display for BridgeName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl FromStr for BridgeName {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        Self::new(text)
    }
}

/// An address with the length of its network prefix, as an interface carries it. Shown as
/// `10.88.0.2/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InterfaceAddress {
    /// The interface's own address.
    pub address: IpAddr,
    /// Length of the network prefix in bits.
    pub prefix: u8,
}

impl InterfaceAddress {
    /// Whether an address is in the network that this one is in.
    pub(crate) fn is_in_subnet(&self, address: IpAddr) -> bool {
        self.network() == Self { address, prefix: self.prefix }.network()
    }

    /// The network's own address: the bits behind the prefix are 0.
    pub(crate) fn network(&self) -> IpAddr {
        let prefix = u32::from(self.prefix);
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix)).unwrap_or(0);
                IpAddr::V4((u32::from(address) & mask).into())
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128_u32.saturating_sub(prefix)).unwrap_or(0);
                IpAddr::V6((u128::from(address) & mask).into())
            }
        }
    }
}

impl fmt::Display for InterfaceAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.address, self.prefix)
    }
}

/// An IPv4 network for pods, prefix 8 to 30. The first host address is the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Subnet {
    const SHORTEST: u8 = 8;
    /// A /30 has room for the gateway and one pod.
    const LONGEST: u8 = 30;

    /// The network address.
    pub fn network(self) -> Ipv4Addr {
        self.network
    }

    /// Length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The node's own address in the subnet: the first host.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) | 1)
    }

    /// First and last address for pods: neither network, gateway nor broadcast address.
    pub fn pods(self) -> (Ipv4Addr, Ipv4Addr) {
        let network = u32::from(self.network);
        let broadcast = network | (u32::MAX >> self.prefix);
        (Ipv4Addr::from(network + 2), Ipv4Addr::from(broadcast - 1))
    }

    /// Whether an address lies inside.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        (u32::from(address) ^ u32::from(self.network)) >> (32 - self.prefix) == 0
    }
}

impl Default for Ipv4Subnet {
    /// `10.88.0.0/16`.
    fn default() -> Self {
        Self { network: Ipv4Addr::new(10, 88, 0, 0), prefix: 16 }
    }
}

impl fmt::Display for Ipv4Subnet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Ipv4Subnet {
    type Err = Error;

    /// Reads `10.88.0.0/16`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (network, prefix) = split_subnet::<Ipv4Addr>(text, Self::SHORTEST, Self::LONGEST)?;
        if u32::from(network) & (u32::MAX >> prefix) != 0 {
            return Err(Error::SubnetHostBits { text: text.to_owned() });
        }
        // 0/8 "this network", 127/8, 169.254/16, and everything from multicast (224/4) upwards: RFC
        // 6890.
        let first_octet = network.octets()[0];
        if matches!(first_octet, 0 | 127 | 224..=255) || network.is_link_local() {
            return Err(Error::SubnetReserved { text: text.to_owned() });
        }
        Ok(Self { network, prefix })
    }
}

/// An IPv6 network for pods, prefix 64 to 120. The first host address is the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Subnet {
    network: Ipv6Addr,
    prefix: u8,
}

impl Ipv6Subnet {
    const SHORTEST: u8 = 64;
    const LONGEST: u8 = 120;

    /// The network address.
    pub fn network(self) -> Ipv6Addr {
        self.network
    }

    /// Length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The node's own address in the subnet: the first host.
    pub fn gateway(self) -> Ipv6Addr {
        Ipv6Addr::from(u128::from(self.network) | 1)
    }

    /// First and last address for pods. The network address is the subnet-router anycast address
    /// (RFC 4291, 2.6.1).
    pub fn pods(self) -> (Ipv6Addr, Ipv6Addr) {
        let network = u128::from(self.network);
        (Ipv6Addr::from(network + 2), Ipv6Addr::from(network | (u128::MAX >> self.prefix)))
    }

    /// Whether an address lies inside.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        (u128::from(address) ^ u128::from(self.network)) >> (128 - u32::from(self.prefix)) == 0
    }
}

impl Default for Ipv6Subnet {
    /// `fd62:6572:7468::/64`: a unique local prefix (RFC 4193) that is the same on every node. That
    /// is enough, because the addresses are masqueraded and never leave the node.
    fn default() -> Self {
        Self { network: Ipv6Addr::new(0xfd62, 0x6572, 0x7468, 0, 0, 0, 0, 0), prefix: 64 }
    }
}

impl fmt::Display for Ipv6Subnet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Ipv6Subnet {
    type Err = Error;

    /// Reads `fd62:6572:7468::/64`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (network, prefix) = split_subnet::<Ipv6Addr>(text, Self::SHORTEST, Self::LONGEST)?;
        if u128::from(network) & (u128::MAX >> prefix) != 0 {
            return Err(Error::SubnetHostBits { text: text.to_owned() });
        }
        // Only global unicast (2000::/3) and unique local (fc00::/7) addresses may be given to
        // interfaces at will (RFC 4291).
        let first = network.segments()[0];
        if first & 0xe000 != 0x2000 && first & 0xfe00 != 0xfc00 {
            return Err(Error::SubnetReserved { text: text.to_owned() });
        }
        Ok(Self { network, prefix })
    }
}

/// Splits `address/prefix`, with the prefix in plain decimal and within bounds.
fn split_subnet<A: FromStr>(text: &str, shortest: u8, longest: u8) -> Result<(A, u8), Error> {
    let form = || Error::SubnetForm { text: text.to_owned() };
    let (network, prefix) = text.split_once('/').ok_or_else(form)?;
    let network = network.parse::<A>().map_err(|_| form())?;
    if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(form());
    }
    match prefix.parse::<u8>() {
        Ok(prefix) if (shortest..=longest).contains(&prefix) => Ok((network, prefix)),
        _ => Err(Error::SubnetPrefix { text: text.to_owned(), shortest, longest }),
    }
}

/// Largest packet in bytes that an interface carries: [`MIN_MTU`] to [`MAX_MTU`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mtu(u32);

impl Mtu {
    /// Checks a value in bytes.
    ///
    /// # Errors
    /// [`Error::Mtu`].
    pub fn new(bytes: u32) -> Result<Self, Error> {
        if (MIN_MTU..=MAX_MTU).contains(&bytes) { Ok(Self(bytes)) } else { Err(Error::Mtu { bytes }) }
    }

    /// The value in bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }
}

/// The networks that pods get addresses in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnets {
    /// Of the main address.
    pub ipv4: Ipv4Subnet,
    /// Of a second one, if pods have any.
    pub ipv6: Option<Ipv6Subnet>,
}

impl Subnets {
    /// The node's own addresses, IPv4 first.
    pub(crate) fn gateways(self) -> Vec<InterfaceAddress> {
        let ipv4 = InterfaceAddress { address: self.ipv4.gateway().into(), prefix: self.ipv4.prefix() };
        let ipv6 = self
            .ipv6
            .map(|subnet| InterfaceAddress { address: subnet.gateway().into(), prefix: subnet.prefix() });
        std::iter::once(ipv4).chain(ipv6).collect()
    }

    /// The addresses that pods may have, IPv4 first.
    pub(crate) fn ranges(self) -> Vec<Range> {
        let (first, last) = self.ipv4.pods();
        let ipv6 = self.ipv6.map(|subnet| {
            let (first, last) = subnet.pods();
            Range::Ipv6(first, last)
        });
        std::iter::once(Range::Ipv4(first, last)).chain(ipv6).collect()
    }

    /// A pod's address as its interface has it.
    pub(crate) fn with_prefix(self, address: IpAddr) -> InterfaceAddress {
        let prefix = match address {
            IpAddr::V4(_) => self.ipv4.prefix(),
            // An address of a former network may outlive it here; a host route is valid for any.
            IpAddr::V6(_) => self.ipv6.map_or(128, |subnet| subnet.prefix()),
        };
        InterfaceAddress { address, prefix }
    }
}

impl fmt::Display for Subnets {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ipv4.fmt(formatter)?;
        self.ipv6.map_or(Ok(()), |ipv6| write!(formatter, ",{ipv6}"))
    }
}

/// The settings of one bridge network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeConfig {
    /// Name of the bridge interface; the firewall tables and the address directory are named after
    /// it. Default `berth0`.
    pub name: BridgeName,
    /// IPv4 network of the pods. Default `10.88.0.0/16`.
    pub ipv4: Ipv4Subnet,
    /// IPv6 network of the pods, used only when the host has IPv6; `None` keeps IPv6 frames off the
    /// bridge. Default `fd62:6572:7468::/64`.
    pub ipv6: Option<Ipv6Subnet>,
    /// MTU of the bridge and of the pods' interfaces; `None` (default) leaves the kernel's 1500.
    pub mtu: Option<Mtu>,
    /// Whether `net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding` of the host may be turned
    /// on. Default `true`: without forwarding pods reach each other and the node, but nothing
    /// beyond it.
    pub forwarding: bool,
    /// Networks to which pods keep their own addresses: those of the cluster's other nodes. Default
    /// none.
    pub non_masquerade: Vec<IpNet>,
}

impl BridgeConfig {
    /// The configured networks.
    pub fn subnets(&self) -> Subnets {
        Subnets { ipv4: self.ipv4, ipv6: self.ipv6 }
    }
}

impl Default for BridgeConfig {
    fn default() -> Self {
        Self {
            name: BridgeName::default(),
            ipv4: Ipv4Subnet::default(),
            ipv6: Some(Ipv6Subnet::default()),
            mtu: None,
            forwarding: true,
            non_masquerade: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridge_names_are_closed_to_everything_that_needs_escaping() {
        for name in ["berth0", "b", "br-pods_1", "exactly15bytes_"] {
            assert_eq!(BridgeName::new(name).map(|name| name.to_string()), Ok(name.to_owned()));
        }
        let refused = [
            "",
            " ",
            "a b",
            "..",
            ".",
            "a/b",
            "a.b",
            "a:b",
            "a%d",
            "sixteen_bytes_xx",
            "lo",
            "all",
            "default",
            "-x",
            "a\0b",
            "a\"b",
            "a\nb",
            "a;b",
            "é",
            "a*",
        ];
        for name in refused {
            assert!(BridgeName::new(name).is_err(), "{name:?} was accepted");
        }
        assert!(BridgeName::new(&"x".repeat(1 << 20)).is_err());
    }

    #[test]
    fn subnets_are_read_and_shown_the_same() {
        for text in ["10.88.0.0/16", "192.168.4.0/30", "100.64.0.0/10"] {
            assert_eq!(text.parse::<Ipv4Subnet>().map(|subnet| subnet.to_string()), Ok(text.to_owned()));
        }
        for text in ["fd62:6572:7468::/64", "2001:db8::/120"] {
            assert_eq!(text.parse::<Ipv6Subnet>().map(|subnet| subnet.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn subnets_that_cannot_hold_pods_are_refused() {
        let ipv4 = [
            "",
            "/",
            "10.88.0.0",
            "10.88.0.0/",
            "10.88.0.0/ 16",
            "10.88.0.0/+16",
            "10.88.0.0/16/16",
            "10.88.0.1/16",
            "10.88.0.0/31",
            "10.0.0.0/7",
            "10.88.0.0/999",
            "127.0.0.0/8",
            "224.0.0.0/8",
            "169.254.0.0/16",
            "0.0.0.0/8",
            "fd00::/64",
            "10.88.0.0/16\0",
        ];
        for text in ipv4 {
            assert!(text.parse::<Ipv4Subnet>().is_err(), "{text:?} was accepted");
        }
        let ipv6 = [
            "",
            "fd00::",
            "fd00::/63",
            "fd00::/121",
            "fd00::1/64",
            "fe80::/64",
            "ff02::/64",
            "::/64",
            "::1/120",
            "10.88.0.0/16",
            "fd00::/64 ",
            "::ffff:10.0.0.0/112",
        ];
        for text in ipv6 {
            assert!(text.parse::<Ipv6Subnet>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn the_first_host_is_the_gateway_and_pods_have_the_rest() {
        let subnet: Ipv4Subnet = "192.168.4.0/30".parse().unwrap();
        assert_eq!(subnet.gateway(), Ipv4Addr::new(192, 168, 4, 1));
        assert_eq!(subnet.pods(), (Ipv4Addr::new(192, 168, 4, 2), Ipv4Addr::new(192, 168, 4, 2)));
        assert!(
            subnet.contains(Ipv4Addr::new(192, 168, 4, 3)) && !subnet.contains(Ipv4Addr::new(192, 168, 4, 4))
        );
        let subnet = Ipv6Subnet::default();
        assert_eq!(subnet.gateway().to_string(), "fd62:6572:7468::1");
        assert_eq!(subnet.pods().1.to_string(), "fd62:6572:7468:0:ffff:ffff:ffff:ffff");
        assert!(subnet.contains(subnet.pods().1) && !subnet.contains("fd62:6572:7468:1::".parse().unwrap()));
    }

    #[test]
    fn the_defaults_would_pass_the_checks() {
        let config = BridgeConfig::default();
        assert_eq!(BridgeName::new(config.name.as_str()), Ok(config.name.clone()));
        assert_eq!(config.ipv4.to_string().parse(), Ok(config.ipv4));
        assert_eq!(config.ipv6.map(|subnet| subnet.to_string().parse()), config.ipv6.map(Ok));
    }

    #[test]
    fn an_mtu_keeps_ipv6_possible() {
        assert_eq!(Mtu::new(1500).map(Mtu::bytes), Ok(1500));
        for bytes in [0, 68, 1279, 65536, u32::MAX] {
            assert_eq!(Mtu::new(bytes), Err(Error::Mtu { bytes }));
        }
    }
}
