//! From an OCI profile to one decision per system call number: names resolved, actions as the
//! kernel's numbers, precedence settled.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

use crate::CompileError;
use crate::abi::{Abi, MAX_INSTRUCTIONS, X32_BIT};

/// `SECCOMP_RET_*` of <linux/seccomp.h>, seccomp(2).
pub(crate) mod ret {
    pub(crate) const KILL_PROCESS: u32 = 0x8000_0000;
    pub(crate) const KILL_THREAD: u32 = 0;
    pub(crate) const TRAP: u32 = 0x0003_0000;
    pub(crate) const ERRNO: u32 = 0x0005_0000;
    pub(crate) const TRACE: u32 = 0x7ff0_0000;
    pub(crate) const LOG: u32 = 0x7ffc_0000;
    pub(crate) const ALLOW: u32 = 0x7fff_0000;
    /// The part of the value that is the action.
    pub(crate) const ACTION: u32 = 0xffff_0000;
    pub(crate) const ENOSYS: u32 = ERRNO | 38;
}

const EPERM: u32 = 1;
/// The kernel cuts a larger errno down to this: `MAX_ERRNO`, <linux/err.h>.
const MAX_ERRNO: u32 = 4095;
/// A tracer receives 16 bits: `SECCOMP_RET_DATA`.
const MAX_TRACE: u32 = 0xffff;

const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;

/// What is compared, in 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal(u64),
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Greater(u64),
    GreaterOrEqual(u64),
    /// The argument and the mask are equal to the value, which has no bit outside the mask.
    Masked {
        mask: u64,
        value: u64,
    },
}

/// One condition on one argument, 0 to 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) argument: u8,
    pub(crate) comparison: Comparison,
}

/// Conditions that must all hold, and the action then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) conditions: Vec<Condition>,
    pub(crate) action: u32,
}

/// The decision for one number, or a range of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    Always(u32),
    /// The first rule that matches, else the last value.
    Depends(Vec<Rule>, u32),
}

/// All numbers of one interface: each decision holds from its number up to the next one's. The
/// first number is where the interface starts (0, or the x32 bit).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) abi: Abi,
    pub(crate) ranges: Vec<(u32, Decision)>,
}

/// A profile, lowered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lowered {
    pub(crate) tables: Vec<Table>,
    pub(crate) flags: u32,
}

/// A rule of the profile, before its numbers are known.
struct Stated<'a> {
    names: &'a [String],
    action: u32,
    /// Lists of conditions, of which one must hold; one empty list when there are no conditions.
    alternatives: Vec<Vec<Condition>>,
}

/// See [`crate::compile`] for what is decided here.
pub(crate) fn lower(profile: &LinuxSeccomp) -> Result<Lowered, CompileError> {
    // Profiles and generators leave it empty to say that there is none.
    if profile.listener_path().as_ref().is_some_and(|path| !path.as_os_str().is_empty()) {
        return Err(CompileError::Notification { feature: "listenerPath" });
    }
    if profile.listener_metadata().as_ref().is_some_and(|metadata| !metadata.is_empty()) {
        return Err(CompileError::Notification { feature: "listenerMetadata" });
    }
    let flags = flags(profile.flags().as_deref().unwrap_or_default())?;
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut abis = vec![Abi::NATIVE];
    abis.extend(profile.architectures().iter().flatten().filter_map(|arch| Abi::from_oci(*arch)));
    abis.sort_unstable();
    abis.dedup();

    let mut rules = Vec::new();
    for syscall in profile.syscalls().iter().flatten() {
        let Some(first) = syscall.names().first() else { return Err(CompileError::NoNames) };
        // As in runc, a rule's errno falls back to EPERM, not to the profile's default errno.
        let action = action(syscall.action(), syscall.errno_ret())?;
        let args = syscall.args().as_deref().unwrap_or_default();
        rules.push(Stated { names: syscall.names(), action, alternatives: alternatives(first, args)? });
    }
    let tables = abis.into_iter().map(|abi| table(abi, default, &rules)).collect::<Result<_, _>>()?;
    Ok(Lowered { tables, flags })
}

fn flags(flags: &[LinuxSeccompFilterFlag]) -> Result<u32, CompileError> {
    let mut bits = 0;
    for flag in flags {
        bits |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
            // It concerns other threads of the installer, and the shim's child has none.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(CompileError::Notification { feature: "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" });
            }
        };
    }
    Ok(bits)
}

