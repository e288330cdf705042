//! What the store writes about images and layers.
//!
//! Every record is one JSON file: `{"version":1,"sha256":"<of the payload's
//! bytes>","payload":{…}}`. Only a file whose bytes contradict its checksum is damaged. One with
//! another version was written by another Berth, and one that cannot be read says nothing about its
//! content: both are kept. What follows from each is in `fault`.
//!
//! ```text
//! <root>/lock                              held while a process has the store open
//! <root>/layers/<diff id>/fs/              the layer's tree
//! <root>/layers/<diff id>/layer.json       LayerRecord
//! <root>/layers/<diff id>/open.json        OpenQuestions, if there are any
//! <root>/patches/<chain id>/{fs/,layer.json}
//! <root>/images/<config digest>/{record.json,manifest,config}
//! <root>/images/<config digest>.removed/   not listed any more; its layers are still in use
//! <root>/quarantine/                       damaged records, for a person to look at
//! <root>/*/<name>.<n>.partial              half made or on its way out; deleted in the background
//! <root>/*/<name>.<n>.replaced             a replaced tree; deleted when no container uses it
//! ```
//! Names are the 64 hexadecimal digits of a sha256.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::Digest;
use crate::unpack::{LowerLink, Summary};

const VERSION: u32 = 1;

/// Largest record that is read: [`OpenQuestions`] of 64 MiB of paths in base64, with room.
const MAX_RECORD: u64 = 256 << 20;

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file could not be read or written.
    #[error("cannot access the record")]
    Access(#[source] io::Error),
    /// Not a record at all.
    #[error("record is malformed")]
    Form(#[source] serde_json::Error),
    /// The checksum does not hold.
    #[error("record is incomplete")]
    Torn,
    /// Written by another version.
    #[error("record version {0} is not supported by this version of Berth")]
    Version(u32),
    /// The checksum holds, so the content is as written; this version does not understand it.
    #[error("record has content that this version of Berth does not support")]
    Content(#[source] serde_json::Error),
    /// Above 256 MiB.
    #[error("record is too long")]
    TooLong,
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    version: u32,
    sha256: String,
    payload: Box<RawValue>,
}

/// A layer or a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Everything below is hidden.
    pub(crate) opaque_root: bool,
    /// `open.json` is there.
    pub(crate) has_open_questions: bool,
}

/// What the layer needs from the layers below: the lists of [`Summary`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct OpenQuestions {
    implicit_dirs: Vec<PathRecord>,
    lower_links: Vec<LinkRecord>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct LinkRecord {
    name: PathRecord,
    target: PathRecord,
    target_replaced: bool,
}

/// A path of any bytes, in base64.
#[derive(Debug, Clone)]
struct PathRecord(PathBuf);

/// One directory of an image's overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Lower {
    /// Diff id.
    Layer(Digest),
    /// Chain id.
    Patch(Digest),
}

impl std::fmt::Display for Lower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Layer(diff_id) => write!(f, "layer {diff_id}"),
            Self::Patch(chain_id) => write!(f, "patch {chain_id}"),
        }
    }
}

/// A tag and when it was given: of two images with the same tag, the higher number has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TagRecord {
    pub(crate) name: String,
    pub(crate) sequence: u64,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) id: Digest,
    /// Diff ids, lowest first.
    pub(crate) layers: Vec<Digest>,
    /// What is mounted, top first.
    pub(crate) lower: Vec<Lower>,
    pub(crate) size_bytes: u64,
    pub(crate) tags: Vec<TagRecord>,
    pub(crate) repo_digests: Vec<String>,
    /// Of the manifest beside the record. Berth 0.1.0 and older wrote none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) manifest: Option<Digest>,
}

impl Serialize for PathRecord {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD_NO_PAD.encode(self.0.as_os_str().as_bytes()))
    }
}

impl<'de> Deserialize<'de> for PathRecord {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD_NO_PAD.decode(text).map_err(serde::de::Error::custom)?;
        Ok(Self(PathBuf::from(OsString::from_vec(bytes))))
    }
}

impl OpenQuestions {
    /// What a summary leaves open; `None` if nothing.
    pub(crate) fn of(summary: &Summary) -> Option<Self> {
        if summary.implicit_dirs.is_empty() && summary.lower_links.is_empty() {
            return None;
        }
        Some(Self {
            implicit_dirs: summary.implicit_dirs.iter().cloned().map(PathRecord).collect(),
            lower_links: summary
                .lower_links
                .iter()
                .map(|link| LinkRecord {
                    name: PathRecord(link.name.clone()),
                    target: PathRecord(link.target.clone()),
                    target_replaced: link.target_replaced,
                })
                .collect(),
        })
    }

