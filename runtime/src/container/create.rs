//! CreateContainer: everything up to the exec of the program.
//!
//! Prepared on a blocking thread (files, cgroup, spec, plan), then one message to a new shim. On success the record is written last: it is what
//! makes the container exist. On failure everything is taken back, in [`undo`]; what a crash leaves half-way is found by the next start, by
//! the missing record.

use super::target::{Target, verified_target};
use super::{Container, ContainerError, cgroup_plan, follow, lock, shutdown};
use crate::apparmor;
use crate::node::{Node, random_bytes, unix_ns};
use crate::oci_spec::{self, CgroupDirectory, Inputs, devices, mounts, stop_signal::stop_signal};
use crate::plan::{self, Extra, PidPath};
use crate::registry::Name;
use crate::sandbox::create::HOSTNAME_FILE;
use crate::sandbox::{Creation, Sandbox};
use crate::shim_client::{Holder, ShimClient};
use crate::trash;
use ::oci_spec::runtime::{LinuxSeccomp, Spec};
use berth_cgroup::Cgroup;
use berth_image::{Image, Lease};
use berth_model::container::Config;
use berth_model::id::ContainerId;
use berth_model::layout::ContainerFiles;
use berth_model::record::{ContainerRecord, ProcessRecord};
use berth_model::security::Profile;
use berth_seccomp::Circumstances;
use berth_shim_proto::launch::{ENTERING, LAST_FILTER, Launch};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The largest seccomp profile that is read. Docker's default has 14 KiB.
const MAX_PROFILE_BYTES: u64 = 1024 * 1024;

/// How long the cgroup of a container that failed may take to go.
const CGROUP_GONE: Duration = Duration::from_secs(10);

/// SIGTERM, what Stop sends when neither request nor image says.
const SIGTERM: i32 = 15;

/// Makes a container, which is CREATED on return. On an error nothing of it is left.
pub(crate) async fn create(
    node: Arc<Node>,
    sandbox: Arc<Sandbox>,
    config: Config,
) -> Result<Arc<Container>, ContainerError> {
    let stopped = ContainerError::SandboxNotReady { id: sandbox.id().clone() };
    let Some(creation) = sandbox.begin_creation().map(Arc::new) else { return Err(stopped) };
    // In a task of its own, which takes back what it has made whenever it comes to its end: a path of the host may hang.
    let making = tokio::spawn(make(node, sandbox, config, creation.clone()));
    tokio::select! {
        made = making => made.map_err(|_| ContainerError::Stopping)?,
        () = creation.given_up() => Err(stopped),
    }
}

async fn make(
    node: Arc<Node>,
    sandbox: Arc<Sandbox>,
    config: Config,
    creation: Arc<Creation>,
) -> Result<Arc<Container>, ContainerError> {
    let id = ContainerId::from_bytes(random_bytes().map_err(ContainerError::Id)?);
    let name = Name::Container(sandbox.id().clone(), config.metadata.clone());
    let reservation = node.registry.reserve(name, id.as_str())?;

    // Its layers stay, whoever removes it, until the registry says that a container uses it.
    let image = node.images.lease(&config.image).map(Arc::new);
    let image = image.ok_or_else(|| ContainerError::NoImage { image: config.image.clone() })?;
    let (preparing, within, leased, stop) = (node.clone(), sandbox.clone(), image.clone(), creation.clone());
    let making = async {
        let prepare = move || prepare(&preparing, &within, &leased, id, config, &stop);
        let prepared = tokio::task::spawn_blocking(prepare).await.map_err(|_| ContainerError::Stopping)??;
        let show = |container: &Arc<Container>| {
            creation.finish(|| node.registry.add_container(container.clone(), reservation))
        };
        launch(&node, prepared, &creation, show).await
    };
    let made = making.await;
    let container = match made {
        Ok(container) => container,
        Err(error) => {
            drop(image);
            node.collect_images();
            return Err(error);
        }
    };
    drop(image);
    follow::watch(&container);
    tracing::info!(
        container = %container.id(), name = %container.config().metadata.name, sandbox = %sandbox.id(), "container is created"
    );
    Ok(container)
}

