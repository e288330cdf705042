//! `berth run`: one program in a pod of its own, from the image to its exit code.
//!
//! The pod, its container and its log folder are made in this order and undone in the reverse. Until the container
//! has started, a failure or an interrupt undoes them; after that the first interrupt stops the container, the
//! second kills it, and the command always waits for its end, so that the exit code is the program's own. The
//! daemon may be restarted meanwhile: the container does not notice, and the command waits for its return.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use berth_cri::v1::{
    ContainerState, ContainerStatus, CreateContainerRequest, PodSandboxConfig, RunPodSandboxRequest,
    StartContainerRequest,
};

use crate::args::RunArgs;
use crate::daemon::{CallError, Daemon, Refusal, answer};
use crate::error::Error;
use crate::interrupts::{GivenUp, Interrupts};
use crate::log_stream::{Following, Selection};
use crate::mount_spec::MountSpec;
use crate::names::{pod_name, pod_namespace};
use crate::output;
use crate::pod_name as pod_names;
use crate::pull::{Narration, pull};
use crate::run_plan::{self, ContainerPlan, NAMESPACE, Network, PodPlan};

/// What the first interrupt gives the program to end: as long as `berth stop` does.
const GRACE_SECONDS: i64 = 10;

/// Pauses between two looks at the container: short at first, for programs that end at once.
const FIRST_PAUSE: Duration = Duration::from_millis(4);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How long a daemon may be away before we stop waiting for it. A restart takes less than a second; a minute leaves
/// room for an upgrade.
const DAEMON_PATIENCE: Duration = Duration::from_secs(60);

/// Exit codes of a program that could not be run (126) or found (127), as env(1) and shells have them.
const CANNOT_RUN: [u8; 2] = [126, 127];

/// The reason that CRI has for a container that the kernel ended for want of memory.
const OUT_OF_MEMORY: &str = "OOMKilled";

