//! The hostname of a pod.

use std::io;

use berth_model::sandbox::Config;
use berth_model::security::NamespaceMode;

/// The host's hostname: proc_sys_kernel(5).
pub(crate) const HOST_FILE: &str = "/proc/sys/kernel/hostname";

/// The one asked for, or the host's.
///
/// # Errors
/// When the host's cannot be read.
pub(super) fn of(config: &Config) -> io::Result<String> {
    if !config.hostname.is_empty() && config.namespaces.network != NamespaceMode::Node {
        return Ok(config.hostname.clone());
    }
    Ok(std::fs::read_to_string(HOST_FILE)?.trim_end().to_owned())
}
