//! Layers on their way in: each is fetched and unpacked once, however many pulls want it.
//!
//! One slot per diff id. The holder of the slot's lock checks whether the layer is in the store or
//! staged by another pull, and unpacks it otherwise. The lock is owned by the blocking thread that
//! unpacks, not by the future that waits for it: so it is given back only when nothing of a failed
//! or cancelled layer is left. A staged layer lives as long as a pull holds it; then it is in the
//! store or gone.
//!
//! A slot's lock is never awaited while another's is held, so there is no deadlock. A pull has
//! permits of its own for its transfers; those for unpacking are shared, and held only while there
//! are bytes to work on (`turns`). A slot whose holder gets next to nothing is not waited for.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use berth_sys::beneath::Root;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, Semaphore, oneshot, watch};

use super::durable::Since;
use super::record::{self, LayerRecord, Lower, OpenQuestions};
use super::{ContentError, Inner, Pin, StoreError, file_error, make_private_dir, remove_tree};
use crate::Digest;
use crate::layer::{self, Budget, LayerContent};
use crate::turns::{LayerInput, Turns};
use crate::unpack::Summary;

/// How long a pull waits at a time for another that fetches the same layer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What that other one has to get in this time. Otherwise the layer is fetched once more: a client
/// that names a layer first must not be able to keep it from all others.
const LEAST_IN_PATIENCE: u64 = 1 << 20;

/// How long a failed pull waits for what is left of its layers to be gone.
const SETTLING: Duration = Duration::from_secs(10);

/// A layer that is fetched, or was.
#[derive(Debug, Default)]
pub(super) struct Slot {
    staged: Arc<AsyncMutex<Weak<Staged>>>,
    /// Bytes, as packed, that the one who has the lock has worked on.
    moved: Arc<AtomicU64>,
}

/// A layer that is unpacked and verified but not in the store yet.
#[derive(Debug)]
pub(super) struct Staged {
    path: PathBuf,
    pub(super) record: LayerRecord,
    pub(super) summary: Summary,
    pub(super) begun: Since,
    /// Moved into the store; nothing to clean up.
    committed: AtomicBool,
    removals: Removals,
}

/// How many removals of unfinished layers are under way.
#[derive(Debug, Clone, Default)]
pub(super) struct Removals(watch::Sender<usize>);

impl Removals {
    /// Counts one until the result is dropped.
    fn begin(&self) -> Removing {
        self.0.send_modify(|running| *running += 1);
        Removing(self.clone())
    }

    async fn done(&self) {
        // Fails only when all senders are gone, and one is here.
        let _ = self.0.subscribe().wait_for(|running| *running == 0).await;
    }
}

/// One removal.
struct Removing(Removals);

impl Drop for Removing {
    fn drop(&mut self) {
        (self.0.0).send_modify(|running| *running = running.saturating_sub(1));
    }
}

impl Staged {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_committed(&self) -> bool {
        self.committed.load(Ordering::Acquire)
    }

