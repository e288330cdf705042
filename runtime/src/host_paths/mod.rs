//! Paths of the host that containers may share, looked at and changed without the daemon ever
//! waiting for one.
//!
//! A process that has a directory of the host mounted, if only read-only, can keep the kernel's
//! lock of it for ever: getdents64(2) holds the lock while it writes to memory that nobody serves,
//! such as a page of a file on a network filesystem. Another process that creates something in that
//! directory, or looks up a name that is not in the kernel's memory, waits and cannot be killed. A
//! daemon with one thread in such a wait can neither end nor give back its locks and sockets.
//!
//! So the daemon itself only asks what the kernel has in memory, which never waits. That answers
//! almost every path, as the client has created it a moment ago. The rest is done by workers:
//! processes of this same program that hold nothing of the daemon's. Each question has a worker to
//! itself, and `PATIENCE`: after that the worker is killed and left behind, and the question has
//! failed.
//!
//! ```text
//!  idle -- question --> busy -- answer --> idle (one is kept, the others end)
//!                        '--- PATIENCE over --> stuck (killed) -- its wait is over --> gone
//! ```
//! While a worker is stuck, its path and everything below fails at once. So do other names in the
//! same directory once `AT_ONE_PLACE` workers are stuck there. `MOST` limits the workers that are
//! busy or stuck: beyond it only what the kernel has in memory is answered.
//!
//! The directories of cgroups, which containers see of their own, are looked at by workers too
//! (`crate::cgroups`). There the kernel does not say what it has in memory, but as nothing is
//! slow in them, they have less patience (`CGROUP_PATIENCE`), and those that hang leave room for
//! the other paths (`MOST_OF_CGROUPS`).

mod cgroup;
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
use berth_model::container::Device;
use berth_shim_proto::frame;
use berth_sys::process::{Child, Program, SIGKILL};
use berth_sys::{host_path, process, socket};
use tokio::runtime::Handle;

use crate::lock;
use crate::oci_spec::ResolvedDevice;
use message::{
    Answer, Ask, AskedDevices, AskedTree, Below, Failure, OpenControl, Paths, Question, Rotate, Tell,
    bytes_of, path_of,
};

/// How long a question may take. Filesystems on a network take their time, and a client waits for
/// two minutes at most.
const PATIENCE: Duration = Duration::from_secs(20);

/// The same for a cgroup, whose files are in memory.
const CGROUP_PATIENCE: Duration = Duration::from_secs(5);

/// How many workers may be stuck in one directory until no more are sent there.
const AT_ONE_PLACE: usize = 2;

/// How many workers there may be, busy or stuck.
const MOST: usize = 64;

/// How many of them may be stuck in cgroups.
const MOST_OF_CGROUPS: usize = 32;

/// How long to wait for a worker that is at work in a cgroup before another is started, which takes
/// longer than most of that work.
const NEXT: Duration = Duration::from_millis(5);

/// When and how often to see whether a worker that is to end has ended.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LOOK: Duration = Duration::from_secs(1);

/// Why nothing is known of a path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostPathError {
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
    /// It answered that it cannot.
    #[error(transparent)]
    Failed(Failed),
    /// There is nobody to ask.
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
pub(crate) struct Failed {
    /// With all causes.
    pub(crate) text: String,
    path: PathBuf,
    errno: i32,
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

#[derive(Debug, Default)]
struct Shared {
    workers: Mutex<Workers>,
    /// Told when there is a worker less.
    one_less: Condvar,
    /// Told when a worker is idle.
    one_idle: Condvar,
}

#[derive(Debug, Default)]
struct Workers {
    idle: Option<Worker>,
    busy: usize,
    stuck: Vec<Stuck>,
}

#[derive(Debug)]
struct Worker {
    pid: i32,
    connection: OwnedFd,
}

/// A worker that was killed and cannot end.
#[derive(Debug)]
struct Stuck {
    pid: i32,
    paths: Vec<PathBuf>,
    /// For each path the lowest directory on the way that is known.
    places: Vec<PathBuf>,
    of_a_cgroup: bool,
    since: Instant,
}

impl HostPaths {
    /// No worker is started before there is something to ask.
    pub(crate) fn new(runtime: Handle) -> Self {
        Self { runtime, shared: Arc::default() }
    }

    /// The source of a mount: absolute, without links. It is made if it is absent. Blocking, for
    /// [`PATIENCE`] at most, as is everything here.
    pub(crate) fn source(&self, path: &Path) -> Result<PathBuf, HostPathError> {
        if let Some(found) = host_path::resolve_cached(path) {
            return Ok(found);
        }
        match self.ask(Ask::Source(bytes_of(path)))?.0 {
            Tell::Path(found) => Ok(path_of(&found).to_owned()),
            _ => Err(lost(path)),
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
            _ => Err(lost(path)),
        }
    }

