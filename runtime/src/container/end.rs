//! The end of a container: from its shim's record or last message, or from the loss of its shim, to
//! the state that all observers see.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use berth_model::security::NamespaceMode;
use berth_model::state::{ContainerEvent, ContainerState, Exit, ExitReason};
use berth_shim_proto::exit_record::{self, ExitRecord, MAX_BYTES};

use super::{Container, lock};
use crate::cgroups::CGROUP_GONE;
use crate::record_files::may_pass;

/// The code of a container whose end was not seen: containerd's.
const EXIT_CODE_LOST: i32 = 255;

/// Somewhat longer than [`CGROUP_GONE`] for the kill and the removal together.
pub(super) const CLEARED: Duration = Duration::from_secs(25);

/// What is known about a container's end.
#[derive(Debug)]
pub(super) enum Evidence {
    /// How it ended.
    Told(ExitRecord),
    /// There is no record of an end, or one that is proven damaged.
    Nothing,
    /// There may be one, which cannot be read now.
    Unread(io::Error),
}

/// Looks whether there is a record of its end: the shim's, or the daemon's where there was no room
/// for that. Blocking.
pub(super) fn look(container: &Container) -> Evidence {
    match (read(&container.files.exit_record()), read(&container.files.exit_record_copy())) {
        (Evidence::Told(record), _) | (_, Evidence::Told(record)) => Evidence::Told(record),
        (Evidence::Unread(error), _) | (_, Evidence::Unread(error)) => Evidence::Unread(error),
        (Evidence::Nothing, Evidence::Nothing) => Evidence::Nothing,
    }
}

fn read(path: &Path) -> Evidence {
    let mut bytes = Vec::new();
    // One byte more than the longest valid one.
    let limit = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    match File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)) {
        Ok(_) => match exit_record::decode(&bytes) {
            Ok(record) => Evidence::Told(record),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the exit record of a container is damaged");
                Evidence::Nothing
            }
        },
        Err(error) if error.kind() != io::ErrorKind::IsADirectory && !may_pass(&error) => Evidence::Nothing,
        Err(error) => Evidence::Unread(error),
    }
}

/// Publishes how it ended, and ends whatever is left of it. Without `told` it is unknown, and
/// `unread` says why, if there is a record that cannot be read. Blocking.
pub(super) fn settle(container: &Arc<Container>, told: Option<ExitRecord>, unread: Option<&io::Error>) {
    let record = told.unwrap_or_else(|| lost(container));
    // Processes that are not in a pid namespace that died with its process 1, or all of them when
    // the shim was lost. Their removal takes time, which lists do not wait for; what is left is
    // handled below.
    let has_own_pids = container.config().security.namespaces.pid == NamespaceMode::Container;
    if record.lost || !has_own_pids {
        let _ = container.cgroup.kill(Duration::ZERO);
    }
    let mut exit = exit(&record);
    match unread {
        Some(error) if record.lost => exit.message = format!("its exit record cannot be read: {error}"),
        // Must not replace one that the next daemon may be able to read.
        _ => keep(container, &record),
    }
    if record.log_bytes_lost > 0 || record.log_incomplete {
        tracing::warn!(
            container = %container.id(), lost_bytes = record.log_bytes_lost, incomplete = record.log_incomplete,
            "the log of a container did not take all its output; its disk was full, or did not answer"
        );
    }
    *lock(&container.shim) = None;
    container.clearing.send_replace(true);
    // Every state can be followed by an end, and a second end changes nothing.
    let _ = container.apply(ContainerEvent::Ended(exit));
    forget_untold(container);
    clean(container);
    container.clearing.send_replace(false);
}

/// Notes that its end has been reported. Blocking.
pub(super) fn forget_untold(container: &Container) {
    // At worst it stays, and the next daemon reports the end again.
    let _ = std::fs::remove_file(container.files.untold());
}

/// Kills what is left in its cgroup, and removes it. Blocking.
pub(super) fn clean(container: &Container) {
    if !container.cgroup.is_there() {
        return;
    }
    if let Err(error) = container.cgroup.end(CGROUP_GONE) {
        tracing::warn!(container = %container.id(), error = %crate::chain(&error), "cannot remove the cgroup of a container; trying again");
        container.left.keep(&container.cgroup);
    }
}

