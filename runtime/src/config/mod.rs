//! The configuration: as written (file and flags, all optional), and as used (complete and
//! checked).
//!
//! `/etc/berth/berth.toml` first, then `/etc/berth/berth.toml.d/*.toml` in name order, then flags;
//! later ones win, key by key. Unknown keys are errors. All mistakes are reported at once, each
//! with its key.

mod written;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use berth_cgroup::{Driver, Parent};
use berth_network::config::{BridgeConfig, BridgeName, Ipv4Subnet, Ipv6Subnet, Mtu};
use ipnet::IpNet;
use oci_spec::runtime::PosixRlimit;

use crate::rlimits;

pub use written::{
    Written, WrittenCgroup, WrittenCompat, WrittenContainer, WrittenImage, WrittenNetwork, WrittenRegistry,
    WrittenStreaming,
};

/// The default path of the configuration. An absent file counts as empty.
pub const DEFAULT_FILE: &str = "/etc/berth/berth.toml";

/// Where files lie that a reboot takes away.
const DEFAULT_STATE: &str = "/run/berth";

/// The directories of mirror rules if the configuration names none, in this order: Berth's,
/// then containerd's.
const REGISTRY_CONFIG_PATHS: [&str; 2] = ["/etc/berth/certs.d", "/etc/containerd/certs.d"];

/// The socket that the cAdvisor of a kubelet looks for; it is fixed there.
const CADVISOR_SOCKET: &str = "/var/run/crio/crio.sock";

/// The checked configuration, with all defaults.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of durable files.
    pub root: PathBuf,
    /// Directory of files that do not survive a reboot.
    pub state: PathBuf,
    /// The socket.
    pub socket: PathBuf,
    /// The shim's program.
    pub shim: PathBuf,
    /// The filter of the log.
    pub log: String,
    /// How images are pulled and kept.
    pub images: berth_image::StoreOptions,
    /// Where pods get their network from.
    pub network: NetworkConfig,
    /// Who arranges cgroups; `None`: the driver whose form the parent has, else the one that fits
    /// the node.
    pub cgroup_driver: Option<Driver>,
    /// The parent of pods that name none; `None`: the driver's default.
    pub cgroup_parent: Option<Parent>,
    /// The socket for cAdvisor, if it is served.
    pub cadvisor_socket: Option<PathBuf>,
    /// The resource limits of programs in containers.
    pub rlimits: Vec<PosixRlimit>,
    /// Where clients of exec, attach and port forwarding connect.
    pub streaming: StreamingConfig,
}

/// Where pods get their network from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// From which of these.
    pub kind: NetworkKind,
    /// The built-in bridge.
    pub bridge: BridgeConfig,
    /// Those of its subnets that are configured, and that no cluster changes therefore.
    pub subnets: ConfiguredSubnets,
    /// CNI plugins.
    pub cni: CniConfig,
}

impl NetworkConfig {
    fn written(&self) -> WrittenNetwork {
        let Self { kind, bridge, subnets, cni } = self;
        WrittenNetwork {
            kind: Some(kind.to_string()),
            cni_config_directory: Some(cni.config_directory.clone()),
            cni_plugin_directories: Some(cni.plugin_directories.clone()),
            cni_cache_directory: Some(cni.cache_directory.clone()),
            cni_namespace_directory: Some(cni.namespace_directory.clone()),
            bridge: Some(bridge.name.to_string()),
            ipv4: match subnets.waits_for_pod_cidr {
                true => Some(POD_CIDR.to_owned()),
                false => subnets.ipv4.map(|subnet| subnet.to_string()),
            },
            ipv6: subnets.ipv6.map(|ipv6| ipv6.map_or_else(|| "off".to_owned(), |subnet| subnet.to_string())),
            mtu: bridge.mtu.map(Mtu::bytes),
            forwarding: Some(bridge.forwarding),
            non_masquerade_cidrs: Some(bridge.non_masquerade.iter().map(ToString::to_string).collect()),
        }
    }
}

