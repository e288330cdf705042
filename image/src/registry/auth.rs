//! Answering a registry's challenge: Basic credentials, or a Bearer token from the token service
//! that it names.
//!
//! (docs.docker.com/reference/api/registry/auth; RFC 6750, RFC 7617.) The registry chooses the
//! token service's address, so that is where credentials get stolen. Policy:
//!
//! - HTTPS, or plain HTTP if the registry itself was configured as plain HTTP on the same host;
//!   only at addresses that a registry may name (`reach`);
//! - credentials go there only if it is the registry's own host, or shares its registrable domain
//!   (`auth.docker.io` for `registry-1.docker.io`), or the operator trusts it by name;
//! - only the registry itself gets or causes the use of credentials, never a mirror;
//! - the scope asked for is ours (`repository:<name>:pull`), not what the challenge wants.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Deserialize;
use url::{Host as UrlHost, Url};
use zeroize::Zeroizing;

use super::challenge::{self, Challenge};
use super::hosts::Endpoint;
use super::{Fault, Host, RegistryError, Session, is_temporary, retry_after};
use crate::credentials::Credentials;

/// Body of a token answer.
const MAX_TOKEN_BODY: usize = 1 << 20;

/// Why a challenge was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthError {
    /// The challenge is missing, malformed, or of no known scheme.
    #[error("registry offers no supported authentication scheme")]
    Challenge,
    /// Basic authentication is wanted, and there is no user and password for this host.
    #[error("registry requires a user name and a password")]
    NoCredentials,
    /// The token service is at an address that a registry must not send us to.
    #[error("token service address is not allowed")]
    Realm,
    /// The token service is another party than the registry, and not trusted with credentials.
    #[error("token service {0} does not belong to the registry and is not trusted with credentials")]
    ForeignRealm(String),
    /// The token service refused.
    #[error("token service answered {0}")]
    Refused(u16),
    /// The token service's answer is no token.
    #[error("token service returned no usable token")]
    NoToken,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<Zeroizing<String>>,
    access_token: Option<Zeroizing<String>>,
}

impl Session {
    /// Answers the challenge of a response from `host` itself; the result is sent from then on.
    pub(super) async fn authenticate(&self, host: &Host, headers: &HeaderMap) -> Result<(), RegistryError> {
        let refused = |source| RegistryError::Unauthorized { host: host.name.clone(), source: Some(source) };
        let challenges: Vec<Challenge> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .flat_map(|value| challenge::parse(&String::from_utf8_lossy(value.as_bytes())))
            .collect();
        let bearer = challenges.iter().find(|challenge| challenge.scheme == "bearer");
        let value = if let Some(bearer) = bearer {
            self.bearer(host, bearer).await?
        } else if challenges.iter().any(|challenge| challenge.scheme == "basic") {
            match self.credentials_for(&host.endpoint) {
                Credentials::Basic { username, password } => basic(username, password.expose()),
                _ => return Err(refused(AuthError::NoCredentials)),
            }
        } else {
            return Err(refused(AuthError::Challenge));
        };
        let mut value = value.ok_or_else(|| refused(AuthError::NoToken))?;
        value.set_sensitive(true);
        *host.authorization.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(value);
        Ok(())
    }

    fn credentials_for(&self, endpoint: &Endpoint) -> &Credentials {
        if endpoint.is_server { &self.credentials } else { &Credentials::Anonymous }
    }

    async fn bearer(&self, host: &Host, challenge: &Challenge) -> Result<Option<HeaderValue>, RegistryError> {
        let refused = |source| RegistryError::Unauthorized { host: host.name.clone(), source: Some(source) };
        let credentials = self.credentials_for(&host.endpoint);
        if let Credentials::RegistryToken(token) = credentials {
            return Ok(bearer_header(token.expose()));
        }
        let realm = challenge.get("realm").and_then(|realm| Url::parse(realm).ok());
        let realm = realm.ok_or_else(|| refused(AuthError::Challenge))?;
        let base = &host.endpoint.base;
        let own = realm.origin() == base.origin();
        if !own && !self.may_follow(host, &realm).await {
            return Err(refused(AuthError::Realm));
        }
        let is_trusted = own || self.is_trusted_realm(base, &realm);
        if !is_trusted && *credentials != Credentials::Anonymous {
            let name = realm.host_str().unwrap_or_default().to_owned();
            return Err(refused(AuthError::ForeignRealm(name)));
        }
        let client = if own { host.client.clone() } else { self.guarded(host, &realm)? };
        let scope = format!("repository:{}:pull", self.repository);
        let service = challenge.get("service").unwrap_or_default();
        let request = if let Credentials::IdentityToken(token) = credentials {
            let form = Zeroizing::new(
                url::form_urlencoded::Serializer::new(String::new())
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("service", service)
                    .append_pair("client_id", "berth")
                    .append_pair("scope", &scope)
                    .append_pair("refresh_token", token.expose())
                    .finish(),
            );
            client
                .post(realm)
                .header(http::header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.as_bytes().to_vec())
        } else {
            let mut url = realm;
            url.query_pairs_mut().append_pair("service", service).append_pair("scope", &scope);
            let mut request = client.get(url);
            if let Credentials::Basic { username, password } = credentials
                && let Some(mut value) = basic(username, password.expose())
            {
                value.set_sensitive(true);
                request = request.header(AUTHORIZATION, value);
            }
            request
        };
        let response = self.send(host, request).await?;
        match response.status() {
            StatusCode::OK => {}
            status if is_temporary(status) => {
                let source =
                    Fault::Status { status: status.as_u16(), retry_after: retry_after(response.headers()) };
                return Err(RegistryError::Unreachable { host: host.name.clone(), source });
            }
            status => return Err(refused(AuthError::Refused(status.as_u16()))),
        }
        let body = Zeroizing::new(match self.read_body(host, response, MAX_TOKEN_BODY).await {
            Err(RegistryError::TooLarge) => return Err(refused(AuthError::NoToken)),
            body => body?,
        });
        let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|_| refused(AuthError::NoToken))?;
        // Some services fill in only one of the two, and leave the other empty.
        let token = [answer.token, answer.access_token].into_iter().flatten().find(|token| !token.is_empty());
        Ok(token.and_then(|token| bearer_header(&token)))
    }

    fn is_trusted_realm(&self, base: &Url, realm: &Url) -> bool {
        let name = realm.host_str().unwrap_or_default();
        self.trusted_token_hosts.iter().any(|trusted| trusted == name) || share_site(base, realm)
    }
}

