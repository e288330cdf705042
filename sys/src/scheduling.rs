//! What a process passes on to its children besides credentials, limits and descriptors:
//! scheduling, processors, memory policy, personality. A container gets the kernel's own defaults,
//! whatever its daemon was started with.
//!
//! All of these act on the calling thread, and its children inherit the result.

use std::io;

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct sched_attr` of <linux/sched/types.h>, its first version (48 bytes, Linux 3.14).
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const SCHED_ATTR_SIZE: u32 = 48;
const _: () = assert!(size_of::<SchedAttr>() == 48);

/// Sets the policy `SCHED_OTHER` with nice value 0 and without reset-on-fork: `sched_setattr(2)`.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE` when the nice value is above 0 or the policy is `SCHED_IDLE`.
pub fn use_default_policy() -> io::Result<()> {
    let attributes =
        SchedAttr { size: SCHED_ATTR_SIZE, policy: libc::SCHED_OTHER.unsigned_abs(), ..SchedAttr::default() };
    // SAFETY: sched_setattr(2) reads a struct sched_attr of the size in its first field; pid 0 is
    // the calling thread.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}

/// Allows all processors, of which the kernel uses those that the cpuset allows:
/// `sched_setaffinity(2)`.
///
/// # Errors
/// None in practice.
pub fn use_all_processors() -> io::Result<()> {
    // More than any kernel is built for (NR_CPUS is at most 8192). Bits of processors that do not
    // exist are ignored.
    let all = [u64::MAX; 128];
    // SAFETY: the kernel reads at most the given number of bytes of the mask, which has them.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(&all), all.as_ptr()) })
}

/// Removes the I/O priority, so that the nice value decides: `ioprio_set(2)`, `IOPRIO_CLASS_NONE`.
///
/// # Errors
/// `ENOSYS` on a kernel without block devices.
pub fn use_default_io_priority() -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: ioprio_set(2) takes only numbers; process 0 is the calling thread.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0) })
}

/// Lets the kernel place memory as it sees fit: `set_mempolicy(2)`, `MPOL_DEFAULT`.
///
/// # Errors
/// `ENOSYS` on a kernel without NUMA.
pub fn use_default_memory_policy() -> io::Result<()> {
    // SAFETY: MPOL_DEFAULT (0) takes an empty set of nodes, which a null pointer is.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, 0, std::ptr::null::<libc::c_ulong>(), 0) })
}

/// Sets the Linux personality, with address space randomization: `personality(2)`, `PER_LINUX`.
///
/// # Errors
/// None in practice.
pub fn use_default_personality() -> io::Result<()> {
    // SAFETY: personality(2) takes only a number.
    check(libc::c_long::from(unsafe { libc::personality(0) }))
}

/// Sets the slack of timers, in nanoseconds: `PR_SET_TIMERSLACK`. A child inherits it, also as its
/// default.
///
/// # Errors
/// None in practice.
pub fn set_timer_slack(nanoseconds: u32) -> io::Result<()> {
    prctl(libc::PR_SET_TIMERSLACK, libc::c_ulong::from(nanoseconds))
}

/// Uses the host's setting for transparent huge pages: `PR_SET_THP_DISABLE` off.
///
/// # Errors
/// `EINVAL` on a kernel without them.
pub fn allow_huge_pages() -> io::Result<()> {
    prctl(libc::PR_SET_THP_DISABLE, 0)
}

/// Keeps the kernel from merging pages of this process with those of others, unless it asks for
/// that: `PR_SET_MEMORY_MERGE` off.
///
/// # Errors
/// `EINVAL` on a kernel without it (Linux 6.4, KSM).
pub fn merge_no_memory() -> io::Result<()> {
    const PR_SET_MEMORY_MERGE: libc::c_int = 67;
    prctl(PR_SET_MEMORY_MERGE, 0)
}

/// Uses the host's setting for processes whose memory fails: `PR_MCE_KILL_CLEAR`.
///
/// # Errors
/// `EINVAL` on a kernel without machine checks.
pub fn use_default_memory_failure_policy() -> io::Result<()> {
    prctl(libc::PR_MCE_KILL, 0)
}

/// Allocates memory as for any process, not as for one that filesystems depend on:
/// `PR_SET_IO_FLUSHER` off.
///
/// # Errors
/// `EPERM` without `CAP_SYS_RESOURCE`, without which nothing can have turned it on either; `EINVAL`
/// before Linux 5.6.
pub fn flush_no_io() -> io::Result<()> {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    prctl(PR_SET_IO_FLUSHER, 0)
}

fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used in this file take numbers only; unused arguments are zero as
    // prctl(2) asks.
    check(libc::c_long::from(unsafe { libc::prctl(option, value, 0, 0, 0) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's state of the calling thread.
    fn told(name: &str) -> String {
        std::fs::read_to_string(format!("/proc/thread-self/{name}")).unwrap().trim().to_owned()
    }

    #[test]
    fn everything_goes_back_to_its_default() {
        crate::ns::on_own_thread("scheduling", || {
            // SAFETY: one live cpu_set_t with the first processor in it, and numbers.
            unsafe {
                let mut one: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(0, &mut one);
                assert_eq!(libc::sched_setaffinity(0, size_of_val(&one), &raw const one), 0);
                assert_eq!(libc::setpriority(libc::PRIO_PROCESS, 0, 5), 0);
                assert_eq!(libc::personality(0x004_0000), 0);
            }
            set_timer_slack(1234).unwrap();
            assert!(told("status").contains("Cpus_allowed_list:\t0\n"));
            use_all_processors().unwrap();
            use_default_policy().unwrap();
            use_default_io_priority().unwrap();
            use_default_personality().unwrap();
            set_timer_slack(50_000).unwrap();
            // SAFETY: these take numbers only; 0xffffffff asks without changing anything.
            unsafe {
                assert_eq!(libc::getpriority(libc::PRIO_PROCESS, 0), 0);
                assert_eq!(libc::personality(0xffff_ffff), 0);
                assert_eq!(libc::prctl(libc::PR_GET_TIMERSLACK), 50_000);
            }
            let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
            assert!(told("status").contains(&format!("Cpus_allowed_list:\t{}\n", online.trim())));
        })
        .unwrap();
    }

    #[test]
    fn what_a_kernel_may_lack_is_said_to_be_lacking() {
        for result in [allow_huge_pages(), merge_no_memory(), use_default_memory_policy()] {
            let number = result.err().and_then(|error| error.raw_os_error());
            assert!(matches!(number, None | Some(libc::EINVAL | libc::ENOSYS)), "{number:?}");
        }
    }
}
