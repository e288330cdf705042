//! The one moment in which an image comes to be.
//!
//! Order, so that a power cut at any point leaves the image absent or whole: layers are unpacked under other names; the patch layers and
//! the image's folder are made under other names too; one `syncfs` makes all of it durable; layers and patches get their names, and their
//! folders are synced; last the image's folder gets its name. A layer that got its name without its image is garbage, and collected.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_sys::beneath::Root;

use super::record::{self, ImageRecord, LayerRecord, Lower, OpenQuestions, TagRecord};
use super::staging::{Acquired, Staged};
use super::{Inner, Listed, RecordError, StoreError, file_error, make_private_dir, remove_tree};
use crate::image::Content;
use crate::layer::LayerError;
use crate::manifest::{Configuration, MAX_LAYERS, ManifestError};
use crate::patch::{self, PatchError};
use crate::unpack::Summary;
use crate::{Digest, Image};

/// Why the content of an image was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContentError {
    /// A manifest or a configuration.
    #[error("read the image's description")]
    Manifest(#[from] ManifestError),
    /// A manifest or configuration with other bytes than its digest says.
    #[error("content is {actual}, not {expected}")]
    DigestMismatch {
        /// By whoever pointed at it.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// A layer.
    #[error("layer {diff_id}")]
    Layer {
        /// Diff id.
        diff_id: Digest,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// Layers that do not fit together.
    #[error("put layer {diff_id} on the layers below it")]
    Patch {
        /// Diff id.
        diff_id: Digest,
        /// Why.
        #[source]
        source: PatchError,
    },
    /// With what corrects them, more layers than overlayfs takes.
    #[error("image needs {0} lower directories, more than {MAX_LAYERS}")]
    TooManyLayers(usize),
    /// The registry failed while a layer came in.
    #[error(transparent)]
    Registry(#[from] crate::registry::RegistryError),
    /// The store's own files.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ContentError {
    /// Whether it is for lack of space that this failed.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::Layer { source: LayerError::DiskFull | LayerError::Reserved(_), .. } => true,
            Self::Patch { source: PatchError::File { source, .. }, .. } => crate::layer::is_disk_full(source),
            Self::Store(error) => error.is_disk_full(),
            _ => false,
        }
    }

    /// Whether bytes came that are not those of the digest that they were asked by.
    #[must_use]
    pub fn is_digest_mismatch(&self) -> bool {
        matches!(
            self,
            Self::DigestMismatch { .. }
                | Self::Layer {
                    source: LayerError::DigestMismatch { .. } | LayerError::DiffIdMismatch { .. },
                    ..
                }
        )
    }
}

/// The names that an image is to get, in full form.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    pub(super) tag: Option<String>,
    pub(super) repo_digest: Option<String>,
}

/// An image whose layers are all in hand.
#[derive(Debug)]
pub(super) struct NewImage {
    pub(super) configuration: Configuration,
    pub(super) raw_config: Vec<u8>,
    pub(super) raw_manifest: Vec<u8>,
    /// Lowest first.
    pub(super) layers: Vec<Acquired>,
    pub(super) names: Vec<Names>,
}

/// Something in its place under another name, to be renamed when it is durable.
#[derive(Debug)]
struct Pending {
    partial: PathBuf,
    path: PathBuf,
}

/// Gives names to an image that is in the store already. `None` if it is not.
pub(super) fn name_existing(inner: &Inner, id: Digest, names: &[Names]) -> Result<Option<Image>, StoreError> {
    let _disk = inner.disk();
    name_listed(inner, id, names)
}

/// Enters an image into the store. Blocking.
pub(super) fn commit(inner: &Inner, new: &NewImage) -> Result<Image, ContentError> {
    let _disk = inner.disk();
    let id = Digest::of(&new.raw_config);
    if let Some(image) = name_listed(inner, id, &new.names)? {
        return Ok(image);
    }
    let mut pending = Vec::new();
    let result = commit_locked(inner, id, new, &mut pending);
    if result.is_err() {
        for unfinished in &pending {
            if let Err(error) = remove_tree(&unfinished.partial) {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "could not remove an unfinished image"
                );
            }
        }
    }
    result
}

