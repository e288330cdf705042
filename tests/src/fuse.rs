//! A file system whose server has stopped answering, as a network server may: processes that wait
//! for it cannot be killed.
//!
//! The server is this process, by `/dev/fuse`, fuse(4). It begins the session and describes its
//! root, a directory or a file. It takes any other request, such as a lookup, and leaves it without
//! an answer: the kernel waits for the answer in an uninterruptible state until the session ends,
//! whereas a fatal signal would cancel a request that no server has taken.
//!
//! A file system with files has every name, and answers no read: a process that reads such a file,
//! or a page of memory that is mapped to it, waits until the session ends. Who reads a file that is
//! itself the root of one cannot be killed.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::census::status_field;
use crate::daemon::{Daemon, SOON};
use crate::deadline::within;
use crate::pod::{Container, idle, sharing, sharing_pod, volume};
use crate::skip::skip;

/// Numbers of requests: `<linux/fuse.h>`.
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const STATX: u32 = 52;

/// ENOSYS, negative: the kernel asks in another way from then on.
const NOT_OFFERED: i32 = -38;

/// Reads ahead do not wait in the kernel for their answer, so that a signal that kills ends the
/// wait.
const FUSE_ASYNC_READ: u32 = 1;

/// Bytes that are read ahead: without any, each page is waited for.
const READ_AHEAD: u32 = 128 * 1024;

/// The number of the root, and that of every file.
const ROOT: u64 = 1;
const FILE: u64 = 2;

/// Kinds and modes: inode(7).
const DIRECTORY: u32 = 0o40755;
const REGULAR: u32 = 0o100_644;

/// How long the kernel does not ask again.
const VALID_SECONDS: u64 = 3600;

/// The version of the protocol, that of Linux 4.20.
const VERSION: [u32; 2] = [7, 28];

/// A mounted file system. Dropping it ends the session, and all waiting processes get an error.
#[derive(Debug)]
pub struct Hanging {
    path: PathBuf,
}

/// Which files can be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Files {
    None,
    /// A read waits for a page, and hears a signal that kills.
    Cached,
    /// A read waits for its answer, and hears no signal.
    Direct,
}

impl Hanging {
    /// Mounts one on the directory `path`; `None` where the kernel has no FUSE.
    ///
    /// # Errors
    /// When the mount is refused.
    pub fn mount(path: &Path) -> Result<Option<Self>> {
        Self::mount_as(path, DIRECTORY, Files::None)
    }

    /// Mounts one on the file `path`, which then cannot be opened: its root is a file itself.
    ///
    /// # Errors
    /// When the mount is refused.
    pub fn mount_on_file(path: &Path) -> Result<Option<Self>> {
        Self::mount_as(path, REGULAR, Files::None)
    }

    /// Mounts one on the file `path`, which can be opened then, and not be read.
    ///
    /// # Errors
    /// When the mount is refused.
    pub fn mount_on_file_to_read(path: &Path) -> Result<Option<Self>> {
        Self::mount_as(path, REGULAR, Files::Direct)
    }

    /// Like [`mount`](Self::mount), with files.
    ///
    /// # Errors
    /// When the mount is refused.
    pub fn mount_with_files(path: &Path) -> Result<Option<Self>> {
        Self::mount_as(path, DIRECTORY, Files::Cached)
    }

    fn mount_as(path: &Path, mode: u32, files: Files) -> Result<Option<Self>> {
        let Ok(device) = File::options().read(true).write(true).open("/dev/fuse") else { return Ok(None) };
        let (descriptor, kind) = (device.as_raw_fd(), mode & 0o170_000);
        let options = format!("fd={descriptor},rootmode={kind:o},user_id=0,group_id=0,allow_other");
        mount(Some("hanging"), path, Some("fuse"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("mounting a FUSE file system on {}", path.display()))?;
        std::thread::spawn(move || serve(device, mode, files));
        Ok(Some(Self { path: path.to_owned() }))
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        // By force: that ends the session, wherever else the file system is mounted.
        let _ = umount2(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    }
}

/// Runs `test` on a container in which a process waits for a [`Hanging`], so that it cannot be
/// killed until that is dropped. `name` is the test's, which is skipped where the kernel has no
/// FUSE.
///
/// The pod shares its pid namespace: in its own, the container's end would wait for all its
/// processes.
///
/// # Errors
/// Those of `test`, or when the process does not wait.
pub fn with_unkillable(
    daemon: &Daemon,
    name: &str,
    test: impl FnOnce(&Container, Hanging) -> Result<()>,
) -> Result<()> {
    let directory = daemon.directory("hanging")?;
    let Some(hanging) = Hanging::mount(&directory)? else {
        skip(name, "no FUSE here");
        return Ok(());
    };
    let pod = daemon.pod_of(sharing_pod(daemon.pod_config("web")))?;
    let mut config = sharing(idle("main"));
    config.mounts = vec![volume(&directory, "/volume")];
    let main = pod.start(config)?;
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| main.exec(&["cat", "/volume/name"]));
        within(SOON, "a process waits and cannot be killed", || {
            let processes = daemon.cgroup().read("memory", &main.id, "cgroup.procs")?;
            let mut states = processes.lines().filter_map(|pid| status_field(pid.parse().ok()?, "State"));
            Ok(states.any(|state| state.starts_with('D')).then_some(()))
        })?;
        test(&main, hanging)?;
        // Whatever the program's outcome.
        let _ = waiting.join();
        Ok(())
    })
}

