//! Where log lines go and what they look like.
//!
//! Text and JSON go to standard error. A message alone says what happened, as `journalctl` shows
//! nothing else; the fields beside it are for programs. Whatever comes from outside is logged as a
//! number, as an address or escaped, so that no terminal obeys it.

use std::env;
use std::io::{self, BufWriter, IsTerminal};
use std::os::unix::fs::MetadataExt;

use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config::{Log, LogFormat};

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

/// Lines that wait for a standard error that does not take them; more are lost, as logging must
/// not keep the services waiting.
const WAITING_LINES: usize = 10_000;

/// So much of the lines that wait is written at one time.
const WRITTEN_AT_ONCE: usize = 64 << 10;

/// All that becomes of a log line: which are wanted, what they look like, where they go.
type Lines = Box<dyn Layer<Registry> + Send + Sync>;

/// The log, which can be changed while it runs. What is logged until it is dropped is written.
pub struct Logger {
    current: reload::Handle<Lines, Registry>,
    stderr: NonBlocking,
    _writer: WorkerGuard,
}

impl Logger {
    /// Begins to log.
    ///
    /// # Errors
    /// If the journal was asked for and cannot be reached, or something logs already.
    pub fn start(log: &Log) -> io::Result<Self> {
        let (stderr, writer) = NonBlockingBuilder::default()
            .buffered_lines_limit(WAITING_LINES)
            .lossy(true)
            // Flushed whenever no line waits.
            .finish(BufWriter::with_capacity(WRITTEN_AT_ONCE, io::stderr()));
        let (lines, current) = reload::Layer::new(lines(log, &stderr)?);
        tracing_subscriber::registry().with(lines).try_init().map_err(io::Error::other)?;
        Ok(Self { current, stderr, _writer: writer })
    }

    /// Prepares to log otherwise, and changes nothing yet.
    ///
    /// # Errors
    /// If the journal was asked for and cannot be reached.
    pub fn prepare(&self, log: &Log) -> io::Result<Prepared> {
        lines(log, &self.stderr).map(Prepared)
    }

    /// Logs as it was prepared, from now on.
    pub fn change(&self, prepared: Prepared) {
        // It fails only if there is no log any more.
        let _ = self.current.reload(prepared.0);
    }
}

/// Another way to log.
pub struct Prepared(Lines);

fn lines(log: &Log, stderr: &NonBlocking) -> io::Result<Lines> {
    let filter: Targets = log.level.parse().map_err(io::Error::other)?;
    let stderr = tracing_subscriber::fmt::layer().with_writer(stderr.clone()).with_target(false);
    let format = match log.format {
        LogFormat::Auto if stderr_is_the_journal() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Text,
        other => other,
    };
    Ok(match format {
        LogFormat::Journald => {
            // Without the library's prefix, so that `journalctl SERVICE=time.clock` finds them.
            let journal = tracing_journald::layer()?
                .with_field_prefix(None)
                .with_priority_mappings(PriorityMappings {
                    info: Priority::Informational,
                    debug: Priority::Debug,
                    ..PriorityMappings::new()
                });
            filter.and_then(journal).boxed()
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
