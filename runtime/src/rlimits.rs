//! The resource limits that containers start with: getrlimit(2).
//!
//! The CRI has no field for them. Unset ones would be the daemon's own, and so depend on its unit
//! file or on the shell that it was started from, so all are set, to what programs find on nodes
//! today. `[container.rlimits]` changes those that cgroups do not limit. The shim lowers what the
//! kernel does not permit, and reports that.

use std::collections::BTreeMap;

use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType};
use serde::{Deserialize, Serialize};

/// `RLIM_INFINITY` of <asm-generic/resource.h>.
const UNLIMITED: u64 = u64::MAX;

/// [`UNLIMITED`] in the configuration.
const UNLIMITED_WORD: &str = "unlimited";

/// The largest `nofile`: the kernel counts descriptors in an `int`.
const MOST_FILES: u64 = i32::MAX.unsigned_abs() as u64;

/// The configurable limits, by name: soft and hard.
///
/// Open files: systemd's default for services, containerd and CRI-O among them. A higher soft limit
/// breaks programs that use select(2) or close every possible descriptor; programs that need more
/// raise it up to the hard one. Processes and core dumps: as in the unit files of both runtimes.
/// The number of processes is counted per user on the whole node, so that containers with the same
/// user would starve each other; `pids.max` limits them instead. The rest: the kernel's defaults.
const CONFIGURABLE: [(&str, PosixRlimitType, u64, u64); 9] = [
    ("core", PosixRlimitType::RlimitCore, UNLIMITED, UNLIMITED),
    ("memlock", PosixRlimitType::RlimitMemlock, 8 << 20, 8 << 20),
    ("msgqueue", PosixRlimitType::RlimitMsgqueue, 819_200, 819_200),
    ("nice", PosixRlimitType::RlimitNice, 0, 0),
    ("nofile", PosixRlimitType::RlimitNofile, 1024, 524_288),
    ("nproc", PosixRlimitType::RlimitNproc, UNLIMITED, UNLIMITED),
    ("rtprio", PosixRlimitType::RlimitRtprio, 0, 0),
    ("rttime", PosixRlimitType::RlimitRttime, UNLIMITED, UNLIMITED),
    ("stack", PosixRlimitType::RlimitStack, 8 << 20, UNLIMITED),
];

/// Limits that are up to cgroups, or that would affect the shim's own work in the container's
/// process. `sigpending` is in neither list: the kernel derives it from the machine's memory, so it
/// is the same however the daemon is started.
const NEVER_LIMITED: [PosixRlimitType; 6] = [
    PosixRlimitType::RlimitAs,
    PosixRlimitType::RlimitCpu,
    PosixRlimitType::RlimitData,
    PosixRlimitType::RlimitFsize,
    PosixRlimitType::RlimitLocks,
    PosixRlimitType::RlimitRss,
];

/// A limit as written: a number, or a text of the form `SOFT:HARD`, where each is a number or
/// `unlimited`; a single value sets both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum WrittenRlimit {
    /// Both limits.
    Number(u64),
    /// As systemd's `LimitNOFILE=`.
    Text(String),
}

/// Limits by name, as written.
pub type WrittenRlimits = BTreeMap<String, WrittenRlimit>;

/// The limits of every container: the defaults, overridden by the configuration.
///
/// # Errors
/// A sentence for each mistake.
pub fn check(written: &WrittenRlimits) -> Result<Vec<PosixRlimit>, Vec<String>> {
    let mut mistakes = Vec::new();
    for name in written.keys() {
        if !CONFIGURABLE.iter().any(|(known, ..)| known == name) {
            let names: Vec<&str> = CONFIGURABLE.iter().map(|(name, ..)| *name).collect();
            mistakes.push(format!("{name:?} is not one of {}", names.join(", ")));
        }
    }
    let mut limits = Vec::new();
    for (name, kind, soft, hard) in CONFIGURABLE {
        match written.get(name).map_or(Ok((soft, hard)), read) {
            Ok((soft, hard)) if kind == PosixRlimitType::RlimitNofile && soft.max(hard) > MOST_FILES => {
                mistakes.push(format!("{name}: {} exceeds {MOST_FILES}", soft.max(hard)));
            }
            Ok((soft, hard)) => limits.push(limit(kind, soft, hard)),
            Err(reason) => mistakes.push(format!("{name}: {reason}")),
        }
    }
    limits.extend(NEVER_LIMITED.map(|kind| limit(kind, UNLIMITED, UNLIMITED)));
    if mistakes.is_empty() { Ok(limits) } else { Err(mistakes) }
}

