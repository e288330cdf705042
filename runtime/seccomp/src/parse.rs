//! Reading a profile from the file that a pod names as `Localhost`.
//!
//! The form is the `seccomp` object of the OCI runtime-spec. Docker's own form, in which many files
//! are written, has more: `archMap`, `name` in place of `names`, errors by name, and rules with
//! `includes` and `excludes`, which apply only for some capabilities, architectures and kernels
//! ([`Circumstances`]). All of that is resolved here into plain OCI.

use oci_spec::runtime::{Arch, LinuxSeccomp};
use serde::Deserialize;
use serde_json::Value;

use crate::abi::Abi;

/// The largest profile that is parsed, in bytes. Docker's default profile has 15 KiB; a list of all
/// system calls with conditions stays far below this.
pub const MAX_PROFILE_BYTES: usize = 1024 * 1024;

/// Why a profile cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// Larger than a profile can reasonably be.
    #[error("the seccomp profile is larger than 1 MiB")]
    TooLarge,
    /// Not JSON, or not of the form.
    #[error("the seccomp profile is not an OCI seccomp object")]
    Malformed {
        /// Where and what.
        #[source]
        source: serde_json::Error,
    },
    /// A rule with both `name` and `names`.
    #[error("a seccomp rule has both name and names: {name:?}")]
    TwoNames {
        /// The `name`.
        name: String,
    },
    /// `minKernel` that is not a version.
    #[error("the seccomp profile has an invalid minKernel (expected a version such as 4.8): {text:?}")]
    Kernel {
        /// As written.
        text: String,
    },
    /// An error name that is not known here.
    #[error("the seccomp profile has an unknown errno: {name:?}")]
    Errno {
        /// As written.
        name: String,
    },
    /// Both ways of naming architectures.
    #[error("the seccomp profile has both architectures and archMap")]
    TwoArchitectures,
}

/// What the conditions of rules are evaluated against: the container that the profile is for, and
/// the node.
#[derive(Debug, Clone, Default)]
pub struct Circumstances<'a> {
    /// The capabilities in the container's bounding set, with or without `CAP_`.
    pub capabilities: Vec<&'a str>,
    /// Major and minor version of the kernel.
    pub kernel: (u32, u32),
}

/// Docker's additions.
#[derive(Deserialize)]
struct Extras {
    #[serde(default, rename = "archMap")]
    arch_map: Option<Vec<ArchMap>>,
    #[serde(default, rename = "defaultErrno")]
    default_errno: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<SyscallExtras>>,
}

#[derive(Deserialize)]
struct ArchMap {
    architecture: Arch,
    #[serde(default, rename = "subArchitectures")]
    sub_architectures: Option<Vec<Arch>>,
}

#[derive(Deserialize)]
struct SyscallExtras {
    #[serde(default)]
    includes: Option<Conditions>,
    #[serde(default)]
    excludes: Option<Conditions>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    errno: Option<String>,
}

/// When a rule applies, or does not. An empty field is no condition.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Conditions {
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default)]
    arches: Option<Vec<String>>,
    #[serde(default, rename = "minKernel")]
    min_kernel: Option<String>,
}

/// The result of each part of [`Conditions`]; `None` where it is no condition.
struct Verdicts {
    all_caps: Option<bool>,
    any_cap: Option<bool>,
    arch: Option<bool>,
    kernel: Option<bool>,
}

impl Conditions {
    fn judge(self, circumstances: &Circumstances<'_>) -> Result<Verdicts, ParseError> {
        let caps = self.caps.filter(|caps| !caps.is_empty());
        let plain = |cap: &str| cap.strip_prefix("CAP_").unwrap_or(cap).to_owned();
        let has = |cap: &String| circumstances.capabilities.iter().any(|held| plain(held) == plain(cap));
        let kernel = match self.min_kernel.filter(|text| !text.is_empty()) {
            Some(text) => Some(circumstances.kernel >= version(&text).ok_or(ParseError::Kernel { text })?),
            None => None,
        };
        Ok(Verdicts {
            all_caps: caps.as_ref().map(|caps| caps.iter().all(has)),
            any_cap: caps.as_ref().map(|caps| caps.iter().any(has)),
            arch: self
                .arches
                .filter(|arches| !arches.is_empty())
                .map(|arches| arches.iter().any(|arch| arch == Abi::NATIVE.go_name())),
            kernel,
        })
    }
}