/// Ensures that the end is on disk or, if that is full, in memory for the next daemon.
fn keep(container: &Container, record: &ExitRecord) {
    let (path, copy) = (container.files.exit_record(), container.files.exit_record_copy());
    if matches!(read(&path), Evidence::Told(_)) {
        return;
    }
    let bytes = exit_record::encode(record);
    let Err(error) = crate::atomic_file::write(&path, &bytes) else { return };
    let kept = crate::atomic_file::write(&copy, &bytes).is_ok();
    tracing::warn!(path = %path.display(), %error, kept, "cannot write the exit record of a container");
}

fn lost(container: &Container) -> ExitRecord {
    let started_at_unix_ns = match container.state() {
        ContainerState::Running { started_at_unix_ns } => started_at_unix_ns,
        _ => 0,
    };
    ExitRecord {
        exit_code: EXIT_CODE_LOST,
        lost: true,
        started_at_unix_ns,
        finished_at_unix_ns: crate::clock::unix_ns(),
        ..ExitRecord::default()
    }
}

/// The exit in `ContainerStatus` for `record`.
pub(super) fn exit(record: &ExitRecord) -> Exit {
    let (reason, message) = if !record.start_error.is_empty() {
        (ExitReason::StartError, record.start_error.clone())
    } else if record.oom_killed {
        (ExitReason::OomKilled, String::new())
    } else if record.lost {
        (ExitReason::Unknown, "its shim was lost, so how it ended is not known".to_owned())
    } else if record.exit_code == 0 {
        (ExitReason::Completed, String::new())
    } else {
        (ExitReason::Error, String::new())
    };
    Exit {
        code: record.exit_code,
        started_at_unix_ns: record.started_at_unix_ns,
        finished_at_unix_ns: record.finished_at_unix_ns,
        reason,
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_follow_from_the_record() {
        let ended = ExitRecord { started_at_unix_ns: 1, finished_at_unix_ns: 2, ..ExitRecord::default() };
        let cases = [
            (ended.clone(), ExitReason::Completed),
            (ExitRecord { exit_code: 3, ..ended.clone() }, ExitReason::Error),
            (ExitRecord { exit_code: 255, ..ended.clone() }, ExitReason::Error),
            (ExitRecord { exit_code: 137, signal: 9, ..ended.clone() }, ExitReason::Error),
            (
                ExitRecord { exit_code: 137, signal: 9, oom_killed: true, ..ended.clone() },
                ExitReason::OomKilled,
            ),
            (ExitRecord { exit_code: 1, oom_killed: true, ..ended.clone() }, ExitReason::OomKilled),
            (ExitRecord { exit_code: 255, lost: true, ..ended.clone() }, ExitReason::Unknown),
            (ExitRecord { exit_code: 128, start_error: "no".to_owned(), ..ended }, ExitReason::StartError),
        ];
        for (record, reason) in cases {
            assert_eq!(exit(&record).reason, reason, "{record:?}");
        }
    }

    /// A container of which nothing is there but its two directories, of which `durable` may be
    /// missing too.
    fn container(directory: &Path, durable: bool) -> Arc<Container> {
        use berth_cgroup::{Cgroup, Driver, Hierarchy, Parent};
        use berth_model::layout::Layout;
        use berth_model::record::ContainerRecord;

        use crate::cgroups::LeftCgroups;
        use crate::events::Events;
        use crate::snapshot::PodSnapshot;
        let record = ContainerRecord::default();
        let files = Layout::new(directory.join("root"), directory.join("state")).container(&record.id);
        std::fs::create_dir_all(&files.state).unwrap();
        if durable {
            std::fs::create_dir_all(&files.durable).unwrap();
        }
        let hierarchy = Hierarchy::Legacy { mounts: Vec::new() };
        let parent = Parent::named(Driver::Cgroupfs, "/nowhere").unwrap();
        let cgroup = Cgroup::open(&hierarchy, &parent, record.id.as_str()).unwrap();
        let events = Events::new(|_| PodSnapshot::default());
        Arc::new(Container::new(record, files, cgroup, LeftCgroups::default(), events))
    }

    fn seen(container: &Container) -> (i32, ExitReason) {
        match container.state() {
            ContainerState::Exited(exit) => (exit.code, exit.reason),
            other => panic!("{other:?}"),
        }
    }

    const SEVEN: ExitRecord = ExitRecord {
        exit_code: 7,
        signal: 0,
        oom_killed: false,
        started_at_unix_ns: 1,
        finished_at_unix_ns: 2,
        start_error: String::new(),
        log_bytes_lost: 0,
        log_incomplete: false,
        lost: false,
    };

    #[test]
    fn an_end_is_told_before_the_cgroup_is_empty() {
        use berth_cgroup::{Cgroup, Driver, Hierarchy, Parent};
        let directory = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::Unified { mount: directory.path().join("cgroup") };
        let parent = Parent::named(Driver::Cgroupfs, "/pod").unwrap();
        let mut ended = container(directory.path(), true);
        let cgroup = Cgroup::open(&hierarchy, &parent, ended.id().as_str()).unwrap();
        let directory = cgroup.unified_dir().unwrap();
        std::fs::create_dir_all(&directory).unwrap();
        // A process that does not end.
        std::fs::write(directory.join("cgroup.events"), "populated 1\n").unwrap();
        std::fs::write(directory.join("cgroup.kill"), "").unwrap();
        Arc::get_mut(&mut ended).unwrap().cgroup = cgroup;
        let seen_at_once = std::thread::scope(|threads| {
            threads.spawn(|| settle(&ended, Some(SEVEN), None));
            while !matches!(*ended.state.borrow(), ContainerState::Exited(_)) {
                std::thread::yield_now();
            }
            let clearing = *ended.clearing.borrow();
            std::fs::remove_dir_all(&directory).unwrap();
            clearing
        });
        assert!(seen_at_once, "the end was told after the cgroup was cleared");
        assert!(!*ended.clearing.borrow());
    }

    #[test]
    fn an_end_that_was_told_is_kept_where_there_is_room() {
        for durable in [true, false] {
            let directory = tempfile::tempdir().unwrap();
            let ended = container(directory.path(), durable);
            settle(&ended, Some(SEVEN), None);
            assert_eq!(seen(&ended), (7, ExitReason::Error));
            // Which the next daemon finds.
            assert!(
                matches!(look(&container(directory.path(), false)), Evidence::Told(record) if record == SEVEN)
            );
            assert_eq!(ended.files.exit_record().exists(), durable);
            assert_eq!(ended.files.exit_record_copy().exists(), !durable);
        }
    }

    #[test]
    fn an_end_that_cannot_be_read_is_not_made_up_for_good() {
        let directory = tempfile::tempdir().unwrap();
        let ended = container(directory.path(), true);
        let (path, aside) = (ended.files.exit_record(), directory.path().join("aside"));
        std::fs::write(&aside, exit_record::encode(&SEVEN)).unwrap();
        // Reading it fails, and says nothing about what is there.
        std::fs::create_dir(&path).unwrap();
        let Evidence::Unread(error) = look(&ended) else { panic!("it cannot be read") };
        settle(&ended, None, Some(&error));
        assert_eq!(seen(&ended), (EXIT_CODE_LOST, ExitReason::Unknown));
        assert!(!ended.files.exit_record_copy().exists(), "nothing was written that would count later");
        std::fs::remove_dir(&path).unwrap();
        std::fs::rename(&aside, &path).unwrap();
        assert!(
            matches!(look(&container(directory.path(), true)), Evidence::Told(record) if record == SEVEN)
        );
    }

    #[test]
    fn an_end_that_nobody_saw_is_written_down_as_that() {
        let directory = tempfile::tempdir().unwrap();
        let ended = container(directory.path(), true);
        assert!(matches!(look(&ended), Evidence::Nothing));
        settle(&ended, None, None);
        assert_eq!(seen(&ended), (EXIT_CODE_LOST, ExitReason::Unknown));
        assert!(matches!(look(&ended), Evidence::Told(record) if record.lost));
    }
}
