//! Images and layers on disk: what is there, what is listed, what goes.
//!
//! The disk is the truth (layout in `record`); `State` mirrors it in memory, so that lists and lookups touch no disk. Changes of the
//! listed images happen one at a time under `Inner::disk`; pulls work side by side until then.
//!
//! An image is listed when, and only when, all its bytes are durable: `commit` says in which order. Layers are shared by diff id; a
//! layer goes when no image needs it: no listed one, none that was removed while a container uses it, and no pull that runs.

mod commit;
mod import;
mod pull;
mod record;
mod staging;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use berth_sys::beneath::Root;
use tokio::sync::Semaphore;

use crate::credentials::Credentials;
use crate::image::Content;
use crate::layer::is_disk_full;
use crate::reference::Target;
use crate::registry::{self, Client};
use crate::{Digest, Image, Progress, Reference, manifest};

pub use commit::ContentError;
pub use import::{ImportError, ImportSource};
pub use pull::PullError;
pub use record::RecordError;

use record::{ImageRecord, LayerRecord, Lower};
use staging::{Removals, Slot};

/// Shortest prefix of an id that finds an image.
const MIN_PREFIX: usize = 4;

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
    /// Time limits and numbers of tries of the registry client.
    pub transport: registry::TransportLimits,
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
            transport: registry::TransportLimits::default(),
        }
    }
}

/// Why the store could not be opened, read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file operation failed.
    #[error("{operation} {path}", path = path.display())]
    File {
        /// The failed act.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A record could not be read or written.
    #[error("record {path}", path = path.display())]
    Record {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: RecordError,
    },
    /// Another process has the store open.
    #[error("image store {path} is in use by another process", path = path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The registry client could not be set up.
    #[error("set up the registry client")]
    Registry(#[source] registry::RegistryError),
    /// The thread that did the work ended without a result.
    #[error("the work on the image store was broken off")]
    BrokenOff,
}

impl StoreError {
    /// Whether it is for lack of space that this failed.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::File { source, .. } | Self::Record { source: RecordError::Access(source), .. } => {
                is_disk_full(source)
            }
            _ => false,
        }
    }
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
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    policy: Mutex<Arc<Policy>>,
    /// Held by whoever changes what is listed, for as long as disk and memory differ.
    disk: Mutex<()>,
    state: Mutex<State>,
    /// Who unpacks which layer right now; see `staging`.
    slots: Mutex<HashMap<Digest, Arc<Slot>>>,
    removals: Removals,
    counter: AtomicU64,
    /// Locked as long as the store is open.
    _lock: File,
}

/// What follows from the options.
#[derive(Debug)]
struct Policy {
    options: StoreOptions,
    client: Client,
    /// One for each layer that is fetched and unpacked.
    permits: Arc<Semaphore>,
}

impl Policy {
    fn new(options: StoreOptions) -> Self {
        let client = Client::new(
            options.registry_config_path.clone(),
            options.trusted_token_hosts.clone(),
            options.transport.clone(),
        );
        let permits = Arc::new(Semaphore::new(options.layers_at_once.max(1)));
        Self { options, client, permits }
    }
}

/// What is on disk.
#[derive(Debug, Default)]
struct State {
    images: BTreeMap<Digest, Listed>,
    /// Removed, but perhaps used by containers: their layers stay.
    removed: BTreeMap<Digest, ImageRecord>,
    tags: BTreeMap<String, Digest>,
    next_sequence: u64,
    layers: BTreeMap<Digest, LayerRecord>,
    patches: BTreeMap<Digest, LayerRecord>,
    /// Layers that running pulls count on.
    pins: HashMap<Digest, usize>,
}

#[derive(Debug, Clone)]
struct Listed {
    record: ImageRecord,
    content: Arc<Content>,
}

