//! Which hosts gave which content in one pull, so that a mirror with damaged content does not fail
//! a pull that another host can serve.
//!
//! Content is verified when it is whole, and may have come from several hosts by then. The first of
//! them is blamed: each time that the content is wrong, one host less is asked for it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Digest;

#[derive(Debug, Default)]
pub(super) struct Trust(Mutex<HashMap<Digest, Content>>);

#[derive(Debug, Default)]
struct Content {
    /// Places of the hosts that gave bytes in the transfer that runs or ended last, in order.
    from: Vec<usize>,
    /// Places of the hosts that are not asked again.
    blamed: Vec<usize>,
}

impl Trust {
    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Content>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A transfer of this content begins.
    pub(super) fn begin(&self, digest: Digest) {
        self.lock().entry(digest).or_default().from.clear();
    }

    /// A host gave bytes.
    pub(super) fn note(&self, place: usize, digest: Digest) {
        let mut contents = self.lock();
        let from = &mut contents.entry(digest).or_default().from;
        if !from.contains(&place) {
            from.push(place);
        }
    }

    /// The content was wrong. Returns the host that is not asked again, if one gave anything.
    pub(super) fn blame(&self, digest: Digest) -> Option<usize> {
        let mut contents = self.lock();
        let content = contents.get_mut(&digest)?;
        let place = *content.from.first()?;
        content.from.clear();
        content.blamed.push(place);
        Some(place)
    }

    /// Whether a host may be asked.
    pub(super) fn has(&self, place: usize, digest: Digest) -> bool {
        self.lock().get(&digest).is_none_or(|content| !content.blamed.contains(&place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_one_host_less_is_asked() {
        let (trust, digest) = (Trust::default(), Digest::of(b"x"));
        assert_eq!(trust.blame(digest), None);
        trust.begin(digest);
        assert_eq!(trust.blame(digest), None);
        for place in [0, 1, 0] {
            trust.note(place, digest);
        }
        assert_eq!(trust.blame(digest), Some(0));
        assert!(!trust.has(0, digest) && trust.has(1, digest) && trust.has(0, Digest::of(b"y")));
        trust.begin(digest);
        trust.note(1, digest);
        assert_eq!(trust.blame(digest), Some(1));
        assert!(!trust.has(0, digest) && !trust.has(1, digest));
    }
}
