//! A private daemon for a test: `berthd` and `berth-shim` from `dist/`, with their own directories,
//! network and cgroup.
//!
//! The programs are those of the directory that `BERTH_BIN_DIR` names, else of `dist/` in the
//! repository; its cgroup driver is the one that `BERTH_TEST_CGROUP_DRIVER` names
//! ([`Driver::of_the_environment`]). Whatever the outcome of the test, everything that the daemon
//! and its containers created is removed when the value is dropped: processes, mounts, network,
//! cgroups, files.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use berth_cri::v1;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;

use crate::cgroup::{Cgroup, Driver};
use crate::cni;
use crate::cri::Client;
use crate::deadline::within;
use crate::host::Host;
use crate::pod::Pod;
use crate::program::last_lines;
use crate::skip::skip;

/// The image that every daemon here has: that of `scripts/build-image demo`.
pub const IMAGE: &str = "localhost/berth/demo:latest";

/// Time for something that the daemon does at once, on a machine that is busy with other things.
pub const SOON: Duration = Duration::from_secs(60);

/// Deviations from the usual daemon.
#[derive(Debug, Default, Clone, Copy)]
pub struct Setup<'a> {
    /// More lines for the section `[network]` of `berth.toml`.
    pub network: &'a str,
    /// More lines for `berth.toml`, in sections of their own.
    pub configuration: &'static str,
    /// Puts the durable root on a filesystem of this size.
    pub disk_bytes: Option<u64>,
    /// Runs the daemon in a chroot: in a mount namespace whose root is the host's, at a copy of the
    /// host's mounts below.
    pub chroot: bool,
    /// Gives the host a mount namespace of its own, as one of several nodes has.
    pub own_mounts: bool,
    /// Programs that the daemon is started by, each of which becomes the next: `["nice", "-n",
    /// "5"]`.
    pub launcher: &'static [&'static str],
}

/// A daemon, running or killed.
#[derive(Debug)]
pub struct Daemon {
    process: Mutex<Option<Child>>,
    client: Client,
    cgroup: Cgroup,
    host: Host,
    /// Where the daemon's root is, if it is not the host's.
    chroot: Option<PathBuf>,
    launcher: &'static [&'static str],
    // Last: the files go when nothing uses them any more.
    dir: TempDir,
}

/// Runs a test on a daemon with the demo image; a failure is reported with the daemon's last lines.
/// Without root the test is skipped.
///
/// # Errors
/// What the test returns, and when the daemon does not start.
pub fn rootful(test: impl FnOnce(&Daemon) -> Result<()>) -> Result<()> {
    rootful_with(Setup::default(), test)
}

/// [`rootful`] on a daemon that is set up differently.
///
/// # Errors
/// What the test returns, and when the daemon does not start.
pub fn rootful_with(setup: Setup<'_>, test: impl FnOnce(&Daemon) -> Result<()>) -> Result<()> {
    if !geteuid().is_root() {
        skip(std::thread::current().name().unwrap_or("rootful"), "needs root");
        return Ok(());
    }
    let daemon = Daemon::start(setup)?;
    let archive = programs()?.join("images/demo.tar");
    ensure!(archive.exists(), "no {}: run make images", archive.display());
    daemon
        .client
        .import(&archive)
        .context("importing the demo image")
        .with_context(|| daemon.last_words())?;
    test(&daemon).with_context(|| daemon.last_words())
}

impl Daemon {
    /// Starts one without images.
    ///
    /// # Errors
    /// When it does not answer in time; the message has its last lines.
    pub fn start(setup: Setup<'_>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("berth-test-").tempdir().context("making a directory")?;
        let name = dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let cgroup = Cgroup::create_by(Driver::of_the_environment()?, &name)?;
        let namespace = dir.path().join("netns");
        let host = match setup.own_mounts {
            false => Host::create(namespace),
            true => Host::create_with_mounts(namespace, dir.path().join("namespaces")),
        }?;
        fs::create_dir(dir.path().join("certs.d")).context("making a directory for mirror rules")?;
        // A name that is unique to this test, of at most 15 characters.
        let bridge = format!("bt{}", name.trim_start_matches("berth-test-"));
        let configuration = format!(
            "[cgroup]\nparent = \"{}\"\n[registry]\nconfig_path = \"{}\"\n[network]\nbridge = \"{bridge}\"\n{}{}{}",
            cgroup.parent(),
            dir.path().join("certs.d").display(),
            cni::configuration(dir.path()),
            setup.network,
            setup.configuration
        );
        fs::write(dir.path().join("berth.toml"), configuration).context("writing the configuration")?;
        let client = Client::new(&dir.path().join("berth.sock"))?;
        let chroot = setup.chroot.then(|| dir.path().join("chroot"));
        if let Some(chroot) = &chroot {
            fs::create_dir(chroot).context("making a directory for the chroot")?;
        }
        let daemon =
            Self { process: Mutex::new(None), client, cgroup, host, chroot, launcher: setup.launcher, dir };
        if let Some(bytes) = setup.disk_bytes {
            let root = daemon.root();
            fs::create_dir(&root).context("making the root")?;
            mount(
                Some("disk"),
                &root,
                Some("tmpfs"),
                MsFlags::empty(),
                Some(format!("size={bytes}").as_str()),
            )
            .context("mounting a small disk")?;
        }
        daemon.start_again()?;
        Ok(daemon)
    }

