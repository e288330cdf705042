//! Whether packets that only cross a bridge pass the rules for routed packets, too: what kube-proxy
//! needs to change the answers of a pod to another one on the same node back.
//!
//! The kernel's module `br_netfilter` does that, and as soon as it is loaded it does it for every
//! bridge of the host. Where Berth loads it, it turns that off again, and on for its own bridge.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_sys::program::Run;

/// The sysctls of the module; there when it is loaded.
const SYSCTLS: &str = "/proc/sys/net/bridge";
/// Those that concern every bridge of a network namespace.
const OF_ALL_BRIDGES: [&str; 3] =
    ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables"];

const MODPROBE: [&str; 2] = ["/usr/sbin/modprobe", "/sbin/modprobe"];
const DEADLINE: Duration = Duration::from_secs(10);

/// Loads the module if it is not loaded and there is one. Whether it is loaded then; a kernel
/// without it is served in another way. To be called on a thread in the node's network namespace.
pub(crate) fn can_be_tracked() -> bool {
    let sysctls = Path::new(SYSCTLS);
    if sysctls.exists() {
        return true;
    }
    let Some(program) = MODPROBE.map(PathBuf::from).into_iter().find(|path| path.is_file()) else {
        return false;
    };
    let run = Run {
        program: &program,
        arguments: &["--quiet", "br_netfilter"],
        environment: &[],
        stdin: b"",
        deadline: DEADLINE,
        max_output: None,
        max_message: 0,
        caller: None,
    };
    let loaded = run.to_end().is_ok_and(|ended| ended.is_some_and(|ended| ended.status.success()));
    if !loaded || !sysctls.exists() {
        return false;
    }
    for name in OF_ALL_BRIDGES {
        // A network namespace that may not change them keeps the kernel's setting.
        let _ = fs::write(sysctls.join(name), "0");
    }
    true
}
