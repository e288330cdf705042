//! What CNI configurations say, of which the first by name is the pods' network.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use serde::Deserialize;

use crate::{Daemon, Finding, Grade, finding, kubelet};

/// The directory of CNI configurations.
const CONFIGURATIONS: &str = "etc/cni/net.d";

/// Where plugins are: the directory that runtimes and add-ons agree on, and that of Debian's
/// package.
const PLUGIN_DIRECTORIES: [&str; 2] = ["opt/cni/bin", "usr/lib/cni"];

/// Real ones have a few KiB.
const LARGEST_BYTES: u64 = 1 << 20;

/// A configuration of one plugin (`*.conf`, `*.json`), or a list of them (`*.conflist`): CNI
/// specification 1.1, section 1, "Network configuration format". Other keys belong to the plugins.
#[derive(Deserialize)]
struct Configuration {
    #[serde(rename = "type")]
    plugin: Option<String>,
    #[serde(default)]
    plugins: Vec<Plugin>,
}

#[derive(Deserialize)]
struct Plugin {
    #[serde(rename = "type")]
    plugin: String,
}

/// A finding for each configuration, or one if there is none.
pub(crate) fn look(node: &Path, daemon: &Daemon) -> Vec<Finding> {
    let names = names(node);
    if daemon.network_kind == "bridge" {
        let text = "pods are on Berth's own bridge (network.kind is bridge)";
        let mut findings = vec![finding(Grade::Good, "network", text)];
        if let Some(name) = names.first() {
            let text = format!(
                "/{CONFIGURATIONS}/{} is not used: network.kind is bridge; pods reach those of other nodes only by routes that you add",
                name.escape_debug()
            );
            findings.push(finding(Grade::Note, "network", text));
        }
        return findings;
    }
    let Some((first, rest)) = names.split_first() else { return vec![without_configuration(node, daemon)] };
    let mut findings = vec![configuration(node, first)];
    findings.extend(rest.iter().map(|name| {
        let (name, first) = (name.escape_debug(), first.escape_debug());
        let text = format!("/{CONFIGURATIONS}/{name} is not used: {first} comes first by name");
        finding(Grade::Note, "network", text)
    }));
    findings
}

/// Pods wait where a cluster brings their network; a single machine has the built-in one.
fn without_configuration(node: &Path, daemon: &Daemon) -> Finding {
    let has_kubelet = node.join(kubelet::CONFIGURATION).exists();
    if daemon.network_kind != "cni" && !has_kubelet {
        let text = "Berth's own bridge; it needs no CNI plugin and no /etc/cni/net.d";
        return finding(Grade::Good, "network", text);
    }
    let text = format!(
        "there is no CNI configuration in /{CONFIGURATIONS}, so pods wait for the cluster's network: install that (Cilium, Calico, Flannel, ...), or set network.kind = \"bridge\" for Berth's own"
    );
    finding(Grade::Note, "network", text)
}

