//! The journal's own protocol: one datagram for each event, with its fields
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>).
//!
//! An event is only put together here; whoever sends it may be kept waiting by a journal that does
//! not answer.

use std::fmt::{Debug, Write as _};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::telemetry::log_queue::Sender;

/// Where the journal receives datagrams.
const SOCKET: &str = "/run/systemd/journal/socket";

/// Sends each thing that is written to the journal.
#[derive(Debug)]
pub(crate) struct Socket(UnixDatagram);

impl Socket {
    /// A way to the journal, also to one that is started anew meanwhile.
    ///
    /// # Errors
    /// If there is no journal.
    pub(crate) fn open() -> io::Result<Self> {
        // This looks whether somebody is there, and waits for nobody.
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

/// Makes an entry of each event.
pub(crate) struct Journal {
    /// Takes the entries to [`Socket`].
    pub queue: Sender,
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // If it finds no room in the queue, that is counted there.
        let _ = self.queue.clone().write_all(&Entry::of(event).0);
    }
}

/// An entry of the journal.
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

    /// Adds a field; its value may be anything, as its length is said. The name is one of ours.
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

/// As syslog(3) has them.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}
