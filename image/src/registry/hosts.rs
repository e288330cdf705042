//! The hosts that serve a registry: containerd's `certs.d/<host>/hosts.toml`.
//!
//! ```toml
//! server = "https://registry.example"        # the registry itself; absent = https://<host>
//! [host."https://mirror.example/v2/proxy"]   # mirrors, tried first, in the order of the file
//!   capabilities = ["pull", "resolve"]       # what it may be asked for; default both
//!   ca = "mirror.pem"                        # or a list; relative to the file
//!   client = [["cert.pem", "key.pem"]]       # or one file, or a list of files with both
//!   skip_verify = false
//!   override_path = true                     # do not append /v2
//!   [host."https://mirror.example/v2/proxy".header]
//!     x-team = "a"                           # or a list
//! ```
//! Fields of a host may stand at the top too and then belong to the server. Directories are looked
//! for under the host as written, then `<host>_<port>_` (for file systems without colons), then
//! `_default` (containerd docs/hosts.md). Credentials of a pull go to the server only, never to a
//! mirror: a mirror that wants some gets them through `header`.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use http::{HeaderName, HeaderValue};
use toml::{Table, Value};
use url::{Host, Url};

/// Largest `hosts.toml`.
const MAX_FILE: u64 = 1 << 20;

/// Where docker.io's images really are.
const DOCKER_HUB: &str = "registry-1.docker.io";

/// Why a `hosts.toml` is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostsError {
    /// The file is there and cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something is wrong in the file.
    #[error("{path} cannot be used", path = path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The mistake.
        #[source]
        source: Box<HostsError>,
    },
    /// A FIFO, a device or the like.
    #[error("not a regular file")]
    NotPlain,
    /// Above 1 MiB.
    #[error("larger than 1 MiB")]
    TooLarge,
    /// Not TOML.
    #[error("line {line} is not TOML: {reason}")]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// What the parser says.
        reason: String,
    },
    /// A key has a value of another type than it takes, or one that makes no sense.
    #[error("invalid value of '{key}'")]
    Value {
        /// Which key.
        key: String,
    },
}

impl HostsError {
    fn in_file(self, path: &Path) -> Self {
        Self::File { path: path.to_owned(), source: Box::new(self) }
    }
}

/// TLS settings of one host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TlsSettings {
    /// Further authorities, PEM files.
    pub(crate) ca: Vec<PathBuf>,
    /// Client certificate and key; the key is in the same file if it has none of its own.
    pub(crate) client: Option<(PathBuf, Option<PathBuf>)>,
    pub(crate) skip_verify: bool,
}

/// A host that may be asked for content of a registry.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    /// With the path up to and including `/v2`, no slash at the end.
    pub(crate) base: Url,
    /// May be asked for content by digest.
    pub(crate) pull: bool,
    /// May be asked what a tag means.
    pub(crate) resolve: bool,
    pub(crate) tls: TlsSettings,
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    /// The registry itself: credentials may go there.
    pub(crate) is_server: bool,
    /// What the `ns` parameter says, for hosts that are not the registry itself.
    pub(crate) namespace: Option<String>,
}

/// The hosts for `domain`, in the order in which they are to be asked. Reads the configuration
/// again, so changes count at once.
pub(crate) fn endpoints(config_path: Option<&Path>, domain: &str) -> Result<Vec<Endpoint>, HostsError> {
    if let Some(config_path) = config_path {
        for directory in directory_names(domain) {
            let dir = config_path.join(directory);
            if !dir.is_dir() {
                continue;
            }
            let path = dir.join("hosts.toml");
            return match read(&path)? {
                Some(text) => parse(&text, domain, &dir).map_err(|error| error.in_file(&path)),
                None => Ok(vec![default_server(domain)?]),
            };
        }
    }
    Ok(vec![default_server(domain)?])
}

