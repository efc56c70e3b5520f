//! Asks a time service, and compares its time with this machine's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::io::AsyncReadExt;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

use crate::client::clock_offset::ClockOffset;
use crate::client::time_reply::{Told, first_line, read_rfc868, read_text};
use crate::client::{ConnectError, Server};
use crate::fs::filename::escape_bytes;

/// The port of time services, by custom.
pub(crate) const PORT: u16 = 6789;

/// The longest reply that is taken for a time.
const MAX_REPLY: usize = 4096;

/// The length of an RFC 868 reply.
const RFC868_LENGTH: usize = 4;

/// How long a datagram's answer is waited for before it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// How to ask.
#[derive(Debug, Clone)]
pub struct Question {
    /// Whom.
    pub server: Server,
    /// By datagram.
    pub udp: bool,
    /// For the four bytes of RFC 868.
    pub rfc868: bool,
    /// How long all may take.
    pub timeout: Duration,
}

/// A service that did not tell the time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The network failed.
    #[error("{server}")]
    Network {
        /// Whom.
        server: Server,
        /// Why.
        source: io::Error,
    },
    /// The time-out is over.
    #[error("{0}: no answer in time")]
    Timeout(Server),
    /// It closed without a word.
    #[error("{0}: it closed the connection without telling the time")]
    Empty(Server),
    /// It said more than a time service says.
    #[error("{0}: it sent more than {MAX_REPLY} bytes; a time service says less")]
    Long(Server),
    /// It said something that is no time.
    #[error("{server}: \"{reply}\" is no time that is understood")]
    NotUnderstood {
        /// Whom.
        server: Server,
        /// What it said.
        reply: String,
    },
}

/// What a service answered, and when.
#[derive(Debug)]
pub(crate) struct Answer {
    question: Question,
    reply: Vec<u8>,
    /// This machine's time when it asked.
    asked_at: Timestamp,
    /// This machine's time when the reply was complete.
    received_at: Timestamp,
}

impl Answer {
    /// What the service said, as one line.
    ///
    /// # Errors
    /// If it was asked for RFC 868 and said something else.
    pub(crate) fn line(&self) -> Result<String, Error> {
        if self.question.rfc868 {
            return Ok(self.told(&TimeZone::UTC)?.instant.to_string());
        }
        Ok(escape_bytes(&self.reply))
    }

    /// By how much the service's clock is ahead of this machine's. A form that does not say its
    /// zone is taken to be in `zone`.
    ///
    /// # Errors
    /// If the reply tells no time that is understood.
    pub(crate) fn offset(&self, zone: &TimeZone) -> Result<ClockOffset, Error> {
        Ok(ClockOffset::new(self.told(zone)?, self.asked_at, self.received_at))
    }

    fn told(&self, zone: &TimeZone) -> Result<Told, Error> {
        let told = if self.question.rfc868 {
            read_rfc868(&self.reply)
        } else {
            str::from_utf8(&self.reply).ok().and_then(|text| read_text(text, zone))
        };
        told.ok_or_else(|| Error::NotUnderstood {
            server: self.question.server.clone(),
            reply: escape_bytes(&self.reply),
        })
    }
}

/// A reply, the time when it was complete, and how long after the question that was.
struct Received {
    reply: Vec<u8>,
    at: SystemTime,
    round_trip: Duration,
}

/// Asks a time service.
///
/// # Errors
/// If it cannot be reached, or does not answer in time or at all.
pub(crate) async fn ask(question: Question) -> Result<Answer, Error> {
    let asking = async {
        if question.udp { ask_by_datagram(&question).await } else { ask_by_tcp(&question).await }
    };
    let asked = timeout(question.timeout, asking).await;
    let received = asked.map_err(|_| Error::Timeout(question.server.clone()))??;
    let Received { mut reply, at, round_trip } = received;
    if !question.rfc868 {
        reply = first_line(&reply).to_owned();
    }
    if reply.is_empty() {
        return Err(Error::Empty(question.server));
    }
    let clock_error = |error| question.network(io::Error::other(error));
    let received_at = Timestamp::try_from(at).map_err(clock_error)?;
    let asked_at = received_at.checked_sub(round_trip).map_err(clock_error)?;
    Ok(Answer { question, reply, asked_at, received_at })
}

impl Question {
    fn network(&self, source: io::Error) -> Error {
        Error::Network { server: self.server.clone(), source }
    }

    /// Whether `reply` needs no more bytes. The server may leave the close to the client: RFC 868
    /// has four bytes, and a text ends with its first line. NIST's servers begin with a newline.
    fn is_answered_by(&self, reply: &[u8]) -> bool {
        if self.rfc868 {
            reply.len() >= RFC868_LENGTH
        } else {
            reply.trim_ascii_start().contains(&b'\n')
        }
    }
}

/// The server may read its clock as soon as the first packet of the handshake has arrived, which is
/// before the connect returns here, and as late as just before the reply is complete.
async fn ask_by_tcp(question: &Question) -> Result<Received, Error> {
    let (mut stream, asked_at) = question.server.connect_timed(PORT, question.timeout).await?;
    let mut reply = Vec::new();
    let (mut at, mut round_trip) = (SystemTime::now(), asked_at.elapsed());
    loop {
        let reading = stream.read_buf(&mut reply).await;
        let read = reading.map_err(|error| question.network(error))?;
        if read > 0 {
            (at, round_trip) = (SystemTime::now(), asked_at.elapsed());
        }
        let complete = question.is_answered_by(&reply);
        let answer = if complete { first_line(&reply) } else { &reply };
        if answer.len() > MAX_REPLY {
            return Err(Error::Long(question.server.clone()));
        }
        if complete || read == 0 {
            return Ok(Received { reply, at, round_trip });
        }
    }
}

async fn ask_by_datagram(question: &Question) -> Result<Received, Error> {
    let addresses = question.server.addresses(PORT).await?;
    // In turn, again and again, until the time-out: any datagram may be lost.
    loop {
        let (mut refused, mut silent) = (None, false);
        for address in &addresses {
            match timeout(ASK_AGAIN, ask_address(*address)).await {
                Ok(Ok(received)) => return Ok(received),
                Ok(Err(error)) => refused = Some(error),
                Err(_) => silent = true,
            }
        }
        // A refusal comes at once, and would come again at once.
        if let (Some(error), false) = (refused, silent) {
            return Err(question.network(error));
        }
    }
}

async fn ask_address(address: SocketAddr) -> io::Result<Received> {
    let wildcard: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A new socket for every question: a late answer to an earlier one is not taken for it.
    let socket = UdpSocket::bind((wildcard, 0)).await?;
    socket.connect(address).await?;
    let asked_at = Instant::now();
    socket.send(&[]).await?;
    let mut reply = vec![0; MAX_REPLY];
    let length = socket.recv(&mut reply).await?;
    reply.truncate(length);
    Ok(Received { reply, at: SystemTime::now(), round_trip: asked_at.elapsed() })
}
