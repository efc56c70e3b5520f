//! Where log lines go and what they look like.
//!
//! Text and JSON go to standard error. A message alone says what happened, as `journalctl` shows
//! nothing else; the fields beside it are for programs. Whatever comes from outside is logged as a
//! number, as an address or escaped, so that no terminal obeys it.

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
    /// A level or a filter of tracing-subscriber.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// [`Self::Journald`] if standard error is the journal, else [`Self::Text`].
    Auto,
    Text,
    /// One JSON object per line.
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

/// Whether `filter` is a level or a filter such as `handout=debug`.
///
/// # Errors
/// Says what was expected.
pub(crate) fn check_filter(filter: &str) -> Result<(), String> {
    let expected =
        "expected error, warn, info, debug, trace, or a filter such as \"handout=debug\"";
    // A lone word that is no level would be taken for the name of a module, and silence the rest.
    let level = ["error", "warn", "info", "debug", "trace"].contains(&filter);
    if (level || filter.contains('=')) && filter.parse::<Targets>().is_ok() {
        Ok(())
    } else {
        Err(expected.to_owned())
    }
}

/// So much of the lines that wait is written at one time.
const WRITTEN_AT_ONCE: usize = 64 << 10;

/// All that becomes of a log line: which are wanted, what they look like, where they go.
type Lines = Box<dyn Layer<Registry> + Send + Sync>;

/// The log, which can be changed while it runs. What is logged until it is dropped is written.
pub(crate) struct Logger {
    current: reload::Handle<Lines, Registry>,
    stderr: Queue,
    /// Opened when it is first asked for.
    journal: OnceLock<Queue>,
}

impl Logger {
    /// Begins to log.
    ///
    /// # Errors
    /// If the journal was asked for and cannot be reached, or something logs already.
    pub(crate) fn start(log: &LogSettings) -> io::Result<Self> {
        // Flushed whenever no line waits.
        let stderr = Queue::start(BufWriter::with_capacity(WRITTEN_AT_ONCE, io::stderr()))?;
        let journal = OnceLock::new();
        let (lines, current) = reload::Layer::new(lines(log, &stderr, &journal)?);
        tracing_subscriber::registry().with(lines).try_init().map_err(io::Error::other)?;
        panic::set_hook(Box::new(log_panic));
        Ok(Self { current, stderr, journal })
    }

    /// Prepares to log otherwise, and changes nothing yet.
    ///
    /// # Errors
    /// If the journal was asked for and cannot be reached.
    pub(crate) fn prepare(&self, log: &LogSettings) -> io::Result<Prepared> {
        lines(log, &self.stderr, &self.journal).map(Prepared)
    }

    /// Logs as it was prepared, from now on.
    pub(crate) fn change(&self, prepared: Prepared) {
        // It fails only if there is no log any more.
        let _ = self.current.reload(prepared.0);
    }

    /// How many lines were lost so far, as nobody took them.
    pub(crate) fn lost(&self) -> u64 {
        self.stderr.lost() + self.journal.get().map_or(0, Queue::lost)
    }
}

/// Another way to log.
pub(crate) struct Prepared(Lines);

fn lines(log: &LogSettings, stderr: &Queue, journal: &OnceLock<Queue>) -> io::Result<Lines> {
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
            // Asked each time, as it may have gone.
            let socket = Socket::open()?;
            // Reloads do not run at the same time, so nothing else sets it in between.
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
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        tracing::error!(%backtrace, "panicked at {place}: {message}");
    } else {
        tracing::error!("panicked at {place}: {message}");
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
    fn levels_and_filters_are_told_from_junk() {
        for good in ["error", "info", "handout=debug", "warn,handout=trace"] {
            assert_eq!(check_filter(good), Ok(()), "{good}");
        }
        for bad in ["", "loud", "3", "handout", "handout=loud", "a=b=c"] {
            assert!(check_filter(bad).unwrap_err().starts_with("expected error"), "{bad}");
        }
    }
}
