//! One layer's bytes -> its tree: digest, decompression, diff id, unpacking, in one pass.
//!
//! Nothing is kept of the compressed bytes. The compression is told by the first bytes, not by the media type, as other runtimes do: types
//! in the field are often wrong, and both digests are checked anyway.

use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use berth_sys::beneath::Root;
use sha2::{Digest as _, Sha256};

use crate::Digest;
use crate::manifest::Blob;
use crate::pipe::Abandoned;
use crate::unpack::{self, Summary, UnpackError};

/// Largest zstd window: 128 MiB. Encoders stay at 8 MiB unless told `--long`; the format allows 3.75 TiB (RFC 8878, section 3.1.1.1.2).
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

const READ_BUFFER: usize = 128 * 1024;

/// The free space is looked at whenever so many bytes were unpacked.
const FREE_SPACE_INTERVAL: u64 = 16 << 20;

/// How far a broken layer is read on to learn whether its bytes were the wrong ones in the first place.
const DIAGNOSIS_LIMIT: u64 = 1 << 20;

/// Why a layer was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// Other bytes than the manifest names.
    #[error("content is {actual}, not {expected}")]
    DigestMismatch {
        /// By the manifest.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// The right compressed bytes, but not the tar archive that the configuration names.
    #[error("uncompressed content is {actual}, not {expected}")]
    DiffIdMismatch {
        /// By the configuration.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// Uncompressed bytes beyond what an image may have.
    #[error("image has more uncompressed bytes than the limit of {limit}")]
    TooLarge {
        /// For all layers of the image together.
        limit: u64,
    },
    /// The disk is full.
    #[error("no space left on the device for the layer")]
    DiskFull,
    /// The disk would go below what has to stay free.
    #[error(transparent)]
    Reserved(#[from] Shortage),
    /// The transfer was given up by the other side.
    #[error("transfer was abandoned")]
    Abandoned,
    /// Not a layer, or a hostile one.
    #[error("unpack the layer")]
    Unpack(#[from] UnpackError),
    /// The compressed stream could not be read.
    #[error("read the layer")]
    Read(#[source] io::Error),
}

/// A layer that was refused so that some of the disk stays free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// Of room.
    #[error(
        "a layer of {} (as packed) is wanted, {} are free, and {} have to stay free: make room, or lower {key}",
        mebibytes(*.wanted), mebibytes(*.free), mebibytes(*.reserved)
    )]
    Bytes {
        /// Bytes of the layer as it is fetched; 0 where nobody said. Unpacked it takes more.
        wanted: u64,
        /// Bytes that were free when it was refused.
        free: u64,
        /// Bytes that have to stay free.
        reserved: u64,
        /// The key of the daemon's configuration that reserves them.
        key: &'static str,
    },
    /// Of inodes: many small files fill a disk that has bytes left.
    #[error(
        "{free} inodes are free, and {reserved} have to stay free: remove files, or lower image.min_free_percent"
    )]
    Inodes {
        /// Inodes that were free when the layer was refused.
        free: u64,
        /// Inodes that have to stay free.
        reserved: u64,
    },
}

/// For people: rounded up, so that what is there never reads as nothing.
fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// What one image may take. Shared by the threads that unpack its layers.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: u64,
    left: AtomicU64,
    path: PathBuf,
    min_free_bytes: u64,
    min_free_percent: u8,
}

/// Carried through readers inside an `io::Error`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Fault {
    #[error("image is larger than its limit")]
    OverBudget,
    #[error("{free} bytes are free, of which {reserved} are reserved")]
    Reserved { free: u64, reserved: u64, key: &'static str },
    #[error("{free} inodes are free, of which {reserved} are reserved")]
    ReservedInodes { free: u64, reserved: u64 },
}

impl Budget {
    /// `limit` bytes, on the filesystem of `path`, of which the larger of the two amounts stays free.
    pub(crate) fn new(limit: u64, path: PathBuf, min_free_bytes: u64, min_free_percent: u8) -> Self {
        Self { limit, left: AtomicU64::new(limit), path, min_free_bytes, min_free_percent }
    }

    fn take(&self, bytes: u64) -> io::Result<()> {
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes))
            .map(drop)
            .map_err(|_| io::Error::other(Fault::OverBudget))
    }

    fn check_free_space(&self) -> io::Result<()> {
        let (total, free, inodes, free_inodes) = berth_sys::file::space(&self.path)?;
        let reserved_inodes = inodes / 100 * u64::from(self.min_free_percent);
        // File systems that make inodes as they need them say 0 of them.
        if inodes > 0 && free_inodes < reserved_inodes {
            return Err(io::Error::other(Fault::ReservedInodes {
                free: free_inodes,
                reserved: reserved_inodes,
            }));
        }
        let share = total / 100 * u64::from(self.min_free_percent);
        let (reserved, key) = if share > self.min_free_bytes {
            (share, "image.min_free_percent")
        } else {
            (self.min_free_bytes, "image.min_free_bytes")
        };
        if free < reserved {
            return Err(io::Error::other(Fault::Reserved { free, reserved, key }));
        }
        Ok(())
    }
}

