//! `Debug` for the messages that carry secrets, so that a logged request cannot give them away.
//!
//! The generator leaves out `Debug` of these types; a message that contains one of them prints it
//! through the code here. Only what helps to find a mistake is shown: who, where, and whether a
//! secret was given.

use std::fmt;

use crate::v1::{AuthConfig, KeyValue};

/// Stands in for a secret of one or more bytes.
struct Redacted;

impl fmt::Debug for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

/// The output for a secret: whether there is one, but not its length.
fn presence(secret: &str) -> &dyn fmt::Debug {
    if secret.is_empty() { &"" } else { &Redacted }
}

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Destructured, so that a field added to the message has to be decided on here.
        let Self { username, password, auth, server_address, identity_token, registry_token } = self;
        f.debug_struct("AuthConfig")
            .field("username", username)
            .field("password", presence(password))
            .field("auth", presence(auth))
            .field("server_address", server_address)
            .field("identity_token", presence(identity_token))
            .field("registry_token", presence(registry_token))
            .finish()
    }
}

impl fmt::Debug for KeyValue {
    /// A container's environment is where Kubernetes puts the contents of Secrets, so only the name
    /// is shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, value } = self;
        let value: &dyn fmt::Debug = if value.is_empty() { &"" } else { &Redacted };
        f.debug_struct("KeyValue").field("key", key).field("value", value).finish()
    }
}

#[cfg(test)]
mod tests {
    use crate::v1::{AuthConfig, ContainerConfig, CreateContainerRequest, KeyValue, PullImageRequest};

    fn credentials() -> AuthConfig {
        AuthConfig {
            username: "alice".into(),
            password: "secret-1".into(),
            auth: "secret-2".into(),
            server_address: "registry.example".into(),
            identity_token: "secret-3".into(),
            registry_token: "secret-4".into(),
        }
    }

    #[test]
    fn credentials_print_no_secret() {
        for shown in [format!("{:?}", credentials()), format!("{:#?}", credentials())] {
            assert!(!shown.contains("secret"), "{shown}");
            assert!(shown.contains("alice") && shown.contains("registry.example"), "{shown}");
            assert_eq!(shown.matches("<redacted>").count(), 4, "{shown}");
        }
    }

    #[test]
    fn credentials_that_were_not_given_look_empty() {
        let shown = format!("{:?}", AuthConfig { password: String::new(), ..AuthConfig::default() });
        assert!(!shown.contains("<redacted>"), "{shown}");
    }

    #[test]
    fn a_pull_request_prints_no_secret_of_its_credentials() {
        let request = PullImageRequest { auth: Some(credentials()), ..PullImageRequest::default() };
        let shown = format!("{request:?}");
        assert!(shown.contains("alice") && !shown.contains("secret"), "{shown}");
    }

    #[test]
    fn a_create_request_prints_the_names_of_its_environment_only() {
        let envs = vec![KeyValue { key: "TOKEN".into(), value: b"secret-5".to_vec() }];
        let config = ContainerConfig { envs, ..ContainerConfig::default() };
        let request = CreateContainerRequest { config: Some(config), ..CreateContainerRequest::default() };
        let shown = format!("{request:?}");
        // The bytes could also be printed as a list of numbers: 115 is the first letter of the
        // value.
        assert!(shown.contains("TOKEN") && !shown.contains("secret") && !shown.contains("115"), "{shown}");
    }
}
