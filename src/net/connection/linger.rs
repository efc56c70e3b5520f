//! Delivery: the wait after the half-close until the client acknowledged every byte.
//!
//! An immediate close could lose the end of a reply: a kernel that holds unread input answers the
//! close with a reset and discards its send queue. Input is therefore read and discarded, within
//! bounds, until the client closes its side and the send queue is empty.

use std::io::ErrorKind;
use std::time::Duration;

use super::outcome::Outcome;
use super::{Connection, PeerState, ServeError, Stream};
use crate::net::idle_timer::{IdleTimer, ready_within};

/// Maximum silence of a client that has everything and keeps its side open. An earlier close could
/// answer late input with a reset, and the client would lose bytes that it has not read.
pub(super) const LINGER_SILENCE: Duration = Duration::from_secs(5);

/// Maximum time for which a client that has everything may go on sending.
pub(super) const LINGER_TOTAL: Duration = Duration::from_secs(30);

/// Minimum and maximum time between two checks of the acknowledged bytes.
pub(super) const CHECK_INTERVAL: (Duration, Duration) =
    (Duration::from_millis(20), Duration::from_secs(1));

impl<S: Stream> Connection<S> {
    /// Waits until the client has everything, within the deadlines.
    pub async fn finish(mut self) {
        self.within_deadlines(Self::linger).await;
    }

    /// Checks without waiting whether the connection has reached its end: fully acknowledged and
    /// closed by the client, or failed.
    pub fn is_over(&mut self, state: PeerState) -> bool {
        let read = match state {
            PeerState::Silent => Ok(()),
            PeerState::Closed => {
                self.input_ended = true;
                Ok(())
            }
            PeerState::Readable => self.discard_available(),
        };
        let over = self.input_ended || self.context.shutdown.drain.is_cancelled();
        match read.and_then(|()| if over { self.close_if_delivered() } else { Ok(false) }) {
            Err(error) => self.end(Outcome::Failed(error)),
            Ok(true) => self.end(Outcome::Complete),
            Ok(false) if self.context.shutdown.abort.is_cancelled() => self.end(Outcome::Shutdown),
            Ok(false) => {}
        }
        self.outcome.is_some()
    }

    /// Makes the close an end instead of a reset if everything was delivered.
    pub(super) fn close_if_delivered(&mut self) -> Result<bool, ServeError> {
        if self.half_closed && self.stream.unacknowledged().map_err(ServeError::of_socket)? == 0 {
            self.close_cleanly()?;
        }
        Ok(self.is_closed_cleanly)
    }

    fn close_cleanly(&mut self) -> Result<(), ServeError> {
        self.stream.close_cleanly(self.input_ended).map_err(ServeError::Service)?;
        self.is_closed_cleanly = true;
        Ok(())
    }

    async fn linger(&mut self) -> Result<(), ServeError> {
        let idle = self.context.deadlines.idle;
        let mut timer = IdleTimer::new(idle);
        let longest_pause = timer.interval().clamp(CHECK_INTERVAL.0, CHECK_INTERVAL.1);
        let (mut lingered, mut silent) = (Duration::ZERO, Duration::ZERO);
        let mut pause = if self.is_draining_input() { CHECK_INTERVAL.0 } else { Duration::ZERO };
        loop {
            let (has_sent, waited) = self.discard_for(pause).await?;
            lingered += waited;
            silent = if has_sent { Duration::ZERO } else { silent + waited };
            pause = (pause * 2).clamp(CHECK_INTERVAL.0, longest_pause);

            let unacknowledged = self.stream.unacknowledged().map_err(ServeError::of_socket)?;
            if unacknowledged == 0 {
                let waited_enough = !self.is_draining_input()
                    || silent >= LINGER_SILENCE.min(idle)
                    || lingered >= LINGER_TOTAL
                    || self.context.shutdown.drain.is_cancelled();
                if waited_enough {
                    self.close_cleanly()?;
                    self.end(Outcome::Complete);
                    return Ok(());
                }
            } else if timer.is_expired_after(waited, unacknowledged) {
                return Err(ServeError::Idle);
            }
        }
    }

    /// Discards input for `time` or until its end. Returns whether the client sent any, and the
    /// part of `time` that counts against it.
    async fn discard_for(&mut self, time: Duration) -> Result<(bool, Duration), ServeError> {
        let before = self.discarded;
        let discard = async {
            if !self.is_draining_input() {
                return std::future::pending().await;
            }
            while self.is_draining_input() {
                std::future::poll_fn(|context| self.poll_discard(context)).await?;
            }
            Ok(())
        };
        let waited = match ready_within(time, discard).await {
            Ok(discarded) => discarded.map(|()| Duration::ZERO).map_err(ServeError::of_socket)?,
            Err(waited) => waited,
        };
        Ok((self.discarded > before, waited))
    }

    /// Discards some of the available input without waiting.
    fn discard_available(&mut self) -> Result<(), ServeError> {
        // Mostly the last input and its end. More is left for the next check.
        for _ in 0..2 {
            if !self.is_draining_input() {
                break;
            }
            match self.stream.try_discard() {
                Ok(read) => self.note_discarded(read),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(ServeError::of_socket(error)),
            }
        }
        Ok(())
    }
}
