//! The daemon as a whole: start, serving, shutdown.

use std::future::Future;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_cgroup::{Driver, Hierarchy, Naming, Parent, Systemd};
use berth_checkup::{Finding, Grade};
use berth_image::Store;
use berth_model::layout::Layout;
use berth_sys::mount::{self, Propagation};
use berth_sys::process::{self, RLIMIT_NOFILE};

use crate::apparmor::DefaultProfile;
use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::container::output_room::OutputRoom;
use crate::cri::{ImageService, RuntimeService};
use crate::directory_lock::{self, Locked, Refused};
use crate::events::Events;
use crate::file_error::FileError;
use crate::handlers::Handlers;
use crate::host_paths::HostPaths;
use crate::housekeeping;
use crate::network::{Network, NetworkError};
use crate::node::Node;
use crate::notify::{self, Notifier};
use crate::oci_spec::HostFacts;
use crate::recovery::{self, RecoveryError};
use crate::registry::Registry;
use crate::reload::{self, Reload};
use crate::reload_request::Progress;
use crate::selinux;
use crate::shim_client::ShimProgram;
use crate::streaming::{Streaming, StreamingError};
use crate::{api, apparmor, cadvisor, server};

/// Major and minor version of the oldest supported kernel.
const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// The fewest descriptors to start with. The daemon's own files and sockets take 40, and each call
/// some.
const LEAST_DESCRIPTORS: u64 = 64;

/// How often the network is checked, and repaired if needed.
const NETWORK_LOOK: Duration = Duration::from_secs(5);

/// The time that the kernel has to remove the interface of a pod that was released, before that is
/// looked at.
const NETWORK_RELEASED: Duration = Duration::from_millis(200);