/// The subnets of the bridge that are configured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConfiguredSubnets {
    /// IPv4.
    pub ipv4: Option<Ipv4Subnet>,
    /// IPv6, or that there is none.
    pub ipv6: Option<Option<Ipv6Subnet>>,
    /// Whether pods wait for the cluster's, rather than have the default ones until it comes.
    pub waits_for_pod_cidr: bool,
}

/// What is written in place of an IPv4 subnet for that.
const POD_CIDR: &str = "pod-cidr";

/// From which network pods get their interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkKind {
    /// CNI where the node has a configuration or a kubelet, else the built-in bridge.
    Auto,
    /// The built-in bridge.
    Bridge,
    /// CNI.
    Cni,
}

impl std::fmt::Display for NetworkKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Bridge => "bridge",
            Self::Cni => "cni",
        })
    }
}

/// Where everything of CNI is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    /// Configurations.
    pub config_directory: PathBuf,
    /// Plugins, in the order in which they are looked for.
    pub plugin_directories: Vec<PathBuf>,
    /// The cache of attachments, as libcni has it.
    pub cache_directory: PathBuf,
    /// Pinned namespaces.
    pub namespace_directory: PathBuf,
}

/// Where clients of exec, attach and port forwarding connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamingConfig {
    /// The address to listen on.
    pub address: SocketAddr,
    /// The certificate; `None` for plain HTTP.
    pub tls: Option<TlsFiles>,
}

/// PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate chain.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// A key whose value cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Such as `network.bridge`.
    pub key: &'static str,
    /// What is wrong.
    pub reason: String,
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.key, self.reason)
    }
}

struct Check(Vec<Mistake>);

impl Check {
    fn ok<T, E: std::fmt::Display>(&mut self, key: &'static str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.0.push(Mistake { key, reason: error.to_string() })).ok()
    }

    fn absolute(&mut self, key: &'static str, path: PathBuf) -> PathBuf {
        if !path.is_absolute() {
            self.0.push(Mistake { key, reason: format!("{} is not an absolute path", path.display()) });
        }
        path
    }
}

impl Config {
    /// Checks what was written and fills in the defaults.
    ///
    /// # Errors
    /// All mistakes.
    pub fn check(written: Written) -> Result<Self, Vec<Mistake>> {
        let mut check = Check(Vec::new());
        let root = check.absolute("root", written.root.unwrap_or_else(|| "/var/lib/berth".into()));
        let state = check.absolute("state", written.state.unwrap_or_else(|| DEFAULT_STATE.into()));
        if root == state {
            check.0.push(Mistake {
                key: "state",
                reason: "it must not be the same directory as root".to_owned(),
            });
        }
        let socket =
            check.absolute("socket", written.socket.unwrap_or_else(|| state.join(berth_api::SOCKET_NAME)));
        let shim = match written.shim.or_else(crate::shim_client::default_program) {
            Some(path) => check.absolute("shim", path),
            None => {
                let reason =
                    "berth-shim is neither beside berthd nor in /usr/libexec/berth; set its path".to_owned();
                check.0.push(Mistake { key: "shim", reason });
                PathBuf::new()
            }
        };
        let log = written.log.unwrap_or_else(|| "info".to_owned());
        check.ok("log", tracing_subscriber::EnvFilter::try_new(&log));
        let images = images(&mut check, written.registry, &written.image);
        let network = network(&mut check, &written.network, &state);
        let (cgroup_driver, cgroup_parent) = cgroup(&mut check, &written.cgroup);
        let cadvisor_socket = check.absolute(
            "compat.cadvisor_socket",
            written.compat.cadvisor_socket.unwrap_or_else(|| CADVISOR_SOCKET.into()),
        );
        let streaming = streaming(&mut check, written.streaming);
        let rlimits = rlimits::check(&written.container.rlimits).unwrap_or_else(|mistakes| {
            check.0.extend(mistakes.into_iter().map(|reason| Mistake { key: "container.rlimits", reason }));
            Vec::new()
        });
        match network {
            Some(network) if check.0.is_empty() => Ok(Self {
                root,
                state,
                socket,
                shim,
                log,
                images,
                network,
                cgroup_driver,
                cgroup_parent,
                cadvisor_socket: written.compat.cadvisor.unwrap_or(false).then_some(cadvisor_socket),
                rlimits,
                streaming,
            }),
            _ => Err(check.0),
        }
    }

