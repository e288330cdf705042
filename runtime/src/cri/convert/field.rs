//! Paths of fields in a request, the errors for refused values, and checks that several
//! messages share.

use std::fmt;

use berth_model::limit::{MAX_NAME_BYTES, MAX_PATH_BYTES};

/// The most that a message quotes of a refused value, in characters. A message travels in HTTP/2
/// trailers, which some stacks limit to 8 KiB.
const QUOTED_CHARS: usize = 128;

/// The longest id that is accepted; ours have 64 characters, a UUID has 36.
const MAX_ID_BYTES: usize = 128;

/// Why a request is rejected before anything is done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// It is invalid, or asks for something forbidden: gRPC `InvalidArgument`.
    #[error("{field}: {reason}")]
    Invalid {
        /// Its path in the request, such as `config.linux.security_context.run_as_group`.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// It is valid, but not supported (yet): gRPC `Unimplemented`.
    #[error("{field}: {feature} not supported")]
    NotOffered {
        /// Its path in the request.
        field: String,
        /// The unsupported feature, with its verb: "host ports are".
        feature: &'static str,
    },
}

/// The last step of a [`Field`].
#[derive(Debug, Clone, Copy)]
enum Step<'a> {
    Name(&'a str),
    Index(usize),
    Key(&'a str),
}

/// The path of a field in a request. Built on the way down, and formatted only for errors.
#[derive(Debug, Clone, Copy)]
pub struct Field<'a> {
    parent: Option<&'a Field<'a>>,
    step: Step<'a>,
}

impl<'a> Field<'a> {
    /// A field of the request itself.
    #[must_use]
    pub fn root(name: &'a str) -> Self {
        Self { parent: None, step: Step::Name(name) }
    }

    /// The field `name` of this message.
    #[must_use]
    pub fn of(&'a self, name: &'a str) -> Self {
        Self { parent: Some(self), step: Step::Name(name) }
    }

    /// The element at `index` of this list.
    #[must_use]
    pub(super) fn at(&'a self, index: usize) -> Self {
        Self { parent: Some(self), step: Step::Index(index) }
    }

    /// The entry `key` of this map.
    #[must_use]
    pub(super) fn key(&'a self, key: &'a str) -> Self {
        Self { parent: Some(self), step: Step::Key(key) }
    }

    pub(super) fn invalid(&self, reason: impl Into<String>) -> Rejected {
        Rejected::Invalid { field: self.to_string(), reason: reason.into() }
    }

    pub(super) fn not_offered(&self, feature: &'static str) -> Rejected {
        Rejected::NotOffered { field: self.to_string(), feature }
    }
}

impl fmt::Display for Field<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            write!(f, "{parent}")?;
        }
        match self.step {
            Step::Name(name) if self.parent.is_none() => f.write_str(name),
            Step::Name(name) => write!(f, ".{name}"),
            Step::Index(index) => write!(f, "[{index}]"),
            Step::Key(key) => write!(f, "[{}]", quoted(key)),
        }
    }
}

/// `text` for a message: quoted, shortened, and with everything escaped that could move a cursor or
/// start a line.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_CHARS) {
        Some((end, _)) => format!("{:?}...", text.get(..end).unwrap_or_default()),
        None => format!("{text:?}"),
    }
}

/// At most `most` elements.
pub(super) fn at_most(field: &Field<'_>, count: usize, most: usize) -> Result<(), Rejected> {
    if count > most {
        return Err(field.invalid(format!("{count} entries; the limit is {most}")));
    }
    Ok(())
}

/// At most `most` bytes.
pub(super) fn no_longer_than(field: &Field<'_>, text: &str, most: usize) -> Result<(), Rejected> {
    if text.len() > most {
        return Err(field.invalid(format!("{} bytes; the limit is {most}", text.len())));
    }
    Ok(())
}

/// No NUL, which ends a string for the kernel.
pub(super) fn no_nul(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    if text.contains('\0') {
        return Err(field.invalid("contains a NUL byte"));
    }
    Ok(())
}

/// A name: not empty, not too long, and without characters that could break a line of a log.
pub(super) fn name(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    if text.is_empty() {
        return Err(field.invalid("empty"));
    }
    no_longer_than(field, text, MAX_NAME_BYTES)?;
    if text.chars().any(char::is_control) {
        return Err(field.invalid("contains a control character"));
    }
    Ok(())
}

/// An id in a request; whether it exists is checked later.
pub(super) fn id(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    no_longer_than(field, text, MAX_ID_BYTES)?;
    if text.chars().any(char::is_control) {
        return Err(field.invalid("contains a control character"));
    }
    Ok(())
}

/// A path that the kernel accepts.
fn path(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    no_longer_than(field, text, MAX_PATH_BYTES)?;
    no_nul(field, text)
}

/// An absolute path.
pub(super) fn absolute(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    if !text.starts_with('/') {
        return Err(field.invalid(format!("{} is not an absolute path", quoted(text))));
    }
    path(field, text)
}

/// An absolute path without `..`, which would lead elsewhere if there is a link on the way.
pub(super) fn absolute_forward(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    absolute(field, text)?;
    forward(field, text)
}

