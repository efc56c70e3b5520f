//! TLS errors in plain words, with their remedies.
//!
//! rustls prints most of its errors in their `Debug` form, so each is named here.

use std::io;
use std::sync::Arc;

use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage, OtherError, PeerIncompatible,
};

use crate::fs::filename::escape;
use crate::http::certificate::Certificate;

/// Maximum length of a printed name, in characters: certificates may contain longer ones.
const MAX_NAME: usize = 100;

/// Maximum number of printed names of a certificate.
const MAX_NAMES: usize = 5;

/// The reason why a TLS connection cannot be established, or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct TlsError {
    /// The consequence for the next attempt.
    pub kind: TlsErrorKind,
    message: String,
}

/// Consequence of a TLS error for the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TlsErrorKind {
    /// The server's certificate is rejected.
    Certificate,
    /// The server does not speak TLS on this port.
    NotTls,
    /// Client and server cannot agree.
    Incompatible,
    /// Data was damaged on the way, or the server failed: another attempt may succeed.
    Transient,
}

impl TlsError {
    /// Returns the TLS error in an I/O error, if it contains one.
    pub(crate) fn of_io(error: &io::Error, host: &str) -> Option<Self> {
        // Connectors wrap it again.
        let mut inner = error.get_ref()?;
        while let Some(error) = inner.downcast_ref::<io::Error>() {
            inner = error.get_ref()?;
        }
        inner.downcast_ref().map(|error| Self::new(error, host))
    }

    /// Describes an error of a connection to `host`.
    pub(crate) fn new(error: &Error, host: &str) -> Self {
        let host = name(host);
        let (kind, message) = match error {
            Error::InvalidCertificate(CertificateError::Other(OtherError(cause)))
                if let Some(rejected) = cause.downcast_ref::<RejectedCertificate>() =>
            {
                (TlsErrorKind::Certificate, rejected.to_string())
            }
            // The verifier replaces all others: this is about the handshake.
            Error::InvalidCertificate(_) => (
                TlsErrorKind::Certificate,
                format!(
                    "{host} does not prove that it has the key of its certificate: the signature \
                     is wrong, or the key is too short (RSA below 2048 bits)"
                ),
            ),
            Error::AlertReceived(alert) => explain_alert(*alert, &host),
            error => {
                let (kind, problem) = explain_protocol(error);
                (kind, format!("no TLS connection to {host}: {problem}"))
            }
        };
        Self { kind, message }
    }
}

/// A certificate that was rejected, with its issuer, which rustls does not report.
#[derive(Debug, thiserror::Error)]
#[error("the certificate of {host}{} {}: {}", issued(.issuer.as_deref()), .explained.0, .explained.1)]
pub struct RejectedCertificate {
    host: String,
    issuer: Option<String>,
    explained: (String, String),
}

fn issued(issuer: Option<&str>) -> String {
    issuer.map(|issuer| format!(", issued by \"{issuer}\",")).unwrap_or_default()
}

impl RejectedCertificate {
    /// Describes the rejection of `certificate`. `key` names the file of trusted certificates.
    #[expect(clippy::needless_pass_by_value, reason = "the error is replaced by this one")]
    pub fn new(
        certificate: &CertificateDer<'_>,
        server: &ServerName<'_>,
        cause: CertificateError,
        key: &str,
    ) -> Self {
        let fields = Certificate::parse(certificate);
        let issuer = fields.and_then(|fields| fields.issuer());
        let names = fields.map(|fields| fields.alt_names()).unwrap_or_default();
        Self {
            host: name(&server.to_str()),
            issuer: issuer.map(|issuer| name(&issuer)),
            explained: explain(&cause, &names, key),
        }
    }
}

