//! What the processes of a container hold, from procfs.

use std::collections::BTreeSet;
use std::path::Path;

/// Open files of one container that are looked at to tell sockets from others. Beyond that nothing
/// is reported: a look at each takes a system call.
const MAX_FILES: usize = 20_000;

/// Open files of these processes, and how many of them are sockets; nothing when there are more
/// than can be looked at. A process that has ended meanwhile has none.
pub(crate) fn open_files(proc: &Path, processes: &BTreeSet<i32>) -> Option<(u64, u64)> {
    let (mut files, mut sockets) = (0, 0);
    for pid in processes {
        let Ok(entries) = std::fs::read_dir(proc.join(pid.to_string()).join("fd")) else { continue };
        for entry in entries.flatten() {
            files += 1;
            if files > MAX_FILES {
                return None;
            }
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            sockets += u64::from(target.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
        }
    }
    Some((u64::try_from(files).ok()?, sockets))
}

/// The most files that the process may have open at once; nothing when there is no limit, or no
/// such process.
pub(crate) fn limit_of_open_files(pid: i32) -> Option<u64> {
    soft_limit_of_files(&std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?)
}

/// The soft limit in the line `Max open files  1024  524288  files` of proc_pid_limits(5); none for
/// `unlimited`.
fn soft_limit_of_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_counted_and_sockets_among_them() {
        let directory = tempfile::tempdir().unwrap();
        let fds = directory.path().join("7/fd");
        std::fs::create_dir_all(&fds).unwrap();
        for (number, target) in ["socket:[1]", "/dev/null", "pipe:[2]", "/socket:[3]"].iter().enumerate() {
            std::os::unix::fs::symlink(target, fds.join(number.to_string())).unwrap();
        }
        assert_eq!(open_files(directory.path(), &BTreeSet::from([7, 8])), Some((4, 1)));
        assert_eq!(open_files(directory.path(), &BTreeSet::new()), Some((0, 0)));
        for number in 4..=MAX_FILES {
            std::fs::write(fds.join(number.to_string()), "").unwrap();
        }
        assert_eq!(open_files(directory.path(), &BTreeSet::from([7])), None);
    }

    #[test]
    fn the_soft_limit_of_open_files_is_found() {
        for (text, expected) in [
            (
                "Limit  Soft Limit\nMax open files            1024                 524288               files\n",
                Some(1024),
            ),
            ("Max open files            unlimited            unlimited            files\n", None),
            ("Max open files", None),
            ("", None),
        ] {
            assert_eq!(soft_limit_of_files(text), expected, "{text:?}");
        }
    }
}
