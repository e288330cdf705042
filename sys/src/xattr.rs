//! Extended attributes of open files (xattr(7)).
//!
//! Only by descriptor: a path could name another inode by the time it is used. Which names are
//! acceptable is the caller's business.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The kernel's limits for one value and for one list of names (include/uapi/linux/limits.h:
/// `XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_SIZE: usize = 65536;

/// Sets an attribute, replacing an older value.
///
/// # Errors
/// As fsetxattr(2): `EOPNOTSUPP` where the filesystem or the type of the inode has no such
/// attributes, `EPERM`, `ENOSPC`, `E2BIG`; `EBADF` for an `O_PATH` descriptor.
pub fn set(fd: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: fsetxattr(2) reads a NUL-terminated name and `size` bytes of the value; both outlive
    // the call.
    let result =
        unsafe { libc::fsetxattr(fd.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads an attribute; `None` if it is absent, or if the filesystem has no attributes at all.
///
/// # Errors
/// As fgetxattr(2).
pub fn get(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0_u8; MAX_SIZE];
    // SAFETY: fgetxattr(2) reads a NUL-terminated name and writes at most the given length, which
    // the buffer has.
    let result =
        unsafe { libc::fgetxattr(fd.as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    match usize::try_from(result) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(_) => {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(None),
                _ => Err(error),
            }
        }
    }
}

/// The names of all attributes that the caller may see.
///
/// # Errors
/// As flistxattr(2); a filesystem without attributes is an empty list.
pub fn names(fd: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut list = vec![0_u8; MAX_SIZE];
    // SAFETY: flistxattr(2) writes at most the given length, which the buffer has.
    let result = unsafe { libc::flistxattr(fd.as_raw_fd(), list.as_mut_ptr().cast(), list.len()) };
    let Ok(length) = usize::try_from(result) else {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EOPNOTSUPP) { Ok(Vec::new()) } else { Err(error) };
    };
    let list = list.get(..length).unwrap_or_default();
    Ok(list
        .split_inclusive(|&b| b == 0)
        .filter_map(|n| CStr::from_bytes_with_nul(n).ok())
        .map(CStr::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn an_attribute_is_set_listed_and_read_back() {
        let path = std::env::temp_dir().join(format!("berth-xattr-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let value = b"a\0b\xff";
        assert_eq!(get(file.as_fd(), c"user.berth").unwrap(), None);
        set(file.as_fd(), c"user.berth", value).unwrap();
        set(file.as_fd(), c"user.empty", b"").unwrap();
        assert_eq!(get(file.as_fd(), c"user.berth").unwrap().as_deref(), Some(&value[..]));
        assert_eq!(get(file.as_fd(), c"user.empty").unwrap().as_deref(), Some(&b""[..]));
        let names = names(file.as_fd()).unwrap();
        assert!(names.contains(&c"user.berth".to_owned()) && names.contains(&c"user.empty".to_owned()));
    }
}
