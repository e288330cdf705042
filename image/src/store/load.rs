//! What is on disk when the store is opened.
//!
//! Opening reads and changes nothing but memory: half-made trees are queued for deletion, and
//! whatever cannot be used is kept where it is, remembered with its [`Fault`], and reported. An
//! image whose layers' trees are there is listed, also if the record of a layer is not readable: it
//! was only needed while the image was put together.
//!
//! What could not be read is read again by [`Inner::look_again`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::fault::Fault;
use super::record::{self, ImageRecord, LayerRecord, Lower};
use super::{Inner, Listed, REMOVED, State, StoreError, file_error};
use crate::Digest;
use crate::document::{self, ConfigDocument};
use crate::image::Content;
use crate::json;
use crate::manifest::{self, Document};

/// Where sequence numbers go on while the record of an image is not known, which may have given
/// some: no store has given as many tags.
const UNKNOWN_SEQUENCES: u64 = 1 << 32;

/// The directory of a layer or patch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tree {
    /// Record and tree are there.
    Whole {
        record: LayerRecord,
        /// `open.json` was read and is good, or there is none.
        questions_known: bool,
    },
    /// Other images cannot be built on it. If its tree is there, images that were are as good as
    /// before.
    Faulty { fault: Fault, has_tree: bool },
}

impl Tree {
    pub(super) fn whole(record: LayerRecord) -> Self {
        Self::Whole { record, questions_known: !record.has_open_questions }
    }

    /// One that was just made.
    pub(super) fn whole_and_known(record: LayerRecord) -> Self {
        Self::Whole { record, questions_known: true }
    }

    pub(super) fn record(&self) -> Option<LayerRecord> {
        match self {
            Self::Whole { record, .. } => Some(*record),
            Self::Faulty { .. } => None,
        }
    }

    pub(super) fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Whole { .. } => None,
            Self::Faulty { fault, .. } => Some(fault),
        }
    }

    /// Why an image that stands on it cannot be used.
    fn hindrance(&self) -> Option<&Fault> {
        match self {
            Self::Faulty { fault, has_tree } if !has_tree || fault.is_foreign() => Some(fault),
            _ => None,
        }
    }
}

/// The layers and patches that an image stands on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Needs(pub(super) BTreeSet<Lower>);

impl Needs {
    pub(super) fn of_record(record: &ImageRecord) -> Self {
        Self(record.lower.iter().copied().chain(record.layers.iter().copied().map(Lower::Layer)).collect())
    }

    /// From the configuration, whose digest is the image's id: its layers, and every patch that
    /// there may be between them.
    fn of_config(raw_config: &[u8]) -> Option<Self> {
        let config: ConfigDocument = document::read(&json::tidy(raw_config)).ok()?;
        let diff_ids = config.rootfs.diff_ids.iter().map(|id| Digest::parse(id));
        let mut diff_ids: Vec<Digest> = diff_ids.collect::<Result<_, _>>().ok()?;
        if diff_ids.is_empty() {
            diff_ids.push(Digest::of(manifest::EMPTY_ARCHIVE));
        }
        let mut needs = BTreeSet::new();
        let mut chain = None;
        for diff_id in diff_ids {
            let next = chain_id(chain, diff_id);
            chain = Some(next);
            needs.extend([Lower::Layer(diff_id), Lower::Patch(next)]);
        }
        Some(Self(needs))
    }
}

/// OCI image-spec 1.1, config.md, "Layer ChainID".
pub(super) fn chain_id(below: Option<Digest>, diff_id: Digest) -> Digest {
    match below {
        None => diff_id,
        Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
    }
}

/// The directory of an image that cannot be listed. It stays, and what it needs stays.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) id: Digest,
    pub(super) fault: Fault,
    /// Names and layers, if those are known.
    pub(super) record: Option<ImageRecord>,
    /// None if neither record nor configuration says.
    pub(super) needs: Option<Needs>,
}

/// An image as it was read.
enum Read {
    Listed(Listed),
    Removed(ImageRecord),
    Held(Held),
}

impl Inner {
    /// Reads everything.
    pub(super) fn load(&self) -> Result<State, StoreError> {
        let mut state = State::default();
        for (directory, lower) in [("layers", Lower::Layer as fn(Digest) -> Lower), ("patches", Lower::Patch)]
        {
            for (path, name) in self.list_directory(directory, &mut state.replaced, lower)? {
                let Ok(id) = Digest::from_hex(&name) else {
                    tracing::warn!(path = %path.display(), "ignoring a file that does not belong to the image store");
                    continue;
                };
                let tree = load_tree(&path);
                if let Some(fault) = tree.fault() {
                    tracing::error!(path = %path.display(), "the record of a layer {fault}; the layer is kept");
                }
                state.trees.insert(lower(id), tree);
            }
        }
        let mut listed = Vec::new();
        for (path, name) in self.list_directory("images", &mut BTreeMap::new(), Lower::Layer)? {
            let hex = name.strip_suffix(REMOVED).unwrap_or(&name);
            let Ok(id) = Digest::from_hex(hex) else {
                tracing::warn!(path = %path.display(), "ignoring a file that does not belong to the image store");
                continue;
            };
            match load_image(&path, id, hex != name, &state.trees) {
                Read::Listed(image) => listed.push(image),
                Read::Removed(record) => drop(state.removed.insert(id, record)),
                Read::Held(held) => {
                    tracing::error!(path = %path.display(), "an image {}; it is kept, and not listed", held.fault);
                    state.held.insert(name, held);
                }
            }
        }
        let given = listed.iter().flat_map(|image| &image.record.tags).map(|tag| tag.sequence + 1).max();
        state.next_sequence = given.unwrap_or(0);
        if !state.held.is_empty() {
            state.next_sequence = state.next_sequence.saturating_add(UNKNOWN_SEQUENCES);
        }
        for image in listed {
            state.list(image);
        }
        Ok(state)
    }

