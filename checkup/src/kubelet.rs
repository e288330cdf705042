//! Checks whether the configuration of a kubelet on this node, if any, names this daemon.

use std::path::Path;

use crate::{Daemon, Finding, Grade, finding, text, without_var};

/// The path that kubeadm and most others use.
pub(crate) const CONFIGURATION: &str = "var/lib/kubelet/config.yaml";

/// Where an older kubeadm puts flags, which win over the configuration.
const FLAGS: &str = "var/lib/kubelet/kubeadm-flags.env";

/// The kubelet's default endpoint: `KubeletConfiguration.containerRuntimeEndpoint`.
const DEFAULT_ENDPOINT: &str = "unix:///run/containerd/containerd.sock";

/// No findings without a kubelet.
pub(crate) fn look(node: &Path, daemon: &Daemon) -> Vec<Finding> {
    let Some(configuration) = text(node, CONFIGURATION) else { return Vec::new() };
    let flags = text(node, FLAGS).unwrap_or_default();
    let mut findings = vec![endpoint(&configuration, &flags, daemon)];
    findings.extend(driver(&configuration, daemon));
    findings
}

fn endpoint(configuration: &str, flags: &str, daemon: &Daemon) -> Finding {
    let flag = flag(flags, "--container-runtime-endpoint");
    let (place, found) = match (flag, value(configuration, "containerRuntimeEndpoint")) {
        (Some(endpoint), _) => (format!("--container-runtime-endpoint in /{FLAGS}"), endpoint),
        (None, Some(endpoint)) => (format!("containerRuntimeEndpoint in /{CONFIGURATION}"), endpoint),
        (None, None) => {
            (format!("containerRuntimeEndpoint, which is not in /{CONFIGURATION},"), DEFAULT_ENDPOINT)
        }
    };
    if path_of(found) == path_of(&daemon.socket.to_string_lossy()) {
        return finding(Grade::Good, "kubelet", "is configured to use Berth");
    }
    let text = format!(
        "{place} is {found}, so this kubelet uses another runtime: set unix://{} and restart the kubelet",
        daemon.socket.display()
    );
    finding(Grade::Note, "kubelet", text)
}

/// The path of a socket, with or without `unix://`.
fn path_of(endpoint: &str) -> &str {
    without_var(endpoint.strip_prefix("unix://").unwrap_or(endpoint))
}

fn driver(configuration: &str, daemon: &Daemon) -> Option<Finding> {
    // The kubelet's default. kubeadm's default is systemd, and it writes it to the file.
    let found = value(configuration, "cgroupDriver").unwrap_or("cgroupfs");
    let own = daemon.cgroup_driver.as_str();
    if own.is_empty() || found == own {
        return None;
    }
    let text = format!(
        "its cgroupDriver is {found} and Berth's is {own}: a kubelet before 1.31 cannot create pods with that, a newer one asks Berth and uses \
         the answer; set cgroupDriver: {own} in /{CONFIGURATION} and restart the kubelet"
    );
    Some(finding(Grade::Note, "kubelet", text))
}

/// The value of a key at the top level, on one line, as kubeadm writes it. Not full YAML: other
/// forms count as absent.
fn value<'a>(yaml: &'a str, key: &str) -> Option<&'a str> {
    yaml.lines().find_map(|line| {
        let value = line.strip_prefix(key)?.strip_prefix(':')?;
        let value = value.split(" #").next().unwrap_or_default().trim();
        let value = value.trim_matches(|character| matches!(character, '"' | '\''));
        (!value.is_empty()).then_some(value)
    })
}

/// The value of a flag in a line like `KUBELET_KUBEADM_ARGS="--a=b --c=d"`.
fn flag<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let mut words =
        line.split(|character: char| character.is_whitespace() || matches!(character, '"' | '\''));
    words.find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{each_is_named, troubles};

    /// One that needs no CNI configuration.
    fn daemon() -> Daemon {
        Daemon { network_kind: "bridge".to_owned(), ..crate::tests::daemon() }
    }

    const CONFIGURED: &str = "kind: KubeletConfiguration\ncgroupDriver: systemd\ncontainerRuntimeEndpoint: unix:///run/berth/berth.sock\n";

    #[test]
    fn a_kubelet_of_another_runtime_or_driver_is_named() {
        use Grade::Note;
        let path = "var/lib/kubelet/config.yaml";
        each_is_named(&[
            (
                path,
                Some(&CONFIGURED.replace("berth/berth", "crio/crio")),
                Note,
                "kubelet",
                "unix:///run/crio/crio.sock",
            ),
            (
                path,
                Some(&CONFIGURED.replace("systemd", "cgroupfs")),
                Note,
                "kubelet",
                "set cgroupDriver: systemd",
            ),
            (path, Some("cgroupDriver: systemd\n"), Note, "kubelet", "containerd.sock, so this kubelet"),
            (
                path,
                Some("containerRuntimeEndpoint: unix:///run/berth/berth.sock\n"),
                Note,
                "kubelet",
                "cgroupDriver is cgroupfs",
            ),
        ]);
    }

    #[test]
    fn a_kubelet_of_this_daemon_is_good_however_it_is_written() {
        for configuration in [
            CONFIGURED,
            "cgroupDriver: \"systemd\"\ncontainerRuntimeEndpoint: 'unix:///var/run/berth/berth.sock'\n",
            "containerRuntimeEndpoint:   /run/berth/berth.sock   # ours\r\ncgroupDriver:systemd\r\n",
        ] {
            let changes = [("var/lib/kubelet/config.yaml", Some(configuration))];
            assert_eq!(troubles(&changes, &daemon()), [], "{configuration}");
        }
    }

    #[test]
    fn a_flag_wins_over_the_configuration() {
        let changes = |flags| {
            [
                ("var/lib/kubelet/config.yaml", Some(CONFIGURED)),
                ("var/lib/kubelet/kubeadm-flags.env", Some(flags)),
            ]
        };
        let other =
            "KUBELET_KUBEADM_ARGS=\"--node-ip=10.0.0.1 --container-runtime-endpoint=unix:///run/x.sock\"\n";
        let troubles_found = troubles(&changes(other), &daemon());
        let [trouble] = troubles_found.as_slice() else { panic!("{troubles_found:?}") };
        assert!(trouble.text.contains("kubeadm-flags.env is unix:///run/x.sock"), "{trouble:?}");
        for harmless in
            ["", "KUBELET_KUBEADM_ARGS=\"\"\n", "KUBELET_KUBEADM_ARGS=\"--container-runtime-endpoint=\"\n"]
        {
            assert_eq!(troubles(&changes(harmless), &daemon()), [], "{harmless}");
        }
    }

    #[test]
    fn a_driver_that_is_not_known_is_not_judged() {
        let configuration = CONFIGURED.replace("systemd", "cgroupfs");
        let changes = [("var/lib/kubelet/config.yaml", Some(configuration.as_str()))];
        assert_eq!(troubles(&changes, &Daemon { cgroup_driver: String::new(), ..daemon() }), []);
    }

    #[test]
    fn only_keys_of_the_top_level_count() {
        for yaml in [
            "  cgroupDriver: x",
            "cgroupDriverX: x",
            "# cgroupDriver: x",
            "cgroupDriver:",
            "",
            "cgroupDriver: \"\"",
        ] {
            assert_eq!(value(yaml, "cgroupDriver"), None, "{yaml}");
        }
    }
}
