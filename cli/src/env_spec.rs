//! `NAME=VALUE`, the text form of an environment variable; `NAME` alone takes the value from our
//! own environment.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use berth_cri::v1::KeyValue;

/// Why a text is not an environment variable.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum EnvSpecError {
    /// The name is missing, or the text contains a NUL byte.
    #[error("`{0}` is not an environment variable; use NAME=VALUE, or NAME to pass on your own")]
    Form(String),
    /// Our environment has no such variable.
    #[error("no variable `{0}` in this environment; use {0}=VALUE")]
    Absent(String),
}

/// Reads one variable. `own` looks up our own environment.
///
/// # Errors
/// When there is no name, or no value in our own environment.
pub(crate) fn parse(text: &str, own: impl Fn(&str) -> Option<OsString>) -> Result<KeyValue, EnvSpecError> {
    let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
    if name.is_empty() || text.contains('\0') {
        return Err(EnvSpecError::Form(text.to_owned()));
    }
    let value = match value {
        Some(value) => value.as_bytes().to_vec(),
        None => own(name).ok_or_else(|| EnvSpecError::Absent(name.to_owned()))?.into_vec(),
    };
    Ok(KeyValue { key: name.to_owned(), value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(name: &str) -> Option<OsString> {
        (name == "HOME").then(|| OsString::from_vec(b"/root/\xff".to_vec()))
    }

    #[test]
    fn variables_are_read() {
        for (text, key, value) in [
            ("A=b", "A", &b"b"[..]),
            ("A=", "A", b""),
            ("A=b=c", "A", b"b=c"),
            ("A= b ", "A", b" b "),
            ("A B=c", "A B", b"c"),
            ("HOME", "HOME", b"/root/\xff"),
            ("HOME=", "HOME", b""),
        ] {
            assert_eq!(parse(text, own), Ok(KeyValue { key: key.into(), value: value.to_vec() }), "{text}");
        }
    }

    #[test]
    fn what_is_no_variable_is_refused() {
        for text in ["", "=", "=b", "A=b\0", "A\0=b"] {
            assert_eq!(parse(text, own), Err(EnvSpecError::Form(text.into())), "{text:?}");
        }
        assert_eq!(parse("SHELL", own), Err(EnvSpecError::Absent("SHELL".into())));
    }
}
