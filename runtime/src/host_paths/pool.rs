//! The workers that there are: which are busy, which were left behind, and who may have another.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_shim_proto::frame;
use berth_sys::process::{Child, SIGKILL};
use berth_sys::{host_path, process};

use super::connection::{Heard, Started, Worker};
use super::message::{Ask, At, Question, Tell, path_of};
use super::{HostPathError, HostPaths, failed, lost, shown};
use crate::lock;

/// How long a question may take. Filesystems on a network take their time, and a client waits for
/// two minutes at most.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// The same for a cgroup, whose files are in memory.
pub(super) const CGROUP_PATIENCE: Duration = Duration::from_secs(5);

/// How many workers may be stuck in one directory until no more are sent there.
pub(super) const AT_ONE_PLACE: usize = 2;

/// When a worker that is busy counts as slow.
pub(super) const SLOW: Duration = Duration::from_secs(1);

/// How many workers there may be, busy or stuck.
pub(super) const MOST: usize = 64;

/// How many of them may be stuck in cgroups.
pub(super) const MOST_OF_CGROUPS: usize = 32;

/// How many there may be for CNI, where plugins may take a minute.
pub(super) const MOST_FOR_CNI: usize = 256;

/// How many there may be for imports, of which each layer that is unpacked has one.
pub(super) const MOST_FOR_IMPORTS: usize = 256;

/// How many workers may be stuck because of plugins that were killed and cannot end.
pub(super) const MOST_PLUGINS: usize = 8;

/// How long to wait for a worker that is at work in a cgroup before another is started, which takes
/// longer than most of that work.
pub(super) const NEXT: Duration = Duration::from_millis(5);

/// When and how often to see whether a worker that is to end has ended.
pub(super) const FIRST_LOOK: Duration = Duration::from_millis(10);
pub(super) const LOOK: Duration = Duration::from_secs(1);

/// How long a path counts as silent that kept its worker waiting only until it was killed.
pub(super) const AGAIN: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) most: usize,
    /// Whether a worker that is idle is kept for the next question.
    pub(super) keeps_one: bool,
    pub(super) workers: Mutex<Workers>,
    /// Told when there is a worker less.
    pub(super) one_less: Condvar,
    /// Told when a worker is idle.
    pub(super) one_idle: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct Workers {
    pub(super) idle: Option<Worker>,
    pub(super) busy: Vec<Busy>,
    pub(super) stuck: Vec<Stuck>,
    /// How many questions there have been.
    pub(super) questions: u64,
}

/// A worker that has a question.
#[derive(Debug)]
pub(super) struct Busy {
    pub(super) question: u64,
    /// Where it is; empty when that may take long.
    pub(super) paths: Vec<PathBuf>,
    pub(super) since: Instant,
}

/// A worker that was left behind and has not ended.
#[derive(Debug)]
pub(super) struct Stuck {
    pub(super) pid: i32,
    pub(super) paths: Vec<PathBuf>,
    /// For each path the lowest directory on the way that is known.
    pub(super) places: Vec<PathBuf>,
    pub(super) kind: Kind,
    /// It may have ended only because it was killed.
    pub(super) was_killed: bool,
    /// What it ran and what cannot end.
    pub(super) plugin: Option<PathBuf>,
    pub(super) since: Instant,
}

/// What a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Paths of the host.
    Paths,
    /// The directories of a cgroup.
    Cgroup,
    /// What CNI plugins are run for.
    Plugins,
}

/// What is known of a question before it is put.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) kind: Kind,
    /// Nothing is changed for it.
    pub(super) only_looks: bool,
    pub(super) paths: Vec<PathBuf>,
    /// How long each step may take.
    pub(super) patience: Duration,
}

impl Scope {
    pub(super) fn new(kind: Kind, paths: Vec<PathBuf>) -> Self {
        let patience = if kind == Kind::Cgroup { CGROUP_PATIENCE } else { PATIENCE };
        Self { kind, only_looks: false, paths, patience }
    }

