//! Images and layers on disk: what is there, what is listed, what goes.
//!
//! The disk is the truth (layout in `record`); `State` mirrors it in memory, so that lists and
//! lookups touch no disk. Changes of the listed images happen one at a time under `Inner::disk`;
//! pulls work side by side until then.
//!
//! An image is listed when, and only when, all its bytes are durable: `commit` says in which order.
//! Layers are shared by diff id; `collect` says when one goes, `load` and `fault` what becomes of
//! what cannot be read.

mod assemble;
mod collect;
mod commit;
mod durable;
mod fault;
mod import;
mod lease;
mod load;
mod pull;
mod record;
mod staging;
mod stored_layer;
mod sweep;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use berth_sys::beneath::Root;
use tokio::sync::Semaphore;

use crate::credentials::Credentials;
use crate::image::Content;
use crate::layer::{Budget, is_disk_full};
use crate::reference::Target;
use crate::registry::{self, Client};
use crate::{Digest, Image, Progress, Reference};
use collect::{Reach, Waiting};
use durable::Durable;
use load::{Held, Tree};
use record::{ImageRecord, Lower};
use staging::{Removals, Slot};
use sweep::Sweeper;

pub use collect::InUse;
pub use commit::ContentError;
pub use import::{ArchiveFile, ImportError, ImportSource, Layout};
pub use lease::Lease;
pub use pull::PullError;
pub use record::RecordError;
pub use stored_layer::StoredLayer;

/// Shortest prefix of an id that finds an image.
const MIN_PREFIX: usize = 4;

/// What the directory of an image that was removed and may be in use has behind its name.
const REMOVED: &str = ".removed";

