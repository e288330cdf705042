//! Image references: from what a user writes to the full name that registries and the store use.
//!
//! The grammar is that of `distribution/reference` (github.com/distribution/reference v0.6,
//! `reference.go`), normalised as docker does: no domain means `docker.io`, a single path component
//! there means `library/`, no tag and no digest means `latest`. With both a tag and a digest the
//! digest decides and the tag is dropped (as containerd's CRI does).
//!
//! Not `oci_spec::distribution::Reference`: it knows no IPv6 hosts, takes digests of other
//! algorithms and upper-case ones, and compiles a regular expression of some megabytes. A property
//! test holds this parser against it where they must agree.

use std::fmt;
use std::str::FromStr;

use crate::Digest;
use crate::digest::ParseDigestError;

/// Longest reference that is accepted: a name of 255, a tag of 128 and a digest of 71 bytes with
/// their separators, rounded up.
pub const MAX_REFERENCE_LEN: usize = 512;

/// Longest name, domain included (`distribution/reference`: `RepositoryNameTotalLengthMax`).
const MAX_NAME_LEN: usize = 255;

/// Longest tag (same source, `TagRegexp`).
const MAX_TAG_LEN: usize = 128;

const DEFAULT_DOMAIN: &str = "docker.io";
const LEGACY_DEFAULT_DOMAIN: &str = "index.docker.io";
const OFFICIAL_PREFIX: &str = "library/";
const DEFAULT_TAG: &str = "latest";

/// The target of a reference inside its repository.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A name that the registry may move.
    Tag(String),
    /// Exactly these bytes: a manifest or an index.
    Digest(Digest),
}

/// A full, normalised reference.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    domain: String,
    repository: String,
    target: Target,
}

/// Why a text is not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseReferenceError {
    /// Nothing there.
    #[error("reference is empty")]
    Empty,
    /// More than [`MAX_REFERENCE_LEN`] bytes, or a name above 255.
    #[error("reference is too long")]
    TooLong,
    /// The host part is not a host name, an address in brackets, or has a bad port.
    #[error("invalid registry host in reference")]
    Domain,
    /// A path component is empty, or has other characters than lower-case letters, digits and
    /// separators between them.
    #[error("invalid repository name in reference")]
    Repository,
    /// The tag is empty, above 128 bytes, or has a character outside `[A-Za-z0-9_.-]`.
    #[error("invalid tag in reference")]
    Tag,
    /// What follows `@` is not a digest.
    #[error("invalid digest in reference")]
    Digest(#[source] ParseDigestError),
    /// 64 hexadecimal digits are an image id, not a name.
    #[error("an image id is not a reference")]
    ImageId,
}

impl Reference {
    /// Parses and normalises what a user wrote.
    ///
    /// # Errors
    /// [`ParseReferenceError`] names the part that is wrong.
    pub fn parse(text: &str) -> Result<Self, ParseReferenceError> {
        if text.is_empty() {
            return Err(ParseReferenceError::Empty);
        }
        if text.len() > MAX_REFERENCE_LEN {
            return Err(ParseReferenceError::TooLong);
        }
        if Digest::from_hex(text).is_ok() {
            return Err(ParseReferenceError::ImageId);
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => (rest, Some(Digest::parse(digest).map_err(ParseReferenceError::Digest)?)),
        };
        // A colon after the last slash starts a tag; one before belongs to a port.
        let name_end = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[name_end..].find(':') {
            None => (rest, None),
            Some(colon) => (&rest[..name_end + colon], Some(&rest[name_end + colon + 1..])),
        };
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        let (domain, repository) = split_domain(name);
        check_domain(domain)?;
        check_repository(repository)?;
        let domain = if domain == LEGACY_DEFAULT_DOMAIN { DEFAULT_DOMAIN } else { domain };
        let repository = if domain == DEFAULT_DOMAIN && !repository.contains('/') {
            format!("{OFFICIAL_PREFIX}{repository}")
        } else {
            repository.to_owned()
        };
        if domain.len() + 1 + repository.len() > MAX_NAME_LEN {
            return Err(ParseReferenceError::TooLong);
        }
        let target = match digest {
            Some(digest) => Target::Digest(digest),
            None => Target::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
        };
        Ok(Self { domain: domain.to_owned(), repository, target })
    }

    /// Registry host with port as written, `docker.io` if none was.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Path inside the registry, e.g. `library/busybox`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Tag or digest.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The same repository at a digest.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            domain: self.domain.clone(),
            repository: self.repository.clone(),
            target: Target::Digest(digest),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.repository)?;
        match &self.target {
            Target::Tag(tag) => write!(f, ":{tag}"),
            Target::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

/// The first component is a domain if it could not be a plain path component: it has a dot or a
/// colon, is `localhost`, or has upper case (`distribution/reference`, `splitDockerDomain`).
fn split_domain(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_DOMAIN, name),
    }
}