    pub(super) fn of_a_cgroup(&self) -> bool {
        self.kind == Kind::Cgroup
    }
}

/// A worker that has answered.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) worker: Worker,
    pub(super) slot: Slot,
    pub(super) tell: Tell,
    pub(super) descriptors: Vec<OwnedFd>,
    /// What it has run.
    pub(super) plugin: Option<PathBuf>,
}

impl HostPaths {
    /// Puts a question. The worker that has answered is not taken back.
    pub(super) fn put(&self, ask: Ask, scope: Scope) -> Result<Answered, HostPathError> {
        let frame = frame::encode(&Question::from(ask)).map_err(|error| failed(&scope.paths, &error))?;
        let (mut idle, slot) = self.begin(&scope)?;
        loop {
            let was_idle = idle.is_some();
            let mut worker = match idle.take() {
                Some(worker) => worker,
                None => Worker::start().map_err(HostPathError::Ask)?,
            };
            let (mut has_begun, mut plugin) = (false, None);
            let heard = worker.converse(&frame, scope.patience, |at| {
                has_begun = true;
                slot.is_at(at);
                plugin = at.milliseconds.map(|_| path_of(&at.path).to_owned()).or(plugin.take());
            });
            match heard {
                Ok(Heard::Answer(tell, descriptors)) => {
                    return Ok(Answered { worker, slot, tell, descriptors, plugin });
                }
                Ok(Heard::Silence(limit, at)) => return Err(self.give_up(worker, scope, at, limit)),
                Err(error) => {
                    self.abandon(&worker, &error);
                    // Somebody may have ended it long ago.
                    if !was_idle || has_begun {
                        return Err(lost(&shown(&scope.paths)));
                    }
                }
            }
        }
    }

    /// Ends a worker whose connection has failed.
    pub(super) fn abandon(&self, worker: &Worker, error: &io::Error) {
        tracing::warn!(pid = worker.pid, %error, "a process that looks at paths of the host failed");
        // If it has not ended, it is confused.
        let _ = process::signal_child(worker.pid, SIGKILL);
        self.reap(worker.pid, Started::default(), None);
    }

    /// Ends a worker whose answer nobody wants any more. It counts as busy until it has ended.
    pub(super) fn dismiss(&self, worker: Worker, slot: Slot, paths: Vec<PathBuf>) {
        slot.is_in(paths);
        let _ = process::signal_child(worker.pid, SIGKILL);
        self.reap(worker.pid, Started::default(), Some(slot));
    }

