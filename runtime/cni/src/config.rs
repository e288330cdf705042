//! Network configurations: section 1 of the specification.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::version::Version;

/// Longest name of a network. It becomes part of file names.
const MAX_NAME_BYTES: usize = 128;

/// Most plugins in a list. Real ones have two to five.
const MAX_PLUGINS: usize = 64;

/// Why a text is not a network configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not an object.
    #[error("it is not a JSON object: {0}")]
    Json(#[from] serde_json::Error),
    /// A field is missing, or its value is not one that it can have.
    #[error("{field} {problem}")]
    Field {
        /// Its path, such as `plugins[1].type`.
        field: String,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// None of its versions is spoken here.
    #[error("cniVersion {asked} is not supported: use one of 0.3.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0")]
    Version {
        /// What it asks for.
        asked: String,
    },
}

impl ConfigError {
    fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field { field: field.into(), problem: problem.into() }
    }
}

/// A list of plugins that together make a network.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkConfig {
    name: String,
    version: Version,
    plugins: Vec<PluginConfig>,
    disable_check: bool,
    disable_gc: bool,
    text: Vec<u8>,
}

/// What one plugin of a network is given.
#[derive(Debug, Clone, PartialEq)]
pub struct PluginConfig {
    program: String,
    capabilities: BTreeSet<String>,
    object: Map<String, Value>,
}

impl NetworkConfig {
    /// Reads a list, or the configuration of a single plugin, which becomes a list of one.
    ///
    /// # Errors
    /// [`ConfigError`], naming the field.
    pub fn from_json(text: &[u8]) -> Result<Self, ConfigError> {
        let object: Map<String, Value> = serde_json::from_slice(text)?;
        let name = name(&object)?;
        let version = version(&object)?;
        let plugins = match object.get("plugins") {
            None => vec![PluginConfig::from_object("", &object)?],
            Some(Value::Array(plugins)) if plugins.is_empty() => {
                return Err(ConfigError::field("plugins", "is empty"));
            }
            Some(Value::Array(plugins)) if plugins.len() <= MAX_PLUGINS => plugins
                .iter()
                .enumerate()
                .map(|(index, plugin)| {
                    let path = format!("plugins[{index}]");
                    let Value::Object(object) = plugin else {
                        return Err(ConfigError::field(path, "is not an object"));
                    };
                    PluginConfig::from_object(&format!("{path}."), object)
                })
                .collect::<Result<_, _>>()?,
            Some(Value::Array(_)) => {
                return Err(ConfigError::field("plugins", format!("has more than {MAX_PLUGINS} entries")));
            }
            Some(_) => return Err(ConfigError::field("plugins", "is not an array")),
        };
        Ok(Self {
            name,
            version,
            plugins,
            disable_check: flag(&object, "disableCheck")?,
            disable_gc: flag(&object, "disableGC")?,
            text: text.to_owned(),
        })
    }

    /// The name of the network.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version that its plugins are spoken to in.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Its plugins, in the order in which they attach.
    #[must_use]
    pub fn plugins(&self) -> &[PluginConfig] {
        &self.plugins
    }

    /// Whether plugins can be asked for their status.
    #[must_use]
    pub fn has_status(&self) -> bool {
        self.version >= Version::V1_1_0
    }

    /// Whether attachments of this network are not to be checked.
    #[must_use]
    pub const fn disable_check(&self) -> bool {
        self.disable_check
    }

    /// Whether what is left of attachments is not to be collected.
    #[must_use]
    pub const fn disable_gc(&self) -> bool {
        self.disable_gc
    }

    /// The text that it was read from.
    #[must_use]
    pub fn text(&self) -> &[u8] {
        &self.text
    }
}

impl PluginConfig {
    fn from_object(path: &str, object: &Map<String, Value>) -> Result<Self, ConfigError> {
        let field = format!("{path}type");
        let program = match object.get("type") {
            None => return Err(ConfigError::field(field, "is missing")),
            Some(Value::String(program)) => program,
            Some(_) => return Err(ConfigError::field(field, "is not a string")),
        };
        if !is_program_name(program) {
            let problem = format!("{program:?} is not the name of a file in a directory of plugins");
            return Err(ConfigError::field(field, problem));
        }
        Ok(Self {
            program: program.clone(),
            capabilities: capabilities(path, object)?,
            object: object.clone(),
        })
    }