    /// The configuration in force after a reload of `newer`, and the keys whose new values
    /// take effect at the next start.
    #[must_use]
    pub fn taking_over(&self, newer: Self) -> (Self, Vec<&'static str>) {
        let wanted = newer.written();
        // These take effect at once.
        let config = Self { log: newer.log, images: newer.images, rlimits: newer.rlimits, ..self.clone() };
        let waiting = config.written().differences(&wanted);
        (config, waiting)
    }

    /// The keys whose values differ.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        self.written().differences(&other.written())
    }

    /// In written form, including all defaults.
    #[must_use]
    pub fn written(&self) -> Written {
        Written {
            root: Some(self.root.clone()),
            state: Some(self.state.clone()),
            socket: Some(self.socket.clone()),
            shim: Some(self.shim.clone()),
            log: Some(self.log.clone()),
            registry: WrittenRegistry {
                config_path: self.images.registry_config_path.clone(),
                trusted_token_hosts: Some(self.images.trusted_token_hosts.clone()),
            },
            image: WrittenImage {
                layers_at_once: Some(self.images.layers_at_once),
                max_image_bytes: Some(self.images.max_image_bytes),
                min_free_bytes: Some(self.images.min_free_bytes),
                min_free_percent: Some(self.images.min_free_percent),
            },
            network: self.network.written(),
            cgroup: WrittenCgroup {
                driver: Some(
                    self.cgroup_driver.map_or_else(|| "auto".to_owned(), |driver| driver.to_string()),
                ),
                parent: self.cgroup_parent.as_ref().map(|parent| parent.path().to_owned()),
            },
            compat: WrittenCompat {
                cadvisor: Some(self.cadvisor_socket.is_some()),
                cadvisor_socket: self.cadvisor_socket.clone(),
            },
            container: WrittenContainer { rlimits: rlimits::written(&self.rlimits) },
            streaming: WrittenStreaming {
                address: Some(self.streaming.address),
                tls_certificate: self.streaming.tls.as_ref().map(|tls| tls.certificate.clone()),
                tls_key: self.streaming.tls.as_ref().map(|tls| tls.key.clone()),
            },
        }
    }
}

/// The configured driver, and the parent in the form of that driver; if none is configured, the
/// form says which one is meant.
fn cgroup(check: &mut Check, written: &WrittenCgroup) -> (Option<Driver>, Option<Parent>) {
    let driver = match written.driver.as_deref() {
        None | Some("auto") => None,
        Some("cgroupfs") => Some(Driver::Cgroupfs),
        Some("systemd") => Some(Driver::Systemd),
        Some(other) => {
            let reason = format!("{other:?} is not auto, cgroupfs or systemd");
            check.0.push(Mistake { key: "cgroup.driver", reason });
            None
        }
    };
    let parent = written.parent.as_deref().and_then(|parent| {
        let form = driver.unwrap_or_else(|| Parent::form_of(parent));
        check.ok("cgroup.parent", Parent::default_of_daemon(form, parent))
    });
    (driver, parent)
}

/// An address that other machines can reach requires TLS: a URL's token is all that a client needs.
fn streaming(check: &mut Check, written: WrittenStreaming) -> StreamingConfig {
    let address = written.address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
    let tls = match (written.tls_certificate, written.tls_key) {
        (Some(certificate), Some(key)) => Some(TlsFiles {
            certificate: check.absolute("streaming.tls_certificate", certificate),
            key: check.absolute("streaming.tls_key", key),
        }),
        (None, None) => None,
        (Some(_), None) => {
            check.0.push(Mistake { key: "streaming.tls_key", reason: "missing".to_owned() });
            None
        }
        (None, Some(_)) => {
            check.0.push(Mistake { key: "streaming.tls_certificate", reason: "missing".to_owned() });
            None
        }
    };
    if address.ip().is_unspecified() {
        let reason =
            "an unspecified address cannot be put into URLs; name the address that clients connect to"
                .to_owned();
        check.0.push(Mistake { key: "streaming.address", reason });
    } else if !address.ip().is_loopback() && tls.is_none() {
        let reason = format!(
            "{address} is reachable from other machines; set streaming.tls_certificate and streaming.tls_key, or use a loopback address"
        );
        check.0.push(Mistake { key: "streaming.address", reason });
    }
    StreamingConfig { address, tls }
}

