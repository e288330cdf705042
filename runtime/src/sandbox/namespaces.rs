//! The namespaces of a sandbox: created on a dedicated thread, pinned as files, held by no process.
//!
//! The thread enters new namespaces, sets them up from inside, pins them and ends. Kernel
//! parameters are written there, too, because `/proc/sys` shows a thread its own namespaces. A
//! failure is undone from the outside by [`unpin`], which needs the files only.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use berth_model::layout::SandboxFiles;
use berth_sys::mount;
use berth_sys::ns::{self, Kind};

use super::{Sandbox, SandboxError};
use crate::network::{Chosen, Within};

/// What to create.
pub(super) struct Wanted<'a, 'n> {
    pub(super) sandbox: &'a Sandbox,
    pub(super) network: PodNetwork<'n>,
    pub(super) ipc: bool,
    /// A UTS namespace with this hostname.
    pub(super) hostname: Option<&'a str>,
}

/// The network of a pod.
pub(super) enum PodNetwork<'a> {
    /// The node's.
    Node,
    /// A new namespace, attached to this network.
    Own(&'a Chosen<'a>),
}

/// The kinds of namespace that can be pinned.
const KINDS: [Kind; 4] = [Kind::Network, Kind::Ipc, Kind::Uts, Kind::Pid];

/// Creates and pins them. Blocking.
///
/// On an error some may be pinned and the network attached; the caller calls `Network::detach` and
/// `Network::release`.
pub(super) fn make<'n>(wanted: &Wanted<'_, 'n>) -> Result<Option<Within<'n>>, SandboxError> {
    let mut flags = 0;
    for (kind, asked) in [
        (Kind::Network, matches!(wanted.network, PodNetwork::Own(_))),
        (Kind::Ipc, wanted.ipc),
        (Kind::Uts, wanted.hostname.is_some()),
    ] {
        if asked {
            flags |= kind.flag();
        }
    }
    if flags == 0 && wanted.sandbox.config.sysctls.is_empty() {
        return Ok(None);
    }
    ns::on_own_thread("sandbox", || make_here(wanted, flags))
        .map_err(SandboxError::namespace("start a thread"))?
}

fn make_here<'n>(wanted: &Wanted<'_, 'n>, flags: i32) -> Result<Option<Within<'n>>, SandboxError> {
    ns::unshare(flags).map_err(SandboxError::namespace("create namespaces"))?;
    let pin = |kind: Kind| {
        let path = wanted.sandbox.files.namespace(kind.file_name());
        ns::pin_own(kind, &path).map_err(SandboxError::file("pin the namespace", &path))
    };
    if let Some(hostname) = wanted.hostname {
        ns::set_hostname(hostname).map_err(SandboxError::namespace("set the hostname"))?;
        pin(Kind::Uts)?;
    }
    if wanted.ipc {
        pin(Kind::Ipc)?;
    }
    let mut attached = None;
    if let PodNetwork::Own(network) = wanted.network {
        pin(Kind::Network)?;
        let attaching = network.attach_within(&wanted.sandbox.id, &wanted.sandbox.config);
        attached = Some(attaching.map_err(SandboxError::Network)?);
    }
    for (name, value) in &wanted.sandbox.config.sysctls {
        // Names were checked at the edge: letters, digits, dots, underscores and dashes, of
        // namespaces that the pod owns.
        let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
        std::fs::write(&path, value).map_err(|source| SandboxError::Sysctl {
            name: name.clone(),
            value: value.clone(),
            source,
        })?;
    }
    Ok(attached)
}

/// Mounts the procfs of the pod's pid namespace, a detached mount, where the shims of its
/// containers clone it.
pub(super) fn mount_procfs(files: &SandboxFiles, procfs: BorrowedFd<'_>) -> Result<(), SandboxError> {
    let path = files.procfs();
    let failed = || SandboxError::file("mount the pod's procfs on", &path);
    // It comes from a process in the namespace, but one of our own, so it can be trusted.
    if !mount::is_procfs(procfs).map_err(failed())? {
        return Err(failed()(io::ErrorKind::InvalidData.into()));
    }
    std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed())?;
    let target = std::fs::File::open(&path).map_err(failed())?;
    mount::attach(procfs, target.as_fd()).map_err(failed())
}

/// Unpins all of them, and unmounts the procfs. Absence is not an error. Blocking.
pub(super) fn unpin(files: &SandboxFiles) -> Result<(), SandboxError> {
    let procfs = files.procfs();
    match mount::detach(&procfs) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
            return Err(SandboxError::file("unmount", &procfs)(error));
        }
        _ => {}
    }
    for kind in KINDS {
        let path = files.namespace(kind.file_name());
        ns::unpin(&path).map_err(SandboxError::file("unpin the namespace", &path))?;
    }
    Ok(())
}

/// Whether every namespace of `kinds` is still pinned. In doubt, it counts as
/// pinned.
pub(super) fn all_pinned(files: &SandboxFiles, kinds: &[Kind]) -> bool {
    kinds.iter().all(|kind| {
        let path = files.namespace(kind.file_name());
        ns::is_pinned(&path).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "cannot examine a pinned namespace");
            true
        })
    })
}
