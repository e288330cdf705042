//! Files in memory, whole filesystems, and flags of descriptors.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Open flags: for reading and writing a terminal, without making it the controlling one.
pub const READ_WRITE: i32 = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
/// Open flags: for reading a file that may turn out to be a FIFO or a device, without waiting.
pub const READ_NONBLOCKING: i32 = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;

/// A copy of a program that cannot be written to: a file in memory with every seal
/// (`memfd_create(2)`), `F_SEAL_EXEC` left out so that the floor of supported kernels (5.15) has
/// all of them.
///
/// A process started from it cannot be used to overwrite the file on disk that it came from.
///
/// A kernel may refuse to create executable files in memory: `vm.memfd_noexec=2`, proc_sys_vm(5),
/// which is a setting of each pid namespace. Then the copy is a file of a tmpfs that is not mounted
/// anywhere, read-only as a filesystem and as a mount. A process that may change mounts on the host
/// could make it writable again, but not while a process runs from it (`ETXTBSY`).
///
/// # Errors
/// `ENOMEM`; with that setting `EPERM` without `CAP_SYS_ADMIN`.
pub fn sealed_program(name: &std::ffi::CStr, bytes: &[u8]) -> io::Result<OwnedFd> {
    let raw = match memory_for_program(name) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => return program_on_tmpfs(name, bytes),
        made => made?,
    };
    let mut file = std::fs::File::from(raw);
    file.write_all(bytes)?;
    let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
    // SAFETY: F_ADD_SEALS takes a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // A descriptor open for writing makes exec fail with ETXTBSY, so it is reopened for reading.
    let read_only = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(read_only.into())
}

/// <linux/memfd.h>, Linux 6.3: without it, `vm.memfd_noexec=1` creates a file that cannot be
/// executed.
const MFD_EXEC: libc::c_uint = 0x10;

fn memory_for_program(name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let make = |flags: libc::c_uint| {
        // SAFETY: memfd_create(2) reads a NUL-terminated name, which `name` is.
        let raw =
            unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel returned `raw` as a new descriptor that nothing else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    };
    match make(MFD_EXEC) {
        // A kernel that does not know the flag creates files that can be executed.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => make(0),
        made => made,
    }
}

fn program_on_tmpfs(name: &std::ffi::CStr, bytes: &[u8]) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;

    use crate::mount::{FsContext, attr, set_attributes};
    let name = std::ffi::OsStr::from_bytes(name.to_bytes());
    let tmpfs = FsContext::open(c"tmpfs")?;
    tmpfs.set("mode", "700".as_ref())?;
    let mounted = tmpfs.mount(attr::NOSUID | attr::NODEV)?;
    let dir = crate::beneath::Root::from_fd(mounted.try_clone()?)?.open_dir(std::path::Path::new(""))?;
    let mut file = dir.create_file(name, 0o500)?;
    file.write_all(bytes)?;
    // A filesystem with a file open for writing cannot be made read-only.
    drop(file);
    tmpfs.make_read_only()?;
    set_attributes(mounted.as_fd(), attr::RDONLY, 0, None, false)?;
    Ok(dir.open_regular(name)?.into())
}

/// Writes all unwritten data of the filesystem of `file` to the disk: `syncfs(2)`.
///
/// # Errors
/// `EIO`, `ENOSPC`, `EDQUOT` from the disk.
pub fn sync_filesystem(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: syncfs(2) takes only a descriptor.
    if unsafe { libc::syncfs(file.as_raw_fd()) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Atomically swaps two existing names: `renameat2(2)` with `RENAME_EXCHANGE`. Both are on one
/// filesystem.
///
/// # Errors
/// As renameat2(2): `ENOENT` if either is absent, `EINVAL` where the filesystem cannot.
pub fn exchange(one: &std::path::Path, other: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let name = |path: &std::path::Path| {
        std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)
    };
    let (one, other) = (name(one)?, name(other)?);
    // SAFETY: renameat2(2) takes two directories, for which AT_FDCWD stands, and two NUL-terminated
    // names.
    let result = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            one.as_ptr(),
            libc::AT_FDCWD,
            other.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes over a descriptor that this process was started with, and makes it close-on-exec.
///
/// # Errors
/// `EBADF` when there is none of that number.
///
/// # Panics
/// When called twice for one number, or for 0, 1 or 2: two owners of a descriptor would close each
/// other's files.
pub fn take_inherited(number: i32) -> io::Result<OwnedFd> {
    static TAKEN: std::sync::Mutex<Vec<i32>> = std::sync::Mutex::new(Vec::new());
    let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    assert!(number > 2 && !taken.contains(&number), "descriptor {number} has an owner already");
    // SAFETY: F_SETFD takes a number.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    taken.push(number);
    // SAFETY: the descriptor is open (fcntl succeeded), was passed by the parent process, and was
    // not taken before.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A file without a name on the filesystem of `directory`, for reading and writing; it vanishes
/// with its descriptor: `O_TMPFILE` of open(2).
///
/// # Errors
/// `EOPNOTSUPP` when the filesystem has none.
pub fn unnamed(directory: &std::path::Path) -> io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(directory)
}

/// A pipe, both ends close-on-exec: the end to read and the end to write, `pipe2(2)`.
///
/// # Errors
/// `EMFILE` at the descriptor limit.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// Doubles the capacity of a pipe, up to `most` bytes: `F_SETPIPE_SZ` of fcntl(2). Returns whether
/// it has grown.
#[must_use]
pub fn enlarge_pipe(pipe: BorrowedFd<'_>, most: i32) -> bool {
    use nix::fcntl::{FcntlArg, fcntl};
    let enlarge = || {
        let larger = fcntl(pipe, FcntlArg::F_GETPIPE_SZ)?.checked_mul(2).filter(|larger| *larger <= most);
        larger.map(|larger| fcntl(pipe, FcntlArg::F_SETPIPE_SZ(larger))).transpose()
    };
    // It may not be a pipe, or no more memory is allowed.
    matches!(enlarge(), Ok(Some(_)))
}

/// The capacity of a pipe in bytes: `F_GETPIPE_SZ` of fcntl(2). `None` for anything but a pipe.
#[must_use]
pub fn pipe_size(pipe: BorrowedFd<'_>) -> Option<usize> {
    let size = nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_GETPIPE_SZ).ok()?;
    usize::try_from(size).ok()
}

/// Sets the capacity of a pipe to this many bytes, or a few more: `F_SETPIPE_SZ` of fcntl(2).
///
/// # Errors
/// `EBUSY` when it holds more than that, `EBADF` for anything but a pipe.
pub fn resize_pipe(pipe: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(bytes))?;
    Ok(())
}

