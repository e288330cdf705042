//! Error numbers that decide something where `io::ErrorKind` has no name for them: errno(3).

pub use libc::{
    EACCES, EAFNOSUPPORT, ECONNREFUSED, EINVAL, EIO, ELOOP, EMFILE, ENFILE, ENODEV, ENOENT, ENOEXEC, ENOMEM,
    EOPNOTSUPP, ERANGE, ESRCH, ESTALE,
};
