//! What CNI configurations say, of which the first by name is the pods' network.

use std::error::Error;
use std::fs;
use std::path::Path;

use berth_cni::{DirectoryError, NetworkConfig, PluginConfig};

use crate::{Daemon, Finding, Grade, below, finding, kubelet};

/// A finding for each configuration, or one if there is none.
pub(crate) fn look(node: &Path, daemon: &Daemon) -> Vec<Finding> {
    let directory = &daemon.cni_config_directory;
    let mut names = names(&below(node, directory));
    if daemon.network_kind == "bridge" {
        let text = "pods are on Berth's own bridge (network.kind is bridge)";
        let mut findings = vec![finding(Grade::Good, "network", text)];
        if let Some(name) = names.first() {
            let text = format!(
                "{} is not used: network.kind is bridge; pods reach those of other nodes only by routes that you add",
                shown(directory, name)
            );
            findings.push(finding(Grade::Note, "network", text));
        }
        return findings;
    }
    let found = berth_cni::first(&below(node, directory));
    let path = match &found {
        Ok(found) => &found.path,
        Err(DirectoryError::Empty { .. }) => return vec![without_configuration(node, daemon)],
        Err(
            DirectoryError::List { path, .. }
            | DirectoryError::Read { path, .. }
            | DirectoryError::Invalid { path, .. },
        ) => path,
    };
    let first = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let path = shown(directory, &first);
    let mut findings = vec![match &found {
        Ok(found) => match NetworkConfig::from_json(&found.text) {
            Ok(config) => configuration(node, daemon, &path, &config),
            Err(error) => unusable(&path, &error),
        },
        Err(DirectoryError::List { source, .. }) => {
            let text = format!("cannot list {}, so pods wait: {source}", directory.display());
            finding(Grade::Broken, "network", text)
        }
        Err(error) => unusable(&path, error.source().unwrap_or(error)),
    }];
    names.retain(|name| *name != first);
    findings.extend(names.iter().map(|name| {
        let (path, first) = (shown(directory, name), first.escape_debug());
        let text = format!("{path} is not used: {first} comes first by name");
        finding(Grade::Note, "network", text)
    }));
    findings
}

fn shown(directory: &Path, name: &str) -> String {
    format!("{}/{}", directory.display(), name.escape_debug())
}

/// Whether pods get the built-in bridge.
pub(crate) fn is_bridge(node: &Path, daemon: &Daemon) -> bool {
    let is_configured = || !names(&below(node, &daemon.cni_config_directory)).is_empty();
    match daemon.network_kind.as_str() {
        "bridge" => true,
        "cni" => false,
        _ => !is_configured() && !has_kubelet(node),
    }
}

fn has_kubelet(node: &Path) -> bool {
    node.join(kubelet::CONFIGURATION).exists()
}

fn unusable(path: &str, error: &dyn Error) -> Finding {
    finding(Grade::Broken, "network", format!("{path} cannot be used ({error}): fix or remove it"))
}

/// Pods wait where a cluster brings their network; a single machine has the built-in one.
fn without_configuration(node: &Path, daemon: &Daemon) -> Finding {
    if is_bridge(node, daemon) {
        let text = "Berth's own bridge; it needs no CNI plugin and no CNI configuration";
        return finding(Grade::Good, "network", text);
    }
    let text = format!(
        "there is no CNI configuration in {}, so pods wait for the cluster's network: install that (Cilium, Calico, Flannel, ...), or set network.kind = \"bridge\" for Berth's own",
        daemon.cni_config_directory.display()
    );
    finding(Grade::Note, "network", text)
}

/// The names of the configurations in a directory, in order.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| !entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| {
            let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conf" | "conflist" | "json"))
        })
        .collect();
    names.sort();
    names
}

