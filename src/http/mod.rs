//! The HTTP(S) client for mirrors, downloads and SMS providers, and TLS for all clients.
//!
//! A request passes through [`egress`] (which hosts and addresses may be asked) → [`client`]
//! (connections, redirects) → [`tls`] (the verifier of server certificates, [`ca_certs`],
//! [`tls_error`]). [`retry`] classifies failures; [`codings`] decodes bodies. What is requested and
//! what a reply means belong to `mirror` and `notify`.

pub mod ca_certs;
pub mod certificate;
pub mod client;
pub mod codings;
pub mod egress;
pub mod headers;
pub mod pointer;
pub mod retry;
pub mod tls;
pub mod tls_error;
