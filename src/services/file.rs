//! The file service: sends each client the same document with one file.
//!
//! Each version of the file is read and encoded once. A file larger than `cache-limit` is not held
//! in memory: it is encoded while it is sent, from one descriptor that all connections share.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use parking_lot::{Mutex, MutexGuard};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::document;
use crate::fs::blocking_pool::{BlockingPool, UNANSWERED, if_slow};
use crate::fs::file::{OpenFile, Stamp};
use crate::net::connection::{Connection, ServeError, Stream};
use crate::net::service::Service;
use crate::net::stream::LazySocket;

use crate::services::cached_document::CachedDocument;
use crate::services::encoder;
use crate::telemetry::health_flag::HealthFlag;

/// Interval of the checks for a new version. Two checks and a read fit into a second.
const CHECK_INTERVAL: Duration = Duration::from_millis(400);

/// Maximum time to wait until a file that keeps changing is stable. After that it is read anyway.
const MAX_REWRITE: Duration = Duration::from_secs(10);

/// Multiple of the cache limit that replaced versions may take while connections still send them.
/// Beyond it, the connections that send the oldest versions are reset.
const REPLACED_FACTOR: u64 = 4;

/// Maximum number of replaced versions that hold a descriptor open.
const MAX_REPLACED_DESCRIPTORS: u64 = 64;

/// Settings of a file service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Path of the file.
    pub path: PathBuf,
    /// Name of the file in the document.
    pub filename: String,
    /// Whether the document ends with a newline.
    pub newline: bool,
    /// Maximum size of a file that is held in memory, in bytes.
    pub cache_limit: u64,
    /// Maximum number of files in the list, if the path turns out to be a folder.
    pub max_files: NonZeroU32,
}

/// A running file service.
#[derive(Debug)]
pub(crate) struct FileService {
    name: Arc<str>,
    settings: Settings,
    versions: Mutex<Versions>,
    readers: BlockingPool,
    health: HealthFlag,
}

#[derive(Debug)]
struct Versions {
    current: Arc<Version>,
    /// Replaced versions that connections may still send, oldest first.
    replaced: VecDeque<Weak<Version>>,
}

/// A version of the file. A connection sends the same version until its end.
#[derive(Debug)]
struct Version {
    stamp: Stamp,
    content: Content,
    /// Cancelled to reset the connections that send this version, if replaced versions exceed their
    /// limits.
    expired: CancellationToken,
}

#[derive(Debug)]
enum Content {
    Document(CachedDocument),
    /// A file that is too large to be held in memory.
    Open(Arc<OpenFile>),
}

impl Version {
    /// Opens the file. Reads and encodes it if it is within the cache limit.
    fn load(settings: &Settings) -> io::Result<Self> {
        let file = OpenFile::open(&settings.path)?;
        let stamp = file.stamp;
        let content = if stamp.size > settings.cache_limit {
            Content::Open(Arc::new(file))
        } else {
            Content::Document(read_document(settings, &file)?)
        };
        Ok(Self { stamp, content, expired: CancellationToken::new() })
    }

    /// Returns the share of `budget` that this version takes once it is replaced: its length or, as
    /// descriptors are scarcer than memory, the equivalent of a descriptor.
    fn weight(&self, budget: u64) -> u64 {
        match &self.content {
            Content::Document(document) => document.len(),
            Content::Open(_) => budget / MAX_REPLACED_DESCRIPTORS,
        }
    }
}

fn read_document(settings: &Settings, file: &OpenFile) -> io::Result<CachedDocument> {
    let opening = document::opening(&settings.filename);
    let closing = document::closing(settings.newline);
    let encoded = usize::try_from(file.stamp.size).ok().and_then(document::encoded_len);
    let length = encoded
        .and_then(|encoded| encoded.checked_add(opening.len() + closing.len()))
        .ok_or(io::ErrorKind::FileTooLarge)?;
    CachedDocument::build(length, |mut document| {
        document.write_all(opening.as_bytes())?;
        encoder::write_whole(file, None, &mut document)?;
        document.write_all(closing.as_bytes())
    })
}

/// A rewrite in progress: the stamp at the last check, and the time of the first check that found a
/// change.
type Rewrite = Option<(Stamp, Instant)>;

impl FileService {
    /// Opens the file. `name` identifies the service in the log.
    ///
    /// # Errors
    /// If the file cannot be opened or read, or there is not enough memory for its document.
    pub(crate) fn open(name: Arc<str>, settings: Settings) -> io::Result<Self> {
        let current = Version::load(&settings).map_err(|error| {
            let path = settings.path.to_string_lossy();
            let problem = format!("cannot open {}: {error}", path.escape_debug());
            io::Error::new(error.kind(), problem)
        })?;
        let versions = Versions { current: Arc::new(current), replaced: VecDeque::new() };
        Ok(Self {
            name,
            settings,
            versions: Mutex::new(versions),
            readers: BlockingPool::default(),
            health: HealthFlag::default(),
        })
    }

