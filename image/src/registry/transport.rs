//! HTTP clients and where they may connect to.
//!
//! Each configured host has a client with its TLS settings, which talks to that host alone.
//! Whatever a registry points at (a redirect, a token service) is reached by the *guarded* client:
//! it has no client certificate and does not connect to addresses that `reach` forbids, whatever
//! the name resolves to at that moment. Behind a proxy it is a third one, for which `proxy` says
//! what is checked.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use berth_sys::errno::{EMFILE, ENFILE, ENOMEM};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_native_certs::{CertificateResult, ErrorKind};
use url::Url;

use super::hosts::{TlsSettings, is_loopback};
use super::reach;

/// Headers of a response together.
const MAX_HEADERS: u32 = 64 * 1024;

/// Number of headers of an HTTP/1 response.
const MAX_HEADER_COUNT: usize = 256;

/// Why a client could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A certificate or key file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: pem::Error,
    },
    /// A certificate or key cannot be used.
    #[error("cannot use the certificates")]
    Rejected(#[source] rustls::Error),
    /// The system's certificates cannot be read now.
    #[error("cannot read the system's certificates")]
    Roots(#[source] rustls_native_certs::Error),
    /// The HTTP library.
    #[error("cannot set up HTTP")]
    Http(#[source] reqwest::Error),
}

/// Whom a client may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The host that an operator configured.
    Configured,
    /// Hosts that a registry named, without a proxy. `loopback` allows this machine, for registries
    /// that are on it themselves.
    Guarded { loopback: bool },
    /// Hosts that a registry named, through the proxy of the environment. Only the proxy's own name
    /// is resolved.
    Proxied,
}

/// The system's authorities, read when the first TLS connection is made, and kept.
fn system_roots() -> Result<Arc<RootCertStore>, TlsError> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    if let Some(roots) = ROOTS.get() {
        return Ok(Arc::clone(roots));
    }
    let roots = Arc::new(roots_of(rustls_native_certs::load_native_certs())?);
    Ok(Arc::clone(ROOTS.get_or_init(|| roots)))
}

/// What was found, without what cannot be read. A lack that passes is an error: fewer authorities
/// would be kept for good.
fn roots_of(found: CertificateResult) -> Result<RootCertStore, TlsError> {
    for error in found.errors {
        if let ErrorKind::Io { inner, .. } | ErrorKind::Pem(pem::Error::Io(inner)) = &error.kind
            && is_exhausted(inner)
        {
            return Err(TlsError::Roots(error));
        }
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot read some of the system's certificates"
        );
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    Ok(roots)
}

/// Whether the process, or the machine, has no descriptors or no memory left.
fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ENOMEM | ENFILE | EMFILE))
}

/// A client for `url`'s host, or for the hosts that it names.
pub(crate) fn client(
    url: &Url,
    tls: &TlsSettings,
    reach: Reach,
    connect_timeout: Duration,
) -> Result<reqwest::Client, TlsError> {
    // Plain HTTP needs no authorities, and reading them takes longer than a small pull from this
    // machine.
    let encrypted = url.scheme() == "https" || reach != Reach::Configured;
    let config = tls_config(tls, reach, encrypted)?;
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(config)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(connect_timeout)
        .http1_max_headers(MAX_HEADER_COUNT)
        .http2_max_header_list_size(MAX_HEADERS)
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")));
    let guard = match reach {
        Reach::Guarded { loopback } => Some(Guard { loopback }),
        Reach::Configured | Reach::Proxied => None,
    };
    if guard.is_some() || (reach == Reach::Configured && is_loopback(url)) {
        builder = builder.no_proxy();
    }
    builder.dns_resolver(Arc::new(Resolver { guard })).build().map_err(TlsError::Http)
}

fn tls_config(tls: &TlsSettings, reach: Reach, encrypted: bool) -> Result<ClientConfig, TlsError> {
    let mut roots = if encrypted { (*system_roots()?).clone() } else { RootCertStore::empty() };
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
    // Read whole first: the file is the operator's, but a directory or a device must not be waited
    // for.
    let bytes = fs::read(path).map_err(|error| failed(pem::Error::Io(error)))?;
    CertificateDer::pem_slice_iter(&bytes).collect::<Result<_, _>>().map_err(failed)
}

#[derive(Debug, thiserror::Error)]
#[error("the host has no allowed address")]
struct NoAllowedAddress;

/// The system's resolver, `getaddrinfo(3)`, behind a guard for names that a registry chose.
struct Resolver {
    guard: Option<Guard>,
}

#[derive(Clone, Copy)]
struct Guard {
    loopback: bool,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.guard;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await.map_err(|error| {
                // Where the resolver cannot open its files and sockets, it says that the name is
                // not known.
                fs::File::open("/dev/null").err().filter(is_exhausted).unwrap_or(error)
            })?;
            let allowed: Vec<SocketAddr> = found
                .filter(|address| guard.is_none_or(|guard| reach::may_connect(address.ip(), guard.loopback)))
                .collect();
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
    fn a_lack_of_descriptors_does_not_leave_fewer_authorities_for_good() {
        let found = |kind: ErrorKind| {
            let mut found = CertificateResult::default();
            found.errors.push(rustls_native_certs::Error { context: "failed to open file", kind });
            roots_of(found)
        };
        let path = PathBuf::from("/etc/ssl/certs");
        let no_descriptors = || io::Error::from_raw_os_error(24);
        assert!(found(ErrorKind::Io { inner: no_descriptors(), path: path.clone() }).is_err());
        assert!(found(ErrorKind::Pem(pem::Error::Io(no_descriptors()))).is_err());
        assert!(found(ErrorKind::Pem(pem::Error::NoItemsFound)).is_ok());
        assert!(found(ErrorKind::Io { inner: io::ErrorKind::PermissionDenied.into(), path }).is_ok());
    }
}