/// Why a program did not run to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// Another pod has the name.
    #[error("there is a pod `{0}` already; remove it with `berth rm {0}`, or choose another --name")]
    NameTaken(String),
    /// The source of a mount is not there, or cannot be seen.
    #[error("mount {path}")]
    MountSource {
        /// The path as it was given.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// CRI has text for paths, and this one is none.
    #[error("the path {0} is not UTF-8, so the daemon cannot be told of it")]
    PathEncoding(PathBuf),
    /// The folder for logs cannot be made.
    #[error("make the log folder {path}; choose another place with --log-dir")]
    LogFolder {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The kernel gives no random number for the pod's id.
    #[error("read a random number from /proc")]
    Random(#[source] io::Error),
    /// Signals cannot be listened to.
    #[error("listen for signals")]
    Signals(#[source] io::Error),
    /// The program could not be started.
    #[error("start the program of pod {pod}")]
    NotStarted {
        /// Name of the pod.
        pod: String,
        /// The exit code, if it says why.
        exit_code: Option<u8>,
        /// What the daemon says.
        #[source]
        refusal: Refusal,
    },
    /// Interrupted while the container was made.
    #[error("interrupted before the program ran")]
    Interrupted,
    /// Interrupted again and again.
    #[error(transparent)]
    GivenUp(#[from] GivenUp),
}

/// Runs a program as it was asked for; the exit code is the program's.
///
/// # Errors
/// When the program could not be run, or its end not be learned.
pub(crate) async fn run(daemon: &Daemon, args: RunArgs) -> Result<ExitCode, Error> {
    let (image, command) = args.image_and_command();
    let mounts = args.mounts.iter().map(absolute_mount).collect::<Result<Vec<_>, _>>()?;
    let uid = pod_names::random_uuid().map_err(RunError::Random)?;
    let name = args.name.clone().unwrap_or_else(|| pod_names::from_image(image, &uid));
    check_name_is_free(daemon, &name).await?;
    let image_id = match daemon.image(image).await? {
        Some(found) => found.id,
        None => pull(daemon, image, None, Narration::Full).await?,
    };
    let log_folder = absolute(&args.log_dir, RunError::log_folder)?;
    let network = if args.host_network { Network::Host } else { Network::Pod };
    let log_folder = run_plan::log_folder(&log_folder, &name, &uid);
    let pod = PodPlan { name, uid, network, log_folder: utf8(&log_folder)? };
    let container = ContainerPlan {
        image_id,
        image_name: image.to_owned(),
        command: command.to_vec(),
        envs: args.envs,
        mounts,
        user: args.user,
        memory_limit_bytes: args.memory_limit_bytes,
        cpu_quota_us: args.cpu_quota_us,
    };

    // From here on there is something to undo. Before, a signal simply ends us; a pull is cancelled by that.
    let mut interrupts = Interrupts::listen().map_err(RunError::Signals)?;
    make_log_folder(&log_folder)?;
    let mut made = Made { daemon, log_folder, pod_id: None };
    let started = interrupts.shield(made.start(&pod, container)).await.map_err(RunError::from)?;
    let container_id = match started {
        Ok(_) if interrupts.count() > 0 => {
            made.undo().await;
            return Err(RunError::Interrupted.into());
        }
        Ok(id) => id,
        Err(error) => {
            made.undo().await;
            return Err(error);
        }
    };
    if args.detach {
        output::line(container_id)?;
        return Ok(ExitCode::SUCCESS);
    }
    let ended = watch(daemon, &container_id, &mut interrupts).await;
    if !args.keep {
        // A daemon that never came back still has the pod; then this fails, and says what is left.
        interrupts.shield(made.undo()).await.map_err(RunError::from)?;
    }
    let status = ended?;
    if status.reason == OUT_OF_MEMORY {
        output::remark("the container needed more memory than its limit and was killed");
    }
    Ok(ExitCode::from(u8::try_from(status.exit_code).unwrap_or(u8::MAX)))
}

/// What has been made so far and has to be undone.
struct Made<'a> {
    daemon: &'a Daemon,
    log_folder: PathBuf,
    pod_id: Option<String>,
}

impl Made<'_> {
    /// Makes the pod and the container, starts the program, and returns the container's id.
    async fn start(&mut self, pod: &PodPlan, container: ContainerPlan) -> Result<String, Error> {
        let sandbox_config = run_plan::sandbox_config(pod);
        let pod_id = self.make_pod(&pod.name, sandbox_config.clone()).await?;
        let request = CreateContainerRequest {
            pod_sandbox_id: pod_id,
            config: Some(run_plan::container_config(pod, container)),
            sandbox_config: Some(sandbox_config),
        };
        let act = format!("make the container of pod {}", pod.name);
        let id = answer(act, self.daemon.runtime.clone().create_container(request)).await?.container_id;
        let request = StartContainerRequest { container_id: id.clone() };
        match self.daemon.runtime.clone().start_container(request).await {
            Ok(_) => Ok(id),
            Err(status) => {
                let exit_code = self.exit_code_of_failed_start(&id).await;
                let (pod, refusal) = (pod.name.clone(), status.into());
                Err(RunError::NotStarted { pod, exit_code, refusal }.into())
            }
        }
    }

    async fn make_pod(&mut self, name: &str, config: PodSandboxConfig) -> Result<String, Error> {
        let request = RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let act = format!("make pod {name}");
        let pod_id = answer(act, self.daemon.runtime.clone().run_pod_sandbox(request)).await?.pod_sandbox_id;
        self.pod_id = Some(pod_id.clone());
        Ok(pod_id)
    }

    async fn exit_code_of_failed_start(&self, container_id: &str) -> Option<u8> {
        let status = self.daemon.container_status(container_id).await.ok()?;
        let code = u8::try_from(status.exit_code).ok()?;
        (status.state() == ContainerState::ContainerExited && CANNOT_RUN.contains(&code)).then_some(code)
    }

    /// Removes everything again. Tells what is left, and goes on with the rest.
    async fn undo(&mut self) {
        if let Some(id) = self.pod_id.take() {
            // Removing stops too; stopping first makes an error say which of the two failed.
            let removed = match self.daemon.stop_pod(&id).await {
                Ok(()) => self.daemon.remove_pod(&id).await,
                failed => failed,
            };
            if let Err(error) = removed {
                output::remark(format_args!("{error}: {}; `berth rm -f` tries again", error.refusal));
                // Its log is kept too: it may tell why, and goes with the pod.
                return;
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.log_folder) {
            output::remark(format_args!("remove logs {}: {error}", self.log_folder.display()));
        }
    }
}

/// Shows the output until the container has ended, and stops it when asked to.
async fn watch(daemon: &Daemon, id: &str, interrupts: &mut Interrupts) -> Result<ContainerStatus, Error> {
    let log_path = daemon.container_status(id).await?.log_path;
    let mut following = Following::start(PathBuf::from(log_path), Selection::default());
    let mut log_failure = None;
    let ended = wait_for_end(daemon, id);
    tokio::pin!(ended);
    let status = loop {
        tokio::select! {
            status = &mut ended => break status?,
            failure = following.failed(), if log_failure.is_none() => {
                log_failure = Some(failure);
                stop_in_background(daemon, id, GRACE_SECONDS);
            }
            count = interrupts.next() => match count {
                1 => stop_in_background(daemon, id, GRACE_SECONDS),
                2 => stop_in_background(daemon, id, 0),
                _ => return Err(RunError::from(GivenUp).into()),
            },
        }
    };
    match log_failure {
        Some(failure) => return Err(failure.into()),
        // The reader of our output may be slow, or may have stopped reading.
        None => interrupts.shield(following.finish()).await.map_err(RunError::from)??,
    }
    Ok(status)
}

fn stop_in_background(daemon: &Daemon, id: &str, grace_seconds: i64) {
    let (daemon, id) = (daemon.clone(), id.to_owned());
    tokio::spawn(async move {
        if let Err(error) = daemon.stop_container(&id, grace_seconds).await {
            output::remark(format_args!("{error}: {}", error.refusal));
        }
    });
}

/// Waits until the container has ended, over restarts of the daemon.
pub(super) async fn wait_for_end(daemon: &Daemon, id: &str) -> Result<ContainerStatus, CallError> {
    let mut pause = FIRST_PAUSE;
    let mut away_since: Option<Instant> = None;
    loop {
        match daemon.container_status(id).await {
            Ok(status) => {
                away_since = None;
                if matches!(
                    status.state(),
                    ContainerState::ContainerExited | ContainerState::ContainerUnknown
                ) {
                    return Ok(status);
                }
            }
            Err(error) if error.refusal.daemon_is_away() => {
                if away_since.get_or_insert_with(Instant::now).elapsed() > DAEMON_PATIENCE {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn check_name_is_free(daemon: &Daemon, name: &str) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let taken = inventory.pods.iter().any(|pod| pod_name(pod) == name && pod_namespace(pod) == NAMESPACE);
    if taken { Err(RunError::NameTaken(name.to_owned()).into()) } else { Ok(()) }
}

impl RunError {
    fn log_folder(path: PathBuf, source: io::Error) -> Self {
        Self::LogFolder { path, source }
    }
}

fn absolute(path: &Path, error: impl Fn(PathBuf, io::Error) -> RunError) -> Result<PathBuf, RunError> {
    std::path::absolute(path).map_err(|source| error(path.to_owned(), source))
}

/// The daemon has another working folder than we, and would make a folder where a source is missing.
fn absolute_mount(mount: &MountSpec) -> Result<MountSpec, RunError> {
    let failed = |source| RunError::MountSource { path: mount.source.clone(), source };
    let source = fs::canonicalize(&mount.source).map_err(failed)?;
    utf8(&source)?;
    Ok(MountSpec { source, ..mount.clone() })
}

fn utf8(path: &Path) -> Result<String, RunError> {
    path.to_str().map(str::to_owned).ok_or_else(|| RunError::PathEncoding(path.to_owned()))
}

/// Makes the pod's own log folder. What a program writes may be secret: not everybody may look in.
fn make_log_folder(folder: &Path) -> Result<(), RunError> {
    let made = DirBuilder::new().recursive(true).mode(0o750).create(folder);
    made.map_err(|source| RunError::log_folder(folder.to_owned(), source))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn the_source_of_a_mount_has_to_be_there() {
        let mount: MountSpec = "/nonexistent:/x".parse().unwrap();
        let error = absolute_mount(&mount).unwrap_err();
        assert_eq!(error.to_string(), "mount /nonexistent");
        let mount: MountSpec = "/proc/self/../../etc:/x:ro".parse().unwrap();
        let mount = absolute_mount(&mount).unwrap();
        assert_eq!((mount.source.as_path(), mount.readonly), (Path::new("/etc"), true));
    }

    #[test]
    fn a_path_that_is_no_text_is_refused() {
        let path = PathBuf::from(std::ffi::OsString::from_vec(vec![b'/', 0xff]));
        assert!(matches!(utf8(&path), Err(RunError::PathEncoding(_))));
    }

    #[test]
    fn a_log_folder_that_cannot_be_made_names_the_way_out() {
        let error = make_log_folder(Path::new("/proc/none/x")).unwrap_err();
        assert!(error.to_string().contains("--log-dir"), "{error}");
    }
}
