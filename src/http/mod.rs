//! The HTTP(S) client for mirrors, downloads and SMS providers, and TLS for all clients.
//!
//! A request passes through [`egress`] (permitted hosts and addresses) → [`client`]
//! (connections, redirects) → [`tls`] (the verifier of server certificates, [`ca_certs`],
//! [`tls_error`]). [`retry`] classifies failures; [`codings`] names the codings of bodies. Requests
//! and the meaning of replies belong to `mirror` and `notify`.

pub(crate) mod ca_certs;
pub(crate) mod certificate;
pub(crate) mod client;
pub(crate) mod codings;
pub(crate) mod egress;
pub(crate) mod headers;
pub(crate) mod pointer;
pub(crate) mod retry;
pub(crate) mod tls;
pub(crate) mod tls_error;
