//! Sockets and connections. Drives any service and knows none.
//!
//! A connection passes through: [`listener`] (permit, accept, access check) → [`connection`]
//! (timeouts, delivery, outcome) → the service → [`linger`] (half-close until everything is
//! acknowledged). Datagrams: [`udp`] → [`udp_filter`] → the service. Limits are in [`limits`]
//! and [`permits`]. Configuration and signals belong to `daemon`.

pub(crate) mod accept_backoff;
pub(crate) mod access;
pub(crate) mod client_limit;
pub(crate) mod connection;
pub(crate) mod endpoint;
pub(crate) mod host_port;
pub(crate) mod idle_timer;
pub(crate) mod instance;
pub(crate) mod limits;
pub(crate) mod linger;
pub(crate) mod listener;
pub(crate) mod memfd;
pub(crate) mod permits;
pub(crate) mod proxy_protocol;
pub(crate) mod service;
pub(crate) mod sockets;
pub(crate) mod stream;
pub(crate) mod udp;
pub(crate) mod udp_filter;
pub(crate) mod udp_rate;
