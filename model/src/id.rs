//! Ids of sandboxes and containers: 64 lower-case hex digits.
//!
//! No dash and nothing else: the kubelet and cAdvisor cut the id out of the name of a cgroup.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Length of an id in characters.
pub const LENGTH: usize = 64;

/// The text is not an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an id is {LENGTH} lower-case hex digits")]
pub struct InvalidId;

fn check(text: &str) -> Result<(), InvalidId> {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() == LENGTH && text.bytes().all(hex) { Ok(()) } else { Err(InvalidId) }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// The id made of these 32 bytes, which should be random.
            #[must_use]
            pub fn from_bytes(bytes: [u8; LENGTH / 2]) -> Self {
                Self(hex::encode(bytes).into())
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// The id of a pod sandbox.
    SandboxId
);
id!(
    /// The id of a container.
    ContainerId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hex_of_the_right_length_is_an_id() {
        let good = "0123456789abcdef".repeat(4);
        assert_eq!(good.parse::<ContainerId>().unwrap().as_str(), good);
        for bad in [
            "",
            "0",
            &good[1..],
            &format!("{good}0"),
            &good.to_uppercase(),
            &good.replace('0', "-"),
            &"é".repeat(32),
        ] {
            assert_eq!(bad.parse::<SandboxId>(), Err(InvalidId), "{bad:?}");
        }
    }

    #[test]
    fn bytes_become_an_id_that_parses() {
        let id = SandboxId::from_bytes([0xa0; 32]);
        assert_eq!(id.as_str().parse(), Ok(id.clone()));
    }
}
