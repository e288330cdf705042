//! The operations on a network: section 3 of the specification.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::cache::{CacheError, CachedAttachment};
use crate::config::{ConfigError, NetworkConfig, PluginConfig, is_identifier};
use crate::host::{Host, Step};
use crate::plugin::{Command, Invocation, PluginError};
use crate::result::{self, AddResult};
use crate::version::Version;

/// Longest name of an interface: `IFNAMSIZ` without the final zero.
const MAX_INTERFACE_BYTES: usize = 15;

/// Why an operation on a network failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A plugin.
    #[error("CNI plugin {plugin} of network {network} failed on {command}")]
    Plugin {
        /// Its type.
        plugin: String,
        /// The name of the network.
        network: String,
        /// What it was to do.
        command: Command,
        /// The cause.
        #[source]
        source: Box<PluginError>,
    },
    /// The attachment that is asked for cannot be.
    #[error("{field} {value:?} cannot be passed to CNI plugins")]
    Attachment {
        /// Which part of it.
        field: String,
        /// Its value.
        value: String,
    },
    /// The configuration that an attachment was made with cannot be read any more.
    #[error("the cached configuration of network {network} cannot be used")]
    Cached {
        /// The name of the network.
        network: String,
        /// The cause.
        #[source]
        source: Box<ConfigError>,
    },
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// What is attached to a network: an interface in a namespace.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// `CNI_CONTAINERID`; of a pod, its sandbox.
    pub container_id: String,
    /// `CNI_IFNAME`: the interface's name in the namespace.
    pub interface: String,
    /// `CNI_NETNS`: the path of the namespace.
    pub netns: PathBuf,
    /// `CNI_ARGS`, in this order.
    pub args: Vec<(String, String)>,
    /// What is offered for `runtimeConfig`. A plugin gets the entries that its `capabilities` name.
    pub capabilities: Map<String, Value>,
}

/// A network's configuration, and what it uses of the host.
#[derive(Debug, Clone, Copy)]
pub struct Network<'a> {
    /// What its plugins are given.
    pub config: &'a NetworkConfig,
    /// Where they are, and the attachments.
    pub host: Host<'a>,
}