/// What is ready for the shim.
struct Prepared {
    record: ContainerRecord,
    files: ContainerFiles,
    cgroup: Cgroup,
    /// In the cgroup until the container's process is.
    holder: Option<Holder>,
    target: Option<Target>,
    spec: Spec,
    plan: Launch,
}

/// What there is to take back.
struct Made {
    files: ContainerFiles,
    cgroup: Option<Cgroup>,
}

fn prepare(
    node: &Node,
    sandbox: &Sandbox,
    lease: &Lease,
    id: ContainerId,
    config: Config,
    creation: &Creation,
) -> Result<Prepared, ContainerError> {
    let mut made = Made { files: node.layout.container(&id), cgroup: None };
    prepare_from(node, sandbox, lease, id, config, creation, &mut made).inspect_err(|_| undo(node, &made))
}

fn prepare_from(
    node: &Node,
    sandbox: &Sandbox,
    lease: &Lease,
    id: ContainerId,
    config: Config,
    creation: &Creation,
    made: &mut Made,
) -> Result<Prepared, ContainerError> {
    let image = lease.image();
    let lower_dirs =
        lease.lower_dirs().map_err(|source| ContainerError::Image { image: config.image.clone(), source })?;
    if lower_dirs.is_empty() {
        let reason = "it has no layers, and so nothing to run".to_owned();
        return Err(ContainerError::ImageConfig { image: config.image.clone(), reason });
    }
    let stop_signal = effective_stop_signal(&config, image)?;
    check_user(&config, image)?;
    let target = verified_target(node, sandbox, &config)?;
    let target_namespace = target.as_ref().map(Target::namespace_path);
    let mounts = mounts::resolve_mounts(&config.mounts).map_err(|error| ContainerError::Mount {
        path: "config.mounts".to_owned(),
        reason: crate::chain(&error),
    })?;
    let asked_devices = devices::resolve_devices(&config.devices).map_err(|error| ContainerError::Mount {
        path: "config.devices".to_owned(),
        reason: crate::chain(&error),
    })?;
    devices::check_mounted(&asked_devices, &mounts).map_err(|error| ContainerError::Mount {
        path: "config.devices".to_owned(),
        reason: crate::chain(&error),
    })?;
    // Each time: disks come and go.
    let host_devices = match config.security.privileged {
        true => devices::host_devices().map_err(|error| ContainerError::Mount {
            path: "the host's devices".to_owned(),
            reason: crate::chain(&error),
        })?,
        false => Vec::new(),
    };
    let volumes = mounts::image_volumes(&config, image.config())?;
    let default_apparmor_profile = default_apparmor_profile(node, &config)?;
    check_apparmor(node, &config)?;
    // What comes before this looks at paths of the host, which may hang.
    if creation.is_given_up() {
        return Err(ContainerError::SandboxNotReady { id: sandbox.id().clone() });
    }

    make_directories(&made.files, &lower_dirs)?;
    let limits = oci_spec::limits(&config.resources);
    let ending = shutdown::ending(&config, stop_signal, sandbox.id().as_str());
    let (cgroup, holder) = node.make_cgroup(sandbox.cgroup_parent(), id.as_str(), &limits, ending)?;
    let cgroup = made.cgroup.insert(cgroup);
    cgroup.set_devices(&oci_spec::device_policy(config.security.privileged, &asked_devices))?;

    let seccomp = seccomp_profile(node, &config)?;
    let hostname = sandbox.hostname().map_err(ContainerError::file("read", Path::new(HOSTNAME_FILE)))?;
    let inputs = Inputs {
        container_id: &id,
        config: &config,
        files: &made.files,
        sandbox_id: sandbox.id(),
        sandbox: sandbox.config(),
        sandbox_files: sandbox.files(),
        hostname: &hostname,
        image: image.config(),
        image_name: image.repo_tags().first().map_or(config.image.as_str(), String::as_str),
        mounts: &mounts,
        devices: &asked_devices,
        host_devices: &host_devices,
        default_apparmor_profile,
        cgroup_path: cgroup.path(),
        cgroup_directories: &cgroup_directories(node, cgroup),
        target_pid_namespace: target_namespace.as_deref(),
        seccomp: seccomp.as_ref(),
        rlimits: &node.config().rlimits,
        host: &node.facts,
    };
    let spec = oci_spec::build(&inputs)?;
    // The spec has the last word: a privileged container has no profile in it.
    let filter = match spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) {
        Some(profile) => Some(
            node.filters
                .get(profile)
                .map_err(|error| ContainerError::Seccomp { reason: crate::chain(&error) })?,
        ),
        None => None,
    };
    let entry = match &filter {
        Some(filter) => filter
            .for_entering(&ENTERING, LAST_FILTER)
            .map_err(|error| ContainerError::Seccomp { reason: crate::chain(&error) })?,
        None => Vec::new(),
    };
    let procfs = sandbox.files().procfs();
    let sandbox_log = Path::new(&sandbox.config().log_directory);
    let has_log = !sandbox.config().log_directory.is_empty() && !config.log_path.is_empty();
    let plan = plan::launch(
        &spec,
        &Extra {
            container_id: &id,
            user: &config.security.user,
            image_user: image.user(),
            lower_dirs: &lower_dirs,
            upper_dir: &made.files.upper(),
            work_dir: &made.files.work(),
            volumes: &volumes,
            log: has_log.then_some((sandbox_log, Path::new(&config.log_path))),
            exit_record: &made.files.exit_record(),
            stdin: config.stdin,
            cgroup: &cgroup_plan(cgroup),
            seccomp: filter.as_ref().map(|filter| plan::Filter {
                program: &filter.bytes,
                flags: filter.flags,
                entry: &entry,
            }),
            pid_namespace: if target.is_some() { PidPath::Target } else { PidPath::Pod(&procfs) },
        },
    )?;
    let log_path =
        if has_log { sandbox_log.join(&config.log_path).display().to_string() } else { String::new() };
    let record = ContainerRecord {
        sandbox_id: sandbox.id().clone(),
        image_id: image.id().to_string(),
        image_name: image.repo_tags().first().cloned().unwrap_or_default(),
        image_ref: image.repo_digests().first().cloned().unwrap_or_default(),
        created_at_unix_ns: unix_ns(),
        stop_signal,
        log_path,
        cgroup: cgroup.path().to_owned(),
        id,
        config,
        ..ContainerRecord::default()
    };
    Ok(Prepared { record, files: made.files.clone(), cgroup: cgroup.clone(), holder, target, spec, plan })
}

