//! The paths of all files: below the durable root, below the runtime state, and nowhere else.
//!
//! ```text
//! <root>/                      durable; /var/lib/berth
//!   layers/ patches/ images/   the image store's, see docs/image-store.md
//!   network/                   addresses in use
//!   sandboxes/<id>/record      the sandbox's record
//!   containers/<id>/record     the container's record
//!                  /spec.json  the OCI runtime spec
//!                  /exit       the exit record, by the shim
//!                  /upper work the writable layer, overlay's work directory
//!   trash/                     renamed here, then deleted
//!   quarantine/                records that could not be read
//! <state>/                     gone after a reboot; /run/berth
//!   berth.sock                 the socket, unless set otherwise
//!   sandboxes/<id>/            net ipc uts pid (pinned namespaces), proc (procfs of that pid
//!                              namespace), shm (the pod's tmpfs), record (a copy)
//!     shm/shm                  /dev/shm of its containers
//!     shm/etc/                 hosts, hostname, resolv.conf
//!   containers/<id>/           shim.sock, rootfs (mount point, in the container's own mount
//!                              namespace), record (a copy), started (when that was asked for),
//!                              exit (where the durable one could not be written)
//! ```

use std::path::{Path, PathBuf};

use crate::id::{ContainerId, SandboxId};

/// The two roots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
    state: PathBuf,
}

impl Layout {
    /// Both are absolute.
    #[must_use]
    pub fn new(root: PathBuf, state: PathBuf) -> Self {
        Self { root, state }
    }

    /// The durable root.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The runtime state.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Addresses in use.
    #[must_use]
    pub fn network(&self) -> PathBuf {
        self.root.join("network")
    }

    /// What is to be deleted.
    #[must_use]
    pub fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Records that could not be read.
    #[must_use]
    pub fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// The records of all sandboxes.
    #[must_use]
    pub fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    /// The records and writable layers of all containers.
    #[must_use]
    pub fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// The runtime files of all sandboxes.
    #[must_use]
    pub fn sandbox_states(&self) -> PathBuf {
        self.state.join("sandboxes")
    }

    /// The runtime files of all containers.
    #[must_use]
    pub fn container_states(&self) -> PathBuf {
        self.state.join("containers")
    }

    /// The files of one sandbox.
    #[must_use]
    pub fn sandbox(&self, id: &SandboxId) -> SandboxFiles {
        SandboxFiles {
            durable: self.sandboxes().join(id.as_str()),
            state: self.sandbox_states().join(id.as_str()),
            shared: Shared::InTmpfs,
        }
    }

    /// The files of one container.
    #[must_use]
    pub fn container(&self, id: &ContainerId) -> ContainerFiles {
        ContainerFiles {
            durable: self.containers().join(id.as_str()),
            state: self.container_states().join(id.as_str()),
        }
    }
}

/// The place of the files that the containers of a pod can write to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// In the pod's tmpfs, whose size bounds them. Its root and `etc` in it are never shown to a
    /// container, so no container can replace a file there by a link.
    InTmpfs,
    /// Pods made by earlier versions: the tmpfs is `/dev/shm` as a whole, and the files for `/etc`
    /// lie beside it, in the runtime directory.
    Beside,
}

/// The files of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxFiles {
    /// Its durable directory.
    pub durable: PathBuf,
    /// Its runtime directory.
    pub state: PathBuf,
    /// Where its containers' shared files lie.
    pub shared: Shared,
}

