//! Where log lines go and what they look like.
//!
//! Text and JSON go to standard error. A message alone says what happened, as `journalctl` shows
//! nothing else; the fields beside it are for programs. Whatever comes from outside is logged as a
//! number, as an address or escaped, so that no terminal obeys it.

use std::env;
use std::io::{self, IsTerminal};
use std::os::unix::fs::MetadataExt;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

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
    if (level || filter.contains('=')) && EnvFilter::try_new(filter).is_ok() {
        Ok(())
    } else {
        Err(expected.to_owned())
    }
}

/// Lines that wait for a standard error that does not take them; more are lost, as logging must
/// not keep the services waiting.
const WAITING_LINES: usize = 10_000;

/// Begins to log. What is logged until the guard is dropped is written.
///
/// # Errors
/// If the journal was asked for and cannot be reached, or something logs already.
pub fn start(log: &Log) -> io::Result<WorkerGuard> {
    let filter = EnvFilter::try_new(&log.level).map_err(io::Error::other)?;
    let registry = tracing_subscriber::registry().with(filter);
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING_LINES)
        .lossy(true)
        .finish(io::stderr());
    let stderr = tracing_subscriber::fmt::layer().with_writer(writer);
    let format = match log.format {
        LogFormat::Auto if stderr_is_the_journal() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Text,
        other => other,
    };
    let started = match format {
        LogFormat::Journald => {
            // Without the library's prefix, so that `journalctl SERVICE=time.clock` finds them.
            let journal = tracing_journald::layer()?
                .with_field_prefix(None)
                .with_priority_mappings(PriorityMappings {
                    info: Priority::Informational,
                    debug: Priority::Debug,
                    ..PriorityMappings::new()
                });
            registry.with(journal).try_init()
        }
        LogFormat::Json => {
            let json = stderr.json().flatten_event(true).with_current_span(false);
            registry.with(json.with_span_list(false).with_target(false)).try_init()
        }
        LogFormat::Text | LogFormat::Auto => {
            let colour =
                io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
            registry.with(stderr.with_ansi(colour).with_target(false)).try_init()
        }
    };
    started.map(|()| guard).map_err(io::Error::other)
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
