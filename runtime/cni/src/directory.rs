//! The directory of configurations.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use berth_sys::host_path::{self, Cached, Facts};
use serde::{Deserialize, Serialize};

use crate::config::ConfigError;

/// Largest configuration. Real ones have a few KiB.
const MAX_BYTES: u64 = 1 << 20;

/// The extensions that libcni looks for.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// How long ago the last change has to be, so that another one has another time. Clocks of file
/// systems tick up to every two seconds.
const TICK_SECONDS: i64 = 3;

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
        /// As it was then.
        seen: Option<Box<Seen>>,
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

/// The first configuration in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its file.
    pub path: PathBuf,
    /// What is in it.
    pub text: Vec<u8>,
    /// As it was then.
    pub seen: Option<Seen>,
}

/// A directory as it was when it was read, and the file in it that was used. There is none where a
/// change could go unseen: when something was changed just before, or a link leads elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// None: it was not there.
    directory: Option<Stamp>,
    file: Option<(PathBuf, Stamp)>,
}

/// What is different after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: (u32, u32),
    inode: u64,
    size: u64,
    changed: (i64, u32),
}

impl Seen {
    /// Whether it is known that `directory` is as it was. This never waits: without an answer in
    /// the kernel's memory, it is not known.
    #[must_use]
    pub fn is_unchanged(&self, directory: &Path) -> bool {
        let is = |path: &Path, stamp: &Stamp| matches!(host_path::look_cached(path), Cached::Is(facts) if Stamp::of(&facts) == *stamp);
        match &self.directory {
            None => host_path::look_cached(directory) == Cached::Absent,
            Some(stamp) => {
                is(directory, stamp) && self.file.as_ref().is_none_or(|(path, stamp)| is(path, stamp))
            }
        }
    }
}

impl Stamp {
    const fn of(facts: &Facts) -> Self {
        let Facts { device, inode, size, changed } = *facts;
        Self { device, inode, size, changed }
    }

    /// The stamp of a file, unless it is as new as `now`, when it may be changed again without
    /// another time.
    fn settled(file: &File, now: i64) -> Option<Self> {
        let facts = host_path::facts(file.as_fd()).ok()?;
        (facts.changed.0 + TICK_SECONDS <= now).then(|| Self::of(&facts))
    }
}

/// The first file by name in a directory, which need not exist. That it cannot be read is an error,
/// even if a later one could be: its author meant it to come first.
///
/// # Errors
/// [`DirectoryError`], naming the file.
pub fn first(directory: &Path) -> Result<Found, DirectoryError> {
    let list = |source| DirectoryError::List { path: directory.to_owned(), source };
    let empty =
        |seen: Option<Seen>| DirectoryError::Empty { path: directory.to_owned(), seen: seen.map(Box::new) };
    let now = seconds_since_epoch();
    let opened = match File::open(directory) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(empty(Some(Seen { directory: None, file: None })));
        }
        Err(error) => return Err(list(error)),
    };
    let stamp = Stamp::settled(&opened, now);
    let mut is_certain = true;
    let mut first: Option<PathBuf> = None;
    for entry in fs::read_dir(directory).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if !extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) {
            continue;
        }
        if path.is_dir() {
            is_certain = false;
        } else if first.as_ref().is_none_or(|first| path.file_name() < first.file_name()) {
            first = Some(path);
        }
    }
    let stamp = stamp.filter(|_| is_certain);
    let Some(path) = first else {
        return Err(empty(stamp.map(|stamp| Seen { directory: Some(stamp), file: None })));
    };
    let read = |source| DirectoryError::Read { path: path.clone(), source };
    let file = open(&path).map_err(read)?;
    let seen = Stamp::settled(&file, now)
        .zip(stamp)
        .map(|(its, stamp)| Seen { directory: Some(stamp), file: Some((path.clone(), its)) });
    let text = text(file).map_err(read)?;
    Ok(Found { path, text, seen })
}

fn seconds_since_epoch() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
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
    use std::time::{Duration, Instant};

    use super::*;

    fn text_of(directory: &Path) -> Result<String, String> {
        match first(directory) {
            Ok(found) => Ok(String::from_utf8(found.text).unwrap()),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn the_first_by_name_is_used() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("net.d");
        assert!(text_of(&path).unwrap_err().starts_with("there is no CNI configuration in "));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("README"), "not one").unwrap();
        fs::create_dir(path.join("00-a.conf")).unwrap();
        assert!(text_of(&path).is_err());
        fs::write(path.join("20-b.conflist"), "b").unwrap();
        assert_eq!(text_of(&path).unwrap(), "b");
        fs::write(path.join("10-a.json"), "a").unwrap();
        assert_eq!(text_of(&path).unwrap(), "a");
        // One that cannot be read does not hand the pods over to the next.
        fs::remove_file(path.join("10-a.json")).unwrap();
        std::os::unix::fs::symlink("nowhere", path.join("10-a.json")).unwrap();
        assert!(text_of(&path).unwrap_err().contains("10-a.json"));
    }

    #[test]
    fn a_change_is_seen_and_its_absence_is_known_after_a_while() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("net.d");
        let Err(DirectoryError::Empty { seen: Some(absent), .. }) = first(&path) else { panic!() };
        assert!(absent.is_unchanged(&path));
        fs::create_dir(&path).unwrap();
        assert!(!absent.is_unchanged(&path));
        let file = path.join("10-a.conf");
        fs::write(&file, "a").unwrap();
        assert_eq!(first(&path).unwrap().seen, None, "the next change may be in the same tick");
        let settled = || {
            let begin = Instant::now();
            loop {
                if let Some(seen) = first(&path).unwrap().seen {
                    return seen;
                }
                assert!(begin.elapsed() < Duration::from_secs(60), "it does not settle");
                std::thread::sleep(Duration::from_millis(100));
            }
        };
        let seen = settled();
        assert!(seen.is_unchanged(&path));
        fs::write(&file, "b").unwrap();
        assert!(!seen.is_unchanged(&path));
        let seen = settled();
        fs::write(path.join("00-first.conf"), "first").unwrap();
        assert!(!seen.is_unchanged(&path));
        assert!(!seen.is_unchanged(&top.path().join("nowhere")));
    }

    #[test]
    fn what_is_not_a_text_of_reasonable_size_is_refused() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("a.conf");
        std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(text_of(top.path()).unwrap_err().contains("cannot read"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
        let error = first(top.path()).unwrap_err();
        let DirectoryError::Read { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.to_string(), "it is larger than 1 MiB");
    }
}
