//! The list of files as a line of JSON, shared by concurrent requests.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{FolderService, WARN_INTERVAL};
use crate::fs::folder::{Entry, Listing};
use crate::text::counted;

/// Maximum age of a list that is sent.
const LIST_MAX_AGE: Duration = Duration::from_millis(500);

/// Maximum length of a list, in bytes; clients accept no longer ones.
const MAX_LIST_SIZE: usize = 16 << 20;

/// Minimum interval between log lines about omitted entries.
const OMISSIONS_INTERVAL: Duration = Duration::from_secs(10);

impl FolderService {
    /// Returns the list as one line of JSON, or the reason for the client why there is none.
    /// Concurrent requests share one list.
    pub(super) async fn list(self: &Arc<Self>) -> Result<Arc<str>, String> {
        let mut last = self.list.lock().await;
        if let Some((made, list)) = &*last
            && made.elapsed() < LIST_MAX_AGE
        {
            return Ok(Arc::clone(list));
        }
        let service = Arc::clone(self);
        let max = usize::try_from(self.settings.max_files.get()).unwrap_or(usize::MAX);
        let made = self.readers.run("", move || {
            let listing = service.settings.folder.list(max)?;
            Ok::<_, io::Error>(listing.map(|listing| {
                service.log_omissions(&listing);
                list_line(&listing.entries)
            }))
        });
        match made.await.flatten() {
            Ok(Some(line)) if line.len() <= MAX_LIST_SIZE => {
                let line = Arc::from(line);
                *last = Some((Instant::now(), Arc::clone(&line)));
                Ok(line)
            }
            Ok(made) => {
                let files = counted(max, "file");
                let error = io::Error::other(match made {
                    Some(_) => format!("more than {} MiB", MAX_LIST_SIZE >> 20),
                    None => format!("more than {files} (max-files)"),
                });
                self.warn_limited("the list is too long and is not sent", &error);
                Err("the list is too long".to_owned())
            }
            Err(error) => {
                self.warn_limited("the folder cannot be listed", &error);
                Err("the folder cannot be read".to_owned())
            }
        }
    }

    /// Logs the omitted entries if they have changed, at most once per `OMISSIONS_INTERVAL`.
    fn log_omissions(&self, listing: &Listing) {
        for (name, error) in &listing.unreadable {
            self.log_unreadable(name, error);
        }
        let mut logged = self.logged_omissions.lock();
        let recent = logged.1.is_some_and(|last| last.elapsed() < OMISSIONS_INTERVAL);
        if logged.0 == listing.omitted || recent {
            return;
        }
        *logged = (listing.omitted.clone(), Some(Instant::now()));
        drop(logged);
        let service = &*self.name;
        let total: u64 = listing.omitted.values().sum();
        let reasons =
            listing.omitted.iter().map(|(why, count)| format!("{count} {}", why.reason()));
        let reasons = reasons.collect::<Vec<_>>().join(", ");
        let reasons = if total > 0 { format!(" ({reasons})") } else { String::new() };
        let entries = counted(total, "entry");
        let listed = listing.entries.len();
        let message = format_args!("{service}: list leaves out {entries}{reasons}");
        tracing::info!(service, listed, left_out = total, "{message}");
    }

    /// Logs a fault that clients can cause, at most once per `WARN_INTERVAL`.
    fn warn_limited(&self, fault: &'static str, error: &io::Error) {
        let mut warned_at = self.warned_at.lock();
        if warned_at.is_none_or(|last| last.elapsed() >= WARN_INTERVAL) {
            *warned_at = Some(Instant::now());
            let service = &*self.name;
            tracing::warn!(service, cause = %error, "{service}: {fault}: {error}");
        }
    }
}

fn list_line(entries: &[Entry]) -> String {
    let mut line = String::from("{\"files\":[");
    for (number, Entry { name, size, modified }) in entries.iter().enumerate() {
        let separator = if number > 0 { "," } else { "" };
        let name = serde_json::Value::from(name.as_str());
        // Writing to a string does not fail.
        let _ = write!(
            line,
            "{separator}{{\"filename\":{name},\"size\":{size},\"modified\":\"{modified}\"}}"
        );
    }
    line.push_str("]}\n");
    line
}
