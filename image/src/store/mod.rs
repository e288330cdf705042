//! Images and layers on disk.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::credentials::Credentials;
use crate::{Digest, Image, Progress, Reference};

/// How the store pulls, unpacks and limits.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Folder with one folder per registry host, each with a `hosts.toml` (containerd's form); none = defaults only.
    pub registry_config_path: Option<PathBuf>,
    /// Token service hosts that may be handed credentials although they do not belong to the registry's own domain.
    pub trusted_token_hosts: Vec<String>,
    /// Layers fetched and unpacked at the same time, over all pulls. Default 3.
    pub layers_at_once: usize,
    /// Uncompressed bytes that one image may have. Default 64 GiB.
    pub max_image_bytes: u64,
    /// Free bytes that unpacking leaves on the file system. Default 1 GiB.
    pub min_free_bytes: u64,
    /// Free share of the file system that unpacking leaves, in percent. Default 5.
    pub min_free_percent: u8,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            registry_config_path: None,
            trusted_token_hosts: Vec::new(),
            layers_at_once: 3,
            max_image_bytes: 64 << 30,
            min_free_bytes: 1 << 30,
            min_free_percent: 5,
        }
    }
}

/// Why a pull failed. The message is fit for a pod's event: it holds no secret and no URL query.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// No registry host has it.
    #[error("{reference} was not found")]
    NotFound {
        /// What was asked for.
        reference: String,
    },
    /// The registry wants other credentials, or any.
    #[error("not authorised to pull {reference}")]
    Unauthorized {
        /// What was asked for.
        reference: String,
    },
    /// No host of the registry could be talked to. CRI wants the text to start with `RegistryUnavailable`.
    #[error("registry {registry} cannot be reached")]
    Unreachable {
        /// Domain of the reference.
        registry: String,
    },
    /// The disk is full, or would go below the floor that must stay free.
    #[error("no space left for the image")]
    DiskFull,
}

/// Why an import failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The disk is full, or would go below the floor that must stay free.
    #[error("no space left for the image")]
    DiskFull,
}

/// Why the store could not be opened, read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file operation failed.
    #[error("{operation} {path}")]
    File {
        /// The failed act.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where an import reads from.
#[derive(Debug)]
pub enum ImportSource {
    /// A folder with an OCI image layout.
    Directory(PathBuf),
    /// A tar file, seekable: an OCI image layout or what `docker save` writes.
    Archive(std::fs::File),
}

/// What the store takes on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes, from per-layer totals that were counted while unpacking (file sizes in whole 4 KiB blocks).
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// The image store. Cheap to clone; all clones are one store. One process at a time may have a root open.
#[derive(Debug, Clone)]
pub struct Store {
    root: Arc<PathBuf>,
}

impl Store {
    /// Opens (and makes, if absent) the store below `root`: drops what an earlier process left half done, quarantines torn records.
    /// Blocking.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(root: &Path, _options: StoreOptions) -> Result<Self, StoreError> {
        Ok(Self { root: Arc::new(root.to_owned()) })
    }

    /// Pulls an image. The registry is always asked, also if the image is here. The future may be dropped at any time.
    ///
    /// # Errors
    /// [`PullError`]; nothing is listed then and no byte stays.
    pub async fn pull(
        &self,
        _reference: &Reference,
        _credentials: &Credentials,
        _progress: Arc<dyn Progress>,
    ) -> Result<Image, PullError> {
        todo!()
    }

    /// Imports all images of a layout or an archive. `name` replaces the names inside; only with one image.
    ///
    /// # Errors
    /// [`ImportError`]; nothing is listed then.
    pub async fn import(
        &self,
        _source: ImportSource,
        _name: Option<&Reference>,
        _progress: Arc<dyn Progress>,
    ) -> Result<Vec<Image>, ImportError> {
        todo!()
    }

    /// Finds by id (with or without `sha256:`), by a unique prefix of the id, by tag (short names are made full), by `name@digest`.
    #[must_use]
    pub fn find(&self, _text: &str) -> Option<Image> {
        todo!()
    }

    /// All images, by id.
    #[must_use]
    pub fn list(&self) -> Vec<Image> {
        todo!()
    }

    /// Removes the image that `text` finds, with all its names. Its layers go unless another image or an image in `in_use` needs
    /// them. Absent is success: returns whether there was one.
    ///
    /// # Errors
    /// [`StoreError`]; the image is unlisted already if only the removal of its layers failed.
    pub async fn remove(&self, _text: &str, _in_use: &BTreeSet<Digest>) -> Result<bool, StoreError> {
        todo!()
    }

    /// Deletes the layers of removed images that are in use no more. `in_use` has the image ids of all containers.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn collect(&self, _in_use: &BTreeSet<Digest>) -> Result<(), StoreError> {
        todo!()
    }

    /// The lower directories for an overlay mount, top first.
    ///
    /// # Errors
    /// [`StoreError`] if a layer is not on disk.
    pub fn lower_dirs(&self, _image: &Image) -> Result<Vec<PathBuf>, StoreError> {
        todo!()
    }

    /// Bytes and inodes that images take. No disk access.
    #[must_use]
    pub fn usage(&self) -> Usage {
        todo!()
    }

    /// The folder that was opened.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}