fn check_domain(domain: &str) -> Result<(), ParseReferenceError> {
    let (host, port) = if let Some(rest) = domain.strip_prefix('[') {
        let (address, after) = rest.split_once(']').ok_or(ParseReferenceError::Domain)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| ParseReferenceError::Domain)?;
        let port = match after {
            "" => None,
            _ => Some(after.strip_prefix(':').ok_or(ParseReferenceError::Domain)?),
        };
        (None, port)
    } else {
        match domain.split_once(':') {
            None => (Some(domain), None),
            Some((host, port)) => (Some(host), Some(port)),
        }
    };
    if let Some(host) = host {
        let label_ok = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !host.split('.').all(label_ok) {
            return Err(ParseReferenceError::Domain);
        }
    }
    if let Some(port) = port {
        // Digits only: `u16::from_str` would take a leading plus sign.
        if !port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err() {
            return Err(ParseReferenceError::Domain);
        }
    }
    Ok(())
}

fn check_repository(repository: &str) -> Result<(), ParseReferenceError> {
    if repository.split('/').all(is_path_component) { Ok(()) } else { Err(ParseReferenceError::Repository) }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (Some(first), Some(last)) = (component.bytes().next(), component.bytes().last()) else {
        return false;
    };
    alphanumeric(first)
        && alphanumeric(last)
        && component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).all(|separator| {
            matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
        })
}

fn check_tag(tag: &str) -> Result<(), ParseReferenceError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let ok = tag.len() <= MAX_TAG_LEN
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if ok { Ok(()) } else { Err(ParseReferenceError::Tag) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn short_names_are_made_full_as_docker_does() {
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("ann/app", "docker.io/ann/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:x", "localhost:5000/app:x"),
            ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
            ("[::1]:5000/app:v", "[::1]:5000/app:v"),
            ("[fd00::1]/app", "[fd00::1]/app:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("UPPER/app", "UPPER/app:latest"),
            ("a/b__c/d-----e/f.g", "docker.io/a/b__c/d-----e/f.g:latest"),
            ("repo:5000", "docker.io/library/repo:5000"),
        ] {
            assert_eq!(Reference::parse(text).map(|r| r.to_string()).as_deref(), Ok(full), "{text:?}");
        }
    }

    #[test]
    fn digest_decides_over_a_tag() {
        let reference = Reference::parse(&format!("busybox:1.36@sha256:{HEX}")).unwrap();
        assert_eq!(reference.to_string(), format!("docker.io/library/busybox@sha256:{HEX}"));
    }

    #[test]
    fn odd_references_are_refused() {
        let long_tag = format!("a:{}", "t".repeat(129));
        let long_name = "a/".repeat(127) + "ab";
        let huge = "a".repeat(65536);
        let bad_digest = format!("a@sha256:{}", HEX.to_uppercase());
        let climbing = format!("host/../../x@sha256:{HEX}");
        for text in [
            "",
            " ",
            " busybox",
            "busybox ",
            "bu\0sybox",
            "..",
            "../x",
            "a/../b",
            "a//b",
            "/a",
            "a/",
            ":tag",
            "a:",
            "a:-x",
            "a:b:c",
            "a@",
            "a@sha256:",
            "a@md5:00",
            "A",
            "a/B",
            "a..b",
            "a___b",
            "-a",
            "a-",
            "_a",
            "häuser",
            "host:port/a",
            "host:+80/a",
            "host:70000/a",
            "[::1/a",
            "[::1]x/a",
            "[nonsense]/a",
            "ho_st.x/a",
            ".x/a",
            "a.-b/c",
            "http://x/y",
            HEX,
            &long_tag,
            &long_name,
            &huge,
            &bad_digest,
            &climbing,
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn full_form_parses_to_itself(text in "[a-zA-Z0-9./:_@-]{0,80}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()), Ok(reference));
            }
        }

        #[test]
        fn parser_never_panics_on_any_text(text in any::<String>()) {
            let _ = Reference::parse(&text);
        }

        #[test]
        fn oci_spec_agrees_on_what_both_accept(
            text in "([a-z0-9.:-]{1,12}/){0,2}[a-z0-9._-]{1,12}(:[a-zA-Z0-9._-]{1,8})?"
        ) {
            let theirs = text.parse::<oci_spec::distribution::Reference>();
            if let (Ok(ours), Ok(theirs)) = (Reference::parse(&text), theirs) {
                prop_assert_eq!(ours.to_string(), theirs.whole());
            }
        }
    }
}
