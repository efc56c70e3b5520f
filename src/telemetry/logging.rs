//! Formats and destinations of log lines.
//!
//! Text and JSON are written to standard error. Messages are complete without their fields, which
//! `journalctl` does not show by default. Data from outside is logged as a number, as an address or
//! escaped, so that it cannot control a terminal.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::env;
use std::io::{self, BufWriter, IsTerminal};
use std::os::unix::fs::MetadataExt;
use std::panic::{self, PanicHookInfo};
use std::str::FromStr;
use std::sync::OnceLock;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config_reader::{Reported, Table};
use crate::telemetry::journald::{Journal, Socket};
use crate::telemetry::log_queue::Queue;

/// The settings of `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogSettings {
    /// A level, or a filter of `tracing-subscriber`.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// [`Self::Journald`] if standard error is the journal, else [`Self::Text`].
    Auto,
    Text,
    /// A JSON object per line.
    Json,
    /// The native protocol of the journal.
    Journald,
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "journald" => Ok(Self::Journald),
            _ => Err("expected auto, text, json or journald"),
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Auto }
    }
}

impl LogSettings {
    pub(crate) fn read(mut table: Table<'_>) -> Result<Self, Reported> {
        let level =
            table.text_or("level", "info", |text| check_filter(text).map(|()| text.to_owned()));
        let format = table.text_or("format", "auto", str::parse);
        table.finish();
        Ok(Self { level: level?, format: format? })
    }
}

/// Checks a level or a filter such as `handout=debug`. The error names the expected value.
pub(crate) fn check_filter(filter: &str) -> Result<(), String> {
    let expected =
        "expected error, warn, info, debug, trace, or a filter such as \"handout=debug\"";
    // A single word other than a level would be the name of a module, and silence all others.
    let is_level = ["error", "warn", "info", "debug", "trace"].contains(&filter);
    if (is_level || filter.contains('=')) && filter.parse::<Targets>().is_ok() {
        Ok(())
    } else {
        Err(expected.to_owned())
    }
}

/// Size of the buffer between the queue and standard error, in bytes.
const BUFFER_SIZE: usize = 64 << 10;

/// The filter, format and destination of log lines.
type LogLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// The installed logger, whose settings can change. Dropping it writes the queued lines.
pub(crate) struct Logger {
    current: reload::Handle<LogLayer, Registry>,
    stderr: Queue,
    /// Started when the journal is first needed.
    journal: OnceLock<Queue>,
}

impl Logger {
    /// Installs the logger of the process.
    ///
    /// # Errors
    /// If the journal is configured but unreachable, or a logger is already installed.
    pub(crate) fn start(log: &LogSettings) -> io::Result<Self> {
        // The queue flushes it when no line waits.
        let stderr = Queue::start(BufWriter::with_capacity(BUFFER_SIZE, io::stderr()))?;
        let journal = OnceLock::new();
        let (layer, current) = reload::Layer::new(log_layer(log, &stderr, &journal)?);
        tracing_subscriber::registry().with(layer).try_init().map_err(io::Error::other)?;
        panic::set_hook(Box::new(log_panic));
        Ok(Self { current, stderr, journal })
    }

    /// Prepares other settings without applying them.
    ///
    /// # Errors
    /// If the journal is configured but unreachable.
    pub(crate) fn prepare(&self, log: &LogSettings) -> io::Result<PreparedLayer> {
        log_layer(log, &self.stderr, &self.journal).map(PreparedLayer)
    }

    /// Applies the settings that [`Self::prepare`] returned.
    pub(crate) fn apply(&self, prepared: PreparedLayer) {
        // Fails only if the logger no longer exists.
        let _ = self.current.reload(prepared.0);
    }

    /// Returns the number of lines that were discarded because their reader was too slow or gone.
    pub(crate) fn lost(&self) -> u64 {
        self.stderr.lost() + self.journal.get().map_or(0, Queue::lost)
    }
}

/// Settings that are ready to be applied.
pub(crate) struct PreparedLayer(LogLayer);

fn log_layer(log: &LogSettings, stderr: &Queue, journal: &OnceLock<Queue>) -> io::Result<LogLayer> {
    let filter: Targets = log.level.parse().map_err(io::Error::other)?;
    let stderr =
        tracing_subscriber::fmt::layer().with_writer(stderr.sender().clone()).with_target(false);
    let format = match log.format {
        LogFormat::Auto if stderr_is_the_journal() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Text,
        other => other,
    };
    Ok(match format {
        LogFormat::Journald => {
            // Opened each time, because the journal may no longer run.
            let socket = Socket::open()?;
            // Reloads run one after the other, so nothing else sets the queue in between.
            if journal.get().is_none() {
                let _ = journal.set(Queue::start(socket)?);
            }
            let queue = journal.get().map(Queue::sender).cloned();
            let queue = queue.ok_or_else(|| io::Error::other("the journal's queue is missing"))?;
            filter.and_then(Journal { queue }).boxed()
        }
        LogFormat::Json => {
            let json = stderr.json().flatten_event(true).with_current_span(false);
            filter.and_then(json.with_span_list(false)).boxed()
        }
        LogFormat::Text | LogFormat::Auto => {
            let colour =
                io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
            filter.and_then(stderr.with_ansi(colour)).boxed()
        }
    })
}

/// Logs a panic. The default hook writes to standard error, which blocks the event loop if it is a
/// pipe that is full.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("no message");
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        tracing::error!(%backtrace, "panicked at {location}: {message}");
    } else {
        tracing::error!("panicked at {location}: {message}");
    }
}

/// Whether standard error is the journal's stream (systemd.exec(5), `JOURNAL_STREAM`).
pub(crate) fn stderr_is_the_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", stderr.dev(), stderr.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_panics_instead_of_writing_to_standard_error() {
        let (mut reader, writer) = io::pipe().unwrap();
        let queue = Queue::start(writer).unwrap();
        let log = tracing_subscriber::fmt().with_writer(queue.sender().clone()).finish();
        let previous = panic::take_hook();
        panic::set_hook(Box::new(log_panic));
        let panicked = tracing::subscriber::with_default(log, || {
            panic::catch_unwind(|| panic!("number {}", 7)).is_err()
        });
        panic::set_hook(previous);
        assert!(panicked);
        drop(queue);
        let mut logged = [0; 1024];
        let length = io::Read::read(&mut reader, &mut logged).unwrap();
        let logged = String::from_utf8_lossy(&logged[..length]);
        assert!(logged.contains("panicked at src/telemetry/logging.rs:"), "{logged}");
        assert!(logged.contains(": number 7"), "{logged}");
    }

    #[test]
    fn accepts_levels_and_filters_only() {
        for good in ["error", "info", "handout=debug", "warn,handout=trace"] {
            assert_eq!(check_filter(good), Ok(()), "{good}");
        }
        for bad in ["", "loud", "3", "handout", "handout=loud", "a=b=c"] {
            assert!(check_filter(bad).unwrap_err().starts_with("expected error"), "{bad}");
        }
    }
}
