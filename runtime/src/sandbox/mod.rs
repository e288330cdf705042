//! Pod sandboxes: namespaces, network, files and cgroup that the containers of a pod share.
//!
//! - `create`: RunPodSandbox;
//! - `namespaces`: creating and pinning them, without a process;
//! - `etc_files`: `hosts`, `hostname`, `resolv.conf`;
//! - `creations`: the containers that are being created, so that a stop finds them all;
//! - `stop`: StopPodSandbox and RemovePodSandbox;
//! - `recover`: a container from its record, in a new daemon;
//! - `lost`: a sandbox for containers whose own has lost its record.
//!
//! A sandbox is created by one task and visible to others only when it is complete.

pub(crate) mod create;
mod creations;
mod error;
mod etc_files;
pub(crate) mod hostname;
pub(crate) mod lost;
mod namespaces;
pub(crate) mod recover;
pub(crate) mod stop;
mod watch;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use berth_cgroup::Parent;
use berth_model::id::SandboxId;
use berth_model::layout::{SandboxFiles, Shared};
use berth_model::record::{ProcessRecord, SandboxRecord};
use berth_model::sandbox::Config;
use berth_model::state::{SandboxEvent, SandboxState, sandbox_after};
use berth_sys::errno::ESRCH;
use berth_sys::process;

use crate::events::{Events, SandboxChange, What};
use crate::lock;
use crate::record_files::RecordFiles;
use crate::snapshot::SandboxSnapshot;
use creations::Creations;

pub(crate) use creations::Creation;
pub(crate) use error::SandboxError;

/// Process 1 of a pod that shares its pid namespace.
#[derive(Debug)]
struct PodProcess {
    record: ProcessRecord,
    /// `None` if there was no descriptor left for it.
    pidfd: Option<OwnedFd>,
}

impl PodProcess {
    /// The process of a record, if it is still that one. In doubt, it is.
    fn find(record: ProcessRecord) -> Option<Self> {
        // The descriptor first: while it is held, the pid cannot be reused between the two
        // checks.
        let pidfd = match process::open_pidfd(record.pid) {
            Ok(pidfd) => Some(pidfd),
            Err(error) if error.raw_os_error() == Some(ESRCH) => return None,
            Err(error) => {
                tracing::warn!(pid = record.pid, %error, "cannot open a pod's first process; watching it by its pid");
                None
            }
        };
        let same = process::is_there(record.pid, record.start_time).unwrap_or(true);
        same.then_some(Self { record, pidfd })
    }

    fn kill(&self) {
        let found;
        let pidfd = match &self.pidfd {
            Some(pidfd) => pidfd,
            None => match process::open_pidfd(self.record.pid) {
                Ok(pidfd)
                    if matches!(process::is_there(self.record.pid, self.record.start_time), Ok(true)) =>
                {
                    found = pidfd;
                    &found
                }
                _ => return,
            },
        };
        // It has ended already, or ends now.
        let _ = process::signal_pidfd(pidfd.as_fd(), process::SIGKILL);
    }

    fn has_ended(&self) -> bool {
        match &self.pidfd {
            // What cannot be found out is no end.
            Some(pidfd) => process::has_ended(pidfd.as_fd()).unwrap_or(false),
            None => matches!(process::is_there(self.record.pid, self.record.start_time), Ok(false)),
        }
    }
}

/// A sandbox.
#[derive(Debug)]
pub(crate) struct Sandbox {
    id: SandboxId,
    config: Arc<Config>,
    created_at_unix_ns: i64,
    boot_id: String,
    /// Empty if its record has none.
    hostname: String,
    addresses: Arc<[String]>,
    /// Plugins may have something of it.
    has_plugins: bool,
    files: SandboxFiles,
    cgroup_parent: Parent,
    state: Mutex<SandboxState>,
    events: Events,
    /// Held while it changes and while that is reported, so that changes are reported in order.
    /// Whether a stop has made it not ready and is still to be reported.
    reporting: Mutex<bool>,
    process: Mutex<Option<PodProcess>>,
    creations: Creations,
    /// Serializes stops.
    stopping: tokio::sync::Mutex<()>,
    /// The network was released; set by Stop.
    torn_down: Mutex<bool>,
    /// Its record must not be written: it is of a newer version, or could not be read and may
    /// become readable later.
    keeps_record: bool,
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

