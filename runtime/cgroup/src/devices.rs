//! The devices that the processes of a cgroup may open and create: an allow list, empty at first.
//!
//! On v1 it is written into `devices.deny` and `devices.allow`
//! (Documentation/admin-guide/cgroup-v1/devices.rst); on v2 it becomes an eBPF program that is
//! attached to the cgroup. There are no deny rules: a list that is read as "deny these" allows
//! everything it forgot (GHSA-g54h-m393-cpwq).

use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::AsFd;

use berth_sys::bpf::{self, Instruction};

use crate::cgroup::Place;
use crate::{Cgroup, Direct, Error, control_file};

/// Rules taken for one cgroup. The verifier allows a program of 1 M instructions and a jump of 32
/// K; a privileged container needs no rules, and one that names a thousand devices is a mistake or
/// an attack.
const MAX_RULES: usize = 1024;

/// The highest device numbers: 12 and 20 bits, <linux/kdev_t.h>.
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xf_ffff;

/// The kind of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A character device.
    Char,
    /// A block device.
    Block,
}

/// What a container may do with a device: OCI runtime-spec "Allowed Device list", `access`, a
/// subset of `rwm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Open for reading.
    pub read: bool,
    /// Open for writing.
    pub write: bool,
    /// Create a node for it, mknod(2).
    pub mknod: bool,
}

impl Access {
    /// Everything.
    pub const ALL: Self = Self { read: true, write: true, mknod: true };
    /// Only creating the node.
    pub const MKNOD: Self = Self { read: false, write: false, mknod: true };

    /// From CRI's `Device.permissions`: letters of `rwm`, each at most once, at least one. Nothing
    /// for any other text.
    #[must_use]
    pub fn parse(letters: &str) -> Option<Self> {
        let mut access = Self { read: false, write: false, mknod: false };
        for letter in letters.chars() {
            let slot = match letter {
                'r' => &mut access.read,
                'w' => &mut access.write,
                'm' => &mut access.mknod,
                _ => return None,
            };
            if std::mem::replace(slot, true) {
                return None;
            }
        }
        (access.read || access.write || access.mknod).then_some(access)
    }
}

/// Allows devices. No major or minor number means any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRule {
    /// Character or block.
    pub kind: DeviceKind,
    /// The major number, at most 4095.
    pub major: Option<u32>,
    /// The minor number, at most 1048575.
    pub minor: Option<u32>,
    /// What is allowed.
    pub access: Access,
}

/// What a cgroup may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DevicePolicy {
    /// Every device, for privileged containers.
    All,
    /// What any of the rules allows.
    Only(Vec<DeviceRule>),
}

/// The devices that every container may use: those that the OCI runtime-spec ("Default Devices")
/// puts into its /dev, pseudo-terminals, and creating (not opening) any node, which package
/// managers and image builders do. Not 5:1: a container's /dev/console is a pseudo-terminal, and
/// that device is the console of the host.
#[must_use]
pub fn default_devices() -> Vec<DeviceRule> {
    let any = |kind| DeviceRule { kind, major: None, minor: None, access: Access::MKNOD };
    let char =
        |major, minor| DeviceRule { kind: DeviceKind::Char, major: Some(major), minor, access: Access::ALL };
    vec![
        any(DeviceKind::Char),
        any(DeviceKind::Block),
        char(1, Some(3)), // /dev/null
        char(1, Some(5)), // /dev/zero
        char(1, Some(7)), // /dev/full
        char(1, Some(8)), // /dev/random
        char(1, Some(9)), // /dev/urandom
        char(5, Some(0)), // /dev/tty
        char(5, Some(2)), // /dev/ptmx
        char(136, None),  // /dev/pts/*: Unix98 terminals
    ]
}