impl From<RejectedCertificate> for Error {
    fn from(error: RejectedCertificate) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// Returns a name from a certificate, shortened and escaped.
fn name(text: &str) -> String {
    let mut name = escape(&text.chars().take(MAX_NAME).collect::<String>());
    if text.chars().nth(MAX_NAME).is_some() {
        name.push('…');
    }
    name
}

/// Returns a time of a certificate in RFC 3339.
fn date(time: UnixTime) -> String {
    let time =
        i64::try_from(time.as_secs()).ok().and_then(|time| Timestamp::from_second(time).ok());
    time.map_or_else(|| "a time that is out of range".to_owned(), |time| time.to_string())
}

/// Describes the fault of a certificate that is valid for `names`, and the remedy. `key` names the
/// file of trusted certificates.
#[expect(deprecated, reason = "verifiers may still return them")]
fn explain(cause: &CertificateError, names: &[String], key: &str) -> (String, String) {
    use CertificateError as E;
    let (problem, remedy) = match cause {
        E::UnknownIssuer => (
            "is not trusted".to_owned(),
            format!("name a file with the issuer's certificate, or the server's own, in {key}"),
        ),
        E::ExpiredContext { not_after, .. } => {
            return expired(&format!("has expired on {}", date(*not_after)));
        }
        E::Expired => return expired("has expired"),
        E::NotValidYetContext { not_before, .. } => {
            return early(&format!("is not valid before {}", date(*not_before)));
        }
        E::NotValidYet => return early("is not valid yet"),
        E::NotValidForName | E::NotValidForNameContext { .. } => return other_name(names),
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            ("is not meant for servers".to_owned(), "it needs the purpose serverAuth".to_owned())
        }
        E::Other(OtherError(cause)) => {
            return cause
                .downcast_ref()
                .map_or_else(|| replace("is refused"), |cause| explain_webpki(cause, key));
        }
        E::BadEncoding => return replace("is not correctly encoded"),
        E::Revoked => return replace("has been revoked"),
        E::UnhandledCriticalExtension => return replace("has an unknown critical extension"),
        E::UnknownRevocationStatus => return replace("has an unknown revocation status"),
        E::ExpiredRevocationList | E::ExpiredRevocationListContext { .. } => {
            return replace("cannot be checked: the revocation list has expired");
        }
        E::BadSignature => return replace("has a wrong signature"),
        E::UnsupportedSignatureAlgorithm
        | E::UnsupportedSignatureAlgorithmContext { .. }
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            return replace("has a key or a signature of an unsupported algorithm");
        }
        E::InvalidOcspResponse => return replace("comes with an invalid OCSP response"),
        _ => return replace("is refused"),
    };
    (problem, remedy)
}

fn replace(problem: &str) -> (String, String) {
    (problem.to_owned(), "replace it on the server".to_owned())
}

fn expired(problem: &str) -> (String, String) {
    (problem.to_owned(), "renew it, or correct this machine's clock".to_owned())
}

fn early(problem: &str) -> (String, String) {
    (problem.to_owned(), "check this machine's clock".to_owned())
}

fn other_name(names: &[String]) -> (String, String) {
    if names.is_empty() {
        let remedy = "add the name to its subjectAltName";
        return ("is not valid for this name".to_owned(), remedy.to_owned());
    }
    let mut shown: Vec<_> = names.iter().take(MAX_NAMES).map(|text| name(text)).collect();
    if names.len() > MAX_NAMES {
        shown.push("others".to_owned());
    }
    let problem = format!("is not valid for this name, but for {}", shown.join(", "));
    (problem, "use one of its names".to_owned())
}