impl SandboxFiles {
    /// The record.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.durable.join("record")
    }

    /// A copy of the record, in case the record itself cannot be read. It exists while the object
    /// may run.
    #[must_use]
    pub fn record_copy(&self) -> PathBuf {
        self.state.join("record")
    }

    /// Exists until an end of the sandbox has been reported: the next daemon reports one that came
    /// while there was none. Sandboxes that ended under earlier versions have no such file.
    #[must_use]
    pub fn untold(&self) -> PathBuf {
        self.durable.join("untold")
    }

    /// The pinned namespace of this name (`net`, `ipc`, `uts`, `pid`).
    #[must_use]
    pub fn namespace(&self, name: &str) -> PathBuf {
        self.state.join(name)
    }

    /// Where the procfs of a shared pid namespace is mounted.
    #[must_use]
    pub fn procfs(&self) -> PathBuf {
        self.state.join("proc")
    }

    /// The mount point of its tmpfs.
    #[must_use]
    pub fn tmpfs(&self) -> PathBuf {
        self.state.join("shm")
    }

    /// The directory that is `/dev/shm` of its containers.
    #[must_use]
    pub fn shm(&self) -> PathBuf {
        match self.shared {
            Shared::InTmpfs => self.tmpfs().join("shm"),
            Shared::Beside => self.tmpfs(),
        }
    }

    /// The directory of its files for `/etc`.
    #[must_use]
    pub fn etc_directory(&self) -> PathBuf {
        match self.shared {
            Shared::InTmpfs => self.tmpfs().join("etc"),
            Shared::Beside => self.state.clone(),
        }
    }

    /// A file for `/etc` (`hosts`, `hostname`, `resolv.conf`).
    #[must_use]
    pub fn etc(&self, name: &str) -> PathBuf {
        self.etc_directory().join(name)
    }
}

/// What follows the time in [`ContainerFiles::started`] while the start has not been reported.
pub const START_UNTOLD: &str = " untold";

/// The files of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerFiles {
    /// Its durable directory.
    pub durable: PathBuf,
    /// Its runtime directory.
    pub state: PathBuf,
}

impl ContainerFiles {
    /// The record.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.durable.join("record")
    }

    /// A copy of the record, in case the record itself cannot be read. It exists while the object
    /// may run.
    #[must_use]
    pub fn record_copy(&self) -> PathBuf {
        self.state.join("record")
    }

    /// When its start was asked for, in nanoseconds since the epoch, as text. Written before the
    /// shim is asked, and then followed by [`START_UNTOLD`] until the start has been reported.
    #[must_use]
    pub fn started(&self) -> PathBuf {
        self.state.join("started")
    }

    /// Exists until the end of the container has been reported: the next daemon reports one that
    /// came while there was none. Containers that ended under earlier versions have no such file.
    #[must_use]
    pub fn untold(&self) -> PathBuf {
        self.durable.join("untold")
    }

    /// The exit record, where the durable one could not be written.
    #[must_use]
    pub fn exit_record_copy(&self) -> PathBuf {
        self.state.join("exit")
    }

    /// The OCI runtime spec that it was created from, for information.
    #[must_use]
    pub fn spec(&self) -> PathBuf {
        self.durable.join("spec.json")
    }

    /// The exit record.
    #[must_use]
    pub fn exit_record(&self) -> PathBuf {
        self.durable.join("exit")
    }

    /// The writable layer.
    #[must_use]
    pub fn upper(&self) -> PathBuf {
        self.durable.join("upper")
    }

    /// Overlay's work directory.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.durable.join("work")
    }

    /// The directory that the root is mounted on.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.state.join("rootfs")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_lies_outside_of_the_roots() {
        let layout = Layout::new("/r".into(), "/s".into());
        let sandbox = layout.sandbox(&SandboxId::from_bytes([1; 32]));
        let container = layout.container(&ContainerId::from_bytes([2; 32]));
        for path in [
            sandbox.record(),
            container.record(),
            container.exit_record(),
            sandbox.untold(),
            container.untold(),
            container.upper(),
            container.work(),
        ] {
            assert!(path.starts_with("/r"), "{}", path.display());
        }
        for path in [
            sandbox.shm(),
            sandbox.namespace("net"),
            sandbox.etc("hosts"),
            sandbox.record_copy(),
            container.rootfs(),
            container.record_copy(),
            container.started(),
            container.exit_record_copy(),
        ] {
            assert!(path.starts_with("/s"), "{}", path.display());
        }
    }

    #[test]
    fn what_containers_write_lies_in_the_tmpfs_of_their_pod() {
        let mut files = Layout::new("/r".into(), "/s".into()).sandbox(&SandboxId::from_bytes([1; 32]));
        for path in [files.shm(), files.etc("hosts")] {
            assert!(path.starts_with(files.tmpfs()) && path != files.tmpfs(), "{}", path.display());
        }
        files.shared = Shared::Beside;
        assert_eq!(files.shm(), files.tmpfs());
        assert_eq!(files.etc("hosts"), files.state.join("hosts"));
    }
}