impl Cgroup {
    /// Applies the policy, replacing an earlier one, before a container sees the cgroup. On v1 the
    /// cgroup must have no sub-cgroups, and there is a moment at which nothing is allowed; on v2
    /// there is a moment at which only what both policies allow is.
    ///
    /// # Errors
    /// [`Error::InvalidLimit`] for numbers that no device has, or too many rules;
    /// [`Error::ControllerMissing`] when v1's devices controller is not mounted and the policy is
    /// not [`DevicePolicy::All`]; [`Error::Write`] or [`Error::DeviceFilter`] when the kernel
    /// refuses, on v1 also because the parent does not allow it.
    pub fn set_devices(&self, policy: &DevicePolicy) -> Result<(), Error> {
        if let DevicePolicy::Only(rules) = policy {
            check(rules)?;
        }
        match &self.place {
            Place::Legacy(_) => self.set_devices_v1(policy),
            Place::Unified(dir) => {
                let fail = |source| Error::DeviceFilter { path: dir.clone(), source };
                let cgroup = File::open(dir).map_err(fail)?;
                let earlier = bpf::attached_device_filters(cgroup.as_fd()).map_err(fail)?;
                if let DevicePolicy::Only(rules) = policy {
                    let filter = bpf::load_device_filter("berth_devices", &program(rules)).map_err(fail)?;
                    bpf::attach_device_filter(cgroup.as_fd(), filter.as_fd()).map_err(fail)?;
                }
                for filter in earlier {
                    bpf::detach_device_filter(cgroup.as_fd(), filter.as_fd()).map_err(fail)?;
                }
                Ok(())
            }
        }
    }

    fn set_devices_v1(&self, policy: &DevicePolicy) -> Result<(), Error> {
        let Some(dir) = self.dir_of("devices") else {
            return match policy {
                DevicePolicy::All => Ok(()),
                DevicePolicy::Only(_) => Err(Error::ControllerMissing {
                    limit: "devices",
                    controller: "devices",
                    path: self.main_dir(),
                }),
            };
        };
        match policy {
            DevicePolicy::All => control_file::write(&Direct, &dir.join("devices.allow"), "a"),
            DevicePolicy::Only(rules) => {
                control_file::write(&Direct, &dir.join("devices.deny"), "a")?;
                let path = dir.join("devices.allow");
                let fail =
                    |value: &str, source| Error::Write { path: path.clone(), value: value.into(), source };
                let mut file =
                    control_file::open_for_writing(&Direct, &path).map_err(|source| fail("", source))?;
                for rule in rules {
                    let line = v1_line(rule);
                    control_file::write_to(&mut file, &line).map_err(|source| fail(&line, source))?;
                }
                Ok(())
            }
        }
    }
}

fn check(rules: &[DeviceRule]) -> Result<(), Error> {
    let invalid = |value, reason| Err(Error::InvalidLimit { limit: "devices", value, reason });
    if rules.len() > MAX_RULES {
        return invalid(rules.len().to_string(), "more than 1024 rules");
    }
    for rule in rules {
        if rule.major.is_some_and(|major| major > MAX_MAJOR)
            || rule.minor.is_some_and(|minor| minor > MAX_MINOR)
        {
            return invalid(v1_line(rule), "invalid device number");
        }
    }
    Ok(())
}

/// `c 136:* rwm`
fn v1_line(rule: &DeviceRule) -> String {
    let mut line = String::from(match rule.kind {
        DeviceKind::Char => "c ",
        DeviceKind::Block => "b ",
    });
    let number = |number: Option<u32>| number.map_or_else(|| "*".into(), |number| number.to_string());
    // Writing to a string cannot fail.
    let _ = write!(line, "{}:{} ", number(rule.major), number(rule.minor));
    for (has, letter) in [(rule.access.read, 'r'), (rule.access.write, 'w'), (rule.access.mknod, 'm')] {
        if has {
            line.push(letter);
        }
    }
    line
}

/// Codes of eBPF instructions: Documentation/bpf/standardization/instruction-set.rst.
mod code {
    pub(super) const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
    pub(super) const MOVE: u8 = 0xbf; // dst = src
    pub(super) const MOVE_CONSTANT: u8 = 0xb7; // dst = immediate
    pub(super) const AND_CONSTANT: u8 = 0x57; // dst &= immediate
    pub(super) const SHIFT_RIGHT: u8 = 0x77; // dst >>= immediate
    pub(super) const JUMP_UNLESS_EQUAL: u8 = 0x55; // if dst != immediate goto offset
    pub(super) const EXIT: u8 = 0x95; // return r0
}

