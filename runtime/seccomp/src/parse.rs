//! Reading a profile from the file that a pod names as `Localhost`.
//!
//! The form is the `seccomp` object of the OCI runtime-spec. Docker's own form has three fields more: `archMap` is understood; `includes` and
//! `excludes`, which make a rule depend on capabilities and kernels, are refused, since to ignore them would grant what they withhold.

use oci_spec::runtime::{Arch, LinuxSeccomp};
use serde::Deserialize;
use serde_json::Value;

use crate::abi::Abi;

/// The largest file taken. Docker's default profile has 15 KiB; a list of all system calls with conditions stays far below this.
const MAX_BYTES: usize = 1024 * 1024;

/// Why a profile cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// More than a profile can reasonably have.
    #[error("the seccomp profile has {bytes} bytes, more than 1 MiB")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Not JSON, or not of the form.
    #[error("the seccomp profile is not an OCI seccomp object")]
    Malformed {
        /// Where and what.
        #[source]
        source: serde_json::Error,
    },
    /// A field of another form that changes what the profile means.
    #[error("the seccomp profile has a field that is not supported: {field}")]
    Unsupported {
        /// The field.
        field: &'static str,
    },
    /// Both ways to say architectures.
    #[error("the seccomp profile has both architectures and archMap")]
    TwoArchitectures,
}

/// Docker's additions.
#[derive(Deserialize)]
struct Extras {
    #[serde(default, rename = "archMap")]
    arch_map: Option<Vec<ArchMap>>,
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
    includes: Option<Value>,
    #[serde(default)]
    excludes: Option<Value>,
    #[serde(default)]
    name: Option<String>,
}

/// Reads a profile.
///
/// # Errors
/// See [`ParseError`].
pub fn parse_profile(bytes: &[u8]) -> Result<LinuxSeccomp, ParseError> {
    if bytes.len() > MAX_BYTES {
        return Err(ParseError::TooLarge { bytes: bytes.len() });
    }
    let malformed = |source| ParseError::Malformed { source };
    let mut profile: LinuxSeccomp = serde_json::from_slice(bytes).map_err(malformed)?;
    let extras: Extras = serde_json::from_slice(bytes).map_err(malformed)?;
    for syscall in extras.syscalls.unwrap_or_default() {
        let says = |value: &Option<Value>| match value {
            None | Some(Value::Null) => false,
            Some(Value::Object(fields)) => !fields.is_empty(),
            Some(_) => true,
        };
        for (field, present) in [
            ("syscalls[].includes", says(&syscall.includes)),
            ("syscalls[].excludes", says(&syscall.excludes)),
            ("syscalls[].name", syscall.name.is_some_and(|name| !name.is_empty())),
        ] {
            if present {
                return Err(ParseError::Unsupported { field });
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oci_profile_is_read() {
        let profile = parse_profile(
            br#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64"],
                "syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","comment":"fine","includes":{},"excludes":null,
                "args":[{"index":0,"value":18446744073709551615,"valueTwo":0,"op":"SCMP_CMP_EQ"}]}]}"#,
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
        )
        .unwrap();
        if Abi::NATIVE == Abi::X86_64 {
            let expected = [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
            assert_eq!(profile.architectures().as_deref(), Some(&expected[..]));
        }
    }

    #[test]
    fn what_would_change_the_meaning_is_refused_by_name() {
        for (addition, field) in [
            (r#""includes":{"caps":["CAP_SYS_ADMIN"]}"#, "syscalls[].includes"),
            (r#""excludes":{"minKernel":"4.8"}"#, "syscalls[].excludes"),
            (r#""name":"read""#, "syscalls[].name"),
        ] {
            let text = format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["read"],"action":"SCMP_ACT_ALLOW",{addition}}}]}}"#
            );
            let error = parse_profile(text.as_bytes()).unwrap_err();
            assert!(matches!(error, ParseError::Unsupported { field: named } if named == field), "{error}");
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
            assert!(matches!(parse_profile(bytes), Err(ParseError::Malformed { .. })), "{bytes:?}");
        }
        assert!(matches!(parse_profile(&b"[".repeat(100_000)), Err(ParseError::Malformed { .. })));
        assert!(matches!(parse_profile(&vec![b' '; MAX_BYTES + 1]), Err(ParseError::TooLarge { .. })));
    }
}
