//! TLS as a client: one configuration and one verifier of server certificates for HTTPS and SMTP.
//!
//! A server is trusted if the system or a `ca-file` knows an issuer of its certificate, or if its
//! certificate is in the `ca-file` itself, byte for byte. webpki alone would refuse such a
//! certificate if it says `CA:TRUE`, as `openssl req -x509` makes them by default.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor, verify_server_name,
};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use crate::http::ca_certs;
use crate::http::certificate::Certificate;
use crate::http::tls_error::RejectedCertificate;

/// The file of certificates to trust in addition to the system's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CaFile {
    /// Path of the file, if one is configured.
    pub path: Option<PathBuf>,
    /// The option or the key that sets `path`, for messages.
    pub key: &'static str,
}

impl CaFile {
    /// A file named in a configuration.
    pub(crate) fn of_key(path: Option<PathBuf>) -> Self {
        Self { path, key: "ca-file" }
    }

    /// A file named on the command line.
    pub(crate) fn of_option(path: Option<PathBuf>) -> Self {
        Self { path, key: "--ca-file" }
    }
}

/// The reason why a file of trusted certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{key} {}: {problem}", .path.display())]
pub(crate) struct CaFileError {
    key: &'static str,
    path: PathBuf,
    problem: String,
}

/// Reads the trusted certificates and returns the configuration of a TLS client. Blocks.
///
/// # Errors
/// If the configured file cannot be used.
pub(crate) fn client_config(ca_file: &CaFile) -> Result<ClientConfig, CaFileError> {
    let named = match &ca_file.path {
        None => Vec::new(),
        Some(path) => read(ca_file.key, path)?,
    };
    Ok(config(named, ca_file.key))
}

fn read(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, CaFileError> {
    ca_certs::read(path).map_err(|problem| CaFileError { key, path: path.to_owned(), problem })
}

/// Returns the configuration of a client that also trusts `named`, from the file that `key` names.
fn config(named: Vec<CertificateDer<'static>>, key: &'static str) -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(Verifier::new(named, key));
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    // Fails only with a provider that has no cipher suites for them.
    let builder = builder.unwrap_or_else(|_| unreachable!("ring has TLS 1.2 and 1.3"));
    builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
}

/// Verifies the certificates of servers.
#[derive(Debug)]
struct Verifier {
    /// Verifies chains of issuers; absent on a machine that trusts none.
    chains: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates that the operator named.
    named: HashSet<CertificateDer<'static>>,
    key: &'static str,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(named: Vec<CertificateDer<'static>>, key: &'static str) -> Self {
        let provider = Arc::new(ring::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let mut roots = RootCertStore::empty();
        // An unreadable root of the system is missed when a server needs it.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots.add_parsable_certificates(named.iter().cloned());
        let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
        let chains = chains.build().ok();
        Self { chains, named: named.into_iter().collect(), key, algorithms }
    }

    fn verify_chain(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<(), Error> {
        let chains = self.chains.as_ref().ok_or(CertificateError::UnknownIssuer)?;
        chains.verify_server_cert(certificate, intermediates, server, ocsp_response, now).map(drop)
    }

    /// Verifies everything but the issuer: validity, purpose and name.
    fn verify_named(
        &self,
        certificate: &CertificateDer<'_>,
        server: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let fields = Certificate::parse(certificate).ok_or(CertificateError::BadEncoding)?;
        let (nobody, algorithms) = (RootCertStore::empty(), self.algorithms.all);
        let checked =
            verify_server_cert_signed_by_trust_anchor(&parsed, &nobody, &[], now, algorithms);
        match checked {
            // These are found last: the validity holds, and in the first case the purpose, too.
            Ok(()) | Err(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {}
            Err(error) if is_authority(&error) => {
                if !fields.is_for_servers() {
                    return Err(CertificateError::InvalidPurpose.into());
                }
            }
            Err(error) => return Err(error),
        }
        match verify_server_name(&parsed, server) {
            // `openssl req -x509` without further options puts the name nowhere else.
            Err(_)
                if !fields.has_alt_names()
                    && fields.common_name().is_some_and(|name| name == server.to_str()) =>
            {
                Ok(())
            }
            verified => verified,
        }
    }
}

/// Whether a certificate was refused because it says `CA:TRUE`.
fn is_authority(error: &Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) = error else {
        return false;
    };
    matches!(cause.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = if self.named.contains(end_entity) {
            self.verify_named(end_entity, server_name, now)
        } else {
            self.verify_chain(end_entity, intermediates, server_name, ocsp_response, now)
        };
        let verified = verified.map(|()| ServerCertVerified::assertion());
        verified.map_err(|error| match error {
            Error::InvalidCertificate(cause) => {
                RejectedCertificate::new(end_entity, server_name, cause, self.key).into()
            }
            error => error,
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