/// What is to be said of the configuration that is used.
fn configuration(node: &Path, daemon: &Daemon, path: &str, config: &NetworkConfig) -> Finding {
    let directories = &daemon.cni_plugin_directories;
    let is_missing =
        |plugin: &&str| !directories.iter().any(|directory| below(node, directory).join(plugin).is_file());
    let mut missing: Vec<&str> =
        config.plugins().iter().map(PluginConfig::program).filter(is_missing).collect();
    missing.dedup();
    if !missing.is_empty() {
        let text = format!(
            "{path} needs CNI plugins that are not in {}: {}; no pod can be created: install them (many are in the package containernetworking-plugins), or remove the file",
            directories
                .iter()
                .map(|directory| directory.display().to_string())
                .collect::<Vec<_>>()
                .join(" or "),
            missing.join(", ")
        );
        return finding(Grade::Broken, "network", text);
    }
    finding(Grade::Good, "network", format!("the CNI configuration {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{daemon, each_is_named, troubles};

    const LOOPBACK: &str = r#"{"cniVersion": "1.0.0", "name": "lo", "type": "loopback"}"#;
    const OUTSIDE: &str = r#"{"cniVersion": "1.0.0", "name": "x", "type": "../../x"}"#;
    const OLD: &str = r#"{"cniVersion": "0.2.0", "name": "x", "type": "x"}"#;
    const EMPTY: &str = r#"{"cniVersion": "1.0.0", "name": "x", "plugins": []}"#;

    const FLANNEL: (&str, Option<&str>) = (
        "etc/cni/net.d/10-flannel.conflist",
        Some(
            r#"{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [
                {"type": "flannel", "delegate": {"isDefaultGateway": true}},
                {"type": "portmap", "capabilities": {"portMappings": true}}]}"#,
        ),
    );

    #[test]
    fn what_is_wrong_with_a_configuration_is_named() {
        use Grade::Broken;
        let conf = "etc/cni/net.d/99-loopback.conf";
        let list = "etc/cni/net.d/a.conflist";
        each_is_named(&[
            (
                FLANNEL.0,
                FLANNEL.1,
                Broken,
                "network",
                "not in /opt/cni/bin or /usr/lib/cni: flannel, portmap;",
            ),
            (conf, Some(LOOPBACK), Broken, "network", "99-loopback.conf needs"),
            (conf, Some(r#"{"type": "loopback"}"#), Broken, "network", "name is missing"),
            (conf, Some(OUTSIDE), Broken, "network", r#"type "../../x" is not the name"#),
            (conf, Some(OLD), Broken, "network", "cniVersion 0.2.0 is not supported"),
            (conf, Some(""), Broken, "network", "conf cannot be used (it is not a JSON object: EOF"),
            (list, Some(EMPTY), Broken, "network", "plugins is empty"),
            ("etc/cni/net.d/a\nb.json", Some("x"), Broken, "network", "net.d/a\\nb.json cannot"),
        ]);
        let large = format!("{{\"type\": \"{}\"}}", "x".repeat(1 << 20));
        each_is_named(&[(conf, Some(&large), Broken, "network", "larger than 1 MiB")]);
    }

    #[test]
    fn a_plugin_is_missing_only_when_it_is_nowhere() {
        let flannel = ("opt/cni/bin/flannel", Some(""));
        let portmap = ("usr/lib/cni/portmap", Some(""));
        for (there, says) in [
            (&[FLANNEL, flannel][..], "not in /opt/cni/bin or /usr/lib/cni: portmap;"),
            (&[FLANNEL, portmap], "not in /opt/cni/bin or /usr/lib/cni: flannel;"),
        ] {
            let found = troubles(there, &daemon());
            let [one] = found.as_slice() else { panic!("{found:?}") };
            assert!(one.text.contains(says), "{one:?}");
        }
        assert_eq!(troubles(&[FLANNEL, flannel, portmap], &daemon()), []);
    }

    #[test]
    fn pods_that_would_wait_are_told_of() {
        let kubelet =
            ("var/lib/kubelet/config.yaml", Some("containerRuntimeEndpoint: unix:///run/berth/berth.sock"));
        let waits = |there: &[_], kind: &str| {
            let daemon = Daemon { network_kind: kind.to_owned(), cgroup_driver: String::new(), ..daemon() };
            troubles(there, &daemon)
                .iter()
                .any(|found| found.text.contains("pods wait for the cluster's network"))
        };
        assert!(waits(&[kubelet], "auto") && waits(&[], "cni"));
        assert!(!waits(&[kubelet], "bridge") && !waits(&[], "auto"));
        let flannel = [FLANNEL, ("opt/cni/bin/flannel", Some("")), ("opt/cni/bin/portmap", Some(""))];
        let found = troubles(&flannel, &Daemon { network_kind: "bridge".to_owned(), ..daemon() });
        let [one] = found.as_slice() else { panic!("{found:?}") };
        assert!(one.text.contains("10-flannel.conflist is not used: network.kind is bridge"), "{one:?}");
    }

    #[test]
    fn each_configuration_is_told_in_their_order() {
        let other = ("etc/cni/net.d/00-other.conf", Some(LOOPBACK));
        let found = troubles(&[FLANNEL, other, ("etc/cni/net.d/README", Some(""))], &daemon());
        let [first, second] = found.as_slice() else { panic!("{found:?}") };
        assert!(first.text.contains("00-other") && second.text.contains("10-flannel"), "{found:?}");
    }
}
