//! The end of a container: detecting OOM kills, and the exit record.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use berth_shim_proto::exit_record::{ExitRecord, encode};
use berth_shim_proto::launch::Cgroup;
use berth_sys::process::SIGKILL;

use crate::aside::aside;
use crate::host_path::host_path;

/// Nanoseconds since the epoch; 0 before it.
pub(crate) fn unix_ns(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}

/// The counter of kills by the OOM killer in the container's cgroup.
///
/// systemd removes a scope as soon as its last process has ended, which may be before the shim has
/// seen that end, and the files of a removed cgroup cannot be read, even through a descriptor that
/// was open. So the counter is read whenever the kernel reports a change, which is before the
/// killed process has released its memory and ended. If even that is too late, the counter of the
/// parent cgroup, which includes all below it, decides for a process that ended by SIGKILL.
#[derive(Debug)]
pub(crate) struct OomCounter {
    file: File,
    key: Vec<u8>,
    /// Whether it had risen at the last read.
    seen: bool,
    /// The parent's counter, and its value at the start. `None` on v1, which does not count
    /// hierarchically, and does not need this.
    above: Option<(File, u64)>,
}

impl OomCounter {
    /// `None` if the cgroup has no such counter.
    pub(crate) fn open(cgroup: &Cgroup) -> io::Result<Option<Self>> {
        if cgroup.oom_file.is_empty() {
            return Ok(None);
        }
        let path = host_path(&cgroup.oom_file);
        let file = File::open(path)?;
        let key = cgroup.oom_key.clone().into_bytes();
        let above = if path.ends_with(TELLS_OF_CHANGES) { above(path, &key) } else { None };
        Ok(Some(Self { file, key, seen: false, above }))
    }

    /// The file, if it can be polled for changes.
    pub(crate) fn changing(&self) -> Option<BorrowedFd<'_>> {
        self.above.is_some().then(|| self.file.as_fd())
    }

    /// Reads it after a change. `false` if the cgroup is gone.
    pub(crate) fn look(&mut self) -> bool {
        match read(&self.file, &self.key) {
            Ok(kills) => {
                self.seen = kills > 0;
                true
            }
            Err(_) => false,
        }
    }

    /// Whether a kill was counted. `killed`: the container's main process ended by SIGKILL.
    pub(crate) fn has_risen(&self, killed: bool) -> bool {
        match read(&self.file, &self.key) {
            Ok(kills) => kills > 0,
            Err(_) if self.seen => true,
            // Another container of the pod may have been killed meanwhile; a container that ended
            // otherwise was not OOM-killed.
            Err(_) if killed => self
                .above
                .as_ref()
                .is_some_and(|(file, before)| read(file, &self.key).is_ok_and(|kills| kills > *before)),
            Err(_) => false,
        }
    }
}

/// The counter on v2, whose changes can be polled.
const TELLS_OF_CHANGES: &str = "memory.events";

/// The counter of the parent cgroup; `None` for the root, which has none.
fn above(path: &Path, key: &[u8]) -> Option<(File, u64)> {
    let file = File::open(path.parent()?.parent()?.join(TELLS_OF_CHANGES)).ok()?;
    let kills = read(&file, key).ok()?;
    Some((file, kills))
}

fn read(file: &File, key: &[u8]) -> io::Result<u64> {
    // The file has a few short lines: memory.events of cgroup v2, memory.oom_control of v1.
    let mut buffer = [0; 512];
    let length = file.read_at(&mut buffer, 0)?;
    Ok(count(buffer.get(..length).unwrap_or_default(), key))
}

fn count(file: &[u8], key: &[u8]) -> u64 {
    file.split(|byte| *byte == b'\n')
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix(b" "))
        .find_map(|value| std::str::from_utf8(value).ok()?.trim().parse().ok())
        .unwrap_or(0)
}

/// Ends every process that is left in the cgroup of a container without its own pid namespace, once
/// its main process has ended: they would hold its output open, and nothing else stops them soon.
/// The daemon checks again.
pub(crate) fn end_the_rest(cgroup: &Cgroup) {
    aside(|| kill_all(cgroup));
}

fn kill_all(cgroup: &Cgroup) {
    if !cgroup.unified_dir.is_empty() {
        // Linux 5.14. What cannot be killed here is killed by the daemon.
        let _ = std::fs::write(host_path(&cgroup.unified_dir).join("cgroup.kill"), "1");
        return;
    }
    let Some(tasks) = cgroup.tasks_files.first() else { return };
    let list = host_path(tasks).with_file_name("cgroup.procs");
    let processes = std::fs::read_to_string(list).unwrap_or_default();
    for pid in processes.lines().filter_map(|line| line.parse().ok()) {
        // By descriptor; the process with this number is still in the list, or has ended.
        if let Ok(pidfd) = berth_sys::process::open_pidfd(pid) {
            let _ = berth_sys::process::signal_pidfd(pidfd.as_fd(), SIGKILL);
        }
    }
}