/// In written form, without those that cannot be configured.
#[must_use]
pub fn written(limits: &[PosixRlimit]) -> WrittenRlimits {
    let name = |kind| CONFIGURABLE.iter().find(|(_, known, ..)| *known == kind).map(|(name, ..)| *name);
    let word = |value: u64| if value == UNLIMITED { UNLIMITED_WORD.to_owned() } else { value.to_string() };
    limits
        .iter()
        .filter_map(|limit| {
            let text = format!("{}:{}", word(limit.soft()), word(limit.hard()));
            Some((name(limit.typ())?.to_owned(), WrittenRlimit::Text(text)))
        })
        .collect()
}

fn read(written: &WrittenRlimit) -> Result<(u64, u64), String> {
    let value = |text: &str| match text {
        UNLIMITED_WORD => Ok(UNLIMITED),
        number => number.parse().map_err(|_| {
            format!("{text:?} is neither a number nor {UNLIMITED_WORD}; write SOFT:HARD or one for both")
        }),
    };
    let (soft, hard) = match written {
        WrittenRlimit::Number(both) => (*both, *both),
        WrittenRlimit::Text(text) => {
            let (soft, hard) = text.split_once(':').unwrap_or((text, text));
            (value(soft)?, value(hard)?)
        }
    };
    if soft > hard {
        Err(format!("the soft limit {soft} exceeds the hard limit {hard}"))
    } else {
        Ok((soft, hard))
    }
}

fn limit(kind: PosixRlimitType, soft: u64, hard: u64) -> PosixRlimit {
    PosixRlimitBuilder::default()
        .typ(kind)
        .soft(soft)
        .hard(hard)
        .build()
        .expect("a builder whose every field has a default has all that it needs")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(name: &str, value: WrittenRlimit) -> Result<Option<(u64, u64)>, Vec<String>> {
        let (_, kind, ..) = *CONFIGURABLE.iter().find(|(known, ..)| *known == name).unwrap();
        let limits = check(&WrittenRlimits::from([(name.to_owned(), value)]))?;
        Ok(limits.iter().find(|limit| limit.typ() == kind).map(|limit| (limit.soft(), limit.hard())))
    }

    #[test]
    fn every_limit_but_one_is_set_exactly_once() {
        let limits = check(&WrittenRlimits::new()).unwrap();
        let mut numbers: Vec<u32> =
            limits.iter().map(|limit| crate::plan::rlimit_number(limit.typ())).collect();
        numbers.sort_unstable();
        let sigpending = crate::plan::rlimit_number(PosixRlimitType::RlimitSigpending);
        assert_eq!(numbers, (0..16).filter(|number| *number != sigpending).collect::<Vec<_>>());
        assert!(limits.iter().all(|limit| limit.soft() <= limit.hard()));
    }

    #[test]
    fn limits_are_read_as_systemd_reads_them() {
        for (text, expected) in [("4096", (4096, 4096)), ("1024:4096", (1024, 4096)), ("0:0", (0, 0))] {
            assert_eq!(checked("nofile", WrittenRlimit::Text(text.to_owned())), Ok(Some(expected)), "{text}");
        }
        assert_eq!(checked("nofile", WrittenRlimit::Number(5)), Ok(Some((5, 5))));
        let unlimited = WrittenRlimit::Text("0:unlimited".to_owned());
        assert_eq!(checked("core", unlimited), Ok(Some((0, UNLIMITED))));
    }

    #[test]
    fn what_is_no_limit_is_refused_in_words() {
        for (name, text, words) in [
            ("nofile", "", "neither a number"),
            ("nofile", "many", "neither a number"),
            ("nofile", "1:", "neither a number"),
            ("nofile", "1:2:3", "neither a number"),
            ("nofile", "-1", "neither a number"),
            ("nofile", " 1", "neither a number"),
            ("nofile", "18446744073709551616", "neither a number"),
            ("nofile", "unlimited", "exceeds 2147483647"),
            ("nofile", "2:1", "exceeds the hard limit"),
            ("core", "unlimited:1", "exceeds the hard limit"),
        ] {
            let mistakes = checked(name, WrittenRlimit::Text(text.to_owned())).unwrap_err();
            assert!(mistakes.concat().contains(words), "{text:?}: {mistakes:?}");
        }
        for name in ["fsize", "NOFILE", "", "RLIMIT_CORE"] {
            let written = WrittenRlimits::from([(name.to_owned(), WrittenRlimit::Number(1))]);
            let mistakes = check(&written).unwrap_err().concat();
            assert!(mistakes.contains("is not one of core, memlock"), "{name}: {mistakes}");
        }
    }

    #[test]
    fn what_is_written_back_is_the_same() {
        let limits = check(&WrittenRlimits::from([("nofile".to_owned(), WrittenRlimit::Number(9))])).unwrap();
        assert_eq!(check(&written(&limits)).unwrap(), limits);
    }
}