/// A domain was checked by the reference's grammar: it has neither a slash nor a leading dot.
fn directory_names(domain: &str) -> Vec<String> {
    let mut names = vec![domain.to_owned()];
    if let Some((host, port)) = domain.rsplit_once(':')
        && port.bytes().all(|b| b.is_ascii_digit())
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push("_default".to_owned());
    names
}

fn read(path: &Path) -> Result<Option<String>, HostsError> {
    let failed = |source| HostsError::Read { path: path.to_owned(), source };
    // Without waiting for a writer, should it be a FIFO.
    let file = match File::options().read(true).custom_flags(berth_sys::file::READ_NONBLOCKING).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(HostsError::NotPlain.in_file(path));
    }
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE { Err(HostsError::TooLarge.in_file(path)) } else { Ok(Some(text)) }
}

/// Reads the text of a `hosts.toml` that lies in `dir`.
pub(crate) fn parse(text: &str, domain: &str, dir: &Path) -> Result<Vec<Endpoint>, HostsError> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        HostsError::Syntax { line: before.matches('\n').count() + 1, reason: error.message().to_owned() }
    })?;
    let mut endpoints = Vec::new();
    match table.get("host") {
        None => {}
        Some(Value::Table(hosts)) => {
            for (address, settings) in hosts {
                let Value::Table(settings) = settings else { return Err(bad(&format!("host.{address}"))) };
                endpoints.push(endpoint(address, settings, domain, dir, false)?);
            }
        }
        Some(_) => return Err(bad("host")),
    }
    let server = match table.get("server") {
        None => endpoint_at(default_server(domain)?, &table, dir)?,
        Some(Value::String(address)) => endpoint(address, &table, domain, dir, true)?,
        Some(_) => return Err(bad("server")),
    };
    // Many files name the registry itself as a host again; asking it twice would only double the
    // wait.
    if !endpoints.iter().any(|known| known.base == server.base) {
        endpoints.push(server);
    } else {
        for known in &mut endpoints {
            known.is_server |= known.base == server.base;
        }
    }
    Ok(endpoints)
}

fn endpoint(
    address: &str,
    settings: &Table,
    domain: &str,
    dir: &Path,
    is_server: bool,
) -> Result<Endpoint, HostsError> {
    let bad_address = || bad(address);
    let full = if address.contains("://") {
        address.to_owned()
    } else {
        let host = Url::parse(&format!("https://{address}")).map_err(|_| bad_address())?;
        format!("{}://{address}", if is_loopback(&host) { "http" } else { "https" })
    };
    let mut base = Url::parse(&full).map_err(|_| bad_address())?;
    let plain = matches!(base.scheme(), "http" | "https")
        && base.host().is_some()
        && base.username().is_empty()
        && base.password().is_none()
        && base.query().is_none()
        && base.fragment().is_none();
    if !plain {
        return Err(bad_address());
    }
    let mut path = base.path().trim_end_matches('/').to_owned();
    if !flag(settings, "override_path")? && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    base.set_path(&path);
    let host = authority(&base);
    let namespace =
        (host != domain && !(domain == "docker.io" && host == DOCKER_HUB)).then(|| domain.to_owned());
    let endpoint = Endpoint {
        base,
        pull: true,
        resolve: true,
        tls: TlsSettings::default(),
        headers: Vec::new(),
        is_server,
        namespace,
    };
    endpoint_at(endpoint, settings, dir)
}

