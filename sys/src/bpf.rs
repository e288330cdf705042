//! Loading eBPF device filters and attaching them to cgroups: the three commands of `bpf(2)` that
//! cgroup v2 device control needs.
//!
//! Cgroup v2 has no device files; which devices a cgroup may use is decided by a program of type
//! `BPF_PROG_TYPE_CGROUP_DEVICE` (Linux 4.15; Documentation/admin-guide/cgroup-v2.rst, "Device
//! controller"). The caller (`berth-cgroup`) writes that program; this file only gets it into the
//! kernel. Needs `CAP_BPF` with `CAP_NET_ADMIN`, or `CAP_SYS_ADMIN`.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Commands, types and flags of <linux/bpf.h> (Linux 6.1). The libc crate has none of them.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Further programs may be attached beside ours, and by sub-cgroups; a device must then be allowed
/// by all of them. systemd attaches with it too, and mixing it with an exclusive attachment in an
/// ancestor is refused.
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;

/// Programs that one cgroup can carry for one attach type: `BPF_CGROUP_MAX_PROGS` of
/// kernel/bpf/cgroup.c.
const MAX_ATTACHED: usize = 64;

/// Room for the verifier's log when it refuses a program. More than any refusal of a loop-free
/// filter needs.
const VERIFIER_LOG: usize = 16 * 1024;