/// How long the lock of a root or state may be held by a process that is about to end, and how
/// often to check.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Why the daemon cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// One of its own files or directories.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its own directory cannot be written to.
    #[error(
        "{path} is on a read-only file system: mount it writable, or give berthd another --root and --state"
    )]
    ReadOnly {
        /// The file or directory.
        path: PathBuf,
    },
    /// The kernel lacks required features: the mount API by descriptor, pidfds, cgroup.kill.
    #[error("Linux {release} is too old: boot 5.15 or newer")]
    Kernel {
        /// Its version.
        release: String,
    },
    /// It could not answer anybody.
    #[error(
        "the limit on open files is {limit}, and berthd needs at least {LEAST_DESCRIPTORS}: raise it, by LimitNOFILE= in its unit or by ulimit -Hn"
    )]
    Descriptors {
        /// The limit.
        limit: u64,
    },
    /// Another daemon uses the same root or state.
    #[error("another berthd uses {path}: {holder}; give this one its own --root and --state")]
    Taken {
        /// The directory.
        path: PathBuf,
        /// Who that is.
        holder: String,
    },
    /// The image store.
    #[error("cannot open the image store")]
    Images(#[source] berth_image::StoreError),
    /// The cgroups.
    #[error("cannot find the cgroup hierarchies")]
    Cgroups(#[source] berth_cgroup::Error),
    /// The configured driver does not work here.
    #[error(
        "the systemd cgroup driver needs cgroup v2 with its controllers; boot with systemd.unified_cgroup_hierarchy=1, or set [cgroup] driver to cgroupfs"
    )]
    SystemdOnLegacy,
    /// The configured driver does not work here.
    #[error("the systemd cgroup driver needs systemd as process 1; set [cgroup] driver to cgroupfs")]
    NoSystemd,
    /// The thread that talks to systemd.
    #[error("cannot start the thread that talks to systemd")]
    Systemd(#[source] io::Error),
    /// The network.
    #[error("cannot set up the pods' network")]
    Network(#[source] NetworkError),
    /// The host.
    #[error("cannot determine {what}")]
    Host {
        /// What could not be determined.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The objects of the previous daemon.
    #[error("cannot recover the pods of the previous daemon")]
    Recovery(#[from] RecoveryError),
    /// The streaming server.
    #[error(transparent)]
    Streaming(#[from] StreamingError),
    /// The socket.
    #[error("cannot serve")]
    Serve(#[source] server::ServeError),
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DaemonError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => DaemonError::ReadOnly { path },
        _ => FileError { action, path, source }.into(),
    }
}

/// Serves until `stop` resolves, and applies a new configuration whenever `reload` delivers
/// one. Pods keep running after that: the next daemon finds them.
///
/// # Errors
/// [`DaemonError`], with advice where there is any.
pub async fn run(config: Config, stop: impl Future<Output = ()>, reload: Reload) -> Result<(), DaemonError> {
    let notifier = Arc::new(Notifier::from_environment());
    raise_descriptor_limit()?;
    check_kernel(&release())?;
    let layout = Layout::new(config.root.clone(), config.state.clone());
    prepare(&layout)?;
    let root_places = [layout.root().join("berthd.lock"), layout.sandboxes(), layout.containers()];
    let root = take(layout.root(), &root_places).await?;
    // Only the directory itself: if it is full, the daemon is needed even more.
    let state_places = [layout.state().to_owned(), layout.sandbox_states(), layout.container_states()];
    let state = take(layout.state(), &state_places).await?;
    if !root.over.is_empty() {
        // Such a daemon has the image store's own lock as well.
        let path = layout.root().join("lock");
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file("remove", &path)(error));
            }
            _ => {}
        }
    }
    // Until this process has ended, not only until it serves no more: a call that waits in the
    // kernel by then may still write.
    Box::leak(Box::new((root, state)));
    make_private(layout.state())?;
    let node = tokio::task::spawn_blocking(move || open(config, layout)).await.map_err(|error| {
        DaemonError::Host { what: "how the start went", source: io::Error::other(error) }
    })??;
    let node = Arc::new(node);
    notifier.status("recovering the pods of the previous daemon");
    let remains = recovery::run(&node).await?;
    let watchers = [tokio::spawn(watch_network(node.clone())), tokio::spawn(clear_network(node.clone()))];
    let config = node.config();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"), socket = %config.socket.display(),
        cgroup = if node.cgroups.hierarchy.is_unified() { 2 } else { 1 }, cgroup_driver = %node.cgroups.driver, network = node.network.description().name, "berthd is serving"
    );
    let streaming = Streaming::start(&config.streaming)?;
    let services = server::Services {
        streams: streaming.local(),
        runtime: RuntimeService::new(node.clone(), streaming),
        image: ImageService::new(node.clone()),
        berth: api::Service::new(node.clone()),
    };
    // A disk that hangs would delay the socket.
    let telling = node.clone();
    tokio::spawn(async move { tell_what_the_node_lacks(&telling).await });
    let progress =
        Progress::create(node.layout.state()).map_err(file("create a file in", node.layout.state()))?;
    let alive = tokio::spawn(keep_alive(notifier.clone(), node.clone()));
    let mut reloads = None;
    let listening = || {
        tokio::spawn(remains.clear(node.clone()));
        notifier.ready(&status(&node));
        housekeeping::begin(&node);
        reloads = Some(tokio::spawn(reload::serve(node.clone(), notifier.clone(), status, reload, progress)));
    };
    let stopping = async {
        stop.await;
        notifier.stopping();
        // Their streams have no other end, and calls are waited for.
        node.events.close();
    };
    // Before the kubelet finds the CRI, since its cAdvisor looks for this socket only once, right
    // after.
    let cadvisor = cadvisor::start(&node).await;
    let served =
        server::serve(&config.socket, services, listening, stopping).await.map_err(DaemonError::Serve);
    if let Some(socket) = cadvisor {
        socket.close();
    }
    watchers.iter().for_each(tokio::task::JoinHandle::abort);
    alive.abort();
    if let Some(reloads) = reloads {
        reloads.abort();
    }
    tracing::info!("berthd is stopping; pods keep running");
    if node.registry.is_empty() {
        // Without pods nothing is mounted in there, so no mount is left behind. Failure is
        // harmless.
        let _ = mount::detach(node.layout.state());
    }
    served
}

