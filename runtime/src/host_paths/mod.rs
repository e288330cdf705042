//! Paths of the host that containers may share, looked at and changed without the daemon ever
//! waiting for one.
//!
//! A process that has a directory of the host mounted, if only read-only, can keep the kernel's
//! lock of it forever: getdents64(2) holds the lock while it writes to memory that nobody serves,
//! such as a page of a file on a network filesystem. Another process that creates something in that
//! directory, or looks up a name that is not in the kernel's memory, waits and cannot be killed. A
//! daemon with one thread in such a wait can neither end nor give back its locks and sockets.
//!
//! So the daemon itself only asks what the kernel has in memory, which never waits. That answers
//! almost every path, as the client has created it a moment ago. The rest is done by workers:
//! processes of this same program that hold nothing of the daemon's. Each question has a worker to
//! itself, and `PATIENCE`: after that the worker is left behind, and the question has failed.
//!
//! ```text
//!  idle -- question --> busy -- answer --> idle (one is kept, the others end)
//!                        '--- PATIENCE over --> stuck -- its wait is over --> gone
//! ```
//! One that is stuck is killed, so that it does nothing late. That ends some waits, and says
//! nothing of the path; one that only looks is left to find out, with nobody to tell.
//!
//! While a worker is stuck, its path and everything below fails at once. So do other names in the
//! same directory once `AT_ONE_PLACE` workers are stuck there; if they are slow only, others wait.
//! `MOST` limits the workers that are busy or stuck: beyond it only what the kernel has in memory
//! is answered.
//!
//! The directories of cgroups, which containers see of their own, are looked at by workers too
//! (`crate::cgroups`). There the kernel does not say what it has in memory, but as nothing is
//! slow in them, they have less patience (`CGROUP_PATIENCE`), and those that hang leave room for
//! the other paths (`MOST_OF_CGROUPS`).
//!
//! What is done for CNI goes to several directories and runs plugins (`cni`). Its worker says
//! where it is before each step, and each step has `PATIENCE` to itself. Plugins that were killed
//! and cannot end count as their worker does, and beyond `MOST_PLUGINS` no more are run.
//!
//! Files that are imported are read by workers as well, piece by piece (`import`): a daemon that
//! reads one itself waits for its filesystem, and to close it may take just as long.

mod cgroup;
pub(crate) mod cni;
mod import;
mod log_file;
mod message;
mod profile;
pub mod worker;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_cgroup::OpenFor;
use berth_checkup::Finding;
use berth_image::ImportSource;
use berth_model::container::Device;
use berth_shim_proto::frame;
use berth_sys::ending::{Ending, ending};
use berth_sys::process::{Child, Program, SIGKILL};
use berth_sys::{host_path, process, socket};
use tokio::runtime::Handle;

use crate::lock;
use crate::oci_spec::ResolvedDevice;
use import::Imported;
use message::{
    Answer, Ask, AskedCni, AskedDevices, AskedTree, At, Below, Failure, OpenControl, Paths, Question, Rotate,
    Tell, bytes_of, path_of,
};

/// How long a question may take. Filesystems on a network take their time, and a client waits for
/// two minutes at most.
const PATIENCE: Duration = Duration::from_secs(20);

/// The same for a cgroup, whose files are in memory.
const CGROUP_PATIENCE: Duration = Duration::from_secs(5);

/// How many workers may be stuck in one directory until no more are sent there.
const AT_ONE_PLACE: usize = 2;

/// When a worker that is busy counts as slow.
const SLOW: Duration = Duration::from_secs(1);

/// How many workers there may be, busy or stuck.
const MOST: usize = 64;

/// How many of them may be stuck in cgroups.
const MOST_OF_CGROUPS: usize = 32;

/// How many there may be for CNI, where plugins may take a minute.
const MOST_FOR_CNI: usize = 256;

/// How many there may be for imports, of which each layer that is unpacked has one.
const MOST_FOR_IMPORTS: usize = 256;

/// How many workers may be stuck because of plugins that were killed and cannot end.
const MOST_PLUGINS: usize = 8;