/// A relative path without `..`, naming a file: it ends neither in a slash nor in a dot.
pub(super) fn relative_file(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    path(field, text)?;
    if text.starts_with('/') {
        return Err(field.invalid(format!("{} is not a relative path", quoted(text))));
    }
    forward(field, text)?;
    match text.rsplit('/').next() {
        None | Some("" | ".") => Err(field.invalid(format!("{} does not name a file", quoted(text)))),
        Some(_) => Ok(()),
    }
}

fn forward(field: &Field<'_>, text: &str) -> Result<(), Rejected> {
    if text.split('/').any(|component| component == "..") {
        return Err(field.invalid(format!("{} contains \"..\"", quoted(text))));
    }
    Ok(())
}

/// An absolute path in a container that is not its root, without `..`: those that stay inside are
/// resolved in the text, as in other runtimes; one that leads outside the root is refused. A path
/// without `..` is kept as it is.
pub(super) fn inside(field: &Field<'_>, text: String) -> Result<String, Rejected> {
    absolute(field, &text)?;
    let mut parts = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.pop().is_none() => {
                return Err(field.invalid(format!("{} leads outside the container's root", quoted(&text))));
            }
            ".." => {}
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(field.invalid(format!("{} is the root itself", quoted(&text))));
    }
    if text.split('/').any(|part| part == "..") { Ok(format!("/{}", parts.join("/"))) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_reads_as_in_the_request() {
        let (config, list, map) = (Field::root("config"), "mounts", "sysctls");
        let mounts = config.of(list);
        let third = mounts.at(2);
        assert_eq!(third.of("host_path").to_string(), "config.mounts[2].host_path");
        assert_eq!(config.of(map).key("a\"b\n").to_string(), r#"config.sysctls["a\"b\n"]"#);
        assert_eq!(config.of("image").invalid("missing").to_string(), "config.image: missing");
        assert_eq!(
            mounts.not_offered("mounts of images are").to_string(),
            "config.mounts: mounts of images are not supported"
        );
    }

    #[test]
    fn what_is_repeated_is_short_and_moves_no_cursor() {
        assert_eq!(quoted("plain"), "\"plain\"");
        assert!(quoted(&"ä".repeat(1_000_000)).len() < 2 * QUOTED_CHARS + 8);
        let hostile = quoted("\x1b[2J\r\n\u{2028}\u{202e}\0");
        assert!(hostile.chars().all(|character| (' '..='~').contains(&character)), "{hostile}");
    }

    #[test]
    fn paths_are_held_to_their_kind() {
        let long = format!("/{}", "a".repeat(MAX_PATH_BYTES));
        let longest = format!("/{}", "a".repeat(MAX_PATH_BYTES - 1));
        // absolute, absolute_forward, inside, relative_file
        let cases: &[(&str, [bool; 4])] = &[
            ("", [false, false, false, false]),
            ("/", [true, true, false, false]),
            ("//./", [true, true, false, false]),
            ("/a", [true, true, true, false]),
            ("/a b\n/c", [true, true, true, false]),
            ("/a/../b", [true, false, true, false]),
            ("/a/../../b", [true, false, false, false]),
            ("/a/..", [true, false, false, false]),
            ("/..", [true, false, false, false]),
            ("/a..b/...", [true, true, true, false]),
            ("/a\0b", [false, false, false, false]),
            (&longest, [true, true, true, false]),
            (&long, [false, false, false, false]),
            ("a", [false, false, false, true]),
            ("a/0.log", [false, false, false, true]),
            ("./a", [false, false, false, true]),
            ("a/", [false, false, false, false]),
            ("a/.", [false, false, false, false]),
            (".", [false, false, false, false]),
            ("..", [false, false, false, false]),
            ("a/../b", [false, false, false, false]),
            ("a\0", [false, false, false, false]),
        ];
        let root = Field::root("path");
        for (text, expected) in cases {
            let found = [
                absolute(&root, text).is_ok(),
                absolute_forward(&root, text).is_ok(),
                inside(&root, (*text).to_owned()).is_ok(),
                relative_file(&root, text).is_ok(),
            ];
            assert_eq!(found, *expected, "{text:?}");
        }
    }

    #[test]
    fn a_path_that_turns_back_inside_is_resolved() {
        for (text, expected) in [
            ("/data/../etc/x", "/etc/x"),
            ("/a/b/../../c/./d/", "/c/d"),
            ("//a/./b/", "//a/./b/"),
            ("/a/...", "/a/..."),
        ] {
            assert_eq!(inside(&Field::root("p"), text.to_owned()).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn names_and_ids_are_bounded_lines() {
        let root = Field::root("name");
        let cases = [
            ("a", true),
            ("ä b/../c", true),
            ("", false),
            ("a\nb", false),
            ("a\0", false),
            ("\u{85}", false),
        ];
        for (text, good) in cases {
            assert_eq!(name(&root, text).is_ok(), good, "{text:?}");
        }
        assert!(name(&root, &"n".repeat(MAX_NAME_BYTES)).is_ok());
        assert!(name(&root, &"n".repeat(MAX_NAME_BYTES + 1)).is_err());
        assert!(id(&root, &"0".repeat(MAX_ID_BYTES)).is_ok());
        assert!(id(&root, &"0".repeat(MAX_ID_BYTES + 1)).is_err());
        assert!(id(&root, "a\n").is_err());
    }
}