fn endpoint_at(mut endpoint: Endpoint, settings: &Table, dir: &Path) -> Result<Endpoint, HostsError> {
    if let Some(capabilities) = settings.get("capabilities") {
        let capabilities = strings(capabilities).ok_or_else(|| bad("capabilities"))?;
        endpoint.pull = capabilities.iter().any(|c| c == "pull");
        endpoint.resolve = capabilities.iter().any(|c| c == "resolve");
    }
    if let Some(ca) = settings.get("ca") {
        let files = strings(ca).ok_or_else(|| bad("ca"))?;
        endpoint.tls.ca = files.iter().map(|file| dir.join(file)).collect();
    }
    if let Some(client) = settings.get("client") {
        endpoint.tls.client = Some(client_files(client, dir).ok_or_else(|| bad("client"))?);
    }
    endpoint.tls.skip_verify = flag(settings, "skip_verify")?;
    match settings.get("header") {
        None => {}
        Some(Value::Table(headers)) => {
            for (name, values) in headers {
                let bad_header = || bad(&format!("header.{name}"));
                let name = HeaderName::try_from(name.as_str()).map_err(|_| bad_header())?;
                for value in strings(values).ok_or_else(bad_header)? {
                    let mut value = HeaderValue::try_from(value).map_err(|_| bad_header())?;
                    value.set_sensitive(true);
                    endpoint.headers.push((name.clone(), value));
                }
            }
        }
        Some(_) => return Err(bad("header")),
    }
    Ok(endpoint)
}

/// The registry where nothing is configured: HTTPS, but plain HTTP on loopback, which cannot be
/// eavesdropped on.
fn default_server(domain: &str) -> Result<Endpoint, HostsError> {
    let host = if domain == "docker.io" { DOCKER_HUB } else { domain };
    endpoint(host, &Table::new(), domain, Path::new(""), true)
}