/// The daemon holds a connection for each container. Programs that it starts get their own limits:
/// [`crate::rlimits`].
fn raise_descriptor_limit() -> Result<(), DaemonError> {
    let limit = process::rlimit(RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if hard < LEAST_DESCRIPTORS {
            return Ok(hard);
        }
        process::set_rlimit(RLIMIT_NOFILE, hard, hard).map(|()| hard).or_else(|error| {
            tracing::warn!(%error, "cannot raise the limit on open files");
            Ok(soft)
        })
    });
    match limit {
        Ok(limit) if limit < LEAST_DESCRIPTORS => Err(DaemonError::Descriptors { limit }),
        Ok(_) => Ok(()),
        Err(source) => Err(DaemonError::Host { what: "the limit on open files", source }),
    }
}

/// Refuses a kernel that is too old; one with an unparsable version may be new enough.
fn check_kernel(release: &str) -> Result<(), DaemonError> {
    match kernel_version(release) {
        Some(version) if version < OLDEST_KERNEL => {
            Err(DaemonError::Kernel { release: release.trim_end().to_owned() })
        }
        _ => Ok(()),
    }
}

/// The kernel's release, from uname(2).
fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// Major and minor version in a release such as `6.1.0-18-amd64`.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|text| text.parse::<u32>().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn prepare(layout: &Layout) -> Result<(), DaemonError> {
    let directories = [
        layout.root().to_owned(),
        layout.state().to_owned(),
        layout.sandboxes(),
        layout.containers(),
        layout.trash(),
        layout.quarantine(),
        layout.network(),
        layout.sandbox_states(),
        layout.container_states(),
    ];
    for path in directories {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(file("create", &path))?;
    }
    // Only root may get through, also into directories that an older version made: images hold
    // setuid programs.
    for path in [layout.root(), layout.state()] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .map_err(file("set the mode of", path))?;
    }
    Ok(())
}

