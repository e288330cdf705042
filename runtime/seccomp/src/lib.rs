//! Seccomp: an OCI profile becomes the bytes of a filter that the shim installs.
//!
//! ```text
//! default_profile(capabilities) ─┐
//! parse_profile(bytes of a file) ┴─ LinuxSeccomp ── compile ── Filter { bytes, flags }   (or Cache::get)
//! ```
//!
//! Everything is a pure function; the daemon does all of it, so that the shim needs neither a
//! profile parser nor libseccomp. What a profile means follows the OCI runtime-spec
//! (config-linux.md, "Seccomp", v1.3) and, where that is silent, libseccomp as runc drives it,
//! because that is what profiles have been written against; [`compile`] lists those points.

#![forbid(unsafe_code)]

mod abi;
mod assemble;
mod cache;
mod default_profile;
mod entry;
mod evaluate;
mod lower;
#[cfg(test)]
mod meaning;
mod parse;

use oci_spec::runtime::LinuxSeccomp;

pub use cache::Cache;
pub use default_profile::default_profile;
pub use parse::{Circumstances, MAX_PROFILE_BYTES, ParseError, parse_profile};

/// A filter, ready for `seccomp(SECCOMP_SET_MODE_FILTER)`: seccomp(2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// `struct sock_filter` one after another, 8 bytes each, in this machine's byte order; at most
    /// 4096 of them.
    pub bytes: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
}

/// Why a profile cannot be compiled into a filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// Something that needs an agent outside the container, which Berth does not have.
    #[error("seccomp notification is not supported: {feature}")]
    Notification {
        /// The field or action.
        feature: &'static str,
    },
    /// An `errnoRet` for an action that returns none: an error by the runtime-spec.
    #[error("the seccomp action {action} takes no errno")]
    UnusedErrno {
        /// The action.
        action: String,
    },
    /// An errno that the kernel would change, or that would change the action.
    #[error("the seccomp errno {errno} is above {most}")]
    ErrnoTooLarge {
        /// The value that is refused.
        errno: u32,
        /// The largest for this action.
        most: u32,
    },
    /// A rule for no system call: an error by the runtime-spec.
    #[error("a seccomp rule does not name a system call")]
    NoNames,
    /// There are six arguments, counted from 0.
    #[error("a seccomp rule for {syscall} has an argument with index {index}, above 5")]
    ArgumentIndex {
        /// The first name of the rule.
        syscall: String,
        /// The value that is refused.
        index: usize,
    },
    /// The kernel accepts no longer programs: `BPF_MAXINSNS`, <linux/bpf_common.h>.
    #[error("the seccomp filter has {instructions} instructions, more than 4096")]
    TooLong {
        /// The length that it would have.
        instructions: usize,
    },
}

