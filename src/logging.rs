//! Where log lines go and what they look like.
//!
//! Text and JSON go to standard error. A message alone says what happened, as `journalctl` shows
//! nothing else; the fields beside it are for programs. Whatever comes from outside is logged as a
//! number, as an address or escaped, so that no terminal obeys it.

mod journal;

use std::env;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config::{Log, LogFormat};

use journal::{Journal, Socket};

/// Whether `filter` is a level or a filter such as `handout=debug`.
///
/// # Errors
/// Says what was expected.
pub fn check_filter(filter: &str) -> Result<(), String> {
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

/// Lines that wait for a standard error, or a journal, that does not take them; more are lost, as
/// logging must not keep the services waiting.
const WAITING_LINES: usize = 10_000;

/// So much of the lines that wait is written at one time.
const WRITTEN_AT_ONCE: usize = 64 << 10;

/// All that becomes of a log line: which are wanted, what they look like, where they go.
type Lines = Box<dyn Layer<Registry> + Send + Sync>;

/// The log, which can be changed while it runs. What is logged until it is dropped is written.
pub struct Logger {
    current: reload::Handle<Lines, Registry>,
    stderr: Queue,
    /// Opened when it is first asked for.
    journal: OnceLock<Queue>,
}

/// Lines on their way to what takes them, with the thread that may have to wait for it.
struct Queue {
    lines: NonBlocking,
    failed: Arc<AtomicU64>,
    _writer: WorkerGuard,
}

impl Queue {
    fn to(place: impl Write + Send + 'static) -> Self {
        let failed = Arc::default();
        let counting = Counting { place, failed: Arc::clone(&failed) };
        let queue = NonBlockingBuilder::default()
            .buffered_lines_limit(WAITING_LINES)
            .lossy(true)
            .finish(counting);
        Self { lines: queue.0, failed, _writer: queue.1 }
    }

    /// How many lines found no room, or could not be written.
    fn lost(&self) -> u64 {
        let dropped = self.lines.error_counter().dropped_lines() as u64;
        dropped + self.failed.load(Ordering::Relaxed)
    }
}

/// Counts the lines that cannot be written.
struct Counting<W> {
    place: W,
    failed: Arc<AtomicU64>,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.place.write(line)
    }

    fn write_all(&mut self, line: &[u8]) -> io::Result<()> {
        let written = self.place.write_all(line);
        if written.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.place.flush()
    }
}

impl Logger {
    /// Begins to log.
    ///
    /// # Errors
    /// If the journal was asked for and cannot be reached, or something logs already.
    pub fn start(log: &Log) -> io::Result<Self> {
        // Flushed whenever no line waits.
        let stderr = Queue::to(BufWriter::with_capacity(WRITTEN_AT_ONCE, io::stderr()));
        let journal = OnceLock::new();
        let (lines, current) = reload::Layer::new(lines(log, &stderr, &journal)?);
        tracing_subscriber::registry().with(lines).try_init().map_err(io::Error::other)?;
        Ok(Self { current, stderr, journal })
    }

    /// Prepares to log otherwise, and changes nothing yet.
    ///
    /// # Errors
    /// If the journal was asked for and cannot be reached.
    pub fn prepare(&self, log: &Log) -> io::Result<Prepared> {
        lines(log, &self.stderr, &self.journal).map(Prepared)
    }

    /// Logs as it was prepared, from now on.
    pub fn change(&self, prepared: Prepared) {
        // It fails only if there is no log any more.
        let _ = self.current.reload(prepared.0);
    }

    /// How many lines were lost so far, as nobody took them.
    pub fn lost(&self) -> u64 {
        self.stderr.lost() + self.journal.get().map_or(0, Queue::lost)
    }
}

/// Another way to log.
pub struct Prepared(Lines);

fn lines(log: &Log, stderr: &Queue, journal: &OnceLock<Queue>) -> io::Result<Lines> {
    let filter: Targets = log.level.parse().map_err(io::Error::other)?;
    let stderr =
        tracing_subscriber::fmt::layer().with_writer(stderr.lines.clone()).with_target(false);
    let format = match log.format {
        LogFormat::Auto if stderr_is_the_journal() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Text,
        other => other,
    };
    Ok(match format {
        LogFormat::Journald => {
            // Asked each time, as it may have gone.
            let socket = Socket::open()?;
            let queue = journal.get_or_init(|| Queue::to(socket)).lines.clone();
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

/// Whether standard error is the journal's stream (systemd.exec(5), `JOURNAL_STREAM`).
pub fn stderr_is_the_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", stderr.dev(), stderr.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

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
