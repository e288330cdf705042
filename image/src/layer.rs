//! One layer's bytes -> its tree: digest, decompression, diff id, unpacking, in one pass.
//!
//! The compressed bytes are not kept. The compression is recognised by the first bytes, not
//! by the media type, as other runtimes do: types in the field are often wrong, and both digests
//! are checked anyway.

use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use berth_sys::beneath::Root;
use sha2::{Digest as _, Sha256};

use crate::Digest;
use crate::manifest::Blob;
use crate::pipe::Abandoned;
use crate::turns::LayerInput;
use crate::unpack::{self, Summary, UnpackError};

/// Largest zstd window: 128 MiB. Encoders stay at 8 MiB without `--long`; the format allows 3.75
/// TiB (RFC 8878, section 3.1.1.1.2).
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

const READ_BUFFER: usize = 128 * 1024;

/// The free space is checked whenever this many bytes were unpacked.
const FREE_SPACE_INTERVAL: u64 = 16 << 20;

/// How far a broken layer is read to learn whether its bytes were wrong in the first place.
const DIAGNOSIS_LIMIT: u64 = 1 << 20;

/// And for how long: a host that sends something else may well stop sending.
const DIAGNOSIS_TIME: Duration = Duration::from_secs(2);

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// Other bytes than the manifest names.
    #[error("content is {actual}, not {expected}")]
    DigestMismatch {
        /// By the manifest.
        expected: Digest,
        /// The digest of what was received.
        actual: Digest,
    },
    /// The compressed bytes match, but not the tar archive that the configuration names.
    #[error("uncompressed content is {actual}, not {expected}")]
    DiffIdMismatch {
        /// By the configuration.
        expected: Digest,
        /// The digest of what was received.
        actual: Digest,
    },
    /// Uncompressed bytes beyond what an image may have.
    #[error("image exceeds the limit of {limit} uncompressed bytes")]
    TooLarge {
        /// For all layers of the image together.
        limit: u64,
    },
    /// The disk is full.
    #[error("no space left on the device for the layer")]
    DiskFull,
    /// The disk would have less free space than required.
    #[error(transparent)]
    Reserved(#[from] Shortage),
    /// The transfer was cancelled by the sender.
    #[error("transfer was cancelled")]
    Abandoned,
    /// Not a layer, or a hostile one.
    #[error("cannot unpack the layer")]
    Unpack(#[from] UnpackError),
    /// The compressed stream could not be read.
    #[error("cannot read the layer")]
    Read(#[source] io::Error),
}

/// A layer that was refused to keep some of the disk free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// Of room.
    #[error(
        "a layer of {} (compressed) does not fit: {} are free, and {} must stay free; free some space, or lower {key}",
        mebibytes(*.wanted), mebibytes(*.free), mebibytes(*.reserved)
    )]
    Bytes {
        /// Bytes of the layer as it is fetched; 0 if unknown. Unpacked it takes more.
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
        "{free} inodes are free, and {reserved} must stay free: remove files, or lower image.min_free_percent"
    )]
    Inodes {
        /// Inodes that were free when the layer was refused.
        free: u64,
        /// Inodes that have to stay free.
        reserved: u64,
    },
}

/// For messages: rounded up, so that a small amount is never shown as 0.
fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// The budget of an image. Shared by the threads that unpack its layers.
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
    /// `limit` bytes, on the filesystem of `path`, of which the larger of the two amounts stays
    /// free.
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
        // File systems with dynamic inodes report 0.
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
    input: impl LayerInput,
    content: LayerContent,
    root: &Root,
    budget: &Arc<Budget>,
) -> Result<Summary, LayerError> {
    let LayerContent { blob: Blob { digest: blob, size: wanted, .. }, diff_id } = content;
    let classify = |error| classify(error, budget, wanted);
    budget.check_free_space().map_err(|source| classify(LayerError::Read(source)))?;
    let mut compressed = BufReader::with_capacity(READ_BUFFER, Hashing::new(input));
    let share = Share { budget, taken: AtomicU64::new(0) };
    let unpacked = decompress_and_unpack(&mut compressed, root, &share);
    let broken = unpacked.is_err();
    if broken {
        compressed.get_mut().inner.hurry(DIAGNOSIS_TIME);
    }
    // Data after the archive is part of the digest, too.
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
    share.keep();
    Ok(summary)
}

