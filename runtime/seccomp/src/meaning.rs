//! For tests: the meaning of a profile for a call, computed in the plainest way, to check filters
//! against.

use std::cell::RefCell;
use std::collections::HashMap;

use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompOperator, LinuxSyscall};

use crate::abi::{Abi, X32_BIT};
use crate::evaluate::Call;

/// The answer of a filter that the kernel accepts.
pub(crate) fn run(filter: &[u8], call: &Call) -> u32 {
    crate::evaluate::run(filter, call).expect("the kernel would have refused this filter")
}

thread_local! {
    /// Looking up names is slow in a build without optimization.
    static NUMBERS: RefCell<HashMap<(Abi, String), Option<u32>>> = RefCell::default();
}

fn number(abi: Abi, name: &str) -> Option<u32> {
    NUMBERS.with_borrow_mut(|known| *known.entry((abi, name.to_owned())).or_insert_with(|| abi.number(name)))
}

/// What a profile means for a call: the rules of [`crate::compile`] as code, one by one, without
/// tables.
pub(crate) fn meaning(profile: &LinuxSeccomp, call: &Call) -> u32 {
    let wanted: Vec<Arch> = profile.architectures().clone().unwrap_or_default();
    let abi = match (call.arch, call.number >= X32_BIT) {
        (0xc000_003e, true) if !wanted.contains(&Arch::ScmpArchX32) => return 0x5_0026,
        (0xc000_003e, true) => Abi::X32,
        (0xc000_003e, false) => Abi::X86_64,
        (0x4000_0003, _) if wanted.contains(&Arch::ScmpArchX86) => Abi::X86,
        _ => return 0x8000_0000,
    };
    let default = profile.default_action().as_u32(profile.default_errno_ret());
    let rules: Vec<&LinuxSyscall> = profile.syscalls().iter().flatten().collect();
    let action = |rule: &LinuxSyscall| rule.action().as_u32(rule.errno_ret());
    let speaking = || rules.iter().filter(|rule| action(rule) != default);
    let has_args = |rule: &LinuxSyscall| rule.args().as_ref().is_some_and(|args| !args.is_empty());
    let names = |rule: &LinuxSyscall| rule.names().iter().any(|name| number(abi, name) == Some(call.number));

    if let Some(rule) = speaking().find(|rule| names(rule) && !has_args(rule)) {
        return action(rule);
    }
    let mut spoken_of = false;
    for rule in speaking() {
        for name in rule.names() {
            if number(abi, name) == Some(call.number) {
                spoken_of = true;
                if holds(rule, abi, call) {
                    return action(rule);
                }
            }
            let lets = matches!(
                rule.action(),
                LinuxSeccompAction::ScmpActAllow
                    | LinuxSeccompAction::ScmpActLog
                    | LinuxSeccompAction::ScmpActTrace
            );
            if let Some((number, first)) = abi.multiplexer(name)
                && !(has_args(rule) && lets)
                && number == call.number
            {
                spoken_of = true;
                if call.args[0] & 0xffff_ffff == first {
                    return action(rule);
                }
            }
        }
    }
    let newest = rules.iter().flat_map(|rule| rule.names()).filter_map(|name| number(abi, name)).max();
    let refuses = !matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog | LinuxSeccompAction::ScmpActTrace
    );
    let is_errno = profile.default_action() == LinuxSeccompAction::ScmpActErrno;
    let is_newer = refuses && newest.is_some_and(|newest| call.number > newest);
    let is_nothing = is_errno && !abi.assigned().contains(&call.number);
    if !spoken_of && (is_newer || is_nothing) { 0x5_0026 } else { default }
}

fn holds(rule: &LinuxSyscall, abi: Abi, call: &Call) -> bool {
    let args = rule.args().clone().unwrap_or_default();
    let cut = |value: u64| if abi == Abi::X86_64 { value } else { value & 0xffff_ffff };
    let mut each = args.iter().map(|arg| {
        let (is, value) = (cut(call.args[arg.index()]), cut(arg.value()));
        match arg.op() {
            LinuxSeccompOperator::ScmpCmpEq => is == value,
            LinuxSeccompOperator::ScmpCmpNe => is != value,
            LinuxSeccompOperator::ScmpCmpLt => is < value,
            LinuxSeccompOperator::ScmpCmpLe => is <= value,
            LinuxSeccompOperator::ScmpCmpGt => is > value,
            LinuxSeccompOperator::ScmpCmpGe => is >= value,
            LinuxSeccompOperator::ScmpCmpMaskedEq => is & value == cut(arg.value_two().unwrap_or(0)) & value,
        }
    });
    let repeats = args.iter().enumerate().any(|(i, a)| args[..i].iter().any(|b| a.index() == b.index()));
    if repeats { each.any(|holds| holds) } else { each.all(|holds| holds) }
}
