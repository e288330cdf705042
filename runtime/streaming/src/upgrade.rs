//! Which protocol a request upgrades to, or the answer that refuses it.
//!
//! | asked for | by | sub-protocols |
//! |---|---|---|
//! | SPDY/3.1 | GET or POST, `Upgrade: SPDY/3.1` | `X-Stream-Protocol-Version`, in the client's order |
//! | WebSocket | GET, `Upgrade: websocket` (RFC 6455, section 4.2) | `Sec-WebSocket-Protocol`, likewise |

use hyper::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::{Method, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::command::{self, Version};
use crate::tokens::Endpoint;
use crate::{forward, websocket};

pub(crate) const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_VERSIONS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
pub(crate) const SPDY: &str = "SPDY/3.1";

/// The protocol of a connection after the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    CommandOverSpdy(Version),
    CommandOverWebSocket(websocket::Protocol),
    ForwardOverSpdy,
    ForwardOverWebSocket,
    /// Whether it is in base64.
    ForwardOverChannels(bool),
}

/// A request that can be served.
#[derive(Debug)]
pub(crate) struct Upgrade {
    pub(crate) protocol: Protocol,
    /// For the answer 101.
    pub(crate) headers: HeaderMap,
}

/// A request that cannot be served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) text: String,
    pub(crate) headers: Box<HeaderMap>,
}

fn refused(status: StatusCode, text: impl Into<String>) -> Refused {
    Refused { status, text: text.into(), headers: Box::default() }
}

