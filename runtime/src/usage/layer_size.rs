//! Sizes of writable layers, counted a part at a time.
//!
//! Who writes into a layer decides how large and how deep its tree is, and counting must not hold
//! up any caller: neither the call for statistics nor those for other containers. So a count that
//! takes long goes on with the next call, and until it is complete the previous one is reported;
//! the first is reported as far as it has come.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use berth_sys::beneath::{Root, Usage, Walk};

use crate::lock;

/// How long a size counts as known. Counting costs more than all other numbers together, and the
/// kubelet asks every ten seconds.
const AGE: Duration = Duration::from_secs(10);

/// How long is counted for all containers together, within each [`WINDOW`].
const SHARE: Duration = Duration::from_millis(250);
const WINDOW: Duration = Duration::from_secs(1);

/// How long is counted for a container in any case.
const LEAST: Duration = Duration::from_millis(2);

/// Inodes that are counted; a larger layer is reported as what was counted until then.
const MAX_INODES: u64 = 1_000_000;

/// A layer's size, and when that was known, in nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerSize {
    pub(crate) at_unix_ns: i64,
    pub(crate) usage: Usage,
}

/// What is known of all layers.
#[derive(Debug, Default)]
pub(super) struct LayerSizes {
    layers: Mutex<HashMap<String, Layer>>,
    window: Mutex<Option<(Instant, Duration)>>,
}

#[derive(Debug, Default)]
struct Layer {
    known: Option<(Instant, LayerSize)>,
    /// A count that is not complete.
    walk: Option<Walk>,
}

impl LayerSizes {
    /// The size of the layer of the container `id`, whose directory is `upper`. `now` is the time,
    /// in nanoseconds since the epoch. Blocking, for about [`SHARE`] at most.
    pub(super) fn of(&self, id: &str, upper: &Path, now: impl Fn() -> i64) -> LayerSize {
        let (known, walk) = {
            let mut layers = lock(&self.layers);
            let layer = layers.entry(id.to_owned()).or_default();
            match layer.known {
                Some((at, size)) if at.elapsed() < AGE => return size,
                known => (known, layer.walk.take()),
            }
        };
        let walk = match walk {
            Some(walk) => Ok(walk),
            None => Root::open(upper)
                .and_then(|root| root.open_dir(Path::new(".")))
                .and_then(|top| Walk::new(&top)),
        };
        // A layer that is gone is empty.
        let Ok(mut walk) = walk else {
            return known.map_or(LayerSize { at_unix_ns: now(), usage: Usage::default() }, |(_, size)| size);
        };
        let is_complete = self.count(&mut walk);
        let counted = LayerSize { at_unix_ns: now(), usage: walk.usage() };
        let mut layers = lock(&self.layers);
        let Some(layer) = layers.get_mut(id) else { return counted };
        if is_complete {
            layer.known = Some((Instant::now(), counted));
            return counted;
        }
        layer.walk = Some(walk);
        known.map_or(counted, |(_, size)| size)
    }

    /// Forgets a container that is gone.
    pub(super) fn forget(&self, id: &str) {
        lock(&self.layers).remove(id);
    }

    /// Goes on for as long as there is time left. Whether there is nothing more to count.
    fn count(&self, walk: &mut Walk) -> bool {
        let begin = Instant::now();
        let share = self.share(begin);
        let is_complete = loop {
            match walk.step() {
                Ok(true) if walk.usage().inodes >= MAX_INODES => break true,
                Ok(true) if begin.elapsed() >= share => break false,
                Ok(true) => {}
                // Directories are being moved: the count so far has to do.
                Ok(false) | Err(_) => break true,
            }
        };
        let mut window = lock(&self.window);
        if let Some((_, spent)) = &mut *window {
            *spent += begin.elapsed();
        }
        is_complete
    }

    /// How long may be counted now.
    fn share(&self, now: Instant) -> Duration {
        let mut window = lock(&self.window);
        let (begin, spent) = window.get_or_insert((now, Duration::ZERO));
        if now.duration_since(*begin) >= WINDOW {
            (*begin, *spent) = (now, Duration::ZERO);
        }
        SHARE.saturating_sub(*spent).max(LEAST)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use berth_sys::beneath::Dir;

    use super::*;

    fn sized(sizes: &LayerSizes, upper: &Path) -> Usage {
        sizes.of("c", upper, || 1).usage
    }

    /// Until the count is complete, without waiting for the size to grow old.
    fn counted(upper: &Path) -> Usage {
        let sizes = LayerSizes::default();
        loop {
            let usage = sized(&sizes, upper);
            if lock(&sizes.layers)["c"].known.is_some() {
                return usage;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn links_are_not_followed_and_names_of_one_inode_count_once() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("out")).unwrap();
        std::fs::create_dir(directory.path().join("d")).unwrap();
        std::fs::write(directory.path().join("d/file"), vec![1; 10_000]).unwrap();
        for name in 0..10 {
            std::fs::hard_link(directory.path().join("d/file"), directory.path().join(name.to_string()))
                .unwrap();
        }
        let usage = counted(directory.path());
        assert_eq!(usage.inodes, 3);
        assert!((10_000..100_000).contains(&usage.bytes), "{usage:?}");
    }

    #[test]
    fn a_layer_that_is_not_there_is_empty() {
        assert_eq!(sized(&LayerSizes::default(), Path::new("/no/such/layer")), Usage::default());
    }

    #[test]
    fn a_deep_tree_is_counted_to_its_end() {
        const DEPTH: u64 = 10_000;
        // In memory, where such a tree is made and removed quickly.
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let top = Root::open(directory.path()).unwrap().open_dir(Path::new(".")).unwrap();
        let name = OsStr::new("d");
        let mut dir: Option<Dir> = None;
        for _ in 0..DEPTH {
            let here = dir.as_ref().unwrap_or(&top);
            here.make_dir(name, 0o700).unwrap();
            let next = here.open_dir(name).unwrap();
            dir = Some(next);
        }
        // A path of it would be longer than PATH_MAX, and a recursion deeper than the stack.
        let usage = counted(directory.path());
        top.remove_all(name).unwrap();
        assert_eq!(usage.inodes, DEPTH);
    }

    #[test]
    fn a_large_tree_holds_up_no_call() {
        let directory = tempfile::tempdir().unwrap();
        for outer in 0..200 {
            let path = directory.path().join(outer.to_string());
            std::fs::create_dir(&path).unwrap();
            for inner in 0..100 {
                std::fs::create_dir(path.join(inner.to_string())).unwrap();
            }
        }
        let sizes = LayerSizes::default();
        // As if other containers had used up the time.
        let busy = || *sizes.window.lock().unwrap() = Some((Instant::now(), SHARE));
        let mut calls = 0;
        let mut last = Usage::default();
        loop {
            busy();
            let begin = Instant::now();
            let usage = sized(&sizes, directory.path());
            assert!(begin.elapsed() < LEAST + Duration::from_millis(500), "{:?}", begin.elapsed());
            assert!(usage.inodes >= last.inodes, "a first count only grows");
            last = usage;
            calls += 1;
            if lock(&sizes.layers)["c"].known.is_some() {
                break;
            }
        }
        assert_eq!(last.inodes, 200 * 101);
        assert!(calls > 1, "it took {calls} calls");
        assert_eq!(sized(&sizes, directory.path()), last, "then it is known for a while");
        sizes.forget("c");
        assert!(lock(&sizes.layers).is_empty());
    }
}
