//! The program of a hostile container that may trace (`CAP_SYS_PTRACE`): it stops every process
//! born beside it, at once.
//!
//! A test program runs itself as this program inside a container: its file and the C library's are
//! mounted there ([`in_container`]). Its orders are in its environment, its findings go to its
//! standard output, one line per birth.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use berth_cri::v1;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid};

use crate::pod::{container, security, volume, words};
use crate::program;

/// The environment variable that makes a test program a tracer. Its value is `watch`, or the number
/// of a process of the host that the shim is meant to mistake for the one that it created.
const ORDER: &str = "BERTH_TRACER";

/// The first word of every line about a birth.
const BORN: &str = "born";

/// The message with which it begins.
pub const READY: &str = "tracing";

/// How many numbers after the last one it tries.
const AHEAD: i32 = 40;

/// The observations of a process at the instant of its birth.
#[derive(Debug)]
pub struct Birth(BTreeMap<String, String>);

impl Birth {
    /// All births in the output of a tracer.
    #[must_use]
    pub fn all(said: &str) -> Vec<Self> {
        let of_line = |line: &str| {
            let fields = line.strip_prefix(BORN)?.split('\t').filter_map(|field| field.split_once('='));
            Some(Self(fields.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()))
        };
        said.lines().filter_map(of_line).collect()
    }

    /// A field of proc_pid_status(5), a kind of namespace, or `fds`, `label`, `forged`.
    ///
    /// # Errors
    /// When it was not observed: the process had ended by then.
    pub fn get(&self, key: &str) -> Result<&str> {
        self.0.get(key).map(String::as_str).with_context(|| format!("no {key} in {:?}", self.0))
    }

    /// A field that is a set of capabilities.
    ///
    /// # Errors
    /// As [`Birth::get`], and when it is not one.
    pub fn set(&self, key: &str) -> Result<u64> {
        u64::from_str_radix(self.get(key)?, 16).with_context(|| key.to_owned())
    }

    /// Whether it is a process of Berth's that has not executed its program yet.
    #[must_use]
    pub fn is_a_shims(&self) -> bool {
        self.0.get("Name").is_some_and(|name| name == "berth-shim")
    }
}

/// The request for a container that traces, with the capability and without a filter; the test
/// `name` of the calling program has to call [`obey`]. `order`: `watch`, or a number of the host.
///
/// # Errors
/// When the calling program's file or the C library's cannot be found.
pub fn in_container(test: &str, order: &str) -> Result<v1::ContainerConfig> {
    let mut config = container("tracer", &["/t/tracer", "--exact", test, "--nocapture"]);
    config.envs = vec![v1::KeyValue { key: ORDER.to_owned(), value: order.into() }];
    let loader = Path::new("/lib64/ld-linux-x86-64.so.2");
    let library = Path::new("/lib/x86_64-linux-gnu");
    for (from, to) in [
        (std::env::current_exe()?, PathBuf::from("/t/tracer")),
        (loader.canonicalize()?, loader.to_owned()),
        (library.canonicalize()?, library.to_owned()),
    ] {
        config.mounts.push(v1::Mount { readonly: true, ..volume(&from, &to.to_string_lossy()) });
    }
    let security = security(&mut config);
    security.capabilities =
        Some(v1::Capability { add_capabilities: words(&["SYS_PTRACE"]), ..Default::default() });
    // AppArmor's default profile lets no process trace one that it does not confine.
    let unconfined = || {
        let profile_type = v1::security_profile::ProfileType::Unconfined.into();
        Some(v1::SecurityProfile { profile_type, ..Default::default() })
    };
    (security.seccomp, security.apparmor) = (unconfined(), unconfined());
    Ok(config)
}

/// Traces forever if this process is a tracer, else returns.
///
/// # Errors
/// When it cannot trace.
pub fn obey() -> Result<()> {
    match std::env::var(ORDER) {
        Err(_) => Ok(()),
        Ok(order) => match trace(order.parse().ok())? {},
    }
}

/// Stops every process born beside this one, records its state, and lets it continue. With a
/// `victim` it makes each one tell the shim that it continues as that process.
fn trace(victim: Option<i32>) -> Result<Infallible> {
    let mut out = std::io::stdout();
    let mut last = getpid().as_raw();
    // The harness has begun a line.
    writeln!(out, "\n{READY}")?;
    loop {
        for pid in (last + 1..last + AHEAD).map(Pid::from_raw) {
            if ptrace::seize(pid, ptrace::Options::empty()).is_err() {
                continue;
            }
            last = pid.as_raw();
            // One that ends under the tracer counts as not seen.
            if let Ok(line) = look(pid, victim) {
                writeln!(out, "{BORN}{line}")?;
                out.flush()?;
            }
            break;
        }
        while matches!(waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)),
            Ok(status) if status != WaitStatus::StillAlive)
        {}
    }
}