/// Looks at a request for `endpoint`.
pub(crate) fn negotiate(
    endpoint: Endpoint,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Upgrade, Refused> {
    let upgrades = listed(headers, &CONNECTION).any(|option| option.eq_ignore_ascii_case("upgrade"));
    let asked: Vec<&str> = listed(headers, &UPGRADE).collect();
    let asks_for = |name: &str| upgrades && asked.iter().any(|found| found.eq_ignore_ascii_case(name));
    if asks_for(SPDY) {
        spdy(endpoint, headers)
    } else if asks_for("websocket") {
        over_websocket(endpoint, method, headers)
    } else {
        let text = format!("not a request to upgrade to {SPDY} or WebSocket");
        Err(refused(StatusCode::BAD_REQUEST, text))
    }
}

fn spdy(endpoint: Endpoint, headers: &HeaderMap) -> Result<Upgrade, Refused> {
    let offered: Vec<&str> = listed(headers, &PROTOCOL_VERSION).collect();
    if offered.is_empty() {
        return Err(refused(StatusCode::BAD_REQUEST, "the header X-Stream-Protocol-Version is required"));
    }
    let known: Vec<(&str, Protocol)> = match endpoint {
        Endpoint::PortForward => vec![(forward::PROTOCOL, Protocol::ForwardOverSpdy)],
        Endpoint::Exec | Endpoint::Attach => command::OVER_SPDY
            .iter()
            .map(|(name, version)| (*name, Protocol::CommandOverSpdy(*version)))
            .collect(),
    };
    let (name, protocol) = chosen(&offered, &known)?;
    let mut headers = switching(SPDY);
    headers.insert(PROTOCOL_VERSION, HeaderValue::from_static(name));
    Ok(Upgrade { protocol, headers })
}

fn over_websocket(endpoint: Endpoint, method: &Method, headers: &HeaderMap) -> Result<Upgrade, Refused> {
    if method != Method::GET {
        return Err(refused(StatusCode::METHOD_NOT_ALLOWED, "a WebSocket handshake must use GET"));
    }
    if headers.get(SEC_WEBSOCKET_VERSION).map(HeaderValue::as_bytes) != Some(b"13") {
        let mut refused = refused(StatusCode::UPGRADE_REQUIRED, "WebSocket version 13 is required");
        refused.headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(refused);
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).filter(|key| key.len() == 24);
    let accept = key.map(|key| HeaderValue::from_str(&derive_accept_key(key.as_bytes())));
    let Some(Ok(accept)) = accept else {
        return Err(refused(StatusCode::BAD_REQUEST, "the header Sec-WebSocket-Key is invalid"));
    };
    let mut offered: Vec<&str> = listed(headers, &SEC_WEBSOCKET_PROTOCOL).collect();
    if offered.is_empty() {
        offered.push("");
    }
    let known: Vec<(&str, Protocol)> = match endpoint {
        Endpoint::PortForward => websocket::FOR_PORTS
            .iter()
            .map(|(name, base64)| (*name, Protocol::ForwardOverChannels(*base64)))
            .chain([(websocket::TUNNEL, Protocol::ForwardOverWebSocket)])
            .collect(),
        Endpoint::Exec | Endpoint::Attach => websocket::FOR_COMMANDS
            .iter()
            .map(|(name, protocol)| (*name, Protocol::CommandOverWebSocket(*protocol)))
            .collect(),
    };
    let (name, protocol) = chosen(&offered, &known)?;
    let mut headers = switching("websocket");
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if !name.is_empty() {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    Ok(Upgrade { protocol, headers })
}

/// The first of `offered` that is supported.
fn chosen(offered: &[&str], known: &[(&'static str, Protocol)]) -> Result<(&'static str, Protocol), Refused> {
    let mut found = offered.iter().filter_map(|name| known.iter().find(|(known, _)| known == name));
    if let Some(found) = found.next() {
        return Ok(*found);
    }
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).filter(|name| !name.is_empty()).collect();
    let mut refused = refused(
        StatusCode::FORBIDDEN,
        format!("no supported sub-protocol requested; supported are: {}", names.join(", ")),
    );
    for name in names {
        if let Ok(value) = HeaderValue::from_str(name) {
            refused.headers.append(ACCEPTED_VERSIONS, value);
        }
    }
    Err(refused)
}

fn switching(protocol: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(protocol));
    headers
}

/// The members of a header that is a list, over all of its lines (RFC 9110, section 5.6.1).
fn listed<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let lines = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|member| !member.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        headers
    }

    const UP: (&str, &str) = ("connection", "Upgrade");
    const TO_SPDY: (&str, &str) = ("upgrade", "SPDY/3.1");
    const TO_WS: (&str, &str) = ("upgrade", "websocket");
    const KEY: (&str, &str) = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    const V13: (&str, &str) = ("sec-websocket-version", "13");
    const VERSION: &str = "x-stream-protocol-version";
    const WS_PROTOCOL: &str = "sec-websocket-protocol";

    #[test]
    fn the_first_that_the_client_wants_and_is_known_is_taken() {
        let spdy = headers(&[
            UP,
            TO_SPDY,
            (VERSION, "v5.channel.k8s.io"),
            (VERSION, "v3.channel.k8s.io"),
            (VERSION, "v4.channel.k8s.io"),
        ]);
        let upgrade = negotiate(Endpoint::Exec, &Method::POST, &spdy).unwrap();
        assert_eq!(upgrade.protocol, Protocol::CommandOverSpdy(Version::V3));
        assert_eq!(upgrade.headers[VERSION], "v3.channel.k8s.io");
        let ws = headers(&[
            ("connection", "keep-alive, upgrade"),
            TO_WS,
            KEY,
            V13,
            (WS_PROTOCOL, "x, v5.channel.k8s.io,channel.k8s.io"),
        ]);
        let upgrade = negotiate(Endpoint::Attach, &Method::GET, &ws).unwrap();
        assert_eq!(upgrade.headers[SEC_WEBSOCKET_PROTOCOL], "v5.channel.k8s.io");
        // The example of RFC 6455, section 1.3.
        assert_eq!(upgrade.headers[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let none = headers(&[UP, TO_WS, KEY, V13]);
        let upgrade = negotiate(Endpoint::Exec, &Method::GET, &none).unwrap();
        assert!(!upgrade.headers.contains_key(SEC_WEBSOCKET_PROTOCOL));
        let tunnel = headers(&[UP, TO_WS, KEY, V13, (WS_PROTOCOL, "SPDY/3.1+portforward.k8s.io")]);
        let upgrade = negotiate(Endpoint::PortForward, &Method::GET, &tunnel).unwrap();
        assert_eq!(upgrade.protocol, Protocol::ForwardOverWebSocket);
        for (name, base64) in [("v4.channel.k8s.io", false), ("v4.base64.channel.k8s.io", true)] {
            let channels = headers(&[UP, TO_WS, KEY, V13, (WS_PROTOCOL, name)]);
            let upgrade = negotiate(Endpoint::PortForward, &Method::GET, &channels).unwrap();
            assert_eq!(upgrade.protocol, Protocol::ForwardOverChannels(base64));
        }
    }

    #[test]
    fn refusals_have_the_status_that_clients_know() {
        let status = |endpoint, method: &Method, pairs: &[(&'static str, &'static str)]| {
            negotiate(endpoint, method, &headers(pairs)).unwrap_err()
        };
        let (get, post) = (Method::GET, Method::POST);
        assert_eq!(status(Endpoint::Exec, &get, &[]).status, 400);
        assert_eq!(status(Endpoint::Exec, &get, &[TO_SPDY, (VERSION, "v4.channel.k8s.io")]).status, 400);
        assert_eq!(status(Endpoint::Exec, &post, &[UP, TO_SPDY]).status, 400);
        let none = status(Endpoint::PortForward, &post, &[UP, TO_SPDY, (VERSION, "v4.channel.k8s.io")]);
        assert_eq!(
            (none.status, &none.headers[ACCEPTED_VERSIONS]),
            (StatusCode::FORBIDDEN, &HeaderValue::from_static("portforward.k8s.io"))
        );
        assert_eq!(status(Endpoint::Exec, &post, &[UP, TO_WS, KEY, V13]).status, 405);
        assert_eq!(status(Endpoint::Exec, &get, &[UP, TO_WS, KEY]).status, 426);
        assert_eq!(status(Endpoint::Exec, &get, &[UP, TO_WS, V13]).status, 400);
        assert_eq!(
            status(Endpoint::Exec, &get, &[UP, TO_WS, V13, ("sec-websocket-key", "short")]).status,
            400
        );
        let unknown = [UP, TO_WS, KEY, V13, (WS_PROTOCOL, "v5.channel.k8s.io")];
        assert_eq!(status(Endpoint::PortForward, &get, &unknown).status, 403);
    }
}
