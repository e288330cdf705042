//! User ids, groups and capability sets of the calling process: credentials(7), capabilities(7).

use std::io;

/// The capabilities by name, without `CAP_`; the place in the list is the number:
/// <linux/capability.h>.
pub const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities, one bit for each number.
pub type CapabilityBits = u64;

/// The number of the capability `name` (with or without `CAP_`, in any case), or `None` for an
/// unknown name.
#[must_use]
pub fn capability_number(name: &str) -> Option<u32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    CAPABILITIES.iter().zip(0_u32..).find(|(known, _)| **known == bare).map(|(_, number)| number)
}

/// The number of the last capability that this kernel knows: `/proc/sys/kernel/cap_last_cap`.
///
/// # Errors
/// When the file cannot be read or is not a number.
pub fn last_capability() -> io::Result<u32> {
    let text = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")?;
    text.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// The capabilities that this process may use or pass on, its bounding set: `PR_CAPBSET_READ`.
///
/// # Errors
/// As [`last_capability`].
pub fn bounding_set() -> io::Result<CapabilityBits> {
    let mut bits = 0;
    for number in 0..=last_capability()?.min(63) {
        // SAFETY: PR_CAPBSET_READ takes only a number.
        if unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(number), 0, 0, 0) } == 1 {
            bits |= 1 << number;
        }
    }
    Ok(bits)
}

/// Drops from the bounding set everything that is not in `keep`: `PR_CAPBSET_DROP`.
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`.
pub fn limit_bounding_set(keep: CapabilityBits) -> io::Result<()> {
    for number in 0..64_u32 {
        if keep & (1 << number) != 0 {
            continue;
        }
        // SAFETY: PR_CAPBSET_READ takes only a number.
        let present = unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(number), 0, 0, 0) };
        if present < 0 {
            // EINVAL: past the last capability of this kernel.
            break;
        }
        if present == 1 {
            // SAFETY: PR_CAPBSET_DROP takes only a number.
            let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
            if dropped < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// Empties the ambient set: `PR_CAP_AMBIENT_CLEAR_ALL`.
///
/// # Errors
/// None in practice.
pub fn clear_ambient_set() -> io::Result<()> {
    // SAFETY: prctl(2) with PR_CAP_AMBIENT takes only numbers.
    let result = unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::c_ulong::from(libc::PR_CAP_AMBIENT_CLEAR_ALL.unsigned_abs()),
            0,
            0,
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Adds every capability in `bits` to the ambient set; they have to be permitted and inheritable:
/// `PR_CAP_AMBIENT_RAISE`.
///
/// # Errors
/// `EPERM` when one is not both.
pub fn raise_ambient_set(bits: CapabilityBits) -> io::Result<()> {
    for number in (0..64_u32).filter(|number| bits & (1 << number) != 0) {
        let raise = libc::c_ulong::from(libc::PR_CAP_AMBIENT_RAISE.unsigned_abs());
        // SAFETY: prctl(2) with PR_CAP_AMBIENT takes only numbers.
        let result = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, libc::c_ulong::from(number), 0, 0) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// `struct __user_cap_header_struct` of <linux/capability.h>.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

/// The version of the two structures: `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;

/// `struct __user_cap_data_struct` of <linux/capability.h>; version 3 has two, low half first.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The permitted set of the calling thread: `capget(2)`, version 3.
///
/// # Errors
/// None in practice.
pub fn permitted_set() -> io::Result<CapabilityBits> {
    let mut header = CapHeader { version: VERSION_3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: `header` and `data` have the layouts of version 3 (two data elements) and live over
    // the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let [low, high] = data;
    Ok(u64::from(low.permitted) | u64::from(high.permitted) << 32)
}

/// Sets the effective, permitted and inheritable sets of the calling thread: `capset(2)`, version
/// 3.
///
/// # Errors
/// `EPERM` when a capability is added to the permitted set.
pub fn set_capabilities(
    effective: CapabilityBits,
    permitted: CapabilityBits,
    inheritable: CapabilityBits,
) -> io::Result<()> {
    let header = CapHeader { version: VERSION_3, pid: 0 };
    let half = |shift: u32| CapData {
        effective: low_half(effective >> shift),
        permitted: low_half(permitted >> shift),
        inheritable: low_half(inheritable >> shift),
    };
    let data = [half(0), half(32)];
    // SAFETY: `header` and `data` have the layouts of version 3 (two data elements) and live over
    // the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn low_half(bits: u64) -> u32 {
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// Replaces the supplementary groups: `setgroups(2)`.
///
/// # Errors
/// `EPERM` without `CAP_SETGID`, `EINVAL` for more than 65536 groups.
pub fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the pointer and length describe a live slice of gid_t (u32). The raw call changes
    // this thread only, which in a child after clone is the process.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the real, effective and saved group id, then user id: `setresgid(2)`, `setresuid(2)`.
///
/// # Errors
/// `EPERM` without `CAP_SETGID`/`CAP_SETUID`, `EAGAIN` at the user's process limit.
pub fn set_ids(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: both calls take only numbers.
    unsafe {
        if libc::syscall(libc::SYS_setresgid, gid, gid, gid) < 0
            || libc::syscall(libc::SYS_setresuid, uid, uid, uid) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_any_writing() {
        assert_eq!(capability_number("NET_ADMIN"), Some(12));
        assert_eq!(capability_number("cap_net_admin"), Some(12));
        assert_eq!(capability_number("Sys_Admin"), Some(21));
        assert_eq!(capability_number("CHECKPOINT_RESTORE"), Some(40));
        for unknown in ["", "ALL", "CAP_", "NET ADMIN", "CAP_CAP_KILL", "\0"] {
            assert_eq!(capability_number(unknown), None, "{unknown:?}");
        }
    }

    #[test]
    fn the_permitted_set_is_what_proc_says() {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let listed = status.lines().find_map(|line| line.strip_prefix("CapPrm:")).unwrap().trim();
        assert_eq!(permitted_set().unwrap(), u64::from_str_radix(listed, 16).unwrap());
    }

    #[test]
    fn the_kernel_knows_no_more_than_the_list() {
        let last = usize::try_from(last_capability().unwrap()).unwrap();
        assert!(last < CAPABILITIES.len(), "this kernel has a capability that the list lacks");
    }
}