/// Unpacks `input`, the bytes of `content.blob`, into the empty directory `root`.
///
/// # Errors
/// [`LayerError`]; the tree is incomplete then.
pub(crate) fn unpack(
    input: impl Read,
    content: LayerContent,
    root: &Root,
    budget: &Arc<Budget>,
) -> Result<Summary, LayerError> {
    let LayerContent { blob: Blob { digest: blob, size: wanted, .. }, diff_id } = content;
    let classify = |error| classify(error, budget, wanted);
    budget.check_free_space().map_err(|source| classify(LayerError::Read(source)))?;
    let mut compressed = BufReader::with_capacity(READ_BUFFER, Hashing::new(input));
    let unpacked = decompress_and_unpack(&mut compressed, root, budget);
    let broken = unpacked.is_err();
    // What is behind the archive counts for the digest too.
    let rest = if broken {
        io::copy(&mut (&mut compressed).take(DIAGNOSIS_LIMIT), &mut io::sink())
    } else {
        io::copy(&mut compressed, &mut io::sink())
    };
    let at_end = !broken || rest.as_ref().is_ok_and(|&length| length < DIAGNOSIS_LIMIT);
    let actual = compressed.into_inner().digest();
    if at_end && rest.is_ok() && actual != blob {
        return Err(LayerError::DigestMismatch { expected: blob, actual });
    }
    let (summary, actual_diff_id) = unpacked.map_err(classify)?;
    rest.map_err(|source| classify(LayerError::Read(source)))?;
    if actual_diff_id != diff_id {
        return Err(LayerError::DiffIdMismatch { expected: diff_id, actual: actual_diff_id });
    }
    Ok(summary)
}

fn decompress_and_unpack(
    compressed: &mut impl BufRead,
    root: &Root,
    budget: &Arc<Budget>,
) -> Result<(Summary, Digest), LayerError> {
    let magic = compressed.fill_buf().map_err(LayerError::Read)?;
    let magic = magic.get(..4).and_then(|m| <[u8; 4]>::try_from(m).ok()).unwrap_or_default();
    let archive: Box<dyn Read + '_> = match magic {
        [0x1f, 0x8b, _, _] => Box::new(flate2::bufread::MultiGzDecoder::new(compressed)),
        // A zstd frame or one of the skippable frames (RFC 8878, section 3.1.2).
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(compressed).map_err(LayerError::Read)?;
            decoder.window_log_max(MAX_ZSTD_WINDOW_LOG).map_err(LayerError::Read)?;
            Box::new(decoder)
        }
        _ => Box::new(compressed),
    };
    let mut metered = Hashing::new(Metered {
        inner: archive,
        budget: Arc::clone(budget),
        until_check: FREE_SPACE_INTERVAL,
    });
    let summary = unpack::unpack_while(&mut metered, root, &|| budget.check_free_space())?;
    // The reader of the archive has seen the end of its stream, so the diff id is whole.
    Ok((summary, metered.digest()))
}

/// Finds the cause that matters in an error of some reader or file operation below, in a layer of `wanted` bytes.
fn classify(error: LayerError, budget: &Budget, wanted: u64) -> LayerError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<io::Error>() {
            if let Some(fault) = io.get_ref().and_then(|inner| inner.downcast_ref::<Fault>()) {
                return match *fault {
                    Fault::OverBudget => LayerError::TooLarge { limit: budget.limit },
                    Fault::Reserved { free, reserved, key } => {
                        LayerError::Reserved(Shortage::Bytes { wanted, free, reserved, key })
                    }
                    Fault::ReservedInodes { free, reserved } => {
                        LayerError::Reserved(Shortage::Inodes { free, reserved })
                    }
                };
            }
            if io.get_ref().is_some_and(|inner| inner.is::<Abandoned>()) {
                return LayerError::Abandoned;
            }
            if is_disk_full(io) {
                return LayerError::DiskFull;
            }
        }
        cause = current.source();
    }
    error
}

/// No blocks, no inodes, or no quota left.
pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A layer's content in an archive file or folder for an import, or from a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerContent {
    pub(crate) blob: Blob,
    pub(crate) diff_id: Digest,
}

struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R> Hashing<R> {
    fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256::new() }
    }

    fn digest(self) -> Digest {
        Digest::from_hasher(self.hasher)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..length).unwrap_or_default());
        Ok(length)
    }
}

struct Metered<R> {
    inner: R,
    budget: Arc<Budget>,
    until_check: u64,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.budget.take(length as u64)?;
        match self.until_check.checked_sub(length as u64) {
            Some(left) => self.until_check = left,
            None => {
                self.until_check = FREE_SPACE_INTERVAL;
                self.budget.check_free_space()?;
            }
        }
        Ok(length)
    }
}