    /// [`Inner::look_again`], if there is something that could not be read. The caller holds the
    /// disk lock.
    pub(super) fn look_again_if_needed(&self) {
        if self.has_unread() {
            self.look_again();
        }
    }

    /// Reads again what could not be read, and lists the images that can be used now. The caller
    /// holds the disk lock.
    pub(super) fn look_again(&self) {
        let faulty = |tree: &Tree| tree.fault().is_some_and(Fault::is_unread);
        let unread: Vec<Lower> =
            self.state().trees.iter().filter(|(_, tree)| faulty(tree)).map(|(id, _)| *id).collect();
        for lower in unread {
            let path = self.tree_path(lower);
            let tree = load_tree(&path);
            if tree.fault().is_none() {
                tracing::info!(path = %path.display(), "the record of a layer can be read again");
            }
            self.state().trees.insert(lower, tree);
        }
        self.revive();
    }

    /// Lists the images that could not be used and now can. The caller holds the disk lock.
    pub(super) fn revive(&self) {
        let held: Vec<(String, Digest)> =
            self.state().held.iter().map(|(name, held)| (name.clone(), held.id)).collect();
        for (name, id) in held {
            let path = self.root.join("images").join(&name);
            let trees = self.state().trees.clone();
            let read = load_image(&path, id, name.ends_with(REMOVED), &trees);
            let mut state = self.state();
            match read {
                Read::Held(held) => drop(state.held.insert(name, held)),
                Read::Removed(record) => {
                    state.held.remove(&name);
                    state.removed.insert(id, record);
                }
                Read::Listed(image) => {
                    tracing::info!(image = %id, "an image can be used again");
                    state.held.remove(&name);
                    state.list(image);
                }
            }
        }
    }

    /// Whether other images can be built on this layer or patch. Reads `open.json` the first time.
    pub(super) fn is_sound(&self, lower: Lower) -> bool {
        match self.state().trees.get(&lower) {
            Some(Tree::Whole { questions_known: true, .. }) => return true,
            Some(Tree::Whole { questions_known: false, .. }) => {}
            _ => return false,
        }
        let path = self.tree_path(lower).join("open.json");
        let read = record::read::<record::OpenQuestions>(&path).map(drop);
        self.note_questions(lower, read.as_ref().err());
        read.is_ok()
    }

    /// Remembers whether `open.json` was good. With an error, other images need the layer again.
    pub(super) fn note_questions(&self, lower: Lower, error: Option<&record::RecordError>) {
        let mut state = self.state();
        let Some(tree) = state.trees.get_mut(&lower) else { return };
        match (error, &mut *tree) {
            (None, Tree::Whole { questions_known, .. }) => *questions_known = true,
            (Some(error), _) => {
                let fault = Fault::of(error);
                tracing::error!(path = %self.tree_path(lower).display(), "the open.json of a layer {fault}");
                *tree = Tree::Faulty { fault, has_tree: true };
            }
            (None, Tree::Faulty { .. }) => {}
        }
    }

    /// The entries of one of the store's directories. What is half made is queued for deletion, and
    /// `replaced` gets the trees that have a successor.
    fn list_directory(
        &self,
        directory: &str,
        replaced: &mut BTreeMap<PathBuf, Lower>,
        lower: fn(Digest) -> Lower,
    ) -> Result<Vec<(PathBuf, String)>, StoreError> {
        let path = self.root.join(directory);
        let mut found = Vec::new();
        for entry in fs::read_dir(&path).map_err(file_error("list", &path))? {
            let entry = entry.map_err(file_error("list", &path))?;
            let Ok(name) = entry.file_name().into_string() else {
                tracing::warn!(path = %entry.path().display(), "ignoring a file that does not belong to the image store");
                continue;
            };
            let Some((stem, kind)) = name.rsplit_once('.') else {
                found.push((entry.path(), name));
                continue;
            };
            let (hex, number) = match (kind, stem.rsplit_once('.')) {
                ("partial" | "replaced", Some((hex, number))) => (hex, number.parse::<u64>().ok()),
                _ => {
                    found.push((entry.path(), name));
                    continue;
                }
            };
            // No name of before may come again while it is on its way out.
            if let Some(number) = number {
                self.counter.fetch_max(number.saturating_add(1), Ordering::Relaxed);
            }
            match (kind, Digest::from_hex(hex)) {
                ("replaced", Ok(id)) => drop(replaced.insert(entry.path(), lower(id))),
                ("partial", _) => self.sweeper.queue(entry.path()),
                _ => found.push((entry.path(), name)),
            }
        }
        found.sort();
        Ok(found)
    }
}

