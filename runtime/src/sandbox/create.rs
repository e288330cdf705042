//! RunPodSandbox.
//!
//! The steps build on each other, and [`super::stop::release`] undoes each of them: it looks at
//! what is there, and so works after a failure here, for a stop, and after a crash.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use berth_cgroup::{Ending, Limits};
use berth_model::id::SandboxId;
use berth_model::layout::SandboxFiles;
use berth_model::record::ProcessRecord;
use berth_model::sandbox::Config;
use berth_model::security::{NamespaceMode, Profile};
use berth_model::state::SandboxState;
use berth_seccomp::{CompileError, Filter};
use berth_shim_proto::launch;
use berth_sys::mount::{self, FsContext, attr};
use berth_sys::ns::{self, Kind};
use berth_sys::process::SIGKILL;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSyscall};

use super::creations::Creations;
use super::etc_files::{self, Contents};
use super::namespaces::{self, PodNetwork, Wanted};
use super::{PodProcess, Sandbox, SandboxError, hostname, stop, watch};
use crate::cadvisor;
use crate::clock::unix_ns;
use crate::host_paths::HostPathError;
use crate::names::Name;
use crate::network::{Attached, Chosen, Pod, Within};
use crate::node::Node;
use crate::random::random_bytes;
use crate::shim_client::Pause;

/// The pod's tmpfs, which limits what its containers can write to `/dev/shm` and to the shared
/// files of `/etc`, in memory that is charged to the writer. 64 MiB is the size of `/dev/shm` in
/// other runtimes.
const TMPFS_SIZE: &str = "65536k";

/// The first and the longest pause before what could not be cleaned up is tried again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Creates a sandbox. It is READY and visible on return; on an error nothing of it is left.
pub(crate) async fn create(node: Arc<Node>, config: Config) -> Result<Arc<Sandbox>, SandboxError> {
    let id = SandboxId::from_bytes(random_bytes().map_err(SandboxError::Id)?);
    let reservation = node.registry.reserve(Name::Sandbox(config.metadata.clone()), id.as_str())?;
    let making = node.clone();
    let sandbox = tokio::task::spawn_blocking(move || make(&making, id, config))
        .await
        .map_err(|_| SandboxError::Stopping)??;
    let sandbox = Arc::new(sandbox);
    sandbox.appear(|| node.registry.add_sandbox(sandbox.clone(), reservation));
    watch::watch(&sandbox);
    cadvisor::show(&node, &sandbox).await;
    Ok(sandbox)
}

fn make(node: &Arc<Node>, id: SandboxId, config: Config) -> Result<Sandbox, SandboxError> {
    let parent = node.cgroups.parent(&config.cgroup_parent)?;
    let files = node.layout.sandbox(&id);
    let mut sandbox = Sandbox {
        created_at_unix_ns: unix_ns(),
        boot_id: node.boot_id.clone(),
        hostname: hostname::of(&config)
            .map_err(SandboxError::file("read", Path::new(hostname::HOST_FILE)))?,
        addresses: Arc::default(),
        has_plugins: false,
        cgroup_parent: parent,
        state: Mutex::new(SandboxState::Ready),
        events: node.events.clone(),
        reporting: Mutex::default(),
        process: Mutex::new(None),
        creations: Creations::default(),
        stopping: tokio::sync::Mutex::default(),
        torn_down: Mutex::new(false),
        keeps_record: false,
        id,
        config: Arc::new(config),
        files,
    };
    match fill(node, &mut sandbox) {
        Ok(()) => Ok(sandbox),
        Err(error) => {
            if let Err(left) = undo(node, &sandbox) {
                // The first error is the one to report.
                tracing::warn!(sandbox = %sandbox.id, error = %crate::chain(&left), "cannot clean up after a sandbox that could not be created; trying again");
                tokio::spawn(undo_later(node.clone(), Arc::new(sandbox)));
            }
            Err(error)
        }
    }
}

/// Blocking.
fn undo(node: &Node, sandbox: &Sandbox) -> Result<(), SandboxError> {
    stop::release(node, sandbox)?;
    stop::remove_files(node, sandbox)
}

