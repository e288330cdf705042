//! The system call interfaces that a filter may meet: their audit architectures and numbers, and
//! what the kernel takes for a filter.

use std::str::FromStr;

use oci_spec::runtime::Arch;

/// One interface of the kernel. A filter sees two of them under one audit architecture: x32 is
/// x86_64 with a bit in the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Abi {
    X86_64,
    X32,
    X86,
    Aarch64,
}

/// What marks an x32 call: `__X32_SYSCALL_BIT`, <asm/unistd.h>.
pub(crate) const X32_BIT: u32 = 0x4000_0000;

/// `BPF_MAXINSNS`, <linux/bpf_common.h>.
pub(crate) const MAX_INSTRUCTIONS: usize = 4096;

/// `AUDIT_ARCH_*`, <linux/audit.h>.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const AUDIT_ARCH_AARCH64: u32 = 0xc000_00b7;

/// The calls that x32 has numbers of its own for, from 512 on:
/// arch/x86/entry/syscalls/syscall_64.tbl.
const X32_OWN: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];

/// What `socketcall(call, args)` of i386 does, by call number from 1: <linux/net.h>.
const SOCKETCALL: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

/// What `ipc(call, …)` of i386 does: <linux/ipc.h>.
const IPC: [(&str, u64); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

impl Abi {
    /// The interface of the programs that this crate is compiled for.
    pub(crate) const NATIVE: Self = if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 };

    /// The interface of an OCI architecture; `None` for machines that Berth does not run on.
    pub(crate) fn from_oci(arch: Arch) -> Option<Self> {
        match arch {
            Arch::ScmpArchNative => Some(Self::NATIVE),
            Arch::ScmpArchX86_64 => Some(Self::X86_64),
            Arch::ScmpArchX32 => Some(Self::X32),
            Arch::ScmpArchX86 => Some(Self::X86),
            Arch::ScmpArchAarch64 => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// The name that Docker's form of a profile uses for it, which is Go's.
    pub(crate) fn go_name(self) -> &'static str {
        match self {
            Self::X86_64 | Self::X32 => "amd64",
            Self::X86 => "386",
            Self::Aarch64 => "arm64",
        }
    }

    /// The value of `seccomp_data.arch`.
    pub(crate) fn audit_arch(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => AUDIT_ARCH_X86_64,
            Self::X86 => AUDIT_ARCH_I386,
            Self::Aarch64 => AUDIT_ARCH_AARCH64,
        }
    }

    /// Whether arguments have 64 bits that count.
    pub(crate) fn has_wide_arguments(self) -> bool {
        match self {
            Self::X86_64 | Self::Aarch64 => true,
            // libseccomp treats x32 as a 32-bit interface too.
            Self::X32 | Self::X86 => false,
        }
    }

    /// The number of a call, with the x32 bit where it belongs.
    pub(crate) fn number(self, name: &str) -> Option<u32> {
        let id = match self {
            Self::X86_64 => syscalls::x86_64::Sysno::from_str(name).ok()?.id(),
            Self::X86 => syscalls::x86::Sysno::from_str(name).ok()?.id(),
            Self::Aarch64 => syscalls::aarch64::Sysno::from_str(name).ok()?.id(),
            Self::X32 => {
                if let Some(number) =
                    (512..).zip(X32_OWN).find_map(|(number, own)| (own == name).then_some(number))
                {
                    return Some(X32_BIT | number);
                }
                return Self::X86_64.number(name).map(|number| X32_BIT | number);
            }
        };
        u32::try_from(id).ok()
    }

    /// All numbers that are assigned in the table, in order.
    pub(crate) fn assigned(self) -> Vec<u32> {
        let numbers =
            |ids: &mut dyn Iterator<Item = i32>| ids.filter_map(|id| u32::try_from(id).ok()).collect();
        let mut assigned: Vec<u32> = match self {
            Self::X86_64 => numbers(&mut syscalls::x86_64::Sysno::iter().map(|call| call.id())),
            Self::X86 => numbers(&mut syscalls::x86::Sysno::iter().map(|call| call.id())),
            Self::Aarch64 => numbers(&mut syscalls::aarch64::Sysno::iter().map(|call| call.id())),
            Self::X32 => {
                let own = 512..512 + 36;
                Self::X86_64.assigned().into_iter().chain(own).map(|number| X32_BIT | number).collect()
            }
        };
        assigned.sort_unstable();
        assigned.dedup();
        assigned
    }

    /// The older way to make the same call on i386: the number of the multiplexing call, and its
    /// first argument.
    pub(crate) fn multiplexer(self, name: &str) -> Option<(u32, u64)> {
        if self != Self::X86 {
            return None;
        }
        if let Some(call) = (1..).zip(SOCKETCALL).find_map(|(call, does)| (does == name).then_some(call)) {
            return Some((self.number("socketcall")?, call));
        }
        let (_, call) = IPC.into_iter().find(|(does, _)| *does == name)?;
        Some((self.number("ipc")?, call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        for (abi, name, number) in [
            (Abi::X86_64, "read", Some(0)),
            (Abi::X86_64, "clone3", Some(435)),
            (Abi::X86_64, "socketcall", None),
            (Abi::X86, "socketcall", Some(102)),
            (Abi::X86, "ipc", Some(117)),
            (Abi::X86, "read", Some(3)),
            (Abi::X86, "clone3", Some(435)),
            (Abi::X32, "read", Some(X32_BIT)),
            (Abi::X32, "rt_sigaction", Some(X32_BIT | 512)),
            (Abi::X32, "pwritev2", Some(X32_BIT | 547)),
            (Abi::Aarch64, "read", Some(63)),
            (Abi::X86_64, "", None),
            (Abi::X86_64, "READ", None),
            (Abi::X86_64, "read\0", None),
        ] {
            assert_eq!(abi.number(name), number, "{abi:?} {name}");
        }
    }

    #[test]
    fn multiplexed_calls_are_known_on_i386_only() {
        assert_eq!(Abi::X86.multiplexer("socket"), Some((102, 1)));
        assert_eq!(Abi::X86.multiplexer("sendmmsg"), Some((102, 20)));
        assert_eq!(Abi::X86.multiplexer("shmctl"), Some((117, 24)));
        assert_eq!(Abi::X86.multiplexer("read"), None);
        assert_eq!(Abi::X86_64.multiplexer("socket"), None);
    }

    #[test]
    fn assigned_numbers_have_the_known_gaps() {
        let assigned = Abi::X86_64.assigned();
        assert!(assigned.contains(&0) && assigned.contains(&334) && assigned.contains(&424));
        assert!(!assigned.contains(&400));
        assert!(assigned.is_sorted());
    }
}
