//! Clients of time and file services. They trust no server: replies are bounded and verified.
//!
//! `time` requests the time, `time_reply` parses it and `clock_offset` compares the clocks; `fetch`
//! saves files.
//! Arguments and output belong to `cli`.

pub(crate) mod clock_offset;
pub(crate) mod fetch;
pub(crate) mod time;
pub(crate) mod time_reply;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};

use crate::net::host_port::split_host_port;

/// The address of a server: a host name or IP address, and an optional port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    host: String,
    port: Option<u16>,
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) =
            split_host_port(text).ok_or("expected HOST, HOST:PORT, or [ADDRESS]:PORT for IPv6")?;
        let parse = |port: &str| port.parse().ok().filter(|port| *port != 0);
        let port =
            port.map(|port| parse(port).ok_or("expected a port from 1 to 65535")).transpose()?;
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.host.contains(':'), self.port) {
            (true, Some(port)) => write!(f, "[{}]:{port}", self.host),
            (false, Some(port)) => write!(f, "{}:{port}", self.host),
            (_, None) => f.write_str(&self.host),
        }
    }
}

/// Failure to connect to a server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name lookup failed.
    #[error("cannot look up {host}")]
    Lookup {
        /// The host, with its port if it was given.
        host: String,
        /// Error of the resolver.
        source: io::Error,
    },
    /// No address accepted a connection. Contains the addresses with their errors.
    #[error("cannot connect to {0}")]
    Connect(String),
}

impl HostPort {
    /// Looks up the addresses of the host, without duplicates.
    async fn addresses(&self, default_port: u16) -> Result<Vec<SocketAddr>, ConnectError> {
        let port = self.port.unwrap_or(default_port);
        let lookup_error = |source| ConnectError::Lookup { host: self.to_string(), source };
        let found = lookup_host((self.host.as_str(), port)).await.map_err(lookup_error)?;
        let mut addresses = Vec::new();
        for address in found {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(lookup_error(io::Error::other("it has no address")));
        }
        Ok(addresses)
    }

    /// Formats the host with its port or `default_port`.
    fn with_port(&self, default_port: u16) -> String {
        let port = Some(self.port.unwrap_or(default_port));
        Self { host: self.host.clone(), port }.to_string()
    }

    /// Returns the host name or IP address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Connects to the first address that accepts, within `time` in total.
    ///
    /// # Errors
    /// If the name lookup fails, or no address accepts in time.
    pub async fn connect(
        &self,
        default_port: u16,
        time: Duration,
    ) -> Result<TcpStream, ConnectError> {
        Ok(self.connect_timed(default_port, time).await?.0)
    }

    /// Connects like [`HostPort::connect`]. Also returns the start of the successful attempt.
    async fn connect_timed(
        &self,
        default_port: u16,
        time: Duration,
    ) -> Result<(TcpStream, Instant), ConnectError> {
        let deadline = Instant::now() + time;
        let addresses = self.addresses(default_port).await?;
        let mut causes = Vec::new();
        for (tried, address) in addresses.iter().enumerate() {
            // An address that does not answer leaves time for the next ones.
            let left = deadline.saturating_duration_since(Instant::now());
            let untried = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            let started = Instant::now();
            match timeout(left / untried, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok((stream, started)),
                Ok(Err(error)) => causes.push(format!("{address}: {error}")),
                Err(_) => causes.push(format!("{address}: no answer in time")),
            }
        }
        Err(ConnectError::Connect(causes.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<(String, Option<u16>), String> {
        text.parse::<HostPort>().map(|server| (server.host, server.port))
    }

    #[test]
    fn parses_hosts_with_and_without_a_port() {
        let is = |text, host: &str, port| assert_eq!(parsed(text), Ok((host.to_owned(), port)));
        is("example.org", "example.org", None);
        is("example.org:37", "example.org", Some(37));
        is("192.0.2.1:6789", "192.0.2.1", Some(6789));
        is("::1", "::1", None);
        is("[::1]", "::1", None);
        is("[::1]:6789", "::1", Some(6789));
        is("[fe80::1%lo]:6789", "fe80::1%lo", Some(6789));
    }

    #[test]
    fn refuses_invalid_servers_with_the_expected_form() {
        for bad in ["", ":80", "a:", "a:b", "a:0", "a:65536", "[::1", "[::1]80", "http://a", "a b"]
        {
            assert!(parsed(bad).unwrap_err().starts_with("expected"), "{bad}");
        }
    }

    #[test]
    fn displays_servers_as_they_were_written() {
        for text in ["example.org", "example.org:37", "::1", "[::1]:6789"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
        }
    }
}