fn images(check: &mut Check, registry: WrittenRegistry, image: &WrittenImage) -> berth_image::StoreOptions {
    let defaults = berth_image::StoreOptions::default();
    let config_path = match registry.config_path {
        Some(path) => Some(check.absolute("registry.config_path", path)),
        None => REGISTRY_CONFIG_PATHS.iter().map(PathBuf::from).find(|path| path.is_dir()),
    };
    let layers_at_once = image.layers_at_once.unwrap_or(defaults.layers_at_once);
    if !(1..=64).contains(&layers_at_once) {
        check.0.push(Mistake {
            key: "image.layers_at_once",
            reason: format!("{layers_at_once} is not between 1 and 64"),
        });
    }
    let min_free_percent = image.min_free_percent.unwrap_or(defaults.min_free_percent);
    if min_free_percent > 90 {
        check.0.push(Mistake {
            key: "image.min_free_percent",
            reason: format!("{min_free_percent} is above 90"),
        });
    }
    berth_image::StoreOptions {
        registry_config_path: config_path,
        trusted_token_hosts: registry.trusted_token_hosts.unwrap_or_default(),
        layers_at_once,
        max_image_bytes: image.max_image_bytes.unwrap_or(defaults.max_image_bytes),
        min_free_bytes: image.min_free_bytes.unwrap_or(defaults.min_free_bytes),
        min_free_percent,
        ..defaults
    }
}

fn network(check: &mut Check, written: &WrittenNetwork, state: &Path) -> Option<NetworkConfig> {
    let kind = match written.kind.as_deref() {
        None | Some("auto") => Some(NetworkKind::Auto),
        Some("bridge") => Some(NetworkKind::Bridge),
        Some("cni") => Some(NetworkKind::Cni),
        Some(other) => check.ok("network.kind", Err(format!("{other:?} is not auto, bridge or cni"))),
    };
    let cni = cni(check, written, state);
    let subnets = subnets(check, written);
    let bridge = bridge(check, written, subnets.unwrap_or_default());
    Some(NetworkConfig { bridge: bridge?, kind: kind?, subnets: subnets?, cni })
}

fn cni(check: &mut Check, written: &WrittenNetwork, state: &Path) -> CniConfig {
    let mut path = |key, written: &Option<PathBuf>, default: PathBuf| {
        check.absolute(key, written.clone().unwrap_or(default))
    };
    let namespaces =
        if state == Path::new(DEFAULT_STATE) { "/run/netns".into() } else { state.join("netns") };
    CniConfig {
        config_directory: path(
            "network.cni_config_directory",
            &written.cni_config_directory,
            "/etc/cni/net.d".into(),
        ),
        cache_directory: path(
            "network.cni_cache_directory",
            &written.cni_cache_directory,
            "/var/lib/cni".into(),
        ),
        namespace_directory: path(
            "network.cni_namespace_directory",
            &written.cni_namespace_directory,
            namespaces,
        ),
        plugin_directories: written
            .cni_plugin_directories
            .clone()
            .unwrap_or_else(|| ["/opt/cni/bin", "/usr/lib/cni"].map(PathBuf::from).into())
            .into_iter()
            .map(|directory| check.absolute("network.cni_plugin_directories", directory))
            .collect(),
    }
}

fn subnets(check: &mut Check, written: &WrittenNetwork) -> Option<ConfiguredSubnets> {
    let waits_for_pod_cidr = written.ipv4.as_deref() == Some(POD_CIDR);
    let ipv4 = written.ipv4.as_ref().filter(|_| !waits_for_pod_cidr);
    let ipv4 = ipv4.map(|subnet| check.ok("network.ipv4", subnet.parse()));
    let ipv6 = written.ipv6.as_deref().map(|subnet| match subnet {
        "off" => Some(None),
        subnet => check.ok("network.ipv6", subnet.parse()).map(Some),
    });
    let (ipv4, ipv6) =
        (ipv4.map_or(Some(None), |ipv4| ipv4.map(Some)), ipv6.map_or(Some(None), |ipv6| ipv6.map(Some)));
    Some(ConfiguredSubnets { ipv4: ipv4?, ipv6: ipv6?, waits_for_pod_cidr })
}

