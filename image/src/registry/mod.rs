//! The registry client: manifests and blobs over the OCI distribution protocol (distribution-spec
//! 1.1, "Pull").
//!
//! A `Session` is one pull: its token is its own, so no pull ever uses what another's credentials
//! bought. Hosts are asked in the order of `hosts`; each request is tried again while that makes
//! sense; a blob goes on at the byte where it broke off, on the next host too.
//!
//! What a registry may not do: get credentials sent elsewhere (redirects carry none; token services
//! only within `auth`'s policy), make us read more than was announced, or keep us waiting forever.

mod auth;
mod challenge;
pub mod hosts;
mod proxy;
mod reach;
pub mod transport;
mod trust;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE, RETRY_AFTER,
};
use http::{HeaderMap, HeaderValue, StatusCode};
use reqwest::Response;
use url::Url;

use crate::Digest;
use crate::credentials::Credentials;
use crate::manifest::{self, Blob, MAX_DOCUMENT};
use crate::reference::{Reference, Target};
use crate::unpack::printable;
use hosts::Endpoint;
use proxy::Proxies;
use reach::Place;
use transport::Reach;
use trust::Trust;

pub use auth::AuthError;
pub use hosts::HostsError;
pub use transport::TlsError;

/// Redirects of one request.
const MAX_REDIRECTS: usize = 5;

/// Challenges of one request that are answered.
const MAX_AUTH_ROUNDS: usize = 2;

/// Body of an error answer.
const MAX_ERROR_BODY: usize = 64 * 1024;

/// Longest wait that a registry may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Tries of one blob in all, however much each brings: a registry that cuts every connection after
/// a megabyte ends too.
const MAX_BLOB_TRIES: usize = 100;

/// Time limits and numbers of tries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportLimits {
    /// To connect, TLS included. Default 15 s.
    pub connect_timeout: Duration,
    /// From a request to the headers of its answer. Default 30 s.
    pub header_timeout: Duration,
    /// A body that brings fewer than `stall_bytes` in this time of waiting has stalled. Default 60
    /// s.
    pub stall_window: Duration,
    /// See `stall_window`. Default 60 KiB, so 1 KiB/s.
    pub stall_bytes: u64,
    /// Tries of one request on one host without any progress. Default 4.
    pub tries: usize,
    /// Wait before the second try; doubles each time, with jitter. Default 250 ms.
    pub backoff: Duration,
}

impl Default for TransportLimits {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(15),
            header_timeout: Duration::from_secs(30),
            stall_window: Duration::from_secs(60),
            stall_bytes: 60 * 1024,
            tries: 4,
            backoff: Duration::from_millis(250),
        }
    }
}

/// Why a registry did not give what it was asked for. No text here holds a credential, a token or
/// the query of a URL.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No host has it.
    #[error("not found")]
    NotFound,
    /// Refused for lack of (other) credentials.
    #[error("registry host {host} refused access")]
    Unauthorized {
        /// Which host.
        host: String,
        /// What was tried, if there is more to say.
        #[source]
        source: Option<AuthError>,
    },
    /// The host is not available, at least for now.
    #[error("registry host {host} is not available")]
    Unreachable {
        /// Which host.
        host: String,
        /// What happened the last time.
        #[source]
        source: Fault,
    },
    /// Any other error answer.
    #[error("registry host {host} answered {status}{detail}")]
    Status {
        /// Which host.
        host: String,
        /// HTTP status.
        status: u16,
        /// The registry's own words, escaped, with a leading separator; or nothing.
        detail: String,
    },
    /// A forbidden redirect, or too many.
    #[error("registry host {host} redirects to a forbidden address")]
    Redirect {
        /// Which host.
        host: String,
    },
    /// Longer or shorter than announced.
    #[error("content size differs from the announced size")]
    Size,
    /// Above what is read of a document.
    #[error("document is too large")]
    TooLarge,
    /// Not the bytes that were asked for.
    #[error("content is {actual}, not {expected}")]
    DigestMismatch {
        /// Asked for.
        expected: Digest,
        /// The digest of what was received.
        actual: Digest,
    },
    /// The configuration of hosts.
    #[error("the configuration of registry hosts cannot be used")]
    Hosts(#[from] HostsError),
    /// Certificates, or the HTTP client.
    #[error("cannot set up the connection to {host}")]
    Tls {
        /// Which host.
        host: String,
        /// The cause.
        #[source]
        source: TlsError,
    },
    /// The reader of the bytes wants no more. Never leaves this crate's pull.
    #[error("the reader of the content has stopped")]
    Unwanted,
}