    /// Starts it again after it was killed or stopped, on the state that it left, and waits until
    /// it answers.
    ///
    /// # Errors
    /// When it does not answer in time; the message has its last lines.
    pub fn start_again(&self) -> Result<()> {
        self.start_from(&programs()?)
    }

    /// [`start_again`](Self::start_again) with the programs of another directory.
    ///
    /// # Errors
    /// When it does not answer in time; the message has its last lines.
    pub fn start_from(&self, programs: &Path) -> Result<()> {
        self.start_by(&[], programs)
    }

    /// [`start_again`](Self::start_again) by another program with these arguments, which has to
    /// become the daemon.
    ///
    /// # Errors
    /// When it does not answer in time; the message has its last lines.
    pub fn start_under(&self, words: &[&str]) -> Result<()> {
        self.start_by(words, &programs()?)
    }

    /// Starts it after it was killed or stopped, when it cannot start: waits for its end, and
    /// returns its last lines.
    ///
    /// # Errors
    /// When it does not end in time, or ends with success.
    pub fn fail_to_start(&self) -> Result<String> {
        self.fail_to_start_under(&[])
    }

    /// [`fail_to_start`](Self::fail_to_start) by another program, as with
    /// [`start_under`](Self::start_under).
    ///
    /// # Errors
    /// When it does not end in time, or ends with success.
    pub fn fail_to_start_under(&self, words: &[&str]) -> Result<String> {
        let mut child = self.spawn(words, &programs()?)?;
        let ended = within(SOON, "the daemon ends", || Ok(child.try_wait()?));
        let _ = child.kill();
        ensure!(!ended?.success(), "it ended with success");
        Ok(self.last_words())
    }