/// Tries until nothing of it is left, its address above all. If the daemon ends first, the next one
/// finds what is.
async fn undo_later(node: Arc<Node>, sandbox: Arc<Sandbox>) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        let (of, undone) = (node.clone(), sandbox.clone());
        match tokio::task::spawn_blocking(move || undo(&of, &undone)).await {
            Ok(Ok(())) => {
                tracing::info!(sandbox = %sandbox.id, "cleaned up after a sandbox that could not be created");
                return;
            }
            Ok(Err(_)) => {}
            // A bug, which is logged.
            Err(error) if error.is_panic() => {}
            // The daemon is stopping.
            Err(_) => return,
        }
    }
}

fn fill(node: &Node, sandbox: &mut Sandbox) -> Result<(), SandboxError> {
    let files = sandbox.files.clone();
    make_directories(&files)?;
    let config = sandbox.config.clone();
    if !config.log_directory.is_empty() {
        // A kubelet has created it; other clients rely on the runtime.
        node.host_paths.directory(Path::new(&config.log_directory)).map_err(|error| match error {
            HostPathError::Failed(failed) => {
                SandboxError::file("create the log directory", failed.path())(failed.source())
            }
            other => other.into(),
        })?;
    }
    let host_network = config.namespaces.network == NamespaceMode::Node;
    let network = if host_network { None } else { Some(choose_network(node)?) };
    let within = namespaces::make(&Wanted {
        sandbox,
        network: network.as_ref().map_or(PodNetwork::Node, PodNetwork::Own),
        ipc: config.namespaces.ipc != NamespaceMode::Node,
        hostname: (!host_network).then_some(sandbox.hostname.as_str()),
    })?;
    let attached = match within {
        None => None,
        Some(Within::Attached(attached)) => Some(attached),
        Some(Within::Plugins(plugins)) => {
            sandbox.has_plugins = true;
            let namespace = files.namespace(Kind::Network.file_name());
            let pod = Pod { id: &sandbox.id, config: &config, namespace: &namespace };
            Some(plugins.attach(&pod).map_err(SandboxError::Network)?)
        }
    };
    let addresses: Vec<String> =
        attached.iter().flat_map(Attached::addresses).map(ToString::to_string).collect();
    mount_tmpfs(&files, config.namespaces.ipc != NamespaceMode::Node)?;
    let contents = Contents {
        hostname: &sandbox.hostname,
        dns: config.dns.as_ref().or_else(|| attached.as_ref()?.dns.as_ref()),
        addresses: &addresses,
        host_network,
    };
    etc_files::write(&files, &contents)?;
    node.cgroups.create_named_parent(&sandbox.cgroup_parent)?;
    if config.namespaces.pid == NamespaceMode::Pod {
        let process = make_process(node, sandbox)?;
        *super::lock(&sandbox.process) = Some(process);
    }
    sandbox.addresses = addresses.into();
    let untold = files.untold();
    std::fs::write(&untold, []).map_err(SandboxError::file("write", &untold))?;
    sandbox.write_record()
}

fn choose_network(node: &Node) -> Result<Chosen<'_>, SandboxError> {
    let network = node.network.choose().map_err(SandboxError::Network)?;
    network.check().map_err(SandboxError::Network)?;
    Ok(network)
}

fn make_directories(files: &SandboxFiles) -> Result<(), SandboxError> {
    for path in [&files.durable, &files.state] {
        std::fs::DirBuilder::new().mode(0o700).create(path).map_err(SandboxError::file("create", path))?;
    }
    Ok(())
}

/// Mounts the pod's tmpfs. One mount holds everything that containers of the pod can write to in
/// the runtime directory: each mount of the host makes the start of every container slower, whose
/// mount namespace begins as a copy of the host's.
fn mount_tmpfs(files: &SandboxFiles, has_shm: bool) -> Result<(), SandboxError> {
    let path = files.tmpfs();
    let failed = || SandboxError::file("mount the pod's tmpfs on", &path);
    std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed())?;
    let mounted = FsContext::open(c"tmpfs")
        .and_then(|tmpfs| {
            tmpfs.set("source", "shm".as_ref())?;
            tmpfs.set("size", TMPFS_SIZE.as_ref())?;
            // Containers see its contents, never the directory itself.
            tmpfs.set("mode", "700".as_ref())?;
            tmpfs.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC)
        })
        .map_err(failed())?;
    let target = std::fs::File::open(&path).map_err(failed())?;
    mount::attach(mounted.as_fd(), target.as_fd()).map_err(failed())?;
    let make = |path: &Path, mode: u32| {
        // The daemon's umask is strict, and no other process is in there yet.
        std::fs::DirBuilder::new()
            .mode(mode)
            .create(path)
            .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
            .map_err(SandboxError::file("create", path))
    };
    make(&files.etc_directory(), 0o700)?;
    if has_shm { make(&files.shm(), 0o1777) } else { Ok(()) }
}