/// How long to wait for a worker that is at work in a cgroup before another is started, which takes
/// longer than most of that work.
const NEXT: Duration = Duration::from_millis(5);

/// When and how often to see whether a worker that is to end has ended.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LOOK: Duration = Duration::from_secs(1);

/// How long a path counts as silent that kept its worker waiting only until it was killed.
const AGAIN: Duration = Duration::from_secs(10);

/// Why nothing is known of a path.
#[derive(Debug, thiserror::Error)]
pub enum HostPathError {
    /// It does not answer.
    #[error(
        "{path} did not answer within {seconds} s: its filesystem hangs, or a container keeps {place} locked; end that container or unmount the filesystem, and try again"
    )]
    Silent {
        /// What was asked about.
        path: String,
        /// The lowest directory on the way to it that is known.
        place: String,
        /// The time limit.
        seconds: u64,
    },
    /// It did not answer before, and the one who asked then waits still.
    #[error(
        "{path} is not looked at: {stuck} has not answered for {seconds} s, because its filesystem hangs or a container keeps a directory locked; end that container or unmount the filesystem, and try again"
    )]
    SilentBefore {
        /// What was asked about.
        path: String,
        /// What did not answer.
        stuck: String,
        /// Since when.
        seconds: u64,
    },
    /// There are too many that do not.
    #[error(
        "{path} is not looked at: {count} other paths of the host do not answer, {example} among them; end the containers that keep them locked or unmount their filesystems, and try again"
    )]
    TooMany {
        /// What was asked about.
        path: String,
        /// How many.
        count: usize,
        /// One of them.
        example: String,
    },
    /// There are too many plugins that cannot end.
    #[error(
        "no CNI plugin is run: {count} were killed and cannot end, {example} among them, because a filesystem hangs or a container keeps a directory locked; end that container or unmount the filesystem, and try again"
    )]
    TooManyPlugins {
        /// How many workers have such plugins.
        count: usize,
        /// One of the plugins.
        example: String,
    },
    /// It answered that it cannot.
    #[error(transparent)]
    Failed(Failed),
    /// There is no worker to ask.
    #[error("cannot start a process that looks at paths of the host")]
    Ask(#[source] io::Error),
    /// The worker ended.
    #[error("the process that looked at {path} has ended; try again")]
    Lost {
        /// What was asked about.
        path: String,
    },
}

/// Why something on the host could not be done.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Failed {
    /// With all causes.
    pub(crate) text: String,
    path: PathBuf,
    errno: i32,
}

impl From<Failure> for Failed {
    fn from(Failure { text, path, errno }: Failure) -> Self {
        Self { text, path: path_of(&path).to_owned(), errno }
    }
}

impl Failed {
    /// Where it happened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the system said.
    pub(crate) fn source(&self) -> io::Error {
        match self.errno {
            0 => io::Error::other(self.text.clone()),
            errno => io::Error::from_raw_os_error(errno),
        }
    }
}

/// The way to the host's paths.
#[derive(Debug)]
pub(crate) struct HostPaths {
    runtime: Handle,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    most: usize,
    /// Whether a worker that is idle is kept for the next question.
    keeps_one: bool,
    workers: Mutex<Workers>,
    /// Told when there is a worker less.
    one_less: Condvar,
    /// Told when a worker is idle.
    one_idle: Condvar,
}

#[derive(Debug, Default)]
struct Workers {
    idle: Option<Worker>,
    busy: Vec<Busy>,
    stuck: Vec<Stuck>,
    /// How many questions there have been.
    questions: u64,
}

#[derive(Debug)]
struct Worker {
    pid: i32,
    connection: OwnedFd,
    /// What it has said and nobody has heard.
    received: Vec<u8>,
}

/// A worker that has a question.
#[derive(Debug)]
struct Busy {
    question: u64,
    /// Where it is; empty when that may take long.
    paths: Vec<PathBuf>,
    since: Instant,
}

