//! The filter for a process that is about to enter a container where other processes live.
//!
//! What such a process must not do has to be forbidden from its birth on, because others in the
//! container may take it over. Where the program's own filter forbids calls that entering needs,
//! this filter is in force until the process has entered: the program's, except for exactly those
//! calls.

use crate::abi::Abi;
use crate::{CompileError, Filter, assemble};

impl Filter {
    /// The filter for a process that enters by making `calls` (names, and their first arguments)
    /// and at the end `last`, which installs the program's own filter. Empty when that filter lets
    /// all of `calls` through itself.
    ///
    /// # Errors
    /// [`CompileError::TooLong`].
    pub fn for_entering(
        &self,
        calls: &[(&str, &[u64])],
        last: (&str, &[u64]),
    ) -> Result<Vec<u8>, CompileError> {
        if calls.iter().all(|(name, args)| self.admits(name, args)) {
            return Ok(Vec::new());
        }
        let numbered: Vec<(u32, &[u64])> = calls
            .iter()
            .chain([&last])
            .filter_map(|(name, args)| Some((Abi::NATIVE.number(name)?, *args)))
            .collect();
        assemble::letting_through(&self.bytes, &numbered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::{Call, run};
    use crate::lower::ret;
    use crate::{Circumstances, compile, parse_profile};

    const CALLS: [(&str, &[u64]); 4] =
        [("clone", &[0x8000]), ("read", &[]), ("ioctl", &[0, 0x540e]), ("execve", &[])];
    const LAST: (&str, &[u64]) = ("seccomp", &[1]);

    fn filter(text: &str) -> Filter {
        compile(&parse_profile(text.as_bytes(), &Circumstances::default()).unwrap()).unwrap()
    }

    #[test]
    fn a_filter_that_admits_the_way_needs_no_other() {
        let all = filter(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#);
        assert_eq!(all.for_entering(&CALLS, LAST), Ok(Vec::new()));
    }

    #[test]
    fn only_the_calls_of_the_way_are_let_through() {
        for text in [
            r#"{"defaultAction": "SCMP_ACT_KILL_PROCESS"}"#,
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"action": "SCMP_ACT_ERRNO", "names": ["clone", "seccomp", "ptrace", "ioctl"]}]}"#,
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": ["read", "execve"]}]}"#,
        ] {
            let own = filter(text);
            let entering = own.for_entering(&CALLS, LAST).unwrap();
            assert!(!entering.is_empty());
            let through = |name: &str, args: &[u64]| {
                CALLS.iter().chain([&LAST]).any(|(call, first)| *call == name && args.starts_with(first))
            };
            for abi in [Abi::X86_64, Abi::X86] {
                for name in ["clone", "read", "ioctl", "execve", "seccomp", "ptrace", "mount", "write"] {
                    for args in [[0, 0], [1, 0], [0x8000, 0], [0x8000, 9], [0, 0x540e], [0x1_0000_8000, 0]] {
                        let call = Call::new(abi, name, &args);
                        let expected = if abi == Abi::NATIVE && through(name, &args) {
                            Some(ret::ALLOW)
                        } else {
                            run(&own.bytes, &call)
                        };
                        assert_eq!(run(&entering, &call), expected, "{abi:?} {name} {args:x?}: {text}");
                    }
                }
            }
        }
    }
}