/// Describes the errors of webpki that rustls does not translate.
fn explain_webpki(cause: &webpki::Error, key: &str) -> (String, String) {
    use webpki::Error as E;
    match cause {
        E::CaUsedAsEndEntity => (
            "is not trusted, because it is that of an authority (CA:TRUE)".to_owned(),
            format!("name a file with exactly this certificate in {key}"),
        ),
        E::EndEntityUsedAsCa => replace("has an issuer that is not an authority (CA:FALSE)"),
        E::UnsupportedCertVersion => replace("is not of X.509 version 3"),
        E::UnsupportedCriticalExtension => replace("has an unknown critical extension"),
        E::CertDistrusted => replace("has a distrusted issuer"),
        E::NameConstraintViolation
        | E::PathLenConstraintViolated
        | E::InvalidNetworkMaskConstraint
        | E::MalformedNameConstraint
        | E::MaximumNameConstraintComparisonsExceeded => {
            replace("does not satisfy the constraints of its issuers")
        }
        E::MaximumPathBuildCallsExceeded
        | E::MaximumPathDepthExceeded
        | E::MaximumSignatureChecksExceeded => replace("has too many issuers"),
        E::SignatureAlgorithmMismatch => replace("names two different signature algorithms"),
        E::EmptyEkuExtension
        | E::ExtensionValueInvalid
        | E::MalformedDnsIdentifier
        | E::MalformedExtensions
        | E::InvalidSerialNumber => replace("is not correctly encoded"),
        E::InvalidCrlNumber
        | E::UnsupportedCrlVersion
        | E::UnsupportedDeltaCrl
        | E::UnsupportedIndirectCrl
        | E::UnsupportedRevocationReason
        | E::UnsupportedRevocationReasonsPartitioning => {
            replace("cannot be checked: the revocation list is not supported")
        }
        _ => replace("is refused"),
    }
}

/// Describes errors that neither concern a certificate nor were sent by the server.
fn explain_protocol(error: &Error) -> (TlsErrorKind, &'static str) {
    use TlsErrorKind::{Incompatible, NotTls, Transient};
    match error {
        Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        ) => (NotTls, "the server does not answer with TLS: check the port"),
        Error::InvalidMessage(_) => (NotTls, "the server's answer is malformed"),
        Error::PeerIncompatible(
            PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::SupportedVersionsExtensionRequired,
        ) => (Incompatible, "the server supports neither TLS 1.2 nor 1.3"),
        Error::PeerIncompatible(_) => {
            (Incompatible, "the server supports no algorithm that is accepted here")
        }
        Error::NoCertificatesPresented => (Incompatible, "the server sent no certificate"),
        Error::NoApplicationProtocol => (Incompatible, "the server does not support HTTP/1.1"),
        Error::InappropriateMessage { .. }
        | Error::InappropriateHandshakeMessage { .. }
        | Error::PeerMisbehaved(_) => (Incompatible, "the server violates the protocol"),
        Error::DecryptError | Error::PeerSentOversizedRecord => {
            (Transient, "data was damaged on the way")
        }
        Error::FailedToGetCurrentTime => (Transient, "this machine's clock cannot be read"),
        Error::FailedToGetRandomBytes => (Transient, "this machine has no random numbers"),
        _ => (Incompatible, "an internal error of the TLS library"),
    }
}

/// Describes an alert that the server sent (RFC 8446, 6.2).
fn explain_alert(alert: AlertDescription, host: &str) -> (TlsErrorKind, String) {
    use AlertDescription as A;
    let refuses = |cause: &str| format!("{host} refuses the TLS connection: {cause}");
    let message = match alert {
        A::CertificateRequired
        | A::NoCertificate
        | A::BadCertificate
        | A::UnsupportedCertificate
        | A::CertificateRevoked
        | A::CertificateExpired
        | A::CertificateUnknown
        | A::UnknownCA
        | A::AccessDenied => {
            refuses("it requires a client certificate, which handout cannot present")
        }
        A::HandshakeFailure | A::InsufficientSecurity => {
            refuses("there is no algorithm that both accept, or it requires a client certificate")
        }
        A::ProtocolVersion | A::InappropriateFallback => {
            refuses("it supports neither TLS 1.2 nor 1.3")
        }
        A::UnrecognisedName => refuses("it knows no host of this name"),
        A::NoApplicationProtocol => refuses("it does not support HTTP/1.1"),
        A::BadRecordMac | A::DecryptionFailed | A::DecryptError | A::RecordOverflow => {
            return (TlsErrorKind::Transient, refuses("data was damaged on the way"));
        }
        A::CloseNotify | A::InternalError | A::UserCanceled => {
            return (TlsErrorKind::Transient, refuses("it failed"));
        }
        other => refuses(&format!("alert {}", u8::from(other))),
    };
    (TlsErrorKind::Incompatible, message)
}

