//! Images: references, registries, the layer store, unpacking, import.
//!
//! A pull goes `reference` -> `registry` (mirrors, credentials, manifest) -> `layer` (bytes ->
//! digest -> decompression -> diff id -> `unpack`) -> `store` (one commit of the whole image).
//! Everything that comes from a registry or an archive is untrusted; paths inside layers are
//! resolved by `berth_sys::beneath` and nowhere else.
//!
//! Starting points for a reader: [`Store`] for what the daemon calls, `store` for what lies on disk
//! and when it is durable, `unpack` for what an archive may contain.

#![forbid(unsafe_code)]

pub mod credentials;
pub mod digest;
mod document;
pub mod image;
pub mod json;
pub mod layer;
pub mod manifest;
mod merged;
pub mod patch;
mod pipe;
mod platform;
pub mod progress;
pub mod reference;
pub mod registry;
pub mod store;
mod turns;
pub mod unpack;

pub use credentials::{Credentials, Secret};
pub use digest::Digest;
pub use image::{Image, ImageConfig};
pub use progress::{LayerPhase, LayerProgress, NoProgress, Progress};
pub use reference::Reference;
pub use store::{
    ArchiveFile, ContentError, ImportError, ImportSource, InUse, Layout, Lease, PullError, Store, StoreError,
    StoreOptions, StoredLayer, Usage,
};