/// Takes a directory for this daemon alone.
///
/// A daemon that was killed while starting a shim leaves a child between clone and exec, which
/// holds the lock until the exec closes it (flock(2): a lock belongs to the open file, which
/// children share). And two daemons that start at the same time give way to each other. So this
/// tries again for a while.
async fn take(directory: &Path, places: &[PathBuf]) -> Result<Locked, DaemonError> {
    let end = tokio::time::Instant::now() + LOCK_PATIENCE;
    let locked = loop {
        match directory_lock::try_take(places) {
            Ok(locked) => break locked,
            Err(Refused::Taken(_)) if tokio::time::Instant::now() < end => {
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            Err(Refused::Taken(holder)) => {
                return Err(DaemonError::Taken { path: directory.to_owned(), holder: holder.to_string() });
            }
            Err(Refused::File { action, path, source }) => return Err(file(action, &path)(source)),
        }
    };
    for pid in &locked.over {
        tracing::warn!(
            pid, path = %directory.display(),
            "took over from a daemon that was killed and cannot end, as it waits in the kernel for a path that does not answer"
        );
    }
    Ok(locked)
}

/// Makes the runtime state a separate, private mount: namespaces pinned and memory mounted in
/// it would otherwise be copied into every new mount namespace, and stay there.
fn make_private(state: &Path) -> Result<(), DaemonError> {
    if !is_mount_point(state).map_err(file("examine", state))? {
        mount::bind(state, state).map_err(file("bind-mount onto itself", state))?;
    }
    mount::set_propagation(state, Propagation::Private, false).map_err(file("make private", state))
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    let path = path.canonicalize()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    // Field 5 is the mount point, proc_pid_mountinfo(5); paths with spaces are escaped and not
    // found, which results in a second, harmless mount.
    Ok(mounts.lines().any(|line| line.split(' ').nth(4).is_some_and(|point| Path::new(point) == path)))
}

fn open(config: Config, layout: Layout) -> Result<Node, DaemonError> {
    let host = |what| move |source| DaemonError::Host { what, source };
    let shim = ShimProgram::load(&config.shim).map_err(file("load the shim", &config.shim))?;
    let hierarchy = Hierarchy::detect().map_err(DaemonError::Cgroups)?;
    let cgroup_driver = driver(&config, &hierarchy)?;
    let default_cgroup_parent = default_parent(&config, cgroup_driver)?;
    let systemd = match cgroup_driver {
        Driver::Cgroupfs => None,
        Driver::Systemd => Some(Systemd::new().map_err(DaemonError::Systemd)?),
    };
    let images = Store::open(layout.root(), config.images.clone()).map_err(DaemonError::Images)?;
    let known = recovery::known_networks(&layout);
    let tokio = tokio::runtime::Handle::current();
    let for_cni = HostPaths::for_cni(tokio.clone());
    let network = Network::set_up(&config, &layout, for_cni, &known).map_err(DaemonError::Network)?;
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(host("the boot id"))?;
    let facts = HostFacts {
        bounding: berth_sys::credentials::bounding_set().map_err(host("the capabilities"))?,
        unified_cgroups: hierarchy.is_unified(),
        apparmor: apparmor::is_enabled(),
        selinux_is_on: selinux::is_enabled(),
        kernel: kernel_version(&release())
            .ok_or_else(|| host("the kernel's version")(io::ErrorKind::InvalidData.into()))?,
    };
    let default_apparmor_profile = DefaultProfile::new(facts.apparmor);
    let imports = Arc::new(HostPaths::for_imports(tokio.clone()));
    let host_paths = Arc::new(HostPaths::new(tokio));
    let registry = Registry::default();
    Ok(Node {
        layout,
        default_apparmor_profile,
        cgroups: Cgroups::new(
            hierarchy,
            default_cgroup_parent,
            systemd,
            config.root.clone(),
            host_paths.clone(),
        ),
        handlers: Handlers::own(),
        shim,
        host_paths,
        imports,
        network,
        images,
        filters: berth_seccomp::Cache::new(),
        events: Events::new(registry.snapshots()),
        registry,
        output_room: OutputRoom::default(),
        boot_id: boot_id.trim().to_owned(),
        facts,
        said: std::sync::Mutex::default(),
        config: std::sync::Mutex::new(Arc::new(config)),
    })
}

/// Logs the findings of `berth doctor`.
async fn tell_what_the_node_lacks(node: &Arc<Node>) {
    let config = node.config();
    let images = &config.images;
    let daemon = berth_checkup::Daemon {
        root: node.layout.root().to_owned(),
        state: node.layout.state().to_owned(),
        socket: config.socket.clone(),
        cgroup_driver: node.cgroups.driver.to_string(),
        network_kind: config.network.kind.to_string(),
        cni_config_directory: config.network.cni.config_directory.clone(),
        cni_plugin_directories: config.network.cni.plugin_directories.clone(),
        bridge: config.network.bridge.name.to_string(),
        min_free_bytes: images.min_free_bytes,
        min_free_percent: images.min_free_percent,
        cadvisor_socket: config.cadvisor_socket.clone(),
    };
    let looking = node.clone();
    // A panic in there is a bug, which is logged.
    let Ok(found) = tokio::task::spawn_blocking(move || looking.host_paths.checkup(&daemon)).await else {
        return;
    };
    let findings = found.unwrap_or_else(|error| {
        tracing::warn!(error = crate::chain(&error), "cannot find out what this node lacks");
        Vec::new()
    });
    for Finding { grade, subject, text } in findings {
        let subject = subject.as_ref();
        match grade {
            Grade::Broken => tracing::error!(subject, "{text}"),
            Grade::Note => tracing::warn!(subject, "{text}"),
            Grade::Good => tracing::debug!(subject, "{text}"),
        }
    }
}

/// Notifies the service manager's watchdog, as long as the daemon answers its own requests.
async fn keep_alive(notifier: Arc<Notifier>, node: Arc<Node>) {
    let probe = || async {
        notify::ask_the_daemon(&node.config().socket).await?;
        Ok(status(&node))
    };
    notifier.keep_alive(probe).await;
}

/// The status line for the service manager.
fn status(node: &Node) -> String {
    let (pods, containers) = (node.registry.sandboxes().len(), node.registry.containers().len());
    let mut text = format!("serving {pods} pods, {containers} containers");
    if let Err(broken) = node.network.state() {
        text.push_str(&format!("; network: {}", broken.message));
    }
    let faults = node.images.faults();
    if let Some(first) = faults.first() {
        text.push_str(&format!("; {} faults in the image store, the first: {first}", faults.len()));
    }
    text
}

/// The configured driver, else the one whose form the configured parent has, else the one
/// that fits the node.
fn driver(config: &Config, hierarchy: &Hierarchy) -> Result<Driver, DaemonError> {
    let found = Driver::detect(hierarchy);
    let named = config.cgroup_driver.or(config.cgroup_parent.as_ref().map(Parent::driver));
    match named.unwrap_or(found) {
        Driver::Systemd if !hierarchy.is_unified() => Err(DaemonError::SystemdOnLegacy),
        Driver::Systemd if found != Driver::Systemd => Err(DaemonError::NoSystemd),
        driver => Ok(driver),
    }
}

/// The parent of pods that name none. A configured one has the form of the driver. How it names its
/// leaves applies to all parents.
fn default_parent(config: &Config, driver: Driver) -> Result<Parent, DaemonError> {
    let default = match driver {
        Driver::Cgroupfs => "/berth",
        Driver::Systemd => "berth.slice",
    };
    let parent = match &config.cgroup_parent {
        None => Parent::default_of_daemon(driver, default).map_err(DaemonError::Cgroups)?,
        Some(parent) => parent.clone(),
    };
    let naming = if config.cadvisor_socket.is_some() { Naming::Crio } else { Naming::Own };
    Ok(parent.with_naming(naming))
}

/// Checks and repairs the network while the daemon serves.
async fn watch_network(node: Arc<Node>) {
    loop {
        tokio::time::sleep(NETWORK_LOOK).await;
        let looking = node.clone();
        // Netlink and, for a repair, a program: both block. A panic in there is a bug, which is
        // logged.
        let _ = tokio::task::spawn_blocking(move || looking.network.look()).await;
    }
}

/// Frees addresses as soon as nothing has them any more.
async fn clear_network(node: Arc<Node>) {
    loop {
        node.network.released().await;
        loop {
            // Other pods that end meanwhile are looked at together.
            tokio::time::sleep(NETWORK_RELEASED).await;
            let clearing = node.clone();
            // A panic in there is a bug, which is logged.
            let cleared = tokio::task::spawn_blocking(move || clearing.network.clear_released()).await;
            match cleared {
                Ok(Ok(false)) | Err(_) => break,
                Ok(Ok(true)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(
                        error = crate::chain(&error),
                        "cannot free addresses of pods that have gone; trying again"
                    );
                    tokio::time::sleep(NETWORK_LOOK).await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_too_old_is_refused_in_words() {
        for release in ["5.14.21-150500-default\n", "4.19.0-27-amd64\n", "3.10.0\n"] {
            let refused = check_kernel(release).unwrap_err().to_string();
            assert!(refused.contains(release.trim_end()) && refused.contains("5.15"), "{refused}");
        }
        for release in
            ["5.15.0\n", "6.12.48+deb13-amd64\n", "7.0-rc1\n", "10.1\n", "", "six\n", "99999999999.1"]
        {
            assert!(check_kernel(release).is_ok(), "{release:?}");
        }
    }

    #[test]
    fn a_read_only_root_is_told_with_what_to_do() {
        let error = file("create", Path::new("/var/lib/berth"))(io::ErrorKind::ReadOnlyFilesystem.into());
        assert!(error.to_string().contains("/var/lib/berth is on a read-only file system"), "{error}");
    }
}
