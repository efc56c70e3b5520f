//! TLS for every client in this program: HTTPS (downloads, mirrors, SMS) and SMTP.
//!
//! | file | subject |
//! |---|---|
//! | [`tls`] | the client configuration, and the verifier of server certificates |
//! | [`tls_error`] | TLS errors in plain words |
//! | [`certificate`] | the fields of a certificate that webpki does not expose |

pub mod certificate;
pub mod tls;
pub mod tls_error;
