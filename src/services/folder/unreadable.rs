//! Log lines about unreadable files.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use super::{FolderService, WARN_INTERVAL};
use parking_lot::Mutex;

use crate::fs::filename::escape;
use crate::text::counted;

/// Maximum number of unreadable files to log, so that the names take bounded memory.
const MAX_NAMED: usize = 256;

/// Files and subfolders that were logged as unreadable.
#[derive(Debug, Default)]
pub(super) struct Unreadable {
    /// Number of entries; while it is zero, successful reads take no lock.
    count: AtomicUsize,
    /// Time of the log line by name, and whether the file is still unreadable.
    named: Mutex<BTreeMap<String, (Instant, bool)>>,
    overflowed: AtomicBool,
}

/// Decision about a log line for an unreadable file.
#[derive(Debug, PartialEq, Eq)]
enum LogAction {
    New,
    Known,
    /// The table is full for the first time.
    TooMany,
}

impl Unreadable {
    fn begin(&self, name: &str) -> LogAction {
        let mut named = self.named.lock();
        if let Some((logged_at, unreadable)) = named.get_mut(name) {
            // A file that keeps changing its state is logged at intervals.
            if *unreadable || logged_at.elapsed() < WARN_INTERVAL {
                return LogAction::Known;
            }
            (*logged_at, *unreadable) = (Instant::now(), true);
            return LogAction::New;
        }
        if named.len() >= MAX_NAMED {
            named.retain(|_, (logged_at, unreadable)| {
                *unreadable || logged_at.elapsed() < WARN_INTERVAL
            });
        }
        if named.len() >= MAX_NAMED {
            let first = !self.overflowed.swap(true, Ordering::Relaxed);
            return if first { LogAction::TooMany } else { LogAction::Known };
        }
        named.insert(name.to_owned(), (Instant::now(), true));
        self.count.store(named.len(), Ordering::Relaxed);
        LogAction::New
    }

    /// Marks the file as readable; returns whether it was logged as unreadable.
    fn end(&self, name: &str) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut named = self.named.lock();
        named.get_mut(name).is_some_and(|(_, unreadable)| std::mem::take(unreadable))
    }
}

impl FolderService {
    /// Logs an unreadable file or subfolder once.
    pub(super) fn log_unreadable(&self, name: &str, error: &io::Error) {
        let service = &*self.name;
        match self.unreadable.begin(name) {
            LogAction::New => {
                let name = escape(name);
                let message = format_args!("{service}: cannot read {name}: {error}");
                tracing::warn!(service, file = name, cause = %error, "{message}");
            }
            LogAction::TooMany => {
                let files = counted(MAX_NAMED, "unreadable file");
                tracing::warn!(service, "{service}: more than {files}: the others are not named");
            }
            LogAction::Known => {}
        }
    }

    /// Logs that a file logged as unreadable can be read again.
    pub(super) fn log_readable(&self, name: &str) {
        if self.unreadable.end(name) {
            let (service, name) = (&*self.name, escape(name));
            tracing::info!(service, file = name, "{service}: can read {name} again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_unreadable_files_once_and_in_bounded_memory() {
        let unreadable = Unreadable::default();
        assert!(!unreadable.end("a"));
        assert_eq!(
            (unreadable.begin("a"), unreadable.begin("a")),
            (LogAction::New, LogAction::Known)
        );
        assert!(unreadable.end("a") && !unreadable.end("a") && !unreadable.end("b"));
        // A file that keeps changing its state is not logged each time.
        assert_eq!(unreadable.begin("a"), LogAction::Known);
        for number in 1..MAX_NAMED {
            assert_eq!(unreadable.begin(&number.to_string()), LogAction::New);
        }
        assert_eq!(
            (unreadable.begin("x"), unreadable.begin("y")),
            (LogAction::TooMany, LogAction::Known)
        );
    }
}
