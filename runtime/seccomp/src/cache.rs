//! Cached filters: a node has few profiles and many containers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use oci_spec::runtime::LinuxSeccomp;
use sha2::{Digest, Sha256};

use crate::{CompileError, Filter, compile};

/// Filters kept. Each distinct set of capabilities makes a RuntimeDefault of its own, and each
/// Localhost file one; a filter has a few KiB.
const KEPT: usize = 64;

/// The most recent filters, by the digest of their profile. Shared between threads.
#[derive(Debug, Default)]
pub struct Cache {
    filters: Mutex<VecDeque<([u8; 32], Arc<Filter>)>>,
}

impl Cache {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The filter of a profile, compiled if it is not cached.
    ///
    /// # Errors
    /// Those of [`compile`]; they are not kept.
    pub fn get(&self, profile: &LinuxSeccomp) -> Result<Arc<Filter>, CompileError> {
        // A profile consists of strings and numbers, whose serialization cannot fail; if it did,
        // the profile would just not be cached.
        let Ok(text) = serde_json::to_vec(profile) else { return compile(profile).map(Arc::new) };
        let digest: [u8; 32] = Sha256::digest(&text).into();
        // Nothing in this file leaves the list half changed, so a panic elsewhere does not spoil
        // it.
        let lock = || self.filters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, filter)) = lock().iter().find(|(known, _)| *known == digest) {
            return Ok(Arc::clone(filter));
        }
        // Without the lock: two threads may compile the same filter at the same time, and one of
        // them is kept.
        let filter = Arc::new(compile(profile)?);
        let mut filters = lock();
        if !filters.iter().any(|(known, _)| *known == digest) {
            if filters.len() >= KEPT {
                filters.pop_front();
            }
            filters.push_back((digest, Arc::clone(&filter)));
        }
        Ok(filter)
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxSeccompAction, LinuxSyscall};

    use super::*;

    fn profile(name: String) -> LinuxSeccomp {
        let mut rule = LinuxSyscall::default();
        rule.set_names(vec![name]).set_action(LinuxSeccompAction::ScmpActErrno);
        let mut profile = LinuxSeccomp::default();
        profile.set_syscalls(Some(vec![rule]));
        profile
    }

    #[test]
    fn the_same_profile_is_compiled_once() {
        let cache = Cache::new();
        let first = cache.get(&profile("read".into())).unwrap();
        assert!(Arc::ptr_eq(&first, &cache.get(&profile("read".into())).unwrap()));
        assert!(!Arc::ptr_eq(&first, &cache.get(&profile("write".into())).unwrap()));
        assert_ne!(first, cache.get(&profile("write".into())).unwrap());
    }

    #[test]
    fn only_so_many_are_kept() {
        let cache = Cache::new();
        let first = cache.get(&profile("read".into())).unwrap();
        for number in 0..KEPT {
            cache.get(&profile(format!("unknown-{number}"))).unwrap();
        }
        assert!(!Arc::ptr_eq(&first, &cache.get(&profile("read".into())).unwrap()));
        assert_eq!(cache.filters.lock().unwrap().len(), KEPT);
    }
}
