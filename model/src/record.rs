//! Records: the state of a sandbox or container in a file.
//!
//! ```text
//! line 1   berth-record <version> <sha256 of all that follows the line, hex>
//! rest     JSON
//! ```
//! The version is of the JSON's meaning. An older one that is still understood is read. Unknown
//! keys are ignored, absent ones take their default, so that a daemon can be exchanged for one of
//! the next version and back.
//!
//! A newer version keeps the meaning of the keys by which an object is listed, stopped and removed:
//! `id`, `sandbox_id`, `config` with its metadata, labels and namespaces, `cgroup`, `process` and
//! the times. So a record of a newer version is read as far as it is known, and never written: the
//! newer daemon finds it as it left it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::id::{ContainerId, SandboxId};
use crate::{container, sandbox};

/// The version written.
pub const VERSION: u32 = 1;

/// The largest file read as a record. A request is at most 16 MiB (gRPC), and JSON may escape it.
pub const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// Why a file is not a valid record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The first line is not as it should be.
    #[error("not a record")]
    NotARecord,
    /// Written by a newer version, in a way that this one does not know.
    #[error("a record of version {found}, and this daemon knows up to {VERSION}")]
    TooNew {
        /// Its version.
        found: u32,
    },
    /// The checksum does not match: torn or damaged.
    #[error("the checksum does not match")]
    Damaged,
    /// The JSON is not of this kind of record.
    #[error("not the expected content")]
    Content(#[source] serde_json::Error),
}

/// The bytes of a record file.
///
/// # Errors
/// When `content` cannot be JSON (a map with keys that are not text).
pub fn encode<T: Serialize>(content: &T) -> Result<Vec<u8>, RecordError> {
    let body = serde_json::to_vec(content).map_err(RecordError::Content)?;
    let mut bytes = format!("berth-record {VERSION} {}\n", hex::encode(Sha256::digest(&body))).into_bytes();
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// The content of a record file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded<T> {
    /// The content, as far as this version knows it.
    pub content: T,
    /// The version, if it is a newer one; such a file must not be written over.
    pub newer: Option<u32>,
}

/// The content of a record file.
///
/// # Errors
/// [`RecordError`]. [`RecordError::TooNew`] says nothing about the file's health: what a newer
/// version means by its content, or by its checksum, is not known here.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<Decoded<T>, RecordError> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or(RecordError::NotARecord)?;
    let (line, rest) = bytes.split_at(end);
    let body = rest.get(1..).unwrap_or_default();
    let line = std::str::from_utf8(line).map_err(|_| RecordError::NotARecord)?;
    let mut words = line.split(' ');
    let (Some("berth-record"), Some(version), sum) = (words.next(), words.next(), words.next()) else {
        return Err(RecordError::NotARecord);
    };
    let found: u32 = version.parse().map_err(|_| RecordError::NotARecord)?;
    if found == 0 {
        return Err(RecordError::NotARecord);
    }
    let newer = (found > VERSION).then_some(found);
    let whole = words.next().is_none() && sum.is_some_and(|sum| hex::encode(Sha256::digest(body)) == sum);
    if !whole {
        return Err(newer.map_or(RecordError::Damaged, |found| RecordError::TooNew { found }));
    }
    match serde_json::from_slice(body) {
        Ok(content) => Ok(Decoded { content, newer }),
        Err(error) => Err(newer.map_or(RecordError::Content(error), |found| RecordError::TooNew { found })),
    }
}

/// The record of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxRecord {
    /// Its id.
    pub id: SandboxId,
    /// The requested configuration.
    pub config: sandbox::Config,
    /// Nanoseconds since the epoch.
    pub created_at_unix_ns: i64,
    /// The boot in which it was made: `/proc/sys/kernel/random/boot_id`. In another one all of its
    /// state is gone.
    pub boot_id: String,
    /// Its addresses, the primary one first; empty with the host's network.
    pub addresses: Vec<String>,
    /// Its own process 1, when its containers share a pid namespace.
    pub process: Option<ProcessRecord>,
    /// It was stopped.
    pub stopped: bool,
    /// Its hostname, the host's with the host's network; empty in records of earlier versions.
    pub hostname: String,
    /// The files that its containers share are in its tmpfs; if not, an earlier version made it.
    pub shared_in_tmpfs: bool,
    /// No CNI plugin knows of it; if not, one may, or an earlier version made it.
    pub without_plugins: bool,
}

