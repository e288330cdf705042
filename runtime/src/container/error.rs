//! Why something with a container failed.

use crate::cgroups::MakeCgroup;
use crate::file_error::FileError;
use crate::names::NameTaken;
use crate::record_files::WriteError;
use crate::shim_client::ShimError;
use berth_model::id::{ContainerId, SandboxId};
use std::io;
use std::path::Path;

/// Why something with a container failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    /// Another one has its name.
    #[error(transparent)]
    NameTaken(#[from] NameTaken),
    /// Its sandbox was stopped.
    #[error("sandbox {id} is not ready")]
    SandboxNotReady {
        /// Which.
        id: SandboxId,
    },
    /// Its sandbox was made with a handler that this daemon does not have.
    #[error("there is no runtime handler {name:?}, which the sandbox was made with")]
    NoHandler {
        /// Of `RunPodSandboxRequest.runtime_handler`.
        name: String,
    },
    /// Its image is not here.
    #[error("image {image} is not present")]
    NoImage {
        /// As asked.
        image: String,
    },
    /// The image store.
    #[error("find the layers of image {image}")]
    Image {
        /// As asked.
        image: String,
        /// Why.
        #[source]
        source: berth_image::StoreError,
    },
    /// The image says something that cannot be.
    #[error("image {image}: {reason}")]
    ImageConfig {
        /// As asked.
        image: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The container whose pid namespace is to be joined.
    #[error(
        "config.linux.security_context.namespace_options.target_id: container {target} is not a running container of this sandbox"
    )]
    NoTarget {
        /// As asked.
        target: String,
    },
    /// No random bytes.
    #[error("make an id")]
    Id(#[source] io::Error),
    /// What was asked for cannot be.
    #[error(transparent)]
    Spec(#[from] crate::oci_spec::SpecError),
    /// The spec cannot be carried out.
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
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] berth_cgroup::Error),
    /// The shim, or in it the container.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// It is in a state in which that cannot be.
    #[error("container {id} is {state}")]
    WrongState {
        /// Which.
        id: ContainerId,
        /// The word for its state.
        state: &'static str,
    },
    /// Its start did not come to an end in its time, and it was killed.
    #[error("container {id} was not started within {seconds} s, and was killed")]
    StartTimeout {
        /// Which.
        id: ContainerId,
        /// The time.
        seconds: u64,
    },
    /// Its start did not come to an end in its time, and it could not be killed either.
    #[error(
        "container {id} was not started within {seconds} s, and could not be killed: it may run still, and is told as running until that is known"
    )]
    StartUnknown {
        /// Which.
        id: ContainerId,
        /// The time.
        seconds: u64,
    },
    /// Nobody can talk to its shim now.
    #[error("the shim of container {id} cannot be reached now; try again")]
    ShimUnreached {
        /// Which.
        id: ContainerId,
    },
    /// Something else is being done with it.
    #[error("container {id} is being changed, and that does not come to an end; try again")]
    Busy {
        /// Which.
        id: ContainerId,
    },
    /// Its record is not to be written.
    #[error(
        "container {id} cannot be changed: its record is of a newer version of berthd, or could not be read; it can be stopped and removed"
    )]
    RecordKept {
        /// Which.
        id: ContainerId,
    },
    /// It ended, and the command in it too.
    #[error("container {id} ended while the command ran in it")]
    EndedUnderExec {
        /// Which.
        id: ContainerId,
    },
    /// It was to end and did not.
    #[error("container {id} does not end, though it was killed; try again")]
    DoesNotEnd {
        /// Which.
        id: ContainerId,
    },
    /// A program did not end in its time, and was killed.
    #[error("the command did not end within {seconds} s")]
    ExecTimeout {
        /// The time.
        seconds: u64,
    },
    /// The record.
    #[error("record container {id}")]
    Record {
        /// Which.
        id: ContainerId,
        /// Why.
        #[source]
        source: WriteError,
    },
    /// The daemon's own task ended early.
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
