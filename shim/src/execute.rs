//! The last part of a new process, the same for a container's main process and for exec:
//! privileges, filter, program.
//!
//! It runs in the child, after the namespaces and the root are in place. The kernel dictates the
//! order: each step says why it is where it is. Everything that can be done before the wait for the
//! start is done before it.

use std::ffi::{CString, OsStr};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use berth_shim_proto::control::{EXECUTE, Failed};
use berth_shim_proto::launch::{DEFAULT_PATH, Process};
use berth_sys::beneath::{self, Root};
use berth_sys::credentials;
use berth_sys::errno::ENOENT;
use berth_sys::process::{self, CloseRange};

use crate::apparmor::{Profile, Way};
use crate::failure::{Step, from_io, refused, shown};
use crate::handshake::ChildEnd;
use crate::user::Resolved;

/// The program with everything that exec needs, converted before privileges are dropped so that an
/// allocation failure comes early.
pub(crate) struct Program {
    candidates: Vec<CString>,
    name: String,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    pub(crate) fn new(process: &Process, home: &[u8]) -> Result<Self, Failed> {
        let text = |bytes: &[u8]| {
            CString::new(bytes)
                .map_err(|_| refused("prepare the program", format!("{} has a NUL byte", shown(bytes))))
        };
        let args = process.args.iter().map(|arg| text(arg)).collect::<Result<Vec<_>, _>>()?;
        let mut env = process.env.iter().map(|pair| text(pair)).collect::<Result<Vec<_>, _>>()?;
        if !process.env.iter().any(|pair| pair.starts_with(b"HOME=")) {
            env.push(text(&[b"HOME=".as_slice(), home].concat())?);
        }
        let name = process.args.first().ok_or_else(|| refused("prepare the program", "no command"))?;
        if name.is_empty() {
            return Err(refused("prepare the program", "the command is empty"));
        }
        let candidates = if name.contains(&b'/') {
            vec![text(name)?]
        } else {
            let path = process
                .env
                .iter()
                .rev()
                .find_map(|pair| pair.strip_prefix(b"PATH="))
                .unwrap_or(DEFAULT_PATH.as_bytes());
            path.split(|byte| *byte == b':')
                // Shells treat an empty element as the working directory; that is dangerous, so it
                // is skipped.
                .filter(|directory| !directory.is_empty())
                .map(|directory| text(&[directory, b"/", name].concat()))
                .collect::<Result<Vec<_>, _>>()?
        };
        Ok(Self { candidates, name: shown(name), args, env })
    }

    /// Becomes the program. Returns only the reason why it could not.
    fn execute(&self) -> Failed {
        let mut denied = None;
        for path in &self.candidates {
            let error = process::execute(path, &self.args, &self.env);
            match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {}
                // Another directory of the search path may have an executable one: execvp(3).
                std::io::ErrorKind::PermissionDenied => denied = Some(error),
                _ => return from_io(&error, EXECUTE, &self.name),
            }
        }
        match denied {
            Some(error) => from_io(&error, EXECUTE, &self.name),
            None => Failed {
                step: EXECUTE.to_owned(),
                errno: ENOENT,
                detail: if self.candidates.len() == 1 {
                    self.name.clone()
                } else {
                    format!("{}: not found in PATH", self.name)
                },
            },
        }
    }
}

/// Sets the attributes of a process that have nothing to do with privileges: limits, umask, score.
///
/// Must run while `/proc` is still the host's, for the score.
pub(crate) fn set_limits(process: &Process, notes: &mut Vec<String>) -> Result<(), Failed> {
    if let Some(score) = process.oom_score_adj {
        set_oom_score(score, notes)?;
    }
    for limit in &process.rlimits {
        set_rlimit(limit.resource, limit.soft, limit.hard, notes)?;
    }
    process::set_umask(process.umask);
    Ok(())
}

/// A lower score needs CAP_SYS_RESOURCE: without it, the current one is kept. That does not weaken
/// isolation.
fn set_oom_score(score: i32, notes: &mut Vec<String>) -> Result<(), Failed> {
    const FILE: &str = "/proc/self/oom_score_adj";
    match std::fs::write(FILE, score.to_string()) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let own = std::fs::read_to_string(FILE).step("read", FILE)?;
            notes.push(format!("oom_score_adj {score} needs CAP_SYS_RESOURCE; kept at {}", own.trim()));
            Ok(())
        }
        result => result.step("set the oom score", score),
    }
}

/// The names of the limits by number: <asm-generic/resource.h>.
const RLIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

fn set_rlimit(resource: u32, soft: u64, hard: u64, notes: &mut Vec<String>) -> Result<(), Failed> {
    match process::set_rlimit(resource, soft, hard) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let (_, own_hard) = process::rlimit(resource).step("read the resource limit", resource)?;
            let (soft, hard) = (soft.min(own_hard), hard.min(own_hard));
            let name = usize::try_from(resource).ok().and_then(|number| RLIMITS.get(number)).unwrap_or(&"?");
            notes
                .push(format!("the resource limit {name} was lowered to {own_hard}, the daemon's own limit"));
            process::set_rlimit(resource, soft, hard).step("set the resource limit", resource)
        }
        result => result.step("set the resource limit", resource),
    }
}

