//! Kernel parameters that a pod may set: those of its own network and IPC namespaces, and no other.

use super::field::{Field, Rejected, no_longer_than, quoted};
use berth_model::security::{NamespaceMode, Namespaces};

/// Parameters in one request. There are about 1500 files below `/proc/sys/net` with one interface.
pub(super) const MAX_SYSCTLS: usize = 1024;

/// The longest value: one page, which is what the kernel reads at once (`proc_sys_call_handler`), less its NUL.
const MAX_VALUE_BYTES: usize = 4095;

/// The longest name.
const MAX_NAME_BYTES: usize = 255;

/// The parameter called `text`, with dots. sysctl(8) takes dots or slashes; a name that needs both, as that of an interface with a dot in
/// its name does, is refused, because each reader would cut it elsewhere.
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
    let ours =
        |mode: NamespaceMode, namespace: &str| match mode {
            NamespaceMode::Pod => Ok(()),
            _ => Err(field
                .invalid(format!("it is the host's, because the pod uses the host's {namespace} namespace"))),
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
        _ => return Err(field.invalid("it belongs to no namespace that a pod can have, but to the host")),
    }
    Ok(components.join("."))
}

/// One line with something in it.
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
