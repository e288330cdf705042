//! Containers: created in a sandbox, each owned by its shim.
//!
//! - `create`: CreateContainer, everything up to the exec of the program;
//! - `target`: the container whose pid namespace another one joins;
//! - `start`: StartContainer;
//! - `exec`, `output_room`: ExecSync, and the memory for the output of commands;
//! - `stop`: StopContainer;
//! - `remove`: RemoveContainer;
//! - `follow`: finding its shim, and waiting for its end;
//! - `end`: what happens when it has ended, on its own or not;
//! - `shutdown`: how it ends when the machine goes down;
//! - `recover`: a container from its record, in a new daemon;
//! - `lost`: a running container without a record.
//!
//! The state is in a watch channel: waiting for the end of a container means waiting for that value
//! to change. It changes through `model::state` only.

pub(crate) mod create;
mod end;
mod error;
pub(crate) mod exec;
pub(crate) mod follow;
pub(crate) mod lost;
pub(crate) mod output_room;
pub(crate) mod recover;
pub(crate) mod remove;

mod shutdown;
pub(crate) mod start;
pub(crate) mod stop;
mod target;
pub(crate) mod update;

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use berth_cgroup::Cgroup;
use berth_model::container::{Config, Resources};
use berth_model::id::{ContainerId, SandboxId};
use berth_model::layout::ContainerFiles;
use berth_model::record::{ContainerRecord, ProcessRecord};
use berth_model::state::{ContainerEvent, ContainerState, Exit, Refused, container_after};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use crate::cgroups::LeftCgroups;
use crate::clock::unix_ns;
use crate::events::{ContainerChange, Events, What};
use crate::lock;
use crate::names::Name;
use crate::record_files::RecordFiles;
use crate::shim_client::ShimClient;
use crate::snapshot::ContainerSnapshot;

pub(crate) use error::ContainerError;

/// Clients that may be attached to a container at a time. Each has two outputs, which hold 64 KiB
/// at least.
const MOST_ATTACHED: usize = 256;

/// What was reported of a container, by this daemon or an earlier one.
#[derive(Debug, Default)]
struct Reported {
    started: bool,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    /// Everything that does not change, except for the resources, which are in
    /// [`Container::resources`].
    record: Arc<ContainerRecord>,
    files: ContainerFiles,
    cgroup: Cgroup,
    events: Events,
    /// Takes a cgroup that cannot be removed.
    left: LeftCgroups,
    resources: Mutex<Resources>,
    state: watch::Sender<ContainerState>,
    /// It has ended, and what is left in its cgroup is being killed.
    clearing: watch::Sender<bool>,
    /// Held while it changes and while that is reported, so that changes are reported in order.
    reported: Mutex<Reported>,
    /// Since when it is assumed to run, while its shim has not confirmed it. What may run is
    /// reported as running: otherwise a kubelet would start another beside it.
    presumed_since_unix_ns: Mutex<Option<i64>>,
    /// Its main process, from the record unless that was lost.
    process: Mutex<Option<ProcessRecord>>,
    shim: Mutex<Option<Arc<ShimClient>>>,
    /// Serializes start, update and the removal of files. Nothing that ends a container waits for
    /// it.
    operation: tokio::sync::Mutex<()>,
    /// When the current stop kills; only ever moved earlier.
    kill_at: watch::Sender<Option<Instant>>,
    /// Notified when none of its processes is left and its shim need not be waited for.
    given_up: Notify,
    /// Whether a task waits for its end, or it has ended.
    followed: AtomicBool,
    /// Places for clients that are attached to its streams.
    attached: Arc<Semaphore>,
    /// Clients that are to be attached before its start, and are not yet.
    joining: watch::Sender<usize>,
    /// Its record must not be written: it is of a newer version, or could not be read and may
    /// become readable later.
    keeps_record: bool,
}

/// A client that is not attached yet. Dropping it ends the wait for it.
#[derive(Debug)]
pub(crate) struct Joining(Arc<Container>);

impl Drop for Joining {
    fn drop(&mut self) {
        self.0.joining.send_modify(|joining| *joining -= 1);
    }
}

