//! Parts shared by the HTTP clients (downloads, mirrors, SMS) and the SMTP client.
//!
//! | file | subject |
//! |---|---|
//! | [`tls`] | the client configuration, and the verifier of server certificates |
//! | [`tls_error`] | TLS errors in plain words |
//! | [`codings`] | the codings of a reply's body |
//! | [`certificate`] | the fields of a certificate that webpki does not expose |

pub mod certificate;
#[cfg(feature = "mirror")]
pub mod codings;
pub mod tls;
pub mod tls_error;
