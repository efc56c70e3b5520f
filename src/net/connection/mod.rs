//! Connections: every byte is delivered, or the connection is reset.
//!
//! [`Connection::answer`] runs a service, which receives and sends ([`transfer`]); then
//! [`Connection::finish`] waits until the client has everything ([`linger`]). A connection that is
//! dropped earlier, be it by a timeout, a panic or a shutdown, is reset, so that no client takes a
//! part for the whole. Its end is counted and logged ([`outcome`]).
//!
//! Access and limits are decided by the [`listener`](super::listener).

mod context;
mod linger;
mod outcome;
mod stream;
#[cfg(test)]
mod tests;
mod transfer;

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::coop::unconstrained;
use tokio::time::Instant;

use crate::net::idle_timer::timeout_while_running;
use crate::telemetry::counters::RejectReason;
use outcome::Outcome;

pub use crate::telemetry::peer::Peer;
pub use context::{ConnectionContext, Deadlines, Shutdown};
pub use outcome::ServeError;
pub(crate) use stream::PeerState;
pub use stream::{MoreToCome, Stream};

/// Maximum wait for the PROXY header, which a balancer sends at once.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The same during a drain.
const HEADER_TIMEOUT_ON_DRAIN: Duration = Duration::from_secs(1);

/// An accepted connection.
#[derive(Debug)]
pub struct Connection<S: Stream> {
    stream: S,
    peer: Peer,
    context: Arc<ConnectionContext>,
    started: Instant,
    written: u64,
    discarded: u64,
    /// The service receives input; otherwise it is discarded.
    input_wanted: bool,
    /// The client closed its side.
    input_ended: bool,
    /// Everything was sent, including the end.
    half_closed: bool,
    /// Everything was delivered: the close does not reset the connection.
    is_closed_cleanly: bool,
    outcome: Option<Outcome>,
}

impl<S: Stream> Connection<S> {
    /// Takes over an accepted stream, and counts it.
    pub fn new(stream: S, peer: Peer, context: Arc<ConnectionContext>) -> Self {
        context.counts.begin();
        Self {
            stream,
            peer,
            context,
            started: Instant::now(),
            written: 0,
            discarded: 0,
            input_wanted: false,
            input_ended: false,
            half_closed: false,
            is_closed_cleanly: false,
            outcome: None,
        }
    }

    /// Runs `answer` within the deadlines, and ends the sending side. The returned connection is
    /// still to be delivered, with [`is_over`](Self::is_over) or [`finish`](Self::finish). Returns
    /// `None` if it failed.
    pub async fn answer<F>(mut self, answer: F) -> Option<Self>
    where
        F: AsyncFnOnce(&mut Self) -> Result<(), ServeError>,
    {
        let answer_and_end = async |connection: &mut Self| {
            answer(connection).await?;
            connection.stream.half_close().map_err(ServeError::of_socket)?;
            connection.half_closed = true;
            Ok(())
        };
        self.within_deadlines(answer_and_end).await;
        self.outcome.is_none().then_some(self)
    }

    /// Runs `read` within the deadlines, which returns the client of a PROXY header, if it differs
    /// from the peer. Returns `None` and counts a rejection if there is no valid header.
    pub async fn read_proxy_header<F>(mut self, read: F) -> Option<Self>
    where
        F: AsyncFnOnce(&mut S) -> io::Result<Option<SocketAddr>>,
    {
        let time = HEADER_TIMEOUT.min(self.context.deadlines.idle);
        let drain = self.context.shutdown.drain.clone();
        let read_client = async |connection: &mut Self| {
            let header = pin!(read(&mut connection.stream));
            let header = timeout_while_running(time, header);
            let drain_timeout = async {
                drain.cancelled().await;
                tokio::time::sleep(HEADER_TIMEOUT_ON_DRAIN).await;
            };
            let client = tokio::select! {
                biased;
                client = header => client.ok_or(ServeError::Idle)?,
                () = drain_timeout => return Err(ServeError::Idle),
            };
            if let Some(client) = client.map_err(ServeError::of_socket)? {
                connection.peer = Peer::Internet(client);
            }
            Ok(())
        };
        self.within_deadlines(read_client).await;
        match self.outcome {
            None => return Some(self),
            // The daemon itself ends the connection.
            Some(Outcome::Shutdown) => {}
            Some(_) => self.reject(RejectReason::ProxyProtocol),
        }
        None
    }

    /// Waits for a file operation of the service, at most for the idle timeout, so that a file system
    /// that hangs does not hold a permit for ever.
    pub async fn with_read_timeout<T>(
        &self,
        read: Pin<&mut impl Future<Output = T>>,
    ) -> Result<T, ServeError> {
        timeout_while_running(self.context.deadlines.idle, read).await.ok_or_else(|| {
            ServeError::Service(io::Error::other("the file system does not answer (idle-timeout)"))
        })
    }

    /// Resets a connection that was not served, and counts the reason.
    pub fn reject(mut self, reason: RejectReason) {
        self.context.counts.rejections.add(reason);
        self.outcome = Some(Outcome::Rejected);
    }

    /// Returns the client: the peer, or the address of the PROXY header.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Returns the underlying stream.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Whether the client closed its side.
    pub fn input_ended(&self) -> bool {
        self.input_ended
    }

    /// Runs `act` within the deadlines. An error or an expired deadline becomes the outcome.
    async fn within_deadlines<F>(&mut self, act: F)
    where
        F: AsyncFnOnce(&mut Self) -> Result<(), ServeError>,
    {
        let deadline = self.started + self.context.deadlines.total;
        let abort = self.context.shutdown.abort.clone();
        let outcome = tokio::select! {
            // A connection that never waits registers no timer.
            biased;
            result = act(self) => match result {
                Ok(()) => return,
                Err(error) => Outcome::Failed(error),
            },
            // Deadlines apply although the budget of the task may be used up.
            () = unconstrained(tokio::time::sleep_until(deadline)) => Outcome::MaxDuration,
            () = unconstrained(abort.cancelled()) => Outcome::Shutdown,
        };
        self.end(outcome);
    }

    fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(match outcome {
            // A client that has everything is complete.
            Outcome::MaxDuration | Outcome::Shutdown
                if matches!(self.close_if_delivered(), Ok(true)) =>
            {
                Outcome::Complete
            }
            other => other,
        });
    }
}