impl Container {
    /// A container that waits for its start, according to its record.
    fn new(
        record: ContainerRecord,
        files: ContainerFiles,
        cgroup: Cgroup,
        left: LeftCgroups,
        events: Events,
    ) -> Self {
        Self {
            resources: Mutex::new(record.config.resources.clone()),
            state: watch::Sender::new(ContainerState::Created),
            clearing: watch::Sender::new(false),
            reported: Mutex::default(),
            presumed_since_unix_ns: Mutex::default(),
            process: Mutex::new(record.process),
            shim: Mutex::default(),
            operation: tokio::sync::Mutex::default(),
            kill_at: watch::Sender::new(None),
            given_up: Notify::new(),
            followed: AtomicBool::new(false),
            attached: Arc::new(Semaphore::new(MOST_ATTACHED)),
            joining: watch::Sender::new(0),
            keeps_record: false,
            record: Arc::new(record),
            files,
            cgroup,
            events,
            left,
        }
    }

    pub(crate) fn id(&self) -> &ContainerId {
        &self.record.id
    }

    pub(crate) fn sandbox_id(&self) -> &SandboxId {
        &self.record.sandbox_id
    }

    pub(crate) fn config(&self) -> &Config {
        &self.record.config
    }

    pub(crate) fn record(&self) -> &ContainerRecord {
        &self.record
    }

    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    pub(crate) fn files(&self) -> &ContainerFiles {
        &self.files
    }

    /// The limits in force.
    pub(crate) fn resources(&self) -> Resources {
        lock(&self.resources).clone()
    }

    /// Its state, as it is reported.
    pub(crate) fn state(&self) -> ContainerState {
        let state = self.state.borrow().clone();
        match (&state, *lock(&self.presumed_since_unix_ns)) {
            (ContainerState::Created, Some(started_at_unix_ns)) => {
                ContainerState::Running { started_at_unix_ns }
            }
            _ => state,
        }
    }

    /// It, as it is now.
    pub(crate) fn snapshot(&self) -> ContainerSnapshot {
        let resources = lock(&self.resources);
        let changed = (*resources != self.record.config.resources).then(|| resources.clone());
        drop(resources);
        ContainerSnapshot { record: self.record.clone(), resources: changed, state: self.state() }
    }

    /// Its unique name.
    pub(crate) fn name(&self) -> Name {
        Name::Container(self.record.sandbox_id.clone(), self.record.config.metadata.clone())
    }

    pub(crate) fn image_digest(&self) -> Option<berth_image::Digest> {
        berth_image::Digest::parse(&self.record.image_id).ok()
    }

    /// The host's pid of the main process; `None` once it has ended.
    pub(crate) fn pid(&self) -> Option<i32> {
        let ended = matches!(*self.state.borrow(), ContainerState::Exited(_));
        lock(&self.process).filter(|_| !ended).map(|process| process.pid)
    }

    /// Whether its program is certainly running.
    pub(crate) fn is_running(&self) -> bool {
        matches!(*self.state.borrow(), ContainerState::Running { .. })
    }

    /// Whether its end is not awaited yet.
    pub(crate) fn is_unfollowed(&self) -> bool {
        !self.followed.load(Ordering::Relaxed)
    }

    /// The pid of its shim, if it has one.
    pub(crate) fn shim_pid(&self) -> Option<i32> {
        lock(&self.shim).as_ref().and_then(|shim| shim.pid())
    }

    fn shim(&self) -> Option<Arc<ShimClient>> {
        lock(&self.shim).clone()
    }

    /// The shim of a running container.
    pub(crate) fn running_shim(&self) -> Result<Arc<ShimClient>, ContainerError> {
        let state = self.state();
        match (&state, self.shim()) {
            (ContainerState::Running { .. }, Some(shim)) => Ok(shim),
            (ContainerState::Running { .. }, None) => {
                Err(ContainerError::ShimUnreached { id: self.id().clone() })
            }
            _ => Err(ContainerError::WrongState { id: self.id().clone(), state: state.name() }),
        }
    }

    /// The shim of a created or running container.
    pub(crate) fn live_shim(&self) -> Result<Arc<ShimClient>, ContainerError> {
        match self.state() {
            ContainerState::Created => {
                self.shim().ok_or_else(|| ContainerError::ShimUnreached { id: self.id().clone() })
            }
            _ => self.running_shim(),
        }
    }

    /// A client that is to be attached before the start, which waits for it a while.
    pub(crate) fn expect_client(self: &Arc<Self>) -> Joining {
        self.joining.send_modify(|joining| *joining += 1);
        Joining(self.clone())
    }

