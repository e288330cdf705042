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
mod connection;
mod import;
mod log_file;
mod message;
mod pool;
mod profile;
pub mod worker;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use berth_cgroup::OpenFor;
use berth_checkup::Finding;
use berth_image::ImportSource;
use berth_model::container::Device;
use berth_sys::host_path;
use tokio::runtime::Handle;

use crate::lock;
use crate::oci_spec::ResolvedDevice;
use import::Imported;
use message::{
    Ask, AskedCni, AskedDevices, AskedTree, Below, Failure, OpenControl, Paths, Rotate, Tell, bytes_of,
    path_of,
};
use pool::{Answered, Kind, MOST, MOST_FOR_CNI, MOST_FOR_IMPORTS, PATIENCE, Scope, Shared};

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
