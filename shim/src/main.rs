//! One small process per container: starts it, writes its log, runs execs, and records its end.
//!
//! One thread, no async runtime, no policy: the daemon parses and decides, the shim follows a plan
//! (`berth_shim_proto::launch`). It outlives the daemon. A separate process ([`log_writer`]) writes
//! its log, since that may have to wait for a disk. The same binary, started as `berth-shim pause`,
//! is process 1 of a pod whose containers share a pid namespace; as `berth-shim hold` it does
//! nothing in a new systemd scope, which cannot exist without a process.
//!
//! Descriptors that the daemon passes: 0, 1, 2 are `/dev/null`; 3 is a connection to the daemon; 4
//! (for `container` only) is the container's state directory, in which the shim listens as
//! `shim.sock` for later daemons.
#![forbid(unsafe_code)]

mod apparmor;
mod aside;
mod attached;
mod birth;
mod connection;
mod cri_log;
mod event_loop;
mod execute;
mod exit;
mod failure;
mod handshake;
mod host_path;
mod inheritance;
mod init;
mod launch;
mod log_queue;
mod log_writer;
mod mount_place;
mod null_device;
mod pause;
mod procfs;
mod relay;
mod rootfs;
mod session;
mod stdio;
mod user;

use std::os::fd::OwnedFd;
use std::process::ExitCode;

/// Wrong arguments or descriptors: only the daemon starts a shim.
const EXIT_USAGE: u8 = 64;
/// The shim's own work failed.
const EXIT_FAILED: u8 = 70;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let result = match args.next().as_deref().and_then(std::ffi::OsStr::to_str) {
        Some("container") => prepare(5).and_then(|()| event_loop::run(inherited(3)?, inherited(4)?)),
        Some("hold") => prepare(4).and_then(|()| hold(inherited(3)?)),
        Some("pause") => prepare(4).and_then(|()| pause::run(inherited(3)?)),
        _ => return ExitCode::from(EXIT_USAGE),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(EXIT_FAILED),
    }
}

/// Keeps a new systemd scope from being empty until the daemon closes the connection: by then
/// another process is in it.
fn hold(connection: OwnedFd) -> std::io::Result<()> {
    let mut byte = [0];
    loop {
        match berth_sys::socket::receive(std::os::fd::AsFd::as_fd(&connection), &mut byte) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// The first steps of every kind: drop everything inherited that the shim is not meant to have.
fn prepare(first_foreign: u32) -> std::io::Result<()> {
    berth_sys::process::close_from(first_foreign, berth_sys::process::CloseRange::Now)?;
    // Started from a memory file, its name would be a descriptor number.
    berth_sys::process::set_name(c"berth-shim")?;
    berth_sys::process::set_umask(0o022);
    inheritance::reset_for_children()?;
    std::env::set_current_dir("/")
}

/// Takes over a descriptor that the daemon passed by number, close-on-exec from here on.
fn inherited(number: i32) -> std::io::Result<OwnedFd> {
    berth_sys::file::take_inherited(number)
}