    /// Resolves when no such client is missing.
    pub(crate) async fn joined(&self) {
        // The sender is this container's.
        let _ = self.joining.subscribe().wait_for(|joining| *joining == 0).await;
    }

    /// A place for a client that attaches to its streams.
    ///
    /// # Errors
    /// When too many are attached.
    pub(crate) fn attach(&self) -> Result<OwnedSemaphorePermit, ContainerError> {
        self.attached
            .clone()
            .try_acquire_owned()
            .map_err(|_| ContainerError::TooManyAttached { id: self.id().clone(), most: MOST_ATTACHED })
    }

    /// Applies an event to the state, and reports it.
    fn apply(&self, event: ContainerEvent) -> Result<(), Refused> {
        let mut reported = lock(&self.reported);
        if !self.learn(event.clone())? {
            return Ok(());
        }
        match event {
            ContainerEvent::Started { at_unix_ns } => {
                self.report_start(&mut reported);
                drop(reported);
                start::note(self, at_unix_ns, "");
            }
            ContainerEvent::Ended(exit) => self.report_end(&mut reported, exit),
        }
        Ok(())
    }

    /// Assumes from now on that it is running, until its shim reports.
    fn presume(&self) {
        let mut reported = lock(&self.reported);
        let since = *lock(&self.presumed_since_unix_ns).get_or_insert_with(unix_ns);
        self.report_start(&mut reported);
        drop(reported);
        start::note(self, since, "");
    }

    /// Makes it visible by `show`.
    fn appear(&self, show: impl FnOnce()) {
        let _in_order = lock(&self.reported);
        self.events.report_if(self.what(ContainerChange::Created), || {
            show();
            true
        });
    }

    /// Makes it invisible by `hide`, which returns whether it was visible.
    fn disappear(&self, hide: impl FnOnce() -> bool) {
        let _in_order = lock(&self.reported);
        self.events.report_if(self.what(ContainerChange::Removed), hide);
    }

    /// Once, whether it is seen running before its end or not.
    fn report_start(&self, reported: &mut Reported) {
        if !std::mem::replace(&mut reported.started, true) {
            self.events.report(self.what(ContainerChange::Started));
        }
    }

    fn report_end(&self, reported: &mut Reported, exit: Exit) {
        // It may have ended before the answer to its start arrived.
        if exit.started_at_unix_ns != 0 {
            self.report_start(reported);
        }
        self.events.report(self.what(ContainerChange::Ended(exit)));
    }

    fn what(&self, change: ContainerChange) -> What {
        What::Container(self.record.clone(), change)
    }

    /// Sets the state; returns whether that changes it. Reports nothing.
    fn learn(&self, event: ContainerEvent) -> Result<bool, Refused> {
        let mut result = Ok(());
        let changed = self.state.send_if_modified(|state| match container_after(state, event) {
            Ok(next) if next == *state => false,
            Ok(next) => {
                *state = next;
                true
            }
            Err(refused) => {
                result = Err(refused);
                false
            }
        });
        result.map(|()| changed)
    }

    /// Waits until every change of its state that can be seen has been reported.
    pub(crate) fn reported(&self) {
        drop(lock(&self.reported));
    }

    /// Waits until its cgroup is empty or cannot be removed. For one that has ended.
    pub(crate) async fn cleared(&self) {
        let mut clearing = self.clearing.subscribe();
        let _ = tokio::time::timeout(end::CLEARED, clearing.wait_for(|clearing| !clearing)).await;
    }

    /// Waits until it has ended.
    pub(crate) async fn exited(&self) {
        let mut state = self.state.subscribe();
        // The sender is in `self`, so it cannot have gone.
        let _ = state.wait_for(|state| matches!(state, ContainerState::Exited(_))).await;
    }