/// Until the session ends, which a read reports.
fn serve(mut device: File, mode: u32, files: Files) {
    // The kernel requires room for a write of the longest kind.
    let mut request = vec![0; 256 * 1024];
    while let Ok(length) = device.read(&mut request) {
        let Some((header, _)) = request.get(..length).and_then(|request| request.split_at_checked(40)) else {
            return;
        };
        let number = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        let mut error = 0;
        let answer = match number(4).map(u32::from_ne_bytes) {
            Some(INIT) => init(),
            Some(GETATTR) if header.get(16..24) == Some(&FILE.to_ne_bytes()) => attributes(FILE, REGULAR),
            Some(GETATTR) => attributes(ROOT, mode),
            Some(LOOKUP) if files != Files::None => entry(),
            Some(OPEN) if files != Files::None => opened(files),
            Some(FLUSH) if files == Files::Direct => Vec::new(),
            Some(STATX) if files == Files::Direct => {
                error = NOT_OFFERED;
                Vec::new()
            }
            _ => continue,
        };
        // struct fuse_out_header: length, error, and the number of the request.
        let length = u32::try_from(16 + answer.len()).unwrap_or_default();
        let unique = header.get(8..16).unwrap_or_default();
        let reply = [&length.to_ne_bytes(), error.to_ne_bytes().as_slice(), unique, &answer].concat();
        if device.write_all(&reply).is_err() {
            return;
        }
    }
}

/// `struct fuse_init_out`, whose other members may be 0.
fn init() -> Vec<u8> {
    let mut answer = vec![0; 64];
    let [major, minor] = VERSION;
    for (place, number) in answer.chunks_exact_mut(4).zip([major, minor, READ_AHEAD, FUSE_ASYNC_READ]) {
        place.copy_from_slice(&number.to_ne_bytes());
    }
    answer
}

/// `struct fuse_entry_out` of a file: 40 bytes with its number and times, then `struct fuse_attr`.
fn entry() -> Vec<u8> {
    let mut answer = vec![0; 40];
    answer[..8].copy_from_slice(&FILE.to_ne_bytes());
    answer[16..24].copy_from_slice(&VALID_SECONDS.to_ne_bytes());
    answer[24..32].copy_from_slice(&VALID_SECONDS.to_ne_bytes());
    answer.extend(attribute(FILE, REGULAR));
    answer
}

/// `struct fuse_open_out`: a number, then flags, then a field that may be 0.
fn opened(files: Files) -> Vec<u8> {
    const FOPEN_DIRECT_IO: u32 = 1 << 0;
    /// Otherwise the second process that opens it waits for the pages that the first one wants.
    const FOPEN_KEEP_CACHE: u32 = 1 << 1;
    let how = if files == Files::Direct { FOPEN_DIRECT_IO } else { FOPEN_KEEP_CACHE };
    let mut answer = vec![0; 16];
    answer[8..12].copy_from_slice(&how.to_ne_bytes());
    answer
}

/// `struct fuse_attr_out`: 16 bytes of time, then `struct fuse_attr`.
fn attributes(number: u64, mode: u32) -> Vec<u8> {
    let mut answer = vec![0; 16];
    answer[..8].copy_from_slice(&VALID_SECONDS.to_ne_bytes());
    answer.extend(attribute(number, mode));
    answer
}

/// `struct fuse_attr` for this number, kind and mode: 64 KiB.
fn attribute(number: u64, mode: u32) -> [u8; 88] {
    let mut answer = [0; 88];
    answer[..8].copy_from_slice(&number.to_ne_bytes());
    answer[8..16].copy_from_slice(&65536_u64.to_ne_bytes());
    answer[60..64].copy_from_slice(&mode.to_ne_bytes());
    answer[64..68].copy_from_slice(&2_u32.to_ne_bytes());
    answer
}
