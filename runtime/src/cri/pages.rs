//! Streaming lists: the items of a list, split into messages.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::Status;

use super::error::CallError;

/// Items in one message. A container with its labels and annotations has some kilobytes, a message
/// 16 MiB.
pub(super) const PAGE: usize = 500;

/// The same for metrics of pods. A container has some 60 of them, each with its labels: about 25
/// KB.
pub(super) const METRICS_PAGE: usize = 50;

/// The messages of a stream.
pub(crate) type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A list as messages of `page` items each; none for an empty list.
pub(super) fn pages<T: Clone, M: Send + 'static>(
    page: usize,
    items: &[T],
    message: impl Fn(Vec<T>) -> M,
) -> Result<Items<M>, CallError> {
    let messages: Vec<Result<M, Status>> =
        items.chunks(page).map(|page| Ok(message(page.to_vec()))).collect();
    Ok(Box::pin(tokio_stream::iter(messages)))
}
