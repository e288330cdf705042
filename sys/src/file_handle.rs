//! Handles of files: they open a file again without looking up its name, open_by_handle_at(2).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The longest supported handle. Filesystems of the kernel's own objects use 8 bytes.
const MOST_BYTES: usize = 8;

/// Identifies a file in its filesystem, whatever its name. It keeps nothing open, and becomes
/// invalid once the file is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHandle {
    kind: i32,
    length: u8,
    bytes: [u8; MOST_BYTES],
}

/// `struct file_handle` of `<linux/fs.h>`, with room for the handle.
#[repr(C)]
struct Raw {
    length: u32,
    kind: i32,
    bytes: [u8; MOST_BYTES],
}

impl FileHandle {
    /// The handle of an open file: `name_to_handle_at(2)`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the filesystem has none, `EOVERFLOW` where it has longer ones.
    pub fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let length = u32::try_from(MOST_BYTES).unwrap_or_default();
        let mut raw = Raw { length, kind: 0, bytes: [0; MOST_BYTES] };
        let mut mount = 0_i32;
        // SAFETY: name_to_handle_at(2) reads a NUL-terminated path, writes at most as many bytes as
        // the length says, which the structure has, and a number. All live until it returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                file.as_raw_fd(),
                c"".as_ptr(),
                &raw mut raw,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let length = u8::try_from(raw.length).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        Ok(Self { kind: raw.kind, length, bytes: raw.bytes })
    }

    /// Opens the file, which is on the filesystem of `mount`, for reading: `open_by_handle_at(2)`.
    ///
    /// # Errors
    /// `ESTALE` when it is removed, `EPERM` without `CAP_DAC_READ_SEARCH`.
    pub fn open(&self, mount: BorrowedFd<'_>) -> io::Result<File> {
        let mut raw = Raw { length: u32::from(self.length), kind: self.kind, bytes: self.bytes };
        // SAFETY: open_by_handle_at(2) reads the structure, whose length is that of its bytes at
        // most, and which lives until it returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw mut raw,
                libc::O_RDONLY | libc::O_CLOEXEC,
            )
        };
        match i32::try_from(result) {
            // SAFETY: the kernel returned it as a new descriptor that nothing else owns.
            Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }.into()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::path::Path;

    use super::*;

    #[test]
    fn a_file_is_opened_without_its_name() {
        // Which files have handles depends on the filesystem: those of a cgroup do.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let point = mounts.lines().find(|line| line.contains(" - cgroup")).map(|line| line.split(' ').nth(4));
        let Some(Some(point)) = point else { panic!("there is no cgroup filesystem") };
        let mount = File::open(point).unwrap();
        let procs = File::open(Path::new(point).join("cgroup.procs")).unwrap();
        let handle = FileHandle::of(procs.as_fd()).unwrap();
        drop(procs);
        let mut text = String::new();
        match handle.open(mount.as_fd()) {
            Ok(mut file) => file.read_to_string(&mut text).map(drop).unwrap(),
            // A container that lacks the capability.
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
        }
        assert!(text.lines().all(|line| line.parse::<u32>().is_ok()), "{text}");
    }
}