/// Starts the shim, lets it make the container, records it, and makes it visible by `show`, which says whether it is wanted still.
async fn launch(
    node: &Arc<Node>,
    prepared: Prepared,
    creation: &Creation,
    show: impl FnOnce(&Arc<Container>) -> bool,
) -> Result<Arc<Container>, ContainerError> {
    let Prepared { mut record, files, cgroup, holder, target, mut spec, plan } = prepared;
    let made = Made { files: files.clone(), cgroup: Some(cgroup.clone()) };
    let result = async {
        let shim = Arc::new(ShimClient::spawn(&node.shim, &files.state)?);
        let made = tokio::select! {
            made = shim.create(plan, target.map(Target::into_descriptors)) => made.map_err(ContainerError::from),
            () = creation.given_up() => Err(ContainerError::SandboxNotReady { id: record.sandbox_id.clone() }),
        };
        let created = match made {
            Ok(created) => {
                if let Some(holder) = holder {
                    // It is killed and waited for. A task that cannot run any more drops it too.
                    let _ = tokio::task::spawn_blocking(move || drop(holder)).await;
                }
                created
            }
            Err(error) => {
                shim.discard().await;
                return Err(error);
            }
        };
        for note in &created.notes {
            if node.is_new(note) {
                tracing::warn!(note, "done in a weaker way, for this container and others like it");
            } else {
                tracing::debug!(container = %record.id, note, "done in a weaker way");
            }
        }
        record.process = Some(ProcessRecord { pid: created.pid, start_time: created.start_time });
        (record.uid, record.gid, record.groups) = (created.uid, created.gid, created.groups);
        oci_spec::set_user(&mut spec, record.uid, record.gid, &record.groups);
        let container = Arc::new(Container::new(record, files, cgroup));
        *lock(&container.shim) = Some(shim.clone());
        if let Err(error) = write_files(&container, &spec) {
            shim.discard().await;
            return Err(error);
        }
        if !show(&container) {
            shim.discard().await;
            return Err(ContainerError::SandboxNotReady { id: container.sandbox_id().clone() });
        }
        Ok(container)
    }
    .await;
    if result.is_err() {
        let node = node.clone();
        // The error is told in any case; a task that could not be run leaves what the next start takes away.
        let _ = tokio::task::spawn_blocking(move || undo(&node, &made)).await;
    }
    result
}