/// Why a host is not available.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// Below HTTP: name, connection, TLS, or a body that was cut.
    #[error("connection failed")]
    Transport(#[source] reqwest::Error),
    /// No headers in time.
    #[error("timed out waiting for an answer")]
    Timeout,
    /// The body came too slowly.
    #[error("transfer stalled")]
    Stalled,
    /// The body ended early.
    #[error("connection closed before the end of the content")]
    Cut,
    /// A status that says "try again": 408, 429, 5xx.
    #[error("status {status}")]
    Status {
        /// HTTP status.
        status: u16,
        /// How long the registry asks to wait.
        retry_after: Option<Duration>,
    },
    /// The answer to a request for a range is for another one.
    #[error("answer covers a different range")]
    WrongRange,
}

/// A document as it came.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) content_type: Option<String>,
    pub(crate) digest: Digest,
}

/// Where a blob's bytes go.
pub(crate) trait Sink: Send {
    /// Takes the next bytes, waiting for room; [`RegistryError::Unwanted`] ends the transfer.
    fn take(&mut self, bytes: Bytes) -> impl Future<Output = Result<(), RegistryError>> + Send;
}

impl Sink for BytesMut {
    async fn take(&mut self, bytes: Bytes) -> Result<(), RegistryError> {
        self.extend_from_slice(&bytes);
        Ok(())
    }
}

/// Makes sessions.
#[derive(Debug)]
pub(crate) struct Client {
    config_path: Option<PathBuf>,
    trusted_token_hosts: Vec<String>,
    limits: TransportLimits,
    proxies: Arc<Proxies>,
}

/// One pull.
#[derive(Debug)]
pub(crate) struct Session {
    repository: String,
    hosts: Vec<Host>,
    credentials: Credentials,
    trusted_token_hosts: Vec<String>,
    limits: TransportLimits,
    proxies: Arc<Proxies>,
    /// Which hosts gave which content.
    trust: Trust,
}

#[derive(Debug)]
struct Host {
    endpoint: Endpoint,
    /// `host[:port]`, for messages.
    name: String,
    client: reqwest::Client,
    /// Made when first needed: most pulls are not sent elsewhere, and it reads the system's
    /// certificates. The second is for what goes through a proxy.
    guarded: Mutex<[Option<reqwest::Client>; 2]>,
    /// What this session's requests to the host carry; never shown, it is marked sensitive.
    authorization: Mutex<Option<HeaderValue>>,
    /// No connection could be made: in this session it is not asked again while there is another
    /// that may know.
    is_down: AtomicBool,
}

impl Client {
    pub(crate) fn new(
        config_path: Option<PathBuf>,
        trusted_token_hosts: Vec<String>,
        limits: TransportLimits,
    ) -> Self {
        Self { config_path, trusted_token_hosts, limits, proxies: Arc::new(Proxies::from_environment()) }
    }

