//! Images that a container is being made from.
//!
//! From the moment in which a name is resolved until the container is registered, nothing else says
//! that the image is in use. A lease does: an image that is removed meanwhile leaves the lists, and
//! its layers stay.

use std::sync::Arc;

use super::record::Lower;
use super::{Inner, StoreError, StoredLayer};
use crate::Image;

/// An image whose layers stay as long as this lives.
#[derive(Debug)]
pub struct Lease {
    inner: Arc<Inner>,
    image: Image,
    lower: Vec<Lower>,
}

impl Lease {
    /// Finds an image and leases it, in one step.
    pub(super) fn new(inner: &Arc<Inner>, text: &str) -> Option<Self> {
        let mut state = inner.state();
        let id = state.find(text)?;
        let lower = state.images.get(&id)?.record.lower.clone();
        let image = state.image(id)?;
        *state.leases.entry(id).or_insert(0) += 1;
        drop(state);
        Some(Self { inner: Arc::clone(inner), image, lower })
    }

    /// The image, as it was when it was found.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// What a root filesystem of the image is made from, top first.
    ///
    /// # Errors
    /// [`StoreError`] if a layer is not on disk.
    pub fn stored_layers(&self) -> Result<Vec<StoredLayer>, StoreError> {
        self.inner.stored_layers(&self.lower)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        if let Some(count) = state.leases.get_mut(&self.image.id) {
            *count -= 1;
            if *count == 0 {
                state.leases.remove(&self.image.id);
            }
        }
    }
}
