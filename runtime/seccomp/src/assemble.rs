//! From decisions to classic BPF: a binary search over the number, comparisons of arguments at its
//! leaves.
//!
//! ```text
//! load arch; one block per audit architecture, else kill
//!   load number; x86_64 only: x32's block from its bit on
//!     jge pivot ── right half
//!     └─ left half … down to a leaf: ret action, or rules one after another
//! ```
//! A search takes about eight comparisons where a list would take hundreds, and for calls that are
//! always allowed the kernel (since 5.11) evaluates the filter once and caches the result.

use crate::CompileError;
use crate::abi::{Abi, MAX_INSTRUCTIONS, X32_BIT};
use crate::lower::{Comparison, Condition, Decision, Lowered, Rule, Table, ret};

/// Codes of classic BPF: <linux/bpf_common.h>, Documentation/networking/filter.rst.
pub(crate) mod code {
    /// Load the word of `struct seccomp_data` at an offset.
    pub(crate) const LOAD: u16 = 0x20;
    pub(crate) const AND: u16 = 0x54;
    pub(crate) const JUMP: u16 = 0x05;
    pub(crate) const JUMP_IF_EQUAL: u16 = 0x15;
    pub(crate) const JUMP_IF_GREATER: u16 = 0x25;
    pub(crate) const JUMP_IF_GREATER_OR_EQUAL: u16 = 0x35;
    pub(crate) const RETURN: u16 = 0x06;
}

/// Offsets in `struct seccomp_data { int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6];
/// }`, seccomp(2).
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;

/// `struct sock_filter { __u16 code; __u8 jt; __u8 jf; __u32 k; }`, <linux/filter.h>.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    operand: u32,
}

fn plain(code: u16, operand: u32) -> Instruction {
    Instruction { code, if_true: 0, if_false: 0, operand }
}

pub(crate) fn assemble(lowered: &Lowered) -> Result<Vec<u8>, CompileError> {
    let mut program = vec![plain(code::LOAD, OFFSET_ARCH)];
    for table in lowered.tables.iter().filter(|table| table.abi != Abi::X32) {
        let mut block = vec![plain(code::LOAD, OFFSET_NUMBER)];
        let numbers = search(&table.ranges, table.abi);
        if table.abi == Abi::X86_64 {
            let x32 = lowered.tables.iter().find(|table| table.abi == Abi::X32).map_or_else(
                || vec![plain(code::RETURN, ret::ENOSYS)],
                |Table { abi, ranges }| search(ranges, *abi),
            );
            block.extend(branch(code::JUMP_IF_GREATER_OR_EQUAL, X32_BIT, x32, numbers));
        } else {
            block.extend(numbers);
        }
        let arch = plain(code::JUMP_IF_EQUAL, table.abi.audit_arch());
        program.extend(skip_unless(arch, block));
    }
    program.push(plain(code::RETURN, ret::KILL_PROCESS));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(CompileError::TooLong { instructions: program.len() });
    }
    Ok(program.iter().flat_map(bytes).collect())
}

/// `filter`, except that calls of this machine's own architecture with one of these numbers and
/// exactly these first arguments are let through.
pub(crate) fn letting_through(filter: &[u8], calls: &[(u32, &[u64])]) -> Result<Vec<u8>, CompileError> {
    let mut program = vec![plain(code::LOAD, OFFSET_ARCH)];
    let mut native = Vec::new();
    for (number, args) in calls {
        let conditions = (0_u8..)
            .zip(*args)
            .map(|(argument, value)| Condition { argument, comparison: Comparison::Equal(*value) });
        let rule = Rule { conditions: conditions.collect(), action: ret::ALLOW };
        native.push(plain(code::LOAD, OFFSET_NUMBER));
        native.extend(skip_unless(plain(code::JUMP_IF_EQUAL, *number), rule_block(&rule, Abi::NATIVE)));
    }
    program.extend(skip_unless(plain(code::JUMP_IF_EQUAL, Abi::NATIVE.audit_arch()), native));
    let instructions = program.len() + filter.len() / 8;
    if instructions > MAX_INSTRUCTIONS {
        return Err(CompileError::TooLong { instructions });
    }
    Ok(program.iter().flat_map(bytes).chain(filter.iter().copied()).collect())
}