    /// A session for the repository of `reference`. Reads the configuration of hosts.
    pub(crate) fn session(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<Arc<Session>, RegistryError> {
        let mut hosts = Vec::new();
        for endpoint in hosts::endpoints(self.config_path.as_deref(), reference.domain())? {
            let name = hosts::authority(&endpoint.base);
            let timeout = self.limits.connect_timeout;
            let client = transport::client(&endpoint.base, &endpoint.tls, Reach::Configured, timeout)
                .map_err(|source| RegistryError::Tls { host: name.clone(), source })?;
            hosts.push(Host {
                endpoint,
                name,
                client,
                guarded: Mutex::new([None, None]),
                authorization: Mutex::new(None),
                is_down: AtomicBool::new(false),
            });
        }
        Ok(Arc::new(Session {
            repository: reference.repository().to_owned(),
            hosts,
            credentials: credentials.clone(),
            trusted_token_hosts: self.trusted_token_hosts.clone(),
            limits: self.limits.clone(),
            proxies: Arc::clone(&self.proxies),
            trust: Trust::default(),
        }))
    }
}

impl Session {
    /// Fetches an index or a manifest. By digest, the bytes are held against it; by tag, their
    /// digest is what the tag means now.
    pub(crate) async fn fetch_manifest(&self, target: &Target) -> Result<Fetched, RegistryError> {
        let name = match target {
            Target::Tag(tag) => tag.clone(),
            Target::Digest(digest) => digest.to_string(),
        };
        let mut last = RegistryError::NotFound;
        let mut unreadable = None;
        let may =
            |endpoint: &Endpoint| endpoint.pull && (endpoint.resolve || matches!(target, Target::Digest(_)));
        for (_, host, is_last) in self.hosts_that(|_, endpoint| may(endpoint)) {
            match self.manifest_from(host, is_last, target, &name).await {
                Ok(fetched) => match manifest::parse(&fetched.bytes, fetched.content_type.as_deref()) {
                    Ok(_) => return Ok(fetched),
                    // An HTML page, or something damaged: another host may have the manifest.
                    Err(error) => {
                        if !is_last {
                            let error: &dyn std::error::Error = &error;
                            tracing::warn!(host = %host.name, error, "registry host returned no manifest");
                        }
                        unreadable.get_or_insert(fetched);
                    }
                },
                Err(error) => last = error,
            }
        }
        // What is wrong with it is for the reader to say.
        unreadable.ok_or(last)
    }

    /// The hosts to ask, in order: the place of each, and whether it is the last. One that is down
    /// is passed over, unless it is the only one left.
    fn hosts_that(
        &self,
        may: impl Fn(usize, &Endpoint) -> bool,
    ) -> impl Iterator<Item = (usize, &Host, bool)> {
        let hosts: Vec<(usize, &Host)> =
            self.hosts.iter().enumerate().filter(|(place, host)| may(*place, &host.endpoint)).collect();
        let count = hosts.len();
        hosts
            .into_iter()
            .enumerate()
            .map(move |(nth, (place, host))| (place, host, nth + 1 == count))
            .filter(|(_, host, is_last)| *is_last || !host.is_down.load(Ordering::Relaxed))
    }

    /// Says that the content that came for `digest` is not what it names. True if another host may
    /// have the right one: the one that gave the first of these bytes is not asked for them again.
    pub(crate) fn distrust(&self, digest: Digest) -> bool {
        let Some(place) = self.trust.blame(digest) else { return false };
        if let Some(host) = self.hosts.get(place) {
            tracing::warn!(host = %host.name, %digest, "registry host returned content that does not match its digest");
        }
        self.hosts_that(|place, endpoint| endpoint.pull && self.trust.has(place, digest)).next().is_some()
    }

    async fn manifest_from(
        &self,
        host: &Host,
        is_last: bool,
        target: &Target,
        name: &str,
    ) -> Result<Fetched, RegistryError> {
        let accept = HeaderValue::from_str(&manifest::ACCEPTED.join(", ")).ok();
        let mut tries = 0;
        loop {
            let attempt = async {
                let headers: HeaderMap = accept.clone().map(|value| (ACCEPT, value)).into_iter().collect();
                let response = self.request(host, &format!("manifests/{name}"), &headers).await?;
                let text = |name: &str| {
                    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
                };
                let content_type = text(CONTENT_TYPE.as_str());
                let stated = text("docker-content-digest").and_then(|text| Digest::parse(&text).ok());
                let bytes = self.read_body(host, response, MAX_DOCUMENT).await?;
                let digest = Digest::of(&bytes);
                let wanted = match target {
                    Target::Digest(wanted) => Some(*wanted),
                    Target::Tag(_) => stated,
                };
                match wanted {
                    Some(expected) if expected != digest => {
                        Err(RegistryError::DigestMismatch { expected, actual: digest })
                    }
                    _ => Ok(Fetched { bytes, content_type, digest }),
                }
            };
            let error = match attempt.await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => error,
            };
            tries += 1;
            self.wait_or_give_up(host, is_last, error, tries).await?;
        }
    }

