//! The settings and counters that all connections of a service share.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::telemetry::counters::Counts;

/// Timeouts of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Maximum time without an acknowledged byte. Pauses of this process do not count.
    pub idle: Duration,
    /// Maximum duration of the connection, pauses included.
    pub total: Duration,
}

/// The two stages of a shutdown, of a service or of the daemon.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Stops new requests, and the wait for clients that have received everything.
    pub drain: CancellationToken,
    /// Resets open connections.
    pub abort: CancellationToken,
}

impl Shutdown {
    /// Returns a part of this shutdown, which can also begin by itself.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { drain: self.drain.child_token(), abort: self.abort.child_token() }
    }
}

/// Shared by the connections of one service.
#[derive(Debug, Clone)]
pub struct ConnectionContext {
    /// Name of the service in the log.
    pub service: Arc<str>,
    /// Timeouts of each connection.
    pub deadlines: Deadlines,
    /// Ends connections early.
    pub shutdown: Shutdown,
    /// Counters of the service.
    pub counts: Arc<Counts>,
    /// Whether connections are logged at `debug`, as those of monitoring are frequent.
    pub log_at_debug: bool,
}
