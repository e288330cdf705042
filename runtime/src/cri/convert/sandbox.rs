//! `PodSandboxConfig` into [`sandbox::Config`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use berth_cri::v1;
use berth_model::limit::MAX_NAME_BYTES;
use berth_model::sandbox::{Config, Dns, Metadata, PortMapping};
use berth_model::security::Namespaces;
use prost::Message;

use super::field::{self, Field, Rejected, absolute_forward, at_most, no_longer_than, quoted};
use super::{SeLinux, security, sysctl};
use crate::handlers::Handlers;

/// The largest `PodSandboxConfig` or `ContainerConfig`, in bytes on the wire. As JSON in a record
/// it can become six times as long (each byte as `\u0001`), and a record is read up to 64 MiB.
pub(super) const MAX_CONFIG_BYTES: usize = 8 << 20;

/// Limit on labels, and on annotations: bytes of keys and values. Kubernetes stores at most 256 KiB
/// of annotations with an object.
const MAX_LABELS_BYTES: usize = 1 << 20;

/// Limit on port mappings: one for each port.
const MAX_PORT_MAPPINGS: usize = 65_536;

/// Limit on entries of one list of the DNS configuration; a kubelet allows 32 search domains.
const MAX_DNS_ENTRIES: usize = 1024;

/// The longest hostname: `HOST_NAME_MAX` of <linux/limits.h>.
const MAX_HOSTNAME_BYTES: usize = 64;

/// The longest component of a path: `NAME_MAX` of <linux/limits.h>.
const MAX_COMPONENT_BYTES: usize = 255;

/// The sandbox of a `RunPodSandboxRequest`.
///
/// # Errors
/// [`Rejected`], with the first field that is wrong.
pub fn sandbox_config(
    message: v1::PodSandboxConfig,
    runtime_handler: &str,
    handlers: &Handlers,
    selinux: SeLinux,
) -> Result<Config, Rejected> {
    let field = Field::root("config");
    if handlers.find(runtime_handler).is_none() {
        return Err(Field::root("runtime_handler")
            .invalid(format!("unknown runtime handler {}", quoted(runtime_handler))));
    }
    fits_a_record(&field, &message)?;
    let linux = message.linux.unwrap_or_default();
    let linux_field = field.of("linux");
    let security_context = linux.security_context.unwrap_or_default();
    let security_field = linux_field.of("security_context");
    let namespaces = security::sandbox_namespaces(
        &security_field.of("namespace_options"),
        security_context.namespace_options.as_ref(),
    )?;
    let apparmor = security::sandbox_apparmor(&security_field, &security_context, selinux)?;
    Ok(Config {
        metadata: metadata(&field.of("metadata"), message.metadata)?,
        hostname: hostname(&field.of("hostname"), message.hostname)?,
        log_directory: optional_directory(&field.of("log_directory"), message.log_directory)?,
        dns: message.dns_config.map(|config| dns(&field.of("dns_config"), config)).transpose()?,
        port_mappings: port_mappings(&field.of("port_mappings"), message.port_mappings)?,
        labels: labels(&field.of("labels"), message.labels)?,
        annotations: labels(&field.of("annotations"), message.annotations)?,
        cgroup_parent: cgroup_parent(&linux_field.of("cgroup_parent"), linux.cgroup_parent)?,
        sysctls: sysctls(&linux_field.of("sysctls"), linux.sysctls, &namespaces)?,
        namespaces,
        privileged: security_context.privileged,
        apparmor,
        runtime_handler: runtime_handler.to_owned(),
    })
}

/// Checks that it fits a record.
pub(super) fn fits_a_record(field: &Field<'_>, message: &impl Message) -> Result<(), Rejected> {
    let bytes = message.encoded_len();
    if bytes > MAX_CONFIG_BYTES {
        return Err(field.invalid(format!("{bytes} bytes; the limit is {MAX_CONFIG_BYTES}")));
    }
    Ok(())
}

fn metadata(field: &Field<'_>, message: Option<v1::PodSandboxMetadata>) -> Result<Metadata, Rejected> {
    let message = message.ok_or_else(|| field.invalid("missing"))?;
    // The kubelet drops a status in which one of the three is empty.
    field::name(&field.of("name"), &message.name)?;
    field::name(&field.of("uid"), &message.uid)?;
    field::name(&field.of("namespace"), &message.namespace)?;
    let v1::PodSandboxMetadata { name, uid, namespace, attempt } = message;
    Ok(Metadata { name, uid, namespace, attempt })
}

