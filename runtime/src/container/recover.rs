//! Containers of a previous daemon.
//!
//! A record says that there was a container; its exit record says how it ended. Without one its
//! shim is asked, by [`super::follow`], which may take as long as it takes: until then the
//! container is reported as it was last known to be.

use std::sync::Arc;

use berth_cgroup::{Cgroup, Parent};
use berth_model::id::ContainerId;
use berth_model::layout::START_UNTOLD;
use berth_model::record::ContainerRecord;
use berth_model::state::{ContainerEvent, ContainerState};

use super::end::{self, Evidence};
use super::{Container, ContainerError, lock};
use crate::node::Node;
use crate::record_files::{self, Fault, Found, Health, Patience, RecordFiles};

/// What exists of a container.
#[derive(Debug)]
pub(crate) enum Recovered {
    /// It is complete: it has ended, or has to be followed.
    Container(Arc<Container>),
    /// Its creation was never finished, or its removal was.
    Remains,
    /// There is a record that cannot be used.
    Unusable {
        /// What is wrong with it.
        fault: Fault,
        /// Whether it is proven damaged.
        damaged: bool,
    },
}

/// Creates the container from the record of `id`. Blocking.
///
/// # Errors
/// When its record is valid but the container cannot be created from it.
pub(crate) fn recover(
    node: &Node,
    id: &ContainerId,
    patience: &Patience,
) -> Result<Recovered, ContainerError> {
    let files = node.layout.container(id);
    let record_files = RecordFiles { record: files.record(), copy: files.record_copy() };
    let (record, health) = match record_files.read(patience, |record: &ContainerRecord| record.id == *id) {
        Found::Absent => return Ok(Recovered::Remains),
        Found::Unusable { fault, damaged } => return Ok(Recovered::Unusable { fault, damaged }),
        Found::Whole { content, health } => (content, health),
    };
    let cgroup = open_cgroup(node, &record)?;
    record_files::mend(&node.layout, "container", id.as_str(), &record_files, &health, &record);
    let mut container = Container::new(record, files, cgroup, node.cgroups.left(), node.events.clone());
    container.keeps_record = matches!(health, Health::Newer(_));
    // A daemon that writes no copies does not write this either.
    let notes_starts = !matches!(health, Health::NoCopy);
    settle_what_is_known(&container, notes_starts);
    Ok(Recovered::Container(Arc::new(container)))
}

/// Sets its state, according to its files. `notes_starts`: whether the daemon that created it noted
/// every start.
pub(super) fn settle_what_is_known(container: &Container, notes_starts: bool) {
    let created_at = container.record.created_at_unix_ns;
    let (asked_at, reported) = match std::fs::read_to_string(container.files.started()) {
        Ok(text) => {
            let (time, reported) = match text.strip_suffix(START_UNTOLD) {
                Some(time) => (time, false),
                None => (text.as_str(), true),
            };
            (Some(time.trim().parse().unwrap_or(created_at)), reported)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && notes_starts => (None, false),
        // Unknown; what may run is reported as running.
        Err(_) => (Some(created_at), true),
    };
    lock(&container.reported).started = reported;
    if let Evidence::Told(record) = end::look(container) {
        // Written by its shim, which then ended, or by the daemon.
        let _ = container.learn(ContainerEvent::Ended(end::exit(&record)));
        return;
    }
    *lock(&container.presumed_since_unix_ns) = asked_at;
}

/// Reports an end that came while no daemon was running, unless an earlier daemon has. For a
/// container that is visible. Blocking.
pub(crate) fn report_end(container: &Container) {
    let untold = container.files.untold();
    match container.state() {
        ContainerState::Exited(exit) => {
            if untold.try_exists().unwrap_or(false) {
                container.report_end(&mut lock(&container.reported), exit);
                end::forget_untold(container);
            }
        }
        // An earlier version created it. Without the file its end is reported if a daemon sees it.
        _ => drop(std::fs::File::create(untold)),
    }
}

fn open_cgroup(node: &Node, record: &ContainerRecord) -> Result<Cgroup, ContainerError> {
    // From the path, not the configuration: the daemon that created it may have had a different
    // one.
    let parent = match record.cgroup.as_str() {
        "" => node.cgroups.default_parent.clone(),
        path => Parent::of(path)?,
    };
    Ok(node.cgroups.open(&parent, record.id.as_str())?)
}

/// Kills what is left in the cgroup of a container that has ended, and removes it. Blocking.
pub(crate) fn clean(container: &Container) {
    end::clean(container);
}

/// The container of a record that was reconstructed from other sources. Blocking.
pub(super) fn of_record(
    node: &Node,
    record: ContainerRecord,
    keeps_record: bool,
) -> Result<Container, ContainerError> {
    let cgroup = open_cgroup(node, &record)?;
    let files = node.layout.container(&record.id);
    let mut container = Container::new(record, files, cgroup, node.cgroups.left(), node.events.clone());
    container.keeps_record = keeps_record;
    settle_what_is_known(&container, false);
    Ok(container)
}