/// Changes to the working directory, creating it if missing, and makes sure that it is below the
/// root.
pub(crate) fn enter_directory(cwd: &[u8], owner: &Resolved) -> Result<(), Failed> {
    const STEP: &str = "enter the working directory";
    let path = Path::new(OsStr::from_bytes(if cwd.is_empty() { b"/" } else { cwd }));
    if let Err(error) = std::env::set_current_dir(path) {
        if error.kind() != std::io::ErrorKind::NotFound {
            return Err(from_io(&error, STEP, path.display()));
        }
        // Only missing components are created; the root is already the container's, so no link
        // leads out of it.
        make_directories(path, owner)?;
        std::env::set_current_dir(path).step(STEP, path.display())?;
    }
    // A leaked directory descriptor could lead out by /proc/self/fd/N (CVE-2024-21626). The
    // kernel's own name for a directory outside the root does not begin with a slash: getcwd(3),
    // "(unreachable)".
    let real = std::env::current_dir().step(STEP, path.display())?;
    if !real.is_absolute() {
        return Err(refused(STEP, format!("{} is outside the container", path.display())));
    }
    Ok(())
}

/// Creates the missing components of `path`, owned by the program's user. By descriptor: a
/// container that shares a volume could replace a directory by a link before its owner is changed,
/// and the user would get the link's target.
fn make_directories(path: &Path, owner: &Resolved) -> Result<(), Failed> {
    const STEP: &str = "create the working directory";
    let root = Root::open(Path::new("/")).step(STEP, "/")?;
    root.make_dir_all_with(path.strip_prefix("/").unwrap_or(path), |missing| {
        if missing.obstacle.is_some() {
            return Err(std::io::ErrorKind::NotADirectory.into());
        }
        missing.parent.make_dir(missing.name, 0o777)?;
        let made = missing.parent.open_dir(missing.name)?;
        beneath::chown(made.as_fd(), owner.uid, owner.gid)
    })
    .step(STEP, path.display())
    .map(drop)
}

/// What a process has left to do before its exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privileges {
    /// It still has what it takes to drop its privileges. Only where no other process can see it.
    Shedding,
    /// It is as its program will be, except for the last filter: the filter in force allows what
    /// entering needs.
    Entering,
    /// It is as its program will be.
    Program,
}

/// Drops, before a process is created where others may trace it, everything that its program must
/// not have, and enters its profile.
pub(crate) fn shed_before_birth(process: &Process, profile: Option<Profile>) -> Result<Privileges, Failed> {
    if process.entry_filter.is_empty() {
        shed(process, &process.seccomp_filter, profile)?;
        return Ok(Privileges::Program);
    }
    // The last filter is installed inside, where there may be no capability for it.
    process::set_no_new_privileges().step("set no_new_privs", "")?;
    shed(process, &process.entry_filter, profile)?;
    Ok(Privileges::Entering)
}

/// The last part of a main process that has reported: waits for the start, drops the remaining
/// privileges and executes the program. Returns only the reason for a failure. `profile` is the one
/// that exec changes to.
pub(crate) fn finish(
    process: &Process,
    program: &Program,
    privileges: Privileges,
    profile: Option<Way>,
    end: &ChildEnd,
) -> Failed {
    match end.wait_for_go().and_then(|()| profile.map_or(Ok(()), Way::check)) {
        Ok(()) => finish_exec(process, program, privileges),
        Err(failed) => failed,
    }
}

/// The last part of a process of exec.
pub(crate) fn finish_exec(process: &Process, program: &Program, privileges: Privileges) -> Failed {
    let last = match privileges {
        Privileges::Shedding => shed(process, &process.seccomp_filter, None),
        Privileges::Entering => install_filter(process, &process.seccomp_filter),
        Privileges::Program => Ok(()),
    };
    match last {
        Ok(()) => program.execute(),
        Err(failed) => failed,
    }
}

/// Sets user, groups and the bounding set; all capabilities stay permitted.
pub(crate) fn become_user(process: &Process, user: &Resolved) -> Result<(), Failed> {
    let capabilities = process.capabilities;
    // Dropping from the bounding set needs CAP_SETPCAP, so it comes while all capabilities are
    // effective.
    credentials::limit_bounding_set(capabilities.bounding).step("limit the capabilities", "bounding set")?;
    credentials::set_groups(&user.groups).step("set the groups", "")?;
    // Without this, the change away from user 0 would clear the permitted set that capset below
    // restricts.
    process::keep_capabilities().step("keep the capabilities", "")?;
    credentials::set_ids(user.uid, user.gid).step("become the user", user.uid)
}

const SETPCAP: u64 = 1 << 8;
const SYS_ADMIN: u64 = 1 << 21;