/// Whether two hosts belong to the same party, judged by their names: the same host, or the same
/// registrable domain.
///
/// Without the public suffix list, by a rule that errs towards "no": two labels in common, three
/// where the last two look like a public suffix under a country (`co.uk`). A party under such a
/// suffix that is not recognised can be named in `trusted_token_hosts`.
fn share_site(a: &Url, b: &Url) -> bool {
    let (Some(UrlHost::Domain(a)), Some(UrlHost::Domain(b))) = (a.host(), b.host()) else {
        return a.host() == b.host();
    };
    if a == b {
        return true;
    }
    let site = |name: &str| -> Option<Vec<String>> {
        let labels: Vec<&str> = name.trim_end_matches('.').rsplit('.').collect();
        let public = match labels.as_slice() {
            [top, second, ..] if top.len() == 2 && second.len() <= 3 => 2,
            _ => 1,
        };
        // A name that is a public suffix itself has no owner.
        (labels.len() > public).then(|| labels.iter().take(public + 1).map(|l| (*l).to_owned()).collect())
    };
    // Suffixes under which anyone can get a name.
    const SHARED: [&str; 6] =
        ["amazonaws.com", "azurewebsites.net", "cloudfront.net", "github.io", "herokuapp.com", "web.app"];
    match (site(a), site(b)) {
        (Some(site_a), Some(site_b)) => {
            let name: Vec<&str> = site_a.iter().rev().map(String::as_str).collect();
            site_a == site_b && !SHARED.contains(&name.join(".").as_str())
        }
        _ => false,
    }
}

fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    let plain = Zeroizing::new(format!("{username}:{password}"));
    let text = Zeroizing::new(format!("Basic {}", STANDARD.encode(plain.as_bytes())));
    HeaderValue::from_str(&text).ok()
}

/// Tokens are visible ASCII (RFC 6750, section 2.1); anything else would be a way into other
/// headers.
fn bearer_header(token: &str) -> Option<HeaderValue> {
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return None;
    }
    HeaderValue::from_str(&Zeroizing::new(format!("Bearer {token}"))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_stay_with_the_registrys_own_party() {
        for (registry, realm, same) in [
            ("https://registry-1.docker.io", "https://auth.docker.io/token", true),
            ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth", true),
            ("https://ghcr.io", "https://ghcr.io/token", true),
            ("https://r.example.co.uk", "https://auth.example.co.uk/", true),
            ("https://r.example.co.uk", "https://evil.co.uk/", false),
            ("https://r.example", "https://r.example.evil/", false),
            ("https://docker.io.evil.example", "https://auth.docker.io", false),
            ("https://a.s3.amazonaws.com", "https://evil.amazonaws.com", false),
            ("https://ghcr.io", "https://evil.io/", false),
            ("https://10.0.0.1:5000", "https://10.0.0.1:6000/", true),
            ("https://10.0.0.1", "https://10.0.0.2/", false),
            ("https://registry", "https://auth/", false),
            ("https://registry", "https://registry:8443/", true),
        ] {
            let (registry, target) = (Url::parse(registry).unwrap(), Url::parse(realm).unwrap());
            assert_eq!(share_site(&registry, &target), same, "{realm}");
        }
    }

    #[test]
    fn tokens_that_could_break_out_of_their_header_are_refused() {
        assert!(bearer_header("abc.DEF-123_~+/=").is_some());
        for token in ["", "a b", "a\r\nx: y", "a\0", "é"] {
            assert!(bearer_header(token).is_none(), "{token:?}");
        }
        assert!(bearer_header("x").unwrap().to_str().unwrap().starts_with("Bearer "));
    }
}
