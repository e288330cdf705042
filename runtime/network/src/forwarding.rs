//! The host's sysctls: forwarding for the pods' traffic, and router advertisements.
//!
//! A sysctl below `/proc/sys/net` belongs to the network namespace of the thread that opens it, so
//! every function in this file must be called on a thread in the intended namespace.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// `net.ipv4.ip_forward` (kernel documentation, networking/ip-sysctl).
const IPV4_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// One directory for each interface, plus `all` and `default`.
const IPV6_CONF: &str = "/proc/sys/net/ipv6/conf";

/// Which address families a function is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// IPv4 only.
    Ipv4,
    /// IPv4 and IPv6.
    Both,
}

/// A sysctl that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// Writing failed.
    #[error("cannot write {value:?} to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The value to write.
        value: &'static str,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// Whether the namespace has IPv6: the kernel was built with it, and it is not disabled for all
/// interfaces or for new ones.
pub fn has_ipv6() -> bool {
    ["all", "default"].iter().all(|name| {
        let path = Path::new(IPV6_CONF).join(name).join("disable_ipv6");
        fs::read_to_string(path).is_ok_and(|value| value.trim() == "0")
    })
}

/// Whether packets are forwarded.
///
/// # Errors
/// [`Error::Read`].
pub fn is_on(families: Families) -> Result<bool, Error> {
    let ipv4 = is_set(Path::new(IPV4_FORWARD))?;
    match families {
        Families::Ipv4 => Ok(ipv4),
        Families::Both => Ok(ipv4 && is_set(&Path::new(IPV6_CONF).join("all/forwarding"))?),
    }
}

/// Turns forwarding on where it is off.
///
/// A host that forwards IPv6 stops accepting router advertisements, and drops the routes it has
/// from them, on interfaces with `accept_ra` 1. Where the host relied on them they are kept by
/// setting 2, "even when forwarding", before forwarding is turned on.
///
/// # Errors
/// [`enum@Error`].
pub fn turn_on(families: Families) -> Result<(), Error> {
    let ipv4 = Path::new(IPV4_FORWARD);
    if !is_set(ipv4)? {
        write(ipv4, "1")?;
    }
    let ipv6 = Path::new(IPV6_CONF).join("all/forwarding");
    if families == Families::Both && !is_set(&ipv6)? {
        keep_router_advertisements()?;
        write(&ipv6, "1")?;
    }
    Ok(())
}

/// Makes one interface ignore router advertisements; `default` is for interfaces created later.
///
/// # Errors
/// [`Error::Write`].
pub fn ignore_router_advertisements(interface: &str) -> Result<(), Error> {
    write(&Path::new(IPV6_CONF).join(interface).join("accept_ra"), "0")
}

fn keep_router_advertisements() -> Result<(), Error> {
    let directory = Path::new(IPV6_CONF);
    let fail = |source| Error::Read { path: directory.to_owned(), source };
    for entry in fs::read_dir(directory).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        // `all` has no effect on its own, and `default` would let every later interface take
        // advertisements.
        if entry.file_name() == "all" || entry.file_name() == "default" {
            continue;
        }
        let path = entry.path().join("accept_ra");
        // An interface may disappear between the listing and this write.
        let Ok(value) = fs::read_to_string(&path) else { continue };
        if value.trim() == "1" {
            match write(&path, "2") {
                Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome?,
            }
        }
    }
    Ok(())
}

fn is_set(path: &Path) -> Result<bool, Error> {
    match fs::read_to_string(path) {
        Ok(value) => Ok(value.trim() != "0"),
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}

fn write(path: &Path, value: &'static str) -> Result<(), Error> {
    fs::write(path, value).map_err(|source| Error::Write { path: path.to_owned(), value, source })
}