/// Creates process 1 of the pod's pid namespace, in its own cgroup below the pod's, and pins the
/// namespace.
fn make_process(node: &Node, sandbox: &Sandbox) -> Result<PodProcess, SandboxError> {
    // It has nothing to clean up, and handles no other signal.
    let ending = Ending { signal: SIGKILL, grace: Duration::ZERO, before: None };
    let (cgroup, holder) = node.cgroups.make(
        &node.shim,
        &sandbox.cgroup_parent,
        sandbox.id.as_str(),
        &Limits::default(),
        ending,
    )?;
    let host = &sandbox.config.namespaces;
    let pinned = |kind: Kind, mode: NamespaceMode| match mode {
        NamespaceMode::Node => Vec::new(),
        _ => sandbox.files.namespace(kind.file_name()).into_os_string().into_vec(),
    };
    let filter = reaping_filter().map_err(SandboxError::Seccomp)?;
    let request = launch::Pause {
        cgroup: crate::container::cgroup_plan(&cgroup),
        apparmor_profile: apparmor_profile(node, &sandbox.config)?.unwrap_or_default().to_owned(),
        namespaces: launch::Namespaces {
            network: pinned(Kind::Network, host.network),
            ipc: pinned(Kind::Ipc, host.ipc),
            // Pinned with the network namespace.
            uts: pinned(Kind::Uts, host.network),
            own_cgroup: true,
            ..launch::Namespaces::default()
        },
        seccomp_filter: filter.bytes.clone(),
    };
    let Pause { created, pid_namespace, procfs } =
        node.shim.spawn_pause(&request).map_err(SandboxError::Process)?;
    drop(holder);
    let record = ProcessRecord { pid: created.pid, start_time: created.start_time };
    let process = PodProcess::find(record).ok_or_else(|| {
        SandboxError::namespace("find the pod's first process")(std::io::ErrorKind::NotFound.into())
    })?;
    let path = sandbox.files.namespace(Kind::Pid.file_name());
    let kept = ns::pin_fd(pid_namespace.as_fd(), &path)
        .map_err(SandboxError::file("pin the namespace", &path))
        .and_then(|()| namespaces::mount_procfs(&sandbox.files, procfs.as_fd()));
    if let Err(error) = kept {
        process.kill();
        return Err(error);
    }
    Ok(process)
}

/// The filter of a pod's own process: the same for all, and compiled once.
fn reaping_filter() -> Result<&'static Filter, CompileError> {
    static FILTER: OnceLock<Filter> = OnceLock::new();
    if let Some(filter) = FILTER.get() {
        return Ok(filter);
    }
    let filter = berth_seccomp::compile(&reaping())?;
    Ok(FILTER.get_or_init(|| filter))
}

/// A seccomp profile for what a pod's own process does.
fn reaping() -> LinuxSeccomp {
    let mut rule = LinuxSyscall::default();
    rule.set_names(launch::REAPING.map(str::to_owned).into()).set_action(LinuxSeccompAction::ScmpActAllow);
    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(LinuxSeccompAction::ScmpActErrno).set_syscalls(Some(vec![rule]));
    profile
}

/// The profile of a pod's own process: the default, so that no container can abuse an unconfined
/// process. An unconfined pod does without if need be.
fn apparmor_profile(node: &Node, config: &Config) -> Result<Option<&'static str>, SandboxError> {
    match node.default_apparmor_profile.name() {
        Err(_) if config.privileged || config.apparmor == Profile::Unconfined => Ok(None),
        other => other.map_err(SandboxError::AppArmor),
    }
}
