//! Kernel parameters that a pod may set: only those of its own network and IPC namespaces.

use berth_model::security::{NamespaceMode, Namespaces};

use super::field::{Field, Rejected, no_longer_than, quoted};

/// Limit on parameters in one request. There are about 1500 files below `/proc/sys/net` with one
/// interface.
pub(super) const MAX_SYSCTLS: usize = 1024;

/// The longest value: one page, which is what the kernel reads at once (`proc_sys_call_handler`),
/// less its NUL.
const MAX_VALUE_BYTES: usize = 4095;

/// The longest name.
const MAX_NAME_BYTES: usize = 255;

/// The parameter `text`, with dots. sysctl(8) accepts dots or slashes; a name that needs both, such
/// as that of an interface with a dot in its name, is refused, because readers would split it
/// differently.
pub(super) fn name(field: &Field<'_>, text: &str, namespaces: &Namespaces) -> Result<String, Rejected> {
    no_longer_than(field, text, MAX_NAME_BYTES)?;
    let separator = if text.contains('/') { '/' } else { '.' };
    let components: Vec<&str> = text.split(separator).collect();
    let plain = |component: &&str| {
        !component.is_empty()
            && component.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    if components.len() < 2 || !components.iter().all(plain) {
        return Err(field.invalid(format!("{} is not the name of a kernel parameter", quoted(text))));
    }
    let ours = |mode: NamespaceMode, namespace: &str| match mode {
        NamespaceMode::Pod => Ok(()),
        _ => Err(field.invalid(format!(
            "it belongs to the host, because the pod uses the host's {namespace} namespace"
        ))),
    };
    match components.as_slice() {
        ["net", ..] => ours(namespaces.network, "network")?,
        ["fs", "mqueue", _] => ours(namespaces.ipc, "IPC")?,
        // sem and sem_next_id, shm..., msg...: ipc/ipc_sysctl.c, all of it per namespace.
        ["kernel", name]
            if matches!(*name, "sem" | "sem_next_id")
                || name.starts_with("shm")
                || name.starts_with("msg") =>
        {
            ours(namespaces.ipc, "IPC")?;
        }
        _ => return Err(field.invalid("it is not namespaced, and belongs to the host")),
    }
    Ok(components.join("."))
}

/// A value: one line, not empty.
pub(super) fn check_value(field: &Field<'_>, value: &str) -> Result<(), Rejected> {
    no_longer_than(field, value, MAX_VALUE_BYTES)?;
    if value.trim().is_empty() {
        return Err(field.invalid("the value is empty"));
    }
    if value.chars().any(|character| character.is_control() && character != '\t') {
        return Err(field.invalid("the value is not one line of text"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespaces(network: NamespaceMode, ipc: NamespaceMode) -> Namespaces {
        Namespaces { network, ipc, ..Namespaces::default() }
    }

    #[test]
    fn parameters_of_the_pods_own_namespaces_are_taken_in_either_spelling() {
        let own = Namespaces::default();
        let cases = [
            ("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ip_unprivileged_port_start"),
            ("net/ipv4/ping_group_range", "net.ipv4.ping_group_range"),
            ("net.ipv6.conf.eth0.accept_ra", "net.ipv6.conf.eth0.accept_ra"),
            ("kernel.shm_rmid_forced", "kernel.shm_rmid_forced"),
            ("kernel/shmmax", "kernel.shmmax"),
            ("kernel.msgmnb", "kernel.msgmnb"),
            ("kernel.sem", "kernel.sem"),
            ("fs.mqueue.msg_max", "fs.mqueue.msg_max"),
            ("fs/mqueue/msg_max", "fs.mqueue.msg_max"),
        ];
        for (text, dotted) in cases {
            assert_eq!(name(&Field::root("s"), text, &own).as_deref(), Ok(dotted), "{text}");
        }
    }

    #[test]
    fn parameters_of_the_host_and_tricks_are_refused() {
        let own = Namespaces::default();
        let long = format!("net.{}", "a".repeat(MAX_NAME_BYTES));
        for text in [
            "",
            ".",
            "/",
            "net",
            "net.",
            ".net.ipv4",
            "net..ipv4",
            "/net/ipv4/ip_forward",
            "/proc/sys/net/ipv4/ip_forward",
            "net/../kernel/core_pattern",
            "net/./ipv4",
            "net.ipv4/../../kernel.core_pattern",
            "net.ipv4.conf.eth0/100.forwarding",
            "net/ipv4/conf/eth0.100/forwarding",
            "net.ipv4.a=b",
            "net.ipv4.a+kernel.x",
            "net.ipv4.a b",
            "net.ipv4.a\nkernel.core_pattern",
            "net.ipv4.a\0",
            "net.ipv4.ä",
            "NET.ipv4.ip_forward",
            "networks.ipv4.x",
            "kernel.core_pattern",
            "kernel.hostname",
            "kernel.domainname",
            "kernel.shm.x",
            "kernel.semaphore",
            "kernel.panic",
            "fs.mqueue",
            "fs.mqueue.a.b",
            "fs.file-max",
            "vm.overcommit_memory",
            "user.max_user_namespaces",
            &long,
        ] {
            assert!(name(&Field::root("s"), text, &own).is_err(), "{text:?}");
        }
    }

    #[test]
    fn nothing_is_set_through_a_namespace_of_the_host() {
        let cases = [
            ("net.core.somaxconn", NamespaceMode::Node, NamespaceMode::Pod, false),
            ("net.core.somaxconn", NamespaceMode::Pod, NamespaceMode::Node, true),
            ("kernel.shmmax", NamespaceMode::Node, NamespaceMode::Pod, true),
            ("kernel.shmmax", NamespaceMode::Pod, NamespaceMode::Node, false),
            ("kernel.sem", NamespaceMode::Pod, NamespaceMode::Node, false),
            ("fs.mqueue.msg_max", NamespaceMode::Pod, NamespaceMode::Node, false),
        ];
        for (text, network, ipc, good) in cases {
            let found = name(&Field::root("s"), text, &namespaces(network, ipc));
            assert_eq!(found.is_ok(), good, "{text} {network:?} {ipc:?}");
        }
    }

    #[test]
    fn a_value_is_one_line_with_something_in_it() {
        let cases = [
            ("1", true),
            ("0 2147483647", true),
            ("32768\t60999", true),
            ("", false),
            (" ", false),
            ("1\n", false),
            ("1\r", false),
            ("1\0", false),
        ];
        for (value, good) in cases {
            assert_eq!(check_value(&Field::root("s"), value).is_ok(), good, "{value:?}");
        }
        assert!(check_value(&Field::root("s"), &"1".repeat(MAX_VALUE_BYTES)).is_ok());
        assert!(check_value(&Field::root("s"), &"1".repeat(MAX_VALUE_BYTES + 1)).is_err());
    }
}