const MAC_OVERRIDE: u64 = 1 << 32;

/// The effective set while a filter is installed without no_new_privs: seccomp(2), capabilities(7).
const FOR_THE_FILTER: u64 = SYS_ADMIN | SETPCAP;

/// Drops every capability that neither the program nor [`shed`] needs: a container may wait
/// long for its start.
pub(crate) fn keep_what_shedding_needs(process: &Process) -> Result<(), Failed> {
    let sets = process.capabilities;
    let filters = !process.seccomp_filter.is_empty() && !process.no_new_privileges;
    let needed = if filters { FOR_THE_FILTER } else { SETPCAP };
    credentials::set_capabilities(needed, sets.permitted | sets.inheritable | needed, 0)
        .step("limit the capabilities", "for the change into the container")
}

/// Reduces the privileges to the program's own, under `filter` and in `profile`.
fn shed(process: &Process, filter: &[u8], profile: Option<Profile>) -> Result<(), Failed> {
    let capabilities = process.capabilities;
    // Everything but 0, 1, 2 closes at exec, however it was opened.
    process::close_from(3, CloseRange::OnExec).step("close descriptors", "")?;
    if process.no_new_privileges {
        process::set_no_new_privileges().step("set no_new_privs", "")?;
    }
    // Without no_new_privs the filter needs CAP_SYS_ADMIN, which the change of user took out of the
    // effective set.
    let filter_first = !filter.is_empty() && !process.no_new_privileges;
    let mut needed = if filter_first { FOR_THE_FILTER } else { 0 };
    if profile.is_some() {
        needed |= MAC_OVERRIDE & credentials::permitted_set().step("read the capabilities", "")?;
    }
    if needed != 0 {
        credentials::set_capabilities(needed, capabilities.permitted | capabilities.inheritable | needed, 0)
            .step("limit the capabilities", "for the filter and the profile")?;
    }
    // Opened with the credentials that will write to it, and before a filter that may forbid it.
    let way = profile.map(Profile::open_current).transpose()?;
    if filter_first {
        // The profile comes after it, since it may not allow the capability that installing a
        // filter needs.
        install_filter(process, filter)?;
    }
    if let Some(way) = way {
        way.enter()?;
    }
    set_capabilities(process)?;
    if process.no_new_privileges {
        // This one needs no capability, so it comes last and may even forbid capset.
        install_filter(process, filter)?;
    }
    Ok(())
}

fn set_capabilities(process: &Process) -> Result<(), Failed> {
    let sets = process.capabilities;
    credentials::clear_ambient_set().step("limit the capabilities", "ambient set")?;
    credentials::set_capabilities(sets.effective, sets.permitted, sets.inheritable)
        .step("limit the capabilities", "effective, permitted, inheritable")?;
    credentials::raise_ambient_set(sets.ambient).step("limit the capabilities", "ambient set")
}

fn install_filter(process: &Process, filter: &[u8]) -> Result<(), Failed> {
    if filter.is_empty() {
        return Ok(());
    }
    process::install_seccomp(filter, process.seccomp_flags).step("install the seccomp filter", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(args: &[&str], env: &[&str]) -> Process {
        let bytes = |list: &[&str]| list.iter().map(|text| text.as_bytes().to_vec()).collect();
        Process { args: bytes(args), env: bytes(env), ..Process::default() }
    }

    #[test]
    fn programs_are_looked_for_where_the_environment_says() {
        let cases: &[(&[&str], &[&str], &[&str])] = &[
            (&["sh"], &["PATH=/a:/b"], &["/a/sh", "/b/sh"]),
            (&["sh"], &["PATH=:/a::"], &["/a/sh"]),
            (&["sh"], &["PATH=/a", "PATH=/b"], &["/b/sh"]),
            (&["./sh"], &["PATH=/a"], &["./sh"]),
            (&["/bin/sh"], &[], &["/bin/sh"]),
            (&["sh"], &["PATH="], &[]),
        ];
        for (args, env, expected) in cases {
            let program = Program::new(&process(args, env), b"/").unwrap();
            let found: Vec<&str> = program.candidates.iter().map(|path| path.to_str().unwrap()).collect();
            assert_eq!(found, *expected, "{args:?} {env:?}");
        }
        assert!(Program::new(&process(&["sh"], &[]), b"/").unwrap().candidates.len() > 3);
    }

    #[test]
    fn home_is_added_only_when_absent() {
        let env = |given: &[&str]| Program::new(&process(&["a"], given), b"/home").unwrap().env;
        assert_eq!(env(&[]), [c"HOME=/home".to_owned()]);
        assert_eq!(env(&["HOME="]), [c"HOME=".to_owned()]);
    }

    #[test]
    fn commands_that_cannot_be_are_refused() {
        for args in [&[][..], &[""], &["a\0b"], &["a", "\0"]] {
            assert!(Program::new(&process(args, &[]), b"/").is_err(), "{args:?}");
        }
    }
}
