//! What ADD returns: section 5 of the specification.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::version::Version;

/// Most interfaces, addresses and routes of each in a result.
const MAX_ENTRIES: usize = 1024;

/// Why an answer is not a result.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    /// Not JSON, or not an object of this form.
    #[error("its result cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// Not in the version that was asked for.
    #[error("its result has cniVersion {has:?}, not {wanted}")]
    Version {
        /// What it has.
        has: String,
        /// That of the configuration.
        wanted: Version,
    },
    /// A value cannot be what it is.
    #[error("its result has {field} {value:?}, {problem}")]
    Value {
        /// Its path.
        field: String,
        /// The value.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// The result of the last plugin of a list, which is that of the network.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AddResult {
    /// Interfaces, inside the namespace and outside.
    pub interfaces: Vec<Interface>,
    /// Addresses, in the plugin's order.
    pub addresses: Vec<Address>,
    /// Routes in the namespace.
    pub routes: Vec<Route>,
    /// What the network says about name servers.
    pub dns: Dns,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    #[serde(default)]
    pub mac: String,
    /// The namespace that it is in; empty for the node's.
    #[serde(default)]
    pub sandbox: String,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// Where the rest of the world is reached.
    pub gateway: Option<IpAddr>,
    /// The interface, as an index.
    pub interface: Option<usize>,
}

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub destination: (IpAddr, u8),
    /// The next hop; without one, the addresses' gateway.
    pub gateway: Option<IpAddr>,
}

/// Name servers, as `resolv.conf(5)` has them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of servers, the preferred first.
    pub nameservers: Vec<String>,
    /// The local domain.
    pub domain: String,
    /// Domains that short names are looked up in.
    pub search: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Written {
    interfaces: Option<Vec<Interface>>,
    ips: Option<Vec<WrittenAddress>>,
    routes: Option<Vec<WrittenRoute>>,
    dns: Option<Dns>,
}

#[derive(Deserialize)]
struct WrittenAddress {
    address: String,
    gateway: Option<String>,
    interface: Option<i64>,
}

#[derive(Deserialize)]
struct WrittenRoute {
    dst: String,
    gw: Option<String>,
}

/// Reads what a plugin printed. The object is what the next plugin of the list is given.
pub(crate) fn object(text: &[u8], version: Version) -> Result<Map<String, Value>, ResultError> {
    let mut object: Map<String, Value> = serde_json::from_slice(text)?;
    match object.get("cniVersion") {
        // As libcni does with plugins that leave it out.
        None => _ = object.insert("cniVersion".into(), version.as_str().into()),
        Some(Value::String(has)) if has.is_empty() => {
            object.insert("cniVersion".into(), version.as_str().into());
        }
        Some(Value::String(has)) if Version::from_text(has).is_some() => {}
        Some(has) => {
            let has = has.as_str().map_or_else(|| has.to_string(), str::to_owned);
            return Err(ResultError::Version { has, wanted: version });
        }
    }
    AddResult::from_object(&object)?;
    Ok(object)
}

/// A result in the form of another version: up to 0.4.0, each address says of which IP version it
/// is.
pub(crate) fn in_version(mut object: Map<String, Value>, version: Version) -> Map<String, Value> {
    object.insert("cniVersion".into(), version.as_str().into());
    let Some(Value::Array(ips)) = object.get_mut("ips") else { return object };
    for ip in ips.iter_mut().filter_map(Value::as_object_mut) {
        if version >= Version::V1_0_0 {
            ip.remove("version");
        } else if let Some(Value::String(address)) = ip.get("address") {
            let of = if address.contains(':') { "6" } else { "4" };
            ip.insert("version".into(), of.into());
        }
    }
    object
}

impl AddResult {
    /// Reads the object of a result.
    ///
    /// # Errors
    /// [`ResultError`], naming the field.
    pub fn from_object(object: &Map<String, Value>) -> Result<Self, ResultError> {
        let written: Written = serde_json::from_value(Value::Object(object.clone()))?;
        let interfaces = written.interfaces.unwrap_or_default();
        let ips = written.ips.unwrap_or_default();
        let routes = written.routes.unwrap_or_default();
        for (field, length) in
            [("interfaces", interfaces.len()), ("ips", ips.len()), ("routes", routes.len())]
        {
            if length > MAX_ENTRIES {
                return Err(invalid(field, &length.to_string(), "which is more than 1024 entries"));
            }
        }
        let addresses = ips.iter().map(|ip| address(ip, interfaces.len())).collect::<Result<_, _>>()?;
        let routes = routes
            .iter()
            .map(|route| {
                Ok(Route {
                    destination: network("routes.dst", &route.dst)?,
                    gateway: gateway("routes.gw", route.gw.as_deref())?,
                })
            })
            .collect::<Result<_, ResultError>>()?;
        Ok(Self { interfaces, addresses, routes, dns: written.dns.unwrap_or_default() })
    }

    /// The addresses in the namespace, each once: those of no interface and those of interfaces in
    /// a sandbox.
    pub fn inside(&self) -> impl Iterator<Item = &Address> {
        self.addresses.iter().enumerate().filter_map(|(index, address)| {
            let is_inside = address
                .interface
                .and_then(|interface| self.interfaces.get(interface))
                .is_none_or(|interface| !interface.sandbox.is_empty());
            let is_first = !self.addresses[..index].iter().any(|earlier| earlier.address == address.address);
            (is_inside && is_first).then_some(address)
        })
    }
}

