//! Sockets and connections. Drives any service and knows none.
//!
//! A connection passes through: [`listener`] (permit, accept, access check) → [`connection`]
//! (timeouts, delivery, outcome) → the service → [`linger`] (half-close until everything is
//! acknowledged). Datagrams: [`listener`] → [`udp_filter`] → the service. Limits are in [`limits`]
//! and [`permits`]. Configuration and signals belong to `daemon`.

pub mod connection;
pub mod idle_timer;
pub mod instance;
pub mod limits;
pub mod linger;
pub mod listener;
pub mod memfd;
pub mod permits;
pub mod proxy_protocol;
pub mod sockets;
pub mod stream;
pub mod udp_filter;
