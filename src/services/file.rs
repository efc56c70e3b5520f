//! The file service: on connect, one document with the file, the same for everybody.
//!
//! A file is read and encoded once for each of its versions. One that is larger than `cache-limit`
//! is not held in memory but encoded as it is sent, from one open descriptor.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::config::{self, Context, Noted, Table};
use crate::connection::{Broken, Connection, Stream};
use crate::document;

/// How often the file is looked at. Two looks and the reading fit into a second.
const LOOK_EVERY: Duration = Duration::from_millis(400);

/// How long a file that is being rewritten in place is waited for before it is read all the same.
const LONGEST_REWRITE: Duration = Duration::from_secs(10);

/// How much of a file is read, encoded and sent at one time; each connection that is sent a file
/// above the cache limit holds one such piece, encoded.
const PIECE: usize = 16 * 1024 * document::WHOLE_GROUP;

/// Versions that were replaced live on while connections that began with them last. They may take
/// so many times the cache limit; beyond it, connections to the oldest are reset.
const OLDER_VERSIONS: u64 = 4;

/// How many replaced versions may hold a descriptor open.
const OLDER_DESCRIPTORS: u64 = 64;

/// The settings of one file service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The file.
    pub path: PathBuf,
    /// Its name in the document.
    pub filename: String,
    /// Whether the document ends with a newline.
    pub newline: bool,
    /// The largest file that is held in memory, in bytes.
    pub cache_limit: u64,
}

impl Settings {
    /// Reads the keys of `[file.NAME]` that are its own.
    ///
    /// # Errors
    /// If a fault was noted.
    pub fn read(table: &mut Table<'_>, context: &Context<'_>) -> Result<Self, Noted> {
        let path = table.required("path", "the file to hand out", |text| {
            let path = context.folder.join(text);
            let filename = Path::new(text).file_name().and_then(|name| name.to_str());
            let filename =
                filename.ok_or("expected a path that ends with a file's name")?.to_owned();
            open_regular(&path).map_err(|error| format!("cannot be opened: {error}"))?;
            Ok::<_, String>((path, filename))
        });
        let newline = table.boolean_or("newline", true);
        let cache_limit = table.text_or("cache-limit", "64MiB", config::size);
        let (path, filename) = path?;
        Ok(Self { path, filename, newline: newline?, cache_limit: cache_limit? })
    }
}

/// A file that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {path:?}")]
pub struct OpenError {
    path: PathBuf,
    source: io::Error,
}

/// A file service that is ready to answer.
#[derive(Debug)]
pub struct File {
    name: Arc<str>,
    settings: Settings,
    versions: Mutex<Versions>,
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
    Document(Vec<u8>),
    /// The open file, for one too large to hold.
    Open(fs::File),
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Unlike equality, this holds when a file got another name, or lost its only one.
    fn same_content(&self, other: &Self) -> bool {
        (self.size, self.modified) == (other.size, other.modified)
    }
}

/// Opens a file without waiting, whatever it is, and only if it is a regular one.
fn open_regular(path: &Path) -> io::Result<(fs::File, Stamp)> {
    let regular = |metadata: &fs::Metadata| {
        if metadata.is_file() { Ok(()) } else { Err(io::Error::other("not a regular file")) }
    };
    // Looked at first, as opening alone can do something to a device.
    regular(&fs::metadata(path)?)?;
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    regular(&metadata)?;
    Ok((file, Stamp::of(&metadata)))
}

impl Version {
    /// Opens the file and, if it is small enough, reads and encodes it.
    fn load(settings: &Settings) -> io::Result<Self> {
        let (mut file, stamp) = open_regular(&settings.path)?;
        let content = if stamp.size > settings.cache_limit {
            Content::Open(file)
        } else {
            let document = read_document(settings, &mut file, stamp.size)?;
            if Stamp::of(&file.metadata()?) != stamp {
                return Err(io::Error::other("it changed while it was read"));
            }
            Content::Document(document)
        };
        Ok(Self { stamp, content, outdated: CancellationToken::new() })
    }

    /// What this version takes of the memory, or of the descriptors, that older versions may have.
    fn weight(&self, budget: u64) -> u64 {
        match &self.content {
            Content::Document(document) => document.len() as u64,
            Content::Open(_) => budget / OLDER_DESCRIPTORS,
        }
    }

    /// Reads and encodes the piece at `offset` into `encoded`; returns how many bytes of the file
    /// it was.
    fn read_piece(&self, offset: u64, encoded: &mut Vec<u8>) -> io::Result<u64> {
        let Content::Open(file) = &self.content else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        #[expect(clippy::large_stack_arrays, reason = "the stack of a pool's thread has room")]
        let mut piece = [0; PIECE];
        let left = self.stamp.size.saturating_sub(offset);
        let wanted = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let piece = piece.get_mut(..wanted).unwrap_or_default();
        file.read_exact_at(piece, offset)?;
        // Asked after the reading: what was read is of the version that was promised.
        if !Stamp::of(&file.metadata()?).same_content(&self.stamp) {
            return Err(io::Error::other("the file changed while it was sent"));
        }
        encoded.clear();
        document::append_encoded(piece, encoded);
        Ok(wanted as u64)
    }
}

