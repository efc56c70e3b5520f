//! The folder service: answers each line with a file name by one line of JSON, in order.
//!
//! An empty line requests the list of files.
//!
//! Documents are cached within `cache-limit` until their file changes. Others are encoded while
//! they are sent.

mod cache;
mod listing;
mod request;
mod unreadable;

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use quick_cache::sync::Cache;
use tokio::sync::Mutex;
use tokio::time::{MissedTickBehavior, interval};

use crate::fs::blocking_pool::{BlockingPool, UNANSWERED, if_slow};
use crate::fs::file::Stamp;
use crate::fs::filename::escape;
use crate::fs::folder::{Folder, Omission};
use crate::net::connection::{Connection, ServeError};
use crate::net::service::Service;
use crate::net::stream::LazySocket;
use crate::telemetry::health_flag::HealthFlag;

use cache::{Document, DocumentWeight};
use unreadable::Unreadable;

/// Maximum number of cached digests of files whose documents are not cached.
const MAX_DIGESTS: usize = 4096;

/// Default maximum number of files in a list.
pub(crate) const DEFAULT_MAX_FILES: NonZeroU32 = NonZeroU32::new(10_000).unwrap();

/// Minimum interval between log lines about the same fault, if clients can cause it.
const WARN_INTERVAL: Duration = Duration::from_mins(1);

/// Interval of the checks whether the folder can be read.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Settings of a folder service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The folder to serve.
    pub folder: Folder,
    /// Maximum total size of the cached documents, in bytes.
    pub cache_limit: u64,
    /// Maximum number of files in the list.
    pub max_files: NonZeroU32,
}

/// A running folder service.
#[derive(Debug)]
pub struct FolderService {
    name: Arc<str>,
    settings: Settings,
    documents: Cache<(String, Stamp), Arc<Document>, DocumentWeight>,
    digests: Cache<Stamp, [u8; 32]>,
    /// Size of all documents in memory, cached or being sent, in bytes.
    memory_used: Arc<AtomicU64>,
    list: Mutex<Option<(Instant, Arc<str>)>>,
    warned_at: parking_lot::Mutex<Option<Instant>>,
    unreadable: Unreadable,
    /// Omitted entries as last logged, and the time of that log line.
    logged_omissions: parking_lot::Mutex<(BTreeMap<Omission, u64>, Option<Instant>)>,
    readers: BlockingPool,
    health: HealthFlag,
}

impl FolderService {
    /// Creates the service. `name` identifies it in the log.
    pub fn new(name: Arc<str>, settings: Settings) -> Self {
        // An estimate that only sizes the tables of the cache.
        let items = usize::try_from(settings.cache_limit >> 16).unwrap_or(0).clamp(16, MAX_DIGESTS);
        Self {
            name,
            documents: Cache::with_weighter(items, settings.cache_limit, DocumentWeight),
            settings,
            digests: Cache::new(MAX_DIGESTS),
            memory_used: Arc::default(),
            list: Mutex::default(),
            warned_at: parking_lot::Mutex::default(),
            unreadable: Unreadable::default(),
            logged_omissions: parking_lot::Mutex::default(),
            readers: BlockingPool::default(),
            health: HealthFlag::default(),
        }
    }

    /// Checks at intervals whether the folder can be read. Requests do not depend on the result:
    /// each opens the folder anew.
    async fn monitor(self: &Arc<Self>) {
        let mut ticks = interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let folder = Arc::clone(self);
            // No file has an empty name.
            let check = self.readers.run("", move || folder.settings.folder.check());
            let on_hang = || self.log_check(Err(io::Error::other(UNANSWERED)));
            self.log_check(if_slow(check, on_hang).await.flatten());
        }
    }

    /// Logs when the folder becomes unreadable or readable again.
    fn log_check(&self, checked: io::Result<()>) {
        let service = &*self.name;
        match checked {
            Ok(()) if self.health.clear() => {
                tracing::info!(service, "{service}: the folder is back");
            }
            Ok(()) => {}
            Err(error) => {
                if self.health.set(&format!("the folder cannot be read: {error}")) {
                    let path = escape(&self.settings.folder.path().to_string_lossy());
                    let message =
                        format_args!("{service}: the folder cannot be read: {error} ({path})");
                    tracing::warn!(service, %path, cause = %error, "{message}");
                }
            }
        }
    }
}

impl Service for Arc<FolderService> {
    async fn serve(&self, connection: &mut Connection<LazySocket>) -> Result<(), ServeError> {
        self.answer(connection).await
    }

    async fn background(&self) {
        self.monitor().await;
    }

    fn problem(&self) -> Option<String> {
        self.health.problem()
    }
}