    /// A worker that is idle, if there is one, and the right to have one; unless what is asked
    /// about is known not to answer.
    pub(super) fn begin(&self, scope: &Scope) -> Result<(Option<Worker>, Slot), HostPathError> {
        let Scope { paths, patience, .. } = scope;
        let (shared, of_a_cgroup) = (&self.shared, scope.of_a_cgroup());
        // Those who make room may have more patience.
        let end = Instant::now() + if of_a_cgroup { PATIENCE } else { *patience };
        let mut workers = lock(&shared.workers);
        workers.refuse_what_is_stuck(scope)?;
        if of_a_cgroup {
            if workers.stuck.iter().filter(|stuck| stuck.kind == Kind::Cgroup).count() >= MOST_OF_CGROUPS {
                return Err(workers.too_many(paths));
            }
            let is_next = |workers: &mut Workers| workers.idle.is_none() && !workers.busy.is_empty();
            let waited = shared.one_idle.wait_timeout_while(workers, NEXT, is_next);
            workers = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        loop {
            let is_full = workers.busy.len() + workers.stuck.len() >= shared.most;
            let crowded = if of_a_cgroup { None } else { workers.crowded(paths) };
            if !is_full && crowded.is_none() {
                break;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(match crowded {
                    Some((path, busy)) => silent_before(path, path, busy.since),
                    None => workers.too_many(paths),
                });
            }
            // Nobody tells when one has become slow.
            let waited = shared.one_less.wait_timeout(workers, left.min(SLOW));
            (workers, _) = waited.unwrap_or_else(PoisonError::into_inner);
            workers.refuse_what_is_stuck(scope)?;
        }
        workers.questions += 1;
        let question = workers.questions;
        workers.busy.push(Busy { question, paths: paths.clone(), since: Instant::now() });
        Ok((workers.idle.take(), Slot { shared: shared.clone(), question }))
    }

    /// Takes back a worker that has answered, unless the plugin that it ran cannot end.
    pub(super) fn take_back(&self, worker: Worker, plugin: Option<PathBuf>) {
        let left = plugin.as_ref().map(|_| Started::killed(worker.pid)).unwrap_or_default();
        match plugin {
            Some(plugin) if !left.0.is_empty() => {
                tracing::warn!(plugin = %plugin.display(), "a CNI plugin was killed and cannot end");
                let Worker { pid, connection, .. } = worker;
                drop(connection);
                let (kind, paths, places, since) = (Kind::Plugins, Vec::new(), Vec::new(), Instant::now());
                let stuck =
                    Stuck { pid, paths, places, kind, was_killed: false, plugin: Some(plugin), since };
                lock(&self.shared.workers).stuck.push(stuck);
                self.reap(pid, left, None);
            }
            _ => self.keep(worker),
        }
    }

    pub(super) fn keep(&self, worker: Worker) {
        let mut workers = lock(&self.shared.workers);
        if self.shared.keeps_one && workers.idle.is_none() {
            workers.idle = Some(worker);
            self.shared.one_idle.notify_one();
        } else {
            drop(workers);
            // It ends when it sees that.
            drop(worker.connection);
            self.reap(worker.pid, Started::default(), None);
        }
    }

    /// `at` is where it was, if it has said so.
    pub(super) fn give_up(
        &self,
        worker: Worker,
        scope: Scope,
        at: Option<PathBuf>,
        limit: Duration,
    ) -> HostPathError {
        let Worker { pid, connection, .. } = worker;
        let Scope { kind, only_looks, paths: asked, patience: _ } = scope;
        let started = Started::all(pid);
        let was_killed = !only_looks;
        if was_killed {
            // What it was about to run must not be, once it can.
            started.kill();
            let _ = process::signal_child(pid, SIGKILL);
        }
        drop(connection);
        let plugin = at.clone().filter(|_| !started.0.is_empty());
        let is_at_itself = kind == Kind::Cgroup || at.is_some();
        let (path, paths) = match at {
            // One directory of many, which is locked itself.
            Some(at) => {
                let known = asked.into_iter().filter(|directory| at.starts_with(directory));
                let directory = known.max_by_key(|directory| directory.as_os_str().len());
                (at.display().to_string(), vec![directory.unwrap_or(at)])
            }
            None => (shown(&asked), asked),
        };
        let places: Vec<PathBuf> = match is_at_itself {
            true => paths.clone(),
            false => paths.iter().map(|path| place(path)).collect(),
        };
        let seconds = limit.as_secs();
        tracing::warn!(
            path,
            pid,
            "a path of the host did not answer within {seconds} s; what is there is not looked at until it does"
        );
        let error = HostPathError::Silent { path, place: shown(&places), seconds };
        let since = Instant::now() - limit;
        lock(&self.shared.workers).stuck.push(Stuck { pid, paths, places, kind, was_killed, plugin, since });
        self.reap(pid, started, None);
        // Those who wait for room there are refused now.
        self.shared.one_less.notify_all();
        error
    }

    /// Sees to it that a worker which is to end is waited for, however late it does.
    /// What it has started counts as it does. `slot` is kept until then.
    pub(super) fn reap(&self, pid: i32, mut started: Started, slot: Option<Slot>) {
        let shared = self.shared.clone();
        self.runtime.spawn(async move {
            let (mut pause, begin) = (FIRST_LOOK, tokio::time::Instant::now());
            while matches!(process::reap_or_running(pid), Ok(Child::Running)) || started.forget_ended() {
                tokio::time::sleep(pause).await;
                pause = LOOK.min(pause * 2);
            }
            drop(slot);
            // The kernel lets some waits end with a signal that kills, which says nothing of the
            // path. A container that holds its cgroup ends soon, and the cgroup is to be removed
            // then.
            let is_its = |stuck: &Stuck| stuck.pid == pid && stuck.was_killed && stuck.kind != Kind::Cgroup;
            let is_stuck = lock(&shared.workers).stuck.iter().any(is_its);
            if is_stuck && begin.elapsed() < LOOK {
                tokio::time::sleep(AGAIN).await;
            }
            let mut workers = lock(&shared.workers);
            if let Some(at) = workers.stuck.iter().position(|stuck| stuck.pid == pid) {
                let stuck = workers.stuck.swap_remove(at);
                shared.one_less.notify_all();
                match stuck {
                    Stuck { plugin: Some(plugin), .. } => {
                        tracing::info!(plugin = %plugin.display(), "a CNI plugin that was killed has ended");
                    }
                    Stuck { paths, .. } => {
                        tracing::info!(path = shown(&paths), pid, "a path of the host is looked at again");
                    }
                }
            }
        });
    }
}

/// The right to have a worker busy.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) shared: Arc<Shared>,
    pub(super) question: u64,
}