fn commit_locked(
    inner: &Inner,
    id: Digest,
    new: &NewImage,
    pending: &mut Vec<Pending>,
) -> Result<Image, ContentError> {
    let (lower, patches) = stack(inner, new, pending)?;
    if lower.len() > MAX_LAYERS {
        return Err(ContentError::TooManyLayers(lower.len()));
    }

    let mut size_bytes = new.raw_config.len() as u64 + new.raw_manifest.len() as u64;
    for layer in &new.layers {
        let known = inner.state().layers.get(&layer.diff_id).copied();
        size_bytes += known.or(layer.staged.as_ref().map(|staged| staged.record)).map_or(0, |r| r.bytes);
    }
    let mut record = ImageRecord {
        id,
        layers: new.configuration.diff_ids.clone(),
        lower,
        size_bytes,
        tags: Vec::new(),
        repo_digests: Vec::new(),
    };
    let taken_over = add_names(&mut record, &new.names, &mut inner.state().next_sequence);
    let image_path = inner.image_path(id);
    let partial = inner.partial_path(&image_path);
    pending.push(Pending { partial: partial.clone(), path: image_path.clone() });
    write_image(&partial, &record, new)?;

    let root = fs::File::open(&inner.root).map_err(file_error("open", &inner.root))?;
    berth_sys::file::sync_filesystem(root.as_fd()).map_err(file_error("sync", &inner.root))?;

    for layer in &new.layers {
        if let Some(staged) = &layer.staged {
            enter_layer(inner, layer.diff_id, staged)?;
        }
    }
    for (chain_id, patch_record) in patches {
        let path = inner.patch_path(chain_id);
        if let Some(position) = pending.iter().position(|p| p.path == path) {
            let done = pending.remove(position);
            fs::rename(&done.partial, &path).map_err(file_error("rename", &done.partial))?;
            inner.state().patches.insert(chain_id, patch_record);
        }
    }
    inner.sync_folder("layers")?;
    inner.sync_folder("patches")?;
    fs::rename(&partial, &image_path).map_err(file_error("rename", &partial))?;
    pending.clear();
    inner.sync_folder("images")?;

    let content =
        Content::new(&new.configuration, size_bytes, new.raw_config.clone(), new.raw_manifest.clone());
    inner.state().images.insert(id, Listed { record, content: Arc::new(content) });
    take_over(inner, id, &taken_over)?;
    inner.state().image(id).ok_or(ContentError::Store(StoreError::BrokenOff))
}

fn enter_layer(inner: &Inner, diff_id: Digest, staged: &Staged) -> Result<(), StoreError> {
    // Another image's commit may have entered it; or the layer is in this image twice.
    if staged.is_committed() || inner.state().layers.contains_key(&diff_id) {
        return Ok(());
    }
    fs::rename(staged.path(), inner.layer_path(diff_id)).map_err(file_error("rename", staged.path()))?;
    staged.set_committed();
    inner.state().layers.insert(diff_id, staged.record);
    Ok(())
}

fn write_image(path: &Path, record: &ImageRecord, new: &NewImage) -> Result<(), StoreError> {
    make_private_dir(path)?;
    for (name, bytes) in [("config", &new.raw_config), ("manifest", &new.raw_manifest)] {
        let file = path.join(name);
        fs::File::create_new(&file)
            .and_then(|mut open| open.write_all(bytes))
            .map_err(file_error("write", &file))?;
    }
    let file = path.join("record.json");
    record::write(&file, record).map(drop).map_err(|source| StoreError::Record { path: file, source })
}

/// What is mounted for the image, top first, and the patches among it with their totals. Makes the patches that are missing.
type Stack = (Vec<Lower>, Vec<(Digest, LayerRecord)>);

fn stack(inner: &Inner, new: &NewImage, pending: &mut Vec<Pending>) -> Result<Stack, ContentError> {
    // Lowest first, with the open directory of each, for the patches above.
    let mut stacked: Vec<(Lower, Root)> = Vec::new();
    let mut patches = Vec::new();
    let mut chain_id: Option<Digest> = None;
    for layer in &new.layers {
        let diff_id = layer.diff_id;
        let chain = match chain_id {
            None => diff_id,
            // OCI image-spec 1.1, config.md, "Layer ChainID".
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
        };
        chain_id = Some(chain);
        let path = match &layer.staged {
            Some(staged) if !staged.is_committed() => staged.path().to_owned(),
            _ => inner.layer_path(diff_id),
        };
        let tree = path.join("fs");
        let root = Root::open(&tree).map_err(file_error("open", &tree))?;
        let summary = match &layer.staged {
            Some(staged) => staged.summary.clone(),
            None => read_summary(inner, diff_id, &path)?,
        };
        // Overlayfs refuses one directory twice in a mount. The upper one shows all that the lower one would.
        stacked.retain(|(lower, _)| *lower != Lower::Layer(diff_id));
        let below: Vec<&Root> = stacked.iter().rev().map(|(_, root)| root).collect();
        let patch_error = |source| ContentError::Patch { diff_id, source };
        let plan = patch::plan(&root, &summary, &below).map_err(patch_error)?;
        let patch = match plan {
            None => None,
            Some(plan) => {
                let (tree, patch_record) = make_patch(inner, chain, &plan, pending, patch_error)?;
                patches.push((chain, patch_record));
                Some(Root::open(&tree).map_err(file_error("open", &tree))?)
            }
        };
        if summary.opaque_root {
            stacked.clear();
        }
        stacked.push((Lower::Layer(diff_id), root));
        stacked.extend(patch.map(|root| (Lower::Patch(chain), root)));
    }
    Ok((stacked.into_iter().rev().map(|(lower, _)| lower).collect(), patches))
}

