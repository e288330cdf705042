//! `Debug` for the message that carries secrets, so that a logged request cannot give them away.
//!
//! The generator leaves it out. Only what helps to find a mistake is shown: which image, who asks,
//! and whether a secret was given.

use std::fmt;

use crate::v1::PullRequest;

/// The output for a secret: whether there is one, but not its length.
fn presence(secret: &str) -> &'static str {
    if secret.is_empty() { "" } else { "<redacted>" }
}

impl fmt::Debug for PullRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Destructured, so that a field added to the message has to be decided on here.
        let Self { image, username, password, identity_token } = self;
        f.debug_struct("PullRequest")
            .field("image", image)
            .field("username", username)
            .field("password", &presence(password))
            .field("identity_token", &presence(identity_token))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use crate::v1::PullRequest;

    #[test]
    fn a_pull_request_prints_no_secret() {
        let request = PullRequest {
            image: "registry.example/app:1".into(),
            username: "alice".into(),
            password: "secret-1".into(),
            identity_token: "secret-2".into(),
        };
        for shown in [format!("{request:?}"), format!("{request:#?}")] {
            assert!(!shown.contains("secret"), "{shown}");
            assert!(shown.contains("alice") && shown.contains("registry.example/app:1"), "{shown}");
            assert_eq!(shown.matches("<redacted>").count(), 2, "{shown}");
        }
    }

    #[test]
    fn a_secret_that_was_not_given_looks_empty() {
        assert!(!format!("{:?}", PullRequest::default()).contains("<redacted>"));
    }
}
