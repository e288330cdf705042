//! Why an operation on a sandbox failed.

use std::io;
use std::path::Path;

use berth_model::id::SandboxId;
use berth_seccomp::CompileError;

use crate::apparmor::NotLoaded;
use crate::cgroups::MakeCgroup;
use crate::file_error::FileError;
use crate::host_paths::HostPathError;
use crate::names::NameTaken;
use crate::network::NetworkError;
use crate::record_files::WriteError;
use crate::shim_client::ShimError;

/// Why an operation on a sandbox failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    /// The name is taken.
    #[error(transparent)]
    NameTaken(#[from] NameTaken),
    /// There are no random bytes.
    #[error("cannot generate an id")]
    Id(#[source] io::Error),
    /// A path of the host that does not answer.
    #[error(transparent)]
    HostPath(#[from] HostPathError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A namespace.
    #[error("cannot {action}")]
    Namespace {
        /// The operation.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A kernel parameter.
    #[error("cannot set the sysctl {name} to {value}")]
    Sysctl {
        /// Its name, with dots.
        name: String,
        /// The value in the request.
        value: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The network.
    #[error("cannot set up the network")]
    Network(#[source] NetworkError),
    /// The network was not released.
    #[error("cannot tear down the network of sandbox {id}")]
    NetworkLeft {
        /// The sandbox.
        id: SandboxId,
        /// The cause.
        #[source]
        source: NetworkError,
    },
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] berth_cgroup::Error),
    /// The AppArmor profile of the pod's own process.
    #[error("cannot confine the pod's first process")]
    AppArmor(#[source] NotLoaded),
    /// The seccomp filter of the pod's own process.
    #[error("cannot build the seccomp filter of the pod's first process")]
    Seccomp(#[source] CompileError),
    /// The pod's own process.
    #[error("cannot create the pod's first process")]
    Process(#[source] ShimError),
    /// The record cannot be written.
    #[error("cannot write the record of sandbox {id}")]
    Record {
        /// The sandbox.
        id: SandboxId,
        /// The cause.
        #[source]
        source: WriteError,
    },
    /// Some containers could not be stopped.
    #[error("cannot stop the containers of sandbox {id}")]
    Containers {
        /// The sandbox.
        id: SandboxId,
        /// The first of them.
        #[source]
        source: Box<crate::container::ContainerError>,
    },
    /// The daemon's task ended early.
    #[error("the daemon is stopping")]
    Stopping,
}

impl From<MakeCgroup> for SandboxError {
    fn from(error: MakeCgroup) -> Self {
        match error {
            MakeCgroup::Cgroup(source) => Self::Cgroup(source),
            MakeCgroup::Holder(source) => Self::Process(source),
        }
    }
}

impl SandboxError {
    pub(super) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let error = FileError::of(action, path);
        move |source| error(source).into()
    }

    pub(super) fn namespace(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Namespace { action, source }
    }
}
