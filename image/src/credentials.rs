//! Credentials of a pull for a registry.
//!
//! Secrets exist here and in the one request header that carries them. The types have no `Debug`
//! that shows them, no `Display`, no `Serialize`; their memory is wiped when they go.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

/// A secret text. Wiped on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes ownership of the text.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text, for the one place that sends it.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How to authenticate to the registry of one reference. Never sent to mirrors, nor to a host that
/// a registry names in a redirect; to a token service only within the policy of the registry
/// module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing: public images.
    #[default]
    Anonymous,
    /// User name and password: for Basic authentication, and to ask a token service for a Bearer
    /// token.
    Basic {
        /// User name; must not contain a colon (RFC 7617, section 2).
        username: String,
        /// Password.
        password: Secret,
    },
    /// An OAuth2 refresh token that the token service trades for a Bearer token (CRI
    /// `AuthConfig.identity_token`).
    IdentityToken(Secret),
    /// A Bearer token to be sent to the registry as it is (CRI `AuthConfig.registry_token`).
    RegistryToken(Secret),
}

/// Why an encoded `user:password` could not be read. Does not reveal its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the auth field is not base64 of user:password")]
pub struct InvalidAuthField;

impl Credentials {
    /// Decodes base64 of `user:password`, as in CRI's `AuthConfig.auth` and docker's `config.json`.
    /// NUL bytes around it are dropped, as docker clients pad with them.
    ///
    /// # Errors
    /// [`InvalidAuthField`] if it is not base64, not UTF-8, or has no colon.
    pub fn from_auth_field(text: &str) -> Result<Self, InvalidAuthField> {
        let bytes = Zeroizing::new(STANDARD.decode(text.trim()).map_err(|_| InvalidAuthField)?);
        let plain = std::str::from_utf8(&bytes).map_err(|_| InvalidAuthField)?;
        let (user, password) = plain.trim_matches('\0').split_once(':').ok_or(InvalidAuthField)?;
        Ok(Self::Basic { username: user.to_owned(), password: Secret::new(password.to_owned()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_never_shows_a_secret() {
        let all = [
            Credentials::Basic { username: "ann".into(), password: Secret::new("hunter2".into()) },
            Credentials::IdentityToken(Secret::new("hunter2".into())),
            Credentials::RegistryToken(Secret::new("hunter2".into())),
        ];
        for credentials in all {
            assert!(!format!("{credentials:?}").contains("hunter2"));
        }
    }

    #[test]
    fn auth_field_is_decoded_with_colons_in_the_password() {
        let encoded = STANDARD.encode("ann:a:b");
        let wanted = Credentials::Basic { username: "ann".into(), password: Secret::new("a:b".into()) };
        assert_eq!(Credentials::from_auth_field(&encoded), Ok(wanted));
        for odd in ["", "%%%", &STANDARD.encode("nocolon"), &STANDARD.encode([0xff, b':', 0xfe])] {
            assert_eq!(Credentials::from_auth_field(odd), Err(InvalidAuthField), "{odd:?}");
        }
    }
}
