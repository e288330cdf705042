//! The configuration as written: files, overridden by flags.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::rlimits::WrittenRlimits;

/// A part of the configuration that may come from several sources.
trait Layered: Sized {
    /// The keys of `self`, and those of `earlier` that it does not set.
    #[must_use]
    fn over(self, earlier: Self) -> Self;
}

impl<T> Layered for Option<T> {
    fn over(self, earlier: Self) -> Self {
        self.or(earlier)
    }
}

impl Layered for WrittenRlimits {
    fn over(self, earlier: Self) -> Self {
        earlier.into_iter().chain(self).collect()
    }
}

/// Structs of optional keys, with the code that is the same for every key.
macro_rules! written {
    ($($(#[$meta:meta])* $name:ident { $($(#[$key_meta:meta])* $key:ident: $type:ty,)* })*) => {
        $($(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $($(#[$key_meta])* pub $key: $type,)*
        }

        impl Layered for $name {
            fn over(self, earlier: Self) -> Self {
                Self { $($key: self.$key.over(earlier.$key),)* }
            }
        }

        impl $name {
            /// The keys and sections whose values differ.
            #[must_use]
            pub fn differences(&self, other: &Self) -> Vec<&'static str> {
                [$((stringify!($key), self.$key != other.$key)),*]
                    .into_iter()
                    .filter(|(_, differs)| *differs)
                    .map(|(key, _)| key)
                    .collect()
            }
        })*
    };
}

written! {
    /// The configuration as written. Every key is optional.
    Written {
        /// Durable files. Default `/var/lib/berth`.
        root: Option<PathBuf>,
        /// Directory of files that do not survive a reboot. Default `/run/berth`.
        state: Option<PathBuf>,
        /// The socket. Default `berth.sock` in `state`.
        socket: Option<PathBuf>,
        /// The shim's program. Default: beside the daemon's, then `/usr/libexec/berth/berth-shim`.
        shim: Option<PathBuf>,
        /// What is logged: `error`, `warn`, `info`, `debug`, `trace`, or a filter of the tracing
        /// crate. Default `info`.
        log: Option<String>,
        /// Registries.
        registry: WrittenRegistry,
        /// Images.
        image: WrittenImage,
        /// The built-in network.
        network: WrittenNetwork,
        /// Cgroups.
        cgroup: WrittenCgroup,
        /// Compatibility with programs that only know other runtimes.
        compat: WrittenCompat,
        /// Settings of every container.
        container: WrittenContainer,
        /// Exec and port forwarding.
        streaming: WrittenStreaming,
    }

    /// `[registry]`.
    WrittenRegistry {
        /// The directory of mirror rules, `<host>/hosts.toml` in it. Default: the first that exists
        /// of `/etc/berth/certs.d` and `/etc/containerd/certs.d`.
        config_path: Option<PathBuf>,
        /// Hosts of token services outside their registry's domain that may be sent credentials.
        trusted_token_hosts: Option<Vec<String>>,
    }

    /// `[image]`.
    WrittenImage {
        /// Layers fetched and unpacked at the same time. Default 3.
        layers_at_once: Option<usize>,
        /// The largest unpacked size of an image, in bytes. Default 64 GiB.
        max_image_bytes: Option<u64>,
        /// What unpacking leaves free, in bytes. Default 1 GiB.
        min_free_bytes: Option<u64>,
        /// What unpacking leaves free, in percent of the filesystem. Default 5.
        min_free_percent: Option<u8>,
    }

    /// `[network]`.
    WrittenNetwork {
        /// `auto`, `bridge` or `cni`. Default `auto`: the CNI configuration of the node where it
        /// has one, else the built-in bridge, unless the node has a kubelet, whose cluster brings a
        /// network.
        kind: Option<String>,
        /// The directory of CNI configurations, of which the first by name is used. Default
        /// `/etc/cni/net.d`.
        cni_config_directory: Option<PathBuf>,
        /// Directories of CNI plugins. Default `/opt/cni/bin` and `/usr/lib/cni`.
        cni_plugin_directories: Option<Vec<PathBuf>>,
        /// Where attachments are kept. Default `/var/lib/cni`, as by libcni.
        cni_cache_directory: Option<PathBuf>,
        /// Where the network namespaces of pods with CNI are pinned. Default `/run/netns` for the
        /// daemon with the default `state`, else `netns` in `state`.
        cni_namespace_directory: Option<PathBuf>,
        /// The bridge's name, at most 15 characters. Default `berth0`.
        bridge: Option<String>,
        /// The pods' IPv4 network; or `pod-cidr`, for pods to wait for the pod CIDR that the
        /// cluster gives the node. Default: that, once it is known, and `10.88.0.0/16` until then.
        ipv4: Option<String>,
        /// The pods' IPv6 network, or `off`. Default: as the cluster gives it, or
        /// `fd62:6572:7468::/64` without one; where the host has IPv6.
        ipv6: Option<String>,
        /// MTU. Default: the kernel's.
        mtu: Option<u32>,
        /// Whether Berth may turn on forwarding on the host. Default true.
        forwarding: Option<bool>,
        /// Networks to which packets of pods go under the pod's own address: the pod networks of
        /// the cluster's other nodes. Default none.
        non_masquerade_cidrs: Option<Vec<String>>,
    }

    /// `[cgroup]`.
    WrittenCgroup {
        /// `auto`, `cgroupfs` or `systemd`. Default `auto`: the driver whose form `parent` has,
        /// else systemd where it is process 1 on cgroup v2, else cgroupfs.
        driver: Option<String>,
        /// The parent of pods that name none. Default `/berth`, with the systemd driver
        /// `berth.slice`.
        parent: Option<String>,
    }

    /// `[streaming]`: where the clients of exec and port forwarding connect.
    WrittenStreaming {
        /// Address and port, 0 for any. Default `127.0.0.1:0`. Other than loopback addresses
        /// require TLS.
        address: Option<SocketAddr>,
        /// The file of the server's certificate chain, PEM. With `tls_key`.
        tls_certificate: Option<PathBuf>,
        /// The file of its private key, PEM.
        tls_key: Option<PathBuf>,
    }

    /// `[container]`.
    WrittenContainer {
        /// Resource limits of the programs in containers, by name, in place of the defaults of
        /// `rlimits.rs`.
        rlimits: WrittenRlimits,
    }

    /// `[compat]`: compatibility with programs that only know other runtimes.
    WrittenCompat {
        /// Whether to answer the cAdvisor in a kubelet as CRI-O would. Default
        /// false.
        cadvisor: Option<bool>,
        /// The socket for that. Default `/var/run/crio/crio.sock`, the only one that a cAdvisor
        /// knows.
        cadvisor_socket: Option<PathBuf>,
    }
}

impl Written {
    /// Reads one file's text.
    ///
    /// # Errors
    /// A syntax or type error, with line and column.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// The keys of `self`, and those of `earlier` that it does not set.
    #[must_use]
    pub fn over(self, earlier: Self) -> Self {
        Layered::over(self, earlier)
    }
}