    fn record_files(&self) -> RecordFiles {
        RecordFiles { record: self.files.record(), copy: self.files.record_copy() }
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// How a process enters `cgroup`, in the form of the plan.
pub(crate) fn cgroup_plan(cgroup: &Cgroup) -> berth_shim_proto::launch::Cgroup {
    let oom = cgroup.oom_source();
    berth_shim_proto::launch::Cgroup {
        tasks_files: cgroup.join_files().iter().map(|path| bytes(path)).collect(),
        unified_dir: cgroup.unified_dir().map(|path| bytes(&path)).unwrap_or_default(),
        oom_file: oom.as_ref().map(|source| bytes(&source.file)).unwrap_or_default(),
        oom_key: oom.map(|source| source.key.to_owned()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use berth_cgroup::{Driver, Hierarchy, Parent};
    use berth_model::layout::Layout;
    use berth_model::state::ExitReason;
    use tracing::dispatcher::with_default;

    use super::*;
    use crate::events::heard::Heard;
    use crate::snapshot::PodSnapshot;

    /// How often the other thread is let go first by the first notification, which it uses unless
    /// it has to wait.
    const TURNS: usize = 10_000;

    fn container() -> Container {
        let record = ContainerRecord::default();
        let files = Layout::new("/nowhere/root".into(), "/nowhere/state".into()).container(&record.id);
        let parent = Parent::named(Driver::Cgroupfs, "/nowhere").unwrap();
        let hierarchy = Hierarchy::Legacy { mounts: Vec::new() };
        let cgroup = Cgroup::open(&hierarchy, &parent, record.id.as_str()).unwrap();
        Container::new(record, files, cgroup, LeftCgroups::default(), Events::new(|_| PodSnapshot::default()))
    }

    fn started() -> ContainerEvent {
        ContainerEvent::Started { at_unix_ns: 1 }
    }

    fn ended(started_at_unix_ns: i64) -> ContainerEvent {
        let (reason, message) = (ExitReason::Completed, String::new());
        ContainerEvent::Ended(Exit { code: 0, started_at_unix_ns, finished_at_unix_ns: 2, reason, message })
    }

    /// What is published while `first` happens and, on another thread, `second` as soon as
    /// `is_time`.
    fn told_by(
        first: impl FnOnce(&Container),
        is_time: impl Fn(&Container) -> bool + Send + Sync,
        second: impl FnOnce(&Container) + Send,
    ) -> Vec<String> {
        let first_told = AtomicBool::new(true);
        let heard = Heard::new(move |_| {
            if first_told.swap(false, Ordering::AcqRel) {
                (0..TURNS).for_each(|_| std::thread::yield_now());
            }
        });
        let container = container();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_time(&container) {
                    std::thread::yield_now();
                }
                with_default(&heard.dispatch(), || second(&container));
            });
            with_default(&heard.dispatch(), || first(&container));
        });
        heard.all()
    }

    #[test]
    fn an_end_is_told_after_the_start_that_it_comes_upon() {
        let told = told_by(
            |container| container.apply(started()).unwrap(),
            Container::is_running,
            |container| container.apply(ended(1)).unwrap(),
        );
        assert_eq!(told, ["container started", "container ended"]);
    }

    #[test]
    fn a_container_is_told_to_be_created_when_it_can_be_seen_and_before_anything_else() {
        let visible = AtomicBool::new(false);
        let told = told_by(
            |container| container.appear(|| visible.store(true, Ordering::Release)),
            |_| visible.load(Ordering::Acquire),
            |container| {
                container.apply(started()).unwrap();
                container.apply(ended(1)).unwrap();
                container.disappear(|| true);
            },
        );
        assert_eq!(told, ["container created", "container started", "container ended", "container removed"]);
    }

    #[test]
    fn each_change_is_told_once_whatever_comes_first() {
        type Step = fn(&Container);
        let start: Step = |container| drop(container.apply(started()));
        let end: Step = |container| drop(container.apply(ended(1)));
        let fail: Step = |container| drop(container.apply(ended(0)));
        let presume: Step = Container::presume;
        let both = &["container started", "container ended"][..];
        let cases: [(&[Step], &[&str]); 6] = [
            (&[start, start, end, end], both),
            // The answer to the start comes after the end.
            (&[end, start], both),
            (&[fail, start, end], &["container ended"]),
            // A start without an answer.
            (&[presume, presume, start, end], both),
            (&[presume, end], both),
            (&[presume, fail], both),
        ];
        for (number, (steps, expected)) in cases.into_iter().enumerate() {
            let heard = Heard::new(|_| ());
            let container = container();
            with_default(&heard.dispatch(), || steps.iter().for_each(|step| step(&container)));
            assert_eq!(heard.all(), expected, "case {number}");
        }
    }
}