/// How the store pulls, unpacks and limits.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Directory with one directory per registry host, each with a `hosts.toml` (containerd's
    /// form); none = defaults only.
    pub registry_config_path: Option<PathBuf>,
    /// Token service hosts that may be handed credentials although they do not belong to the
    /// registry's own domain.
    pub trusted_token_hosts: Vec<String>,
    /// Layers that one pull fetches at the same time, and layers that are unpacked at the same time
    /// over all pulls. Default 3.
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
    #[error("cannot {operation} {path}", path = path.display())]
    File {
        /// The failed act.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A record could not be read or written.
    #[error("cannot use the record {path}", path = path.display())]
    Record {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
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
    #[error("cannot set up the registry client")]
    Registry(#[source] registry::RegistryError),
    /// The thread that did the work ended without a result.
    #[error("the image store operation was cancelled")]
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
    /// Bytes, from per-layer totals that were counted while unpacking (file sizes in whole 4 KiB
    /// blocks).
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// The image store. Cheap to clone; all clones are one store. One process at a time may have a root
/// open.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    policy: Mutex<Arc<Policy>>,
    /// Held while the list changes, for as long as disk and memory differ.
    disk: Mutex<()>,
    state: Mutex<State>,
    /// Who unpacks which layer right now; see `staging`.
    slots: Mutex<HashMap<Digest, Arc<Slot>>>,
    removals: Removals,
    sweeper: Sweeper,
    waiting: Waiting,
    /// Goes into the names of what is half made or on its way out, so that none comes twice.
    counter: AtomicU64,
    durable: Durable,
    /// Locked as long as the store is open.
    _lock: File,
}

/// What follows from the options.
#[derive(Debug)]
struct Policy {
    options: StoreOptions,
    client: Client,
    /// One for each layer that is unpacked while it has bytes to work on.
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
    /// Directories of images that cannot be used, by their names.
    held: BTreeMap<String, Held>,
    tags: BTreeMap<String, Digest>,
    next_sequence: u64,
    /// The directories of layers and patches.
    trees: BTreeMap<Lower, Tree>,
    /// Trees that have a successor, with what they were: containers that were made before have them
    /// mounted.
    replaced: BTreeMap<PathBuf, Lower>,
    /// Layers that running pulls count on.
    pins: HashMap<Digest, usize>,
    /// Images that containers are being made from.
    leases: HashMap<Digest, usize>,
}

#[derive(Debug, Clone)]
struct Listed {
    record: ImageRecord,
    content: Arc<Content>,
    /// The manifest on disk is one of this image.
    manifest_known: bool,
}

impl Store {
    /// Opens (and makes, if absent) the store below `root`. Deletes nothing: what an earlier
    /// process left half done goes when [`Store::sweep`] is called, and what cannot be read or used
    /// is kept ([`Store::faults`]). Blocking.
    ///
    /// # Errors
    /// [`StoreError`], if one of the store's own directories cannot be made or listed. A single
    /// image or layer is never a reason.
    pub fn open(root: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        for directory in ["", "layers", "patches", "images", "quarantine"] {
            make_private_dir(&root.join(directory))?;
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
            sweeper: Sweeper::default(),
            waiting: Waiting::default(),
            counter: AtomicU64::new(0),
            durable: Durable::of(root)?,
            _lock: lock,
        };
        let state = inner.load()?;
        *inner.state() = state;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Works by other options from now on. What was begun before keeps the limits and the hosts
    /// that it began with.
    pub fn set_options(&self, options: StoreOptions) {
        let policy = Arc::new(Policy::new(options));
        *self.inner.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// Pulls an image. The registry is always asked, also if the image is here. The future may be
    /// dropped at any time.
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

    /// Imports all images of a layout or an archive. `name` replaces the names inside; only with
    /// one image.
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

    /// Finds by id (with or without `sha256:`), by tag (short names are made full), by
    /// `name@digest`, by a unique prefix of the id.
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

    /// Finds an image as [`Store::find`] does, and keeps its layers until the result is dropped.
    #[must_use]
    pub fn lease(&self, text: &str) -> Option<Lease> {
        Lease::new(&self.inner, text)
    }

    /// Removes the image that `text` finds, with all its names. When this returns it is not listed
    /// any more. Its layers go unless another image or an image in use needs them, and are deleted
    /// in the background. Absent is success: returns whether there was one. `in_use` is asked when
    /// the image is not listed any more.
    ///
    /// # Errors
    /// [`StoreError`]; the image is still listed then.
    pub async fn remove(
        &self,
        text: &str,
        in_use: impl FnOnce() -> InUse + Send + 'static,
    ) -> Result<bool, StoreError> {
        let (inner, text) = (Arc::clone(&self.inner), text.to_owned());
        blocking(move || {
            let _disk = inner.disk();
            let found = inner.state().find(&text);
            let removed = match found {
                Some(id) => inner.unlist(id).map(|()| true)?,
                None => inner.remove_held(&text)?,
            };
            if removed {
                inner.collect(Reach::Damaged, in_use);
            }
            Ok(removed)
        })
        .await
    }

    /// Lets go the layers no longer needed, and damaged images that no container uses. Returns when
    /// they have left their names.
    ///
    /// # Errors
    /// [`StoreError::BrokenOff`].
    pub async fn collect(&self, in_use: impl FnOnce() -> InUse + Send + 'static) -> Result<(), StoreError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let _disk = inner.disk();
            inner.collect(Reach::Damaged, in_use);
            Ok(())
        })
        .await
    }

    /// [`Store::collect`] in the background, and only if an image was removed while it was in use.
    /// To be called whenever a container has gone.
    pub fn collect_soon(&self, in_use: impl FnOnce() -> InUse + Send + 'static) {
        self.inner.collect_soon(in_use);
    }

    /// Begins to delete, in the background, what an earlier process left half done.
    pub fn sweep(&self) {
        self.inner.sweeper.start();
    }

    /// Reads again what could not be read when the store was opened. Returns whether something
    /// still cannot. Blocking.
    #[must_use]
    pub fn look_again(&self) -> bool {
        if !self.inner.has_unread() {
            return false;
        }
        let _disk = self.inner.disk();
        self.inner.look_again();
        self.inner.has_unread()
    }

    /// What cannot be used as it is on disk, and is kept: a sentence for each.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        self.inner.state().faults()
    }

    /// What a root filesystem of the image is made from, top first.
    ///
    /// # Errors
    /// [`StoreError`] if a layer is not on disk.
    pub fn stored_layers(&self, image: &Image) -> Result<Vec<StoredLayer>, StoreError> {
        let lower = {
            let state = self.inner.state();
            let listed = state.images.get(&image.id).map(|listed| &listed.record);
            listed.or_else(|| state.removed.get(&image.id)).map(|record| record.lower.clone())
        };
        self.inner.stored_layers(&lower.ok_or_else(|| missing(&self.inner.image_path(image.id)))?)
    }

    /// Bytes and inodes that images take. No disk access.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let state = self.inner.state();
        let trees = state.trees.values().filter_map(Tree::record);
        let mut usage = trees.fold(Usage::default(), |sum, layer| Usage {
            bytes: sum.bytes + layer.bytes,
            inodes: sum.inodes + layer.inodes,
        });
        for listed in state.images.values() {
            // A directory with a record, a manifest and a configuration.
            let documents = [listed.content.raw_config.len(), listed.content.raw_manifest.len(), 1];
            usage.bytes +=
                documents.iter().map(|&length| (length as u64).next_multiple_of(4096)).sum::<u64>();
            usage.inodes += 4;
        }
        usage
    }

    /// The directory that was opened.
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

    /// What one image may take, by the options of now.
    fn budget(&self) -> Arc<Budget> {
        let policy = self.policy();
        let options = &policy.options;
        Arc::new(Budget::new(
            options.max_image_bytes,
            self.root.clone(),
            options.min_free_bytes,
            options.min_free_percent,
        ))
    }

    fn disk(&self) -> MutexGuard<'_, ()> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tree_path(&self, lower: Lower) -> PathBuf {
        match lower {
            Lower::Layer(diff_id) => self.root.join("layers").join(diff_id.hex()),
            Lower::Patch(chain_id) => self.root.join("patches").join(chain_id.hex()),
        }
    }

    fn image_path(&self, id: Digest) -> PathBuf {
        self.root.join("images").join(id.hex())
    }

    fn removed_path(&self, id: Digest) -> PathBuf {
        self.root.join("images").join(format!("{}{REMOVED}", id.hex()))
    }

    fn stored_layers(&self, lower: &[Lower]) -> Result<Vec<StoredLayer>, StoreError> {
        lower
            .iter()
            .map(|lower| {
                let path = self.tree_path(*lower).join("fs");
                match fs::metadata(&path) {
                    Ok(found) if found.is_dir() => Ok(StoredLayer::Directory(path)),
                    Ok(_) => Err(missing(&path)),
                    Err(error) => Err(file_error("find", &path)(error)),
                }
            })
            .collect()
    }

    /// Whether there is something that could not be read.
    fn has_unread(&self) -> bool {
        let state = self.state();
        let mut faults = state.held.values().map(|held| &held.fault);
        faults.any(fault::Fault::is_unread)
            || state.trees.values().filter_map(Tree::fault).any(fault::Fault::is_unread)
    }

    /// A name beside `path` for something that is not finished, or that is on its way out.
    fn partial_path(&self, path: &Path) -> PathBuf {
        self.numbered_path(path, "partial")
    }

    /// A name beside `path` that no other has.
    fn numbered_path(&self, path: &Path, kind: &str) -> PathBuf {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.{kind}", self.counter.fetch_add(1, Ordering::Relaxed)));
        path.with_file_name(name)
    }

    fn sync_directory(&self, directory: &str) -> Result<(), StoreError> {
        let path = self.root.join(directory);
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

/// Image content must not be reachable for users of the machine: it has set-user-id programs that
/// no one maintains.
fn make_private_dir(path: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)))
        .map_err(file_error("create", path))
}

fn missing(path: &Path) -> StoreError {
    file_error("find", path)(io::ErrorKind::NotFound.into())
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
