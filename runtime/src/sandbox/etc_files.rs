//! The files for `/etc` that the containers of a pod share: `hostname`, `hosts`, `resolv.conf`.
//!
//! The kubelet mounts its own `/etc/hosts`, which wins; this one is for all other clients. Pure
//! text functions, and one that writes.

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
        None => copy_of("/etc/resolv.conf")?,
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
    fn hosts_knows_the_pod_by_every_address() {
        let text = hosts("web", &words(&["10.88.0.2", "fd00::2"]));
        assert!(text.contains("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.88.0.2\tweb\nfd00::2\tweb\n"), "{text}");
    }
}