fn address(written: &WrittenAddress, interfaces: usize) -> Result<Address, ResultError> {
    let (address, prefix) = network("ips.address", &written.address)?;
    let is_broadcast = address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() || is_broadcast {
        return Err(invalid("ips.address", &written.address, "which no interface can have"));
    }
    let interface = match written.interface {
        None => None,
        // Plugins have written -1 for "none".
        Some(index) if index < 0 => None,
        Some(index) => match usize::try_from(index) {
            Ok(index) if index < interfaces => Some(index),
            _ => {
                return Err(invalid("ips.interface", &index.to_string(), "which is not an interface of it"));
            }
        },
    };
    Ok(Address { address, prefix, gateway: gateway("ips.gateway", written.gateway.as_deref())?, interface })
}

fn network(field: &str, text: &str) -> Result<(IpAddr, u8), ResultError> {
    let invalid = || invalid(field, text, "which is not an address with a prefix length");
    let (address, prefix) = text.split_once('/').ok_or_else(invalid)?;
    let address: IpAddr = address.parse().map_err(|_| invalid())?;
    let prefix: u8 = prefix.parse().map_err(|_| invalid())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    if prefix > most { Err(invalid()) } else { Ok((address, prefix)) }
}

fn gateway(field: &str, text: Option<&str>) -> Result<Option<IpAddr>, ResultError> {
    match text {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| invalid(field, text, "which is not an address")),
    }
}

fn invalid(field: &str, value: &str, problem: &'static str) -> ResultError {
    ResultError::Value { field: field.to_owned(), value: value.chars().take(64).collect(), problem }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the bridge plugin of containernetworking/plugins 1.x prints it.
    const BRIDGE: &str = r#"{
        "cniVersion": "1.0.0",
        "interfaces": [
            {"name": "cni0", "mac": "0a:3c:c0:48:f4:0c"},
            {"name": "veth7f", "mac": "22:b6:a5:6e:3d:cb"},
            {"name": "eth0", "mac": "b6:d8:0f:ef:a5:5b", "sandbox": "/run/netns/pod"}],
        "ips": [
            {"interface": 2, "address": "10.22.0.2/16", "gateway": "10.22.0.1"},
            {"interface": 2, "address": "fd00::2/64", "gateway": "fd00::1"}],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00::1"}],
        "dns": {"nameservers": ["10.22.0.1"], "search": ["local"]}}"#;

    fn result(text: &str, version: Version) -> Result<AddResult, ResultError> {
        AddResult::from_object(&object(text.as_bytes(), version)?)
    }

    #[test]
    fn a_result_is_read() {
        let result = result(BRIDGE, Version::V1_0_0).unwrap();
        let inside: Vec<String> = result.inside().map(|inside| inside.address.to_string()).collect();
        assert_eq!(inside, ["10.22.0.2", "fd00::2"]);
        assert_eq!(result.interfaces[2].name, "eth0");
        assert_eq!(result.routes[1].gateway, Some("fd00::1".parse().unwrap()));
        assert_eq!(result.dns.nameservers, ["10.22.0.1"]);
    }

    #[test]
    fn older_and_sparse_results_are_read() {
        let old = r#"{"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.0.0.2/24", "interface": -1}]}"#;
        assert_eq!(result(old, Version::V0_3_1).unwrap().inside().count(), 1);
        let none = r#"{"interfaces": null, "ips": null, "routes": null, "dns": {}}"#;
        assert_eq!(result(none, Version::V1_1_0).unwrap(), AddResult::default());
        assert_eq!(object(b"{}", Version::V1_1_0).unwrap()["cniVersion"], "1.1.0");
    }

    #[test]
    fn addresses_outside_and_doubled_ones_are_not_the_pods() {
        let text = r#"{"interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "x"}], "ips": [
            {"address": "10.0.0.1/24", "interface": 0},
            {"address": "10.0.0.2/24", "interface": 1},
            {"address": "10.0.0.2/24"}]}"#;
        let result = result(text, Version::V1_0_0).unwrap();
        let inside: Vec<String> = result.inside().map(|inside| inside.address.to_string()).collect();
        assert_eq!(inside, ["10.0.0.2"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, says) in [
            ("", "cannot be read: EOF"),
            ("null", "cannot be read"),
            (r#"{"cniVersion": "9.9"}"#, "cniVersion \"9.9\""),
            (r#"{"cniVersion": 1}"#, "cniVersion \"1\""),
            (r#"{"ips": [{"address": "10.0.0.1"}]}"#, "ips.address \"10.0.0.1\""),
            (r#"{"ips": [{"address": "10.0.0.1/33"}]}"#, "ips.address"),
            (r#"{"ips": [{"address": "0.0.0.0/0"}]}"#, "which no interface can have"),
            (r#"{"ips": [{"address": "127.0.0.1/8"}]}"#, "which no interface can have"),
            (r#"{"ips": [{"address": "255.255.255.255/8"}]}"#, "which no interface can have"),
            (r#"{"ips": [{"address": "10.0.0.1/8", "gateway": "x"}]}"#, "ips.gateway \"x\""),
            (r#"{"ips": [{"address": "10.0.0.1/8", "interface": 0}]}"#, "ips.interface \"0\""),
            (r#"{"routes": [{"dst": "x"}]}"#, "routes.dst"),
            (r#"{"ips": 7}"#, "cannot be read"),
        ] {
            let error = result(text, Version::V1_0_0).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_crashes_it(text in "\\PC{0,200}") {
            let _ = object(text.as_bytes(), Version::V1_1_0);
        }
    }
}
