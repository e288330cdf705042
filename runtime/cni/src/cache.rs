//! The cache of attachments, in the place and form of libcni (`libcni/api.go`, `cachedInfo`): a
//! file `results/NETWORK-CONTAINER-INTERFACE` for each.
//!
//! An entry is written before the first plugin runs, then without a result, so that an attachment
//! that was cut off can be given back by whoever comes next. The directory is shared with other
//! runtimes.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

const KIND: &str = "cniCacheV1";

/// Largest entry: a configuration and a result, each of which may be 1 MiB.
const MAX_BYTES: u64 = 4 << 20;

/// Why the cache could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}")]
pub struct CacheError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The directory of libcni's cache.
#[derive(Debug, Clone)]
pub struct Cache {
    results: PathBuf,
}

/// What is in the cache.
#[derive(Debug, Default)]
pub struct Entries {
    /// Those that can be read.
    pub entries: Vec<CachedAttachment>,
    /// Files that are no entries, or damaged ones.
    pub others: usize,
    /// Files that cannot be read, and why.
    pub unreadable: Vec<CacheError>,
}

impl Entries {
    /// Whether every attachment is among them.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.others == 0 && self.unreadable.is_empty()
    }
}

/// An attachment as it was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CachedAttachment {
    pub(crate) kind: String,
    /// The container that it belongs to; of a pod, its sandbox.
    pub container_id: String,
    /// The text of the network's configuration.
    #[serde(with = "as_base64")]
    pub config: Vec<u8>,
    /// The name of the interface in the container.
    pub if_name: String,
    /// The name of the network.
    pub network_name: String,
    /// The path of the network namespace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub netns: String,
    /// `CNI_ARGS`.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub cni_args: Vec<(String, String)>,
    /// What the runtime offered for `runtimeConfig`.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Map::is_empty")]
    pub capability_args: Map<String, Value>,
    /// The result of ADD; absent while it runs, and when it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Map<String, Value>>,
}

impl Cache {
    /// The cache below `directory`, which libcni has at `/var/lib/cni`.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self { results: directory.join("results") }
    }

    /// The directory of the entries.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.results
    }

    /// All entries of a container. Files that are no entries are passed over.
    ///
    /// # Errors
    /// [`CacheError`] when the directory or a file that is named like one of them cannot be read.
    pub fn of_container(&self, container: &str) -> Result<Vec<CachedAttachment>, CacheError> {
        let part = format!("-{container}-");
        let mut found = self.entries(|name| name.contains(&part))?;
        if let Some(error) = found.unreadable.pop() {
            return Err(error);
        }
        found.entries.retain(|entry| entry.container_id == container);
        Ok(found.entries)
    }

    /// All entries that can be read. The directory is shared with other runtimes, whose files do
    /// not keep us from ours.
    ///
    /// # Errors
    /// [`CacheError`] when the directory cannot be listed.
    pub fn all(&self) -> Result<Entries, CacheError> {
        self.entries(|_| true)
    }

    fn entries(&self, wanted: impl Fn(&str) -> bool) -> Result<Entries, CacheError> {
        let list = |source| CacheError { action: "list", path: self.results.clone(), source };
        let files = match fs::read_dir(&self.results) {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Entries::default()),
            Err(error) => return Err(list(error)),
        };
        let mut found = Entries::default();
        for file in files {
            let file = file.map_err(list)?;
            if file.file_name().to_str().is_none_or(|name| name.starts_with('.') || !wanted(name)) {
                continue;
            }
            let path = file.path();
            match read(&path) {
                Ok(Some(entry)) => found.entries.push(entry),
                Ok(None) => found.others += 1,
                // Removed since the directory was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => found.unreadable.push(CacheError { action: "read", path, source }),
            }
        }
        found.entries.sort_by(|a, b| a.if_name.cmp(&b.if_name));
        Ok(found)
    }

    /// Writes an entry, in place of an earlier one. Once this has returned, there is one even if
    /// the power fails.
    ///
    /// # Errors
    /// [`CacheError`]
    pub fn write(&self, entry: &CachedAttachment) -> Result<(), CacheError> {
        let path = self.path(entry);
        let failed = |source| CacheError { action: "write", path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.results).map_err(failed)?;
        let text = serde_json::to_vec(entry).map_err(|error| failed(error.into()))?;
        let new = self.unfinished(&entry.container_id);
        remove_file(&new).map_err(failed)?;
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()));
        let is_new = !path.exists();
        if let Err(source) = written.and_then(|()| fs::rename(&new, &path)) {
            let _ = remove_file(&new);
            return Err(failed(source));
        }
        if is_new {
            fs::File::open(&self.results).and_then(|directory| directory.sync_all()).map_err(failed)?;
        }
        Ok(())
    }

    /// Removes an entry, if it is there.
    ///
    /// # Errors
    /// [`CacheError`]
    pub fn remove(&self, entry: &CachedAttachment) -> Result<(), CacheError> {
        let path = self.path(entry);
        remove_file(&path).map_err(|source| CacheError { action: "remove", path, source })
    }

    /// Removes what is left of an entry of this container whose writer was killed.
    ///
    /// # Errors
    /// [`CacheError`]
    pub fn remove_unfinished(&self, container: &str) -> Result<(), CacheError> {
        let path = self.unfinished(container);
        remove_file(&path).map_err(|source| CacheError { action: "remove", path, source })
    }

    /// What becomes an entry once it is complete. A container's are written one after the other.
    fn unfinished(&self, container: &str) -> PathBuf {
        self.results.join(format!(".berth-{container}"))
    }

    fn path(&self, entry: &CachedAttachment) -> PathBuf {
        let CachedAttachment { network_name, container_id, if_name, .. } = entry;
        self.results.join(format!("{network_name}-{container_id}-{if_name}"))
    }
}