/// Compiles the filter of a profile.
///
/// Where the runtime-spec leaves something open, these rules apply:
/// - Conditions of one rule must all hold, but when an argument index occurs twice in it, each
///   condition becomes its own rule, as in runc and crun: any of them suffices.
/// - A rule without conditions wins over all rules with conditions for the same system call,
///   wherever it stands; among several without, the first. Among rules with conditions, the first
///   that matches. A rule whose action is the default action says nothing.
/// - The bits of `valueTwo` outside the mask of `SCMP_CMP_MASKED_EQ` are ignored. For 32-bit
///   programs only the low halves of values are compared.
/// - A name that no table knows is skipped: it belongs to another architecture, or to a newer
///   kernel.
/// - The machine's own architecture is always covered; calls of one that the profile does not list
///   end the process. x32 is different, since its calls come as x86_64: not listed, it answers
///   `ENOSYS`, as a kernel without x32 does.
/// - When the default action is to refuse, calls newer than any that the profile names answer
///   `ENOSYS`, so that C libraries try the older way; and with `SCMP_ACT_ERRNO` so do numbers that
///   no kernel has given away.
/// - i386 has `socketcall` and `ipc`, which do what other calls do. A rule for one of those calls
///   holds for the way through them too, but a rule that permits under conditions does not: the
///   arguments are in memory, out of a filter's sight.
///
/// # Errors
/// See [`CompileError`].
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter, CompileError> {
    let lowered = lower::lower(profile)?;
    let bytes = assemble::assemble(&lowered)?;
    Ok(Filter { bytes, flags: lowered.flags })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{
        Arch, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompFilterFlag,
        LinuxSeccompOperator, LinuxSyscall,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::abi::{Abi, X32_BIT};
    use crate::evaluate::Call;
    use crate::meaning::{meaning, run};

    const NAMES: [&str; 16] = [
        "read",
        "write",
        "socket",
        "connect",
        "socketpair",
        "socketcall",
        "shmget",
        "ipc",
        "clone",
        "personality",
        "rt_sigaction",
        "mmap2",
        "futex_waitv",
        "mseal",
        "no_such_call",
        "",
    ];

    const VALUES: [u64; 12] = [
        0,
        1,
        2,
        23,
        38,
        0x7fff_ffff,
        0xffff_fffe,
        0xffff_ffff,
        0x1_0000_0000,
        0x1_0000_0001,
        0x8000_0000_0000_0000,
        u64::MAX,
    ];

    fn value() -> impl Strategy<Value = u64> {
        prop_oneof![3 => prop::sample::select(VALUES.to_vec()), 1 => any::<u64>()]
    }

    fn any_arg() -> impl Strategy<Value = LinuxSeccompArg> {
        use LinuxSeccompOperator as Op;
        let ops = vec![
            Op::ScmpCmpNe,
            Op::ScmpCmpLt,
            Op::ScmpCmpLe,
            Op::ScmpCmpEq,
            Op::ScmpCmpGe,
            Op::ScmpCmpGt,
            Op::ScmpCmpMaskedEq,
        ];
        (0_usize..6, prop::sample::select(ops), value(), value()).prop_map(|(index, op, one, two)| {
            LinuxSeccompArgBuilder::default().index(index).op(op).value(one).value_two(two).build().unwrap()
        })
    }

    fn action() -> impl Strategy<Value = (LinuxSeccompAction, Option<u32>)> {
        use LinuxSeccompAction as Act;
        prop_oneof![
            Just((Act::ScmpActAllow, None)),
            Just((Act::ScmpActLog, None)),
            Just((Act::ScmpActTrap, None)),
            Just((Act::ScmpActKill, None)),
            Just((Act::ScmpActKillProcess, None)),
            (0_u32..40).prop_map(|errno| (Act::ScmpActErrno, Some(errno))),
            Just((Act::ScmpActErrno, None)),
            Just((Act::ScmpActTrace, Some(7))),
        ]
    }

    fn rule() -> impl Strategy<Value = LinuxSyscall> {
        let names = prop::collection::vec(prop::sample::select(NAMES.to_vec()), 1..4);
        (names, action(), prop::collection::vec(any_arg(), 0..4)).prop_map(
            |(names, (action, errno), args)| {
                let mut rule = LinuxSyscall::default();
                rule.set_names(names.into_iter().map(str::to_owned).collect())
                    .set_action(action)
                    .set_errno_ret(errno)
                    .set_args(Some(args));
                rule
            },
        )
    }

    fn profile() -> impl Strategy<Value = LinuxSeccomp> {
        let arches = vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32, Arch::ScmpArchMips];
        let arches = prop::option::of(prop::sample::subsequence(arches, 0..=4));
        (action(), arches, prop::collection::vec(rule(), 0..12)).prop_map(
            |((action, errno), arches, rules)| {
                let mut profile = LinuxSeccomp::default();
                profile
                    .set_default_action(action)
                    .set_default_errno_ret(errno)
                    .set_architectures(arches)
                    .set_syscalls(Some(rules));
                profile
            },
        )
    }

    fn call() -> impl Strategy<Value = Call> {
        let abi = prop::sample::select(vec![Abi::X86_64, Abi::X86, Abi::X32]);
        let number = prop_oneof![
            6 => (abi, prop::sample::select(NAMES.to_vec())).prop_map(|(abi, name)| {
                (abi.audit_arch(), abi.number(name).unwrap_or(u32::MAX))
            }),
            2 => (prop::sample::select(vec![0xc000_003e, 0x4000_0003, 0xc000_00b7, 0]), 0_u32..600),
            1 => (prop::sample::select(vec![0xc000_003e, 0x4000_0003]), any::<u32>()),
            1 => (Just(0xc000_003e), X32_BIT..X32_BIT + 600),
        ];
        (number, prop::array::uniform6(value())).prop_map(|((arch, number), mut args)| {
            if arch == 0x4000_0003 {
                // The arguments of a 32-bit program have no high half.
                args = args.map(|arg| arg & 0xffff_ffff);
            }
            Call { number, arch, args }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn a_filter_does_what_its_profile_means(
            profile in profile(), calls in prop::collection::vec(call(), 64)
        ) {
            let filter = compile(&profile).unwrap();
            for call in calls {
                prop_assert_eq!(run(&filter.bytes, &call), meaning(&profile, &call), "{:x?}", call);
            }
        }
    }

    fn one(rule: LinuxSyscall) -> LinuxSeccomp {
        let mut profile = LinuxSeccomp::default();
        profile.set_syscalls(Some(vec![rule]));
        profile
    }

    fn refusing(names: &[&str]) -> LinuxSyscall {
        let mut rule = LinuxSyscall::default();
        rule.set_names(names.iter().map(|name| (*name).to_owned()).collect())
            .set_action(LinuxSeccompAction::ScmpActErrno);
        rule
    }

    #[test]
    fn what_cannot_be_kept_is_an_error() {
        let mut too_large = refusing(&["read"]);
        too_large.set_errno_ret(Some(4096));
        let mut unused = refusing(&["read"]);
        unused.set_action(LinuxSeccompAction::ScmpActKill).set_errno_ret(Some(1));
        let mut notify = refusing(&["read"]);
        notify.set_action(LinuxSeccompAction::ScmpActNotify);
        let mut index = refusing(&["read"]);
        index.set_args(Some(vec![LinuxSeccompArgBuilder::default().index(6_usize).build().unwrap()]));
        for (rule, expected) in [
            (too_large, CompileError::ErrnoTooLarge { errno: 4096, most: 4095 }),
            (unused, CompileError::UnusedErrno { action: "SCMP_ACT_KILL".into() }),
            (notify, CompileError::Notification { feature: "SCMP_ACT_NOTIFY" }),
            (index, CompileError::ArgumentIndex { syscall: "read".into(), index: 6 }),
            (refusing(&[]), CompileError::NoNames),
        ] {
            assert_eq!(compile(&one(rule)).unwrap_err(), expected);
        }
        let mut listening = one(refusing(&["read"]));
        listening.set_listener_path(Some("/run/agent.sock".into()));
        assert!(matches!(compile(&listening), Err(CompileError::Notification { feature: "listenerPath" })));
        listening.set_listener_path(Some("".into()));
        assert!(compile(&listening).is_ok(), "an empty path is none");
    }

    #[test]
    fn a_filter_that_the_kernel_would_not_take_is_an_error() {
        let condition =
            |value: u64| LinuxSeccompArgBuilder::default().index(0_usize).value(value).build().unwrap();
        let mut long = refusing(&["read"]);
        long.set_args(Some((0..900).map(condition).collect()));
        assert!(
            compile(&one(long.clone())).is_err_and(|error| matches!(error, CompileError::TooLong { .. }))
        );
        // Names times conditions, refused before it takes memory.
        long.set_names(vec!["read".into(); 100_000]);
        assert!(
            compile(&one(long.clone())).is_err_and(|error| matches!(error, CompileError::TooLong { .. }))
        );
        long.set_names(vec!["read".into()]);
        // Long, but not too long: jumps over more than 255 instructions.
        long.set_args(Some((0..400).map(condition).collect()));
        let filter = compile(&one(long)).unwrap();
        assert!(filter.bytes.len() / 8 > 1600);
        for (value, expected) in [(0, 0x5_0001), (399, 0x5_0001), (400, 0x7fff_0000), (1 << 32, 0x7fff_0000)]
        {
            assert_eq!(run(&filter.bytes, &Call::new(Abi::X86_64, "read", &[value])), expected);
            assert_eq!(run(&filter.bytes, &Call::new(Abi::X86_64, "write", &[value])), 0x7fff_0000);
        }
    }

    #[test]
    fn flags_are_the_kernels() {
        use LinuxSeccompFilterFlag as Flag;
        for (flags, bits) in [
            (vec![], Some(0)),
            (vec![Flag::SeccompFilterFlagLog], Some(2)),
            (vec![Flag::SeccompFilterFlagSpecAllow, Flag::SeccompFilterFlagTsync], Some(4)),
            (vec![Flag::SeccompFilterFlagWaitKillableRecv], None),
        ] {
            let mut profile = one(refusing(&["read"]));
            profile.set_flags(Some(flags));
            assert_eq!(compile(&profile).ok().map(|filter| filter.flags), bits);
        }
    }

    #[test]
    fn x32_does_not_lead_around_a_deny_list() {
        let filter = compile(&one(refusing(&["read"]))).unwrap();
        let call = Call { number: X32_BIT, arch: Abi::X86_64.audit_arch(), args: [0; 6] };
        assert_eq!(run(&filter.bytes, &call), 0x5_0026);
    }
}
