//! The type of an inode, and its owner, mode and times.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{invalid, retry_interrupted};

/// The type of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// `S_IFREG`
    Regular,
    /// `S_IFDIR`
    Directory,
    /// `S_IFLNK`
    Symlink,
    /// `S_IFCHR`
    CharDevice,
    /// `S_IFBLK`
    BlockDevice,
    /// `S_IFIFO`
    Fifo,
    /// `S_IFSOCK`
    Socket,
}

/// A point in time as stored in inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Seconds since 1970; may be negative.
    pub seconds: i64,
    /// 0..=999_999_999
    pub nanoseconds: u32,
}

/// The attributes of an inode, as `fstatat(2)` returns them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Type of the inode.
    pub file_type: FileType,
    /// Permission bits with set-user-id, set-group-id and sticky: `0o7777` at most.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Allocated on the disk, in bytes.
    pub allocated: u64,
    /// Number of names.
    pub links: u64,
    /// For devices: major and minor number.
    pub device: (u32, u32),
    /// Last change of the content.
    pub modified: Timestamp,
    /// Device and inode number: equal for two names of one inode.
    pub identity: (u64, u64),
}

/// The attributes of the inode behind a descriptor (`O_PATH` too).
///
/// # Errors
/// As fstatat(2).
pub fn stat_fd(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    stat_at(fd, c"", libc::AT_EMPTY_PATH)
}

/// Changes owner and group of an open file (not `O_PATH`). The kernel clears set-user-id,
/// set-group-id and file capabilities then (chown(2)), so it comes before [`chmod`] and before
/// `security.capability`.
///
/// # Errors
/// As fchown(2).
pub fn chown(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: fchown(2) takes an open descriptor, which BorrowedFd is.
    retry_interrupted(|| unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) }).map(drop)
}

/// Changes the permission bits of an open file (not `O_PATH`).
///
/// # Errors
/// As fchmod(2).
pub fn chmod(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    // SAFETY: fchmod(2) takes an open descriptor, which BorrowedFd is.
    retry_interrupted(|| unsafe { libc::fchmod(fd.as_raw_fd(), mode) }).map(drop)
}

/// Sets access and modification time of an open file (not `O_PATH`).
///
/// # Errors
/// As futimens(3).
pub fn set_times(fd: BorrowedFd<'_>, time: Timestamp) -> io::Result<()> {
    let times = [timespec(time); 2];
    // SAFETY: futimens(3) reads two timespecs, which `times` has.
    retry_interrupted(|| unsafe { libc::futimens(fd.as_raw_fd(), times.as_ptr()) }).map(drop)
}

pub(super) fn stat_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> io::Result<Stat> {
    let mut buffer = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstatat(2) takes an open descriptor, a NUL-terminated name, and room for one `struct
    // stat`.
    retry_interrupted(|| unsafe {
        libc::fstatat(dir.as_raw_fd(), name.as_ptr(), buffer.as_mut_ptr(), flags)
    })?;
    // SAFETY: fstatat succeeded, so it has written the whole struct.
    let raw = unsafe { buffer.assume_init() };
    let file_type = match raw.st_mode & libc::S_IFMT {
        libc::S_IFREG => FileType::Regular,
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFIFO => FileType::Fifo,
        libc::S_IFSOCK => FileType::Socket,
        _ => return Err(invalid()),
    };
    Ok(Stat {
        file_type,
        mode: raw.st_mode & 0o7777,
        uid: raw.st_uid,
        gid: raw.st_gid,
        size: raw.st_size.cast_unsigned(),
        // In units of 512 bytes whatever the filesystem's blocks are: inode(7).
        allocated: raw.st_blocks.cast_unsigned().saturating_mul(512),
        links: raw.st_nlink,
        device: (libc::major(raw.st_rdev), libc::minor(raw.st_rdev)),
        modified: Timestamp {
            seconds: raw.st_mtime,
            nanoseconds: u32::try_from(raw.st_mtime_nsec).unwrap_or(0),
        },
        identity: (raw.st_dev, raw.st_ino),
    })
}

pub(super) fn timespec(time: Timestamp) -> libc::timespec {
    libc::timespec { tv_sec: time.seconds, tv_nsec: i64::from(time.nanoseconds) }
}