#[cfg(test)]
mod tests {
    use rustls::{
        ContentType, ExtendedKeyPurpose, HandshakeType, InconsistentKeys, PeerMisbehaved,
    };
    use webpki::Error as E;

    use super::*;

    fn unknown(cause: impl std::error::Error + Send + Sync + 'static) -> CertificateError {
        CertificateError::Other(OtherError(Arc::new(cause)))
    }

    /// Every error of rustls about a certificate, each beside its own name.
    #[expect(deprecated, reason = "all of them")]
    fn certificate_errors() -> Vec<CertificateError> {
        use CertificateError as C;
        let time = UnixTime::since_unix_epoch(std::time::Duration::from_hours(24));
        let expected = ServerName::try_from("example.org").unwrap();
        vec![
            C::BadEncoding,
            C::Expired,
            C::ExpiredContext { time, not_after: time },
            C::NotValidYet,
            C::NotValidYetContext { time, not_before: time },
            C::Revoked,
            C::UnhandledCriticalExtension,
            C::UnknownIssuer,
            C::UnknownRevocationStatus,
            C::ExpiredRevocationList,
            C::ExpiredRevocationListContext { time, next_update: time },
            C::BadSignature,
            C::UnsupportedSignatureAlgorithm,
            C::UnsupportedSignatureAlgorithmContext {
                signature_algorithm_id: vec![1],
                supported_algorithms: Vec::new(),
            },
            C::UnsupportedSignatureAlgorithmForPublicKeyContext {
                signature_algorithm_id: vec![1],
                public_key_algorithm_id: vec![2],
            },
            C::NotValidForName,
            C::NotValidForNameContext { expected, presented: vec!["DnsName(\"a\")".to_owned()] },
            C::InvalidPurpose,
            C::InvalidPurposeContext {
                required: ExtendedKeyPurpose::ServerAuth,
                presented: vec![ExtendedKeyPurpose::ClientAuth],
            },
            C::InvalidOcspResponse,
        ]
    }

    /// Every error of webpki that rustls passes on as another one.
    fn webpki_errors() -> Vec<E> {
        vec![
            E::CaUsedAsEndEntity,
            E::CertDistrusted,
            E::EmptyEkuExtension,
            E::EndEntityUsedAsCa,
            E::ExtensionValueInvalid,
            E::InvalidCrlNumber,
            E::InvalidNetworkMaskConstraint,
            E::InvalidSerialNumber,
            E::MalformedDnsIdentifier,
            E::MalformedExtensions,
            E::MalformedNameConstraint,
            E::MaximumNameConstraintComparisonsExceeded,
            E::MaximumPathBuildCallsExceeded,
            E::MaximumPathDepthExceeded,
            E::MaximumSignatureChecksExceeded,
            E::NameConstraintViolation,
            E::PathLenConstraintViolated,
            E::SignatureAlgorithmMismatch,
            E::UnsupportedCertVersion,
            E::UnsupportedCriticalExtension,
            E::UnsupportedCrlIssuingDistributionPoint,
            E::UnsupportedCrlVersion,
            E::UnsupportedDeltaCrl,
            E::UnsupportedIndirectCrl,
            E::UnsupportedNameType,
            E::UnsupportedRevocationReason,
            E::UnsupportedRevocationReasonsPartitioning,
        ]
    }

