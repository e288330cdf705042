//! An image as the rest of the daemon sees it: its names, its size and a typed, read-only view of
//! its configuration.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::Digest;
use crate::document::Execution;

/// An image in the store. Cheap to clone; a snapshot: names do not change under the holder.
#[derive(Debug, Clone)]
pub struct Image {
    pub(crate) id: Digest,
    pub(crate) repo_tags: Vec<String>,
    pub(crate) repo_digests: Vec<String>,
    pub(crate) content: Arc<Content>,
}

/// The immutable part of an image, as its id is the digest of its configuration.
#[derive(Debug, Clone)]
pub(crate) struct Content {
    /// Diff ids, lowest first.
    pub(crate) layers: Vec<Digest>,
    pub(crate) size_bytes: u64,
    pub(crate) created: Option<String>,
    pub(crate) config: ImageConfig,
    pub(crate) raw_config: Vec<u8>,
    pub(crate) raw_manifest: Vec<u8>,
}

impl Image {
    /// Image id: `sha256:` digest of the configuration's bytes.
    #[must_use]
    pub fn id(&self) -> Digest {
        self.id
    }

    /// Full normalised names with tags, sorted. Empty if every tag has moved on.
    #[must_use]
    pub fn repo_tags(&self) -> &[String] {
        &self.repo_tags
    }

    /// Full normalised names with the digest that the registry gave for them (of the index, where
    /// there was one), sorted.
    #[must_use]
    pub fn repo_digests(&self) -> &[String] {
        &self.repo_digests
    }

    /// Bytes that the unpacked layers, the manifest and the configuration take; never 0. Layers
    /// that other images share are counted in full.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.content.size_bytes
    }

    /// `User` of the configuration as the image has it: `""`, a name or number, or `user:group`.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.content.config.user
    }

    /// Creation time as the image states it (RFC 3339), not checked.
    #[must_use]
    pub fn created(&self) -> Option<&str> {
        self.content.created.as_deref()
    }

    /// The execution parameters.
    #[must_use]
    pub fn config(&self) -> &ImageConfig {
        &self.content.config
    }

    /// The configuration, byte for byte as pulled.
    #[must_use]
    pub fn raw_config(&self) -> &[u8] {
        &self.content.raw_config
    }

    /// The image manifest (not the index), byte for byte as pulled; for an imported docker archive,
    /// one that was written for it.
    #[must_use]
    pub fn raw_manifest(&self) -> &[u8] {
        &self.content.raw_manifest
    }

    /// Diff ids of the layers, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[Digest] {
        &self.content.layers
    }
}

/// `config` of an OCI image configuration (image-spec 1.1, config.md, "Properties"). Absent fields
/// are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// `Entrypoint`
    pub entrypoint: Vec<String>,
    /// `Cmd`
    pub cmd: Vec<String>,
    /// `Env`, each `NAME=value`, in the image's order. Not checked.
    pub env: Vec<String>,
    /// `WorkingDir`; may be empty.
    pub working_dir: String,
    /// `User`; may be empty.
    pub user: String,
    /// `StopSignal`, a name with or without `SIG` or a number; may be empty. Not checked.
    pub stop_signal: String,
    /// Keys of `Volumes`, sorted. Hostile text: never join these to a host path.
    pub volumes: Vec<String>,
    /// `Labels`. Hostile text.
    pub labels: BTreeMap<String, String>,
}

impl ImageConfig {
    pub(crate) fn of(config: &Execution) -> Self {
        Self {
            entrypoint: config.entrypoint.clone(),
            cmd: config.cmd.clone(),
            env: config.env.clone(),
            working_dir: config.working_dir.clone(),
            user: config.user.clone(),
            stop_signal: config.stop_signal.clone(),
            volumes: config.volumes.0.clone(),
            labels: config.labels.0.clone(),
        }
    }
}

impl Content {
    /// The same with another manifest.
    pub(crate) fn with_manifest(&self, raw_manifest: Vec<u8>) -> Self {
        Self { raw_manifest, ..self.clone() }
    }

    pub(crate) fn new(
        configuration: &crate::manifest::Configuration,
        size_bytes: u64,
        raw_config: Vec<u8>,
        raw_manifest: Vec<u8>,
    ) -> Self {
        Self {
            layers: configuration.diff_ids.clone(),
            size_bytes,
            created: configuration.parsed.created.clone(),
            config: ImageConfig::of(&configuration.parsed.config),
            raw_config,
            raw_manifest,
        }
    }
}
