//! Directories that a container keeps locked: whoever makes something in one, or looks for a name
//! that is not in memory, waits in the kernel and cannot be killed.

use std::path::Path;
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use tonic::Status;

use crate::census::{children, status_field};
use crate::daemon::{Daemon, SOON};
use crate::deadline::{patience, within};
use crate::fuse::Hanging;
use crate::pod::{Pod, container, security, volume};
use crate::skip::skip;

/// Lists a directory into a page of a file that is never served: by open(2), mmap(2) and
/// getdents64(2). The directory is locked until the page is there. Perl's own open would ask the
/// file what else it can do.
const HOLD: &str = "
my ($file, $directory) = @ARGV;
my $page = syscall(9, 0, 4096, 3, 2, syscall(2, $file, 0), 0);
syscall(217, syscall(2, $directory, 0200000), $page, 4096);
";

/// Longer than the daemon waits for a path.
pub const GIVEN_UP: Duration = Duration::from_secs(60);

/// A filesystem that does not serve, and a container that holds a directory with it.
#[derive(Debug)]
pub struct Holder {
    /// Its pod.
    pub pod: Pod,
    pid: i32,
    hanging: Hanging,
}

impl Holder {
    /// Has a container of the pod `config` hold `directory`, of which it has a mount that is only
    /// for reading. `None` where that cannot be.
    ///
    /// # Errors
    /// When the container does not start, or does not hold it.
    pub fn start(daemon: &Daemon, config: v1::PodSandboxConfig, directory: &Path) -> Result<Option<Self>> {
        let place = daemon.directory("hanging")?;
        let perl = Path::new("/usr/bin/perl");
        let Some(hanging) = perl.exists().then(|| Hanging::mount_with_files(&place)).transpose()?.flatten()
        else {
            skip("held", "no FUSE or no /usr/bin/perl here");
            return Ok(None);
        };
        let namespaces = config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|context| context.namespace_options.clone());
        let pod = daemon.pod_of(config)?;
        let mut config = container("holder", &["/usr/bin/perl", "-e", HOLD, "/volume/file", "/held"]);
        security(&mut config).namespace_options = namespaces;
        let library = Path::new("/lib").canonicalize()?;
        let loader = Path::new("/lib64").canonicalize()?;
        for (from, to) in [
            (place.as_path(), "/volume"),
            (directory, "/held"),
            (Path::new("/usr"), "/usr"),
            (&library, "/lib"),
            (&loader, "/lib64"),
        ] {
            config.mounts.push(v1::Mount { readonly: true, ..volume(from, to) });
        }
        let main = pod.start(config)?;
        let holder = Self { pod, pid: main.pid()?, hanging };
        within(SOON, "it holds the directory", || Ok(holder.holds().then_some(())))?;
        Ok(Some(holder))
    }

    /// Whether it still does.
    #[must_use]
    pub fn holds(&self) -> bool {
        waits_in(self.pid, GETDENTS64)
    }

    /// Lets the directory go. What is left is its pod.
    #[must_use]
    pub fn let_go(self) -> Pod {
        let Self { pod, hanging, .. } = self;
        drop(hanging);
        pod
    }

    /// Ends and removes its pod. A container that has its own file system ends that with itself.
    ///
    /// # Errors
    /// When that takes longer than the daemon waits for a path.
    pub fn remove(self) -> Result<()> {
        let Self { pod, hanging, .. } = self;
        let begin = Instant::now();
        let removal = Call::begin(move || pod.stop().and_then(|()| pod.remove()));
        drop(hanging);
        removal.answer()??;
        ensure!(begin.elapsed() < patience(GIVEN_UP), "{:?}", begin.elapsed());
        Ok(())
    }
}

/// A process of the host that holds a directory.
#[derive(Debug)]
pub struct Keeper {
    process: Child,
    hanging: Option<Hanging>,
}