/// Where the program keeps things. Register 1 is the context at first.
mod register {
    pub(super) const RESULT: u8 = 0;
    pub(super) const CONTEXT: u8 = 1;
    pub(super) const SCRATCH: u8 = 1;
    pub(super) const KIND: u8 = 2;
    pub(super) const ACCESS: u8 = 3;
    pub(super) const MAJOR: u8 = 4;
    pub(super) const MINOR: u8 = 5;
}

/// Values of <linux/bpf.h>: `BPF_DEVCG_DEV_*` and `BPF_DEVCG_ACC_*`.
const KIND_BLOCK: i32 = 1;
const KIND_CHAR: i32 = 2;
const ACCESS_MKNOD: i32 = 1;
const ACCESS_READ: i32 = 2;
const ACCESS_WRITE: i32 = 4;

/// The filter: one block per rule, each of which answers 1 or goes on to the next; at the end 0.
///
/// ```c
/// struct bpf_cgroup_dev_ctx { __u32 access_type /* access << 16 | kind */, major, minor; };
/// ```
fn program(rules: &[DeviceRule]) -> Vec<Instruction> {
    use register::{ACCESS, CONTEXT, KIND, MAJOR, MINOR, RESULT, SCRATCH};
    let op = |code, destination: u8, source: u8, offset, immediate| Instruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    };
    let mut out = vec![
        op(code::LOAD_WORD, KIND, CONTEXT, 0, 0),
        op(code::LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        op(code::LOAD_WORD, MINOR, CONTEXT, 8, 0),
        op(code::MOVE, ACCESS, KIND, 0, 0),
        op(code::SHIFT_RIGHT, ACCESS, 0, 0, 16),
        op(code::AND_CONSTANT, KIND, 0, 0, 0xffff),
    ];
    for rule in rules {
        let kind = match rule.kind {
            DeviceKind::Char => KIND_CHAR,
            DeviceKind::Block => KIND_BLOCK,
        };
        let mut allowed = 0;
        for (has, bit) in [
            (rule.access.read, ACCESS_READ),
            (rule.access.write, ACCESS_WRITE),
            (rule.access.mknod, ACCESS_MKNOD),
        ] {
            if has {
                allowed |= bit;
            }
        }
        let mut block = vec![
            op(code::JUMP_UNLESS_EQUAL, KIND, 0, 0, kind),
            // An access that asks for more than the rule allows must not match.
            op(code::MOVE, SCRATCH, ACCESS, 0, 0),
            op(code::AND_CONSTANT, SCRATCH, 0, 0, !allowed),
            op(code::JUMP_UNLESS_EQUAL, SCRATCH, 0, 0, 0),
        ];
        for (number, at) in [(rule.major, MAJOR), (rule.minor, MINOR)] {
            if let Some(number) = number.and_then(|number| i32::try_from(number).ok()) {
                block.push(op(code::JUMP_UNLESS_EQUAL, at, 0, 0, number));
            }
        }
        block.push(op(code::MOVE_CONSTANT, RESULT, 0, 0, 1));
        block.push(op(code::EXIT, 0, 0, 0, 0));
        // Jumps count from the instruction after them; all go to the end of the block, which is a
        // few instructions long.
        for (left, instruction) in (0_i16..).zip(block.iter_mut().rev()) {
            if instruction.code == code::JUMP_UNLESS_EQUAL {
                instruction.offset = left;
            }
        }
        out.extend(block);
    }
    out.push(op(code::MOVE_CONSTANT, RESULT, 0, 0, 0));
    out.push(op(code::EXIT, 0, 0, 0, 0));
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the rules mean, stated directly.
    fn allows(rules: &[DeviceRule], kind: DeviceKind, access: i32, major: u32, minor: u32) -> bool {
        rules.iter().any(|rule| {
            rule.kind == kind
                && rule.major.is_none_or(|number| number == major)
                && rule.minor.is_none_or(|number| number == minor)
                && (rule.access.read || access & ACCESS_READ == 0)
                && (rule.access.write || access & ACCESS_WRITE == 0)
                && (rule.access.mknod || access & ACCESS_MKNOD == 0)
        })
    }

    /// Runs a program as the kernel would.
    fn run(program: &[Instruction], context: [u32; 3]) -> u64 {
        let mut registers = [0_u64; 11];
        let mut at = 0_usize;
        loop {
            let instruction = program[at];
            let (destination, source) =
                (usize::from(instruction.registers & 0xf), usize::from(instruction.registers >> 4));
            let immediate = i64::from(instruction.immediate).cast_unsigned();
            at += 1;
            match instruction.code {
                code::LOAD_WORD => {
                    registers[destination] =
                        u64::from(context[usize::try_from(instruction.offset).unwrap() / 4]);
                }
                code::MOVE => registers[destination] = registers[source],
                code::MOVE_CONSTANT => registers[destination] = immediate,
                code::AND_CONSTANT => registers[destination] &= immediate,
                code::SHIFT_RIGHT => registers[destination] >>= immediate,
                code::JUMP_UNLESS_EQUAL => {
                    if registers[destination] != immediate {
                        at += usize::try_from(instruction.offset).unwrap();
                    }
                }
                code::EXIT => return registers[0],
                other => panic!("no such instruction: {other:#x}"),
            }
        }
    }

    fn rules() -> impl Strategy<Value = Vec<DeviceRule>> {
        let number = || prop::option::of(0_u32..4);
        let rule = (any::<bool>(), number(), number(), 1_u8..8).prop_map(|(char, major, minor, access)| {
            DeviceRule {
                kind: if char { DeviceKind::Char } else { DeviceKind::Block },
                major,
                minor,
                access: Access { read: access & 1 != 0, write: access & 2 != 0, mknod: access & 4 != 0 },
            }
        });
        prop::collection::vec(rule, 0..8)
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_rules_say(
            rules in rules(), char in any::<bool>(), access in 1_i32..8, major in 0_u32..5, minor in 0_u32..5
        ) {
            let (kind, number) = if char { (DeviceKind::Char, KIND_CHAR) } else { (DeviceKind::Block, KIND_BLOCK) };
            let context = [u32::try_from(access << 16 | number).unwrap(), major, minor];
            prop_assert_eq!(run(&program(&rules), context) == 1, allows(&rules, kind, access, major, minor));
        }
    }

    #[test]
    fn no_rules_allow_nothing() {
        let context = [u32::try_from(ACCESS_READ << 16 | KIND_CHAR).unwrap(), 1, 3];
        assert_eq!(run(&program(&[]), context), 0);
    }

    #[test]
    fn permissions_are_letters_each_once() {
        assert_eq!(Access::parse("rwm"), Some(Access::ALL));
        assert_eq!(Access::parse("m"), Some(Access::MKNOD));
        for bad in ["", "rr", "x", "rw ", "R", "rwmr", "r\0"] {
            assert_eq!(Access::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn lines_are_in_the_kernels_form() {
        let lines: Vec<String> = default_devices().iter().map(v1_line).collect();
        assert!(lines.contains(&"c *:* m".to_owned()));
        assert!(lines.contains(&"b *:* m".to_owned()));
        assert!(lines.contains(&"c 136:* rwm".to_owned()));
        assert!(lines.contains(&"c 1:3 rwm".to_owned()));
    }

    #[test]
    fn impossible_numbers_and_endless_lists_are_refused() {
        let rule = DeviceRule { kind: DeviceKind::Char, major: Some(4096), minor: None, access: Access::ALL };
        assert!(check(&[rule]).is_err());
        assert!(check(&[DeviceRule { major: Some(1), minor: Some(1 << 20), ..rule }]).is_err());
        assert!(check(&vec![DeviceRule { major: Some(1), ..rule }; MAX_RULES + 1]).is_err());
        assert!(check(&default_devices()).is_ok());
    }

    #[test]
    fn the_kernel_accepts_the_longest_program() {
        let rule = DeviceRule {
            kind: DeviceKind::Char,
            major: Some(4095),
            minor: Some(MAX_MINOR),
            access: Access::ALL,
        };
        bpf::load_device_filter("berth_test", &program(&vec![rule; MAX_RULES])).unwrap();
    }
}