    /// Fetches a blob of at most `limit` bytes whole, and holds it against its digest.
    pub(crate) async fn fetch_small(&self, blob: Blob, limit: usize) -> Result<Vec<u8>, RegistryError> {
        if blob.size > limit as u64 {
            return Err(RegistryError::TooLarge);
        }
        loop {
            let mut bytes = BytesMut::new();
            self.fetch_blob(blob, &mut bytes).await?;
            let actual = Digest::of(&bytes);
            if actual == blob.digest {
                return Ok(bytes.into());
            }
            if !self.distrust(blob.digest) {
                return Err(RegistryError::DigestMismatch { expected: blob.digest, actual });
            }
        }
    }

    /// Fetches a blob piece by piece: exactly as many bytes as the descriptor says, in order, each
    /// once. The digest is the receiver's business.
    pub(crate) async fn fetch_blob(&self, blob: Blob, sink: &mut impl Sink) -> Result<(), RegistryError> {
        let mut progress = BlobProgress { offset: 0, ranges: true };
        let mut last = RegistryError::NotFound;
        let mut all_tries = 0;
        self.trust.begin(blob.digest);
        let may = |place, endpoint: &Endpoint| endpoint.pull && self.trust.has(place, blob.digest);
        for (place, host, is_last) in self.hosts_that(may) {
            let mut tries = 0;
            loop {
                let before = progress.offset;
                let got = self.blob_from(host, blob, &mut progress, sink).await;
                if progress.offset > before {
                    self.trust.note(place, blob.digest);
                }
                let error = match got {
                    Ok(()) => return Ok(()),
                    Err(error @ RegistryError::Unwanted) => return Err(error),
                    Err(error) => error,
                };
                if let RegistryError::Unreachable { source: Fault::WrongRange, .. } = error {
                    progress.ranges = false;
                }
                // A trickle also delivers something each time, but that is not progress.
                let stalled = matches!(error, RegistryError::Unreachable { source: Fault::Stalled, .. });
                tries = if progress.offset > before && !stalled { 1 } else { tries + 1 };
                all_tries += 1;
                if all_tries >= MAX_BLOB_TRIES {
                    return Err(error);
                }
                if let Err(error) = self.wait_or_give_up(host, is_last, error, tries).await {
                    last = error;
                    break;
                }
            }
        }
        Err(last)
    }

