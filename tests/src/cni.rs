//! The CNI side of a test's daemon: its own directories of configurations, plugins and attachments.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::daemon::{Daemon, Setup};
use crate::peers;
use crate::program::run_with_input;

/// CNI's reference plugins with the bridge `cni0` of the daemon's host, addresses from 10.99.0.0/24
/// and fd99::/64, and host ports.
pub const BRIDGE: &str = r#"{"cniVersion": "1.1.0", "name": "pods", "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": {
        "type": "host-local", "dataDir": "DATA",
        "ranges": [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": true}}]}"#;

/// A daemon whose pods get their network from CNI, or none.
pub const ONLY_CNI: Setup = Setup {
    network: "kind = \"cni\"\n",
    configuration: "",
    disk_bytes: None,
    chroot: false,
    own_mounts: false,
    launcher: &[],
};

/// Lines for the section `[network]` of `berth.toml`. On a node under test nothing of the machine's
/// is found.
pub(crate) fn configuration(directory: &Path) -> String {
    let path = |name: &str| directory.join("cni").join(name).display().to_string();
    format!(
        "cni_config_directory = \"{}\"\ncni_plugin_directories = [\"{}\"]\ncni_cache_directory = \"{}\"\n",
        path("net.d"),
        path("bin"),
        path("cache")
    )
}

impl Daemon {
    /// The directory that all of them are in: `net.d`, `bin`, `cache`.
    #[must_use]
    pub fn cni(&self) -> PathBuf {
        self.dir().join("cni")
    }

    /// Installs CNI's reference plugins.
    ///
    /// # Errors
    /// When they were not built.
    pub fn install_cni_plugins(&self) -> Result<()> {
        let bin = self.cni().join("bin");
        fs::create_dir_all(self.cni()).context("making a directory")?;
        std::os::unix::fs::symlink(peers::directory("cni")?, bin).context("installing the plugins")
    }

    /// Installs a plugin that is a shell script.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn install_cni_script(&self, name: &str, script: &str) -> Result<()> {
        let bin = self.cni().join("bin");
        fs::create_dir_all(&bin).context("making a directory")?;
        let path = bin.join(name);
        // By another program: a file that is open for writing, also in a child that another test is
        // starting, cannot be run.
        run_with_input("install", &["-m", "755", "/dev/stdin", &path.to_string_lossy()], script)
    }

    /// Writes a configuration, with the place for addresses that it names `DATA`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure_cni(&self, name: &str, text: &str) -> Result<()> {
        let directory = self.cni().join("net.d");
        fs::create_dir_all(&directory).context("making a directory")?;
        let text = text.replace("DATA", &self.cni_addresses().to_string_lossy());
        let new = self.cni().join("new");
        fs::write(&new, text).context("writing a configuration")?;
        fs::rename(new, directory.join(name)).context("placing a configuration")
    }

    /// Where `host-local` keeps the addresses that it has given out, a directory for each network.
    #[must_use]
    pub fn cni_addresses(&self) -> PathBuf {
        self.cni().join("addresses")
    }

    /// The addresses that are given out in the network `pods`.
    #[must_use]
    pub fn cni_addresses_in_use(&self) -> Vec<String> {
        let entries = fs::read_dir(self.cni_addresses().join("pods")).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| name.starts_with(|first: char| first.is_ascii_digit() || first == 'f'));
        names.sort();
        names
    }

    /// The attachments in the cache.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn cni_attachments(&self) -> Result<Vec<Value>> {
        let entries = fs::read_dir(self.cni().join("cache/results")).into_iter().flatten().flatten();
        let files = entries.map(|entry| entry.path()).filter(|path| path.is_file());
        files.map(|path| Ok(serde_json::from_slice(&fs::read(path)?)?)).collect()
    }
}
