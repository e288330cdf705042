//! Progress reports of a pull or import.

use crate::Digest;

/// The phase of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerPhase {
    /// Known from the manifest; nothing done yet.
    Waiting,
    /// Already in the store: nothing to fetch.
    Present,
    /// Its bytes come in and are unpacked as they come. `done_bytes` counts.
    Fetching,
    /// Unpacked and verified; waits for the other layers to be committed with them.
    Unpacked,
}

/// One report about one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerProgress {
    /// Place in the image, 0 = lowest.
    pub index: usize,
    /// Number of layers of the image.
    pub count: usize,
    /// Digest of the layer as the manifest names it (of the compressed bytes).
    pub digest: Digest,
    /// What happens to it.
    pub phase: LayerPhase,
    /// Compressed bytes that have come in so far.
    pub done_bytes: u64,
    /// Compressed size by the manifest.
    pub total_bytes: u64,
}

/// Receives reports. Called from async tasks and from blocking threads, often: an implementation
/// must return at once and must not block.
pub trait Progress: Send + Sync {
    /// A layer changed its phase or got another piece of its bytes.
    fn layer(&self, report: LayerProgress);

    /// All layers are unpacked: the image is being made durable and entered into the store.
    fn committing(&self) {}
}

/// Discards all reports.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn layer(&self, _report: LayerProgress) {}
}