impl State {
    /// Enters an image. Of two with the same tag the later one has it: a crash may leave both
    /// claims.
    pub(super) fn list(&mut self, mut image: Listed) {
        let id = image.record.id;
        image.record.tags.retain(|tag| {
            let Some(owner) = self.tags.get(&tag.name).copied() else { return true };
            let theirs = self.images.get_mut(&owner).and_then(|other| {
                let position = other.record.tags.iter().position(|known| known.name == tag.name)?;
                Some((position, other))
            });
            match theirs {
                Some((position, other)) => {
                    let wins = (tag.sequence, id)
                        > (other.record.tags.get(position).map_or(0, |known| known.sequence), owner);
                    if wins {
                        other.record.tags.remove(position);
                    }
                    wins
                }
                None => true,
            }
        });
        self.tags.extend(image.record.tags.iter().map(|tag| (tag.name.clone(), id)));
        self.images.insert(id, image);
    }
}

/// Reads what is known of one tree.
pub(super) fn load_tree(path: &Path) -> Tree {
    let tree = path.join("fs");
    // An error other than absence proves nothing; the mount will show it.
    let has_tree = match fs::symlink_metadata(&tree) {
        Ok(metadata) => metadata.is_dir(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    match record::read(&path.join("layer.json")) {
        Ok(record) if has_tree => Tree::whole(record),
        Ok(_) => Tree::Faulty { fault: Fault::Damaged("its tree is missing".to_owned()), has_tree },
        Err(error) => Tree::Faulty { fault: Fault::of(&error), has_tree },
    }
}

fn load_image(path: &Path, id: Digest, removed: bool, trees: &BTreeMap<Lower, Tree>) -> Read {
    let record = match record::read::<ImageRecord>(&path.join("record.json")) {
        Ok(record) if record.id == id => Ok(record),
        Ok(record) => Err(Fault::Damaged(format!("its record is that of {}", record.id))),
        Err(error) => Err(Fault::of(&error)),
    };
    let record = match record {
        // The configuration is of no account any more.
        Ok(record) if removed => return Read::Removed(record),
        record => record,
    };
    let limit = manifest::MAX_DOCUMENT as u64;
    let config = match record::read_bounded(&path.join("config"), limit) {
        Ok(bytes) if Digest::of(&bytes) == id => Ok(bytes),
        Ok(_) => Err(Fault::Damaged("its configuration does not have the digest that is its id".to_owned())),
        Err(error) => Err(Fault::of(&error)),
    };
    let held = |fault: Fault, record: Option<ImageRecord>, config: Option<&[u8]>| {
        let needs = record.as_ref().map(Needs::of_record).or_else(|| config.and_then(Needs::of_config));
        Read::Held(Held { id, fault, record, needs })
    };
    let (record, raw_config) = match (record, config) {
        (Ok(record), Ok(raw_config)) => (record, raw_config),
        (Ok(record), Err(fault)) => return held(fault, Some(record), None),
        (Err(fault), Ok(raw_config)) => return held(fault, None, Some(&raw_config)),
        (Err(fault), Err(other)) => return held(fault.or(other), None, None),
    };
    // The digest holds: if it is not understood, then because another version wrote it.
    let configuration = match manifest::parse_config(&raw_config, record.layers.len()) {
        Ok(configuration) if configuration.diff_ids == record.layers => configuration,
        Ok(_) => {
            let fault = Fault::Damaged("its record and its configuration list different layers".to_owned());
            return held(fault, Some(record), None);
        }
        Err(error) => {
            let fault = Fault::Foreign(super::fault::chain(&error));
            return held(fault, Some(record), None);
        }
    };
    for lower in &record.lower {
        let fault = match trees.get(lower) {
            None => Some(Fault::Damaged(format!("{lower} is missing"))),
            Some(tree) => tree.hindrance().cloned(),
        };
        if let Some(fault) = fault {
            return held(fault, Some(record), None);
        }
    }
    // Nothing hangs on it but what a person may ask to see.
    let raw_manifest = record::read_bounded(&path.join("manifest"), limit).unwrap_or_default();
    let is_the_one = |digest: Digest| Digest::of(&raw_manifest) == digest;
    let manifest_known = record.manifest.map_or_else(|| is_manifest_of(&raw_manifest, id), is_the_one);
    if !manifest_known {
        tracing::warn!(image = %id, "the manifest of an image is damaged or cannot be read; a pull writes it again");
    }
    let content = Content::new(&configuration, record.size_bytes, raw_config, raw_manifest);
    Read::Listed(Listed { record, content: Arc::new(content), manifest_known })
}

/// Whether these bytes are a manifest that leads to this configuration.
pub(super) fn is_manifest_of(raw_manifest: &[u8], id: Digest) -> bool {
    matches!(manifest::parse(raw_manifest, None), Ok(Document::Manifest(manifest)) if manifest.config.digest == id)
}
