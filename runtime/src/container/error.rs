//! Why an operation on a container failed.

use std::io;
use std::path::Path;

use berth_model::id::{ContainerId, SandboxId};

use crate::cgroups::MakeCgroup;
use crate::file_error::FileError;
use crate::host_paths::HostPathError;
use crate::names::NameTaken;
use crate::record_files::WriteError;
use crate::shim_client::ShimError;

/// Why an operation on a container failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    /// The name is taken.
    #[error(transparent)]
    NameTaken(#[from] NameTaken),
    /// The sandbox was stopped.
    #[error("sandbox {id} is not ready")]
    SandboxNotReady {
        /// The sandbox.
        id: SandboxId,
    },
    /// The sandbox was created with a handler that this daemon does not have.
    #[error("the sandbox was created with the runtime handler {name:?}, which is no longer configured")]
    NoHandler {
        /// Of `RunPodSandboxRequest.runtime_handler`.
        name: String,
    },
    /// The image is not on this node.
    #[error("image {image} is not on this node")]
    NoImage {
        /// The name in the request.
        image: String,
    },
    /// The image store.
    #[error("cannot find the layers of image {image}")]
    Image {
        /// The name in the request.
        image: String,
        /// The cause.
        #[source]
        source: berth_image::StoreError,
    },
    /// The image's configuration is invalid.
    #[error("image {image}: {reason}")]
    ImageConfig {
        /// The name in the request.
        image: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The container whose pid namespace is to be joined.
    #[error(
        "config.linux.security_context.namespace_options.target_id: container {target} is not a running container of this sandbox"
    )]
    NoTarget {
        /// The `target_id` of the request.
        target: String,
    },
    /// There are no random bytes.
    #[error("cannot generate an id")]
    Id(#[source] io::Error),
    /// The request cannot be expressed as a spec.
    #[error(transparent)]
    Spec(#[from] crate::oci_spec::SpecError),
    /// The spec cannot be turned into a plan.
    #[error(transparent)]
    Plan(#[from] crate::plan::PlanError),
    /// The seccomp profile.
    #[error("config.linux.security_context.seccomp: {reason}")]
    Seccomp {
        /// What is wrong with it.
        reason: String,
    },
    /// The AppArmor profile.
    #[error("config.linux.security_context.apparmor: {reason}")]
    AppArmor {
        /// What is wrong with it.
        reason: String,
    },
    /// The source of a mount or a device.
    #[error("{path}: {reason}")]
    Mount {
        /// The field that asks for it.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A path of the host that does not answer.
    #[error(transparent)]
    HostPath(#[from] HostPathError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] berth_cgroup::Error),
    /// The shim, or in it the container.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// Its state does not allow this.
    #[error("container {id} is {state}")]
    WrongState {
        /// The container.
        id: ContainerId,
        /// Its state, as a word.
        state: &'static str,
    },
    /// Its start timed out, and it was killed.
    #[error("container {id} did not start within {seconds} s, and was killed")]
    StartTimeout {
        /// The container.
        id: ContainerId,
        /// The time limit.
        seconds: u64,
    },
    /// Its start timed out, and it could not be killed either.
    #[error(
        "container {id} did not start within {seconds} s, and could not be killed: it may be running, and is reported as running until that is known"
    )]
    StartUnknown {
        /// The container.
        id: ContainerId,
        /// The time limit.
        seconds: u64,
    },
    /// Its shim cannot be reached now.
    #[error("cannot reach the shim of container {id} at the moment; try again")]
    ShimUnreached {
        /// The container.
        id: ContainerId,
    },
    /// Another operation on it is in progress.
    #[error("another change of container {id} is taking too long; try again")]
    Busy {
        /// The container.
        id: ContainerId,
    },
    /// Its record must not be written.
    #[error(
        "cannot change container {id}: its record was written by a newer berthd or could not be read; it can be stopped and removed"
    )]
    RecordKept {
        /// The container.
        id: ContainerId,
    },
    /// It ended, and with it the command.
    #[error("container {id} ended while the command was running in it")]
    EndedUnderExec {
        /// The container.
        id: ContainerId,
    },
    /// Its shim ended without a word about the command.
    #[error(
        "the shim of container {id} was killed while the command was running; what became of that is not known"
    )]
    ShimGoneUnderExec {
        /// The container.
        id: ContainerId,
    },
    /// The way to its shim ended.
    #[error(
        "the connection to the shim of container {id} ended while the command was running; the shim kills the command when it notices, and what became of it is not known"
    )]
    DisconnectedUnderExec {
        /// The container.
        id: ContainerId,
    },
    /// There is no place for one more client.
    #[error("{most} clients are attached to container {id}, and no more may be; end some of them")]
    TooManyAttached {
        /// The container.
        id: ContainerId,
        /// How many may be.
        most: usize,
    },
    /// It was killed and did not end.
    #[error("container {id} was killed but has not ended; try again")]
    DoesNotEnd {
        /// The container.
        id: ContainerId,
    },
    /// A command timed out, and was killed.
    #[error("the command did not finish within {seconds} s")]
    ExecTimeout {
        /// The time limit.
        seconds: u64,
    },
    /// The record cannot be written.
    #[error("cannot write the record of container {id}")]
    Record {
        /// The container.
        id: ContainerId,
        /// The cause.
        #[source]
        source: WriteError,
    },
    /// The daemon's task ended early.
    #[error("the daemon is stopping")]
    Stopping,
}

impl From<MakeCgroup> for ContainerError {
    fn from(error: MakeCgroup) -> Self {
        match error {
            MakeCgroup::Cgroup(source) => Self::Cgroup(source),
            MakeCgroup::Holder(source) => Self::Shim(source),
        }
    }
}

impl ContainerError {
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let error = FileError::of(action, path);
        move |source| error(source).into()
    }
}
