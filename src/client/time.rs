//! Client of time services: requests the time over TCP or UDP.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::io::AsyncReadExt;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

use crate::client::clock_offset::ClockOffset;
use crate::client::time_reply::{ParsedTime, first_line, read_rfc868, read_text};
use crate::client::{ConnectError, HostPort};
use crate::fs::filename::escape_bytes;

/// Default port of time services.
pub(crate) const PORT: u16 = 6789;

/// Maximum length of a reply, in bytes.
const MAX_REPLY: usize = 4096;

/// Length of an RFC 868 reply, in bytes.
const RFC868_LENGTH: usize = 4;

/// Time to wait for a reply before the datagram is sent again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Parameters of a request for the time.
#[derive(Debug, Clone)]
pub struct TimeRequest {
    /// Server to ask.
    pub server: HostPort,
    /// Whether to use UDP instead of TCP.
    pub udp: bool,
    /// Whether to expect the four bytes of RFC 868 instead of text.
    pub rfc868: bool,
    /// Maximum duration of the whole request.
    pub timeout: Duration,
}

/// Failure to obtain the time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The established connection or the socket failed.
    #[error("{server}")]
    Network {
        /// The server that was asked.
        server: HostPort,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The timeout passed.
    #[error("{0}: no answer in time")]
    Timeout(HostPort),
    /// The reply is blank.
    #[error("{0}: the server closed the connection without telling the time")]
    Empty(HostPort),
    /// The reply exceeds [`MAX_REPLY`].
    #[error("{0}: the server sent more than {MAX_REPLY} bytes: it is not a time service")]
    ReplyTooLong(HostPort),
    /// The reply is not in a known format.
    #[error("{server}: unknown time format: \"{reply}\"")]
    UnknownFormat {
        /// The server that was asked.
        server: HostPort,
        /// The escaped reply.
        reply: String,
    },
}

/// The reply of a time service, with the time of the exchange.
#[derive(Debug)]
pub(crate) struct TimeReply {
    request: TimeRequest,
    reply: Vec<u8>,
    /// Local time when the request was sent.
    sent_at: Timestamp,
    /// Local time when the reply was complete.
    received_at: Timestamp,
}

impl TimeReply {
    /// Returns the reply as one printable line.
    ///
    /// # Errors
    /// If an RFC 868 reply does not have four bytes.
    pub(crate) fn line(&self) -> Result<String, Error> {
        if self.request.rfc868 {
            return Ok(self.parse(&TimeZone::UTC)?.instant.to_string());
        }
        Ok(escape_bytes(&self.reply))
    }

    /// Returns the offset of the server's clock from the local clock. `zone` applies to formats
    /// without a zone.
    ///
    /// # Errors
    /// If the reply is not in a known format.
    pub(crate) fn offset(&self, zone: &TimeZone) -> Result<ClockOffset, Error> {
        Ok(ClockOffset::new(self.parse(zone)?, self.sent_at, self.received_at))
    }

    fn parse(&self, zone: &TimeZone) -> Result<ParsedTime, Error> {
        let parsed = if self.request.rfc868 {
            read_rfc868(&self.reply)
        } else {
            str::from_utf8(&self.reply).ok().and_then(|text| read_text(text, zone))
        };
        parsed.ok_or_else(|| Error::UnknownFormat {
            server: self.request.server.clone(),
            reply: escape_bytes(&self.reply),
        })
    }
}

/// A reply, the time when it was complete, and the time since the request.
struct Received {
    reply: Vec<u8>,
    at: SystemTime,
    round_trip: Duration,
}

/// Requests the time.
///
/// # Errors
/// If the server cannot be reached, or sends no reply in time.
pub(crate) async fn ask(request: TimeRequest) -> Result<TimeReply, Error> {
    let exchange =
        async { if request.udp { ask_by_udp(&request).await } else { ask_by_tcp(&request).await } };
    let received = timeout(request.timeout, exchange).await;
    let received = received.map_err(|_| Error::Timeout(request.server.clone()))??;
    let Received { mut reply, at, round_trip } = received;
    if !request.rfc868 {
        reply = first_line(&reply).to_owned();
    }
    if reply.is_empty() {
        return Err(Error::Empty(request.server));
    }
    let clock_error = |error| request.network_error(io::Error::other(error));
    let received_at = Timestamp::try_from(at).map_err(clock_error)?;
    let sent_at = received_at.checked_sub(round_trip).map_err(clock_error)?;
    Ok(TimeReply { request, reply, sent_at, received_at })
}

impl TimeRequest {
    fn network_error(&self, source: io::Error) -> Error {
        Error::Network { server: self.server.clone(), source }
    }

    /// Whether `reply` is complete: four bytes of RFC 868, or a line of text, which NIST's servers
    /// precede with a newline. The server may leave the close to the client.
    fn is_complete(&self, reply: &[u8]) -> bool {
        if self.rfc868 {
            reply.len() >= RFC868_LENGTH
        } else {
            reply.trim_ascii_start().contains(&b'\n')
        }
    }
}

/// Requests the time over TCP.
///
/// The round trip starts before the connect, because the server may read its clock when the first
/// packet of the handshake arrives. It ends with the last byte of the reply.
async fn ask_by_tcp(request: &TimeRequest) -> Result<Received, Error> {
    let (mut stream, sent_at) = request.server.connect_timed(PORT, request.timeout).await?;
    let mut reply = Vec::new();
    let (mut at, mut round_trip) = (SystemTime::now(), sent_at.elapsed());
    loop {
        let read = stream.read_buf(&mut reply).await;
        let read = read.map_err(|error| request.network_error(error))?;
        if read > 0 {
            (at, round_trip) = (SystemTime::now(), sent_at.elapsed());
        }
        let is_complete = request.is_complete(&reply);
        let text = if is_complete { first_line(&reply) } else { &reply };
        if text.len() > MAX_REPLY {
            return Err(Error::ReplyTooLong(request.server.clone()));
        }
        if is_complete || read == 0 {
            return Ok(Received { reply, at, round_trip });
        }
    }
}

/// Requests the time over UDP from each address in turn, until the timeout: datagrams may be lost.
async fn ask_by_udp(request: &TimeRequest) -> Result<Received, Error> {
    let addresses = request.server.addresses(PORT).await?;
    loop {
        let (mut failure, mut timed_out) = (None, false);
        for address in &addresses {
            match timeout(RETRY_INTERVAL, ask_address(*address)).await {
                Ok(Ok(received)) => return Ok(received),
                Ok(Err(error)) => failure = Some(error),
                Err(_) => timed_out = true,
            }
        }
        // If every address failed at once, a retry would fail at once, too.
        if let (Some(error), false) = (failure, timed_out) {
            return Err(request.network_error(error));
        }
    }
}

async fn ask_address(address: SocketAddr) -> io::Result<Received> {
    let wildcard: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A new socket for every request: a late reply to an earlier request does not arrive here.
    let socket = UdpSocket::bind((wildcard, 0)).await?;
    socket.connect(address).await?;
    let sent_at = Instant::now();
    socket.send(&[]).await?;
    let mut reply = vec![0; MAX_REPLY];
    let length = socket.recv(&mut reply).await?;
    reply.truncate(length);
    Ok(Received { reply, at: SystemTime::now(), round_trip: sent_at.elapsed() })
}