fn bridge(check: &mut Check, written: &WrittenNetwork, subnets: ConfiguredSubnets) -> Option<BridgeConfig> {
    let defaults = BridgeConfig::default();
    let name = match &written.bridge {
        Some(name) => check.ok("network.bridge", BridgeName::new(name)),
        None => Some(defaults.name),
    };
    let non_masquerade: Option<Vec<IpNet>> = written
        .non_masquerade_cidrs
        .iter()
        .flatten()
        .map(|network| check.ok("network.non_masquerade_cidrs", network.parse()))
        .collect();
    let mtu = match written.mtu {
        Some(bytes) => check.ok("network.mtu", Mtu::new(bytes)).map(Some),
        None => Some(None),
    };
    Some(BridgeConfig {
        name: name?,
        ipv4: subnets.ipv4.unwrap_or(defaults.ipv4),
        ipv6: subnets.ipv6.unwrap_or(defaults.ipv6),
        mtu: mtu?,
        non_masquerade: non_masquerade?,
        forwarding: written.forwarding.unwrap_or(defaults.forwarding),
    })
}

/// The files of the configuration at `file`, in order: the file itself, then those
/// in `<file>.d`.
///
/// # Errors
/// When the directory cannot be listed.
pub fn files(file: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut directory = file.as_os_str().to_owned();
    directory.push(".d");
    let mut more: Vec<PathBuf> = match std::fs::read_dir(&directory) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    more.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    more.sort();
    Ok([file.to_owned()].into_iter().chain(more).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rlimits::WrittenRlimit;

    fn keys(text: &str) -> Vec<&'static str> {
        match Config::check(Written { shim: Some("/shim".into()), ..Written::parse(text).unwrap() }) {
            Ok(_) => Vec::new(),
            Err(mistakes) => mistakes.into_iter().map(|mistake| mistake.key).collect(),
        }
    }

    #[test]
    fn nothing_written_is_a_configuration() {
        assert_eq!(keys(""), [""; 0]);
    }

    #[test]
    fn streaming_on_a_routable_address_takes_tls() {
        let tls = "tls_certificate = '/c'\ntls_key = '/k'";
        for (text, mistakes) in [
            ("address = '127.0.0.1:10010'".to_owned(), &[][..]),
            ("address = '[::1]:0'".to_owned(), &[]),
            ("address = '10.0.0.1:0'".to_owned(), &["streaming.address"]),
            ("address = '[::ffff:127.0.0.1]:0'".to_owned(), &["streaming.address"]),
            ("address = '0.0.0.0:0'".to_owned() + "\n" + tls, &["streaming.address"]),
            ("address = '10.0.0.1:0'".to_owned() + "\n" + tls, &[]),
            ("tls_certificate = '/c'".to_owned(), &["streaming.tls_key"]),
            ("tls_key = '/k'".to_owned(), &["streaming.tls_certificate"]),
            (
                "tls_certificate = 'c'\ntls_key = 'k'".to_owned(),
                &["streaming.tls_certificate", "streaming.tls_key"],
            ),
        ] {
            assert_eq!(keys(&format!("[streaming]\n{text}\n")), mistakes, "{text}");
        }
    }

    #[test]
    fn all_mistakes_are_named_at_once() {
        let text = "root = 'relative'\nlog = 'no=such=filter'\n[network]\nbridge = 'far too long a name'\nipv4 = '1.2.3.4'\nnon_masquerade_cidrs = ['10.0.0.0/8', 'all']\nmtu = 1\n[cgroup]\nparent = '../x'\n\
            [image]\nlayers_at_once = 0\n[container.rlimits]\nfsize = 1\nnofile = '2:1'\n[compat]\ncadvisor_socket = 'x'\n";
        assert_eq!(
            keys(text),
            [
                "root",
                "log",
                "image.layers_at_once",
                "network.ipv4",
                "network.bridge",
                "network.non_masquerade_cidrs",
                "network.mtu",
                "cgroup.parent",
                "compat.cadvisor_socket",
                "container.rlimits",
                "container.rlimits"
            ]
        );
    }

    #[test]
    fn the_default_cgroup_parent_has_the_form_of_the_driver() {
        for (text, mistakes) in [
            ("driver = 'auto'", &[][..]),
            ("driver = 'systemd'", &[]),
            ("driver = 'systemd'\nparent = 'berth.slice'", &[]),
            ("driver = 'systemd'\nparent = '/berth'", &["cgroup.parent"]),
            ("driver = 'cgroupfs'\nparent = '/berth'", &[]),
            ("driver = 'cgroupfs'\nparent = '/berth.slice'", &["cgroup.parent"]),
            ("parent = '/berth'", &[]),
            ("parent = 'berth.slice'", &[]),
            ("driver = 'systemd '", &["cgroup.driver"]),
            ("driver = ''", &["cgroup.driver"]),
        ] {
            assert_eq!(keys(&format!("[cgroup]\n{text}\n")), mistakes, "{text}");
        }
    }

    #[test]
    fn unknown_keys_are_refused() {
        for text in ["rooot = '/x'", "[network]\nname = 'x'", "[nonsense]\n"] {
            assert!(Written::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn later_files_win_key_by_key() {
        let first = Written::parse(
            "root = '/a'\n[network]\nbridge = 'one'\nmtu = 1400\n[container.rlimits]\ncore = 0\nnofile = 1",
        )
        .unwrap();
        let second =
            Written::parse("state = '/s'\n[network]\nbridge = 'two'\n[container.rlimits]\nnofile = '2:3'")
                .unwrap();
        let merged = second.over(first);
        assert_eq!(merged.root, Some("/a".into()));
        assert_eq!(merged.state, Some("/s".into()));
        assert_eq!(merged.network.bridge.as_deref(), Some("two"));
        assert_eq!(merged.network.mtu, Some(1400));
        let rlimits: Vec<_> = merged.container.rlimits.into_iter().collect();
        let [(core, zero), (nofile, both)] = rlimits.as_slice() else { panic!("{rlimits:?}") };
        assert_eq!((core.as_str(), zero), ("core", &WrittenRlimit::Number(0)));
        assert_eq!((nofile.as_str(), both), ("nofile", &WrittenRlimit::Text("2:3".to_owned())));
    }

    #[test]
    fn what_takes_effect_at_once_does_and_the_rest_is_named() {
        let read = |text: &str| {
            Config::check(Written { shim: Some("/shim".into()), ..Written::parse(text).unwrap() }).unwrap()
        };
        let before = read("");
        for (text, changed, waiting) in [
            ("", &[][..], &[][..]),
            ("log = 'debug'", &["log"], &[]),
            ("[registry]\nconfig_path = '/x'", &["registry"], &[]),
            ("[image]\nmin_free_bytes = 1", &["image"], &[]),
            ("[container.rlimits]\nnofile = 7", &["container"], &[]),
            ("root = '/r'", &[], &["root"]),
            // Pinned namespaces lie in the state.
            ("state = '/s'\nsocket = '/x'", &[], &["state", "socket", "network"]),
            ("[network]\nmtu = 1400", &[], &["network"]),
            ("[cgroup]\ndriver = 'cgroupfs'", &[], &["cgroup"]),
            ("log = 'warn'\n[compat]\ncadvisor = true", &["log"], &["compat"]),
        ] {
            let newer = read(text);
            let (config, keys) = before.taking_over(newer.clone());
            assert_eq!(
                (before.differences(&config).as_slice(), keys.as_slice()),
                (changed, waiting),
                "{text}"
            );
            assert_eq!(config.differences(&newer), waiting, "{text}");
        }
    }

    #[test]
    fn what_is_printed_is_read_again_as_the_same() {
        let config = Config::check(Written { shim: Some("/shim".into()), ..Written::default() }).unwrap();
        let text = toml::to_string(&config.written()).unwrap();
        let again = Config::check(Written::parse(&text).unwrap()).unwrap();
        assert_eq!(again.written(), config.written());
    }
}