/// Makes reads and writes return `EAGAIN` instead of waiting: `O_NONBLOCK`.
///
/// # Errors
/// None in practice.
pub fn set_nonblocking(file: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(file.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(file.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Reserves room for the first `bytes` bytes of a file, which becomes that long if it is shorter:
/// `fallocate(2)`, or zeros where a filesystem does not support it.
///
/// # Errors
/// `ENOSPC` when there is no room.
pub fn allocate(file: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    let length = i64::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    match nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::empty(), 0, length) {
        Err(nix::errno::Errno::EOPNOTSUPP) => {
            let mut file = std::fs::File::from(file.try_clone_to_owned()?);
            io::copy(&mut io::Read::take(io::repeat(0), bytes), &mut file).map(drop)
        }
        result => Ok(result?),
    }
}

/// The total and free (for root) bytes and inodes of a filesystem, in the order bytes, bytes free,
/// inodes, inodes free: `statvfs(3)`.
///
/// # Errors
/// `ENOENT` and the like from the lookup.
pub fn space(path: &std::path::Path) -> io::Result<(u64, u64, u64, u64)> {
    let found = nix::sys::statvfs::statvfs(path)?;
    let unit = found.fragment_size();
    Ok((found.blocks() * unit, found.blocks_free() * unit, found.files(), found.files_free()))
}

/// The next part of a file that is not a hole, at or after `from`: its begin and end in bytes.
/// `None` if only a hole follows. lseek(2), `SEEK_DATA` and `SEEK_HOLE`; a filesystem without holes
/// reports everything as data.
pub fn next_data(file: impl AsFd, from: u64) -> io::Result<Option<(u64, u64)>> {
    use nix::unistd::{Whence, lseek};
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        lseek(file.as_fd(), at, whence).map(i64::unsigned_abs).map_err(io::Error::from)
    };
    match seek(from, Whence::SeekData) {
        Ok(start) => Ok(Some((start, seek(start, Whence::SeekHole)?))),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_enlarged_so_far() {
        let (_read, write) = pipe().unwrap();
        set_nonblocking(write.as_fd()).unwrap();
        let mut write = std::fs::File::from(write);
        let mut fill = || {
            let mut filled = 0;
            while let Ok(length) = write.write(&[0; 4096]) {
                filled += length;
            }
            (filled, write.as_fd().try_clone_to_owned().unwrap())
        };
        let (first, pipe) = fill();
        assert!(enlarge_pipe(pipe.as_fd(), 1 << 17) && !enlarge_pipe(pipe.as_fd(), 1 << 17));
        assert_eq!(fill().0, first);
        assert!(!enlarge_pipe(std::fs::File::open("/dev/null").unwrap().as_fd(), 1 << 20));
    }

    #[test]
    fn names_change_places() {
        let directory = std::env::temp_dir().join(format!("berth-sys-exchange-{}", std::process::id()));
        let (one, other) = (directory.join("one"), directory.join("other"));
        std::fs::create_dir_all(one.join("in-one")).unwrap();
        assert_eq!(exchange(&one, &other).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        std::fs::create_dir_all(other.join("in-other")).unwrap();
        exchange(&one, &other).unwrap();
        assert!(one.join("in-other").is_dir() && other.join("in-one").is_dir());
        std::fs::remove_dir_all(directory).unwrap();
    }

    fn runs_and_cannot_be_written(program: &OwnedFd) {
        let path = format!("/proc/{}/fd/{}", std::process::id(), program.as_raw_fd());
        assert!(std::process::Command::new(&path).status().unwrap().success());
        // Root may open the file for writing; the seal is what refuses the write.
        let refused =
            std::fs::OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write_all(b"x"));
        assert!(refused.is_err());
    }

    #[test]
    fn a_sealed_program_runs_and_cannot_be_written() {
        runs_and_cannot_be_written(&sealed_program(c"true", &std::fs::read("/bin/true").unwrap()).unwrap());
    }

    #[test]
    fn a_program_on_a_tmpfs_of_its_own_runs_and_cannot_be_written() {
        match program_on_tmpfs(c"true", &std::fs::read("/bin/true").unwrap()) {
            Ok(program) => runs_and_cannot_be_written(&program),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "only root may mount: {error}"),
        }
    }
}
