//! The end of a container: was it the OOM killer, and the record of it on disk.

use berth_shim_proto::exit_record::{ExitRecord, encode};
use berth_shim_proto::launch::Cgroup;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since the epoch; 0 before it.
pub(crate) fn unix_ns(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}

/// The counter of kills by the OOM killer in the container's cgroup. It is opened at the start, because the cgroup may vanish
/// with its last process (systemd scopes do).
#[derive(Debug)]
pub(crate) struct OomCounter {
    file: File,
    key: Vec<u8>,
}

impl OomCounter {
    /// `None` when the cgroup has no such counter.
    pub(crate) fn open(cgroup: &Cgroup) -> io::Result<Option<Self>> {
        if cgroup.oom_file.is_empty() {
            return Ok(None);
        }
        let file = File::open(crate::init::host_path(&cgroup.oom_file))?;
        Ok(Some(Self { file, key: cgroup.oom_key.clone().into_bytes() }))
    }

    /// Whether there was a kill.
    pub(crate) fn has_risen(&self) -> bool {
        // The file has a few short lines: memory.events of cgroup v2, memory.oom_control of v1.
        let mut buffer = [0; 512];
        let length = self.file.read_at(&mut buffer, 0).unwrap_or(0);
        count(buffer.get(..length).unwrap_or_default(), &self.key) > 0
    }
}

fn count(file: &[u8], key: &[u8]) -> u64 {
    file.split(|byte| *byte == b'\n')
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix(b" "))
        .find_map(|value| std::str::from_utf8(value).ok()?.trim().parse().ok())
        .unwrap_or(0)
}

/// Ends every process that is left in the cgroup of a container without a pid namespace of its own, when its main process has ended: they
/// would hold its output open, and nobody else stops them soon. The daemon looks again.
pub(crate) fn end_the_rest(cgroup: &Cgroup) {
    const SIGKILL: i32 = 9;
    if !cgroup.unified_dir.is_empty() {
        // Linux 5.14. What cannot be killed here is killed by the daemon.
        let _ = std::fs::write(crate::init::host_path(&cgroup.unified_dir).join("cgroup.kill"), "1");
        return;
    }
    let Some(tasks) = cgroup.tasks_files.first() else { return };
    let list = crate::init::host_path(tasks).with_file_name("cgroup.procs");
    let processes = std::fs::read_to_string(list).unwrap_or_default();
    for pid in processes.lines().filter_map(|line| line.parse().ok()) {
        // By descriptor; whoever has the number when it is opened is in the list still, or has ended.
        if let Ok(pidfd) = berth_sys::process::open_pidfd(pid) {
            let _ = berth_sys::process::signal_pidfd(std::os::fd::AsFd::as_fd(&pidfd), SIGKILL);
        }
    }
}

/// Writes the record beside its place and renames it into it, so that it is there whole or not at all.
pub(crate) fn write_record(path: &Path, record: &ExitRecord) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, encode(record))?;
    std::fs::rename(&partial, path)
}

/// The time at which the process started, as the daemon and this process both compute it.
pub(crate) fn start_time(pid: i32) -> u64 {
    // The process waits for its start and so exists; were it killed in between, 0 names no process.
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
    fn a_record_appears_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("exit");
        let record = ExitRecord { exit_code: 3, ..ExitRecord::default() };
        write_record(&path, &record).unwrap();
        assert_eq!(berth_shim_proto::exit_record::decode(&std::fs::read(&path).unwrap()), Ok(record));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
