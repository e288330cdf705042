//! Containers of a previous daemon.
//!
//! A record says that there was a container; its exit record says how it ended. Without one its
//! shim is asked, by [`super::follow`], which may take as long as it takes: until then the
//! container is reported as it was last known to be.

use std::sync::Arc;

use berth_cgroup::{Cgroup, Parent};
use berth_model::id::ContainerId;
use berth_model::record::ContainerRecord;
use berth_model::state::ContainerEvent;

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
    let mut container = Container::new(record, files, cgroup, node.cgroups.left());
    container.keeps_record = matches!(health, Health::Newer(_));
    // A daemon that writes no copies does not write this either.
    let told_of_starts = !matches!(health, Health::NoCopy);
    settle_what_is_known(&container, told_of_starts);
    Ok(Recovered::Container(Arc::new(container)))
}

/// Sets its state, according to its files.
pub(super) fn settle_what_is_known(container: &Container, told_of_starts: bool) {
    if let Evidence::Told(record) = end::look(container) {
        // Written by its shim, which then ended, or by the daemon.
        let _ = container.learn(ContainerEvent::Ended(end::exit(&record)));
        return;
    }
    let created_at = container.record.created_at_unix_ns;
    let presumed = match std::fs::read_to_string(container.files.started()) {
        Ok(text) => Some(text.trim().parse().unwrap_or(created_at)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && told_of_starts => None,
        // Unknown; what may run is reported as running.
        Err(_) => Some(created_at),
    };
    *lock(&container.presumed_since_unix_ns) = presumed;
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
    let mut container = Container::new(record.clone(), files, cgroup, node.cgroups.left());
    container.keeps_record = keeps_record;
    settle_what_is_known(&container, false);
    Ok(container)
}