    fn start_by(&self, words: &[&str], programs: &Path) -> Result<()> {
        let socket = || fs::metadata(self.socket()).map(|found| found.ino()).ok();
        let before = socket();
        let child = self.spawn(words, programs)?;
        *self.process() = Some(child);
        let ended = within(SOON, "the daemon answers", || {
            // After its end there is nothing to wait for.
            if let Some(status) = self.process().as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                return Ok(Some(Some(status)));
            }
            // A listener of the previous daemon may never answer.
            if socket() == before {
                return Ok(None);
            }
            self.client.version(v1::VersionRequest::default())?;
            Ok(Some(None))
        })
        .with_context(|| self.last_words())?;
        match ended {
            None => Ok(()),
            Some(status) => bail!("the daemon ended by itself: {status}; {}", self.last_words()),
        }
    }

    fn spawn(&self, words: &[&str], programs: &Path) -> Result<Child> {
        let program = programs.join("berthd");
        ensure!(program.exists(), "no {}: run make build", program.display());
        let dir = self.dir.path();
        let log = fs::File::options().create(true).append(true).open(dir.join("log")).context("the log")?;
        // nsenter becomes the daemon, as do the programs of the chroot, so the process is the
        // daemon's.
        let words = if words.is_empty() { self.launcher } else { words };
        let mut command = match &self.chroot {
            None => match words {
                [] => self.host.command(&program),
                [first, rest @ ..] => {
                    let mut command = self.host.command(first);
                    command.args(rest).arg(&program);
                    command
                }
            },
            Some(chroot) => {
                let script = "mount --rbind / \"$0\" && exec chroot \"$0\" \"$@\"";
                let mut command = self.host.command(Path::new("unshare"));
                command.args(["--mount", "--propagation=private", "sh", "-c", script]);
                command.arg(chroot).arg(&program);
                command
            }
        };
        command
            .arg("--root")
            .arg(self.root())
            .arg("--state")
            .arg(self.state())
            .arg("--socket")
            .arg(self.socket())
            .arg("--config")
            .arg(dir.join("berth.toml"))
            .arg("--shim")
            .arg(programs.join("berth-shim"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))
    }

    /// Ends it without a warning, as a crash does. Its containers go on running.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.process().take().context("the daemon does not run")?;
        child.kill().context("killing the daemon")?;
        let status = within(SOON, "the daemon ends", || Ok(child.try_wait()?))?;
        ensure!(status.signal() == Some(Signal::SIGKILL as i32), "the daemon had ended before: {status}");
        Ok(())
    }

    /// Ends it with SIGTERM and waits for its end.
    ///
    /// # Errors
    /// When it does not run, or does not end with success in time.
    pub fn stop(&self) -> Result<()> {
        let mut child = self.process().take().context("the daemon does not run")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM).context("stopping the daemon")?;
        let status = within(SOON, "the daemon ends", || Ok(child.try_wait()?))?;
        ensure!(status.success(), "the daemon ended with {status}");
        Ok(())
    }

    /// [`kill`](Self::kill), then [`start_again`](Self::start_again).
    ///
    /// # Errors
    /// Those of both.
    pub fn crash(&self) -> Result<()> {
        self.kill()?;
        self.start_again()
    }

    /// Asks it to reload its configuration, which it does some time later.
    ///
    /// # Errors
    /// When it does not run.
    pub fn reload(&self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid()?)?), Signal::SIGHUP)
            .context("telling the daemon to reload")
    }

    /// Its process id.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.process().as_ref().context("the daemon does not run")?.id())
    }

    /// A client of its socket. It outlives a crash of the daemon.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Its host.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The cgroup of pods that name no other.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The directory with all files of the daemon, its pods and the test.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its durable root.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Its runtime state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("berth.sock")
    }

    /// The parent directory of the pods' log directories.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.dir.path().join("logs")
    }

    /// Creates the directory `name` for the test's own files, and returns its path.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    }

    /// Writes the mirror rules of a registry's host (`hosts.toml`), or of every host for
    /// `_default`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn mirror(&self, host: &str, rules: &str) -> Result<()> {
        let directory = self.directory(&format!("certs.d/{host}"))?;
        fs::write(directory.join("hosts.toml"), rules).context("writing the mirror rules")
    }

    /// The request for a pod of this name, as a kubelet would write it: own network and IPC,
    /// RuntimeDefault for seccomp, its own log directory.
    #[must_use]
    pub fn pod_config(&self, name: &str) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-of-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs().join(name).to_string_lossy().into_owned(),
            linux: Some(v1::LinuxPodSandboxConfig {
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(own_namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Creates the pod of [`pod_config`](Self::pod_config).
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        self.pod_of(self.pod_config(name))
    }

    /// Creates a pod.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn pod_of(&self, config: v1::PodSandboxConfig) -> Result<Pod> {
        Ok(Pod::run(self.client(), config)?)
    }

    /// The `berth` command, for this daemon and on its host: the streaming server is on loopback
    /// there.
    ///
    /// # Errors
    /// When it was not built.
    pub fn berth(&self) -> Result<Command> {
        let program = programs()?.join("berth");
        ensure!(program.exists(), "no {}: run make build", program.display());
        let mut command = self.host.command(program);
        command.env("BERTH_SOCKET", self.socket()).stdin(Stdio::null());
        Ok(command)
    }

    /// Its log since the test began.
    ///
    /// # Errors
    /// When there is none.
    pub fn log(&self) -> Result<String> {
        let log = fs::read(self.dir.path().join("log")).context("reading the daemon's log")?;
        Ok(String::from_utf8_lossy(&log).into_owned())
    }

    /// The end of its log, for the message of a failed test.
    #[must_use]
    pub fn last_words(&self) -> String {
        last_lines("the daemon", &self.dir.path().join("log"))
    }

    fn process(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Daemon {
    #[expect(clippy::print_stderr, reason = "a test that panics has no other way to tell more")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.last_words());
        }
        if let Some(mut child) = self.process().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Shims are on the test's host, containers in its cgroup; dropping them ends both.
        if let Ok(host) = self.host.number() {
            for pid in crate::census::processes_in_network(host) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        self.cgroup.end_everything();
        for mount in crate::census::mounts_below(self.dir.path()).into_iter().rev() {
            // The host's own go with the host.
            if !["netns", "namespaces"].iter().any(|own| mount.starts_with(self.dir.path().join(own))) {
                let _ = umount2(&mount, MntFlags::MNT_DETACH);
            }
        }
    }
}

/// The namespaces that a kubelet requests when the pod's manifest does not mention them: the pod's
/// own network and IPC, and a pid namespace for each container.
#[must_use]
pub fn own_namespaces() -> v1::NamespaceOption {
    v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() }
}

/// The directory with the built programs.
///
/// # Errors
/// When it is not there.
pub fn programs() -> Result<PathBuf> {
    let directory = match std::env::var_os("BERTH_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist"),
    };
    directory.canonicalize().with_context(|| format!("no {}: run make build", directory.display()))
}
