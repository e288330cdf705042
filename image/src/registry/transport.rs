//! HTTP clients and where they may connect to.
//!
//! Each configured host has a client with its TLS settings, which talks to that host alone. Whatever a registry points at (a redirect, a
//! token service) is reached by the *guarded* client: it has no client certificate and does not connect to addresses that belong to this
//! machine or to the link (cloud metadata), whatever the name resolves to at that moment.

use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use url::{Host, Url};

use super::hosts::{TlsSettings, is_loopback};

/// Headers of a response together.
const MAX_HEADERS: u32 = 64 * 1024;

/// Number of headers of an HTTP/1 response.
const MAX_HEADER_COUNT: usize = 256;

/// Why a client could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A certificate or key file cannot be read.
    #[error("read {path}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// A certificate or key cannot be used.
    #[error("use the certificates")]
    Rejected(#[source] rustls::Error),
    /// The HTTP library.
    #[error("set up HTTP")]
    Http(#[source] reqwest::Error),
}

/// Whom a client may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The host that an operator configured.
    Configured,
    /// Hosts that a registry named. `loopback` allows this machine, for registries that are on it themselves.
    Guarded { loopback: bool },
}

/// The system's authorities, read when the first TLS connection is made.
pub(crate) fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    Arc::clone(ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(
                error = error as &dyn std::error::Error,
                "part of the system's certificates cannot be read"
            );
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(found.certs);
        Arc::new(roots)
    }))
}

/// A client for `url`'s host, or for the hosts that it names.
pub(crate) fn client(
    url: &Url,
    tls: &TlsSettings,
    reach: Reach,
    connect_timeout: Duration,
) -> Result<reqwest::Client, TlsError> {
    // Plain HTTP needs no authorities, and reading them takes longer than a small pull from this machine.
    let encrypted = url.scheme() == "https" || matches!(reach, Reach::Guarded { .. });
    let config = tls_config(tls, reach, encrypted)?;
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(config)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(connect_timeout)
        .http1_max_headers(MAX_HEADER_COUNT)
        .http2_max_header_list_size(MAX_HEADERS)
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")));
    if let Reach::Guarded { loopback } = reach {
        builder = builder.dns_resolver(Arc::new(GuardedResolver { loopback }));
    }
    if is_loopback(url) {
        builder = builder.no_proxy();
    }
    builder.build().map_err(TlsError::Http)
}

fn tls_config(tls: &TlsSettings, reach: Reach, encrypted: bool) -> Result<ClientConfig, TlsError> {
    let mut roots = if encrypted { (*system_roots()).clone() } else { RootCertStore::empty() };
    for path in &tls.ca {
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(TlsError::Rejected)?;
        }
    }
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Rejected)?;
    let own = reach == Reach::Configured;
    let builder = if tls.skip_verify && own {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(NoVerification(provider)))
    } else {
        builder.with_root_certificates(roots)
    };
    let mut config = match &tls.client {
        Some((certificate_path, key_path)) if own => {
            let key_path = key_path.as_ref().unwrap_or(certificate_path);
            let key = PrivateKeyDer::from_pem_file(key_path)
                .map_err(|source| TlsError::Read { path: key_path.clone(), source })?;
            builder.with_client_auth_cert(certificates(certificate_path)?, key).map_err(TlsError::Rejected)?
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::Read { path: path.clone(), source };
    // Read whole first: the file is the operator's, but a directory or a device must not be waited for.
    let bytes = fs::read(path).map_err(|error| failed(rustls::pki_types::pem::Error::Io(error)))?;
    CertificateDer::pem_slice_iter(&bytes).collect::<Result<_, _>>().map_err(failed)
}

/// Whether a registry may send us to this URL: HTTPS, or plain HTTP on the very host that was configured as plain HTTP; no user in it; and
/// not an address of this machine or of the link.
pub(crate) fn may_follow(configured: &Url, to: &Url) -> bool {
    let scheme = match to.scheme() {
        "https" => true,
        "http" => configured.scheme() == "http" && configured.host() == to.host(),
        _ => false,
    };
    let address = match to.host() {
        Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
        Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
        Some(Host::Domain(_)) => None,
        None => return false,
    };
    scheme
        && to.username().is_empty()
        && to.password().is_none()
        && address.is_none_or(|address| is_allowed(address, is_loopback(configured)))
        && (is_loopback(configured) || !is_loopback(to))
}

fn is_allowed(address: IpAddr, loopback: bool) -> bool {
    /// Instance metadata of some clouds, outside the link-local range.
    const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    match address {
        IpAddr::V4(v4) => {
            let forbidden = v4.is_unspecified()
                || v4.is_link_local()
                || v4.is_broadcast()
                || v4.is_multicast()
                || v4.octets()[0] == 0
                || v4.octets() == [100, 100, 100, 200];
            !forbidden && (loopback || !v4.is_loopback())
        }
        IpAddr::V6(v6) => {
            if let Some(v4) = v6.to_ipv4_mapped() {
                return is_allowed(IpAddr::V4(v4), loopback);
            }
            let forbidden =
                v6.is_unspecified() || v6.is_unicast_link_local() || v6.is_multicast() || v6 == METADATA_V6;
            !forbidden && (loopback || !v6.is_loopback())
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the host has no address that may be connected to")]
struct NoAllowedAddress;

struct GuardedResolver {
    loopback: bool,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let loopback = self.loopback;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> =
                found.filter(|address| is_allowed(address.ip(), loopback)).collect();
            if allowed.is_empty() {
                return Err(NoAllowedAddress.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// For `skip_verify`, which the operator wrote for this host.
#[derive(Debug)]
struct NoVerification(Arc<CryptoProvider>);

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_or_the_same_plain_host_is_followed() {
        for (from, to, allowed) in [
            ("https://r.example/v2", "https://cdn.example/x?sig=1", true),
            ("https://r.example/v2", "http://cdn.example/x", false),
            ("https://r.example/v2", "http://r.example/x", false),
            ("https://r.example/v2", "https://u:p@cdn.example/x", false),
            ("https://r.example/v2", "https://169.254.169.254/latest", false),
            ("https://r.example/v2", "https://[fe80::1]/", false),
            ("https://r.example/v2", "https://[::ffff:169.254.169.254]/", false),
            ("https://r.example/v2", "https://[fd00:ec2::254]/", false),
            ("https://r.example/v2", "https://127.0.0.1/", false),
            ("https://r.example/v2", "https://localhost/", false),
            ("https://r.example/v2", "https://2130706433/", false),
            ("https://r.example/v2", "https://0x7f.1/", false),
            ("https://r.example/v2", "https://10.0.0.1/", true),
            ("https://r.example/v2", "file:///etc/passwd", false),
            ("https://r.example/v2", "unix:///run/x.sock", false),
            ("https://r.example/v2", "ftp://cdn.example/", false),
            ("http://127.0.0.1:5000/v2", "http://127.0.0.1:6000/x", true),
            ("http://127.0.0.1:5000/v2", "http://127.0.0.2:6000/x", false),
            ("http://127.0.0.1:5000/v2", "https://localhost/x", true),
            ("http://127.0.0.1:5000/v2", "http://169.254.169.254/", false),
            ("http://r.example/v2", "http://other.example/", false),
        ] {
            let (from, target) = (Url::parse(from).unwrap(), Url::parse(to).unwrap());
            assert_eq!(may_follow(&from, &target), allowed, "{to}");
        }
    }
}