fn names(node: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(node.join(CONFIGURATIONS))
        .into_iter()
        .flatten()
        .flatten()
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
fn configuration(node: &Path, name: &str) -> Finding {
    let broken = |text: String| finding(Grade::Broken, "network", text);
    let path = format!("/{CONFIGURATIONS}/{}", name.escape_debug());
    let plugins = match plugins(&node.join(CONFIGURATIONS).join(name)) {
        Ok(plugins) => plugins,
        Err(error) => {
            return broken(format!("{path} is not a CNI configuration ({error}): fix or remove it"));
        }
    };
    if let Some(plugin) = plugins.iter().find(|plugin| !is_name(plugin)) {
        let plugin = plugin.escape_debug();
        return broken(format!(
            "{path} names a CNI plugin \"{plugin}\", which cannot be the name of a program: fix or remove it"
        ));
    }
    let is_missing = |plugin: &&String| {
        !PLUGIN_DIRECTORIES.iter().any(|directory| node.join(directory).join(plugin).is_file())
    };
    let mut missing: Vec<&str> = plugins.iter().filter(is_missing).map(String::as_str).collect();
    missing.dedup();
    if !missing.is_empty() {
        return broken(format!(
            "{path} needs CNI plugins that are not in /opt/cni/bin: {}; no pod can be created: install them (many are in the package containernetworking-plugins), or remove the file",
            missing.join(", ")
        ));
    }
    finding(Grade::Good, "network", format!("the CNI configuration {path}"))
}

/// The plugins that a configuration names, in its order.
fn plugins(path: &Path) -> io::Result<Vec<String>> {
    // Opening a pipe would wait for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut text = Vec::new();
    File::open(path)?.take(LARGEST_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > LARGEST_BYTES {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    let its: Configuration = serde_json::from_slice(&text)?;
    let plugins: Vec<String> =
        its.plugin.into_iter().chain(its.plugins.into_iter().map(|one| one.plugin)).collect();
    if plugins.is_empty() {
        return Err(io::Error::other("it names no plugin"));
    }
    Ok(plugins)
}

/// Whether a plugin's name is a plain file name. Others would lead out of the directory:
/// CVE-2021-20206.
fn is_name(plugin: &str) -> bool {
    let is_part = |character: char| character.is_ascii_alphanumeric() || ".-_".contains(character);
    !plugin.is_empty() && plugin.chars().all(is_part) && !plugin.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{daemon, each_is_named, troubles};

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
            (FLANNEL.0, FLANNEL.1, Broken, "network", "not in /opt/cni/bin: flannel, portmap;"),
            (conf, Some(r#"{"type": "loopback"}"#), Broken, "network", "99-loopback.conf needs"),
            (conf, Some(r#"{"type": "../../x"}"#), Broken, "network", r#"plugin "../../x""#),
            (conf, Some(r#"{"type": ".."}"#), Broken, "network", r#"plugin "..""#),
            (conf, Some(r#"{"type": ""}"#), Broken, "network", r#"plugin """#),
            (conf, Some(r#"{"type": "a\nb"}"#), Broken, "network", r#"plugin "a\nb""#),
            (conf, Some(""), Broken, "network", "is not a CNI configuration (EOF"),
            (conf, Some("{}"), Broken, "network", "it names no plugin"),
            (list, Some(r#"{"plugins": []}"#), Broken, "network", "it names no plugin"),
            (list, Some(r#"{"plugins": [{}]}"#), Broken, "network", "missing field `type`"),
            (list, Some(r#"{"plugins": 7}"#), Broken, "network", "invalid type"),
            ("etc/cni/net.d/a\nb.json", Some("x"), Broken, "network", "net.d/a\\nb.json is no"),
            ("etc/cni/net.d/c.json/file", Some(""), Broken, "network", "it is not a regular file"),
        ]);
        let large = format!("{{\"type\": \"{}\"}}", "x".repeat(1 << 20));
        each_is_named(&[(conf, Some(&large), Broken, "network", "larger than 1 MiB")]);
    }

    #[test]
    fn a_plugin_is_missing_only_when_it_is_nowhere() {
        let flannel = ("opt/cni/bin/flannel", Some(""));
        let portmap = ("usr/lib/cni/portmap", Some(""));
        for (there, says) in [
            (&[FLANNEL, flannel][..], "not in /opt/cni/bin: portmap;"),
            (&[FLANNEL, portmap], "not in /opt/cni/bin: flannel;"),
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
        let other = ("etc/cni/net.d/00-other.conf", Some(r#"{"type": "other"}"#));
        let found = troubles(&[FLANNEL, other, ("etc/cni/net.d/README", Some(""))], &daemon());
        let [first, second] = found.as_slice() else { panic!("{found:?}") };
        assert!(first.text.contains("00-other") && second.text.contains("10-flannel"), "{found:?}");
    }
}