fn read_document(settings: &Settings, file: &mut fs::File, size: u64) -> io::Result<Vec<u8>> {
    let opening = document::opening(&settings.filename);
    let closing = document::closing(settings.newline);
    let encoded = usize::try_from(size).ok().and_then(document::encoded_len);
    let room = encoded
        .and_then(|encoded| encoded.checked_add(opening.len() + closing.len()))
        .ok_or(io::ErrorKind::FileTooLarge)?;
    let mut document = Vec::new();
    document.try_reserve_exact(room)?;
    document.extend_from_slice(opening.as_bytes());
    let mut left = size;
    let mut piece = Vec::with_capacity(PIECE);
    while left > 0 {
        piece.clear();
        let read = file.by_ref().take(left.min(PIECE as u64)).read_to_end(&mut piece)?;
        if read == 0 {
            return Err(io::Error::other("it shrank while it was read"));
        }
        document::append_encoded(&piece, &mut document);
        left = left.saturating_sub(read as u64);
    }
    document.extend_from_slice(closing.as_bytes());
    Ok(document)
}

/// What is seen of the file between two looks.
#[derive(Debug, Default)]
struct Sight {
    /// The file is being rewritten in place: its stamp at the last look, and since when.
    rewrite: Option<(Stamp, Instant)>,
    /// Why the file cannot be read, if so; said once.
    trouble: Option<String>,
}

impl File {
    /// Opens the file. `name` is the service's in the log.
    ///
    /// # Errors
    /// If the file cannot be opened, read or held in memory.
    pub fn open(name: Arc<str>, settings: Settings) -> Result<Self, OpenError> {
        let current = Version::load(&settings)
            .map_err(|source| OpenError { path: settings.path.clone(), source })?;
        let versions = Versions { current: Arc::new(current), older: VecDeque::new() };
        Ok(Self { name, settings, versions: Mutex::new(versions) })
    }

    fn versions(&self) -> MutexGuard<'_, Versions> {
        // Nothing that holds this lock can leave the versions half changed.
        self.versions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the file as it is now.
    ///
    /// # Errors
    /// If the client went away, or the file cannot be sent to its end as it was at the beginning.
    pub async fn answer<S: Stream>(&self, connection: &mut Connection<S>) -> Result<(), Broken> {
        let version = Arc::clone(&self.versions().current);
        tokio::select! {
            biased;
            sent = self.send(&version, connection) => sent,
            () = version.outdated.cancelled() => {
                Err(Broken::Service(io::Error::other("the file was replaced too often meanwhile")))
            }
        }
    }

    async fn send<S: Stream>(
        &self,
        version: &Arc<Version>,
        connection: &mut Connection<S>,
    ) -> Result<(), Broken> {
        if let Content::Document(document) = &version.content {
            return connection.send(document).await;
        }
        connection.send(document::opening(&self.settings.filename).as_bytes()).await?;
        let mut offset = 0;
        let mut encoded = Vec::new();
        while offset < version.stamp.size {
            let version = Arc::clone(version);
            // A file can keep a reader waiting, and must not keep the other connections waiting.
            let read = tokio::task::spawn_blocking(move || {
                let read = version.read_piece(offset, &mut encoded)?;
                Ok::<_, io::Error>((read, encoded))
            });
            let read = read.await.map_err(|error| Broken::Service(io::Error::other(error)))?;
            let (read, piece) = read.map_err(Broken::Service)?;
            offset += read;
            encoded = piece;
            connection.send(&encoded).await?;
        }
        connection.send(document::closing(self.settings.newline).as_bytes()).await
    }

    /// Follows the file: a new version is served as soon as it is there, and as long as there is
    /// none, the last one.
    pub async fn follow(self: &Arc<Self>) {
        let mut sight = Sight::default();
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let file = Arc::clone(self);
            let look = tokio::task::spawn_blocking(move || {
                file.look(&mut sight);
                sight
            });
            // It does not panic, and if it did, the next look would begin anew.
            sight = look.await.unwrap_or_default();
        }
    }

    fn look(&self, sight: &mut Sight) {
        let service = &*self.name;
        let path = &self.settings.path;
        match self.newer_version(sight) {
            Ok(newer) => {
                if sight.trouble.take().is_some() {
                    tracing::info!(service, ?path, "the file is back");
                }
                if let Some(version) = newer {
                    tracing::info!(service, ?path, size = version.stamp.size, "new version");
                    self.publish(version);
                }
            }
            Err(error) => {
                let cause = error.to_string();
                if sight.trouble.as_ref() != Some(&cause) {
                    tracing::warn!(
                        service,
                        ?path,
                        ?cause,
                        "the file cannot be read; its last version goes on being served"
                    );
                    sight.trouble = Some(cause);
                }
            }
        }
    }

    /// Looks whether there is another version, and loads it once it is whole.
    fn newer_version(&self, sight: &mut Sight) -> io::Result<Option<Version>> {
        let seen = Stamp::of(&fs::metadata(&self.settings.path)?);
        let current = self.versions().current.stamp;
        if seen == current {
            sight.rewrite = None;
            return Ok(None);
        }
        // A file that took the name of the other is whole. One that is rewritten in place is
        // whole when it has come to rest.
        if seen.same_file(&current) {
            let now = Instant::now();
            let since = sight.rewrite.map_or(now, |(_, since)| since);
            let rests = sight.rewrite.is_some_and(|(last, _)| last == seen);
            if !rests && now.duration_since(since) < LONGEST_REWRITE {
                sight.rewrite = Some((seen, since));
                return Ok(None);
            }
        }
        let version = Version::load(&self.settings)?;
        sight.rewrite = None;
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