/// A worker that was left behind and has not ended.
#[derive(Debug)]
struct Stuck {
    pid: i32,
    paths: Vec<PathBuf>,
    /// For each path the lowest directory on the way that is known.
    places: Vec<PathBuf>,
    kind: Kind,
    /// It may have ended only because it was killed.
    was_killed: bool,
    /// What it ran and what cannot end.
    plugin: Option<PathBuf>,
    since: Instant,
}

/// What a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Paths of the host.
    Paths,
    /// The directories of a cgroup.
    Cgroup,
    /// What CNI plugins are run for.
    Plugins,
}

/// What is known of a question before it is put.
#[derive(Debug)]
struct Scope {
    kind: Kind,
    /// Nothing is changed for it.
    only_looks: bool,
    paths: Vec<PathBuf>,
    /// How long each step may take.
    patience: Duration,
}

impl Scope {
    fn new(kind: Kind, paths: Vec<PathBuf>) -> Self {
        let patience = if kind == Kind::Cgroup { CGROUP_PATIENCE } else { PATIENCE };
        Self { kind, only_looks: false, paths, patience }
    }

    fn of_a_cgroup(&self) -> bool {
        self.kind == Kind::Cgroup
    }
}

/// A worker that has answered.
#[derive(Debug)]
struct Answered {
    worker: Worker,
    slot: Slot,
    tell: Tell,
    descriptors: Vec<OwnedFd>,
    /// What it has run.
    plugin: Option<PathBuf>,
}

/// What a worker has said.
#[derive(Debug)]
enum Heard {
    /// With descriptors.
    Answer(Tell, Vec<OwnedFd>),
    /// Nothing more for so long, and where it was, if it has said.
    Silence(Duration, Option<PathBuf>),
}

/// Processes that were started by a worker.
#[derive(Debug, Default)]
struct Started(Vec<OwnedFd>);

impl Started {
    /// By the worker `pid`, and there still.
    fn all(pid: i32) -> Self {
        Self(process::children(pid).into_iter().filter_map(|child| process::open_pidfd(child).ok()).collect())
    }

    /// Those of them that were killed and cannot end.
    fn killed(pid: i32) -> Self {
        let was_killed = |child: &i32| matches!(ending(*child), Ok(Ending::Killed | Ending::Over));
        let killed = process::children(pid).into_iter().filter(was_killed);
        let mut killed = Self(killed.filter_map(|child| process::open_pidfd(child).ok()).collect());
        killed.forget_ended();
        killed
    }

    fn kill(&self) {
        for process in &self.0 {
            let _ = process::signal_pidfd(process.as_fd(), SIGKILL);
        }
    }

    /// Whether there is one left.
    fn forget_ended(&mut self) -> bool {
        self.0.retain(|process| !process::has_ended(process.as_fd()).unwrap_or(false));
        !self.0.is_empty()
    }
}

impl HostPaths {
    /// No worker is started before there is something to ask.
    pub(crate) fn new(runtime: Handle) -> Self {
        Self::with_most(runtime, MOST, true)
    }

    /// For CNI: what is busy there takes nothing from others.
    pub(crate) fn for_cni(runtime: Handle) -> Self {
        Self::with_most(runtime, MOST_FOR_CNI, true)
    }

    /// For imports: the same. They are rare, and nothing is kept for the next one.
    pub(crate) fn for_imports(runtime: Handle) -> Self {
        Self::with_most(runtime, MOST_FOR_IMPORTS, false)
    }

    fn with_most(runtime: Handle, most: usize, keeps_one: bool) -> Self {
        let shared = Shared {
            most,
            keeps_one,
            workers: Mutex::default(),
            one_less: Condvar::new(),
            one_idle: Condvar::new(),
        };
        Self { runtime, shared: Arc::new(shared) }
    }

    /// The source of a mount: absolute, without links. It is made if it is absent. Blocking, for
    /// [`PATIENCE`] at most, as is everything here.
    pub(crate) fn source(&self, path: &Path) -> Result<PathBuf, HostPathError> {
        if let Some(found) = host_path::resolve_cached(path) {
            return Ok(found);
        }
        match self.ask(Ask::Source(bytes_of(path)))?.0 {
            Tell::Path(found) => Ok(path_of(&found).to_owned()),
            _ => Err(lost(&path.to_string_lossy())),
        }
    }