impl Keeper {
    /// Has one hold `directory`, by a filesystem that does not serve, mounted on `place`. `None`
    /// where that cannot be.
    ///
    /// # Errors
    /// When it does not hold the directory.
    pub fn start(directory: &Path, place: &Path) -> Result<Option<Self>> {
        let perl = Path::new("/usr/bin/perl");
        let hanging = if perl.exists() { Hanging::mount_with_files(place)? } else { None };
        let Some(hanging) = hanging else { return Ok(None) };
        let mut command = Command::new(perl);
        let process = command.args(["-e", HOLD]).arg(place.join("file")).arg(directory).spawn()?;
        let pid = i32::try_from(process.id())?;
        let keeper = Self { process, hanging: Some(hanging) };
        within(SOON, "it holds the directory", || Ok(waits_in(pid, GETDENTS64).then_some(())))?;
        Ok(Some(keeper))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.hanging = None;
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// getdents64(2), by its number, like those that follow.
pub const GETDENTS64: &str = "217";
/// mkdir(2).
pub const MKDIR: &str = "83";
/// open(2).
pub const OPEN: &str = "2";
/// pread64(2).
pub const PREAD64: &str = "17";
/// unlinkat(2).
pub const UNLINKAT: &str = "263";

/// Whether a process waits in the kernel in this system call, and hears no signal:
/// proc_pid_syscall(5).
#[must_use]
pub fn waits_in(pid: i32, call: &str) -> bool {
    let inside = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let state = status_field(pid, "State").unwrap_or_default();
    inside.split(' ').next() == Some(call) && state.starts_with('D')
}

/// A call that may take as long as it likes, and when it began.
#[derive(Debug)]
pub struct Call<T> {
    thread: JoinHandle<Result<T, Status>>,
    /// When it began.
    pub begin: Instant,
}

impl<T: Send + 'static> Call<T> {
    /// Makes it.
    pub fn begin(call: impl FnOnce() -> Result<T, Status> + Send + 'static) -> Self {
        Self { thread: thread::spawn(call), begin: Instant::now() }
    }

    /// What it answers, within the time that the daemon waits for a path.
    ///
    /// # Errors
    /// When it does not.
    pub fn answer(self) -> Result<Result<T, Status>> {
        self.answer_within(GIVEN_UP)
    }

    /// What it answers within `limit`.
    ///
    /// # Errors
    /// When it does not.
    pub fn answer_within(self, limit: Duration) -> Result<Result<T, Status>> {
        within(limit, "the call is answered", || Ok(self.thread.is_finished().then_some(())))?;
        self.thread.join().map_err(|_| anyhow!("the thread panicked"))
    }

    /// With what it is refused.
    ///
    /// # Errors
    /// When it is not.
    pub fn refused(self) -> Result<Status> {
        self.answer()?.err().context("it is refused")
    }
}

/// How many processes of Berth, started by the daemon or by those, wait in the kernel.
///
/// # Errors
/// When the daemon does not run.
pub fn held_children(daemon: &Daemon) -> Result<usize> {
    count_children(daemon, |pid| status_field(pid, "State").is_some_and(|state| state.starts_with('D')))
}

/// How many of them read a file that does not answer. Until they are killed they could hear a
/// signal.
///
/// # Errors
/// When the daemon does not run.
pub fn reading_children(daemon: &Daemon) -> Result<usize> {
    count_children(daemon, |pid| {
        std::fs::read_to_string(format!("/proc/{pid}/syscall"))
            .is_ok_and(|inside| inside.split(' ').next() == Some(PREAD64))
    })
}

fn count_children(daemon: &Daemon, counts: impl Fn(i32) -> bool) -> Result<usize> {
    let (mut found, mut count) = (vec![i32::try_from(daemon.pid()?)?], 0);
    while let Some(pid) = found.pop() {
        // One that has ended meanwhile has none.
        found.extend(children(pid).unwrap_or_default());
        let is_of_berth = status_field(pid, "Name").is_some_and(|name| name.starts_with("berth"));
        count += usize::from(is_of_berth && counts(pid));
    }
    Ok(count)
}

/// A process that wants to make something in a directory that is held. Everybody after it waits,
/// also to list the directory.
#[derive(Debug)]
pub struct Queued(Child);

impl Queued {
    /// Waits until it waits.
    ///
    /// # Errors
    /// When it cannot be started, or does not wait.
    pub fn start(held: &Path) -> Result<Self> {
        let script = "syscall(2, $ARGV[0], 0101, 0600)";
        let queued =
            Self(Command::new("/usr/bin/perl").args(["-e", script]).arg(held.join("queued")).spawn()?);
        let pid = i32::try_from(queued.0.id())?;
        within(SOON, "it waits", || Ok(waits_in(pid, OPEN).then_some(())))?;
        Ok(queued)
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}