impl Slot {
    /// Keeps where its worker is.
    pub(super) fn is_at(&self, at: &At) {
        self.is_in(at.milliseconds.is_none().then(|| path_of(&at.path).to_owned()).into_iter().collect());
    }

    /// Keeps that it is there from now on; nowhere when that may take long.
    pub(super) fn is_in(&self, paths: Vec<PathBuf>) {
        let mut workers = lock(&self.shared.workers);
        if let Some(busy) = workers.busy.iter_mut().find(|busy| busy.question == self.question) {
            busy.since = Instant::now();
            busy.paths = paths;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        lock(&self.shared.workers).busy.retain(|busy| busy.question != self.question);
        // More than one may wait, each for another place.
        self.shared.one_less.notify_all();
    }
}

impl Workers {
    pub(super) fn refuse_what_is_stuck(&self, scope: &Scope) -> Result<(), HostPathError> {
        if scope.kind == Kind::Plugins {
            let plugins: Vec<&Path> = self.stuck.iter().filter_map(|stuck| stuck.plugin.as_deref()).collect();
            if let [example, .., _] = plugins.as_slice()
                && plugins.len() >= MOST_PLUGINS
            {
                let example = example.display().to_string();
                return Err(HostPathError::TooManyPlugins { count: plugins.len(), example });
            }
        }
        for path in scope.paths.iter().filter(|_| !self.stuck.is_empty()) {
            for stuck in &self.stuck {
                if let Some(above) = stuck.paths.iter().find(|above| path.starts_with(above)) {
                    return Err(silent_before(path, above, stuck.since));
                }
            }
            if scope.of_a_cgroup() {
                continue;
            }
            let place = place(path);
            let mut there = self.stuck.iter().filter(|stuck| stuck.places.contains(&place));
            if let Some(stuck) = there.nth(AT_ONE_PLACE - 1) {
                return Err(silent_before(path, &place, stuck.since));
            }
        }
        Ok(())
    }

    /// The first of the paths where as many are slow as may be stuck, and one of those.
    pub(super) fn crowded<'a>(&'a self, paths: &'a [PathBuf]) -> Option<(&'a Path, &'a Busy)> {
        let slow: Vec<&Busy> = self.busy.iter().filter(|busy| busy.since.elapsed() > SLOW).collect();
        if slow.len() < AT_ONE_PLACE {
            return None;
        }
        paths.iter().find_map(|path| {
            let its_place = place(path);
            let is_there = |other: &PathBuf| path.starts_with(other) || place(other) == its_place;
            let mut there = slow.iter().filter(|busy| busy.paths.iter().any(is_there));
            there.nth(AT_ONE_PLACE - 1).map(|busy| (path.as_path(), *busy))
        })
    }