    /// Makes a directory, and those above it, unless something is there.
    pub(crate) fn directory(&self, path: &Path) -> Result<(), HostPathError> {
        if host_path::resolve_cached(path).is_some() {
            return Ok(());
        }
        self.ask(Ask::Directory(bytes_of(path))).map(drop)
    }

    /// The devices of a request.
    pub(crate) fn devices(&self, devices: &[Device]) -> Result<Vec<ResolvedDevice>, HostPathError> {
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        self.find_devices(Ask::Devices(AskedDevices { devices: devices.iter().map(Into::into).collect() }))
    }

    /// The device at `path` below the directory `top`.
    pub(crate) fn device_below(
        &self,
        top: &Path,
        path: &Path,
    ) -> Result<Option<ResolvedDevice>, HostPathError> {
        let below = Below { top: bytes_of(top), path: bytes_of(path) };
        Ok(self.find_devices(Ask::DeviceBelow(below))?.pop())
    }

    /// All devices of the host.
    pub(crate) fn host_devices(&self) -> Result<Vec<ResolvedDevice>, HostPathError> {
        self.find_devices(Ask::HostDevices(()))
    }

    /// What is in the file of a seccomp profile.
    pub(crate) fn profile(&self, path: &Path) -> Result<Vec<u8>, HostPathError> {
        match self.ask(Ask::Profile(bytes_of(path)))?.0 {
            Tell::Content(content) => Ok(content),
            _ => Err(lost(&path.to_string_lossy())),
        }
    }

    /// What is imported.
    pub(crate) fn import(self: &Arc<Self>, path: &Path) -> Result<ImportSource, HostPathError> {
        let imported = Arc::new(Imported { host: self.clone(), top: path.to_owned() });
        match self.ask(Ask::Import(bytes_of(path)))?.0 {
            Tell::Done(true) => Ok(ImportSource::Layout(imported)),
            Tell::Done(false) => Ok(ImportSource::Archive(imported)),
            _ => Err(lost(&path.to_string_lossy())),
        }
    }

    /// Moves a log away that has more than `limit` bytes. Whether there has to be a new one.
    pub(crate) fn rotate(&self, directory: &Path, name: &Path, limit: u64) -> Result<bool, HostPathError> {
        let rotate = Rotate { directory: bytes_of(directory), name: bytes_of(name), limit };
        match self.ask(Ask::Rotate(rotate))?.0 {
            Tell::Done(has_moved) => Ok(has_moved),
            _ => Err(lost(&directory.to_string_lossy())),
        }
    }

    /// Whether CNI plugins, which need these directories, are known not to answer.
    pub(crate) fn check_plugins(&self, paths: Vec<PathBuf>) -> Result<(), HostPathError> {
        lock(&self.shared.workers).refuse_what_is_stuck(&Scope::new(Kind::Plugins, paths))
    }

    /// Does something about CNI, and waits for each directory for `patience` at most.
    pub(crate) fn cni(&self, asked: &cni::Asked, patience: Duration) -> Result<cni::Outcome, HostPathError> {
        let paths = asked.paths();
        let encoded = serde_json::to_vec(asked).map_err(|error| failed(&paths, &error))?;
        let ask =
            Ask::Cni(AskedCni { asked: encoded, paths: paths.iter().map(|path| bytes_of(path)).collect() });
        let only_looks = !asked.task.runs_plugins();
        let kind = if only_looks { Kind::Paths } else { Kind::Plugins };
        let scope = Scope { kind, only_looks, paths: paths.clone(), patience: patience.min(PATIENCE) };
        match self.ask_about(ask, scope)?.0 {
            Tell::Content(outcome) => {
                serde_json::from_slice(&outcome).map_err(|error| failed(&paths, &error))
            }
            _ => Err(lost(&shown(&paths))),
        }
    }

