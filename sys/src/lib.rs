//! Thin safe wrappers over Linux: the one crate with unsafe code.
//!
//! Each is a function or an owned handle over one system call or a fixed small sequence of them;
//! policy lives with the callers. Errors are the kernel's (`io::Error` with the errno); callers add
//! what they were doing and to what.
//!
//! Everything here works in a static musl program with one thread (the shim) and in the daemon.
//! Functions that change a whole process or thread say so in their docs.

pub mod beneath;
pub mod bpf;
pub mod credentials;
pub mod ending;
pub mod errno;
pub mod file;
pub mod file_handle;
pub mod host_path;
pub mod identity;
pub mod mount;
pub mod ns;
pub mod poll;
pub mod process;
pub mod program;
pub mod scheduling;
pub mod socket;
pub mod tty;
pub mod xattr;