    pub(super) fn too_many(&self, paths: &[PathBuf]) -> HostPathError {
        let known = self.stuck.iter().flat_map(|stuck| &stuck.paths);
        let example = known.chain(self.busy.iter().flat_map(|busy| &busy.paths)).next();
        HostPathError::TooMany {
            path: shown(paths),
            count: self.stuck.len() + self.busy.len(),
            example: example.map_or_else(String::new, |path| path.display().to_string()),
        }
    }
}

pub(super) fn silent_before(path: &Path, stuck: &Path, since: Instant) -> HostPathError {
    HostPathError::SilentBefore {
        path: path.display().to_string(),
        stuck: stuck.display().to_string(),
        seconds: since.elapsed().as_secs(),
    }
}

/// The lowest directory on the way to `path` that the kernel has in memory.
fn place(path: &Path) -> PathBuf {
    let known = path.ancestors().skip(1).find_map(host_path::resolve_cached);
    known.unwrap_or_else(|| PathBuf::from("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stuck(paths: &[&Path]) -> Stuck {
        Stuck {
            pid: 0,
            paths: paths.iter().map(|path| path.to_path_buf()).collect(),
            places: paths.iter().map(|path| place(path)).collect(),
            kind: Kind::Paths,
            was_killed: true,
            plugin: None,
            since: Instant::now(),
        }
    }

    #[test]
    fn what_is_stuck_and_what_lies_below_is_refused_and_soon_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let top = std::fs::canonicalize(directory.path()).unwrap();
        std::fs::create_dir(top.join("held")).unwrap();
        std::fs::create_dir(top.join("other")).unwrap();
        let mut workers = Workers::default();
        let scope = |path: &str| Scope::new(Kind::Paths, vec![top.join(path)]);
        let asked = |workers: &Workers, path: &str| workers.refuse_what_is_stuck(&scope(path));
        asked(&workers, "held/a").unwrap();
        workers.stuck.push(stuck(&[&top.join("held/a/b")]));
        for path in ["held", "held/a", "held/a/bc", "held/x", "other"] {
            asked(&workers, path).unwrap();
        }
        for path in ["held/a/b", "held/a/b/c"] {
            let refused = asked(&workers, path).unwrap_err();
            assert!(refused.to_string().contains("held/a/b has not answered"), "{refused}");
        }
        // Whatever is missing on the way.
        workers.stuck.push(stuck(&[&top.join("held/x")]));
        assert_eq!(workers.stuck.len(), AT_ONE_PLACE);
        for path in ["held/y", "held/y/z", "held/a"] {
            let refused = asked(&workers, path).unwrap_err();
            assert!(refused.to_string().contains("held has not answered"), "{refused}");
        }
        for path in ["held", "other", "other/a"] {
            asked(&workers, path).unwrap();
        }
        workers.stuck.clear();
        asked(&workers, "held/a/b").unwrap();
    }

    #[test]
    fn where_workers_are_slow_no_more_are_sent() {
        let directory = tempfile::tempdir().unwrap();
        let top = std::fs::canonicalize(directory.path()).unwrap();
        std::fs::create_dir(top.join("held")).unwrap();
        let slow = Instant::now().checked_sub(SLOW * 2).unwrap();
        let busy = |name: &str, since| Busy { question: 0, paths: vec![top.join(name)], since };
        let mut workers = Workers::default();
        let is_crowded = |workers: &Workers, name: &str| workers.crowded(&[top.join(name)]).is_some();
        workers.busy = vec![busy("held/a", slow), busy("held/b", Instant::now())];
        workers.busy.push(Busy { question: 0, paths: Vec::new(), since: slow });
        assert!(!is_crowded(&workers, "held/x"), "one is new, and one runs a plugin");
        workers.busy.push(busy("held/c", slow));
        assert!(is_crowded(&workers, "held/x") && is_crowded(&workers, "held/a/b"));
        assert!(!is_crowded(&workers, "held") && !is_crowded(&workers, "other"));
    }
}