fn bytes(instruction: &Instruction) -> [u8; 8] {
    let [c0, c1] = instruction.code.to_ne_bytes();
    let [k0, k1, k2, k3] = instruction.operand.to_ne_bytes();
    [c0, c1, instruction.if_true, instruction.if_false, k0, k1, k2, k3]
}

/// The block when the test holds, otherwise the code after it.
fn skip_unless(test: Instruction, block: Vec<Instruction>) -> Vec<Instruction> {
    let mut out = Vec::with_capacity(block.len() + 2);
    match u8::try_from(block.len()) {
        Ok(length) => out.push(Instruction { if_false: length, ..test }),
        // A conditional jump reaches 255 instructions; beyond that a plain one takes over, which
        // reaches any.
        Err(_) => {
            out.push(Instruction { if_true: 1, ..test });
            out.push(plain(code::JUMP, distance(block.len())));
        }
    }
    out.extend(block);
    out
}

/// One of two blocks that both return.
fn branch(test: u16, operand: u32, yes: Vec<Instruction>, no: Vec<Instruction>) -> Vec<Instruction> {
    let mut out = Vec::with_capacity(yes.len() + no.len() + 2);
    match u8::try_from(no.len()) {
        Ok(length) => out.push(Instruction { if_true: length, ..plain(test, operand) }),
        Err(_) => {
            out.push(Instruction { if_false: 1, ..plain(test, operand) });
            out.push(plain(code::JUMP, distance(no.len())));
        }
    }
    out.extend(no);
    out.extend(yes);
    out
}

/// A program that jumps further than this is refused for its length anyway.
fn distance(instructions: usize) -> u32 {
    u32::try_from(instructions).unwrap_or(u32::MAX)
}

/// The search over ranges, with the number in the accumulator. Every way through it returns.
fn search(ranges: &[(u32, Decision)], abi: Abi) -> Vec<Instruction> {
    match ranges {
        [] => vec![plain(code::RETURN, ret::KILL_PROCESS)],
        [(_, decision)] => leaf(decision, abi),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            // Both halves are non-empty with two ranges or more.
            let pivot = right.first().map_or(0, |(number, _)| *number);
            branch(code::JUMP_IF_GREATER_OR_EQUAL, pivot, search(right, abi), search(left, abi))
        }
    }
}

fn leaf(decision: &Decision, abi: Abi) -> Vec<Instruction> {
    match decision {
        Decision::Always(action) => vec![plain(code::RETURN, *action)],
        Decision::Depends(rules, otherwise) => {
            let mut out: Vec<Instruction> = rules.iter().flat_map(|rule| rule_block(rule, abi)).collect();
            out.push(plain(code::RETURN, *otherwise));
            out
        }
    }
}

/// Where a step of a condition continues.
#[derive(Clone, Copy)]
enum To {
    /// To the next step.
    Next,
    /// The condition holds: to the next condition, or to the action.
    Holds,
    /// It does not: to the next rule.
    Fails,
}

/// A step of a condition.
struct Step {
    instruction: Instruction,
    if_true: To,
    if_false: To,
}

fn load(offset: u32) -> Step {
    Step { instruction: plain(code::LOAD, offset), if_true: To::Next, if_false: To::Next }
}

fn test(code: u16, operand: u32, if_true: To, if_false: To) -> Step {
    Step { instruction: plain(code, operand), if_true, if_false }
}