/// A process, identified by pid and start time, since pids are reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// As the host numbers it.
    pub pid: i32,
    /// Clock ticks since boot.
    pub start_time: u64,
}

impl Default for SandboxRecord {
    fn default() -> Self {
        Self {
            id: SandboxId::from_bytes([0; 32]),
            config: sandbox::Config::default(),
            created_at_unix_ns: 0,
            boot_id: String::new(),
            addresses: Vec::new(),
            process: None,
            stopped: false,
            hostname: String::new(),
            shared_in_tmpfs: false,
            without_plugins: false,
        }
    }
}

/// The record of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerRecord {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox_id: SandboxId,
    /// Its configuration, with the resources of the last update.
    pub config: container::Config,
    /// The id of its image, `sha256:…`.
    pub image_id: String,
    /// A name of its image, for display.
    pub image_name: String,
    /// A reference of its image by digest, or its id.
    pub image_ref: String,
    /// Nanoseconds since the epoch.
    pub created_at_unix_ns: i64,
    /// Its main process.
    pub process: Option<ProcessRecord>,
    /// Who it runs as.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
    /// The signal that Stop sends.
    pub stop_signal: i32,
    /// Absolute; empty for none.
    pub log_path: String,
    /// Its cgroup, relative to the roots of the hierarchies.
    pub cgroup: String,
}

impl Default for ContainerRecord {
    fn default() -> Self {
        Self {
            id: ContainerId::from_bytes([0; 32]),
            sandbox_id: SandboxId::from_bytes([0; 32]),
            config: container::Config::default(),
            image_id: String::new(),
            image_name: String::new(),
            image_ref: String::new(),
            created_at_unix_ns: 0,
            process: None,
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            stop_signal: 15,
            log_path: String::new(),
            cgroup: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> ContainerRecord {
        ContainerRecord {
            image_id: "sha256:abc".to_owned(),
            created_at_unix_ns: 5,
            ..ContainerRecord::default()
        }
    }

    #[test]
    fn a_record_comes_back() {
        let decoded = decode::<ContainerRecord>(&encode(&record()).unwrap()).unwrap();
        assert_eq!(decoded, Decoded { content: record(), newer: None });
    }

    #[test]
    fn what_a_disk_made_of_it_is_noticed() {
        let bytes = encode(&record()).unwrap();
        let version = b"berth-record ".len();
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[position] ^= 1 << bit;
                match decode::<ContainerRecord>(&damaged) {
                    Ok(decoded) => {
                        assert_eq!(position, version, "byte {position}, bit {bit}");
                        assert!(decoded.newer.is_some() && decoded.content == record());
                    }
                    Err(error) => {
                        assert!(!matches!(error, RecordError::TooNew { .. }), "byte {position}, bit {bit}")
                    }
                }
            }
            assert!(decode::<ContainerRecord>(&bytes[..position]).is_err(), "cut at {position}");
        }
    }

    #[test]
    fn a_newer_version_is_read_as_far_as_it_is_known_and_never_taken_for_damaged() {
        let file = |version: u32, sum: &str, body: &str| format!("berth-record {version} {sum}\n{body}");
        let sum = |body: &str| hex::encode(Sha256::digest(body));
        let known = r#"{"image_id":"x","of_the_future":[1]}"#;
        for (version, newer) in [(1, None), (2, Some(2)), (u32::MAX, Some(u32::MAX))] {
            let decoded = decode::<ContainerRecord>(file(version, &sum(known), known).as_bytes()).unwrap();
            assert_eq!((decoded.content.image_id.as_str(), decoded.newer), ("x", newer));
        }
        for (sum, body) in [
            (sum(r#"{"image_id":7}"#), r#"{"image_id":7}"#),
            ("of another kind".to_owned(), known),
            (String::new(), known),
            (sum(known), ""),
        ] {
            let old = decode::<ContainerRecord>(file(1, &sum, body).as_bytes());
            assert!(matches!(old, Err(RecordError::Damaged | RecordError::Content(_))), "{old:?}");
            let new = decode::<ContainerRecord>(file(2, &sum, body).as_bytes());
            assert!(matches!(new, Err(RecordError::TooNew { found: 2 })), "{new:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode::<SandboxRecord>(&bytes).is_err());
        }
    }
}