    /// What this node lacks.
    pub(crate) fn checkup(&self, daemon: &berth_checkup::Daemon) -> Result<Vec<Finding>, HostPathError> {
        let encoded = serde_json::to_vec(daemon).map_err(|error| failed(&[], &error))?;
        match self.ask(Ask::Checkup(encoded))?.0 {
            Tell::Content(findings) => serde_json::from_slice(&findings).map_err(|error| failed(&[], &error)),
            _ => Err(lost("what the node lacks")),
        }
    }

    /// Opens files that are in the directories of a cgroup, or below.
    pub(crate) fn open_control(
        &self,
        directories: &[PathBuf],
        paths: &[PathBuf],
        purpose: OpenFor,
    ) -> Result<Vec<io::Result<File>>, HostPathError> {
        let all = |paths: &[PathBuf]| paths.iter().map(|path| bytes_of(path)).collect();
        let open = OpenControl {
            directories: all(directories),
            paths: all(paths),
            for_writing: purpose == OpenFor::Writing,
        };
        let (tell, descriptors) = self.ask(Ask::OpenControl(open))?;
        let mut files = descriptors.into_iter().map(File::from);
        let opened = outcomes(tell, paths)?.into_iter().map(|outcome| {
            outcome.and_then(|()| files.next().ok_or_else(|| io::ErrorKind::UnexpectedEof.into()))
        });
        Ok(opened.collect())
    }

    /// A directory of a cgroup and all below it, parents before their children.
    pub(crate) fn tree(&self, directory: &Path) -> Result<Vec<PathBuf>, HostPathError> {
        let mut all = Vec::new();
        loop {
            let known = u64::try_from(all.len()).unwrap_or(u64::MAX);
            let ask = Ask::Tree(AskedTree { directory: bytes_of(directory), known });
            let (Tell::Tree(found), _) = self.ask(ask)? else {
                return Err(lost(&directory.to_string_lossy()));
            };
            all.extend(found.paths.iter().map(|path| directory.join(path_of(path))));
            if !found.is_cut {
                return Ok(all);
            }
        }
    }

    /// Removes the directories of a cgroup, as far as they can be.
    pub(crate) fn remove_cgroup(
        &self,
        directories: &[PathBuf],
    ) -> Result<Vec<io::Result<()>>, HostPathError> {
        let paths = directories.iter().map(|path| bytes_of(path)).collect();
        outcomes(self.ask(Ask::RemoveCgroup(Paths { paths }))?.0, directories)
    }

    fn find_devices(&self, ask: Ask) -> Result<Vec<ResolvedDevice>, HostPathError> {
        let paths = ask.paths();
        match self.ask(ask)?.0 {
            Tell::Devices(found) => Ok(found.devices.into_iter().map(Into::into).collect()),
            _ => Err(lost(&shown(&paths))),
        }
    }

    fn ask(&self, ask: Ask) -> Result<(Tell, Vec<OwnedFd>), HostPathError> {
        let kind = if ask.is_of_a_cgroup() { Kind::Cgroup } else { Kind::Paths };
        let scope = Scope { only_looks: ask.only_looks(), ..Scope::new(kind, ask.paths()) };
        self.ask_about(ask, scope)
    }

    fn ask_about(&self, ask: Ask, scope: Scope) -> Result<(Tell, Vec<OwnedFd>), HostPathError> {
        let Answered { worker, slot, tell, descriptors, plugin } = self.put(ask, scope)?;
        self.take_back(worker, plugin);
        drop(slot);
        match tell {
            Tell::Failed(failure) => Err(HostPathError::Failed(failure.into())),
            tell => Ok((tell, descriptors)),
        }
    }