fn make_patch(
    inner: &Inner,
    chain_id: Digest,
    plan: &patch::Plan<'_>,
    pending: &mut Vec<Pending>,
    patch_error: impl Fn(PatchError) -> ContentError,
) -> Result<(PathBuf, LayerRecord), ContentError> {
    let path = inner.patch_path(chain_id);
    if let Some(record) = inner.state().patches.get(&chain_id) {
        return Ok((path.join("fs"), *record));
    }
    let partial = inner.partial_path(&path);
    pending.push(Pending { partial: partial.clone(), path });
    make_private_dir(&partial)?;
    let tree = partial.join("fs");
    fs::create_dir(&tree).map_err(file_error("create", &tree))?;
    let root = Root::open(&tree).map_err(file_error("open", &tree))?;
    let size = plan.make(&root).map_err(patch_error)?;
    let record =
        LayerRecord { bytes: size.bytes, inodes: size.inodes, opaque_root: false, has_open_questions: false };
    let file = partial.join("layer.json");
    record::write(&file, &record).map_err(|source| StoreError::Record { path: file, source })?;
    Ok((tree, record))
}

fn read_summary(inner: &Inner, diff_id: Digest, path: &Path) -> Result<Summary, StoreError> {
    let record = inner.state().layers.get(&diff_id).copied();
    let record = record.ok_or_else(|| file_error("find", path)(io::ErrorKind::NotFound.into()))?;
    let questions = if record.has_open_questions {
        let file = path.join("open.json");
        record::read(&file).map_err(|source| StoreError::Record { path: file, source })?
    } else {
        OpenQuestions::default()
    };
    Ok(questions.into_summary(record))
}

/// Gives names to a listed image. The caller holds the disk lock.
fn name_listed(inner: &Inner, id: Digest, names: &[Names]) -> Result<Option<Image>, StoreError> {
    let (old, mut record) = {
        let state = inner.state();
        let Some(listed) = state.images.get(&id) else { return Ok(None) };
        (listed.record.clone(), listed.record.clone())
    };
    let taken_over = add_names(&mut record, names, &mut inner.state().next_sequence);
    if record != old {
        save_record(inner, &record)?;
        if let Some(listed) = inner.state().images.get_mut(&id) {
            listed.record = record;
        }
    }
    take_over(inner, id, &taken_over)?;
    Ok(inner.state().image(id))
}

/// Adds names that the record does not have. Returns all tags among them.
fn add_names(record: &mut ImageRecord, names: &[Names], sequence: &mut u64) -> Vec<String> {
    let mut tags = Vec::new();
    for name in names {
        if let Some(tag) = &name.tag {
            if !record.tags.iter().any(|known| known.name == *tag) {
                record.tags.push(TagRecord { name: tag.clone(), sequence: *sequence });
                *sequence += 1;
            }
            tags.push(tag.clone());
        }
        if let Some(digest) = &name.repo_digest
            && !record.repo_digests.contains(digest)
        {
            record.repo_digests.push(digest.clone());
        }
    }
    tags
}

/// Points tags at their new owner, and takes them out of the records of the old ones. Those are written after the new owner's record: a
/// crash in between leaves two claims, of which the later sequence number wins.
fn take_over(inner: &Inner, id: Digest, tags: &[String]) -> Result<(), StoreError> {
    for tag in tags {
        let old_owner = inner.state().tags.insert(tag.clone(), id).filter(|owner| *owner != id);
        let changed = old_owner.and_then(|owner| {
            let mut state = inner.state();
            let listed = state.images.get_mut(&owner)?;
            listed.record.tags.retain(|known| known.name != *tag);
            Some(listed.record.clone())
        });
        if let Some(record) = changed {
            save_record(inner, &record)?;
        }
    }
    Ok(())
}

fn save_record(inner: &Inner, record: &ImageRecord) -> Result<(), StoreError> {
    let path = inner.image_path(record.id).join("record.json");
    record::replace(&path, record).map_err(|source: RecordError| StoreError::Record { path, source })
}
