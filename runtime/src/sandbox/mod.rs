//! Pod sandboxes: namespaces, network, files and cgroup that the containers of a pod share.
//!
//! - `create`: RunPodSandbox;
//! - `namespaces`: making and pinning them, without a process;
//! - `etc_files`: `hosts`, `hostname`, `resolv.conf`;
//! - `stop`: StopPodSandbox and RemovePodSandbox;
//! - `recover`: what a new daemon makes of a record.
//!
//! A sandbox is made by one task and seen by others only when it is whole. While containers are made in it they hold its gate for
//! reading; Stop marks it NotReady, takes the gate for writing, and so finds every container that will ever be in it.

pub(crate) mod create;
mod error;
mod etc_files;
mod namespaces;
pub(crate) mod recover;
pub(crate) mod stop;

pub(crate) use error::SandboxError;

use crate::atomic_file;
use berth_cgroup::Parent;
use berth_model::id::SandboxId;
use berth_model::layout::{SandboxFiles, Shared};
use berth_model::record::{self, ProcessRecord, SandboxRecord};
use berth_model::sandbox::Config;
use berth_model::state::SandboxState;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// signal(7).
const SIGKILL: i32 = 9;

/// Process 1 of a pod that shares its pid namespace.
#[derive(Debug)]
struct PodProcess {
    record: ProcessRecord,
    pidfd: OwnedFd,
}

impl PodProcess {
    /// The process of a record, if it is still that one.
    fn find(record: ProcessRecord) -> Option<Self> {
        // The descriptor first: while it is held, the number cannot become another process's between the two looks.
        let pidfd = berth_sys::process::open_pidfd(record.pid).ok()?;
        let same = berth_sys::process::start_time(record.pid).is_ok_and(|time| time == record.start_time);
        same.then_some(Self { record, pidfd })
    }

    fn kill(&self) {
        // It has ended already, or ends now.
        let _ = berth_sys::process::signal_pidfd(self.pidfd.as_fd(), SIGKILL);
    }

    fn has_ended(&self) -> bool {
        berth_sys::process::signal_pidfd(self.pidfd.as_fd(), 0).is_err()
    }
}

/// A sandbox.
#[derive(Debug)]
pub(crate) struct Sandbox {
    id: SandboxId,
    config: Config,
    created_at_unix_ns: i64,
    boot_id: String,
    /// Empty when the record that it comes from has none.
    hostname: String,
    addresses: Vec<String>,
    files: SandboxFiles,
    cgroup_parent: Parent,
    state: Mutex<SandboxState>,
    process: Mutex<Option<PodProcess>>,
    /// Read: a container is being made in it. Write: it is being stopped.
    gate: tokio::sync::RwLock<()>,
    /// The network was given back; set by Stop.
    torn_down: Mutex<bool>,
}

impl Sandbox {
    pub(crate) fn id(&self) -> &SandboxId {
        &self.id
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn created_at_unix_ns(&self) -> i64 {
        self.created_at_unix_ns
    }

    /// Its hostname; the host's with the host's network. Never read from the file that its containers can write.
    pub(crate) fn hostname(&self) -> std::io::Result<String> {
        if self.hostname.is_empty() { create::hostname(&self.config) } else { Ok(self.hostname.clone()) }
    }

    /// The primary address first; empty with the host's network.
    pub(crate) fn addresses(&self) -> &[String] {
        &self.addresses
    }

    pub(crate) fn files(&self) -> &SandboxFiles {
        &self.files
    }

    pub(crate) fn cgroup_parent(&self) -> &Parent {
        &self.cgroup_parent
    }

    pub(crate) fn gate(&self) -> &tokio::sync::RwLock<()> {
        &self.gate
    }

    /// Ready as long as nobody stopped it and its own process, if it has one, lives.
    pub(crate) fn state(&self) -> SandboxState {
        let dead = lock(&self.process).as_ref().is_some_and(PodProcess::has_ended);
        if dead {
            *lock(&self.state) = SandboxState::NotReady;
        }
        *lock(&self.state)
    }

    /// The pid of its own process, if it has one.
    pub(crate) fn pid(&self) -> Option<i32> {
        lock(&self.process).as_ref().map(|process| process.record.pid)
    }

    fn record(&self) -> SandboxRecord {
        SandboxRecord {
            id: self.id.clone(),
            config: self.config.clone(),
            created_at_unix_ns: self.created_at_unix_ns,
            boot_id: self.boot_id.clone(),
            addresses: self.addresses.clone(),
            process: lock(&self.process).as_ref().map(|process| process.record),
            stopped: *lock(&self.torn_down),
            hostname: self.hostname.clone(),
            shared_in_tmpfs: self.files.shared == Shared::InTmpfs,
        }
    }

    fn write_record(&self) -> Result<(), SandboxError> {
        let path = self.files.record();
        let bytes = record::encode(&self.record())
            .map_err(|source| SandboxError::Record { id: self.id.clone(), source })?;
        atomic_file::write(&path, &bytes).map_err(SandboxError::file("write", &path))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every value in these locks is replaced as a whole, so a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
