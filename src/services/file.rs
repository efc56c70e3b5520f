//! The file service: on connect, one document with the file, the same for everybody.
//!
//! A file is read and encoded once for each of its versions. One that is larger than `cache-limit`
//! is not held in memory but encoded as it is sent, from one open descriptor.

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

use crate::services::cached_document::ReadyMade;
use crate::services::encoder;
use crate::telemetry::health_flag::HealthFlag;

/// How often the file is looked at. Two looks and the reading fit into a second.
const LOOK_EVERY: Duration = Duration::from_millis(400);

/// How long a file that is being rewritten is waited for before it is read all the same.
const LONGEST_REWRITE: Duration = Duration::from_secs(10);

/// Versions that were replaced live on while connections that began with them last. They may take
/// so many times the cache limit; beyond it, connections to the oldest are reset.
const OLDER_VERSIONS: u64 = 4;

/// How many replaced versions may hold a descriptor open.
const OLDER_DESCRIPTORS: u64 = 64;

/// The settings of one file service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// The file.
    pub path: PathBuf,
    /// Its name in the document.
    pub filename: String,
    /// Whether the document ends with a newline.
    pub newline: bool,
    /// The largest file that is held in memory, in bytes.
    pub cache_limit: u64,
    /// Longest list of files, if the path turns out to be a folder.
    pub max_files: NonZeroU32,
}

/// A file service that is ready to answer.
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
    /// Replaced ones that a connection may still be sent, the oldest first.
    older: VecDeque<Weak<Version>>,
}

/// One state of the file, which a connection keeps until its end.
#[derive(Debug)]
struct Version {
    stamp: Stamp,
    content: Content,
    /// There are too many newer ones: whoever still reads this one is reset.
    outdated: CancellationToken,
}

#[derive(Debug)]
enum Content {
    /// The whole document.
    Document(ReadyMade),
    /// The open file, for one too large to hold.
    Open(Arc<OpenFile>),
}

impl Version {
    /// Opens the file and, if it is small enough, reads and encodes it.
    fn load(settings: &Settings) -> io::Result<Self> {
        let file = OpenFile::open(&settings.path)?;
        let stamp = file.stamp;
        let content = if stamp.size > settings.cache_limit {
            Content::Open(Arc::new(file))
        } else {
            Content::Document(read_document(settings, &file)?)
        };
        Ok(Self { stamp, content, outdated: CancellationToken::new() })
    }

    /// What this version takes of the memory, or of the descriptors, that older versions may have.
    fn weight(&self, budget: u64) -> u64 {
        match &self.content {
            Content::Document(document) => document.len(),
            Content::Open(_) => budget / OLDER_DESCRIPTORS,
        }
    }
}

fn read_document(settings: &Settings, file: &OpenFile) -> io::Result<ReadyMade> {
    let opening = document::opening(&settings.filename);
    let closing = document::closing(settings.newline);
    let encoded = usize::try_from(file.stamp.size).ok().and_then(document::encoded_len);
    let length = encoded
        .and_then(|encoded| encoded.checked_add(opening.len() + closing.len()))
        .ok_or(io::ErrorKind::FileTooLarge)?;
    ReadyMade::make(length, |mut document| {
        document.write_all(opening.as_bytes())?;
        encoder::write_whole(file, None, &mut document)?;
        document.write_all(closing.as_bytes())
    })
}

/// A file that is being rewritten: its stamp at the last look, and since when.
type Rewrite = Option<(Stamp, Instant)>;

impl FileService {
    /// Opens the file. `name` is the service's in the log.
    ///
    /// # Errors
    /// If the file cannot be opened, read or held in memory.
    pub(crate) fn open(name: Arc<str>, settings: Settings) -> io::Result<Self> {
        let current = Version::load(&settings).map_err(|error| {
            let path = settings.path.to_string_lossy();
            let problem = format!("cannot open {}: {error}", path.escape_debug());
            io::Error::new(error.kind(), problem)
        })?;
        let versions = Versions { current: Arc::new(current), older: VecDeque::new() };
        Ok(Self {
            name,
            settings,
            versions: Mutex::new(versions),
            readers: BlockingPool::default(),
            health: HealthFlag::default(),
        })
    }