/// Whether a rule is in force, as CRI-O decides (containers/common, `pkg/seccomp`): every part of
/// `includes` has to hold, with all of its capabilities; one part of `excludes` that holds is
/// enough to leave the rule out, with any of its capabilities.
fn holds(
    includes: Option<Conditions>,
    excludes: Option<Conditions>,
    circumstances: &Circumstances<'_>,
) -> Result<bool, ParseError> {
    let includes = includes.unwrap_or_default().judge(circumstances)?;
    let excludes = excludes.unwrap_or_default().judge(circumstances)?;
    let included = [includes.all_caps, includes.arch, includes.kernel].into_iter().flatten().all(|part| part);
    let excluded = [excludes.any_cap, excludes.arch, excludes.kernel].into_iter().flatten().any(|part| part);
    Ok(included && !excluded)
}

/// `4.8` as numbers; what follows a second dot is not looked at.
fn version(text: &str) -> Option<(u32, u32)> {
    let (major, rest) = text.split_once('.')?;
    let minor = rest.split('.').next()?;
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
    Some((number(major)?, number(minor)?))
}

/// Errors that profiles name: errno(3), <asm-generic/errno-base.h> and <asm-generic/errno.h>.
const ERRNOS: [(&str, u32); 12] = [
    ("EPERM", 1),
    ("ENOENT", 2),
    ("EIO", 5),
    ("ENXIO", 6),
    ("EBADF", 9),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EACCES", 13),
    ("EINVAL", 22),
    ("ENOSYS", 38),
    ("EOPNOTSUPP", 95),
    ("EAFNOSUPPORT", 97),
];

/// The number of an error that is given by name, which wins over one given by number. A name that
/// is not known here needs the number beside it.
fn errno(name: Option<String>, number: Option<u32>) -> Result<Option<u32>, ParseError> {
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(number) };
    match ERRNOS.iter().find(|(known, _)| *known == name) {
        Some((_, number)) => Ok(Some(*number)),
        None => number.map(Some).ok_or(ParseError::Errno { name }),
    }
}

/// Reads a profile for a container in these circumstances.
///
/// # Errors
/// See [`ParseError`].
pub fn parse_profile(bytes: &[u8], circumstances: &Circumstances<'_>) -> Result<LinuxSeccomp, ParseError> {
    if bytes.len() > MAX_PROFILE_BYTES {
        return Err(ParseError::TooLarge);
    }
    let malformed = |source| ParseError::Malformed { source };
    let plain = with_names(bytes).map_err(malformed)?;
    let mut profile: LinuxSeccomp = serde_json::from_value(plain).map_err(malformed)?;
    let extras: Extras = serde_json::from_slice(bytes).map_err(malformed)?;
    let rules = profile.syscalls().clone().unwrap_or_default();
    let mut in_force = Vec::with_capacity(rules.len());
    for (mut rule, extras) in rules.into_iter().zip(extras.syscalls.unwrap_or_default()) {
        if let Some(name) = extras.name.filter(|name| !name.is_empty())
            && *rule.names() != [name.as_str()]
        {
            return Err(ParseError::TwoNames { name });
        }
        if holds(extras.includes, extras.excludes, circumstances)? {
            let number = errno(extras.errno, rule.errno_ret())?;
            rule.set_errno_ret(number);
            in_force.push(rule);
        }
    }
    profile.set_syscalls(Some(in_force));
    let number = errno(extras.default_errno, profile.default_errno_ret())?;
    profile.set_default_errno_ret(number);
    let maps = extras.arch_map.unwrap_or_default();
    if !maps.is_empty() {
        if profile.architectures().as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(ParseError::TwoArchitectures);
        }
        let ours = maps.into_iter().find(|map| Abi::from_oci(map.architecture) == Some(Abi::NATIVE));
        profile.set_architectures(ours.map(|map| {
            let mut list = vec![map.architecture];
            list.extend(map.sub_architectures.unwrap_or_default());
            list
        }));
    }
    Ok(profile)
}