impl CachedAttachment {
    pub(crate) fn new(container: &str, network: &str, interface: &str, config: &[u8]) -> Self {
        Self {
            kind: KIND.to_owned(),
            container_id: container.to_owned(),
            config: config.to_owned(),
            if_name: interface.to_owned(),
            network_name: network.to_owned(),
            netns: String::new(),
            cni_args: Vec::new(),
            capability_args: Map::new(),
            result: None,
        }
    }
}

/// Absent is success.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// None for a file that is no entry: it is another's.
fn read(path: &Path) -> io::Result<Option<CachedAttachment>> {
    let file =
        fs::OpenOptions::new().read(true).custom_flags(berth_sys::file::READ_NONBLOCKING).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut text = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text).ok().filter(|entry: &CachedAttachment| {
        entry.kind == KIND
            && [&entry.network_name, &entry.container_id, &entry.if_name]
                .iter()
                .all(|part| !part.contains('/'))
    }))
}

/// Go writes an absent list or map as null.
fn or_default<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Bytes as Go's `encoding/json` writes them.
mod as_base64 {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_by_container_and_only_once_removed_gone() {
        let top = tempfile::tempdir().unwrap();
        let cache = Cache::new(top.path());
        assert!(cache.of_container("a").unwrap().is_empty());
        let mut a = CachedAttachment::new("a", "net-b", "eth0", b"{}");
        let b = CachedAttachment::new("b", "net", "eth0", b"{}");
        cache.write(&a).unwrap();
        cache.write(&b).unwrap();
        a.result = Some(Map::new());
        a.cni_args = vec![("IgnoreUnknown".into(), "1".into())];
        cache.write(&a).unwrap();
        fs::write(top.path().join("results/net-a-x"), "another's").unwrap();
        fs::create_dir(top.path().join("results/net-a-y")).unwrap();
        assert_eq!(cache.of_container("a").unwrap(), std::slice::from_ref(&a));
        assert_eq!(cache.of_container("b").unwrap(), std::slice::from_ref(&b));
        let all = cache.all().unwrap();
        assert_eq!((all.entries.len(), all.others, all.is_complete()), (2, 2, false));
        std::os::unix::fs::symlink("net-c-eth0", top.path().join("results/net-c-eth0")).unwrap();
        assert_eq!(cache.all().unwrap().unreadable.len(), 1);
        assert!(cache.of_container("c").is_err());
        assert_eq!(cache.of_container("b").unwrap(), std::slice::from_ref(&b));
        cache.remove(&a).unwrap();
        cache.remove(&a).unwrap();
        assert!(cache.of_container("a").unwrap().is_empty());
    }

    #[test]
    fn an_entry_of_libcni_is_read() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir(top.path().join("results")).unwrap();
        // As libcni 1.2 writes it.
        let text = r#"{"kind":"cniCacheV1","containerId":"c","config":"e30=","ifName":"eth0","networkName":"n",
            "cniArgs":[["IgnoreUnknown","1"]],"capabilityArgs":null,"result":{"cniVersion":"1.0.0","dns":{}}}"#;
        fs::write(top.path().join("results/n-c-eth0"), text).unwrap();
        let entries = Cache::new(top.path()).of_container("c").unwrap();
        let [entry] = entries.as_slice() else { panic!("{entries:?}") };
        assert_eq!((entry.config.as_slice(), entry.network_name.as_str()), (&b"{}"[..], "n"));
        assert_eq!(entry.result.as_ref().unwrap()["cniVersion"], "1.0.0");
    }
}