fn look(pid: Pid, victim: Option<i32>) -> Result<String> {
    ptrace::interrupt(pid)?;
    let WaitStatus::PtraceEvent(..) = waitpid(pid, Some(WaitPidFlag::__WALL))? else { bail!("it ended") };
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let mut line = String::new();
    let mut add = |key: &str, value: &str| {
        let _ = write!(line, "\t{key}={}", value.trim());
    };
    for (key, value) in
        fs::read_to_string(directory.join("status"))?.lines().filter_map(|line| line.split_once(':'))
    {
        add(key, &value.replace('\t', " "));
    }
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        add(kind, &fs::read_link(directory.join("ns").join(kind))?.to_string_lossy());
    }
    if let Ok(label) = fs::read_to_string(directory.join("attr/current")) {
        add("label", &label);
    }
    let (mut files, mut ways) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(directory.join("fd"))? {
        let entry = entry?;
        files.push(fs::read_link(entry.path())?.to_string_lossy().into_owned());
        ways.extend(
            entry.file_name().to_str().and_then(|number| number.parse().ok()).filter(|fd: &u64| *fd > 2),
        );
    }
    add("fds", &files.join(" "));
    if let Some(victim) = victim {
        add("forged", &forge(pid, &ways, victim)?.to_string());
    }
    ptrace::detach(pid, None)?;
    Ok(line)
}

/// Makes the process claim in every way it has that it continues as the victim: by its name, as a
/// maker does, and through everything that leads to the shim. Returns how many ways succeeded.
fn forge(pid: Pid, ways: &[u64], victim: i32) -> Result<usize> {
    const WRITE: u64 = 1;
    const PRCTL: u64 = 157;
    const PR_SET_NAME: u64 = 15;
    let before = ptrace::getregs(pid)?;
    // Below the red zone of its stack.
    let buffer = before.rsp - 4096;
    let text = format!("+{victim}");
    let mut bytes = [0; 16];
    bytes.get_mut(..text.len()).context("a number of 15 digits")?.copy_from_slice(text.as_bytes());
    let (low, high) = bytes.split_at(8);
    ptrace::write(pid, at(buffer), i64::from_le_bytes(low.try_into()?))?;
    ptrace::write(pid, at(buffer + 8), i64::from_le_bytes(high.try_into()?))?;
    let mut done = usize::from(call(pid, before, PRCTL, [PR_SET_NAME, buffer, 0])? == 0);
    for way in ways {
        done += usize::from(call(pid, before, WRITE, [*way, buffer, text.len() as u64])? > 0);
    }
    ptrace::setregs(pid, before)?;
    Ok(done)
}

fn at(address: u64) -> *mut std::ffi::c_void {
    std::ptr::with_exposed_provenance_mut(address.try_into().unwrap_or_default())
}

/// Makes the process, whose registers are these, run a system call; returns the result.
fn call(pid: Pid, registers: nix::libc::user_regs_struct, number: u64, args: [u64; 3]) -> Result<i64> {
    const SYSCALL: i64 = 0x050f;
    let code = ptrace::read(pid, at(registers.rip))?;
    ptrace::write(pid, at(registers.rip), code & !0xffff | SYSCALL)?;
    let mut call = registers;
    (call.orig_rax, call.rax) = (u64::MAX, number);
    [call.rdi, call.rsi, call.rdx] = args;
    ptrace::setregs(pid, call)?;
    ptrace::step(pid, None)?;
    waitpid(pid, Some(WaitPidFlag::__WALL))?;
    let returned = ptrace::getregs(pid)?.rax.cast_signed();
    ptrace::write(pid, at(registers.rip), code)?;
    Ok(returned)
}

/// Traces every process born in a pid namespace that this creates, with the test `name` of the
/// calling program as in [`in_container`].
///
/// # Errors
/// When `unshare(1)` cannot create one, as for anyone but root.
pub fn in_own_namespace(test: &str) -> Result<Vec<Birth>> {
    const SCRIPT: &str = "\"$0\" --exact \"$1\" --nocapture & sleep 1; for i in 1 2 3 4 5 6 7 8 9; do sleep 0.1; done; kill $!";
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", SCRIPT]);
    command.arg(std::env::current_exe()?).arg(test).env(ORDER, "watch");
    Ok(Birth::all(&program::output(&mut command)?))
}