fn write_files(container: &Container, spec: &Spec) -> Result<(), ContainerError> {
    let path = container.files.spec();
    // Only for those who ask; written without care for a crash.
    let json =
        serde_json::to_vec(spec).map_err(|error| ContainerError::file("write", &path)(error.into()))?;
    std::fs::write(&path, json).map_err(ContainerError::file("write", &path))?;
    container
        .record_files()
        .write(&container.record)
        .map_err(|source| ContainerError::Record { id: container.id().clone(), source })
}

/// Takes back what was made. What cannot be taken back is logged, and found again at the next start.
fn undo(node: &Node, made: &Made) {
    if let Some(cgroup) = &made.cgroup
        && let Err(error) = cgroup.kill(CGROUP_GONE).and_then(|()| cgroup.remove(CGROUP_GONE))
    {
        tracing::warn!(error = %crate::chain(&error), "the cgroup of a container that failed is left");
    }
    // A copy without a record would say that the record was lost.
    let _ = std::fs::remove_file(made.files.record_copy());
    if let Err(error) = trash::discard(&node.layout, &made.files.durable) {
        tracing::warn!(path = %made.files.durable.display(), %error, "files of a container that failed are left");
    }
    match std::fs::remove_dir_all(&made.files.state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %made.files.state.display(), %error, "files of a container that failed are left");
        }
        _ => {}
    }
}

fn make_directories(files: &ContainerFiles, lower_dirs: &[PathBuf]) -> Result<(), ContainerError> {
    let make = |path: &Path, mode: u32| {
        std::fs::DirBuilder::new().mode(mode).create(path).map_err(ContainerError::file("make", path))
    };
    make(&files.durable, 0o700)?;
    make(&files.state, 0o700)?;
    make(&files.upper(), 0o755)?;
    if let Some(top) = lower_dirs.first() {
        copy_mode_and_owner(top, &files.upper())?;
    }
    make(&files.work(), 0o700)?;
    make(&files.rootfs(), 0o700)
}

/// An overlay shows its upper directory's mode and owner as those of its root, so the image's have to be put there.
fn copy_mode_and_owner(from: &Path, to: &Path) -> Result<(), ContainerError> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(from).map_err(ContainerError::file("look at", from))?;
    // In this order: a change of owner takes set-user-id bits away.
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))
        .and_then(|()| std::fs::set_permissions(to, metadata.permissions()))
        .map_err(ContainerError::file("set the mode of", to))
}

fn effective_stop_signal(config: &Config, image: &Image) -> Result<i32, ContainerError> {
    if let Some(signal) = config.stop_signal {
        return Ok(signal);
    }
    match image.config().stop_signal.as_str() {
        "" => Ok(SIGTERM),
        text => stop_signal(text).map_err(|error| ContainerError::ImageConfig {
            image: config.image.clone(),
            reason: error.to_string(),
        }),
    }
}