    /// Moves a log away that has more than `limit` bytes. Whether there has to be a new one.
    pub(crate) fn rotate(&self, directory: &Path, name: &Path, limit: u64) -> Result<bool, HostPathError> {
        let rotate = Rotate { directory: bytes_of(directory), name: bytes_of(name), limit };
        match self.ask(Ask::Rotate(rotate))?.0 {
            Tell::Done(has_moved) => Ok(has_moved),
            _ => Err(lost(directory)),
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
            let (Tell::Tree(found), _) = self.ask(ask)? else { return Err(lost(directory)) };
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
            _ => Err(lost(&paths.into_iter().next().unwrap_or_default())),
        }
    }

    fn ask(&self, ask: Ask) -> Result<(Tell, Vec<OwnedFd>), HostPathError> {
        let (paths, of_a_cgroup) = (ask.paths(), ask.is_of_a_cgroup());
        let patience = if of_a_cgroup { CGROUP_PATIENCE } else { PATIENCE };
        let first = || paths.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
        let frame = frame::encode(&Question::from(ask)).map_err(|error| {
            HostPathError::Failed(Failed { text: error.to_string(), path: first().to_owned(), errno: 0 })
        })?;
        let (mut idle, _slot) = self.begin(&paths, of_a_cgroup)?;
        loop {
            let was_idle = idle.is_some();
            let worker = match idle.take() {
                Some(worker) => worker,
                None => Worker::start().map_err(HostPathError::Ask)?,
            };
            match worker.converse(&frame, patience) {
                Ok(Some((Tell::Failed(Failure { text, path, errno }), _))) => {
                    self.keep(worker);
                    let path = path_of(&path).to_owned();
                    return Err(HostPathError::Failed(Failed { text, path, errno }));
                }
                Ok(Some(found)) => {
                    self.keep(worker);
                    return Ok(found);
                }
                Ok(None) => return Err(self.give_up(worker, paths, patience, of_a_cgroup)),
                Err(error) => {
                    tracing::warn!(pid = worker.pid, %error, "a process that looks at paths of the host failed");
                    // If it has not ended, it is confused.
                    let _ = process::signal_child(worker.pid, SIGKILL);
                    self.reap(worker.pid);
                    // Somebody may have ended it long ago.
                    if !was_idle {
                        return Err(lost(first()));
                    }
                }
            }
        }
    }