    /// Its hostname; the host's with the host's network. Never read from the file that its
    /// containers can write.
    pub(crate) fn hostname(&self) -> std::io::Result<String> {
        if self.hostname.is_empty() { hostname::of(&self.config) } else { Ok(self.hostname.clone()) }
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

    /// Starts the creation of a container in it; `None` if it was stopped, or its own process has
    /// ended.
    pub(crate) fn begin_creation(&self) -> Option<Creation> {
        if self.state() == SandboxState::Ready { self.creations.begin() } else { None }
    }

    /// Ready until it is stopped or its own process, if it has one, ends.
    pub(crate) fn state(&self) -> SandboxState {
        let state = *lock(&self.state);
        let dead = lock(&self.process).as_ref().is_some_and(PodProcess::has_ended);
        if dead { sandbox_after(state, SandboxEvent::ProcessEnded) } else { state }
    }

    /// It, as it is now.
    pub(crate) fn snapshot(&self) -> SandboxSnapshot {
        SandboxSnapshot {
            id: self.id.clone(),
            config: self.config.clone(),
            created_at_unix_ns: self.created_at_unix_ns,
            addresses: self.addresses.clone(),
            state: self.state(),
        }
    }

    /// Applies an event to the state, and reports it.
    fn apply(&self, event: SandboxEvent) {
        let _in_order = lock(&self.reporting);
        if self.change(event) {
            self.events.report(self.what(SandboxChange::NotReady(event)));
        }
    }

    /// Applies a stop to the state. [`Self::report_stop`] reports it, once the containers have
    /// ended: like other runtimes, Berth reports their ends first.
    fn begin_stop(&self) {
        let mut unreported = lock(&self.reporting);
        *unreported |= self.change(SandboxEvent::Stopped);
    }

    /// Reports the stop that has begun, if that has not been done.
    fn report_stop(&self) {
        let mut unreported = lock(&self.reporting);
        if std::mem::take(&mut *unreported) {
            self.events.report(self.what(SandboxChange::NotReady(SandboxEvent::Stopped)));
        }
    }

    /// Applies an event to the state; returns whether that changes it.
    fn change(&self, event: SandboxEvent) -> bool {
        let mut state = lock(&self.state);
        let next = sandbox_after(*state, event);
        std::mem::replace(&mut *state, next) != next
    }

    /// Makes it visible by `show`.
    fn appear(&self, show: impl FnOnce()) {
        let _in_order = lock(&self.reporting);
        self.events.report_if(self.what(SandboxChange::Ready), || {
            show();
            true
        });
    }

    /// Makes it invisible by `hide`, which returns whether it was visible.
    fn disappear(&self, hide: impl FnOnce() -> bool) {
        let _in_order = lock(&self.reporting);
        self.events.report_if(self.what(SandboxChange::Removed), hide);
    }

    /// Reports that everything it held was released.
    fn report_stopped(&self) {
        let _in_order = lock(&self.reporting);
        self.events.report(self.what(SandboxChange::Stopped));
    }

    /// Reports that a previous daemon's sandbox is not ready, unless that daemon has. For one that
    /// is visible. Blocking.
    fn report_lost(&self) {
        let (untold, state) = (self.files.untold(), *lock(&self.state));
        if state == SandboxState::Ready {
            // An earlier version created it. Without the file its end is reported if a daemon sees
            // it.
            return drop(std::fs::File::create(untold));
        }
        if !untold.try_exists().unwrap_or(false) {
            return;
        }
        let in_order = lock(&self.reporting);
        self.events.report(self.what(SandboxChange::NotReady(SandboxEvent::Lost)));
        drop(in_order);
        self.forget_untold();
    }

    /// Notes that its end has been reported. Blocking.
    fn forget_untold(&self) {
        // At worst it stays, and the next daemon reports the end again.
        let _ = std::fs::remove_file(self.files.untold());
    }

    fn what(&self, change: SandboxChange) -> What {
        What::Sandbox(self.snapshot(), change)
    }

    /// Whether it was stopped, and has nothing of the node any more.
    pub(crate) fn is_torn_down(&self) -> bool {
        *lock(&self.torn_down)
    }

    /// The pid of its own process, if it has one.
    pub(crate) fn pid(&self) -> Option<i32> {
        lock(&self.process).as_ref().map(|process| process.record.pid)
    }

    fn record(&self) -> SandboxRecord {
        SandboxRecord {
            id: self.id.clone(),
            config: Config::clone(&self.config),
            created_at_unix_ns: self.created_at_unix_ns,
            boot_id: self.boot_id.clone(),
            addresses: self.addresses.to_vec(),
            process: lock(&self.process).as_ref().map(|process| process.record),
            stopped: *lock(&self.torn_down),
            hostname: self.hostname.clone(),
            without_plugins: !self.has_plugins,
            shared_in_tmpfs: self.files.shared == Shared::InTmpfs,
        }
    }

    fn record_files(&self) -> RecordFiles {
        RecordFiles { record: self.files.record(), copy: self.files.record_copy() }
    }

    fn write_record(&self) -> Result<(), SandboxError> {
        if self.keeps_record {
            return Ok(());
        }
        let id = || self.id.clone();
        self.record_files().write(&self.record()).map_err(|source| SandboxError::Record { id: id(), source })
    }
}