/// The longest `User` of an image; a request's has the same limit.
const MAX_USER_BYTES: usize = 1024;

fn check_user(config: &Config, image: &Image) -> Result<(), ContainerError> {
    let length = image.user().len();
    if length <= MAX_USER_BYTES {
        return Ok(());
    }
    let reason = format!("its User has {length} bytes, and at most {MAX_USER_BYTES} are accepted");
    Err(ContainerError::ImageConfig { image: config.image.clone(), reason })
}

/// The name of Berth's own profile, if the container gets it. A kernel that enforces `AppArmor` without it makes no such container.
fn default_apparmor_profile(node: &Node, config: &Config) -> Result<Option<&'static str>, ContainerError> {
    if config.security.privileged || config.security.apparmor != Profile::RuntimeDefault {
        return Ok(None);
    }
    node.default_apparmor_profile.name().map_err(|error| ContainerError::AppArmor {
        reason: format!(
            "the kernel enforces AppArmor, and the profile {} of RuntimeDefault cannot be loaded: {}",
            apparmor::DEFAULT_PROFILE,
            crate::chain(&error)
        ),
    })
}

fn check_apparmor(node: &Node, config: &Config) -> Result<(), ContainerError> {
    match &config.security.apparmor {
        Profile::Localhost(name) if !node.facts.apparmor => Err(ContainerError::AppArmor {
            reason: format!("profile {name:?} cannot be applied: this kernel has no AppArmor"),
        }),
        Profile::Localhost(name) => match apparmor::is_loaded(name) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ContainerError::AppArmor {
                reason: format!("profile {name:?} is not loaded; load it on the node with apparmor_parser"),
            }),
            Err(error) => Err(ContainerError::AppArmor { reason: crate::chain(&error) }),
        },
        Profile::RuntimeDefault | Profile::Unconfined => Ok(()),
    }
}

fn seccomp_profile(node: &Node, config: &Config) -> Result<Option<LinuxSeccomp>, ContainerError> {
    let security = &config.security;
    match &security.seccomp {
        Profile::Unconfined => Ok(None),
        _ if security.privileged => Ok(None),
        Profile::RuntimeDefault => {
            let names = oci_spec::granted_capabilities(security, node.facts.bounding)?;
            Ok(Some(berth_seccomp::default_profile(names)))
        }
        Profile::Localhost(path) => {
            let failed = |reason: String| ContainerError::Seccomp { reason: format!("{path}: {reason}") };
            let text = read_profile(Path::new(path)).map_err(|error| failed(error.to_string()))?;
            let capabilities = oci_spec::granted_capabilities(security, node.facts.bounding)?;
            let circumstances = Circumstances { capabilities, kernel: node.facts.kernel };
            berth_seccomp::parse_profile(&text, &circumstances)
                .map(Some)
                .map_err(|error| failed(crate::chain(&error)))
        }
    }
}

fn read_profile(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let file =
        std::fs::File::options().read(true).custom_flags(berth_sys::file::READ_NONBLOCKING).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a plain file"));
    }
    let mut text = Vec::new();
    file.take(MAX_PROFILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_PROFILE_BYTES {
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, "longer than 1 MiB"));
    }
    Ok(text)
}

/// Its directory in each v1 hierarchy, by the name that the hierarchy has below `/sys/fs/cgroup`.
fn cgroup_directories(node: &Node, cgroup: &Cgroup) -> Vec<CgroupDirectory> {
    let berth_cgroup::Hierarchy::Legacy { mounts } = &node.hierarchy else { return Vec::new() };
    let directories: Vec<&Path> = cgroup.directories().collect();
    mounts
        .iter()
        .filter_map(|mount| {
            let directory = directories.iter().find(|directory| directory.starts_with(&mount.path))?;
            let name = mount.path.file_name()?.to_str()?.to_owned();
            Some(CgroupDirectory { name, directory: directory.to_path_buf() })
        })
        .collect()
}