    fn versions(&self) -> MutexGuard<'_, Versions> {
        // Nothing that holds this lock can leave the versions half changed.
        self.versions.lock()
    }

    /// When the content that is served was last modified.
    pub(crate) fn version(&self) -> Timestamp {
        self.versions().current.stamp.modified()
    }

    /// Sends the file as it is now.
    ///
    /// # Errors
    /// If the client went away, or the file cannot be sent to its end as it was at the beginning.
    pub(crate) async fn answer<S: Stream>(
        &self,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let version = Arc::clone(&self.versions().current);
        tokio::select! {
            biased;
            sent = self.send(&version, connection) => sent,
            () = version.outdated.cancelled() => {
                Err(ServeError::Service(io::Error::other("the file was replaced too often meanwhile")))
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

    /// Follows the file: a new version is served as soon as it is there, and as long as there is
    /// none, the last one.
    pub(crate) async fn follow(self: &Arc<Self>) {
        let mut rewrite = None;
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let file = Arc::clone(self);
            // No file has an empty name.
            let look = self.readers.run("", move || {
                let newer = file.newer_version(&mut rewrite);
                (newer, rewrite)
            });
            let looked = if_slow(look, || self.complain(UNANSWERED));
            rewrite = match looked.await {
                Ok((newer, rewrite)) => {
                    self.take(newer, rewrite.is_some());
                    rewrite
                }
                // The next look begins anew.
                Err(error) => {
                    self.complain(&error.to_string());
                    None
                }
            };
        }
    }

    /// Serves what a look has found.
    fn take(&self, found: io::Result<Option<Version>>, is_being_rewritten: bool) {
        let service = &*self.name;
        let path = self.settings.path.to_string_lossy();
        let path = path.escape_debug();
        match found {
            Ok(newer) => {
                // What is being rewritten has not been read yet.
                if !is_being_rewritten && self.health.clear() {
                    tracing::info!(service, %path, "{service}: {path} is back");
                }
                if let Some(version) = newer {
                    let size = version.stamp.size;
                    if version.stamp.is_unsized() {
                        // Files of the kernel may change with every look.
                        tracing::debug!(service, %path, size, "{service}: new version of {path}");
                    } else {
                        tracing::info!(service, %path, size, "{service}: new version of {path}");
                    }
                    self.publish(version);
                }
            }
            Err(error) => self.complain(&error.to_string()),
        }
    }

    /// Says once why the file cannot be read.
    fn complain(&self, cause: &str) {
        let service = &*self.name;
        let path = self.settings.path.to_string_lossy();
        let path = path.escape_debug();
        if self.health.set(&format!("{path} cannot be read: {cause}")) {
            let message = format_args!(
                "{service}: {path} cannot be read ({cause}); its last version goes on being served"
            );
            tracing::warn!(service, %path, cause, "{message}");
        }
    }

    /// Looks whether there is another version, and loads it once it is whole.
    fn newer_version(&self, rewrite: &mut Rewrite) -> io::Result<Option<Version>> {
        let seen = Stamp::of(&fs::metadata(&self.settings.path)?);
        let current = self.versions().current.stamp;
        if seen == current {
            *rewrite = None;
            return Ok(None);
        }
        if current.is_unsized() {
            // Only the content tells whether it changed.
            let version = Version::load(&self.settings)?;
            return Ok((version.stamp != current).then_some(version));
        }
        // It may be half written, in place or under the name of one that was removed: it is whole
        // when it has come to rest.
        let now = Instant::now();
        let since = rewrite.map_or(now, |(_, since)| since);
        let rests = rewrite.is_some_and(|(last, _)| last == seen);
        if !rests && now.duration_since(since) < LONGEST_REWRITE {
            *rewrite = Some((seen, since));
            return Ok(None);
        }
        let version = Version::load(&self.settings)?;
        *rewrite = None;
        Ok(Some(version))
    }

    fn publish(&self, version: Version) {
        let mut versions = self.versions();
        let replaced = std::mem::replace(&mut versions.current, Arc::new(version));
        versions.older.push_back(Arc::downgrade(&replaced));
        drop(replaced);
        versions.older.retain(|older| older.strong_count() > 0);

        let budget = OLDER_VERSIONS.saturating_mul(self.settings.cache_limit.max(1 << 20));
        let mut weight = 0_u64;
        for older in versions.older.iter().rev().filter_map(Weak::upgrade) {
            weight = weight.saturating_add(older.weight(budget));
            if weight > budget {
                older.outdated.cancel();
            }
        }
    }
}
impl Service for Arc<FileService> {
    async fn serve(&self, connection: &mut Connection<LazySocket>) -> Result<(), ServeError> {
        self.answer(connection).await
    }

    async fn background(&self) {
        self.follow().await;
    }

    fn problem(&self) -> Option<String> {
        self.health.problem()
    }

    fn file_version(&self) -> Option<Timestamp> {
        Some(self.version())
    }
}