/// The profile with `names` where a rule has only Docker's older `name`.
fn with_names(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    let mut profile: Value = serde_json::from_slice(bytes)?;
    for rule in profile.get_mut("syscalls").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(rule) = rule.as_object_mut() else { continue };
        let named = rule.get("names").and_then(Value::as_array).is_some_and(|names| !names.is_empty());
        if let Some(name) = rule.get("name").filter(|name| name.as_str().is_some_and(|name| !name.is_empty()))
            && !named
        {
            let names = Value::Array(vec![name.clone()]);
            rule.insert("names".to_owned(), names);
        }
    }
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oci_profile_is_read() {
        let profile = parse_profile(
            br#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64"],
                "syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","comment":"fine","includes":{},"excludes":null,
                "args":[{"index":0,"value":18446744073709551615,"valueTwo":0,"op":"SCMP_CMP_EQ"}]}]}"#,
            &Circumstances::default(),
        )
        .unwrap();
        assert_eq!(profile.default_errno_ret(), Some(38));
        let rule = &profile.syscalls().as_ref().unwrap()[0];
        assert_eq!(rule.args().as_ref().unwrap()[0].value(), u64::MAX);
    }

    #[test]
    fn dockers_architectures_are_understood() {
        let profile = parse_profile(
            br#"{"defaultAction":"SCMP_ACT_ALLOW","archMap":[
                {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]},
                {"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"]}]}"#,
            &Circumstances::default(),
        )
        .unwrap();
        if Abi::NATIVE == Abi::X86_64 {
            let expected = [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
            assert_eq!(profile.architectures().as_deref(), Some(&expected[..]));
        }
    }

    /// A profile with one rule, which has `addition`.
    fn with_rule(addition: &str) -> String {
        format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["mount"],"action":"SCMP_ACT_ALLOW",{addition}}}]}}"#
        )
    }

    #[test]
    fn a_rule_holds_when_its_conditions_do() {
        let native = Abi::NATIVE.go_name();
        let circumstances =
            Circumstances { capabilities: vec!["CAP_CHOWN", "CAP_SYS_ADMIN"], kernel: (5, 15) };
        for (addition, expected) in [
            (r#""includes":{},"excludes":{}"#.to_owned(), true),
            (r#""includes":null,"excludes":{"caps":[],"arches":null,"minKernel":""}"#.to_owned(), true),
            (r#""includes":{"caps":["CAP_SYS_ADMIN"]}"#.to_owned(), true),
            (r#""includes":{"caps":["CAP_SYS_ADMIN","CAP_BPF"]}"#.to_owned(), false),
            (r#""includes":{"caps":["CAP_BPF"]}"#.to_owned(), false),
            (r#""excludes":{"caps":["CAP_SYS_ADMIN"]}"#.to_owned(), false),
            (r#""excludes":{"caps":["CAP_BPF","CAP_CHOWN"]}"#.to_owned(), false),
            (r#""excludes":{"caps":["CAP_BPF"]}"#.to_owned(), true),
            (format!(r#""includes":{{"arches":["s390x","{native}"]}}"#), true),
            (r#""includes":{"arches":["s390x","s390"]}"#.to_owned(), false),
            (format!(r#""excludes":{{"arches":["{native}"]}}"#), false),
            (r#""excludes":{"arches":["s390x"]}"#.to_owned(), true),
            (r#""includes":{"minKernel":"4.8"}"#.to_owned(), true),
            (r#""includes":{"minKernel":"5.15"}"#.to_owned(), true),
            (r#""includes":{"minKernel":"5.16"}"#.to_owned(), false),
            (r#""includes":{"minKernel":"10.0"}"#.to_owned(), false),
            (r#""excludes":{"minKernel":"4.8"}"#.to_owned(), false),
            (r#""excludes":{"minKernel":"6.1"}"#.to_owned(), true),
            (r#""includes":{"caps":["CAP_SYS_ADMIN"],"minKernel":"6.1"}"#.to_owned(), false),
            (r#""excludes":{"caps":["CAP_BPF"],"minKernel":"4.8"}"#.to_owned(), false),
            (r#""includes":{"caps":["CAP_CHOWN"]},"excludes":{"caps":["CAP_SYS_ADMIN"]}"#.to_owned(), false),
        ] {
            let profile = parse_profile(with_rule(&addition).as_bytes(), &circumstances).unwrap();
            assert_eq!(!profile.syscalls().as_ref().unwrap().is_empty(), expected, "{addition}");
        }
    }

    #[test]
    fn dockers_other_fields_are_understood() {
        let text = br#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrno":"ENOSYS","syscalls":[
            {"name":"read","action":"SCMP_ACT_ALLOW"},
            {"name":"","names":["write"],"action":"SCMP_ACT_ERRNO","errno":"EACCES","errnoRet":1},
            {"names":["bdflush"],"action":"SCMP_ACT_ERRNO","errno":"EBADMSG","errnoRet":74}]}"#;
        let profile = parse_profile(text, &Circumstances::default()).unwrap();
        assert_eq!(profile.default_errno_ret(), Some(38));
        let rules = profile.syscalls().as_ref().unwrap();
        assert_eq!(rules[0].names(), &["read"]);
        assert_eq!((rules[1].errno_ret(), rules[2].errno_ret()), (Some(13), Some(74)));
    }

    #[test]
    fn conditions_that_cannot_be_judged_are_refused() {
        type Expected = fn(&ParseError) -> bool;
        let cases: [(&str, Expected); 7] = [
            (r#""includes":{"minKernel":"new"}"#, |error| matches!(error, ParseError::Kernel { .. })),
            (r#""excludes":{"minKernel":"4"}"#, |error| matches!(error, ParseError::Kernel { .. })),
            (r#""excludes":{"minKernel":"+4.8"}"#, |error| matches!(error, ParseError::Kernel { .. })),
            (r#""excludes":{"moon":"full"}"#, |error| matches!(error, ParseError::Malformed { .. })),
            (r#""includes":["CAP_BPF"]"#, |error| matches!(error, ParseError::Malformed { .. })),
            (r#""name":"read""#, |error| matches!(error, ParseError::TwoNames { .. })),
            (r#""errno":"EWHATEVER""#, |error| matches!(error, ParseError::Errno { .. })),
        ];
        for (addition, expected) in cases {
            let result = parse_profile(with_rule(addition).as_bytes(), &Circumstances::default());
            assert!(result.as_ref().is_err_and(expected), "{addition}: {result:?}");
        }
    }

    #[test]
    fn what_is_no_profile_is_refused() {
        for bytes in [
            &b""[..],
            b"{}",
            b"[]",
            b"null",
            b"\0",
            b"\xff\xfe",
            br#"{"defaultAction":"SCMP_ACT_MAYBE"}"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":"read","action":"SCMP_ACT_ALLOW"}]}"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"]}]}"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":-1}"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW"} trailing"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":-1,"op":"SCMP_CMP_EQ"}]}]}"#,
        ] {
            assert!(matches!(parse_profile(bytes, &Circumstances::default()), Err(ParseError::Malformed { .. })), "{bytes:?}");
        }
        assert!(matches!(
            parse_profile(&b"[".repeat(100_000), &Circumstances::default()),
            Err(ParseError::Malformed { .. })
        ));
        assert!(matches!(
            parse_profile(&vec![b' '; MAX_PROFILE_BYTES + 1], &Circumstances::default()),
            Err(ParseError::TooLarge)
        ));
    }
}