/// hostname(7), and underscores, which the kernel and many hosts know.
fn hostname(field: &Field<'_>, text: String) -> Result<String, Rejected> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    no_longer_than(field, &text, MAX_HOSTNAME_BYTES)?;
    if !text.is_empty() && !text.split('.').all(label) {
        return Err(field.invalid(format!("{} is not a hostname", quoted(&text))));
    }
    Ok(text)
}

fn optional_directory(field: &Field<'_>, text: String) -> Result<String, Rejected> {
    if !text.is_empty() {
        absolute_forward(field, &text)?;
    }
    Ok(text)
}

fn cgroup_parent(field: &Field<'_>, text: String) -> Result<String, Rejected> {
    let text = optional_directory(field, text)?;
    // It appears in lines of /proc/<pid>/cgroup and becomes directory names.
    if text.chars().any(char::is_control) {
        return Err(field.invalid("contains a control character"));
    }
    if text.split('/').any(|component| component.len() > MAX_COMPONENT_BYTES) {
        return Err(field.invalid(format!("a component has more than {MAX_COMPONENT_BYTES} bytes")));
    }
    Ok(text)
}

fn dns(field: &Field<'_>, message: v1::DnsConfig) -> Result<Dns, Rejected> {
    let v1::DnsConfig { servers, searches, options } = message;
    for (name, entries) in [("servers", &servers), ("searches", &searches), ("options", &options)] {
        let list = field.of(name);
        at_most(&list, entries.len(), MAX_DNS_ENTRIES)?;
        for (index, entry) in entries.iter().enumerate() {
            let entry_field = list.at(index);
            field::name(&entry_field, entry)?;
            // Whitespace would begin another entry or another line of resolv.conf.
            if entry.chars().any(char::is_whitespace) {
                return Err(entry_field.invalid(format!("{} contains whitespace", quoted(entry))));
            }
        }
    }
    for (index, server) in servers.iter().enumerate() {
        // resolver(5) accepts an interface after a link-local address: fe80::1%eth0.
        let address = server.split_once('%').map_or(server.as_str(), |(address, _)| address);
        if address.parse::<IpAddr>().is_err() {
            return Err(field
                .of("servers")
                .at(index)
                .invalid(format!("{} is not an address", quoted(server))));
        }
    }
    Ok(Dns { servers, searches, options })
}

fn port_mappings(field: &Field<'_>, mappings: Vec<v1::PortMapping>) -> Result<Vec<PortMapping>, Rejected> {
    at_most(field, mappings.len(), MAX_PORT_MAPPINGS)?;
    mappings.into_iter().enumerate().map(|(index, mapping)| port_mapping(&field.at(index), mapping)).collect()
}

fn port_mapping(field: &Field<'_>, mapping: v1::PortMapping) -> Result<PortMapping, Rejected> {
    let port = |name: &str, number: i32| {
        u16::try_from(number).map_err(|_| field.of(name).invalid(format!("{number} is not a port")))
    };
    let protocol = v1::Protocol::try_from(mapping.protocol)
        .map_err(|_| field.of("protocol").invalid(format!("unknown protocol {}", mapping.protocol)))?;
    let container_port = port("container_port", mapping.container_port)?;
    let host_port = port("host_port", mapping.host_port)?;
    if host_port != 0 && container_port == 0 {
        return Err(field.of("container_port").invalid(format!("host port {host_port} leads to no port")));
    }
    if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<IpAddr>().is_err() {
        return Err(field.of("host_ip").invalid(format!("{} is not an address", quoted(&mapping.host_ip))));
    }
    Ok(PortMapping {
        protocol: port_protocol(protocol).to_owned(),
        container_port,
        host_port,
        host_ip: mapping.host_ip,
    })
}

/// The name of a protocol in [`PortMapping`].
#[must_use]
pub fn port_protocol(protocol: v1::Protocol) -> &'static str {
    match protocol {
        v1::Protocol::Tcp => "TCP",
        v1::Protocol::Udp => "UDP",
        v1::Protocol::Sctp => "SCTP",
    }
}

