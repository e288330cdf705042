//! Content digests: the one algorithm that the store supports, validated on construction.
//!
//! A digest becomes a file name in the store, so no untrusted text may reach a path without having
//! passed [`Digest::parse`]. Only `sha256` is accepted: registries and builders use nothing else,
//! and a second algorithm would mean a second name for the same bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// Length of a sha256 in hexadecimal digits.
const HEX_LEN: usize = 64;

/// A `sha256:<64 lower-case hexadecimal digits>` digest (OCI image-spec 1.1, descriptor.md,
/// "Digests").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Why a text is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDigestError {
    /// The algorithm is missing or is not `sha256`.
    #[error("digest algorithm is not sha256")]
    Algorithm,
    /// The value is not exactly 64 lower-case hexadecimal digits.
    #[error("digest value is not 64 lower-case hexadecimal digits")]
    Value,
}

impl Digest {
    /// Parses `sha256:<hex>`; nothing else, not even upper-case digits, is taken.
    ///
    /// # Errors
    /// [`ParseDigestError`] says which half was wrong.
    pub fn parse(text: &str) -> Result<Self, ParseDigestError> {
        let value = text.strip_prefix("sha256:").ok_or(ParseDigestError::Algorithm)?;
        Self::from_hex(value)
    }

    /// Parses the 64 lower-case hexadecimal digits alone, as file names in the store have them.
    ///
    /// # Errors
    /// [`ParseDigestError::Value`].
    pub fn from_hex(value: &str) -> Result<Self, ParseDigestError> {
        if value.len() != HEX_LEN || !value.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ParseDigestError::Value);
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(value, &mut bytes).map_err(|_| ParseDigestError::Value)?;
        Ok(Self(bytes))
    }

    /// The digest of `content`.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }

    /// The digest that a finished hasher holds.
    pub(crate) fn from_hasher(hasher: Sha256) -> Self {
        Self(hasher.finalize().into())
    }

    /// The 64 hexadecimal digits without the algorithm.
    #[must_use]
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn digest_of_nothing_is_the_known_one_and_round_trips() {
        assert_eq!(Digest::of(b"").to_string(), EMPTY);
        assert_eq!(Digest::parse(EMPTY).unwrap().to_string(), EMPTY);
    }

    #[test]
    fn odd_digests_are_refused() {
        let hex = &EMPTY[7..];
        for (text, why) in [
            (String::new(), ParseDigestError::Algorithm),
            (hex.to_owned(), ParseDigestError::Algorithm),
            (format!("sha1:{hex}"), ParseDigestError::Algorithm),
            (format!("sha512:{hex}{hex}"), ParseDigestError::Algorithm),
            (format!("SHA256:{hex}"), ParseDigestError::Algorithm),
            (format!("sha256:{}", hex.to_uppercase()), ParseDigestError::Value),
            (format!("sha256:{}", &hex[1..]), ParseDigestError::Value),
            (format!("sha256:{hex}0"), ParseDigestError::Value),
            (format!("sha256:../../{}", &hex[6..]), ParseDigestError::Value),
            (format!("sha256:{}\0", &hex[1..]), ParseDigestError::Value),
            (format!(" sha256:{hex}"), ParseDigestError::Algorithm),
        ] {
            assert_eq!(Digest::parse(&text), Err(why), "{text:?}");
        }
    }
}
