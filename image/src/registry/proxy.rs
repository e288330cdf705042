//! The proxies of the daemon's environment (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`),
//! and what is checked behind them.
//!
//! A proxy is the operator's, so it is connected to wherever it is, on this machine too. It
//! resolves the names of the hosts that it connects to, and a connection by it comes from where it
//! is; so for a URL that a registry named, and that goes through a proxy:
//!
//! - its form and an address in it are judged as without a proxy;
//! - a name that this node can resolve must not have an address that would be refused without a
//!   proxy; one that this node cannot resolve is left to the proxy;
//! - a registry that has a name counts as public: what address it has is the proxy's business.
//!
//! Whatever the proxy connects to, TLS is with the host itself, so only who has a certificate for
//! the name gets a request.
//!
//! This machine is never reached by a proxy.

use std::fmt;
use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use url::Url;

use super::hosts::is_loopback;
use super::reach;

/// How long a name is looked up that the proxy will look up again. Nodes behind a proxy often have
/// no DNS of the world.
const LOOKUP: Duration = Duration::from_secs(2);

/// Which URLs go through a proxy. The same rules as those of the HTTP clients, which read the same
/// variables.
pub(crate) struct Proxies(Matcher);

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The variables may have passwords.
        f.write_str("Proxies(..)")
    }
}

impl Proxies {
    pub(crate) fn from_environment() -> Self {
        Self(Matcher::from_env())
    }

    /// Whether a request for this URL goes through a proxy.
    pub(crate) fn has(&self, url: &Url) -> bool {
        !is_loopback(url) && url.as_str().parse().is_ok_and(|uri| self.0.intercept(&uri).is_some())
    }
}

/// Whether a proxy may be asked for this URL, as far as this node can tell.
pub(crate) async fn may_ask_for(url: &Url, registry_is_here: bool) -> bool {
    let Some(url::Host::Domain(name)) = url.host() else { return true };
    match tokio::time::timeout(LOOKUP, tokio::net::lookup_host((name, 0))).await {
        Ok(Ok(mut found)) => found.all(|address| reach::may_connect(address.ip(), registry_is_here)),
        Ok(Err(_)) | Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_and_exceptions_are_reached_without_a_proxy() {
        let proxies =
            Proxies(Matcher::builder().https("http://127.0.0.1:3128").no("corp.example,10.0.0.0/8").build());
        for (url, through) in [
            ("https://registry.example/v2", true),
            ("http://registry.example/v2", false),
            ("https://a.corp.example/", false),
            ("https://10.1.2.3/", false),
            ("https://127.0.0.1/", false),
            ("https://localhost:5000/", false),
        ] {
            assert_eq!(proxies.has(&Url::parse(url).unwrap()), through, "{url}");
        }
    }

    #[tokio::test]
    async fn names_of_this_machine_are_not_asked_for() {
        // Of the file that every resolver reads first.
        let of = |url: &str| Url::parse(url).unwrap();
        assert!(!may_ask_for(&of("https://localhost/"), false).await);
        assert!(may_ask_for(&of("https://localhost/"), true).await);
        assert!(may_ask_for(&of("https://no-such-name.invalid/"), false).await);
    }
}