/// Labels or annotations: any text, within bounds.
pub(super) fn labels(
    field: &Field<'_>,
    labels: BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, Rejected> {
    let bytes: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAX_LABELS_BYTES {
        return Err(field.invalid(format!("{bytes} bytes; the limit is {MAX_LABELS_BYTES}")));
    }
    for key in labels.keys() {
        no_longer_than(&field.key(key), key, MAX_NAME_BYTES)?;
    }
    Ok(labels)
}

/// Names with dots, of parameters in the pod's own namespaces.
fn sysctls(
    field: &Field<'_>,
    asked: BTreeMap<String, String>,
    namespaces: &Namespaces,
) -> Result<BTreeMap<String, String>, Rejected> {
    at_most(field, asked.len(), sysctl::MAX_SYSCTLS)?;
    let mut checked = BTreeMap::new();
    for (name, value) in asked {
        let entry = field.key(&name);
        let dotted = sysctl::name(&entry, &name, namespaces)?;
        sysctl::check_value(&entry, &value)?;
        if checked.insert(dotted, value).is_some() {
            return Err(entry.invalid("given twice, with dots and with slashes"));
        }
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use berth_model::security::NamespaceMode;
    use berth_model::security::Profile;

    use super::*;

    fn asked() -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "nginx".into(),
                uid: "0b3c".into(),
                namespace: "default".into(),
                attempt: 3,
            }),
            hostname: "nginx-0.example".into(),
            log_directory: "/var/log/pods/default_nginx_0b3c".into(),
            dns_config: Some(v1::DnsConfig {
                servers: vec!["10.10.10.10".into(), "fe80::1%eth0".into()],
                searches: vec!["google.com".into(), ".".into()],
                options: vec!["ndots:8".into()],
            }),
            port_mappings: vec![v1::PortMapping {
                protocol: v1::Protocol::Udp.into(),
                container_port: 53,
                host_port: 8053,
                ..Default::default()
            }],
            labels: BTreeMap::from([("a".into(), "b\n\0".into())]),
            annotations: BTreeMap::from([("c".into(), String::new())]),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/burstable/pod0b3c".into(),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        pid: v1::NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    privileged: true,
                    seccomp: Some(v1::SecurityProfile::default()),
                    ..Default::default()
                }),
                sysctls: BTreeMap::from([("kernel/shm_rmid_forced".into(), "1".into())]),
                ..Default::default()
            }),
            windows: None,
        }
    }

    fn linux(message: &mut v1::PodSandboxConfig) -> &mut v1::LinuxPodSandboxConfig {
        message.linux.get_or_insert_default()
    }

    fn options(message: &mut v1::PodSandboxConfig) -> &mut v1::NamespaceOption {
        linux(message).security_context.get_or_insert_default().namespace_options.get_or_insert_default()
    }

    fn sandbox_config(
        message: v1::PodSandboxConfig,
        handler: &str,
        selinux: SeLinux,
    ) -> Result<Config, Rejected> {
        super::sandbox_config(message, handler, &Handlers::own(), selinux)
    }

    #[test]
    fn what_a_kubelet_asks_for_is_kept() {
        let config = sandbox_config(asked(), "berth", SeLinux::On).unwrap();
        let expected = Config {
            metadata: Metadata {
                name: "nginx".into(),
                uid: "0b3c".into(),
                namespace: "default".into(),
                attempt: 3,
            },
            hostname: "nginx-0.example".into(),
            log_directory: "/var/log/pods/default_nginx_0b3c".into(),
            dns: Some(Dns {
                servers: vec!["10.10.10.10".into(), "fe80::1%eth0".into()],
                searches: vec!["google.com".into(), ".".into()],
                options: vec!["ndots:8".into()],
            }),
            port_mappings: vec![PortMapping {
                protocol: "UDP".into(),
                container_port: 53,
                host_port: 8053,
                host_ip: String::new(),
            }],
            labels: asked().labels,
            annotations: asked().annotations,
            cgroup_parent: "/kubepods/burstable/pod0b3c".into(),
            namespaces: Namespaces { pid: NamespaceMode::Container, ..Namespaces::default() },
            privileged: true,
            apparmor: Profile::RuntimeDefault,
            sysctls: BTreeMap::from([("kernel.shm_rmid_forced".into(), "1".into())]),
            runtime_handler: "berth".into(),
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn metadata_alone_is_enough() {
        let message = v1::PodSandboxConfig { metadata: asked().metadata, ..Default::default() };
        let config = sandbox_config(message, "", SeLinux::On).unwrap();
        assert_eq!(
            config,
            Config {
                metadata: config.metadata.clone(),
                apparmor: Profile::RuntimeDefault,
                ..Config::default()
            },
            "everything else is unset"
        );
        assert_eq!(config.dns, None, "an absent DNS configuration is not an empty one");
    }

    #[test]
    fn an_unknown_handler_is_refused() {
        for handler in ["runc", "Berth", " ", "berth\0", &"x".repeat(1 << 20)] {
            let refused = sandbox_config(asked(), handler, SeLinux::On).unwrap_err().to_string();
            assert!(refused.starts_with("runtime_handler: ") && refused.len() < 400, "{refused}");
        }
    }

    type Change = fn(&mut v1::PodSandboxConfig);

    #[test]
    fn each_wrong_field_is_named() {
        let cases: &[(&str, Change)] = &[
            ("config.metadata", |m| m.metadata = None),
            ("config.metadata.name", |m| m.metadata.as_mut().unwrap().name.clear()),
            ("config.metadata.uid", |m| m.metadata.as_mut().unwrap().uid.clear()),
            ("config.metadata.namespace", |m| m.metadata.as_mut().unwrap().namespace.clear()),
            ("config.metadata.name", |m| m.metadata.as_mut().unwrap().name = "n".repeat(1025)),
            ("config.metadata.uid", |m| m.metadata.as_mut().unwrap().uid = "a\nb".into()),
            ("config.hostname", |m| m.hostname = "a b".into()),
            ("config.hostname", |m| m.hostname = "a\nb".into()),
            ("config.hostname", |m| m.hostname = "a..b".into()),
            ("config.hostname", |m| m.hostname = "-a".into()),
            ("config.hostname", |m| m.hostname = ".".into()),
            ("config.hostname", |m| m.hostname = "../x".into()),
            ("config.hostname", |m| m.hostname = "a".repeat(65)),
            ("config.log_directory", |m| m.log_directory = "var/log".into()),
            ("config.log_directory", |m| m.log_directory = "/var/../etc".into()),
            ("config.log_directory", |m| m.log_directory = "/var\0".into()),
            ("config.dns_config.servers[0]", |m| m.dns_config.as_mut().unwrap().servers[0].clear()),
            ("config.dns_config.servers[1]", |m| {
                m.dns_config.as_mut().unwrap().servers[1] = "dns.google".into();
            }),
            ("config.dns_config.servers[0]", |m| {
                m.dns_config.as_mut().unwrap().servers[0] = "1.1.1.1\nsearch evil".into();
            }),
            ("config.dns_config.searches[0]", |m| {
                m.dns_config.as_mut().unwrap().searches[0] = "a b".into();
            }),
            ("config.dns_config.options[0]", |m| {
                m.dns_config.as_mut().unwrap().options[0] = "a\u{2028}b".into();
            }),
            ("config.dns_config.options", |m| {
                m.dns_config.as_mut().unwrap().options = vec!["a".into(); 1025];
            }),
            ("config.port_mappings[0].protocol", |m| m.port_mappings[0].protocol = 9),
            ("config.port_mappings[0].container_port", |m| m.port_mappings[0].container_port = 65_536),
            ("config.port_mappings[0].container_port", |m| m.port_mappings[0].container_port = -1),
            ("config.port_mappings[0].host_port", |m| m.port_mappings[0].host_port = 1 << 20),
            ("config.port_mappings[0].container_port", |m| {
                m.port_mappings[0] = v1::PortMapping { host_port: 80, ..v1::PortMapping::default() };
            }),
            ("config.port_mappings[0].host_ip", |m| m.port_mappings[0].host_ip = "all".into()),
            ("config.port_mappings", |m| m.port_mappings = vec![v1::PortMapping::default(); 65_537]),
            ("config.labels", |m| drop(m.labels.insert("big".into(), "x".repeat(1 << 20)))),
            ("config.annotations", |m| drop(m.annotations.insert("big".into(), "x".repeat(1 << 20)))),
            ("config", |m| drop(m.annotations.insert("big".into(), "x".repeat(8 << 20)))),
            ("config.linux.cgroup_parent", |m| linux(m).cgroup_parent = "kubepods".into()),
            ("config.linux.cgroup_parent", |m| linux(m).cgroup_parent = "/kubepods/../..".into()),
            ("config.linux.cgroup_parent", |m| linux(m).cgroup_parent = "/a\nb".into()),
            ("config.linux.cgroup_parent", |m| linux(m).cgroup_parent = format!("/{}", "a".repeat(256))),
            ("config.linux.sysctls[\"kernel.hostname\"]", |m| {
                linux(m).sysctls.insert("kernel.hostname".into(), "x".into());
            }),
            ("config.linux.sysctls[\"net.core.somaxconn\"]", |m| {
                linux(m).sysctls.insert("net.core.somaxconn".into(), "1\n2".into());
            }),
            ("config.linux.sysctls[\"net.core.somaxconn\"]", |m| {
                linux(m).sysctls.insert("net.core.somaxconn".into(), "1".into());
                options(m).network = v1::NamespaceMode::Node.into();
            }),
            ("config.linux.sysctls[\"kernel/shm_rmid_forced\"]", |m| {
                linux(m).sysctls.insert("kernel.shm_rmid_forced".into(), "0".into());
            }),
            ("config.linux.security_context.namespace_options.network", |m| options(m).network = 1),
            ("config.linux.security_context.namespace_options.network", |m| options(m).network = 3),
            ("config.linux.security_context.namespace_options.network", |m| options(m).network = -1),
            ("config.linux.security_context.namespace_options.ipc", |m| options(m).ipc = 1),
            ("config.linux.security_context.namespace_options.ipc", |m| options(m).ipc = 4),
            ("config.linux.security_context.namespace_options.pid", |m| options(m).pid = 3),
            ("config.linux.security_context.namespace_options.pid", |m| options(m).pid = 77),
            ("config.linux.security_context.namespace_options.target_id", |m| {
                options(m).target_id = "abc".into();
            }),
            ("config.linux.security_context.namespace_options.userns_options", |m| {
                options(m).userns_options =
                    Some(v1::UserNamespace { mode: 2, uids: vec![v1::IdMapping::default()], gids: vec![] });
            }),
            ("config.linux.security_context.namespace_options.userns_options.mode", |m| {
                options(m).userns_options = Some(v1::UserNamespace { mode: 1, ..Default::default() });
            }),
            ("config.linux.security_context.seccomp.localhost_ref", |m| {
                let context = linux(m).security_context.as_mut().unwrap();
                context.seccomp.as_mut().unwrap().localhost_ref = "/x".into();
            }),
        ];
        for (index, (field, change)) in cases.iter().enumerate() {
            let mut message = asked();
            change(&mut message);
            match sandbox_config(message, "", SeLinux::On) {
                Err(Rejected::Invalid { field: found, reason }) => {
                    assert_eq!(&found, field, "case {index}: {reason}");
                    assert!(reason.len() < 1024, "case {index}: {} bytes", reason.len());
                }
                other => panic!("case {index}, {field}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_not_offered_is_said_so() {
        let cases: &[(&str, Change)] = &[
            ("config.linux.security_context.namespace_options.userns_options", |m| {
                options(m).userns_options = Some(v1::UserNamespace::default());
            }),
            ("config.linux.security_context.selinux_options", |m| {
                linux(m).security_context.as_mut().unwrap().selinux_options =
                    Some(v1::SeLinuxOption { level: "s0".into(), ..Default::default() });
            }),
        ];
        for (field, change) in cases {
            let mut message = asked();
            change(&mut message);
            match sandbox_config(message, "", SeLinux::On) {
                Err(Rejected::NotOffered { field: found, .. }) => assert_eq!(&found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn messages_that_ask_for_nothing_are_taken() {
        let changes: &[Change] = &[
            |m| {
                linux(m).security_context.as_mut().unwrap().selinux_options =
                    Some(v1::SeLinuxOption::default())
            },
            |m| options(m).userns_options = Some(v1::UserNamespace { mode: 2, ..Default::default() }),
            |m| m.dns_config = Some(v1::DnsConfig::default()),
            |m| m.log_directory.clear(),
            |m| m.hostname.clear(),
            |m| m.linux = None,
            // Of no consequence: no process of the pod's runs as either.
            |m| {
                linux(m).security_context.as_mut().unwrap().run_as_group = Some(v1::Int64Value { value: 5 });
            },
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut message = asked();
            change(&mut message);
            assert_eq!(sandbox_config(message, "", SeLinux::On).err(), None, "case {index}");
        }
    }
}
