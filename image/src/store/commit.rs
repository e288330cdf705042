//! The one moment in which an image comes to be.
//!
//! Order, so that a power cut at any point leaves the image absent or whole: layers are unpacked
//! under other names; the patch layers and the image's directory are made under other names too;
//! one `syncfs` makes all of it durable; layers and patches get their names, and their directories
//! are synced; last the image's directory gets its name. A layer that got its name without its
//! image is garbage, and collected.
//!
//! The same way mends what is there already: a layer or patch whose record cannot be used changes
//! places with the new one, and stays under another name while a container has it mounted.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_sys::beneath::Root;

use super::load::{Needs, Tree, chain_id, is_manifest_of};
use super::record::{self, ImageRecord, LayerRecord, Lower, OpenQuestions, TagRecord};
use super::staging::{Acquired, Staged};
use super::{Inner, Listed, RecordError, StoreError, file_error, make_private_dir};
use crate::image::Content;
use crate::layer::LayerError;
use crate::manifest::{Configuration, MAX_LAYERS, ManifestError};
use crate::merged::Effort;
use crate::patch::{self, PatchError};
use crate::unpack::Summary;
use crate::{Digest, Image};

/// Why the content of an image was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContentError {
    /// A manifest or a configuration.
    #[error("invalid manifest or configuration")]
    Manifest(#[from] ManifestError),
    /// A manifest or configuration with other bytes than its digest says.
    #[error("content is {actual}, not {expected}")]
    DigestMismatch {
        /// By the document that refers to it.
        expected: Digest,
        /// The digest of what was received.
        actual: Digest,
    },
    /// A layer.
    #[error("layer {diff_id} cannot be used")]
    Layer {
        /// Diff id.
        diff_id: Digest,
        /// The cause.
        #[source]
        source: LayerError,
    },
    /// An archive of images that is packed.
    #[error("cannot unpack the archive")]
    Archive(#[source] LayerError),
    /// A layer and those below it contradict each other.
    #[error("cannot apply layer {diff_id} to the layers below it")]
    Patch {
        /// Diff id.
        diff_id: Digest,
        /// The cause.
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

/// Gives names to an image that is in the store already. `None` if it is not, or if something of it
/// has to be mended.
pub(super) fn name_existing(
    inner: &Inner,
    id: Digest,
    raw_manifest: &[u8],
    names: &[Names],
) -> Result<Option<Image>, StoreError> {
    let _disk = inner.disk();
    inner.look_again_if_needed();
    if !is_all_sound(inner, id) {
        return Ok(None);
    }
    mend_manifest(inner, id, raw_manifest);
    name_listed(inner, id, names)
}

/// Whether an image is listed, and nothing of what it stands on has to be mended.
fn is_all_sound(inner: &Inner, id: Digest) -> bool {
    let needs = inner.state().images.get(&id).map(|listed| Needs::of_record(&listed.record));
    needs.is_some_and(|needs| needs.0.into_iter().all(|lower| inner.is_sound(lower)))
}

/// Enters an image into the store. Blocking. After an error nothing of it is left.
pub(super) fn commit(inner: &Inner, new: NewImage) -> Result<Image, ContentError> {
    // Most of what is to be written goes to the disk here, while others may have the lock.
    sync_layers(inner, &new)?;
    let _disk = inner.disk();
    let mut way = Way::default();
    let result = commit_locked(inner, &new, &mut way);
    // What the image did not take is released before the unneeded is collected.
    drop(new);
    if result.is_err() {
        for unfinished in way.pending {
            inner.sweeper.queue(unfinished.partial);
        }
        inner.discard_unneeded(&way.entered);
    }
    inner.sweeper.start();
    result
}

/// Makes the layers durable that are not in the store yet.
fn sync_layers(inner: &Inner, new: &NewImage) -> Result<(), StoreError> {
    let staged = new.layers.iter().filter_map(|layer| layer.staged.as_ref());
    let begun = staged.filter(|staged| !staged.is_committed()).map(|staged| staged.begun).min();
    begun.map_or(Ok(()), |begun| inner.durable.sync(begun))
}

/// How far a commit came.
#[derive(Default)]
struct Way {
    pending: Vec<Pending>,
    /// Layers and patches that have their names.
    entered: BTreeSet<Lower>,
}

fn commit_locked(inner: &Inner, new: &NewImage, way: &mut Way) -> Result<Image, ContentError> {
    let id = Digest::of(&new.raw_config);
    let is_listed = inner.state().images.contains_key(&id);
    if is_listed && is_all_sound(inner, id) {
        mend_manifest(inner, id, &new.raw_manifest);
        return name_listed(inner, id, &new.names)?.ok_or(StoreError::BrokenOff.into());
    }
    let begun = inner.durable.now();
    let (lower, patches) = stack(inner, new, &mut way.pending)?;
    if lower.len() > MAX_LAYERS {
        return Err(ContentError::TooManyLayers(lower.len()));
    }

    let mut size_bytes = new.raw_config.len() as u64 + new.raw_manifest.len() as u64;
    for layer in &new.layers {
        let staged = layer.staged.as_ref().map(|staged| staged.record);
        let known = inner.state().trees.get(&Lower::Layer(layer.diff_id)).and_then(Tree::record);
        size_bytes += staged.or(known).map_or(0, |record| record.bytes);
    }
    let image_path = inner.image_path(id);
    let partial = inner.partial_path(&image_path);
    // A directory of this image may be there that cannot be used. What is known of it goes on: its
    // names.
    let held = inner.state().held.get(&id.hex()).cloned();
    let mut record = ImageRecord {
        id,
        layers: new.configuration.diff_ids.clone(),
        lower,
        size_bytes,
        tags: Vec::new(),
        repo_digests: Vec::new(),
        manifest: Some(Digest::of(&new.raw_manifest)),
    };
    if let Some(known) = held.as_ref().and_then(|held| held.record.clone()) {
        let free = |tag: &TagRecord| !inner.state().tags.contains_key(&tag.name);
        record.tags = known.tags.into_iter().filter(free).collect();
        record.repo_digests = known.repo_digests;
    }
    add_names(&mut record, &new.names, &mut inner.state().next_sequence);
    if !is_listed {
        way.pending.push(Pending { partial: partial.clone(), path: image_path.clone() });
        write_image(&partial, &record, new)?;
    }

    inner.durable.sync(begun)?;
    for layer in &new.layers {
        if let Some(staged) = &layer.staged {
            enter_layer(inner, layer.diff_id, staged, &mut way.entered)?;
        }
    }
    for (chain_id, patch_record) in patches {
        let (lower, path) = (Lower::Patch(chain_id), inner.tree_path(Lower::Patch(chain_id)));
        if let Some(position) = way.pending.iter().position(|p| p.path == path) {
            let done = way.pending.remove(position);
            enter_tree(inner, &done.partial, lower, patch_record, &mut way.entered)
                .inspect_err(|_| inner.sweeper.queue(done.partial))?;
        }
    }
    inner.sync_directory("layers")?;
    inner.sync_directory("patches")?;
    if is_listed {
        mend_manifest(inner, id, &new.raw_manifest);
        return name_listed(inner, id, &new.names)?.ok_or(StoreError::BrokenOff.into());
    }
    if held.is_some() {
        inner.quarantine(&image_path)?;
        inner.state().held.remove(&id.hex());
    }
    fs::rename(&partial, &image_path).map_err(file_error("rename", &partial))?;
    if let Err(error) = inner.sync_directory("images") {
        // Not durable, so not listed; unless it cannot be taken back either, and then it is there.
        if fs::rename(&image_path, &partial).is_ok() {
            return Err(error.into());
        }
    }
    way.pending.clear();
    // Memory follows at once: whatever fails from here on, the image is there.
    way.entered.clear();
    let content =
        Content::new(&new.configuration, size_bytes, new.raw_config.clone(), new.raw_manifest.clone());
    let tags: Vec<String> = record.tags.iter().map(|tag| tag.name.clone()).collect();
    inner.state().images.insert(id, Listed { record, content: Arc::new(content), manifest_known: true });
    take_over(inner, id, &tags);
    inner.revive();
    inner.state().image(id).ok_or(ContentError::Store(StoreError::BrokenOff))
}

fn enter_layer(
    inner: &Inner,
    diff_id: Digest,
    staged: &Staged,
    entered: &mut BTreeSet<Lower>,
) -> Result<(), StoreError> {
    let lower = Lower::Layer(diff_id);
    // Another image's commit may have entered it; or the layer is in this image twice.
    if staged.is_committed() || inner.is_sound(lower) {
        return Ok(());
    }
    enter_tree(inner, staged.path(), lower, staged.record, entered)?;
    staged.set_committed();
    Ok(())
}

/// Gives a tree its name. One that is there already keeps its content under another: containers may
/// have it mounted.
fn enter_tree(
    inner: &Inner,
    partial: &Path,
    lower: Lower,
    record: LayerRecord,
    entered: &mut BTreeSet<Lower>,
) -> Result<(), StoreError> {
    let path = inner.tree_path(lower);
    let is_there = inner.state().trees.contains_key(&lower);
    if is_there && fs::symlink_metadata(&path).is_ok() {
        let replaced = inner.numbered_path(&path, "replaced");
        // First the name under which no start deletes it, then the exchange: each of the two is
        // whole at any moment.
        fs::rename(partial, &replaced).map_err(file_error("rename", partial))?;
        if let Err(error) = berth_sys::file::exchange(&replaced, &path) {
            // It has its old name again, and goes with all else that is not finished.
            let _ = fs::rename(&replaced, partial);
            return Err(file_error("exchange", &path)(error));
        }
        tracing::info!(path = %path.display(), "replaced an unusable layer");
        inner.state().replaced.insert(replaced, lower);
    } else {
        fs::rename(partial, &path).map_err(file_error("rename", partial))?;
    }
    entered.insert(lower);
    inner.state().trees.insert(lower, Tree::whole_and_known(record));
    Ok(())
}

/// Writes the manifest of a listed image again, if the one on disk is not one. Nothing but what
/// people look at hangs on it.
fn mend_manifest(inner: &Inner, id: Digest, raw_manifest: &[u8]) {
    let listed = inner.state().images.get(&id).cloned();
    let Some(listed) = listed.filter(|listed| !listed.manifest_known && is_manifest_of(raw_manifest, id))
    else {
        return;
    };
    let path = inner.image_path(id).join("manifest");
    let record = ImageRecord { manifest: Some(Digest::of(raw_manifest)), ..listed.record };
    let written = record::replace_bytes(&path, raw_manifest)
        .map_err(|source| StoreError::Record { path, source })
        .and_then(|()| save_record(inner, &record));
    if let Err(error) = written {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot restore the manifest of an image");
        return;
    }
    if let Some(known) = inner.state().images.get_mut(&id) {
        known.record.manifest = record.manifest;
        known.content = Arc::new(listed.content.with_manifest(raw_manifest.to_vec()));
        known.manifest_known = true;
    }
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

/// What is mounted for the image, top first, and the patches among it with their totals. Makes the
/// patches that are missing.
type Stack = (Vec<Lower>, Vec<(Digest, LayerRecord)>);

fn stack(inner: &Inner, new: &NewImage, pending: &mut Vec<Pending>) -> Result<Stack, ContentError> {
    // Lowest first, with the open directory of each, for the patches above.
    let mut stacked: Vec<(Lower, Root)> = Vec::new();
    let effort = Effort::default();
    let mut patches = Vec::new();
    let mut below_chain: Option<Digest> = None;
    for layer in &new.layers {
        let diff_id = layer.diff_id;
        let chain = chain_id(below_chain, diff_id);
        below_chain = Some(chain);
        let path = match &layer.staged {
            Some(staged) if !staged.is_committed() => staged.path().to_owned(),
            _ => inner.tree_path(Lower::Layer(diff_id)),
        };
        let tree = path.join("fs");
        let root = Root::open(&tree).map_err(file_error("open", &tree))?;
        let summary = match &layer.staged {
            Some(staged) => staged.summary.clone(),
            None => read_summary(inner, diff_id, &path)?,
        };
        // Overlayfs refuses one directory twice in a mount. The upper one shows all that the lower
        // one would.
        stacked.retain(|(lower, _)| *lower != Lower::Layer(diff_id));
        let below: Vec<&Root> = stacked.iter().rev().map(|(_, root)| root).collect();
        let patch_error = |source| ContentError::Patch { diff_id, source };
        let plan = patch::plan(&root, &summary, &below, &effort).map_err(patch_error)?;
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
    let path = inner.tree_path(Lower::Patch(chain_id));
    let known = inner.state().trees.get(&Lower::Patch(chain_id)).and_then(Tree::record);
    if let Some(record) = known {
        return Ok((path.join("fs"), record));
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
    let lower = Lower::Layer(diff_id);
    let record = inner.state().trees.get(&lower).and_then(Tree::record);
    let record = record.ok_or_else(|| super::missing(path))?;
    let questions = if record.has_open_questions {
        let file = path.join("open.json");
        let read = record::read(&file);
        // The next pull of the layer fetches it again.
        inner.note_questions(lower, read.as_ref().err());
        read.map_err(|source| StoreError::Record { path: file, source })?
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
    add_names(&mut record, names, &mut inner.state().next_sequence);
    if record != old {
        save_record(inner, &record)?;
        if let Some(listed) = inner.state().images.get_mut(&id) {
            listed.record = record;
        }
    }
    let tags: Vec<String> = names.iter().filter_map(|name| name.tag.clone()).collect();
    take_over(inner, id, &tags);
    Ok(inner.state().image(id))
}

/// Adds names that the record does not have.
fn add_names(record: &mut ImageRecord, names: &[Names], sequence: &mut u64) {
    for name in names {
        if let Some(tag) = &name.tag
            && !record.tags.iter().any(|known| known.name == *tag)
        {
            record.tags.push(TagRecord { name: tag.clone(), sequence: *sequence });
            *sequence += 1;
        }
        if let Some(digest) = &name.repo_digest
            && !record.repo_digests.contains(digest)
        {
            record.repo_digests.push(digest.clone());
        }
    }
}

/// Points tags at their new owner, and takes them out of the records of the old ones. Those are
/// written after the new owner's record: a crash in between leaves two claims, of which the later
/// sequence number wins. So an old record that cannot be written is no failure: the names have
/// moved.
fn take_over(inner: &Inner, id: Digest, tags: &[String]) {
    for tag in tags {
        let old_owner = inner.state().tags.insert(tag.clone(), id).filter(|owner| *owner != id);
        let changed = old_owner.and_then(|owner| {
            let mut state = inner.state();
            let listed = state.images.get_mut(&owner)?;
            listed.record.tags.retain(|known| known.name != *tag);
            Some(listed.record.clone())
        });
        if let Some(record) = changed
            && let Err(error) = save_record(inner, &record)
        {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot remove a tag from the record of the image that had it"
            );
        }
    }
}

fn save_record(inner: &Inner, record: &ImageRecord) -> Result<(), StoreError> {
    let path = inner.image_path(record.id).join("record.json");
    record::replace(&path, record).map_err(|source: RecordError| StoreError::Record { path, source })
}
