//! Processes that were killed and cannot end, because one of their threads waits in the kernel: for
//! a lock of a directory, for a disk. Until that is over they keep what they have open.
//!
//! A thread with a pending `SIGKILL` no longer runs its program. It may still finish the system
//! call that it is in, so a successor has to know what that call can change.

use std::io;
use std::path::Path;

/// The state of a process that is expected to be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// No process has that number.
    Gone,
    /// It was killed, and every thread that has not ended is in a system call that changes no file:
    /// it will never write anything again.
    Over,
    /// It was killed, but may still finish a change that it has begun.
    Killed,
    /// It was not killed.
    Alive,
}

/// How far the end of the process `pid` has come: proc_pid_status(5), proc_pid_syscall(5).
///
/// # Errors
/// When that cannot be determined.
pub fn ending(pid: i32) -> io::Result<Ending> {
    match of_threads(Path::new(&format!("/proc/{pid}/task"))) {
        Err(error) if is_gone(&error) => Ok(Ending::Gone),
        found => found,
    }
}

fn of_threads(tasks: &Path) -> io::Result<Ending> {
    let mut ending = Ending::Over;
    for thread in std::fs::read_dir(tasks)? {
        let thread = thread?.path();
        let of_thread = match of_thread(&thread) {
            Err(error) if is_gone(&error) => continue,
            found => found?,
        };
        match of_thread {
            // A kill reaches all threads in one step, and none are created afterwards.
            Ending::Alive | Ending::Gone => return Ok(Ending::Alive),
            Ending::Killed => ending = Ending::Killed,
            Ending::Over => {}
        }
    }
    Ok(ending)
}

fn of_thread(thread: &Path) -> io::Result<Ending> {
    let status = std::fs::read_to_string(thread.join("status"))?;
    if has_ended(&status) {
        return Ok(Ending::Over);
    }
    if !is_killed(&status) {
        return Ok(Ending::Alive);
    }
    let call = std::fs::read_to_string(thread.join("syscall"))?;
    Ok(if changes_nothing(&call) { Ending::Over } else { Ending::Killed })
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

fn has_ended(status: &str) -> bool {
    field(status, "State").is_some_and(|state| state.starts_with(['Z', 'X']))
}

fn is_killed(status: &str) -> bool {
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    ["SigPnd", "ShdPnd"].iter().any(|name| {
        field(status, name)
            .and_then(|mask| u64::from_str_radix(mask, 16).ok())
            .is_some_and(|mask| mask & KILL != 0)
    })
}

/// Whether a thread that waits in this call will have changed no file when the call returns, except
/// for an empty directory that it may create. A call that the kernel does not name ("running") may
/// be any.
fn changes_nothing(call: &str) -> bool {
    const READING: [libc::c_long; 15] = [
        libc::SYS_read,
        libc::SYS_pread64,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_statfs,
        libc::SYS_access,
        libc::SYS_faccessat2,
        libc::SYS_readlink,
        libc::SYS_readlinkat,
        libc::SYS_getdents64,
        libc::SYS_mkdir,
        libc::SYS_mkdirat,
    ];
    let mut words = call.split_whitespace();
    let Some(number) = words.next().and_then(|word| word.parse::<libc::c_long>().ok()) else { return false };
    let mut argument = |index| {
        let word = words.nth(index)?.strip_prefix("0x")?;
        u64::from_str_radix(word, 16).ok()
    };
    let only_opens = |flags: Option<u64>| {
        let making = (libc::O_CREAT | libc::O_TRUNC).cast_unsigned();
        flags.is_some_and(|flags| flags & u64::from(making) == 0)
    };
    match number {
        // Not in a call.
        -1 => true,
        libc::SYS_open => only_opens(argument(1)),
        libc::SYS_openat => only_opens(argument(2)),
        number => READING.contains(&number),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_runs_is_alive_and_one_that_was_reaped_is_gone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(ending(pid).unwrap(), Ending::Alive);
        child.kill().unwrap();
        while crate::process::ended_child(Some(pid)).unwrap().is_none() {
            std::thread::yield_now();
        }
        assert_eq!(ending(pid).unwrap(), Ending::Over, "a zombie");
        child.wait().unwrap();
        assert_eq!(ending(pid).unwrap(), Ending::Gone);
    }

    #[test]
    fn a_kill_is_told_by_either_mask() {
        let status = |state: &str, own: &str, shared: &str| {
            format!("Name:\tx\nState:\t{state}\nSigPnd:\t{own}\nShdPnd:\t{shared}\n")
        };
        let none = "0000000000000000";
        assert!(has_ended(&status("Z (zombie)", none, none)));
        assert!(!has_ended(&status("D (disk sleep)", none, none)));
        assert!(is_killed(&status("D (disk sleep)", "0000000000000100", none)));
        assert!(is_killed(&status("D (disk sleep)", none, "0000000000000100")));
        assert!(!is_killed(&status("D (disk sleep)", "0000000000004000", none)));
        assert!(!is_killed(""));
    }

    #[test]
    fn only_calls_that_change_nothing_are_taken_for_such() {
        for (call, expected) in [
            ("257 0xffffff9c 0x7f00 0x80000 0x0 0x0 0x0 0x7ffc 0x7f11\n", true),
            ("257 0xffffff9c 0x7f00 0x80041 0x1b6 0x0 0x0 0x7ffc 0x7f11\n", false),
            ("257 0xffffff9c 0x7f00 0x80200 0x1b6 0x0 0x0 0x7ffc 0x7f11\n", false),
            ("257\n", false),
            ("2 0x7f00 0x0 0x0 0x0 0x0 0x0 0x7ffc 0x7f11\n", true),
            ("2 0x7f00 0x40 0x0 0x0 0x0 0x0 0x7ffc 0x7f11\n", false),
            ("83 0x7f00 0x1ed 0x0 0x0 0x0 0x0 0x7ffc 0x7f11\n", true),
            ("82 0x7f00 0x7f00 0x0 0x0 0x0 0x0 0x7ffc 0x7f11\n", false),
            ("1 0x3 0x7f00 0x10 0x0 0x0 0x0 0x7ffc 0x7f11\n", false),
            ("437 0x3 0x7f00 0x10 0x18 0x0 0x0 0x7ffc 0x7f11\n", false),
            ("-1 0x7ffc 0x7f11\n", true),
            ("running\n", false),
            ("", false),
        ] {
            assert_eq!(changes_nothing(call), expected, "{call}");
        }
    }
}