    /// The name of its program.
    #[must_use]
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Whether it wants this entry of `runtimeConfig`.
    #[must_use]
    pub fn wants(&self, capability: &str) -> bool {
        self.capabilities.contains(capability)
    }

    /// The configuration as it was written.
    #[must_use]
    pub const fn object(&self) -> &Map<String, Value> {
        &self.object
    }
}

/// Names of networks are parts of file names, and plugins make file names of them as well. The
/// characters are those that libcni allows.
fn name(object: &Map<String, Value>) -> Result<String, ConfigError> {
    let name = match object.get("name") {
        None => return Err(ConfigError::field("name", "is missing")),
        Some(Value::String(name)) => name,
        Some(_) => return Err(ConfigError::field("name", "is not a string")),
    };
    if !is_identifier(name) || name.len() > MAX_NAME_BYTES {
        let problem = format!(
            "{name:?} is not 1 to {MAX_NAME_BYTES} letters, digits, dots, hyphens and underscores that begin with a letter or digit"
        );
        return Err(ConfigError::field("name", problem));
    }
    Ok(name.clone())
}

/// The newest of `cniVersions` that is spoken here, or `cniVersion`.
fn version(object: &Map<String, Value>) -> Result<Version, ConfigError> {
    let mut asked = Vec::new();
    match object.get("cniVersion") {
        None => {}
        Some(Value::String(version)) => asked.push(version.as_str()),
        Some(_) => return Err(ConfigError::field("cniVersion", "is not a string")),
    }
    match object.get("cniVersions") {
        None => {}
        Some(Value::Array(versions)) => {
            for version in versions {
                let Value::String(version) = version else {
                    return Err(ConfigError::field("cniVersions", "has an entry that is not a string"));
                };
                asked.push(version);
            }
        }
        Some(_) => return Err(ConfigError::field("cniVersions", "is not an array")),
    }
    if asked.is_empty() {
        return Err(ConfigError::field("cniVersion", "is missing"));
    }
    asked
        .iter()
        .filter_map(|version| Version::from_text(version))
        .max()
        .ok_or_else(|| ConfigError::Version { asked: asked.join(", ") })
}

/// A boolean, which libcni also takes as a string.
fn flag(object: &Map<String, Value>, field: &str) -> Result<bool, ConfigError> {
    match object.get(field) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(value)) if value.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(value)) if value.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(ConfigError::field(field, "is not true or false")),
    }
}

fn capabilities(path: &str, object: &Map<String, Value>) -> Result<BTreeSet<String>, ConfigError> {
    let field = || format!("{path}capabilities");
    let capabilities = match object.get("capabilities") {
        None | Some(Value::Null) => return Ok(BTreeSet::new()),
        Some(Value::Object(capabilities)) => capabilities,
        Some(_) => return Err(ConfigError::field(field(), "is not an object")),
    };
    let mut wanted = BTreeSet::new();
    for (capability, is_wanted) in capabilities {
        match is_wanted {
            Value::Bool(true) => _ = wanted.insert(capability.clone()),
            Value::Bool(false) => {}
            _ => {
                return Err(ConfigError::field(
                    field(),
                    format!("has a {capability:?} that is not true or false"),
                ));
            }
        }
    }
    Ok(wanted)
}

/// Letters, digits, dots, hyphens and underscores that begin with a letter or digit.
pub(crate) fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|character| character.is_ascii_alphanumeric() || "_.-".contains(character))
}