    pub(super) fn set_committed(&self) {
        self.committed.store(true, Ordering::Release);
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.is_committed() {
            return;
        }
        let path = std::mem::take(&mut self.path);
        let removing = self.removals.begin();
        let remove = move || {
            let _removing = removing;
            if let Err(error) = remove_tree(&path) {
                // Not lost: the next start removes it.
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot remove an unfinished layer");
            }
        };
        // The last holder may be a future that was dropped on an async thread, where a large
        // removal would hold up others.
        match Handle::try_current() {
            Ok(handle) => drop(handle.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

/// A layer that a pull has in hand.
#[derive(Debug)]
pub(super) struct Acquired {
    pub(super) diff_id: Digest,
    /// `None` if it was in the store.
    pub(super) staged: Option<Arc<Staged>>,
    _pin: Pin,
}

/// What to do when it turns out that the layer must be fetched.
pub(super) trait Fetch: Send {
    /// The layer's bytes, to be read on a blocking thread.
    type Input: LayerInput + Send + 'static;

    /// Opens the input and starts whatever fills it; the future resolves when all was put in.
    fn start(self) -> (Self::Input, impl Future<Output = Result<(), ContentError>> + Send);
}

/// Sees to it that a layer is in the store or staged. `transfers` has the permits of this pull.
pub(super) async fn acquire<F: Fetch>(
    inner: &Arc<Inner>,
    content: LayerContent,
    budget: &Arc<Budget>,
    transfers: &Semaphore,
    fetch: F,
) -> Result<Acquired, ContentError> {
    let diff_id = content.diff_id;
    let pin = Pin::new(inner, diff_id);
    let slot = {
        let mut slots = inner.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // An unheld slot is still needed while it knows of a staged layer.
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || slot.staged.try_lock().map_or(true, |staged| staged.strong_count() > 0)
        });
        Arc::clone(slots.entry(diff_id).or_default())
    };
    let mut guard = slot.lock().await;
    // Its open questions may be many, and are read from the disk.
    let looking = Arc::clone(inner);
    let known = tokio::task::spawn_blocking(move || looking.is_sound(Lower::Layer(diff_id)));
    if known.await.map_err(|_| StoreError::BrokenOff)? {
        return Ok(Acquired { diff_id, staged: None, _pin: pin });
    }
    if let Some(staged) = guard.as_ref().and_then(|guard| guard.upgrade()) {
        return Ok(Acquired { diff_id, staged: Some(staged), _pin: pin });
    }
    let _transfer = transfers.acquire().await.map_err(|_| StoreError::BrokenOff)?;
    let (input, filling) = fetch.start();
    let moved = if guard.is_some() { Arc::clone(&slot.moved) } else { Arc::default() };
    let input = Turns::new(input, Arc::clone(&inner.policy().permits), Handle::current(), moved);
    let path = inner.partial_path(&inner.tree_path(Lower::Layer(diff_id)));
    let (budget, removals, begun) = (Arc::clone(budget), inner.removals.clone(), inner.durable.now());
    let (result_sender, result) = oneshot::channel();
    // Not one of the runtime's threads for blocking work: those are limited, and a slow registry
    // must not use them up.
    std::thread::Builder::new()
        .name("layer".to_owned())
        .spawn(move || {
            let staged = stage(input, content, path, &budget, removals, begun);
            if let (Ok(staged), Some(guard)) = (&staged, &mut guard) {
                **guard = Arc::downgrade(staged);
            }
            // Without a waiter the layer is removed here, before the slot is free again.
            if let Err(unwanted) = result_sender.send(staged) {
                drop(unwanted);
            }
            drop(guard);
            drop(slot);
        })
        .map_err(|source| StoreError::File {
            operation: "start a thread for",
            path: inner.tree_path(Lower::Layer(diff_id)),
            source,
        })?;
    tokio::pin!(filling, result);
    let (filled, staged) = tokio::select! {
        biased;
        // Unpacked, or refused: what is still on the way does not matter, and a host that has
        // stopped sending is not waited for.
        staged = &mut result => (Ok(()), staged),
        filled = &mut filling => (filled, result.await),
    };
    let staged = staged.map_err(|_| StoreError::BrokenOff)?;
    match (filled, staged) {
        (_, Ok(staged)) => Ok(Acquired { diff_id, staged: Some(staged), _pin: pin }),
        // The reader's "cancelled" is only the echo of the writer's error.
        (Err(cause), Err(ContentError::Layer { source: layer::LayerError::Abandoned, .. })) => Err(cause),
        (_, Err(error)) => Err(error),
    }
}

impl Slot {
    /// Waits for the slot for as long as its holder gets on. `None`: it does not.
    async fn lock(&self) -> Option<OwnedMutexGuard<Weak<Staged>>> {
        let mut before = self.moved.load(Ordering::Relaxed);
        loop {
            let lock = Arc::clone(&self.staged).lock_owned();
            if let Ok(guard) = tokio::time::timeout(PATIENCE, lock).await {
                return Some(guard);
            }
            let now = self.moved.load(Ordering::Relaxed);
            if now.wrapping_sub(before) < LEAST_IN_PATIENCE {
                return None;
            }
            before = now;
        }
    }
}

/// Waits until no thread works on these layers any more, and what they left is removed; but not for
/// ever on layers that others fetch.
pub(super) async fn settle(inner: &Arc<Inner>, diff_ids: &[Digest]) {
    let settling = async {
        for diff_id in diff_ids {
            let slot =
                inner.slots.lock().unwrap_or_else(PoisonError::into_inner).get(diff_id).map(Arc::clone);
            if let Some(slot) = slot {
                drop(slot.staged.lock().await);
            }
        }
        inner.removals.done().await;
    };
    let _ = tokio::time::timeout(SETTLING, settling).await;
}

/// Unpacks into `path`; removes it again if that fails.
fn stage(
    input: impl LayerInput,
    content: LayerContent,
    path: PathBuf,
    budget: &Arc<Budget>,
    removals: Removals,
    begun: Since,
) -> Result<Arc<Staged>, ContentError> {
    let made = unpack_into(input, content, &path, budget);
    if made.is_err()
        && let Err(error) = remove_tree(&path)
    {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot remove an unfinished layer");
    }
    let (record, summary) = made?;
    Ok(Arc::new(Staged { path, record, summary, begun, committed: AtomicBool::new(false), removals }))
}

fn unpack_into(
    input: impl LayerInput,
    content: LayerContent,
    path: &Path,
    budget: &Arc<Budget>,
) -> Result<(LayerRecord, Summary), ContentError> {
    let tree = path.join("fs");
    make_private_dir(path)?;
    fs::create_dir(&tree).map_err(file_error("create", &tree))?;
    let root = Root::open(&tree).map_err(file_error("open", &tree))?;
    let summary = layer::unpack(input, content, &root, budget)
        .map_err(|source| ContentError::Layer { diff_id: content.diff_id, source })?;
    let questions = OpenQuestions::of(&summary);
    let record = LayerRecord {
        bytes: summary.bytes,
        inodes: summary.inodes,
        opaque_root: summary.opaque_root,
        has_open_questions: questions.is_some(),
    };
    let write = |name: &str, written: Result<(), record::RecordError>| {
        written.map_err(|source| StoreError::Record { path: path.join(name), source })
    };
    if let Some(questions) = &questions {
        write("open.json", record::write(&path.join("open.json"), questions))?;
    }
    write("layer.json", record::write(&path.join("layer.json"), &record))?;
    Ok((record, summary))
}