/// Reserves the space of the record, so that it can be written even if the disk fills up
/// meanwhile.
pub(crate) fn reserve_record(path: &Path) -> io::Result<()> {
    let file = File::options().write(true).create(true).truncate(false).open(partial(path))?;
    berth_sys::file::allocate(file.as_fd(), RESERVED_BYTES)
}

/// The reserved size: one block. A record has some 30 bytes, plus the message of a failed start, as
/// far as it fits.
const RESERVED_BYTES: u64 = 4096;

/// The longest message of a failed start in a record, in bytes.
const MAX_START_ERROR: usize = 2048;

/// Releases what [`reserve_record`] reserved, if there is no container.
pub(crate) fn drop_reservation(path: &Path) {
    // The daemon removes the whole directory.
    let _ = std::fs::remove_file(partial(path));
}

/// Writes the record to its reserved space and renames it into place, so that it exists completely
/// or not at all.
pub(crate) fn write_record(path: &Path, record: &ExitRecord) -> io::Result<()> {
    let partial = partial(path);
    let mut record = record.clone();
    let mut end = MAX_START_ERROR.min(record.start_error.len());
    while !record.start_error.is_char_boundary(end) {
        end -= 1;
    }
    record.start_error.truncate(end);
    let bytes = encode(&record);
    // Not truncated before: that would release the space.
    let file = File::options().write(true).create(true).truncate(false).open(&partial)?;
    file.write_all_at(&bytes, 0)?;
    file.set_len(bytes.len().try_into().unwrap_or(RESERVED_BYTES))?;
    std::fs::rename(&partial, path)
}

/// The temporary path of the record.
fn partial(path: &Path) -> std::ffi::OsString {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    partial
}

/// The time at which the process started, as the daemon and this process both compute it.
pub(crate) fn start_time(pid: i32) -> u64 {
    // The process waits for its start and so exists; if it was killed in between, 0 matches no
    // process.
    berth_sys::process::start_time(pid).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_found_in_both_versions() {
        let v1 = b"oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        let v2 = b"low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n";
        for (file, expected) in
            [(v1.as_slice(), 3), (v2, 1), (b"", 0), (b"oom_kill x\n", 0), (b"oom_kill_disable 1\n", 0)]
        {
            assert_eq!(count(file, b"oom_kill"), expected, "{}", file.escape_ascii());
        }
    }

    #[test]
    fn kills_are_known_when_the_cgroup_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let leaf = directory.path().join("leaf");
        std::fs::create_dir(&leaf).unwrap();
        let write = |path: &Path, kills: u32| {
            std::fs::write(path.join("memory.events"), format!("oom 9\noom_kill {kills}\n")).unwrap();
        };
        let gone = || {
            // A directory cannot be read, just like a file of a removed cgroup.
            File::open(&leaf).unwrap()
        };
        let cgroup = Cgroup {
            oom_file: leaf.join("memory.events").into_os_string().into_encoded_bytes(),
            oom_key: "oom_kill".to_owned(),
            ..Cgroup::default()
        };
        write(directory.path(), 1);
        write(&leaf, 0);
        let open = || OomCounter::open(&cgroup).unwrap().unwrap();
        let quiet = open();
        assert!(!quiet.has_risen(true), "what was above before does not count");
        let mut told = open();
        write(&leaf, 1);
        assert!(told.look() && told.has_risen(false));
        told.file = gone();
        assert!(!told.look());
        assert!(told.has_risen(false), "it was seen");
        let mut untold = open();
        untold.file = gone();
        assert!(!untold.has_risen(true), "nothing was counted above");
        write(directory.path(), 2);
        assert!(untold.has_risen(true));
        assert!(!untold.has_risen(false), "it did not end by SIGKILL");
    }

    #[test]
    fn a_record_appears_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("exit");
        let record = ExitRecord { exit_code: 3, ..ExitRecord::default() };
        reserve_record(&path).unwrap();
        write_record(&path, &record).unwrap();
        assert_eq!(berth_shim_proto::exit_record::decode(&std::fs::read(&path).unwrap()), Ok(record.clone()));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        // It works without a reservation too, and keeps as much of a failed start's message as
        // fits.
        let record = ExitRecord { start_error: "ä".repeat(100_000), ..record };
        write_record(&path, &record).unwrap();
        let read = berth_shim_proto::exit_record::decode(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(read.start_error, "ä".repeat(MAX_START_ERROR / 2));
        assert!(std::fs::metadata(&path).unwrap().len() < RESERVED_BYTES);
    }

    #[test]
    fn a_reservation_takes_room() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("exit");
        reserve_record(&path).unwrap();
        let reserved = directory.path().join("exit.partial");
        assert!(std::fs::metadata(&reserved).unwrap().blocks() * 512 >= RESERVED_BYTES);
        drop_reservation(&path);
        assert!(!reserved.exists());
    }
}