    /// A worker that is idle, if there is one, and the right to have one; unless what is asked
    /// about is known not to answer.
    fn begin(&self, paths: &[PathBuf], of_a_cgroup: bool) -> Result<(Option<Worker>, Slot), HostPathError> {
        let shared = &self.shared;
        let mut workers = lock(&shared.workers);
        workers.refuse_what_is_stuck(paths, of_a_cgroup)?;
        if of_a_cgroup {
            if workers.stuck.iter().filter(|stuck| stuck.of_a_cgroup).count() >= MOST_OF_CGROUPS {
                return Err(workers.too_many(paths));
            }
            let is_next = |workers: &mut Workers| workers.idle.is_none() && workers.busy > 0;
            let waited = shared.one_idle.wait_timeout_while(workers, NEXT, is_next);
            workers = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let is_full = |workers: &mut Workers| workers.busy + workers.stuck.len() >= MOST;
        let waited = shared.one_less.wait_timeout_while(workers, PATIENCE, is_full);
        let (mut workers, wait) = waited.unwrap_or_else(PoisonError::into_inner);
        if wait.timed_out() {
            return Err(workers.too_many(paths));
        }
        workers.busy += 1;
        Ok((workers.idle.take(), Slot(shared.clone())))
    }

    /// Takes back a worker that has answered.
    fn keep(&self, worker: Worker) {
        let mut workers = lock(&self.shared.workers);
        if workers.idle.is_none() {
            workers.idle = Some(worker);
            self.shared.one_idle.notify_one();
        } else {
            drop(workers);
            // It ends when it sees that.
            drop(worker.connection);
            self.reap(worker.pid);
        }
    }

    fn give_up(
        &self,
        worker: Worker,
        paths: Vec<PathBuf>,
        patience: Duration,
        of_a_cgroup: bool,
    ) -> HostPathError {
        let Worker { pid, connection } = worker;
        let _ = process::signal_child(pid, SIGKILL);
        drop(connection);
        let places: Vec<PathBuf> = match of_a_cgroup {
            true => paths.clone(),
            false => paths.iter().map(|path| place(path)).collect(),
        };
        let (path, seconds) = (shown(&paths), patience.as_secs());
        tracing::warn!(
            path,
            pid,
            "a path of the host did not answer within {seconds} s; what is there is not looked at until it does"
        );
        let error = HostPathError::Silent { path, place: shown(&places), seconds };
        let since = Instant::now() - patience;
        lock(&self.shared.workers).stuck.push(Stuck { pid, paths, places, of_a_cgroup, since });
        self.reap(pid);
        error
    }

    /// Sees to it that a worker which is to end is waited for, however late it does.
    fn reap(&self, pid: i32) {
        let shared = self.shared.clone();
        self.runtime.spawn(async move {
            let mut pause = FIRST_LOOK;
            while matches!(process::reap_or_running(pid), Ok(Child::Running)) {
                tokio::time::sleep(pause).await;
                pause = LOOK.min(pause * 2);
            }
            let mut workers = lock(&shared.workers);
            if let Some(at) = workers.stuck.iter().position(|stuck| stuck.pid == pid) {
                let stuck = workers.stuck.swap_remove(at);
                shared.one_less.notify_one();
                tracing::info!(path = shown(&stuck.paths), pid, "a path of the host answers again");
            }
        });
    }
}

/// The right to have a worker busy.
#[derive(Debug)]
struct Slot(Arc<Shared>);

impl Drop for Slot {
    fn drop(&mut self) {
        lock(&self.0.workers).busy -= 1;
        self.0.one_less.notify_one();
    }
}

impl Workers {
    fn refuse_what_is_stuck(&self, paths: &[PathBuf], of_a_cgroup: bool) -> Result<(), HostPathError> {
        for path in paths.iter().filter(|_| !self.stuck.is_empty()) {
            let refused = |stuck: &Stuck, what: &Path| HostPathError::SilentBefore {
                path: path.display().to_string(),
                stuck: what.display().to_string(),
                seconds: stuck.since.elapsed().as_secs(),
            };
            for stuck in &self.stuck {
                if let Some(above) = stuck.paths.iter().find(|above| path.starts_with(above)) {
                    return Err(refused(stuck, above));
                }
            }
            if of_a_cgroup {
                continue;
            }
            let place = place(path);
            let mut there = self.stuck.iter().filter(|stuck| stuck.places.contains(&place));
            if let Some(stuck) = there.nth(AT_ONE_PLACE - 1) {
                return Err(refused(stuck, &place));
            }
        }
        Ok(())
    }

    fn too_many(&self, paths: &[PathBuf]) -> HostPathError {
        let example = self.stuck.first().and_then(|stuck| stuck.paths.first());
        HostPathError::TooMany {
            path: shown(paths),
            count: self.stuck.len(),
            example: example.map_or_else(String::new, |path| path.display().to_string()),
        }
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
        Ok(Self { pid: process::spawn(&program)?, connection })
    }

    /// Puts a question. `None` when there is no answer in time.
    fn converse(&self, frame: &[u8], patience: Duration) -> io::Result<Option<(Tell, Vec<OwnedFd>)>> {
        let (connection, end) = (self.connection.as_fd(), Instant::now() + patience);
        worker::send_all(connection, frame, &[])?;
        let (mut received, mut descriptors, mut buffer) = (Vec::new(), Vec::new(), [0; 4096]);
        loop {
            if let Some(answer) = frame::take::<Answer>(&mut received).map_err(io::Error::other)? {
                let tell = answer.tell.ok_or(io::ErrorKind::InvalidData)?;
                return Ok(Some((tell, descriptors)));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left < Duration::from_millis(1) {
                return Ok(None);
            }
            socket::limit_waits(connection, left)?;
            match socket::receive(connection, &mut buffer) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((length, more)) => {
                    received.extend_from_slice(buffer.get(..length).unwrap_or_default());
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
        _ => Err(lost(paths.first().map(PathBuf::as_path).unwrap_or(Path::new("")))),
    }
}

fn lost(path: &Path) -> HostPathError {
    HostPathError::Lost { path: path.display().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stuck(paths: &[&Path]) -> Stuck {
        Stuck {
            pid: 0,
            paths: paths.iter().map(|path| path.to_path_buf()).collect(),
            places: paths.iter().map(|path| place(path)).collect(),
            of_a_cgroup: false,
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
        let asked = |workers: &Workers, path: &str| workers.refuse_what_is_stuck(&[top.join(path)], false);
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

    #[tokio::test]
    async fn what_the_kernel_has_in_memory_needs_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let top = std::fs::canonicalize(directory.path()).unwrap();
        let host = HostPaths::new(Handle::current());
        assert_eq!(host.source(&top).unwrap(), top);
        host.directory(&top).unwrap();
        let workers = lock(&host.shared.workers);
        assert!(workers.idle.is_none() && workers.busy == 0);
    }
}