    /// Back to a summary.
    pub(crate) fn into_summary(self, record: LayerRecord) -> Summary {
        Summary {
            bytes: record.bytes,
            inodes: record.inodes,
            implicit_dirs: self.implicit_dirs.into_iter().map(|path| path.0).collect(),
            lower_links: self
                .lower_links
                .into_iter()
                .map(|link| LowerLink {
                    name: link.name.0,
                    target: link.target.0,
                    target_replaced: link.target_replaced,
                })
                .collect(),
            opaque_root: record.opaque_root,
        }
    }
}

/// Writes a record; not durable until the next sync.
pub(crate) fn write(path: &Path, payload: &impl Serialize) -> Result<(), RecordError> {
    let bytes = encode(payload)?;
    File::create(path).and_then(|mut file| file.write_all(&bytes)).map_err(RecordError::Access)
}

/// Replaces a record so that after a crash the old one or the new one is there.
pub(crate) fn replace(path: &Path, payload: &impl Serialize) -> Result<(), RecordError> {
    replace_bytes(path, &encode(payload)?)
}

/// Replaces a file so that after a crash the old one or the new one is there.
pub(crate) fn replace_bytes(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let new = path.with_extension("new");
    let replace = || {
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync_dir(path.parent().unwrap_or(path))
    };
    let replaced = replace();
    if replaced.is_err() {
        // The first error is what counts; a leftover is overwritten the next time.
        let _ = fs::remove_file(&new);
    }
    replaced.map_err(RecordError::Access)
}

fn encode(payload: &impl Serialize) -> Result<Vec<u8>, RecordError> {
    let payload = serde_json::to_string(payload).map_err(RecordError::Form)?;
    let sha256 = Digest::of(payload.as_bytes()).hex();
    let payload = RawValue::from_string(payload).map_err(RecordError::Form)?;
    serde_json::to_vec(&Envelope { version: VERSION, sha256, payload }).map_err(RecordError::Form)
}

/// What every version of a record has.
#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// Reads a record.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, RecordError> {
    let bytes = read_bounded(path, MAX_RECORD)?;
    let envelope: Envelope = match serde_json::from_slice(&bytes) {
        Ok(envelope) => envelope,
        // Another version may have other fields.
        Err(error) => match serde_json::from_slice::<VersionOnly>(&bytes) {
            Ok(other) if other.version != VERSION => return Err(RecordError::Version(other.version)),
            _ => return Err(RecordError::Form(error)),
        },
    };
    if envelope.version != VERSION {
        return Err(RecordError::Version(envelope.version));
    }
    let payload = envelope.payload.get();
    if Digest::of(payload.as_bytes()).hex() != envelope.sha256 {
        return Err(RecordError::Torn);
    }
    serde_json::from_str(payload).map_err(RecordError::Content)
}

/// Reads a whole file of bounded length.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, RecordError> {
    let file = File::open(path).map_err(RecordError::Access)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(RecordError::Access)?;
    if bytes.len() as u64 > limit { Err(RecordError::TooLong) } else { Ok(bytes) }
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        let record = LayerRecord { bytes: 1, inodes: 2, opaque_root: false, has_open_questions: true };
        replace(&path, &record).unwrap();
        assert_eq!(read::<LayerRecord>(&path).unwrap(), record);
        let good = fs::read(&path).unwrap();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            fs::write(&path, &bad).unwrap();
            if let Ok(read) = read::<LayerRecord>(&path) {
                assert_eq!(read, record, "byte {i}");
            }
            fs::write(&path, &good[..i]).unwrap();
            assert!(read::<LayerRecord>(&path).is_err(), "cut at {i}");
        }
    }

    #[test]
    fn a_later_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        for other in [r#"{"version":2,"sha256":"","payload":{}}"#, r#"{"version":2,"checksum":"x"}"#] {
            fs::write(&path, other).unwrap();
            assert!(matches!(read::<LayerRecord>(&path), Err(RecordError::Version(2))), "{other}");
        }
        // With a checksum that holds it is not damage, whatever it says.
        write(&path, &"a record of another kind").unwrap();
        assert!(matches!(read::<LayerRecord>(&path), Err(RecordError::Content(_))));
    }

    #[test]
    fn open_questions_keep_paths_of_any_bytes() {
        let odd = PathBuf::from(OsString::from_vec(b"a\xff\n/\"b".to_vec()));
        let summary = Summary {
            implicit_dirs: vec![PathBuf::new(), odd.clone()],
            lower_links: vec![LowerLink { name: odd.clone(), target: odd, target_replaced: true }],
            ..Summary::default()
        };
        let json = serde_json::to_string(&OpenQuestions::of(&summary).unwrap()).unwrap();
        let record = LayerRecord { bytes: 0, inodes: 0, opaque_root: false, has_open_questions: true };
        assert_eq!(serde_json::from_str::<OpenQuestions>(&json).unwrap().into_summary(record), summary);
    }
}