impl Store {
    /// Opens (and makes, if absent) the store below `root`: drops what an earlier process left half done, quarantines torn records.
    /// Blocking.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(root: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        for folder in ["", "layers", "patches", "images", "quarantine"] {
            make_private_dir(&root.join(folder))?;
        }
        let lock_path = root.join("lock");
        let lock = File::create(&lock_path).map_err(file_error("open", &lock_path))?;
        lock.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => StoreError::Locked { path: lock_path.clone() },
            fs::TryLockError::Error(source) => file_error("lock", &lock_path)(source),
        })?;
        let inner = Inner {
            root: root.to_owned(),
            policy: Mutex::new(Arc::new(Policy::new(options))),
            disk: Mutex::new(()),
            state: Mutex::new(State::default()),
            slots: Mutex::new(HashMap::new()),
            removals: Removals::default(),
            counter: AtomicU64::new(0),
            _lock: lock,
        };
        let state = inner.load()?;
        *inner.state() = state;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Works by other options from now on. What was begun before keeps the limits and the hosts that it began with.
    pub fn set_options(&self, options: StoreOptions) {
        let policy = Arc::new(Policy::new(options));
        *self.inner.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// Pulls an image. The registry is always asked, also if the image is here. The future may be dropped at any time.
    ///
    /// # Errors
    /// [`PullError`]; nothing is listed then and no byte stays.
    pub async fn pull(
        &self,
        reference: &Reference,
        credentials: &Credentials,
        progress: Arc<dyn Progress>,
    ) -> Result<Image, PullError> {
        pull::pull(&self.inner, reference, credentials, progress).await
    }

    /// Imports all images of a layout or an archive. `name` replaces the names inside; only with one image.
    ///
    /// # Errors
    /// [`ImportError`]; images that came before the bad one in the archive stay.
    pub async fn import(
        &self,
        source: ImportSource,
        name: Option<&Reference>,
        progress: Arc<dyn Progress>,
    ) -> Result<Vec<Image>, ImportError> {
        import::import(&self.inner, source, name.cloned(), progress).await
    }

    /// Finds by id (with or without `sha256:`), by tag (short names are made full), by `name@digest`, by a unique prefix of the id.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<Image> {
        let state = self.inner.state();
        state.find(text).and_then(|id| state.image(id))
    }

    /// All images, by id.
    #[must_use]
    pub fn list(&self) -> Vec<Image> {
        let state = self.inner.state();
        state.images.keys().filter_map(|id| state.image(*id)).collect()
    }

    /// Removes the image that `text` finds, with all its names. Its layers go unless another image or an image in `in_use` needs
    /// them. Absent is success: returns whether there was one.
    ///
    /// # Errors
    /// [`StoreError`]; the image is unlisted already if only the removal of its layers failed.
    pub async fn remove(&self, text: &str, in_use: &BTreeSet<Digest>) -> Result<bool, StoreError> {
        let (inner, text, in_use) = (Arc::clone(&self.inner), text.to_owned(), in_use.clone());
        blocking(move || {
            let _disk = inner.disk();
            let Some(id) = inner.state().find(&text) else { return Ok(false) };
            inner.unlist(id)?;
            inner.collect(Some(&in_use))?;
            Ok(true)
        })
        .await
    }

    /// Deletes the layers of removed images that are in use no more. `in_use` has the image ids of all containers.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn collect(&self, in_use: &BTreeSet<Digest>) -> Result<(), StoreError> {
        let (inner, in_use) = (Arc::clone(&self.inner), in_use.clone());
        blocking(move || {
            let _disk = inner.disk();
            inner.collect(Some(&in_use))
        })
        .await
    }

    /// The lower directories for an overlay mount, top first.
    ///
    /// # Errors
    /// [`StoreError`] if a layer is not on disk.
    pub fn lower_dirs(&self, image: &Image) -> Result<Vec<PathBuf>, StoreError> {
        let record = {
            let state = self.inner.state();
            let listed = state.images.get(&image.id).map(|listed| &listed.record);
            listed.or_else(|| state.removed.get(&image.id)).cloned()
        };
        let missing = |path: &Path| file_error("find", path)(io::ErrorKind::NotFound.into());
        let record = record.ok_or_else(|| missing(&self.inner.root.join("images").join(image.id.hex())))?;
        record
            .lower
            .into_iter()
            .map(|lower| {
                let path = self.inner.lower_path(lower);
                if path.is_dir() { Ok(path) } else { Err(missing(&path)) }
            })
            .collect()
    }

    /// Bytes and inodes that images take. No disk access.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let state = self.inner.state();
        let layers = state.layers.values().chain(state.patches.values());
        let mut usage = layers.fold(Usage::default(), |sum, layer| Usage {
            bytes: sum.bytes + layer.bytes,
            inodes: sum.inodes + layer.inodes,
        });
        for listed in state.images.values() {
            // A folder with a record, a manifest and a configuration.
            let documents = [listed.content.raw_config.len(), listed.content.raw_manifest.len(), 1];
            usage.bytes +=
                documents.iter().map(|&length| (length as u64).next_multiple_of(4096)).sum::<u64>();
            usage.inodes += 4;
        }
        usage
    }

    /// The folder that was opened.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.inner.root
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can leave the maps half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn disk(&self) -> MutexGuard<'_, ()> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn layer_path(&self, diff_id: Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    fn patch_path(&self, chain_id: Digest) -> PathBuf {
        self.root.join("patches").join(chain_id.hex())
    }

    fn image_path(&self, id: Digest) -> PathBuf {
        self.root.join("images").join(id.hex())
    }

    fn removed_path(&self, id: Digest) -> PathBuf {
        self.root.join("images").join(format!("{}.removed", id.hex()))
    }

    fn lower_path(&self, lower: Lower) -> PathBuf {
        match lower {
            Lower::Layer(diff_id) => self.layer_path(diff_id).join("fs"),
            Lower::Patch(chain_id) => self.patch_path(chain_id).join("fs"),
        }
    }

    /// A name beside `path` for something that is not finished, or that is on its way out.
    fn partial_path(&self, path: &Path) -> PathBuf {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", self.counter.fetch_add(1, Ordering::Relaxed)));
        path.with_file_name(name)
    }

    /// Reads what is on disk, and puts it in order.
    fn load(&self) -> Result<State, StoreError> {
        let mut state = State::default();
        for (folder, layers) in [("layers", &mut state.layers), ("patches", &mut state.patches)] {
            for (path, name) in self.list_folder(folder)? {
                let record =
                    Digest::from_hex(&name).ok().map(|id| (id, record::read(&path.join("layer.json"))));
                match record {
                    Some((id, Ok(record))) => drop(layers.insert(id, record)),
                    // A layer can be had again: what is torn goes.
                    Some((_, Err(_))) | None => remove_tree(&path)?,
                }
            }
        }
        let mut loaded: Vec<(ImageRecord, Content)> = Vec::new();
        for (path, name) in self.list_folder("images")? {
            let (hex, removed) = match name.strip_suffix(".removed") {
                Some(hex) => (hex, true),
                None => (name.as_str(), false),
            };
            match self.load_image(&path, hex, &state) {
                Ok((record, _)) if removed => drop(state.removed.insert(record.id, record)),
                Ok(image) => loaded.push(image),
                Err(error) => {
                    tracing::error!(image = %name, error = &error as &dyn std::error::Error, "quarantined a damaged image record");
                    self.quarantine(&path)?;
                }
            }
        }
        let mut owners: BTreeMap<String, (u64, Digest)> = BTreeMap::new();
        for (record, _) in &loaded {
            for tag in &record.tags {
                state.next_sequence = state.next_sequence.max(tag.sequence + 1);
                let owner = owners.entry(tag.name.clone()).or_insert((tag.sequence, record.id));
                *owner = (*owner).max((tag.sequence, record.id));
            }
        }
        for (mut record, content) in loaded {
            // A crash came between the new owner's record and the old one's.
            record.tags.retain(|tag| owners.get(&tag.name).is_some_and(|(_, owner)| *owner == record.id));
            state.images.insert(record.id, Listed { record, content: Arc::new(content) });
        }
        state.tags = owners.into_iter().map(|(name, (_, id))| (name, id)).collect();
        Ok(state)
    }

    fn load_image(
        &self,
        path: &Path,
        hex: &str,
        state: &State,
    ) -> Result<(ImageRecord, Content), StoreError> {
        let record_path = path.join("record.json");
        let record_error = |source| StoreError::Record { path: record_path.clone(), source };
        let record: ImageRecord = record::read(&record_path).map_err(record_error)?;
        let limit = manifest::MAX_DOCUMENT as u64;
        let raw_config = record::read_bounded(&path.join("config"), limit).map_err(record_error)?;
        let raw_manifest = record::read_bounded(&path.join("manifest"), limit).map_err(record_error)?;
        let configuration = manifest::parse_config(&raw_config, record.layers.len())
            .map_err(|_| record_error(RecordError::Torn))?;
        let whole = record.id.hex() == hex
            && Digest::of(&raw_config) == record.id
            && configuration.diff_ids == record.layers
            && record.lower.iter().all(|lower| match lower {
                Lower::Layer(id) => state.layers.contains_key(id),
                Lower::Patch(id) => state.patches.contains_key(id),
            });
        if !whole {
            return Err(record_error(RecordError::Torn));
        }
        let content = Content::new(&configuration, record.size_bytes, raw_config, raw_manifest);
        Ok((record, content))
    }

    /// The entries of one of the store's folders; what was left half done is removed.
    fn list_folder(&self, folder: &str) -> Result<Vec<(PathBuf, String)>, StoreError> {
        let path = self.root.join(folder);
        let mut found = Vec::new();
        for entry in fs::read_dir(&path).map_err(file_error("list", &path))? {
            let entry = entry.map_err(file_error("list", &path))?;
            let name = entry.file_name();
            match name.to_str() {
                Some(name) if !name.ends_with(".partial") => found.push((entry.path(), name.to_owned())),
                _ => remove_tree(&entry.path())?,
            }
        }
        found.sort();
        Ok(found)
    }

    fn quarantine(&self, path: &Path) -> Result<(), StoreError> {
        let name = path.file_name().unwrap_or_default();
        let target = self.root.join("quarantine").join(name);
        remove_tree(&target)?;
        fs::rename(path, &target).map_err(file_error("quarantine", path))
    }

    /// Takes an image out of the lists. Works on a full disk: one rename.
    fn unlist(&self, id: Digest) -> Result<(), StoreError> {
        let (path, removed) = (self.image_path(id), self.removed_path(id));
        remove_tree(&removed)?;
        fs::rename(&path, &removed).map_err(file_error("remove", &path))?;
        self.sync_folder("images")?;
        let mut state = self.state();
        if let Some(listed) = state.images.remove(&id) {
            state.removed.insert(id, listed.record);
        }
        state.tags.retain(|_, owner| *owner != id);
        Ok(())
    }

    /// Deletes what nobody needs. Without `in_use`, removed images are taken to be in use. The caller holds the disk lock.
    fn collect(&self, in_use: Option<&BTreeSet<Digest>>) -> Result<(), StoreError> {
        let mut doomed: Vec<PathBuf> = Vec::new();
        {
            let mut state = self.state();
            if let Some(in_use) = in_use {
                let free: Vec<Digest> =
                    state.removed.keys().filter(|id| !in_use.contains(id)).copied().collect();
                for id in free {
                    state.removed.remove(&id);
                    doomed.push(self.removed_path(id));
                }
            }
            let mut needed: BTreeSet<Digest> = state.pins.keys().copied().collect();
            let mut needed_patches = BTreeSet::new();
            for record in state.images.values().map(|listed| &listed.record).chain(state.removed.values()) {
                needed.extend(&record.layers);
                needed_patches.extend(record.lower.iter().filter_map(|lower| match lower {
                    Lower::Patch(id) => Some(*id),
                    Lower::Layer(_) => None,
                }));
            }
            state.layers.retain(|id, _| {
                let keep = needed.contains(id);
                if !keep {
                    doomed.push(self.layer_path(*id));
                }
                keep
            });
            state.patches.retain(|id, _| {
                let keep = needed_patches.contains(id);
                if !keep {
                    doomed.push(self.patch_path(*id));
                }
                keep
            });
        }
        // First all leave their names, so that a crash in between leaves nothing that looks whole.
        let mut first_error = None;
        let mut renamed = Vec::new();
        for path in doomed {
            let partial = self.partial_path(&path);
            match fs::rename(&path, &partial) {
                Ok(()) => renamed.push(partial),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => drop(first_error.get_or_insert_with(|| file_error("remove", &path)(error))),
            }
        }
        for path in renamed {
            if let Err(error) = remove_tree(&path) {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn sync_folder(&self, folder: &str) -> Result<(), StoreError> {
        let path = self.root.join(folder);
        record::sync_dir(&path).map_err(file_error("sync", &path))
    }
}

impl State {
    fn find(&self, text: &str) -> Option<Digest> {
        let bare = text.strip_prefix("sha256:").unwrap_or(text);
        if let Ok(id) = Digest::from_hex(bare) {
            return self.images.contains_key(&id).then_some(id);
        }
        if let Ok(reference) = Reference::parse(text) {
            let name = reference.to_string();
            let found = match reference.target() {
                Target::Tag(_) => self.tags.get(&name).copied(),
                Target::Digest(_) => self
                    .images
                    .iter()
                    .find(|(_, listed)| listed.record.repo_digests.contains(&name))
                    .map(|(id, _)| *id),
            };
            if found.is_some() {
                return found;
            }
        }
        if bare.len() < MIN_PREFIX || !bare.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut matching = self.images.keys().filter(|id| id.hex().starts_with(bare));
        let first = matching.next()?;
        matching.next().is_none().then_some(*first)
    }

    fn image(&self, id: Digest) -> Option<Image> {
        let listed = self.images.get(&id)?;
        let mut repo_tags: Vec<String> = listed.record.tags.iter().map(|tag| tag.name.clone()).collect();
        repo_tags.sort();
        let mut repo_digests = listed.record.repo_digests.clone();
        repo_digests.sort();
        Some(Image { id, repo_tags, repo_digests, content: Arc::clone(&listed.content) })
    }
}

/// Runs blocking work to its end, also if the caller goes away.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(_) => Err(StoreError::BrokenOff),
    }
}

/// Removes a tree of the store, whatever an image put into it. Absent is success.
fn remove_tree(path: &Path) -> Result<(), StoreError> {
    let remove = || -> io::Result<()> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Root::open(parent)?.open_dir(Path::new(""))?.remove_all(name)
    };
    match remove() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(file_error("remove", path)),
    }
}

/// Image content must not be reachable for users of the machine: it has set-user-id programs that nobody maintains.
fn make_private_dir(path: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)))
        .map_err(file_error("create", path))
}

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::File { operation, path, source }
}

/// A layer that a pull counts on: it is not collected while this lives.
#[derive(Debug)]
struct Pin {
    inner: Weak<Inner>,
    diff_id: Digest,
}

impl Pin {
    fn new(inner: &Arc<Inner>, diff_id: Digest) -> Self {
        *inner.state().pins.entry(diff_id).or_insert(0) += 1;
        Self { inner: Arc::downgrade(inner), diff_id }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let mut state = inner.state();
        if let Some(count) = state.pins.get_mut(&self.diff_id) {
            *count -= 1;
            if *count == 0 {
                state.pins.remove(&self.diff_id);
            }
        }
    }
}