/// Whether a plugin's `type` can only be a file in a directory of plugins, and not lead out of it
/// (CVE-2021-20206).
fn is_program_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && !text.starts_with('.')
        && text.chars().all(|character| character.is_ascii_graphic() && character != '/')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(text: &str, says: &str) {
        let error = NetworkConfig::from_json(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }

    #[test]
    fn a_list_is_read() {
        let text = br#"{"cniVersion": "1.0.0", "name": "cbr0", "disableCheck": "TRUE", "plugins": [
            {"type": "flannel", "delegate": {"isDefaultGateway": true}},
            {"type": "portmap", "capabilities": {"portMappings": true, "bandwidth": false}}]}"#;
        let config = NetworkConfig::from_json(text).unwrap();
        assert_eq!((config.name(), config.version()), ("cbr0", Version::V1_0_0));
        assert_eq!((config.disable_check(), config.disable_gc()), (true, false));
        let [flannel, portmap] = config.plugins() else { panic!("{config:?}") };
        assert_eq!((flannel.program(), flannel.wants("portMappings")), ("flannel", false));
        assert_eq!((portmap.wants("portMappings"), portmap.wants("bandwidth")), (true, false));
        assert_eq!(config.text(), text);
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() {
        let text = br#"{"cniVersion": "0.3.1", "name": "lo", "type": "loopback"}"#;
        let config = NetworkConfig::from_json(text).unwrap();
        let [plugin] = config.plugins() else { panic!("{config:?}") };
        assert_eq!((plugin.program(), config.version()), ("loopback", Version::V0_3_1));
    }

    #[test]
    fn the_newest_version_that_both_sides_speak_is_taken() {
        for (versions, taken) in [
            (r#""cniVersion": "0.4.0", "cniVersions": ["0.3.1", "1.1.0", "2.0.0"]"#, Version::V1_1_0),
            (r#""cniVersions": ["1.0.0", "0.1.0"]"#, Version::V1_0_0),
            (r#""cniVersion": "1.0.0", "cniVersions": ["2.0.0"]"#, Version::V1_0_0),
        ] {
            let text = format!(r#"{{{versions}, "name": "a", "type": "b"}}"#);
            assert_eq!(NetworkConfig::from_json(text.as_bytes()).unwrap().version(), taken, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        refused("", "not a JSON object: EOF");
        refused("[]", "not a JSON object: invalid type");
        refused(r#"{"cniVersion": "1.0.0"}"#, "name is missing");
        refused(r#"{"cniVersion": "1.0.0", "name": 7}"#, "name is not a string");
        for name in ["", "../x", "a b", ".a", "a\\n", &"x".repeat(200)] {
            refused(&format!(r#"{{"cniVersion": "1.0.0", "name": "{name}", "type": "a"}}"#), "name \"");
        }
        let with = |rest: &str| format!(r#"{{"cniVersion": "1.0.0", "name": "n", {rest}}}"#);
        refused(r#"{"name": "n", "type": "a"}"#, "cniVersion is missing");
        refused(r#"{"name": "n", "type": "a", "cniVersion": 1}"#, "cniVersion is not a string");
        refused(r#"{"name": "n", "type": "a", "cniVersion": "0.2.0"}"#, "cniVersion 0.2.0 is not supported");
        refused(r#"{"name": "n", "type": "a", "cniVersions": [2]}"#, "cniVersions has an entry");
        refused(r#"{"name": "n", "cniVersion": "1.0.0"}"#, "type is missing");
        refused(&with(r#""plugins": []"#), "plugins is empty");
        refused(&with(r#""plugins": {}"#), "plugins is not an array");
        refused(&with(r#""plugins": [7]"#), "plugins[0] is not an object");
        refused(&with(r#""plugins": [{"type": "a"}, {}]"#), "plugins[1].type is missing");
        let many = vec![r#"{"type": "a"}"#; 65].join(",");
        refused(&with(&format!(r#""plugins": [{many}]"#)), "plugins has more than 64");
        for program in ["", ".", "..", "../x", "/bin/sh", "a/b", "a b", "a\\u0000"] {
            refused(&with(&format!(r#""plugins": [{{"type": "{program}"}}]"#)), "plugins[0].type \"");
        }
        refused(&with(r#""type": "a", "disableGC": 1"#), "disableGC is not true or false");
        refused(&with(r#""type": "a", "capabilities": []"#), "capabilities is not an object");
        refused(&with(r#""type": "a", "capabilities": {"x": 1}"#), "capabilities has a \"x\"");
    }

    proptest! {
        #[test]
        fn no_text_crashes_it(text in "\\PC{0,200}") {
            let _ = NetworkConfig::from_json(text.as_bytes());
        }
    }
}