/// One instruction: `struct bpf_insn` of <linux/bpf.h>.
///
/// ```c
/// struct bpf_insn { __u8 code; __u8 dst_reg:4; __u8 src_reg:4; __s16 off; __s32 imm; };
/// ```
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Class, source and operation.
    pub code: u8,
    /// Destination register in the low four bits, source register in the high four.
    pub registers: u8,
    /// Offset of a jump (in instructions, from the next one) or of a memory access (in bytes).
    pub offset: i16,
    /// The constant operand.
    pub immediate: i32,
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` reads, up to `prog_name` (Linux 4.15). The
/// kernel takes the rest as zero.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// The part of `union bpf_attr` that `BPF_PROG_ATTACH` and `BPF_PROG_DETACH` read.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// The part of `union bpf_attr` that `BPF_PROG_QUERY` reads and writes.
#[repr(C)]
struct QueryAttributes {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    padding: u32,
}

/// The part of `union bpf_attr` that `BPF_PROG_GET_FD_BY_ID` reads.
#[repr(C)]
struct IdAttributes {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// The unsafe call itself, for one of the attribute structures above.
///
/// # Safety
/// `T` must be `repr(C)` without padding bytes and lay out as the part of `union bpf_attr` that
/// `command` uses, and addresses in it must be valid for what the command does with them, over the
/// call.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes at most `size_of::<T>()` bytes at `attributes`, which is
    // exclusively ours; the rest is promised by the caller.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor's number in the type that `union bpf_attr` has for it.
fn number(file: BorrowedFd<'_>) -> u32 {
    // An open descriptor is never negative, so nothing is lost.
    file.as_raw_fd().cast_unsigned()
}

/// Takes ownership of the descriptor that a bpf(2) command returned.
fn owned(raw: libc::c_long) -> io::Result<OwnedFd> {
    let raw = RawFd::try_from(raw).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel returned `raw` as a new descriptor (close-on-exec: bpf(2) always sets it)
    // that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Verifies and loads a device filter: `BPF_PROG_LOAD`. It lives as long as the descriptor or an
/// attachment does.
///
/// The program gets a `struct bpf_cgroup_dev_ctx` in register 1 and answers in register 0: 1
/// allows, 0 refuses with `EPERM`.
///
/// # Errors
/// `EINVAL` or `EACCES` when the verifier refuses it (the end of its log is in the error's text),
/// `EPERM` without the capability.
pub fn load_device_filter(name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    let count = u32::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    // The program calls no kernel function, so its licence does not matter; the kernel requires a
    // string all the same.
    let license = CString::from(c"Apache-2.0");
    let mut attributes = LoadAttributes {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: count,
        insns: program.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        ..LoadAttributes::default()
    };
    // Shown by bpftool; letters, digits, '_' and '.' only, 15 at most, bpf(2).
    let letters = name.bytes().filter(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'));
    for (slot, byte) in attributes.prog_name.iter_mut().take(15).zip(letters) {
        *slot = byte;
    }
    // SAFETY: `insns` and `license` point at memory that lives over the call and is only read;
    // `insn_cnt` is the number of instructions there; the structure has no padding (five u32 pairs,
    // u64 at multiples of eight).
    let first = match unsafe { bpf(BPF_PROG_LOAD, &mut attributes) } {
        Ok(raw) => return owned(raw),
        Err(error) => error,
    };
    // Refused: once more with the verifier's log, which is slow, to be able to say why.
    let mut log = vec![0_u8; VERIFIER_LOG];
    attributes.log_level = 1;
    attributes.log_size = u32::try_from(log.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    attributes.log_buf = log.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: as above, and `log_buf` points at `log_size` bytes that are ours to be written.
    match unsafe { bpf(BPF_PROG_LOAD, &mut attributes) } {
        Ok(raw) => owned(raw),
        Err(_) => {
            let said = log.split(|&byte| byte == 0).next().unwrap_or_default();
            let said = String::from_utf8_lossy(said);
            let last = said.trim_end().lines().rev().take(3).collect::<Vec<_>>();
            if last.is_empty() {
                return Err(first);
            }
            let words = last.into_iter().rev().collect::<Vec<_>>().join("; ");
            Err(io::Error::new(first.kind(), format!("{first}: the verifier says: {words}")))
        }
    }
}

/// Attaches a loaded filter to the cgroup v2 directory `cgroup`, beside those that are there:
/// `BPF_PROG_ATTACH` with `BPF_F_ALLOW_MULTI`. A device is then allowed only if all of them, and
/// those of all ancestors, allow it.
///
/// The attachment ends with the cgroup; the descriptor can be closed.
///
/// # Errors
/// `EBADF` when `cgroup` is not a cgroup v2 directory, `EPERM` when an ancestor has an exclusive
/// filter, `E2BIG` when 64 are attached.
pub fn attach_device_filter(cgroup: BorrowedFd<'_>, filter: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = AttachAttributes {
        target_fd: number(cgroup),
        attach_bpf_fd: number(filter),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: four u32 without padding, no addresses; both descriptors are open, being borrowed.
    unsafe { bpf(BPF_PROG_ATTACH, &mut attributes) }.map(drop)
}

/// Detaches a filter from a cgroup: `BPF_PROG_DETACH`.
///
/// # Errors
/// `ENOENT` when it is not attached there.
pub fn detach_device_filter(cgroup: BorrowedFd<'_>, filter: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = AttachAttributes {
        target_fd: number(cgroup),
        attach_bpf_fd: number(filter),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: 0,
    };
    // SAFETY: four u32 without padding, no addresses; both descriptors are open, being borrowed.
    unsafe { bpf(BPF_PROG_DETACH, &mut attributes) }.map(drop)
}

/// The device filters attached to this very cgroup (not to its ancestors): `BPF_PROG_QUERY`,
/// `BPF_PROG_GET_FD_BY_ID`.
///
/// # Errors
/// The kernel's; `EPERM` without `CAP_SYS_ADMIN`.
pub fn attached_device_filters(cgroup: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let mut ids = [0_u32; MAX_ATTACHED];
    let mut query = QueryAttributes {
        target_fd: number(cgroup),
        attach_type: BPF_CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr().expose_provenance() as u64,
        prog_cnt: 64,
        padding: 0,
    };
    // SAFETY: `prog_ids` points at 64 u32, which is what `prog_cnt` says, ours to be written over
    // the call; the structure has no padding.
    unsafe { bpf(BPF_PROG_QUERY, &mut query) }?;
    let count = usize::try_from(query.prog_cnt).unwrap_or(MAX_ATTACHED);
    let mut filters = Vec::with_capacity(count.min(MAX_ATTACHED));
    for &id in ids.iter().take(count) {
        let mut attributes = IdAttributes { id, next_id: 0, open_flags: 0 };
        // SAFETY: three u32 without padding, no addresses.
        match unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut attributes) } {
            Ok(raw) => filters.push(owned(raw)?),
            // Detached and freed since the query.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_laid_out_as_the_kernel_has_them() {
        assert_eq!(size_of::<Instruction>(), 8);
        assert_eq!(size_of::<LoadAttributes>(), 64);
        assert_eq!(size_of::<AttachAttributes>(), 16);
        assert_eq!(size_of::<QueryAttributes>(), 32);
        assert_eq!(size_of::<IdAttributes>(), 12);
    }

    #[test]
    fn a_program_that_does_not_end_is_refused_with_the_verifiers_words() {
        // mov r0, 1 without an exit.
        let endless = [Instruction { code: 0xb7, registers: 0, offset: 0, immediate: 1 }];
        let error = load_device_filter("berth", &endless).map(drop).unwrap_err();
        assert!(error.to_string().contains("verifier"), "{error}");
    }
}