/// The share of one layer in the budget; returned if it fails, since the layer may be retried.
struct Share<'a> {
    budget: &'a Budget,
    taken: AtomicU64,
}

impl Share<'_> {
    fn take(&self, bytes: u64) -> io::Result<()> {
        self.budget.take(bytes)?;
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn keep(&self) {
        self.taken.store(0, Ordering::Relaxed);
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.taken.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl LayerError {
    /// Whether a retry may succeed: the received bytes were wrong, or may have been.
    pub(crate) fn is_of_the_bytes(&self) -> bool {
        match self {
            Self::DigestMismatch { .. } | Self::Read(_) => true,
            Self::Unpack(error) => !matches!(error, UnpackError::File { .. }),
            _ => false,
        }
    }
}

/// How many bytes say what something is packed with.
const MAGIC_BYTES: usize = 4;

/// The decompressed bytes of what is gzip or zstd by its first bytes, and the bytes themselves of
/// everything else.
///
/// # Errors
/// Of reading the first bytes, or of setting up the decoder.
pub(crate) fn decompressed<'a>(packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut packed = packed;
    // A network may bring them one by one.
    let mut first = Vec::with_capacity(MAGIC_BYTES);
    packed.by_ref().take(MAGIC_BYTES as u64).read_to_end(&mut first)?;
    let magic = <[u8; MAGIC_BYTES]>::try_from(first.as_slice()).unwrap_or_default();
    let packed = io::Cursor::new(first).chain(packed);
    Ok(match magic {
        [0x1f, 0x8b, _, _] => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
        // A zstd frame or one of the skippable frames (RFC 8878, section 3.1.2).
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?;
            decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
        _ => Box::new(packed),
    })
}

fn decompress_and_unpack(
    compressed: &mut impl BufRead,
    root: &Root,
    share: &Share<'_>,
) -> Result<(Summary, Digest), LayerError> {
    let archive = decompressed(compressed).map_err(LayerError::Read)?;
    let mut metered = Hashing::new(Metered { inner: archive, share, until_check: FREE_SPACE_INTERVAL });
    let summary = unpack::unpack_while(&mut metered, root, &|| share.budget.check_free_space())?;
    // The reader of the archive has reached the end of its stream, so the diff id is complete.
    Ok((summary, metered.digest()))
}

/// Writes the decompressed bytes of an archive, under the same limits as those of a layer.
///
/// # Errors
/// [`LayerError`].
pub(crate) fn decompress_to(
    packed: impl BufRead,
    out: &mut impl io::Write,
    budget: &Arc<Budget>,
) -> Result<(), LayerError> {
    let classify = |source| classify(LayerError::Read(source), budget, 0);
    budget.check_free_space().map_err(classify)?;
    let share = Share { budget, taken: AtomicU64::new(0) };
    let archive = decompressed(packed).map_err(classify)?;
    let mut metered = Metered { inner: archive, share: &share, until_check: FREE_SPACE_INTERVAL };
    io::copy(&mut metered, out).map(drop).map_err(classify)
}

/// Finds the cause that matters in an error of some reader or file operation below, in a layer of
/// `wanted` bytes.
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

/// A layer's content in an archive file or directory for an import, or from a registry.
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

struct Metered<'a, R> {
    inner: R,
    share: &'a Share<'a>,
    until_check: u64,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.share.take(length as u64)?;
        match self.until_check.checked_sub(length as u64) {
            Some(left) => self.until_check = left,
            None => {
                self.until_check = FREE_SPACE_INTERVAL;
                self.share.budget.check_free_space()?;
            }
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl LayerInput for &[u8] {}

    /// An archive of so many empty files, in a directory without an entry.
    fn files(count: u32) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for number in 0..count {
            let mut header = tar::Header::new_ustar();
            header.set_size(0);
            header.set_mode(0o644);
            builder.append_data(&mut header, format!("d/{number}"), io::empty()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn content_of(tar: &[u8]) -> LayerContent {
        LayerContent { blob: Blob::of(tar), diff_id: Digest::of(tar) }
    }

    /// Gives its bytes one by one, as a network may.
    struct OneByOne<'a>(&'a [u8]);

    impl Read for OneByOne<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(1);
            self.0.read(&mut buffer[..length])
        }
    }

    #[test]
    fn what_packs_a_layer_is_known_however_its_first_bytes_come() {
        let plain = b"not packed".repeat(100);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut gzip, &plain).unwrap();
        let zstd = zstd::encode_all(&plain[..], 1).unwrap();
        for packed in [gzip.finish().unwrap(), zstd, plain.clone()] {
            let mut read = Vec::new();
            let one_by_one = BufReader::with_capacity(1, OneByOne(&packed));
            decompressed(one_by_one).unwrap().read_to_end(&mut read).unwrap();
            assert_eq!(read, plain);
        }
        for short in [&b""[..], b"\x1f", b"\x1f\x8b\x08"] {
            let mut read = Vec::new();
            decompressed(short).unwrap().read_to_end(&mut read).unwrap();
            assert_eq!(read, short);
        }
    }

    #[test]
    fn inodes_stay_free_as_bytes_do() {
        let dir = tempfile::tempdir().unwrap();
        let (_, _, inodes, _) = berth_sys::file::space(dir.path()).unwrap();
        if inodes == 0 {
            return;
        }
        // All of them have to stay free, and some are in use.
        let budget = Arc::new(Budget::new(u64::MAX, dir.path().to_owned(), 0, 100));
        let tar = files(1);
        let failed =
            unpack(&tar[..], content_of(&tar), &Root::open(dir.path()).unwrap(), &budget).unwrap_err();
        assert!(matches!(failed, LayerError::Reserved(Shortage::Inodes { .. })), "{failed:?}");
        assert!(failed.to_string().contains("inodes are free"), "{failed}");
    }

    #[test]
    fn room_is_looked_for_again_and_again_while_files_are_made() {
        let dir = tempfile::tempdir().unwrap();
        let asked = AtomicU64::new(0);
        let tar = files(5000);
        let failed = unpack::unpack_while(&tar[..], &Root::open(dir.path()).unwrap(), &|| {
            if asked.fetch_add(1, Ordering::Relaxed) == 3 {
                return Err(io::Error::other(Fault::ReservedInodes { free: 1, reserved: 2 }));
            }
            Ok(())
        })
        .unwrap_err();
        let budget = Budget::new(u64::MAX, dir.path().to_owned(), 0, 0);
        let failed = classify(failed.into(), &budget, 0);
        assert!(
            matches!(failed, LayerError::Reserved(Shortage::Inodes { free: 1, reserved: 2 })),
            "{failed:?}"
        );
        let made = std::fs::read_dir(dir.path().join("d")).unwrap().count();
        assert!((2900..3100).contains(&made), "{made} files were made");
        // Directories that are made for a path count too.
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(0);
        for number in 0..3 {
            let path = format!("{number}/{}f", "a/".repeat(1000));
            builder.append_data(&mut header, path, io::empty()).unwrap();
        }
        asked.store(0, Ordering::Relaxed);
        let tar = builder.into_inner().unwrap();
        unpack::unpack_while(&tar[..], &Root::open(dir.path()).unwrap(), &|| {
            asked.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .unwrap();
        assert!(asked.load(Ordering::Relaxed) >= 3);
    }

    #[test]
    fn what_a_failed_layer_took_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let tar = files(10);
        let budget = Arc::new(Budget::new(tar.len() as u64, dir.path().to_owned(), 0, 0));
        let wrong = LayerContent { diff_id: Digest::of(b"other"), ..content_of(&tar) };
        for content in [wrong, wrong, content_of(&tar)] {
            let root = tempfile::tempdir().unwrap();
            let unpacked = unpack(&tar[..], content, &Root::open(root.path()).unwrap(), &budget);
            match unpacked {
                Ok(_) => assert_eq!(content, content_of(&tar)),
                Err(error) => assert!(matches!(error, LayerError::DiffIdMismatch { .. }), "{error:?}"),
            }
        }
        assert_eq!(budget.left.load(Ordering::Relaxed), 0);
    }
}
