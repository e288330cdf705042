//! Names for the pods and containers that the command creates.
//!
//! A pod's name is also its hostname, so it has to be what Kubernetes allows for both: a DNS label
//! (RFC 1123).

use std::io;

/// The longest DNS label, in bytes (RFC 1035, section 2.3.4).
const MAX_NAME_BYTES: usize = 63;

/// How many random characters make a name unique.
const SUFFIX_DIGITS: usize = 6;

/// Why a text cannot be the name of a pod.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{0}` is not a valid name: use up to 63 lowercase letters, digits and `-`, with no `-` at either end"
)]
pub(crate) struct PodNameError(String);

/// Checks a name that a user chose.
///
/// # Errors
/// When it is not a DNS label.
pub(crate) fn check(name: &str) -> Result<String, PodNameError> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let fits = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed);
    if !fits || name.starts_with('-') || name.ends_with('-') {
        return Err(PodNameError(name.to_owned()));
    }
    Ok(name.to_owned())
}

/// Makes a name from an image's, such as `busybox-3f2a1c`, with the first characters of `unique`.
pub(crate) fn from_image(reference: &str, unique: &str) -> String {
    let path = reference.split('@').next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    let name = last.split(':').next().unwrap_or_default();
    let plain: String = name
        .chars()
        .map(|character| if character.is_ascii_alphanumeric() { character } else { '-' })
        .collect();
    let suffix: String = unique.chars().filter(char::is_ascii_hexdigit).take(SUFFIX_DIGITS).collect();
    let kept: String = plain.to_ascii_lowercase().chars().take(MAX_NAME_BYTES - SUFFIX_DIGITS - 1).collect();
    let kept = match kept.trim_matches('-') {
        "" => "pod",
        kept => kept,
    };
    format!("{kept}-{suffix}")
}

/// A random UUID, from the kernel (random(4)).
///
/// # Errors
/// When /proc is not mounted.
pub(crate) fn random_uuid() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIQUE: &str = "3f2a-1c99";

    #[test]
    fn dns_labels_are_names() {
        for name in ["a", "0", "web", "a-b", "web-3f2a1c", &"x".repeat(63)] {
            assert_eq!(check(name).as_deref(), Ok(name));
        }
    }

    #[test]
    fn what_is_no_dns_label_is_refused() {
        for name in ["", "-", "-a", "a-", "A", "a.b", "a_b", "a/b", "..", "a b", "a\0", "ü", &"x".repeat(64)]
        {
            assert_eq!(check(name), Err(PodNameError(name.to_owned())), "{name:?}");
        }
    }

    #[test]
    fn names_come_from_the_last_part_of_the_image() {
        for (reference, name) in [
            ("busybox", "busybox-3f2a1c"),
            ("docker.io/library/busybox:1.36", "busybox-3f2a1c"),
            ("localhost:5000/My_App@sha256:abc", "my-app-3f2a1c"),
            ("localhost:5000/a:b@sha256:abc", "a-3f2a1c"),
            ("", "pod-3f2a1c"),
            ("///", "pod-3f2a1c"),
            ("--x--", "x-3f2a1c"),
        ] {
            assert_eq!(from_image(reference, UNIQUE), name);
            assert!(check(&from_image(reference, UNIQUE)).is_ok(), "{reference}");
        }
        let long = from_image(&"x-".repeat(200), UNIQUE);
        assert!(check(&long).is_ok(), "{long}");
    }

    #[test]
    fn uuids_differ() {
        let (one, other) = (random_uuid().unwrap(), random_uuid().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.len(), 36, "{one}");
    }
}