/// All conditions of a rule, then its action; if one fails, the code after it.
fn rule_block(rule: &Rule, abi: Abi) -> Vec<Instruction> {
    let conditions: Vec<Vec<Step>> = rule.conditions.iter().map(|condition| steps(*condition, abi)).collect();
    let mut left: usize = conditions.iter().map(Vec::len).sum::<usize>();
    let mut out = Vec::with_capacity(left + 1);
    for condition in conditions {
        let mut here = condition.len();
        for step in condition {
            here -= 1;
            left -= 1;
            // At most six conditions of six steps each, an argument occurring once: every distance
            // fits.
            let to = |to: To| match to {
                To::Next => 0,
                To::Holds => u8::try_from(here).unwrap_or(u8::MAX),
                To::Fails => u8::try_from(left + 1).unwrap_or(u8::MAX),
            };
            let is_jump = matches!(
                step.instruction.code,
                code::JUMP_IF_EQUAL | code::JUMP_IF_GREATER | code::JUMP_IF_GREATER_OR_EQUAL
            );
            out.push(if is_jump {
                Instruction { if_true: to(step.if_true), if_false: to(step.if_false), ..step.instruction }
            } else {
                step.instruction
            });
        }
    }
    out.push(plain(code::RETURN, rule.action));
    out
}

/// A 64-bit comparison in 32-bit steps, high half first.
fn steps(condition: Condition, abi: Abi) -> Vec<Step> {
    use To::{Fails, Holds, Next};
    use code::{JUMP_IF_EQUAL, JUMP_IF_GREATER, JUMP_IF_GREATER_OR_EQUAL};
    let offset = OFFSET_ARGUMENTS + 8 * u32::from(condition.argument);
    // Both machines are little-endian.
    let (low_at, high_at) = (offset, offset + 4);
    let halves = |value: u64| {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
    };
    let wide = abi.has_wide_arguments();
    let mut out = Vec::with_capacity(6);
    // What the high half decides alone: above, below, or nothing.
    let ordered = |out: &mut Vec<Step>, high: u32, above: To, below: To| {
        if wide {
            out.push(load(high_at));
            out.push(test(JUMP_IF_GREATER, high, above, Next));
            out.push(test(JUMP_IF_EQUAL, high, Next, below));
        }
        out.push(load(low_at));
    };
    match condition.comparison {
        Comparison::Equal(value) => {
            let (low, high) = halves(value);
            if wide {
                out.push(load(high_at));
                out.push(test(JUMP_IF_EQUAL, high, Next, Fails));
            }
            out.push(load(low_at));
            out.push(test(JUMP_IF_EQUAL, low, Holds, Fails));
        }
        Comparison::NotEqual(value) => {
            let (low, high) = halves(value);
            if wide {
                out.push(load(high_at));
                out.push(test(JUMP_IF_EQUAL, high, Next, Holds));
            }
            out.push(load(low_at));
            out.push(test(JUMP_IF_EQUAL, low, Fails, Holds));
        }
        Comparison::Greater(value) => {
            let (low, high) = halves(value);
            ordered(&mut out, high, Holds, Fails);
            out.push(test(JUMP_IF_GREATER, low, Holds, Fails));
        }
        Comparison::GreaterOrEqual(value) => {
            let (low, high) = halves(value);
            ordered(&mut out, high, Holds, Fails);
            out.push(test(JUMP_IF_GREATER_OR_EQUAL, low, Holds, Fails));
        }
        Comparison::Less(value) => {
            let (low, high) = halves(value);
            ordered(&mut out, high, Fails, Holds);
            out.push(test(JUMP_IF_GREATER_OR_EQUAL, low, Fails, Holds));
        }
        Comparison::LessOrEqual(value) => {
            let (low, high) = halves(value);
            ordered(&mut out, high, Fails, Holds);
            out.push(test(JUMP_IF_GREATER, low, Fails, Holds));
        }
        Comparison::Masked { mask, value } => {
            let ((mask_low, mask_high), (low, high)) = (halves(mask), halves(value));
            if wide && mask_high != 0 {
                out.push(load(high_at));
                out.push(Step { instruction: plain(code::AND, mask_high), if_true: Next, if_false: Next });
                out.push(test(JUMP_IF_EQUAL, high, Next, Fails));
            }
            out.push(load(low_at));
            out.push(Step { instruction: plain(code::AND, mask_low), if_true: Next, if_false: Next });
            out.push(test(JUMP_IF_EQUAL, low, Holds, Fails));
        }
    }
    out
}
