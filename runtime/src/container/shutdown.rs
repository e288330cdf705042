//! How a container ends when the machine shuts down, where systemd owns its cgroup: by its own stop
//! signal, with the grace period of its pod.
//!
//! A kubelet with `shutdownGracePeriod` has ended its pods before; this is for other pods, and for
//! kubelets without it.

use std::time::Duration;

use berth_cgroup::Ending;
use berth_model::container::Config;
use berth_model::security::NamespaceMode;

/// The kubelet's annotation with the grace period of a pod, in seconds: kubelet's
/// `kuberuntime/labels.go`.
const GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";

/// Kubernetes' default.
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// systemd's default for services (`DefaultTimeoutStopSec=`). A pod does not hold the machine
/// up for longer than that.
const MAX_GRACE: Duration = Duration::from_secs(90);

/// How a container with this stop signal ends. `sandbox_id` is the pod's.
pub(super) fn ending<'a>(config: &Config, stop_signal: i32, sandbox_id: &'a str) -> Ending<'a> {
    let asked = config.annotations.get(GRACE_PERIOD).and_then(|seconds| seconds.parse().ok());
    Ending {
        signal: stop_signal,
        grace: asked.map_or(DEFAULT_GRACE, Duration::from_secs).min(MAX_GRACE),
        // If process 1 of its pid namespace ended first, it would be killed at once.
        before: (config.security.namespaces.pid == NamespaceMode::Pod).then_some(sandbox_id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grace_is_the_pods_within_bounds() {
        for (annotation, seconds) in [
            (None, 30),
            (Some("5"), 5),
            (Some("0"), 0),
            (Some("90"), 90),
            (Some("3600"), 90),
            (Some("18446744073709551615"), 90),
            (Some("18446744073709551616"), 30),
            (Some("-1"), 30),
            (Some(""), 30),
            (Some("soon"), 30),
        ] {
            let mut config = Config::default();
            config.security.namespaces.pid = NamespaceMode::Container;
            config.annotations.extend(annotation.map(|text| (GRACE_PERIOD.to_owned(), text.to_owned())));
            let expected = Ending { signal: 3, grace: Duration::from_secs(seconds), before: None };
            assert_eq!(ending(&config, 3, "0a1"), expected, "{annotation:?}");
        }
    }

    #[test]
    fn process_1_of_a_shared_pid_namespace_ends_last() {
        let mut config = Config::default();
        for (mode, before) in [
            (NamespaceMode::Pod, Some("0a1")),
            (NamespaceMode::Container, None),
            (NamespaceMode::Node, None),
            (NamespaceMode::Target, None),
        ] {
            config.security.namespaces.pid = mode;
            assert_eq!(ending(&config, 15, "0a1").before, before, "{mode:?}");
        }
    }
}
