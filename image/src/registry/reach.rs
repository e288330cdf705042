//! Where a registry may send us: the addresses that a redirect or a token service may have.
//!
//! A registry names URLs, and an attacker that controls it wants requests made from where the node
//! is: to the node itself, to its metadata service, to neighbours behind the firewall. None of
//! these requests has credentials, but asking can be enough. So:
//!
//! | named by a registry | followed |
//! |---|---|
//! | HTTPS, by name or by a public address | yes |
//! | plain HTTP | only on the host of a registry that is configured as plain HTTP |
//! | this machine (`localhost`, 127.0.0.0/8, `::1`) | only by a registry that is on it itself |
//! | a private address | only by a registry that has a private address itself |
//! | a name with a private address | yes: behind TLS, only who has a certificate for the name gets a request |
//! | the link, metadata services, multicast, reserved addresses | never, also not by name |
//!
//! An IPv6 address that stands for an IPv4 address is judged as that one. Ranges: IANA's
//! special-purpose registries (RFC 6890), NAT64 (RFC 6052, RFC 8215), 6to4 (RFC 3056), Teredo (RFC
//! 4380), ISATAP (RFC 5214); metadata services as the clouds document them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use url::{Host, Url};

use super::hosts::is_loopback;

/// What kind of place an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Public,
    /// Of a private network.
    Private,
    /// This machine.
    Loopback,
    /// Nothing that a registry may name.
    Forbidden,
}

/// Metadata services outside the link-local range.
const METADATA_V4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(192, 0, 0, 192)];
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42),
];

/// Judges an address.
pub(crate) fn place_of(address: IpAddr) -> Place {
    match address {
        IpAddr::V4(address) => place_of_v4(address),
        IpAddr::V6(address) => match inner_v4(address) {
            Some(inner) => place_of_v4(inner),
            None => place_of_v6(address),
        },
    }
}

fn place_of_v4(address: Ipv4Addr) -> Place {
    match address.octets() {
        _ if METADATA_V4.contains(&address) => Place::Forbidden,
        [0 | 224..=255, ..] | [169, 254, ..] => Place::Forbidden,
        [127, ..] => Place::Loopback,
        [10, ..]
        | [172, 16..=31, ..]
        | [192, 168, ..]
        | [100, 64..=127, ..]
        | [192, 0, 0, _]
        | [198, 18 | 19, ..] => Place::Private,
        _ => Place::Public,
    }
}

fn place_of_v6(address: Ipv6Addr) -> Place {
    match address.segments() {
        _ if METADATA_V6.contains(&address) => Place::Forbidden,
        [0, 0, 0, 0, 0, 0, 0, 1] => Place::Loopback,
        // Unspecified; the link; multicast; Teredo.
        [0, 0, 0, 0, 0, 0, 0, 0] | [0xfe80..=0xfebf | 0xff00.., ..] | [0x2001, 0, ..] => Place::Forbidden,
        // Unique local and the site-local ones of before; NAT64 with a local prefix.
        [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..] | [0x64, 0xff9b, 1, ..] => Place::Private,
        _ => Place::Public,
    }
}

/// The IPv4 address that an IPv6 address leads to.
fn inner_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let of = |high: u16, low: u16| Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        // Compatible, mapped, translated, NAT64.
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        // 6to4, ISATAP.
        | [0x2002, high, low, ..]
        | [_, _, _, _, 0 | 0x200, 0x5efe, high, low] => of(high, low),
        _ => None,
    }
}

/// The place of a URL's host as far as its text says: of an address, or of a name for this machine.
pub(crate) fn place_of_host(url: &Url) -> Option<Place> {
    match url.host() {
        Some(Host::Ipv4(address)) => Some(place_of(IpAddr::V4(address))),
        Some(Host::Ipv6(address)) => Some(place_of(IpAddr::V6(address))),
        _ if is_loopback(url) => Some(Place::Loopback),
        _ => None,
    }
}

/// Whether a URL that a registry names has the form of one that is followed: HTTPS, or plain HTTP
/// on the very host that was configured as plain HTTP; no user in it; a host.
pub(crate) fn has_allowed_form(configured: &Url, to: &Url) -> bool {
    let scheme = match to.scheme() {
        "https" => true,
        "http" => configured.scheme() == "http" && configured.host() == to.host(),
        _ => false,
    };
    scheme && to.host().is_some() && to.username().is_empty() && to.password().is_none()
}

