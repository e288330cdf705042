//! What CNI configurations say, which other runtimes read: Berth gives pods its own bridge.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use serde::Deserialize;

use crate::{Finding, Grade, finding};

/// Where runtimes and network add-ons look for configurations.
const CONFIGURATIONS: &str = "etc/cni/net.d";

/// Where plugins are: the directory that runtimes and add-ons agree on, and that of Debian's
/// package.
const PLUGIN_DIRECTORIES: [&str; 2] = ["opt/cni/bin", "usr/lib/cni"];

/// Real ones have a few KiB.
const LARGEST_BYTES: u64 = 1 << 20;

/// A configuration of one plugin (`*.conf`, `*.json`), or a list of them (`*.conflist`): CNI
/// specification 1.1, section 1, "Network configuration format". What else it says belongs to the
/// plugins.
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

/// One finding for each configuration, or one that there is none.
pub(crate) fn look(node: &Path) -> Vec<Finding> {
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
    if names.is_empty() {
        let text = "Berth's own bridge; it needs no CNI plugin and no /etc/cni/net.d";
        return vec![finding(Grade::Good, "network", text)];
    }
    names.iter().map(|name| finding(Grade::Note, "network", configuration(node, name))).collect()
}

/// A sentence on the configuration of that name.
fn configuration(node: &Path, name: &str) -> String {
    let path = format!("/{CONFIGURATIONS}/{}", name.escape_debug());
    let plugins = match plugins(&node.join(CONFIGURATIONS).join(name)) {
        Ok(plugins) => plugins,
        Err(error) => {
            return format!(
                "{path} is not a CNI configuration ({error}): fix or remove it; Berth does not use it"
            );
        }
    };
    if let Some(plugin) = plugins.iter().find(|plugin| !is_name(plugin)) {
        let plugin = plugin.escape_debug();
        return format!(
            "{path} names a CNI plugin \"{plugin}\", which cannot be the name of a program: fix or remove it"
        );
    }
    let is_missing = |plugin: &&String| {
        !PLUGIN_DIRECTORIES.iter().any(|directory| node.join(directory).join(plugin).is_file())
    };
    let mut missing: Vec<&str> = plugins.iter().filter(is_missing).map(String::as_str).collect();
    missing.dedup();
    if !missing.is_empty() {
        return format!(
            "{path} needs CNI plugins that are not in /opt/cni/bin: {}; a runtime that uses it cannot create pods: install them (many are in the package containernetworking-plugins), or remove the file; Berth does not use it, its pods are on its own bridge",
            missing.join(", ")
        );
    }
    format!(
        "{path} is not used: pods are on Berth's own bridge, and reach pods on other nodes only by routes that you add"
    )
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

/// Whether a plugin's name is that of a file in a directory. Others would lead out of it:
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
        use Grade::Note;
        let conf = "etc/cni/net.d/99-loopback.conf";
        let list = "etc/cni/net.d/a.conflist";
        each_is_named(&[
            (FLANNEL.0, FLANNEL.1, Note, "network", "not in /opt/cni/bin: flannel, portmap;"),
            (conf, Some(r#"{"type": "loopback"}"#), Note, "network", "99-loopback.conf needs"),
            (conf, Some(r#"{"type": "../../x"}"#), Note, "network", r#"plugin "../../x""#),
            (conf, Some(r#"{"type": ".."}"#), Note, "network", r#"plugin "..""#),
            (conf, Some(r#"{"type": ""}"#), Note, "network", r#"plugin """#),
            (conf, Some(r#"{"type": "a\nb"}"#), Note, "network", r#"plugin "a\nb""#),
            (conf, Some(""), Note, "network", "is not a CNI configuration (EOF"),
            (conf, Some("{}"), Note, "network", "it names no plugin"),
            (list, Some(r#"{"plugins": []}"#), Note, "network", "it names no plugin"),
            (list, Some(r#"{"plugins": [{}]}"#), Note, "network", "missing field `type`"),
            (list, Some(r#"{"plugins": 7}"#), Note, "network", "invalid type"),
            ("etc/cni/net.d/a\nb.json", Some("x"), Note, "network", "net.d/a\\nb.json is no"),
            ("etc/cni/net.d/c.json/file", Some(""), Note, "network", "it is not a regular file"),
        ]);
        let large = format!("{{\"type\": \"{}\"}}", "x".repeat(1 << 20));
        each_is_named(&[(conf, Some(&large), Note, "network", "larger than 1 MiB")]);
    }

    #[test]
    fn a_plugin_is_missing_only_when_it_is_nowhere() {
        let flannel = ("opt/cni/bin/flannel", Some(""));
        let portmap = ("usr/lib/cni/portmap", Some(""));
        for (there, says) in [
            (&[FLANNEL, flannel][..], "not in /opt/cni/bin: portmap;"),
            (&[FLANNEL, portmap], "not in /opt/cni/bin: flannel;"),
            (&[FLANNEL, flannel, portmap], "10-flannel.conflist is not used"),
        ] {
            let found = troubles(there, &daemon());
            let [one] = found.as_slice() else { panic!("{found:?}") };
            assert!(one.text.contains(says), "{one:?}");
        }
    }

    #[test]
    fn each_configuration_is_told_in_their_order() {
        let other = ("etc/cni/net.d/00-other.conf", Some(r#"{"type": "other"}"#));
        let found = troubles(&[FLANNEL, other, ("etc/cni/net.d/README", Some(""))], &daemon());
        let [first, second] = found.as_slice() else { panic!("{found:?}") };
        assert!(first.text.contains("00-other") && second.text.contains("10-flannel"), "{found:?}");
    }
}
