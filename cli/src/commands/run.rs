//! `berth run`: runs a program in a new or existing pod, from the image to the exit code.
//!
//! What is created for it (`made`) is removed at the end, and on failure. Until the program has
//! started, an interrupt ends the command after that cleanup; from then on it stops the program
//! (`watch`), whose exit code becomes the command's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use berth_cri::v1::{PodSandboxState, PodSandboxStatus};
use berth_streaming::client::Command;
use berth_streaming::command::Wanted;

use self::made::Made;
use self::watch::{Shared, share, watch};
use super::attach::{self, AttachError, streams};
use crate::args::RunArgs;
use crate::daemon::{Daemon, Refusal};
use crate::ending::exit_code;
use crate::error::Error;
use crate::interrupts::{GivenUp, Interrupts};
use crate::mount_spec::MountSpec;
use crate::names::{Target, container_name, pod_name, pod_namespace};
use crate::output;
use crate::pod_name as pod_names;
use crate::pull::{Narration, pull};
use crate::run_plan::{self, ContainerPlan, NAMESPACE, Network, PodPlan};

mod made;
mod watch;

/// The CRI's reason for a container that the OOM killer ended.
const OUT_OF_MEMORY: &str = "OOMKilled";

/// Why a program did not run to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// There is no pod of that name.
    #[error("no pod named `{0}`; `berth pods` lists them")]
    NoPod(String),
    /// The pod is stopped.
    #[error("pod `{0}` is stopped and takes no more containers; remove it with `berth rm {0}`")]
    PodIsOver(String),
    /// The pod already has a container of that name.
    #[error("pod `{pod}` already has a container `{container}`; choose another --container")]
    ContainerNameTaken {
        /// Name of the pod.
        pod: String,
        /// Name of the container.
        container: String,
    },
    /// Another pod has the name.
    #[error("pod `{0}` already exists; remove it with `berth rm {0}`, or choose another --name")]
    NameTaken(String),
    /// The source of a mount is missing or inaccessible.
    #[error("cannot mount {path}")]
    MountSource {
        /// The path as given.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The path is not UTF-8, which the CRI requires.
    #[error("the path {0} is not UTF-8 and cannot be sent to the daemon")]
    PathEncoding(PathBuf),
    /// The directory for logs cannot be created.
    #[error("cannot create the log directory {path}: {error}; choose another with --log-dir")]
    LogDirectory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// No random number for the pod's name.
    #[error("cannot read a random number from /proc")]
    Random(#[source] io::Error),
    /// Signal handlers cannot be set up.
    #[error("cannot listen for signals")]
    Signals(#[source] io::Error),
    /// The terminal cannot be used.
    #[error("cannot set up the terminal")]
    Terminal(#[source] io::Error),
    /// The program could not be started.
    #[error("cannot start the program")]
    NotStarted {
        /// The exit code, if the reason has one.
        exit_code: Option<u8>,
        /// What the daemon says.
        #[source]
        refusal: Refusal,
    },
    /// Interrupted while the container was being created.
    #[error("interrupted before the program ran")]
    Interrupted,
    /// Interrupted twice.
    #[error(transparent)]
    GivenUp(#[from] GivenUp),
}

/// The pod of the container.
enum Pod {
    New(PodPlan),
    Existing(Box<PodSandboxStatus>),
}

/// Runs a program; the exit code is the program's.
///
/// # Errors
/// When the program could not be run, or its outcome is unknown.
pub(crate) async fn run(daemon: &Daemon, args: RunArgs) -> Result<ExitCode, Error> {
    let (image, command) = args.image_and_command();
    let mounts = args.mounts.iter().map(absolute_mount).collect::<Result<Vec<_>, _>>()?;
    let pod = match &args.pod {
        Some(name) => Pod::Existing(Box::new(existing_pod(daemon, name, &args.container).await?)),
        None => Pod::New(new_pod(daemon, &args, image).await?),
    };
    let image_id = match daemon.image(image).await? {
        Some(found) => found.id,
        None => pull(daemon, image, None, Narration::Full).await?,
    };
    let container = ContainerPlan {
        name: args.container.clone(),
        image_id,
        image_name: image.to_owned(),
        command: command.to_vec(),
        envs: args.envs,
        mounts,
        user: args.user,
        memory_limit_bytes: args.memory_limit_bytes,
        cpu_quota_us: args.cpu_quota_us,
        stdin: args.interactive,
        terminal: args.tty,
    };
    let attached =
        (!args.detach && (args.interactive || args.tty)).then(|| streams(args.interactive, args.tty));

    // From here on there is something to undo. Before, a signal simply ends the command, which
    // cancels a pull.
    let mut interrupts = Interrupts::listen().map_err(RunError::Signals)?;
    let mut made = Made::nothing(daemon);
    let started =
        match interrupts.shield(start(&mut made, pod, container, attached)).await.map_err(RunError::from)? {
            Ok(_) if interrupts.count() > 0 => {
                made.undo().await;
                return Err(RunError::Interrupted.into());
            }
            Ok(started) => started,
            Err(error) => {
                made.undo().await;
                return Err(error);
            }
        };
    if args.detach {
        output::line(started.id)?;
        return Ok(ExitCode::SUCCESS);
    }
    let label = started.label;
    let ended = match (started.command, attached) {
        (Some(command), Some(wanted)) => {
            match share(daemon, &started.id, command, wanted, args.detach_keys, &mut interrupts).await {
                Ok(Shared::Ended(status)) => Ok(*status),
                Ok(Shared::Detached) => {
                    output::remark(format_args!(
                        "detached from {label}; `berth attach {label}` joins it again, `berth rm -f {label}` removes it"
                    ));
                    return Ok(ExitCode::SUCCESS);
                }
                Ok(Shared::Lost) => return Err(AttachError::Lost(label).into()),
                Err(error) => Err(error),
            }
        }
        _ => watch(daemon, &started.id, &mut interrupts).await,
    };
    if !args.keep {
        // If the daemon has not come back, this fails and lists what is left.
        interrupts.shield(made.undo()).await.map_err(RunError::from)?;
    }
    let status = ended?;
    if status.reason == OUT_OF_MEMORY {
        output::remark("the container exceeded its memory limit and was killed");
    }
    Ok(exit_code(&status))
}

/// A container whose program runs.
struct Started {
    id: String,
    /// Its name, as commands accept it.
    label: String,
    /// Its streams, if they were requested.
    command: Option<Command>,
}

/// Creates what is missing, joins the streams that are `attached`, and starts the program: in this
/// order, so that no output is missed.
async fn start(
    made: &mut Made<'_>,
    pod: Pod,
    container: ContainerPlan,
    attached: Option<Wanted>,
) -> Result<Started, Error> {
    let pod_name = match &pod {
        Pod::New(plan) => plan.name.clone(),
        Pod::Existing(status) => status.metadata.as_ref().map(|it| it.name.clone()).unwrap_or_default(),
    };
    let label = format!("{pod_name}/{}", container.name);
    let (pod_id, config, home) = match pod {
        Pod::New(plan) => {
            let config = run_plan::sandbox_config(&plan);
            made.log_directory(Path::new(&plan.log_directory))?;
            (made.pod(&plan.name, config.clone()).await?, config, plan.home())
        }
        Pod::Existing(status) => {
            (status.id.clone(), run_plan::known_config(&status), run_plan::home_of(&status))
        }
    };
    let id = made.container(pod_id, config, run_plan::container_config(home, container)).await?;
    let command = match attached {
        Some(wanted) => Some(attach::connect(made.daemon(), &id, &label, wanted).await?),
        None => None,
    };
    made.start(&id).await?;
    Ok(Started { id, label, command })
}

/// Plans a new pod with a free name.
async fn new_pod(daemon: &Daemon, args: &RunArgs, image: &str) -> Result<PodPlan, Error> {
    let uid = pod_names::random_uuid().map_err(RunError::Random)?;
    let name = args.name.clone().unwrap_or_else(|| pod_names::from_image(image, &uid));
    check_name_is_free(daemon, &name).await?;
    let log_dir = std::path::absolute(&args.log_dir);
    let log_dir = log_dir.map_err(|error| RunError::LogDirectory { path: args.log_dir.clone(), error })?;
    let log_directory = utf8(&run_plan::log_directory(&log_dir, &name, &uid))?;
    let network = if args.host_network { Network::Host } else { Network::Pod };
    Ok(PodPlan { name, uid, network, log_directory, log_bytes: log_bytes(args) })
}

/// The size at which logs are rotated: never while this command follows them, as it would miss
/// lines.
fn log_bytes(args: &RunArgs) -> i64 {
    let shows_the_log = !(args.detach || args.interactive || args.tty);
    if shows_the_log { 0 } else { args.log_bytes }
}

/// Finds a pod for another container, whose name must be free there.
async fn existing_pod(daemon: &Daemon, name: &str, container: &str) -> Result<PodSandboxStatus, Error> {
    let inventory = daemon.inventory().await?;
    let Target::Pod(pod) = inventory.target(name)? else {
        return Err(RunError::NoPod(name.to_owned()).into());
    };
    if pod.state() != PodSandboxState::SandboxReady {
        return Err(RunError::PodIsOver(pod_name(pod).to_owned()).into());
    }
    if inventory.containers_of(&pod.id).any(|other| container_name(other) == container) {
        let (pod, container) = (pod_name(pod).to_owned(), container.to_owned());
        return Err(RunError::ContainerNameTaken { pod, container }.into());
    }
    Ok(daemon.pod_status(&pod.id).await?)
}

async fn check_name_is_free(daemon: &Daemon, name: &str) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let taken = inventory.pods.iter().any(|pod| pod_name(pod) == name && pod_namespace(pod) == NAMESPACE);
    if taken { Err(RunError::NameTaken(name.to_owned()).into()) } else { Ok(()) }
}

/// The daemon has a different working directory, and would create a missing source as a directory.
fn absolute_mount(mount: &MountSpec) -> Result<MountSpec, RunError> {
    let failed = |source| RunError::MountSource { path: mount.source.clone(), source };
    let source = fs::canonicalize(&mount.source).map_err(failed)?;
    utf8(&source)?;
    Ok(MountSpec { source, ..mount.clone() })
}

fn utf8(path: &Path) -> Result<String, RunError> {
    path.to_str().map(str::to_owned).ok_or_else(|| RunError::PathEncoding(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use clap::Parser;

    use super::*;

    #[test]
    fn the_source_of_a_mount_has_to_be_there() {
        let mount: MountSpec = "/nonexistent:/x".parse().unwrap();
        let error = absolute_mount(&mount).unwrap_err();
        assert_eq!(error.to_string(), "cannot mount /nonexistent");
        let mount: MountSpec = "/proc/self/../../etc:/x:ro".parse().unwrap();
        let mount = absolute_mount(&mount).unwrap();
        assert_eq!((mount.source.as_path(), mount.readonly), (Path::new("/etc"), true));
    }

    #[test]
    fn a_log_that_is_shown_is_not_rotated() {
        for (options, expected) in [
            (&["--log-size=8Ki"][..], 0),
            (&["--keep"], 0),
            (&["-d", "--log-size=8Ki"], 8192),
            (&["-i", "--log-size=8Ki"], 8192),
            (&["-t", "--log-size=8Ki"], 8192),
        ] {
            let words = [&["berth", "run"], options, &["image"]].concat();
            let cli = crate::args::Cli::try_parse_from(words).unwrap();
            let crate::args::Command::Run(args) = cli.command else { panic!("{options:?}") };
            assert_eq!(log_bytes(&args), expected, "{options:?}");
        }
    }

    #[test]
    fn a_path_that_is_no_text_is_refused() {
        let path = PathBuf::from(std::ffi::OsString::from_vec(vec![b'/', 0xff]));
        assert!(matches!(utf8(&path), Err(RunError::PathEncoding(_))));
    }
}