/// Whether a name that a registry named may be connected to at this address.
pub(crate) fn may_connect(address: IpAddr, registry_is_here: bool) -> bool {
    match place_of(address) {
        Place::Public | Place::Private => true,
        Place::Loopback => registry_is_here,
        Place::Forbidden => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_they_lead_to() {
        for (address, place) in [
            ("8.8.8.8", Place::Public),
            ("172.15.0.1", Place::Public),
            ("172.32.0.1", Place::Public),
            ("100.63.0.1", Place::Public),
            ("10.0.0.1", Place::Private),
            ("172.16.0.1", Place::Private),
            ("172.31.255.255", Place::Private),
            ("192.168.1.1", Place::Private),
            ("100.64.0.1", Place::Private),
            ("198.19.0.1", Place::Private),
            ("127.8.0.1", Place::Loopback),
            ("0.0.0.0", Place::Forbidden),
            ("0.1.2.3", Place::Forbidden),
            ("169.254.169.254", Place::Forbidden),
            ("100.100.100.200", Place::Forbidden),
            ("168.63.129.16", Place::Forbidden),
            ("192.0.0.192", Place::Forbidden),
            ("224.0.0.1", Place::Forbidden),
            ("240.0.0.1", Place::Forbidden),
            ("255.255.255.255", Place::Forbidden),
            ("2606:4700::1", Place::Public),
            ("::1", Place::Loopback),
            ("::", Place::Forbidden),
            ("fe80::1", Place::Forbidden),
            ("febf::1", Place::Forbidden),
            ("ff02::1", Place::Forbidden),
            ("2001::1", Place::Forbidden),
            ("2001:db8::1", Place::Public),
            ("fc00::1", Place::Private),
            ("fdff::1", Place::Private),
            ("fec0::1", Place::Private),
            ("fd00:ec2::254", Place::Forbidden),
            ("fd20:ce::254", Place::Forbidden),
            ("64:ff9b:1::a00:1", Place::Private),
            // The same IPv4 addresses in all their clothes.
            ("::ffff:10.0.0.1", Place::Private),
            ("::10.0.0.1", Place::Private),
            ("::127.0.0.1", Place::Loopback),
            ("::169.254.169.254", Place::Forbidden),
            ("::ffff:0:169.254.169.254", Place::Forbidden),
            ("64:ff9b::169.254.169.254", Place::Forbidden),
            ("64:ff9b::10.0.0.1", Place::Private),
            ("64:ff9b::8.8.8.8", Place::Public),
            ("2002:a9fe:a9fe::", Place::Forbidden),
            ("2002:7f00:1::", Place::Loopback),
            ("2002:a00:1::5", Place::Private),
            ("2606:4700::5efe:10.0.0.1", Place::Private),
            ("2606:4700::200:5efe:127.0.0.1", Place::Loopback),
            ("::8.8.8.8", Place::Public),
        ] {
            assert_eq!(place_of(address.parse().unwrap()), place, "{address}");
        }
    }

    #[test]
    fn only_https_or_the_same_plain_host_has_the_form() {
        for (from, to, allowed) in [
            ("https://r.example/v2", "https://cdn.example/x?sig=1", true),
            ("https://r.example/v2", "http://cdn.example/x", false),
            ("https://r.example/v2", "http://r.example/x", false),
            ("https://r.example/v2", "https://u:p@cdn.example/x", false),
            ("https://r.example/v2", "file:///etc/passwd", false),
            ("https://r.example/v2", "unix:///run/x.sock", false),
            ("https://r.example/v2", "ftp://cdn.example/", false),
            ("http://127.0.0.1:5000/v2", "http://127.0.0.1:6000/x", true),
            ("http://127.0.0.1:5000/v2", "http://127.0.0.2:6000/x", false),
            ("http://r.example/v2", "http://other.example/", false),
        ] {
            let (from, target) = (Url::parse(from).unwrap(), Url::parse(to).unwrap());
            assert_eq!(has_allowed_form(&from, &target), allowed, "{to}");
        }
    }

    #[test]
    fn addresses_in_urls_are_seen_in_any_spelling() {
        for (url, place) in [
            ("https://2130706433/", Some(Place::Loopback)),
            ("https://0x7f.1/", Some(Place::Loopback)),
            ("https://localhost/", Some(Place::Loopback)),
            ("https://a.localhost/", Some(Place::Loopback)),
            ("https://0xa000001/", Some(Place::Private)),
            ("https://[::ffff:a9fe:a9fe]/", Some(Place::Forbidden)),
            ("https://cdn.example/", None),
        ] {
            assert_eq!(place_of_host(&Url::parse(url).unwrap()), place, "{url}");
        }
    }
}
