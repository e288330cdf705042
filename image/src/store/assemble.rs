//! What a pull and an import share: getting the layers of an image side by side, saying how far
//! that is, and committing.

use std::sync::Arc;

use futures_util::future::try_join_all;
use tokio::sync::Semaphore;

use super::commit::{self, ContentError, NewImage};
use super::staging::{self, Acquired, Fetch};
use super::{Inner, StoreError};
use crate::layer::LayerContent;
use crate::{Digest, Image, LayerPhase, LayerProgress, Progress};

/// Commits, off the async threads and to the end.
pub(super) async fn finish(
    inner: &Arc<Inner>,
    new: NewImage,
    progress: &Arc<dyn Progress>,
) -> Result<Image, ContentError> {
    progress.committing();
    let committing = Arc::clone(inner);
    let committed = tokio::task::spawn_blocking(move || commit::commit(&committing, new));
    let committed = committed.await.map_err(|_| StoreError::BrokenOff)?;
    if committed.is_err() {
        staging::settle(inner, &[]).await;
    }
    committed
}

/// Gets all layers of an image into the store or staged, side by side. If one fails, nothing stays
/// of the others that nothing else needs. `try_again` says whether a layer that failed is to be
/// fetched once more.
pub(super) async fn acquire_all<F: Fetch>(
    inner: &Arc<Inner>,
    contents: &[LayerContent],
    progress: &Arc<dyn Progress>,
    fetch: impl Fn(usize, LayerContent, Reporter) -> F,
    try_again: impl Fn(LayerContent, &ContentError) -> bool,
) -> Result<Vec<Acquired>, ContentError> {
    let budget = inner.budget();
    let transfers = Semaphore::new(inner.policy().options.layers_at_once.max(1));
    let (budget, transfers, fetch, try_again) = (&budget, &transfers, &fetch, &try_again);
    let running = contents.iter().enumerate().map(|(index, &content)| {
        let report = Reporter { progress: Arc::clone(progress), index, count: contents.len(), content };
        report.say(LayerPhase::Waiting, 0);
        async move {
            let acquired = loop {
                let fetch = fetch(index, content, report.clone());
                match staging::acquire(inner, content, budget, transfers, fetch).await {
                    Err(error) if try_again(content, &error) => {}
                    acquired => break acquired?,
                }
            };
            let phase = if acquired.staged.is_some() { LayerPhase::Unpacked } else { LayerPhase::Present };
            report.say(phase, content.blob.size);
            Ok::<_, ContentError>(acquired)
        }
    });
    let running: Vec<_> = running.collect();
    let acquired = try_join_all(running).await;
    if acquired.is_err() {
        let diff_ids: Vec<Digest> = contents.iter().map(|content| content.diff_id).collect();
        staging::settle(inner, &diff_ids).await;
    }
    acquired
}

/// Tells one layer's progress.
#[derive(Clone)]
pub(super) struct Reporter {
    progress: Arc<dyn Progress>,
    index: usize,
    count: usize,
    content: LayerContent,
}

impl Reporter {
    pub(super) fn say(&self, phase: LayerPhase, done_bytes: u64) {
        self.progress.layer(LayerProgress {
            index: self.index,
            count: self.count,
            digest: self.content.blob.digest,
            phase,
            done_bytes,
            total_bytes: self.content.blob.size,
        });
    }
}