    /// Puts a question. The worker that has answered is not taken back.
    fn put(&self, ask: Ask, scope: Scope) -> Result<Answered, HostPathError> {
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
    fn abandon(&self, worker: &Worker, error: &io::Error) {
        tracing::warn!(pid = worker.pid, %error, "a process that looks at paths of the host failed");
        // If it has not ended, it is confused.
        let _ = process::signal_child(worker.pid, SIGKILL);
        self.reap(worker.pid, Started::default(), None);
    }

    /// Ends a worker whose answer nobody wants any more. It counts as busy until it has ended.
    fn dismiss(&self, worker: Worker, slot: Slot, paths: Vec<PathBuf>) {
        slot.is_in(paths);
        let _ = process::signal_child(worker.pid, SIGKILL);
        self.reap(worker.pid, Started::default(), Some(slot));
    }

    /// A worker that is idle, if there is one, and the right to have one; unless what is asked
    /// about is known not to answer.
    fn begin(&self, scope: &Scope) -> Result<(Option<Worker>, Slot), HostPathError> {
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
    fn take_back(&self, worker: Worker, plugin: Option<PathBuf>) {
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

    fn keep(&self, worker: Worker) {
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
    fn give_up(&self, worker: Worker, scope: Scope, at: Option<PathBuf>, limit: Duration) -> HostPathError {
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
    fn reap(&self, pid: i32, mut started: Started, slot: Option<Slot>) {
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
struct Slot {
    shared: Arc<Shared>,
    question: u64,
}

impl Slot {
    /// Keeps where its worker is.
    fn is_at(&self, at: &At) {
        self.is_in(at.milliseconds.is_none().then(|| path_of(&at.path).to_owned()).into_iter().collect());
    }

    /// Keeps that it is there from now on; nowhere when that may take long.
    fn is_in(&self, paths: Vec<PathBuf>) {
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
    fn refuse_what_is_stuck(&self, scope: &Scope) -> Result<(), HostPathError> {
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
    fn crowded<'a>(&'a self, paths: &'a [PathBuf]) -> Option<(&'a Path, &'a Busy)> {
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

    fn too_many(&self, paths: &[PathBuf]) -> HostPathError {
        let known = self.stuck.iter().flat_map(|stuck| &stuck.paths);
        let example = known.chain(self.busy.iter().flat_map(|busy| &busy.paths)).next();
        HostPathError::TooMany {
            path: shown(paths),
            count: self.stuck.len() + self.busy.len(),
            example: example.map_or_else(String::new, |path| path.display().to_string()),
        }
    }
}

fn silent_before(path: &Path, stuck: &Path, since: Instant) -> HostPathError {
    HostPathError::SilentBefore {
        path: path.display().to_string(),
        stuck: stuck.display().to_string(),
        seconds: since.elapsed().as_secs(),
    }
}

impl Worker {
    fn start() -> io::Result<Self> {
        let (connection, theirs) = socket::stream_pair()?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let (null, theirs) = (null.as_fd(), theirs.as_fd());
        let args = [c"berthd".to_owned(), CString::new(worker::WORD)?];
        // This program, whatever is in its file by now.
        let program = Program {
            path: c"/proc/self/exe",
            args: &args,
            env: &[],
            descriptors: &[null, null, null, theirs],
        };
        Ok(Self::new(process::spawn(&program)?, connection))
    }

    fn new(pid: i32, connection: OwnedFd) -> Self {
        Self { pid, connection, received: Vec::new() }
    }

    /// Puts a question, and listens until it is answered. Where the worker is in between goes to
    /// `is_at`, and its `patience` begins again from there.
    fn converse(&mut self, frame: &[u8], patience: Duration, is_at: impl FnMut(&At)) -> io::Result<Heard> {
        let connection = self.connection.as_fd();
        // It reads what it is sent, unless it was stopped.
        socket::limit_sends(connection, patience)?;
        match worker::send_all(connection, frame, &[]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Heard::Silence(patience, None)),
            sent => sent.and_then(|()| self.listen(patience, is_at)),
        }
    }

    /// Listens for an answer.
    fn listen(&mut self, patience: Duration, mut is_at: impl FnMut(&At)) -> io::Result<Heard> {
        let connection = self.connection.as_fd();
        let (mut limit, mut at) = (patience, None);
        let mut end = Instant::now() + limit;
        let (mut descriptors, mut buffer) = (Vec::new(), [0; 16 * 1024]);
        loop {
            while let Some(answer) = frame::take::<Answer>(&mut self.received).map_err(io::Error::other)? {
                match answer.tell {
                    Some(Tell::At(now)) => {
                        is_at(&now);
                        limit = patience + Duration::from_millis(now.milliseconds.unwrap_or(0));
                        end = Instant::now() + limit;
                        at = Some(path_of(&now.path).to_owned());
                    }
                    Some(tell) => return Ok(Heard::Answer(tell, descriptors)),
                    None => return Err(io::ErrorKind::InvalidData.into()),
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if left < Duration::from_millis(1) {
                return Ok(Heard::Silence(limit, at));
            }
            socket::limit_waits(connection, left)?;
            match socket::receive(connection, &mut buffer) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((length, more)) => {
                    self.received.extend_from_slice(buffer.get(..length).unwrap_or_default());
                    descriptors.extend(more);
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The lowest directory on the way to `path` that the kernel has in memory.
fn place(path: &Path) -> PathBuf {
    let known = path.ancestors().skip(1).find_map(host_path::resolve_cached);
    known.unwrap_or_else(|| PathBuf::from("/"))
}

fn shown(paths: &[PathBuf]) -> String {
    /// Of a list that is longer, one stands for all.
    const MOST_SHOWN: usize = 4;
    match paths {
        // It is one of many.
        [] => "a path of the host".to_owned(),
        [first, more @ ..] if more.len() >= MOST_SHOWN => {
            format!("{} and {} others", first.display(), more.len())
        }
        _ => paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "),
    }
}

/// What became of each of the paths.
fn outcomes(tell: Tell, paths: &[PathBuf]) -> Result<Vec<io::Result<()>>, HostPathError> {
    let result = |errno| if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) };
    match tell {
        Tell::Outcomes(outcomes) if outcomes.errnos.len() == paths.len() => {
            Ok(outcomes.errnos.into_iter().map(result).collect())
        }
        _ => Err(lost(&shown(paths))),
    }
}

fn lost(path: &str) -> HostPathError {
    HostPathError::Lost { path: path.to_owned() }
}

/// Of a question that cannot be put, or an answer that is none.
fn failed(paths: &[PathBuf], error: &dyn std::error::Error) -> HostPathError {
    let path = paths.first().cloned().unwrap_or_default();
    HostPathError::Failed(Failed { text: error.to_string(), path, errno: 0 })
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

    #[test]
    fn a_worker_that_reads_nothing_is_given_up() {
        let (connection, _kept) = socket::stream_pair().unwrap();
        let mut worker = Worker::new(0, connection);
        let heard = worker.converse(&vec![0; 4 << 20], Duration::from_millis(50), |_| {}).unwrap();
        assert!(matches!(heard, Heard::Silence(_, None)), "{heard:?}");
    }

    #[test]
    fn each_step_of_a_worker_has_its_own_time() {
        let (connection, theirs) = socket::stream_pair().unwrap();
        let mut worker = Worker::new(0, connection);
        let at = |path: &str, milliseconds| {
            let at = At { path: path.as_bytes().to_vec(), milliseconds };
            let frame = frame::encode(&Answer::from(Tell::At(at))).unwrap();
            worker::send_all(theirs.as_fd(), &frame, &[]).unwrap();
        };
        at("/held", None);
        at("/plugin", Some(30));
        let mut seen = Vec::new();
        let heard = worker.converse(&[], Duration::from_millis(20), |at| seen.push(at.clone())).unwrap();
        let Heard::Silence(limit, Some(path)) = heard else { panic!("{heard:?}") };
        assert_eq!((limit, path), (Duration::from_millis(50), PathBuf::from("/plugin")));
        assert_eq!(seen.len(), 2);
    }

    #[tokio::test]
    async fn what_the_kernel_has_in_memory_needs_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let top = std::fs::canonicalize(directory.path()).unwrap();
        let host = HostPaths::new(Handle::current());
        assert_eq!(host.source(&top).unwrap(), top);
        host.directory(&top).unwrap();
        let workers = lock(&host.shared.workers);
        assert!(workers.idle.is_none() && workers.busy.is_empty());
    }
}