    async fn blob_from(
        &self,
        host: &Host,
        blob: Blob,
        progress: &mut BlobProgress,
        sink: &mut impl Sink,
    ) -> Result<(), RegistryError> {
        if progress.offset == blob.size && blob.size > 0 {
            return Ok(());
        }
        let mut headers = HeaderMap::new();
        if progress.offset > 0
            && progress.ranges
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", progress.offset))
        {
            headers.insert(RANGE, range);
        }
        let asked_for_range = headers.contains_key(RANGE);
        let mut response = self.request(host, &format!("blobs/{}", blob.digest), &headers).await?;
        let unavailable = |source| RegistryError::Unreachable { host: host.name.clone(), source };
        let from = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let stated = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                if !asked_for_range
                    || !stated.is_some_and(|text| is_range_from(text, progress.offset, blob.size))
                {
                    return Err(unavailable(Fault::WrongRange));
                }
                progress.offset
            }
            // The whole blob again: what came before is skipped. The digest will tell whether it
            // was the same.
            _ => 0,
        };
        if response.content_length().is_some_and(|length| length != blob.size - from) {
            return Err(RegistryError::Size);
        }
        let mut skip = progress.offset - from;
        let mut watch = StallWatch::new(&self.limits);
        while let Some(mut piece) = self.next_piece(host, &mut response, &mut watch).await? {
            let skipped = skip.min(piece.len() as u64);
            skip -= skipped;
            drop(piece.split_to(usize::try_from(skipped).unwrap_or(piece.len())));
            if piece.is_empty() {
                continue;
            }
            if piece.len() as u64 > blob.size - progress.offset {
                return Err(RegistryError::Size);
            }
            progress.offset += piece.len() as u64;
            sink.take(piece).await?;
        }
        if progress.offset == blob.size { Ok(()) } else { Err(unavailable(Fault::Cut)) }
    }

    /// Sleeps before the next attempt on a host, or returns that there is none.
    async fn wait_or_give_up(
        &self,
        host: &Host,
        is_last: bool,
        error: RegistryError,
        tries: usize,
    ) -> Result<(), RegistryError> {
        let RegistryError::Unreachable { source, .. } = &error else { return Err(error) };
        if matches!(source, Fault::Transport(cause) if cause.is_connect()) && !is_last {
            host.is_down.store(true, Ordering::Relaxed);
            return Err(error);
        }
        if tries >= self.limits.tries.max(1) {
            return Err(error);
        }
        let doubled = self.limits.backoff * 2_u32.pow(u32::try_from(tries.clamp(1, 10) - 1).unwrap_or(0));
        let wait = match source {
            Fault::Status { retry_after: Some(wait), .. } => (*wait).max(doubled),
            _ => doubled,
        };
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            tries,
            "registry request failed; trying again"
        );
        tokio::time::sleep(wait + jitter(doubled)).await;
        Ok(())
    }

    /// Sends a GET to a host, answers challenges, follows redirects. Gives answers of success only.
    async fn request(&self, host: &Host, path: &str, headers: &HeaderMap) -> Result<Response, RegistryError> {
        let mut url = host.endpoint.base.clone();
        url.set_path(&format!("{}/{}/{path}", host.endpoint.base.path(), self.repository));
        if let Some(namespace) = &host.endpoint.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let mut rounds = 0;
        loop {
            let response = self.follow(host, url.clone(), headers).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            match status {
                StatusCode::UNAUTHORIZED if rounds < MAX_AUTH_ROUNDS => {
                    rounds += 1;
                    self.authenticate(host, response.headers()).await?;
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    return Err(RegistryError::Unauthorized { host: host.name.clone(), source: None });
                }
                StatusCode::NOT_FOUND => return Err(RegistryError::NotFound),
                StatusCode::RANGE_NOT_SATISFIABLE => {
                    return Err(RegistryError::Unreachable {
                        host: host.name.clone(),
                        source: Fault::WrongRange,
                    });
                }
                _ if is_temporary(status) => {
                    let retry_after = retry_after(response.headers());
                    let source = Fault::Status { status: status.as_u16(), retry_after };
                    return Err(RegistryError::Unreachable { host: host.name.clone(), source });
                }
                _ => {
                    let detail = self.error_detail(host, response).await;
                    return Err(RegistryError::Status {
                        host: host.name.clone(),
                        status: status.as_u16(),
                        detail,
                    });
                }
            }
        }
    }

    /// Follows redirects by hand: what was configured for the host goes to that very host, nothing
    /// of it to any other.
    async fn follow(
        &self,
        host: &Host,
        mut url: Url,
        headers: &HeaderMap,
    ) -> Result<Response, RegistryError> {
        let refused = || RegistryError::Redirect { host: host.name.clone() };
        for _ in 0..=MAX_REDIRECTS {
            let own = url.origin() == host.endpoint.base.origin();
            let client = if own { host.client.clone() } else { self.guarded(host, &url)? };
            let mut request = client.get(url.clone()).headers(headers.clone());
            // The digest is of the bytes as stored: they must not be compressed again on the way.
            request = request.header(ACCEPT_ENCODING, "identity");
            if own {
                for (name, value) in &host.endpoint.headers {
                    request = request.header(name, value);
                }
                let authorization = host.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(authorization) = authorization {
                    request = request.header(AUTHORIZATION, authorization);
                }
            }
            let response = self.send(host, request).await?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                // Challenges of other hosts are not answered.
                if !own && response.status() == StatusCode::UNAUTHORIZED {
                    return Err(RegistryError::Unauthorized { host: host.name.clone(), source: None });
                }
                return Ok(response);
            }
            let location =
                response.headers().get(LOCATION).and_then(|value| value.to_str().ok()).ok_or_else(refused)?;
            let next = url.join(location).map_err(|_| refused())?;
            if next.origin() != host.endpoint.base.origin() && !self.may_follow(host, &next).await {
                return Err(refused());
            }
            url = next;
        }
        Err(refused())
    }

    async fn send(&self, host: &Host, request: reqwest::RequestBuilder) -> Result<Response, RegistryError> {
        let unavailable = |source| RegistryError::Unreachable { host: host.name.clone(), source };
        match tokio::time::timeout(self.limits.header_timeout, request.send()).await {
            Err(_) => Err(unavailable(Fault::Timeout)),
            // The URL may have a signature in it.
            Ok(sent) => sent.map_err(|error| unavailable(Fault::Transport(error.without_url()))),
        }
    }

    /// The client for a URL that a registry named.
    fn guarded(&self, host: &Host, url: &Url) -> Result<reqwest::Client, RegistryError> {
        let mut guarded = host.guarded.lock().unwrap_or_else(PoisonError::into_inner);
        let base = &host.endpoint.base;
        let is_proxied = self.proxies.has(url);
        let [direct, proxied] = &mut *guarded;
        let (client, reach) = if is_proxied {
            (proxied, Reach::Proxied)
        } else {
            (direct, Reach::Guarded { loopback: hosts::is_loopback(base) })
        };
        if let Some(client) = client {
            return Ok(client.clone());
        }
        let made = transport::client(base, &host.endpoint.tls, reach, self.limits.connect_timeout)
            .map_err(|source| RegistryError::Tls { host: host.name.clone(), source })?;
        *client = Some(made.clone());
        Ok(made)
    }

    /// Whether the registry at `host` may send us to this URL: see `reach` and `proxy`.
    async fn may_follow(&self, host: &Host, to: &Url) -> bool {
        let base = &host.endpoint.base;
        if !reach::has_allowed_form(base, to) {
            return false;
        }
        let registry_is_here = hosts::is_loopback(base);
        match reach::place_of_host(to) {
            Some(Place::Public) => true,
            Some(Place::Private) => registry_is_here || self.is_private(base).await,
            Some(Place::Loopback) => registry_is_here,
            Some(Place::Forbidden) => false,
            None => !self.proxies.has(to) || proxy::may_ask_for(to, registry_is_here).await,
        }
    }

    /// Whether a registry has private addresses only.
    async fn is_private(&self, base: &Url) -> bool {
        if let Some(place) = reach::place_of_host(base) {
            return place == Place::Private;
        }
        let Some(url::Host::Domain(name)) = base.host() else { return false };
        if self.proxies.has(base) {
            return false;
        }
        let lookup = tokio::net::lookup_host((name, 0));
        let Ok(Ok(found)) = tokio::time::timeout(self.limits.connect_timeout, lookup).await else {
            return false;
        };
        let places: Vec<Place> = found.map(|address| reach::place_of(address.ip())).collect();
        !places.is_empty() && places.iter().all(|place| *place == Place::Private)
    }

    /// Reads a body of at most `limit` bytes.
    async fn read_body(
        &self,
        host: &Host,
        mut response: Response,
        limit: usize,
    ) -> Result<Vec<u8>, RegistryError> {
        if response.content_length().is_some_and(|length| length > limit as u64) {
            return Err(RegistryError::TooLarge);
        }
        let mut body = Vec::new();
        let mut watch = StallWatch::new(&self.limits);
        while let Some(piece) = self.next_piece(host, &mut response, &mut watch).await? {
            if body.len() + piece.len() > limit {
                return Err(RegistryError::TooLarge);
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    async fn next_piece(
        &self,
        host: &Host,
        response: &mut Response,
        watch: &mut StallWatch,
    ) -> Result<Option<Bytes>, RegistryError> {
        let unavailable = |source| RegistryError::Unreachable { host: host.name.clone(), source };
        let started = Instant::now();
        let piece = match tokio::time::timeout(watch.left(), response.chunk()).await {
            Err(_) => return Err(unavailable(Fault::Stalled)),
            Ok(piece) => piece.map_err(|error| unavailable(Fault::Transport(error.without_url())))?,
        };
        if let Some(piece) = &piece
            && watch.has_stalled(started.elapsed(), piece.len() as u64)
        {
            return Err(unavailable(Fault::Stalled));
        }
        Ok(piece)
    }

    /// What a registry says about an error (distribution-spec 1.1, "Error Codes").
    async fn error_detail(&self, host: &Host, response: Response) -> String {
        #[derive(serde::Deserialize)]
        struct Errors {
            errors: Vec<OneError>,
        }
        #[derive(serde::Deserialize)]
        struct OneError {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        const LONGEST: usize = 200;
        let Ok(body) = self.read_body(host, response, MAX_ERROR_BODY).await else { return String::new() };
        let errors = serde_json::from_slice::<Errors>(&body).map(|body| body.errors).unwrap_or_default();
        let Some(first) = errors.first() else { return String::new() };
        let text: String = format!("{}: {}", first.code, first.message).chars().take(LONGEST).collect();
        format!(": {}", printable(text.as_bytes()))
    }
}

#[derive(Debug)]
struct BlobProgress {
    /// Bytes that the receiver has.
    offset: u64,
    /// The registry has answered requests for ranges sensibly so far.
    ranges: bool,
}

/// Notices bodies that trickle. Only the time spent waiting for the network counts, not what the
/// receiver takes.
#[derive(Debug)]
struct StallWatch {
    window: Duration,
    least: u64,
    waited: Duration,
    received: u64,
}

impl StallWatch {
    fn new(limits: &TransportLimits) -> Self {
        Self { window: limits.stall_window, least: limits.stall_bytes, waited: Duration::ZERO, received: 0 }
    }

    fn left(&self) -> Duration {
        self.window.saturating_sub(self.waited)
    }

    fn has_stalled(&mut self, waited: Duration, received: u64) -> bool {
        self.waited += waited;
        self.received += received;
        if self.received >= self.least {
            (self.waited, self.received) = (Duration::ZERO, 0);
        }
        self.waited >= self.window
    }
}

fn is_temporary(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429)
}

/// Seconds only; the form with a date is not worth its trouble here.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

/// `bytes <from>-<last>/<size or *>` with exactly this start (RFC 9110, section 14.4).
fn is_range_from(text: &str, from: u64, size: u64) -> bool {
    let Some((range, total)) = text.strip_prefix("bytes ").and_then(|rest| rest.split_once('/')) else {
        return false;
    };
    let Some((first, last)) = range.split_once('-') else { return false };
    let number =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    number(first) == Some(from)
        && number(last).is_some_and(|last| last >= from && last < size)
        && (total == "*" || number(total) == Some(size))
}

/// Up to half of `wait`, so that many nodes that failed together do not come back together.
fn jitter(wait: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    let random = RandomState::new().hash_one(0_u8) % 1000;
    wait / 2 * u32::try_from(random).unwrap_or(0) / 1000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_exact_range_is_taken() {
        for (text, fine) in [
            ("bytes 10-99/100", true),
            ("bytes 10-50/100", true),
            ("bytes 10-99/*", true),
            ("bytes 0-99/100", false),
            ("bytes 11-99/100", false),
            ("bytes 10-100/100", false),
            ("bytes 10-99/101", false),
            ("bytes 10-9/100", false),
            ("bytes +10-99/100", false),
            ("bytes */100", false),
            ("lines 10-99/100", false),
            ("", false),
        ] {
            assert_eq!(is_range_from(text, 10, 100), fine, "{text:?}");
        }
    }

    #[test]
    fn a_trickle_is_a_stall_and_a_slow_receiver_is_not() {
        let limits = TransportLimits {
            stall_window: Duration::from_secs(10),
            stall_bytes: 100,
            ..TransportLimits::default()
        };
        let mut watch = StallWatch::new(&limits);
        assert!((0..9).all(|_| !watch.has_stalled(Duration::from_secs(1), 1)));
        assert!(watch.has_stalled(Duration::from_secs(1), 1));
        let mut watch = StallWatch::new(&limits);
        assert!((0..1000).all(|_| !watch.has_stalled(Duration::from_secs(1), 20)));
    }

    #[tokio::test]
    async fn a_registry_names_places_of_its_own_kind_only() {
        let session = |name: &str| {
            let reference = Reference::parse(&format!("{name}/a:b")).unwrap();
            Client::new(None, Vec::new(), TransportLimits::default())
                .session(&reference, &Credentials::Anonymous)
                .unwrap()
        };
        let (public, private, here) =
            (session("203.0.113.5:5000"), session("10.9.8.7:5000"), session("127.0.0.1:5000"));
        for (to, by_public, by_private, by_local) in [
            ("https://cdn.invalid/x", true, true, true),
            ("https://8.8.8.8/x", true, true, true),
            ("https://[64:ff9b::808:808]/", true, true, true),
            ("https://10.0.0.1/", false, true, true),
            ("https://192.168.1.1/", false, true, true),
            ("https://100.64.0.1/", false, true, true),
            ("https://[fd12::1]/", false, true, true),
            ("https://[::10.0.0.1]/", false, true, true),
            ("https://[64:ff9b::10.0.0.1]/", false, true, true),
            ("https://[64:ff9b:1::1]/", false, true, true),
            ("https://[2002:a00:1::1]/", false, true, true),
            ("https://127.0.0.1/", false, false, true),
            ("https://[::127.0.0.1]/", false, false, true),
            ("https://localhost/", false, false, true),
            ("https://2130706433/", false, false, true),
            ("https://169.254.169.254/", false, false, false),
            ("https://[64:ff9b::169.254.169.254]/", false, false, false),
            ("https://[::169.254.169.254]/", false, false, false),
            ("https://[fe80::1]/", false, false, false),
            ("https://0.0.0.0/", false, false, false),
            ("http://cdn.invalid/x", false, false, false),
        ] {
            let url = Url::parse(to).unwrap();
            for (session, allowed) in [(&public, by_public), (&private, by_private), (&here, by_local)] {
                let host = &session.hosts[0];
                assert_eq!(session.may_follow(host, &url).await, allowed, "{} to {to}", host.name);
            }
        }
    }

    #[test]
    fn retry_after_is_bounded() {
        let of = |text: &str| {
            let headers: HeaderMap =
                [(RETRY_AFTER, HeaderValue::from_str(text).unwrap())].into_iter().collect();
            retry_after(&headers)
        };
        assert_eq!(of("10"), Some(Duration::from_secs(10)));
        assert_eq!(of("99999999"), Some(MAX_RETRY_AFTER));
        assert_eq!(of("-1"), None);
        assert_eq!(of("Fri, 31 Dec 1999 23:59:59 GMT"), None);
    }

    proptest! {
        #[test]
        fn any_content_range_ends_in_a_result(text in any::<String>()) {
            let _ = is_range_from(&text, 1, 2);
        }
    }
}
