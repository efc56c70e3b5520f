//! The native protocol of the journal: one datagram with fields for each event
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>).
//!
//! The caller of a log macro only encodes the event. The thread of the queue sends it, because a
//! journal that does not read blocks the sender.

use std::fmt::{Debug, Write as _};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::telemetry::log_queue::Sender;

/// The socket of the journal.
const SOCKET: &str = "/run/systemd/journal/socket";

/// A writer that sends each write to the journal as a datagram.
#[derive(Debug)]
pub(crate) struct Socket(UnixDatagram);

impl Socket {
    /// Creates an unconnected socket, which also reaches a restarted journal.
    ///
    /// # Errors
    /// If no journal listens.
    pub(crate) fn open() -> io::Result<Self> {
        // Connecting a datagram socket checks that the journal listens, and does not block.
        UnixDatagram::unbound()?.connect(SOCKET)?;
        UnixDatagram::unbound().map(Self)
    }
}

impl Write for Socket {
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        self.0.send_to(entry, SOCKET)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A layer that encodes each event as an entry of the journal.
pub(crate) struct Journal {
    /// The queue whose thread writes to [`Socket`].
    pub queue: Sender,
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // The queue counts entries that it has no room for.
        let _ = self.queue.clone().write_all(&Entry::of(event).0);
    }
}

/// An encoded entry of the journal.
#[derive(Default)]
struct Entry(Vec<u8>);

impl Entry {
    fn of(event: &Event<'_>) -> Self {
        let metadata = event.metadata();
        let mut entry = Self::default();
        entry.put("PRIORITY", priority(*metadata.level()));
        entry.put("SYSLOG_IDENTIFIER", env!("CARGO_PKG_NAME"));
        entry.put("TARGET", metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            entry.put("CODE_FILE", file);
            entry.put("CODE_LINE", &line.to_string());
        }
        event.record(&mut entry);
        entry
    }

    /// Adds a field. The length precedes the value, which may therefore be any bytes; the name is
    /// one of this program.
    fn put(&mut self, name: &str, value: &str) {
        let name = name.bytes().map(|byte| match byte {
            b'.' => b'_',
            other => other.to_ascii_uppercase(),
        });
        self.0.extend(name);
        self.0.push(b'\n');
        self.0.extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(b'\n');
    }
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = write!(text, "{value:?}");
        self.put(field.name(), &text);
    }
}

/// Returns the priority of a level, as in syslog(3).
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}