    fn protocol_errors() -> Vec<Error> {
        vec![
            Error::InappropriateMessage {
                expect_types: vec![ContentType::Handshake],
                got_type: ContentType::Alert,
            },
            Error::InappropriateHandshakeMessage {
                expect_types: vec![HandshakeType::ServerHello],
                got_type: HandshakeType::Finished,
            },
            Error::InvalidMessage(InvalidMessage::InvalidContentType),
            Error::InvalidMessage(InvalidMessage::MissingData("Random")),
            Error::NoCertificatesPresented,
            Error::UnsupportedNameType,
            Error::DecryptError,
            Error::EncryptError,
            Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13),
            Error::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon),
            Error::PeerMisbehaved(PeerMisbehaved::TooManyEmptyFragments),
            Error::General("Some(Thing)".to_owned()),
            Error::FailedToGetCurrentTime,
            Error::FailedToGetRandomBytes,
            Error::HandshakeNotComplete,
            Error::PeerSentOversizedRecord,
            Error::NoApplicationProtocol,
            Error::BadMaxFragmentSize,
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch),
            Error::Other(OtherError(Arc::new(io::Error::other("Some(Thing)")))),
        ]
    }

    /// Checks that the message contains neither identifiers nor the punctuation of Rust.
    fn assert_is_plain(message: &str) {
        let identifier = |word: &str| {
            let word = word.trim_matches(|c: char| !c.is_alphanumeric());
            let mixed = word.chars().zip(word.chars().skip(1));
            mixed.into_iter().any(|(a, b)| a.is_lowercase() && b.is_uppercase())
                && !["serverAuth", "subjectAltName"].contains(&word)
        };
        assert!(!message.split(' ').any(identifier), "{message}");
        assert!(!message.contains(['{', '}', '[', '_']) && !message.contains("::"), "{message}");
    }

    fn rejected(cause: CertificateError) -> TlsError {
        let server = ServerName::try_from("example.org").unwrap();
        let certificate = CertificateDer::from_slice(&[]);
        let error = RejectedCertificate::new(&certificate, &server, cause, "--ca-file");
        TlsError::new(&error.into(), "example.org")
    }

    #[test]
    fn describes_faults_of_certificates_in_plain_words() {
        let certificates = certificate_errors().into_iter();
        for cause in certificates.chain(webpki_errors().into_iter().map(unknown)) {
            let known = !matches!(
                &cause,
                CertificateError::Other(OtherError(other))
                    if matches!(
                        other.downcast_ref(),
                        Some(E::UnsupportedCrlIssuingDistributionPoint | E::UnsupportedNameType)
                    )
            );
            let error = rejected(cause.clone());
            assert_is_plain(&error.to_string());
            assert_eq!(error.kind, TlsErrorKind::Certificate);
            assert!(error.to_string().starts_with("the certificate of example.org "), "{error}");
            assert_eq!(!error.to_string().contains("is refused"), known, "{cause:?}: {error}");
        }
        for other in [
            CertificateError::ApplicationVerificationFailure,
            unknown(io::Error::other("Some(Thing)")),
        ] {
            assert_is_plain(&rejected(other.clone()).to_string());
            assert_is_plain(&TlsError::new(&other.into(), "example.org").to_string());
        }
    }

    #[test]
    fn names_the_key_that_can_hold_an_untrusted_certificate() {
        for cause in [CertificateError::UnknownIssuer, unknown(E::CaUsedAsEndEntity)] {
            let message = rejected(cause).to_string();
            assert!(
                message.contains("is not trusted") && message.contains("--ca-file"),
                "{message}"
            );
        }
    }

    #[test]
    fn describes_protocol_errors_and_alerts_in_plain_words() {
        let alerts = (0..=u8::MAX).map(|alert| Error::AlertReceived(alert.into()));
        for error in protocol_errors().into_iter().chain(alerts) {
            let message = TlsError::new(&error, "example.org").to_string();
            assert_is_plain(&message);
            assert!(message.contains("example.org"), "{message}");
        }
    }

    #[test]
    fn finds_tls_errors_in_nested_io_errors() {
        let mut error = io::Error::other(Error::DecryptError);
        for _ in 0..3 {
            assert_eq!(TlsError::of_io(&error, "a").unwrap().kind, TlsErrorKind::Transient);
            error = io::Error::other(error);
        }
        assert_eq!(TlsError::of_io(&io::Error::other("x"), "a"), None);
        assert_eq!(TlsError::of_io(&io::ErrorKind::UnexpectedEof.into(), "a"), None);
    }

    #[test]
    fn cuts_and_escapes_names() {
        let long = vec!["\u{1b}[2J".repeat(1000); 1000];
        let (problem, _) = other_name(&long);
        assert!(problem.len() < 5000 && !problem.contains('\u{1b}'), "{problem}");
    }
}
