//! The end of a connection: its outcome, its counters, and its line in the log.

use std::io::{self, ErrorKind};
use std::time::Duration;

use super::{Connection, Stream};
use crate::telemetry::counters::{ConnectionOutcome, Label};

/// Bytes that a kernel acknowledges before its program reads them (`tcp_rmem`). If an immediate
/// reset follows a shorter reply, the program did not read it: otherwise it ends with FIN.
const PROBE_BYTES: u64 = 64 << 10;

/// Maximum duration of a health check or port scan that does not read. A later reset is logged.
const PROBE_TIME: Duration = Duration::from_millis(100);

/// The reason why a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The client or the network ended the connection.
    #[error("the client ended the connection")]
    Client(#[source] io::Error),
    /// The client acknowledged no byte for `idle-timeout`.
    #[error("the client acknowledged nothing for too long")]
    Idle,
    /// The service or this machine failed.
    #[error("the service failed")]
    Service(#[source] io::Error),
}

impl ServeError {
    /// Distinguishes errors of the client from those of this machine.
    pub(super) fn of_socket(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe
            | ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NotConnected
            | ErrorKind::TimedOut => Self::Client(error),
            _ => Self::Service(error),
        }
    }
}

/// The end of a connection, known before it is dropped.
#[derive(Debug)]
pub(super) enum Outcome {
    Complete,
    Failed(ServeError),
    MaxDuration,
    Shutdown,
    /// Counted by its reason, and not logged.
    Rejected,
}

impl Outcome {
    fn label(&self) -> Option<ConnectionOutcome> {
        Some(match self {
            Outcome::Complete => ConnectionOutcome::Complete,
            Outcome::Failed(ServeError::Client(_)) => ConnectionOutcome::Reset,
            Outcome::Failed(ServeError::Idle) => ConnectionOutcome::IdleTimeout,
            Outcome::Failed(ServeError::Service(_)) => ConnectionOutcome::Failed,
            Outcome::MaxDuration => ConnectionOutcome::MaxDuration,
            Outcome::Shutdown => ConnectionOutcome::Shutdown,
            Outcome::Rejected => return None,
        })
    }
}

impl<S: Stream> Connection<S> {
    /// Whether the connection ended before the client read anything, as those of health checks and
    /// port scans do. `bytes` were acknowledged; see [`PROBE_BYTES`].
    fn is_unserved(&self, outcome: ConnectionOutcome, bytes: u64) -> bool {
        let only_buffered = outcome == ConnectionOutcome::Reset
            && self.half_closed
            && bytes == self.written
            && bytes <= PROBE_BYTES
            && self.started.elapsed() <= PROBE_TIME;
        !matches!(outcome, ConnectionOutcome::Failed | ConnectionOutcome::Panic)
            && (bytes == 0 || only_buffered)
    }
}

impl<S: Stream> Drop for Connection<S> {
    fn drop(&mut self) {
        let mut bytes = self.written;
        if !self.is_closed_cleanly {
            bytes = bytes.saturating_sub(self.stream.unacknowledged().unwrap_or(0));
        }
        let duration = self.started.elapsed();
        let label = match &self.outcome {
            Some(outcome) => outcome.label(),
            None if std::thread::panicking() => Some(ConnectionOutcome::Panic),
            None => Some(ConnectionOutcome::Shutdown),
        };
        let Some(label) = label else { return self.context.counts.take_back() };
        self.context.counts.end(label, duration);

        let duration = duration.as_secs_f64();
        let (service, peer, outcome) = (&*self.context.service, self.peer, label.name());
        if let Some(Outcome::Failed(ServeError::Service(cause))) = &self.outcome {
            let message = format_args!("{service}: {peer} {outcome}: {cause}");
            tracing::warn!(service, %peer, bytes, duration, outcome, %cause, "{message}");
            return;
        }
        // `journalctl` shows the message only.
        let message = format_args!("{service}: {peer} {outcome}");
        let unserved = self.is_unserved(label, bytes);
        if unserved && !self.context.log_at_debug {
            self.context.counts.add_unserved(label, self.peer);
        }
        if unserved || self.context.log_at_debug {
            tracing::debug!(service, %peer, bytes, duration, outcome, "{message}");
        } else {
            tracing::info!(service, %peer, bytes, duration, outcome, "{message}");
        }
    }
}