impl Network<'_> {
    /// ADD, plugin after plugin. An attachment that failed may own something, and is to be deleted.
    ///
    /// # Errors
    /// [`NetworkError`], naming the plugin.
    pub fn add(&self, attachment: &Attachment, deadline: Instant) -> Result<AddResult, NetworkError> {
        check(attachment)?;
        let config = self.config;
        let mut entry = self.entry(attachment);
        self.write(&entry)?;
        let mut previous: Option<Map<String, Value>> = None;
        for plugin in config.plugins() {
            let answer = self.run(plugin, Command::Add, &entry, previous.as_ref(), deadline)?;
            let result = result::object(&answer, config.version())
                .map_err(|source| self.failed(plugin, Command::Add, source.into()))?;
            previous = Some(result::in_version(result, config.version()));
        }
        let result = previous.unwrap_or_default();
        let read = AddResult::from_object(&result);
        entry.result = Some(result);
        self.write(&entry)?;
        match (read, config.plugins().last()) {
            (Ok(result), _) => Ok(result),
            (Err(_), None) => Ok(AddResult::default()),
            (Err(source), Some(plugin)) => Err(self.failed(plugin, Command::Add, source.into())),
        }
    }

    fn write(&self, entry: &CachedAttachment) -> Result<(), NetworkError> {
        (self.host.announce)(Step::Path(self.host.cache.directory()));
        Ok(self.host.cache.write(entry)?)
    }

    /// The entry of an attachment of which no plugin has said anything: what DEL needs where that
    /// of the cache was lost.
    #[must_use]
    pub fn entry(&self, attachment: &Attachment) -> CachedAttachment {
        CachedAttachment {
            netns: attachment.netns.to_string_lossy().into_owned(),
            cni_args: attachment.args.clone(),
            capability_args: attachment.capabilities.clone(),
            ..CachedAttachment::new(
                &attachment.container_id,
                self.config.name(),
                &attachment.interface,
                self.config.text(),
            )
        }
    }

    /// CHECK, if the configuration's version has it and it is not disabled.
    ///
    /// # Errors
    /// [`NetworkError`], naming the plugin that found something wrong.
    pub fn check(&self, entry: &CachedAttachment, deadline: Instant) -> Result<(), NetworkError> {
        if self.config.version() < Version::V0_4_0 || self.config.disable_check() {
            return Ok(());
        }
        for plugin in self.config.plugins() {
            self.run(plugin, Command::Check, entry, entry.result.as_ref(), deadline)?;
        }
        Ok(())
    }

    /// STATUS, if the configuration's version has it: whether ADD would work.
    ///
    /// # Errors
    /// [`NetworkError`], naming the plugin that is not ready.
    pub fn status(&self, deadline: Instant) -> Result<(), NetworkError> {
        if !self.config.has_status() {
            return Ok(());
        }
        for plugin in self.config.plugins() {
            self.command(plugin, Command::Status, &Map::new(), deadline)?;
        }
        Ok(())
    }

    /// GC, if the configuration's version has it and it is not disabled: plugins give back what
    /// belongs neither to an attachment in the cache nor to one of the containers `living`, which
    /// have the interface `interface`. Nothing is asked for while something in the cache cannot be
    /// read: it may be an attachment.
    ///
    /// # Errors
    /// [`NetworkError`] of the first plugin that failed; the others were asked as well.
    pub fn collect(&self, living: &[String], interface: &str, deadline: Instant) -> Result<(), NetworkError> {
        if self.config.version() < Version::V1_1_0 || self.config.disable_gc() {
            return Ok(());
        }
        (self.host.announce)(Step::Path(self.host.cache.directory()));
        let cached = self.host.cache.all()?;
        if !cached.is_complete() {
            return Ok(());
        }
        let mut valid: BTreeSet<(&str, &str)> = cached
            .entries
            .iter()
            .filter(|entry| entry.network_name == self.config.name())
            .map(|entry| (entry.container_id.as_str(), entry.if_name.as_str()))
            .collect();
        valid.extend(living.iter().map(|container| (container.as_str(), interface)));
        let valid: Vec<Value> =
            valid.into_iter().map(|(id, name)| json!({"containerID": id, "ifname": name})).collect();
        let mut more = Map::new();
        more.insert("cni.dev/valid-attachments".into(), valid.into());
        let mut first = Ok(());
        for plugin in self.config.plugins() {
            let collected = self.command(plugin, Command::Gc, &more, deadline);
            first = first.and(collected);
        }
        first
    }

    /// A command that is about no attachment.
    fn command(
        &self,
        plugin: &PluginConfig,
        command: Command,
        more: &Map<String, Value>,
        deadline: Instant,
    ) -> Result<(), NetworkError> {
        let mut object = self.plugin_object(plugin);
        object.extend(more.clone());
        self.invoke(plugin, command, Vec::new(), &object, deadline).map(drop)
    }

    /// A command that is about an attachment.
    fn run(
        &self,
        plugin: &PluginConfig,
        command: Command,
        entry: &CachedAttachment,
        previous: Option<&Map<String, Value>>,
        deadline: Instant,
    ) -> Result<Vec<u8>, NetworkError> {
        let mut object = self.plugin_object(plugin);
        let runtime: Map<String, Value> = entry
            .capability_args
            .iter()
            .filter(|(capability, _)| plugin.wants(capability))
            .map(|(capability, value)| (capability.clone(), value.clone()))
            .collect();
        if !runtime.is_empty() {
            object.insert("runtimeConfig".into(), runtime.into());
        }
        if let Some(previous) = previous {
            object.insert("prevResult".into(), previous.clone().into());
        }
        let args: Vec<String> = entry.cni_args.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let environment = vec![
            ("CNI_CONTAINERID", OsString::from(&entry.container_id)),
            ("CNI_NETNS", OsString::from(&entry.netns)),
            ("CNI_IFNAME", OsString::from(&entry.if_name)),
            ("CNI_ARGS", OsString::from(args.join(";"))),
        ];
        self.invoke(plugin, command, environment, &object, deadline)
    }

    fn plugin_object(&self, plugin: &PluginConfig) -> Map<String, Value> {
        let mut object = plugin.object().clone();
        object.insert("name".into(), self.config.name().into());
        object.insert("cniVersion".into(), self.config.version().as_str().into());
        object
    }

    fn invoke(
        &self,
        plugin: &PluginConfig,
        command: Command,
        environment: Vec<(&'static str, OsString)>,
        object: &Map<String, Value>,
        deadline: Instant,
    ) -> Result<Vec<u8>, NetworkError> {
        let stdin = Value::Object(object.clone()).to_string().into_bytes();
        let host = self.host;
        Invocation { plugin, host, command, environment, stdin: &stdin, deadline }
            .run()
            .map_err(|source| self.failed(plugin, command, source))
    }

    fn failed(&self, plugin: &PluginConfig, command: Command, source: PluginError) -> NetworkError {
        let network = self.config.name().to_owned();
        let (plugin, source) = (plugin.program().to_owned(), Box::new(source));
        NetworkError::Plugin { plugin, network, command, source }
    }
}

impl CachedAttachment {
    /// DEL with the configuration that it was made with, in the reverse order of plugins, and its
    /// entry goes. `netns` is the namespace if it is still there. May be repeated.
    ///
    /// # Errors
    /// [`NetworkError`]; its entry stays.
    pub fn delete(
        &self,
        netns: Option<&Path>,
        host: Host<'_>,
        deadline: Instant,
    ) -> Result<(), NetworkError> {
        let config = NetworkConfig::from_json(&self.config).map_err(|source| {
            let network = self.network_name.clone();
            NetworkError::Cached { network, source: Box::new(source) }
        })?;
        let network = Network { config: &config, host };
        let entry = Self {
            netns: netns.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            ..self.clone()
        };
        let previous = entry.result.as_ref().filter(|_| config.version() >= Version::V0_4_0);
        for plugin in config.plugins().iter().rev() {
            network.run(plugin, Command::Del, &entry, previous, deadline)?;
        }
        (host.announce)(Step::Path(host.cache.directory()));
        Ok(host.cache.remove(&entry)?)
    }
}

/// What becomes part of file names, and of `CNI_ARGS`, which has no way to quote.
fn check(attachment: &Attachment) -> Result<(), NetworkError> {
    let refused = |field: &str, value: &str| {
        Err(NetworkError::Attachment { field: field.to_owned(), value: value.to_owned() })
    };
    let Attachment { container_id, interface, netns: _, args, capabilities: _ } = attachment;
    if !is_identifier(container_id) {
        return refused("container id", container_id);
    }
    let is_interface = !interface.is_empty()
        && interface.len() <= MAX_INTERFACE_BYTES
        && !matches!(interface.as_str(), "." | "..")
        && interface.chars().all(|character| character.is_ascii_graphic() && !"/:".contains(character));
    if !is_interface {
        return refused("interface", interface);
    }
    for (key, value) in args {
        if value.contains([';', '=', '\0', '\n']) || key.contains([';', '=', '\0', '\n']) || key.is_empty() {
            return refused(key, value);
        }
    }
    Ok(())
}