    fn versions(&self) -> MutexGuard<'_, Versions> {
        self.versions.lock()
    }

    /// Returns the modification time of the current version.
    pub(crate) fn version(&self) -> Timestamp {
        self.versions().current.stamp.modified()
    }

    /// Sends the current version of the file.
    ///
    /// # Errors
    /// If the connection fails, or the file changes or becomes unreadable while it is sent.
    pub(crate) async fn answer<S: Stream>(
        &self,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let version = Arc::clone(&self.versions().current);
        tokio::select! {
            biased;
            sent = self.send(&version, connection) => sent,
            () = version.expired.cancelled() => {
                let problem = "the file was replaced too often during the transfer";
                Err(ServeError::Service(io::Error::other(problem)))
            }
        }
    }

    async fn send<S: Stream>(
        &self,
        version: &Version,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let file = match &version.content {
            Content::Document(document) => return document.send(connection).await,
            Content::Open(file) => file,
        };
        connection.send_part(document::opening(&self.settings.filename).as_bytes()).await?;
        let readers = (&self.readers, &*self.settings.filename);
        encoder::send_encoded(file, readers, None, connection).await?;
        connection.send_part(document::closing(self.settings.newline).as_bytes()).await
    }

    /// Checks the file at intervals and publishes new versions. While the file is missing or
    /// unreadable, the last version remains current.
    async fn monitor(self: &Arc<Self>) {
        let mut rewrite = None;
        let mut ticks = interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let file = Arc::clone(self);
            // No file has an empty name.
            let check = self.readers.run("", move || {
                let loaded = file.load_if_changed(&mut rewrite);
                (loaded, rewrite)
            });
            let check = if_slow(check, || self.log_unreadable(UNANSWERED));
            rewrite = match check.await {
                Ok((loaded, rewrite)) => {
                    self.finish_check(loaded, rewrite.is_some());
                    rewrite
                }
                Err(error) => {
                    self.log_unreadable(&error.to_string());
                    None
                }
            };
        }
    }

    /// Publishes the new version, if there is one, and logs when the file becomes unreadable or
    /// readable again.
    fn finish_check(&self, loaded: io::Result<Option<Version>>, is_being_rewritten: bool) {
        let service = &*self.name;
        let path = self.settings.path.to_string_lossy();
        let path = path.escape_debug();
        match loaded {
            Ok(loaded) => {
                // During a rewrite the file is not read, so it may still be unreadable.
                if !is_being_rewritten && self.health.clear() {
                    tracing::info!(service, %path, "{service}: {path} is back");
                }
                if let Some(version) = loaded {
                    let size = version.stamp.size;
                    if version.stamp.is_unsized() {
                        // Files of the kernel may change at every check.
                        tracing::debug!(service, %path, size, "{service}: new version of {path}");
                    } else {
                        tracing::info!(service, %path, size, "{service}: new version of {path}");
                    }
                    self.publish(version);
                }
            }
            Err(error) => self.log_unreadable(&error.to_string()),
        }
    }

    /// Logs once that the file cannot be read.
    fn log_unreadable(&self, cause: &str) {
        let service = &*self.name;
        let path = self.settings.path.to_string_lossy();
        let path = path.escape_debug();
        if self.health.set(&format!("{path} cannot be read: {cause}")) {
            let message = format_args!(
                "{service}: {path} cannot be read: {cause}: still serving its last version"
            );
            tracing::warn!(service, %path, cause, "{message}");
        }
    }

    /// Returns the new version if the file has changed and is no longer being written.
    fn load_if_changed(&self, rewrite: &mut Rewrite) -> io::Result<Option<Version>> {
        let found = Stamp::of(&fs::metadata(&self.settings.path)?);
        let current = self.versions().current.stamp;
        if found == current {
            *rewrite = None;
            return Ok(None);
        }
        if current.is_unsized() {
            // The metadata of such a file does not show changes of its content.
            let version = Version::load(&self.settings)?;
            return Ok((version.stamp != current).then_some(version));
        }
        // The file may be incomplete: written in place, or created anew after a removal. It counts
        // as complete when two checks in a row find the same stamp.
        let now = Instant::now();
        let since = rewrite.map_or(now, |(_, since)| since);
        let is_stable = rewrite.is_some_and(|(last, _)| last == found);
        if !is_stable && now.duration_since(since) < MAX_REWRITE {
            *rewrite = Some((found, since));
            return Ok(None);
        }
        let version = Version::load(&self.settings)?;
        *rewrite = None;
        Ok(Some(version))
    }

    /// Makes `version` current, and expires the oldest replaced versions beyond the limits.
    fn publish(&self, version: Version) {
        let mut versions = self.versions();
        let replaced = std::mem::replace(&mut versions.current, Arc::new(version));
        versions.replaced.push_back(Arc::downgrade(&replaced));
        drop(replaced);
        versions.replaced.retain(|version| version.strong_count() > 0);

        let budget = REPLACED_FACTOR.saturating_mul(self.settings.cache_limit.max(1 << 20));
        let mut weight = 0_u64;
        for version in versions.replaced.iter().rev().filter_map(Weak::upgrade) {
            weight = weight.saturating_add(version.weight(budget));
            if weight > budget {
                version.expired.cancel();
            }
        }
    }
}

impl Service for Arc<FileService> {
    async fn serve(&self, connection: &mut Connection<LazySocket>) -> Result<(), ServeError> {
        self.answer(connection).await
    }

    async fn background(&self) {
        self.monitor().await;
    }

    fn problem(&self) -> Option<String> {
        self.health.problem()
    }

    fn file_version(&self) -> Option<Timestamp> {
        Some(self.version())
    }
}
