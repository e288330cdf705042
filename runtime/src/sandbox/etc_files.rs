//! The files for `/etc` that the containers of a pod share: `hostname`, `hosts`, `resolv.conf`.
//!
//! The kubelet mounts its own `/etc/hosts`, which wins; this one is for all other clients. Pure
//! text functions, and one that writes.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use berth_model::layout::SandboxFiles;
use berth_model::sandbox::Dns;

use super::SandboxError;

/// resolv.conf(5): `search`, `nameserver` lines, `options`, each only if not empty.
fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The servers that systemd-resolved itself asks, where the file above names only its own address
/// on loopback (systemd-resolved.service(8)).
const UPSTREAM_OF_SYSTEMD: &str = "/run/systemd/resolve/resolv.conf";

/// The host's resolv.conf for a pod with its own network, whose loopback is another. Servers
/// on the host's loopback are left out; if there are no others, `upstream` is used.
fn in_another_network(
    host: &[u8],
    upstream: impl FnOnce() -> Result<Vec<u8>, SandboxError>,
) -> Result<Vec<u8>, SandboxError> {
    let server = |line: &[u8]| {
        let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and_then(|_| words.next())?;
        address.parse::<IpAddr>().ok()
    };
    let lines =
        |text: &[u8]| text.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>();
    let on_loopback =
        |line: &Vec<u8>| server(line).is_some_and(|address| address.to_canonical().is_loopback());
    let mut kept = lines(host);
    if !kept.iter().any(on_loopback) {
        return Ok(host.to_vec());
    }
    if kept.iter().all(|line| server(line).is_none() || on_loopback(line)) {
        let upstream = lines(&upstream()?);
        if upstream.iter().any(|line| server(line).is_some()) {
            kept = upstream;
        }
    }
    kept.retain(|line| !on_loopback(line));
    Ok(kept.concat())
}

/// hosts(5): localhost, and the pod by its first addresses.
fn hosts(hostname: &str, addresses: &[String]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    for address in addresses {
        text.push_str(&format!("{address}\t{hostname}\n"));
    }
    text
}

/// The input of the files.
pub(super) struct Contents<'a> {
    pub(super) hostname: &'a str,
    pub(super) dns: Option<&'a Dns>,
    /// Empty with the host's network; the host's file is copied then.
    pub(super) addresses: &'a [String],
    pub(super) host_network: bool,
}

/// Writes the three files, readable by all.
pub(super) fn write(files: &SandboxFiles, contents: &Contents<'_>) -> Result<(), SandboxError> {
    let resolv = match contents.dns {
        Some(dns) => resolv_conf(dns).into_bytes(),
        None if contents.host_network => copy_of(RESOLV_CONF)?,
        None => in_another_network(&copy_of(RESOLV_CONF)?, || copy_of(UPSTREAM_OF_SYSTEMD))?,
    };
    let hosts = if contents.host_network {
        copy_of("/etc/hosts")?
    } else {
        hosts(contents.hostname, contents.addresses).into_bytes()
    };
    let hostname = format!("{}\n", contents.hostname).into_bytes();
    for (name, bytes) in [("resolv.conf", resolv), ("hosts", hosts), ("hostname", hostname)] {
        let path = files.etc(name);
        std::fs::write(&path, bytes).map_err(SandboxError::file("write", &path))?;
        // The daemon's umask is strict; containers run as any user.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))
            .map_err(SandboxError::file("set the mode of", &path))?;
    }
    Ok(())
}

/// The host's file; empty if there is none.
fn copy_of(path: &str) -> Result<Vec<u8>, SandboxError> {
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(SandboxError::file("read", Path::new(path))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn resolv_conf_says_what_was_asked_and_no_more() {
        let dns = Dns {
            servers: words(&["10.10.10.10", "fd00::1"]),
            searches: words(&["a.b", "c"]),
            options: words(&["ndots:5", "edns0"]),
        };
        assert_eq!(
            resolv_conf(&dns),
            "search a.b c\nnameserver 10.10.10.10\nnameserver fd00::1\noptions ndots:5 edns0\n"
        );
        assert_eq!(resolv_conf(&Dns::default()), "");
    }

    #[test]
    fn servers_on_the_loopback_of_the_host_are_not_for_another_network() {
        let convert = |host: &str, upstream: &str| {
            let text = in_another_network(host.as_bytes(), || Ok(upstream.as_bytes().to_vec())).unwrap();
            String::from_utf8(text).unwrap()
        };
        let systemd = "# comment\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n";
        let upstream = "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch lan\n";
        assert_eq!(convert(systemd, upstream), upstream);
        // Without systemd-resolved, a name is not found at once instead of after a wait.
        assert_eq!(convert(systemd, ""), "# comment\noptions edns0 trust-ad\nsearch lan\n");
        // What others there are is enough.
        let mixed = "nameserver ::1\nnameserver 192.0.2.7\n";
        assert_eq!(convert(mixed, upstream), "nameserver 192.0.2.7\n");
        let usual = "nameserver 192.0.2.7\nnameserver fe80::1%eth0\n";
        assert_eq!(convert(usual, upstream), usual);
    }

    #[test]
    fn hosts_knows_the_pod_by_every_address() {
        let text = hosts("web", &words(&["10.88.0.2", "fd00::2"]));
        assert!(text.contains("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.88.0.2\tweb\nfd00::2\tweb\n"), "{text}");
    }
}