/// The kernel's number for an action.
fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, CompileError> {
    let within = |most| match errno.unwrap_or(EPERM) {
        errno if errno <= most => Ok(errno),
        errno => Err(CompileError::ErrnoTooLarge { errno, most }),
    };
    let plain = match action {
        LinuxSeccompAction::ScmpActErrno => return Ok(ret::ERRNO | within(MAX_ERRNO)?),
        LinuxSeccompAction::ScmpActTrace => return Ok(ret::TRACE | within(MAX_TRACE)?),
        LinuxSeccompAction::ScmpActNotify => {
            return Err(CompileError::Notification { feature: "SCMP_ACT_NOTIFY" });
        }
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ret::KILL_THREAD,
        LinuxSeccompAction::ScmpActKillProcess => ret::KILL_PROCESS,
        LinuxSeccompAction::ScmpActTrap => ret::TRAP,
        LinuxSeccompAction::ScmpActLog => ret::LOG,
        LinuxSeccompAction::ScmpActAllow => ret::ALLOW,
    };
    match errno {
        // 0 is what a Go program writes for "not set".
        None | Some(0) => Ok(plain),
        Some(_) => Err(CompileError::UnusedErrno { action: action.to_string() }),
    }
}

/// The lists of conditions of which one must hold: one list, or, when an argument occurs twice, one
/// for each condition.
fn alternatives(syscall: &str, args: &[LinuxSeccompArg]) -> Result<Vec<Vec<Condition>>, CompileError> {
    let mut conditions = Vec::with_capacity(args.len());
    let mut repeats = false;
    for arg in args {
        let argument = u8::try_from(arg.index())
            .ok()
            .filter(|&index| index <= 5)
            .ok_or_else(|| CompileError::ArgumentIndex { syscall: syscall.into(), index: arg.index() })?;
        repeats |= conditions.iter().any(|condition: &Condition| condition.argument == argument);
        let value = arg.value();
        let comparison = match arg.op() {
            LinuxSeccompOperator::ScmpCmpEq => Comparison::Equal(value),
            LinuxSeccompOperator::ScmpCmpNe => Comparison::NotEqual(value),
            LinuxSeccompOperator::ScmpCmpLt => Comparison::Less(value),
            LinuxSeccompOperator::ScmpCmpLe => Comparison::LessOrEqual(value),
            LinuxSeccompOperator::ScmpCmpGt => Comparison::Greater(value),
            LinuxSeccompOperator::ScmpCmpGe => Comparison::GreaterOrEqual(value),
            // OCI has the mask in `value`.
            LinuxSeccompOperator::ScmpCmpMaskedEq => {
                Comparison::Masked { mask: value, value: arg.value_two().unwrap_or(0) & value }
            }
        };
        conditions.push(Condition { argument, comparison });
    }
    if repeats {
        return Ok(conditions.into_iter().map(|condition| vec![condition]).collect());
    }
    Ok(vec![conditions])
}

/// Whether an action lets the call happen, now or by a tracer's decision.
fn permits(action: u32) -> bool {
    matches!(action & ret::ACTION, ret::ALLOW | ret::LOG | ret::TRACE)
}

fn table(abi: Abi, default: u32, rules: &[Stated<'_>]) -> Result<Table, CompileError> {
    let mut unconditional: BTreeMap<u32, u32> = BTreeMap::new();
    let mut conditional: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
    let mut newest = None;
    let mut count = 0;
    let mut add = |number: u32, conditions: Vec<Condition>, action: u32| {
        // Each takes instructions. A hostile profile multiplies names by conditions, so the limit
        // is already enforced here.
        count += 1;
        if count > MAX_INSTRUCTIONS {
            return Err(CompileError::TooLong { instructions: count });
        }
        conditional.entry(number).or_default().push(Rule { conditions, action });
        Ok(())
    };
    for &Stated { names, action, ref alternatives } in rules {
        let by_conditions = alternatives.iter().any(|conditions| !conditions.is_empty());
        for name in names {
            let number = abi.number(name);
            newest = newest.max(number);
            if action == default {
                continue;
            }
            if let Some(number) = number {
                if by_conditions {
                    for conditions in alternatives {
                        add(number, conditions.clone(), action)?;
                    }
                } else {
                    unconditional.entry(number).or_insert(action);
                }
            }
            if let Some((number, call)) = abi.multiplexer(name)
                && !(by_conditions && permits(action))
            {
                let condition = Condition { argument: 0, comparison: Comparison::Equal(call) };
                add(number, vec![condition], action)?;
            }
        }
    }

    let start = if abi == Abi::X32 { X32_BIT } else { 0 };
    let assigned = abi.assigned();
    let last = newest.max(assigned.last().copied()).unwrap_or(start);
    let decide = |number: u32| {
        if let Some(&action) = unconditional.get(&number) {
            return Decision::Always(action);
        }
        if let Some(rules) = conditional.get(&number) {
            return Decision::Depends(rules.clone(), default);
        }
        let is_newer = newest.is_some_and(|newest| number > newest) && !permits(default);
        let is_nothing = default & ret::ACTION == ret::ERRNO && assigned.binary_search(&number).is_err();
        Decision::Always(if is_newer || is_nothing { ret::ENOSYS } else { default })
    };
    let mut ranges: Vec<(u32, Decision)> = Vec::new();
    for number in start..=last.saturating_add(1) {
        let decision = decide(number);
        if ranges.last().is_none_or(|(_, before)| *before != decision) {
            ranges.push((number, decision));
        }
    }
    Ok(Table { abi, ranges })
}