/// A file, a list of files (the first counts), or a list of pairs of certificate and key (the first
/// counts).
fn client_files(value: &Value, dir: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    match value {
        Value::String(file) => Some((dir.join(file), None)),
        Value::Array(items) => match items.first()? {
            Value::String(file) => Some((dir.join(file), None)),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(cert)] => Some((dir.join(cert), None)),
                [Value::String(cert), Value::String(key)] if key.is_empty() => Some((dir.join(cert), None)),
                [Value::String(cert), Value::String(key)] => Some((dir.join(cert), Some(dir.join(key)))),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}

/// A string, or a list of them.
fn strings(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

fn flag(settings: &Table, key: &str) -> Result<bool, HostsError> {
    match settings.get(key) {
        None => Ok(false),
        Some(Value::Boolean(value)) => Ok(*value),
        Some(_) => Err(bad(key)),
    }
}

fn bad(key: &str) -> HostsError {
    HostsError::Value { key: key.to_owned() }
}

/// Host and port as written in references: no port where it is the scheme's own.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Whether the URL's host is this machine by its address or as `localhost`.
pub(crate) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => IpAddr::V4(address).is_loopback(),
        Some(Host::Ipv6(address)) => {
            address.is_loopback() || address.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback())
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bases(text: &str, domain: &str) -> Vec<String> {
        parse(text, domain, Path::new("/d")).unwrap().iter().map(|e| e.base.to_string()).collect()
    }

    #[test]
    fn without_configuration_the_registry_itself_is_asked() {
        for (domain, base, namespace) in [
            ("docker.io", "https://registry-1.docker.io/v2", None),
            ("quay.io", "https://quay.io/v2", None),
            ("localhost:5000", "http://localhost:5000/v2", None),
            ("127.0.0.9:80", "http://127.0.0.9/v2", Some("127.0.0.9:80")),
            ("[::1]:5000", "http://[::1]:5000/v2", None),
            ("10.0.0.1:5000", "https://10.0.0.1:5000/v2", None),
        ] {
            let endpoint = default_server(domain).unwrap();
            assert_eq!(endpoint.base.as_str(), base);
            assert_eq!(endpoint.namespace.as_deref(), namespace);
            assert!(endpoint.is_server);
        }
    }

    #[test]
    fn hosts_come_in_the_order_of_the_file_and_the_server_last() {
        let text = r#"
            server = "https://up.example"
            [host."https://z.example"]
            capabilities = ["pull"]
            [host."http://a.example:8080/prefix"]
            [host."https://m.example/v2/proxy"]
            override_path = true
            ca = ["one.pem", "/two.pem"]
            client = [["c.pem", "k.pem"]]
            skip_verify = true
            [host."https://m.example/v2/proxy".header]
            x-one = "1"
            x-two = ["2", "3"]
        "#;
        assert_eq!(
            bases(text, "r.example"),
            [
                "https://z.example/v2",
                "http://a.example:8080/prefix/v2",
                "https://m.example/v2/proxy",
                "https://up.example/v2"
            ]
        );
        let endpoints = parse(text, "r.example", Path::new("/d")).unwrap();
        assert_eq!((endpoints[0].pull, endpoints[0].resolve), (true, false));
        assert_eq!(endpoints[0].namespace.as_deref(), Some("r.example"));
        let third = &endpoints[2];
        assert_eq!(third.tls.ca, [PathBuf::from("/d/one.pem"), PathBuf::from("/two.pem")]);
        assert_eq!(third.tls.client, Some(("/d/c.pem".into(), Some("/d/k.pem".into()))));
        assert!(third.tls.skip_verify && !third.is_server);
        assert_eq!(third.headers.len(), 3);
        assert!(endpoints[3].is_server);
    }

    #[test]
    fn settings_at_the_top_belong_to_the_server() {
        let endpoints =
            parse("skip_verify = true\ncapabilities = [\"pull\"]", "r.example", Path::new("/d")).unwrap();
        assert_eq!(endpoints.len(), 1);
        assert!(endpoints[0].tls.skip_verify && !endpoints[0].resolve && endpoints[0].namespace.is_none());
    }

    #[test]
    fn a_server_named_among_the_hosts_is_asked_once() {
        let text = "server = \"https://r.example\"\n[host.\"https://r.example\"]\n";
        let endpoints = parse(text, "r.example", Path::new("/d")).unwrap();
        assert_eq!(endpoints.len(), 1);
        assert!(endpoints[0].is_server);
    }

    #[test]
    fn odd_files_are_refused_with_the_key() {
        for text in [
            "server = 1",
            "host = 1",
            "[host]\nx = 1",
            "[host.\"ftp://x\"]",
            "[host.\"https://u:p@x\"]",
            "[host.\"https://x?q=1\"]",
            "[host.\"https://\"]",
            "skip_verify = \"yes\"",
            "ca = 1",
            "client = [[1]]",
            "capabilities = [1]",
            "[header]\n\"bad name\" = \"x\"",
            "[header]\nx = \"a\\nb\"",
            "server = ",
        ] {
            assert!(parse(text, "r.example", Path::new("/d")).is_err(), "{text}");
        }
    }

    #[test]
    fn directories_are_looked_for_in_containerds_order() {
        assert_eq!(directory_names("h:5000"), ["h:5000", "h_5000_", "_default"]);
        assert_eq!(directory_names("h"), ["h", "_default"]);
        let dir = tempfile::tempdir().unwrap();
        let write = |directory: &str, server: &str| {
            std::fs::create_dir_all(dir.path().join(directory)).unwrap();
            std::fs::write(
                dir.path().join(directory).join("hosts.toml"),
                format!("server = \"https://{server}\""),
            )
            .unwrap();
        };
        let first = |domain: &str| {
            endpoints(Some(dir.path()), domain).unwrap()[0].base.host_str().unwrap().to_owned()
        };
        assert_eq!(first("h:5000"), "h");
        write("_default", "default");
        assert_eq!(first("h:5000"), "default");
        write("h_5000_", "under");
        assert_eq!(first("h:5000"), "under");
        write("h:5000", "exact");
        assert_eq!(first("h:5000"), "exact");
        assert_eq!(first("other"), "default");
    }

    proptest! {
        #[test]
        fn any_text_ends_in_a_result(text in any::<String>()) {
            let _ = parse(&text, "r.example", Path::new("/d"));
        }
    }
}
