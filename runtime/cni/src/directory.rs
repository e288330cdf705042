//! The directory of configurations.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::{ConfigError, NetworkConfig};

/// Largest configuration. Real ones have a few KiB.
const MAX_BYTES: u64 = 1 << 20;

/// The extensions that libcni looks for.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// Why there is no configuration to be had from a directory.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// It cannot be listed.
    #[error("cannot list the CNI configurations in {path}")]
    List {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No file in it has one of the extensions, or there is no such directory.
    #[error("there is no CNI configuration in {path}")]
    Empty {
        /// The directory.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read the CNI configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is not a configuration.
    #[error("invalid CNI configuration {path}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
}

/// A directory of configurations, of which the first by name is used. It may change or be gone at
/// any time.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// The one that was read last, so that it is parsed only when its file has changed.
    last: Mutex<Option<(Seen, Arc<NetworkConfig>)>>,
}

/// A file as it was when it was read. One that is replaced or written to differs in one of these.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Directory {
    /// The directory at `path`, which need not exist.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), last: Mutex::new(None) }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration of the first file by name, as it is now. One that cannot be used is an
    /// error, even if a later file could be: its author meant it to come first, and it may be half
    /// written.
    ///
    /// # Errors
    /// [`DirectoryError`], naming the file.
    pub fn first(&self) -> Result<Arc<NetworkConfig>, DirectoryError> {
        let path = self.first_path()?;
        let read = |source| DirectoryError::Read { path: path.clone(), source };
        let file = open(&path).map_err(read)?;
        let seen = Seen::of(&path, &file).map_err(read)?;
        if let Some((last, config)) = &*self.last()
            && *last == seen
        {
            return Ok(config.clone());
        }
        let text = text(file).map_err(read)?;
        let config = NetworkConfig::from_json(&text)
            .map_err(|source| DirectoryError::Invalid { path: path.clone(), source })?;
        let config = Arc::new(config);
        *self.last() = Some((seen, config.clone()));
        Ok(config)
    }

    fn last(&self) -> std::sync::MutexGuard<'_, Option<(Seen, Arc<NetworkConfig>)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn first_path(&self) -> Result<PathBuf, DirectoryError> {
        let list = |source| DirectoryError::List { path: self.path.clone(), source };
        let empty = || DirectoryError::Empty { path: self.path.clone() };
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(empty()),
            Err(error) => return Err(list(error)),
        };
        let mut first: Option<PathBuf> = None;
        for entry in entries {
            let path = entry.map_err(list)?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if !extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) || path.is_dir() {
                continue;
            }
            if first.as_ref().is_none_or(|first| path.file_name() < first.file_name()) {
                first = Some(path);
            }
        }
        first.ok_or_else(empty)
    }
}

impl Seen {
    fn of(path: &Path, file: &File) -> io::Result<Self> {
        let facts = file.metadata()?;
        Ok(Self {
            path: path.to_owned(),
            device: facts.dev(),
            inode: facts.ino(),
            size: facts.size(),
            changed: (facts.ctime(), facts.ctime_nsec()),
        })
    }
}

/// Opens a regular file. Opening a pipe would wait for a writer.
fn open(path: &Path) -> io::Result<File> {
    let file =
        fs::OpenOptions::new().read(true).custom_flags(berth_sys::file::READ_NONBLOCKING).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

fn text(file: File) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str) -> String {
        format!(r#"{{"cniVersion": "1.0.0", "name": "{name}", "type": "bridge"}}"#)
    }

    fn name(directory: &Directory) -> Result<String, String> {
        match directory.first() {
            Ok(config) => Ok(config.name().to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn the_first_by_name_is_used_and_read_again_when_it_changes() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("net.d");
        let directory = Directory::new(&path);
        assert!(name(&directory).unwrap_err().starts_with("there is no CNI configuration in "));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("README"), "not one").unwrap();
        fs::create_dir(path.join("00-a.conf")).unwrap();
        assert!(name(&directory).is_err());
        fs::write(path.join("20-b.conflist"), config("b")).unwrap();
        assert_eq!(name(&directory).unwrap(), "b");
        fs::write(path.join("10-a.json"), config("a")).unwrap();
        assert_eq!(name(&directory).unwrap(), "a");
        fs::write(path.join("10-a.json"), config("c")).unwrap();
        assert_eq!(name(&directory).unwrap(), "c");
        // One that is torn does not hand the pods over to the next.
        fs::write(path.join("10-a.json"), "{").unwrap();
        assert!(name(&directory).unwrap_err().contains("10-a.json"));
        fs::remove_dir_all(&path).unwrap();
        assert!(name(&directory).is_err());
        fs::create_dir(&path).unwrap();
        fs::write(path.join("b.conf"), config("back")).unwrap();
        assert_eq!(name(&directory).unwrap(), "back");
    }

    #[test]
    fn what_is_not_a_text_of_reasonable_size_is_refused() {
        let top = tempfile::tempdir().unwrap();
        let directory = Directory::new(top.path());
        let path = top.path().join("a.conf");
        std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(name(&directory).unwrap_err().contains("cannot read"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
        let error = directory.first().unwrap_err();
        let DirectoryError::Read { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.to_string(), "it is larger than 1 MiB");
    }
}
