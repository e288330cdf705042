//! What a filter answers to a call, evaluated as the kernel does: for code that has to make calls
//! under a filter before the program does.

use crate::Filter;
use crate::abi::Abi;
use crate::assemble::code;
use crate::lower::ret;

/// A system call as a filter sees it: `struct seccomp_data`, seccomp(2), without the instruction
/// pointer, which no filter here looks at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) number: u32,
    pub(crate) arch: u32,
    pub(crate) args: [u64; 6],
}

impl Call {
    /// The word at an offset of `struct seccomp_data`.
    fn word(&self, offset: u32) -> Option<u32> {
        let [number, arch] = [u64::from(self.number), u64::from(self.arch)];
        let [a, b, c, d, e, f] = self.args;
        let halves = [number | arch << 32, 0, a, b, c, d, e, f];
        let place = usize::try_from(offset).ok().filter(|place| place % 4 == 0)?;
        let half = halves.get(place / 8)?.to_le_bytes();
        half.get(place % 8..place % 8 + 4)?.try_into().ok().map(u32::from_le_bytes)
    }
}

/// Runs a filter. `None` for a filter that the kernel's checker would have refused.
pub(crate) fn run(filter: &[u8], call: &Call) -> Option<u32> {
    let mut accumulator = 0_u32;
    let mut rest = filter;
    loop {
        let (instruction, after) = rest.split_first_chunk::<8>()?;
        let [c0, c1, jt, jf, k0, k1, k2, k3] = *instruction;
        let operand = u32::from_ne_bytes([k0, k1, k2, k3]);
        let choose = |holds: bool| u32::from(if holds { jt } else { jf });
        let jump = match u16::from_ne_bytes([c0, c1]) {
            code::LOAD => {
                accumulator = call.word(operand)?;
                0
            }
            code::AND => {
                accumulator &= operand;
                0
            }
            code::JUMP => operand,
            code::JUMP_IF_EQUAL => choose(accumulator == operand),
            code::JUMP_IF_GREATER => choose(accumulator > operand),
            code::JUMP_IF_GREATER_OR_EQUAL => choose(accumulator >= operand),
            code::RETURN => return Some(operand),
            _ => return None,
        };
        // Jumps lead forward only.
        rest = after.get(usize::try_from(jump).ok()?.checked_mul(8)?..)?;
    }
}

impl Filter {
    /// Whether the filter lets a program of this machine's own architecture make a call with these
    /// first arguments; those not given are 0. A name that the architecture lacks cannot be called,
    /// and counts as let through.
    #[must_use]
    pub fn admits(&self, name: &str, args: &[u64]) -> bool {
        let Some(number) = Abi::NATIVE.number(name) else { return true };
        let mut all = [0; 6];
        for (place, value) in all.iter_mut().zip(args) {
            *place = *value;
        }
        let call = Call { number, arch: Abi::NATIVE.audit_arch(), args: all };
        matches!(run(&self.bytes, &call), Some(ret::ALLOW | ret::LOG))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Circumstances, compile, parse_profile};

    impl Call {
        pub(crate) fn new(abi: Abi, name: &str, args: &[u64]) -> Self {
            let number = abi.number(name).unwrap_or_else(|| panic!("{name} on {abi:?}"));
            let mut all = [0; 6];
            all[..args.len()].copy_from_slice(args);
            Self { number, arch: abi.audit_arch(), args: all }
        }
    }

    #[test]
    fn calls_are_admitted_by_number_and_arguments() {
        let text = br#"{"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [
            {"names": ["read", "execve"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["write"], "action": "SCMP_ACT_LOG"},
            {"names": ["close"], "action": "SCMP_ACT_TRAP"},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 1, "value": 7, "op": "SCMP_CMP_EQ"}]}]}"#;
        let filter = compile(&parse_profile(text, &Circumstances::default()).unwrap()).unwrap();
        for (name, args, admitted) in [
            ("read", &[][..], true),
            ("execve", &[1, 2, 3, 4, 5, 6, 7], true),
            ("write", &[], true),
            ("close", &[], false),
            ("mmap", &[], false),
            ("clone", &[0x8000], true),
            ("clone", &[0x1000_0000], false),
            ("ioctl", &[0, 7], true),
            ("ioctl", &[7, 0], false),
            ("no such call", &[], true),
        ] {
            assert_eq!(filter.admits(name, args), admitted, "{name} {args:?}");
        }
    }

    #[test]
    fn what_is_no_filter_admits_nothing() {
        let text = br#"{"defaultAction": "SCMP_ACT_KILL_PROCESS",
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}"#;
        let whole = compile(&parse_profile(text, &Circumstances::default()).unwrap()).unwrap();
        assert!(whole.admits("read", &[]) && !whole.admits("write", &[]));
        for end in 0..whole.bytes.len() {
            let torn = Filter { bytes: whole.bytes[..end].to_vec(), flags: 0 };
            assert!(!torn.admits("write", &[]), "{end}");
            assert!(end >= 8 || !torn.admits("read", &[]), "{end}");
        }
        let load = |offset: u32| [&code::LOAD.to_ne_bytes()[..], &[0, 0], &offset.to_ne_bytes()].concat();
        let jump = [&code::JUMP.to_ne_bytes()[..], &[0, 0], &u32::MAX.to_ne_bytes()].concat();
        for bytes in [load(2), load(64), load(u32::MAX), jump, vec![0xff; 8]] {
            assert!(!Filter { bytes, flags: 0 }.admits("read", &[]));
        }
    }
}
