//! The client of a connection, as logs and counters name it.

use std::fmt;
use std::net::SocketAddr;

/// The remote end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// An Internet address, with a v4-mapped IPv6 address unmapped.
    Internet(SocketAddr),
    /// The user ID of the client of a Unix socket, if the kernel reports it.
    Unix(Option<u32>),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Internet(address) => address.fmt(f),
            Peer::Unix(Some(uid)) => write!(f, "unix:uid={uid}"),
            Peer::Unix(None) => f.write_str("unix"),
        }
    }
}
