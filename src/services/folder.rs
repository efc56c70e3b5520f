//! The folder service: one line asks for a file, one line of JSON answers, in order, until the
//! client has asked for all it wants. An empty line asks for the list.
//!
//! What was digested and encoded once is kept, within `cache-limit`, for as long as the file stays
//! as it is. What is not kept is encoded as it is sent.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::codec::{AnyDelimiterCodec, Decoder};

use crate::document;
use crate::fs::blocking_pool::{BlockingPool, UNANSWERED, if_slow};
use crate::fs::file::{OpenFile, Stamp};
use crate::fs::filename::escape;
use crate::fs::folder::{Entry, Folder, Listing, MAX_NAME, Omission};
use crate::net::connection::{Connection, ServeError, Stream};
use crate::net::service::Service;
use crate::net::stream::LazySocket;
use crate::text::counted;

use crate::services::encoder;
use crate::telemetry::health_flag::Trouble;

/// How many digests of files that are not kept themselves are remembered.
const DIGESTS: usize = 4096;

/// Only files up to this part of the cache limit are kept, so that one does not drive out all.
const KEPT_PART: u64 = 4;

/// Documents that are being sent, or kept, may take so many times the cache limit; beyond it,
/// files are encoded as they are sent.
const IN_MEMORY: u64 = 2;

/// The longest list, in files, unless configured.
pub(crate) const DEFAULT_MAX_FILES: NonZeroU32 = NonZeroU32::new(10_000).unwrap();

/// How long a list is handed out before the folder is looked at again.
const LIST_AGE: Duration = Duration::from_millis(500);

/// A list that is longer is not made: a client would not take it either.
const MAX_LIST: usize = 16 << 20;

/// A fault that clients can cause again and again is said so often at most.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// How many unreadable files are named, so that names take bounded memory.
const MAX_NAMED: usize = 256;

/// How often a change of what the list leaves out is logged at most.
const LEFT_OUT_AGAIN: Duration = Duration::from_secs(10);

/// How often it is seen whether the folder can be read.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The settings of one folder service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The folder.
    pub folder: Folder,
    /// How much memory may keep documents, in bytes.
    pub cache_limit: u64,
    /// The longest list, in files.
    pub max_files: NonZeroU32,
}

/// A folder service that is ready to answer.
#[derive(Debug)]
pub struct FolderService {
    name: Arc<str>,
    settings: Settings,
    documents: Cache<(String, Stamp), Arc<Document>, DocumentWeight>,
    digests: Cache<Stamp, [u8; 32]>,
    /// The bytes of every document that lives, kept or being sent.
    in_memory: Arc<AtomicU64>,
    list: Mutex<Option<(Instant, Arc<str>)>>,
    complained: std::sync::Mutex<Option<Instant>>,
    unreadable: Unreadable,
    /// Omitted entries as last logged, and the time of that line.
    left_out: std::sync::Mutex<(BTreeMap<Omission, u64>, Option<Instant>)>,
    readers: BlockingPool,
    trouble: Trouble,
}

/// A whole document in memory.
#[derive(Debug)]
struct Document {
    bytes: Vec<u8>,
    _reserved: Reserved,
}

/// Memory that a document takes, or is about to. It is counted before it is taken, so that however
/// many are made at one time, they stay within the limit.
#[derive(Debug)]
struct Reserved {
    bytes: u64,
    in_memory: Arc<AtomicU64>,
}

impl Reserved {
    /// So many bytes, if there are no more than `limit` with the others.
    fn new(bytes: u64, limit: u64, in_memory: &Arc<AtomicU64>) -> Option<Self> {
        let more = |now: u64| now.checked_add(bytes).filter(|sum| *sum <= limit);
        in_memory.try_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self { bytes, in_memory: Arc::clone(in_memory) })
    }

    /// Gives back what was not needed.
    fn shrink_to(&mut self, bytes: u64) {
        let less = self.bytes.saturating_sub(bytes);
        self.in_memory.fetch_sub(less, Ordering::Relaxed);
        self.bytes -= less;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.in_memory.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone)]
struct DocumentWeight;

impl Weighter<(String, Stamp), Arc<Document>> for DocumentWeight {
    fn weight(&self, (name, _): &(String, Stamp), document: &Arc<Document>) -> u64 {
        (document.bytes.len() + name.len()) as u64
    }
}

/// More than what follows the data in a document takes.
const CLOSING: usize = 128;

/// What is there to be sent for a name.
enum Found {
    Document(Arc<Document>),
    /// A file, to be encoded as it is sent, with its digest if that is known.
    File(Arc<OpenFile>, Option<[u8; 32]>),
}

impl FolderService {
    /// Prepares to answer. `name` is the service's in the log.
    pub fn new(name: Arc<str>, settings: Settings) -> Self {
        // A guess that only sizes the cache's tables.
        let items = usize::try_from(settings.cache_limit >> 16).unwrap_or(0).clamp(16, DIGESTS);
        Self {
            name,
            documents: Cache::with_weighter(items, settings.cache_limit, DocumentWeight),
            settings,
            digests: Cache::new(DIGESTS),
            in_memory: Arc::default(),
            list: Mutex::default(),
            complained: std::sync::Mutex::default(),
            unreadable: Unreadable::default(),
            left_out: std::sync::Mutex::default(),
            readers: BlockingPool::default(),
            trouble: Trouble::default(),
        }
    }

    /// Why the folder cannot be read, if so.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.get()
    }

    /// Watches whether the folder can be read. Requests do not ask: each opens it anew.
    pub async fn follow(self: &Arc<Self>) {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let folder = Arc::clone(self);
            // No file has an empty name.
            let look = self.readers.run("", move || folder.settings.folder.check());
            let hangs = || self.note(Err(io::Error::other(UNANSWERED)));
            self.note(if_slow(look, hangs).await.flatten());
        }
    }

    /// Says it once when the folder cannot be read any more, or again.
    fn note(&self, looked: io::Result<()>) {
        let service = &*self.name;
        match looked {
            Ok(()) if self.trouble.end() => {
                tracing::info!(service, "{service}: the folder is back");
            }
            Ok(()) => {}
            Err(error) => {
                if self.trouble.begin(&format!("the folder cannot be read: {error}")) {
                    let path = escape(&self.settings.folder.path().to_string_lossy());
                    let message =
                        format_args!("{service}: the folder cannot be read: {error} ({path})");
                    tracing::warn!(service, %path, cause = %error, "{message}");
                }
            }
        }
    }

    /// Answers every line until the client half-closes.
    ///
    /// # Errors
    /// If the client went away or asked for nothing for too long, or a file cannot be sent to its
    /// end as it was at the beginning.
    pub async fn answer<S: Stream>(
        self: &Arc<Self>,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let mut lines =
            AnyDelimiterCodec::new_with_max_length(b"\n".to_vec(), Vec::new(), MAX_NAME);
        let mut input = BytesMut::new();
        let mut ended = false;
        loop {
            let line = if ended { lines.decode_eof(&mut input) } else { lines.decode(&mut input) };
            match line {
                Ok(Some(line)) => {
                    let line = line.strip_suffix(b"\r").unwrap_or(&line);
                    self.reply(line, connection).await?;
                }
                Ok(None) if ended => return Ok(()),
                Ok(None) => {
                    ended = connection.receive(&mut input).await? == 0;
                    // When the daemon stops, half a line is no request.
                    if ended && !connection.input_ended() {
                        return Ok(());
                    }
                }
                // What comes next may be anything: nothing more is answered.
                Err(_) => {
                    let problem = format!("a request is longer than {MAX_NAME} bytes");
                    return refuse(connection, &problem, None).await;
                }
            }
        }
    }

    async fn reply<S: Stream>(
        self: &Arc<Self>,
        line: &[u8],
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        if line.is_empty() {
            return match connection.wait_for(self.list()).await? {
                Ok(list) => connection.send(list.as_bytes()).await,
                Err(problem) => refuse(connection, &problem, None).await,
            };
        }
        let Ok(name) = str::from_utf8(line) else {
            let name = String::from_utf8_lossy(line);
            return refuse(connection, "the name is not UTF-8", Some(&name)).await;
        };
        let found = connection.wait_for(self.find(name)).await?;
        if found.is_ok() {
            self.note_readable(name);
        }
        match found {
            Ok(Found::Document(document)) => connection.send(&document.bytes).await,
            Ok(Found::File(file, digest)) => self.send_file(name, &file, digest, connection).await,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                refuse(connection, "no such file", Some(name)).await
            }
            Err(error) => {
                self.note_unreadable(name, &error);
                refuse(connection, "the file cannot be read", Some(name)).await
            }
        }
    }

    async fn find(self: &Arc<Self>, name: &str) -> io::Result<Found> {
        let (service, wanted) = (Arc::clone(self), name.to_owned());
        self.readers.run(name, move || service.find_now(wanted)).await?
    }

    /// Opens the file and, if it may be kept, makes its document or takes the one that is kept.
    fn find_now(&self, name: String) -> io::Result<Found> {
        let file = self.settings.folder.file(&name)?;
        let stamp = file.stamp;
        let key = (name, stamp);
        if let Some(document) = self.documents.get(&key) {
            return Ok(Found::Document(document));
        }
        let Some(mut reserved) = self.reserve(&key.0, stamp.size) else {
            return Ok(Found::File(Arc::new(file), self.digests.get(&stamp)));
        };
        let mut bytes = document::file_opening(&key.0, stamp.size, stamp.modified()).into_bytes();
        let data = usize::try_from(stamp.size).ok().and_then(document::encoded_len);
        bytes.reserve_exact(data.unwrap_or_default() + CLOSING);
        let digest = encoder::write_whole(&file, Some(Sha256::new()), &mut bytes)?;
        let digest = digest.unwrap_or_default().finalize().into();
        bytes.extend_from_slice(document::file_closing(&digest).as_bytes());
        reserved.shrink_to(bytes.len() as u64);
        let document = Arc::new(Document { bytes, _reserved: reserved });
        self.documents.insert(key, Arc::clone(&document));
        Ok(Found::Document(document))
    }

    /// The memory for the document of a file that may be kept, if there is some.
    fn reserve(&self, name: &str, size: u64) -> Option<Reserved> {
        let limit = self.settings.cache_limit;
        if size > limit / KEPT_PART {
            return None;
        }
        // Base64 takes four bytes for three, and a name up to six bytes for one.
        let most = size.saturating_mul(2).saturating_add(name.len() as u64 * 6 + 512);
        Reserved::new(most, limit.saturating_mul(IN_MEMORY), &self.in_memory)
    }

    async fn send_file<S: Stream>(
        &self,
        name: &str,
        file: &Arc<OpenFile>,
        digest: Option<[u8; 32]>,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let stamp = file.stamp;
        let opening = document::file_opening(name, stamp.size, stamp.modified());
        connection.send_part(opening.as_bytes()).await?;
        let unknown = digest.is_none().then(Sha256::new);
        let made = encoder::send_encoded(file, (&self.readers, name), unknown, connection).await?;
        let digest = match (digest, made) {
            (Some(known), _) => known,
            (None, made) => {
                let made = made.unwrap_or_default().finalize().into();
                self.digests.insert(stamp, made);
                made
            }
        };
        connection.send(document::file_closing(&digest).as_bytes()).await
    }

    /// The list as one line, or why there is none. Everybody who asks at one time gets the same.
    async fn list(self: &Arc<Self>) -> Result<Arc<str>, String> {
        let mut last = self.list.lock().await;
        if let Some((made, list)) = &*last
            && made.elapsed() < LIST_AGE
        {
            return Ok(Arc::clone(list));
        }
        let service = Arc::clone(self);
        let max = usize::try_from(self.settings.max_files.get()).unwrap_or(usize::MAX);
        let made = self.readers.run("", move || {
            let listing = service.settings.folder.list(max)?;
            Ok::<_, io::Error>(listing.map(|listing| {
                service.note_left_out(&listing);
                list_line(&listing.entries)
            }))
        });
        match made.await.flatten() {
            Ok(Some(line)) if line.len() <= MAX_LIST => {
                let line = Arc::from(line);
                *last = Some((Instant::now(), Arc::clone(&line)));
                Ok(line)
            }
            Ok(made) => {
                let files = counted(max, "file");
                let error = io::Error::other(match made {
                    Some(_) => format!("more than {} MiB", MAX_LIST >> 20),
                    None => format!("more than {files} (max-files)"),
                });
                self.complain("the list is too long and is not sent", &error);
                Err("the list is too long".to_owned())
            }
            Err(error) => {
                self.complain("the folder cannot be listed", &error);
                Err("the folder cannot be read".to_owned())
            }
        }
    }

    /// Names a file or a folder that cannot be read, once.
    fn note_unreadable(&self, name: &str, error: &io::Error) {
        let service = &*self.name;
        match self.unreadable.begin(name) {
            Noted::New => {
                let name = escape(name);
                let message = format_args!("{service}: cannot read {name}: {error}");
                tracing::warn!(service, file = name, cause = %error, "{message}");
            }
            Noted::TooMany => {
                let files = counted(MAX_NAMED, "unreadable file");
                tracing::warn!(service, "{service}: more than {files}: the others are not named");
            }
            Noted::Known => {}
        }
    }

    /// Says that a file that was named can be read again.
    fn note_readable(&self, name: &str) {
        if self.unreadable.end(name) {
            let (service, name) = (&*self.name, escape(name));
            tracing::info!(service, file = name, "{service}: can read {name} again");
        }
    }

    /// Logs what is left out of the list if that has changed, and not too often.
    fn note_left_out(&self, listing: &Listing) {
        for (name, error) in &listing.unreadable {
            self.note_unreadable(name, error);
        }
        let mut noted = self.left_out.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let recent = noted.1.is_some_and(|last| last.elapsed() < LEFT_OUT_AGAIN);
        if noted.0 == listing.omitted || recent {
            return;
        }
        *noted = (listing.omitted.clone(), Some(Instant::now()));
        drop(noted);
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

    /// Says a fault that clients run into, not too often.
    fn complain(&self, fault: &'static str, error: &io::Error) {
        let mut complained =
            self.complained.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if complained.is_none_or(|last| last.elapsed() >= SAY_AGAIN) {
            *complained = Some(Instant::now());
            let service = &*self.name;
            tracing::warn!(service, cause = %error, "{service}: {fault}: {error}");
        }
    }
}

/// The files and folders that the log has named because they cannot be read.
#[derive(Debug, Default)]
struct Unreadable {
    /// How many there are, so that reading takes no lock as long as there is none.
    count: AtomicUsize,
    /// Each with the time when it was named, and whether it still cannot be read.
    named: std::sync::Mutex<BTreeMap<String, (Instant, bool)>>,
    overflowed: AtomicBool,
}

/// The log line due for an unreadable file.
#[derive(Debug, PartialEq, Eq)]
enum Noted {
    New,
    Known,
    /// The table is full for the first time.
    TooMany,
}

impl Unreadable {
    fn begin(&self, name: &str) -> Noted {
        let mut named = self.named.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((said, unreadable)) = named.get_mut(name) {
            // One that comes and goes is named once in a while.
            if *unreadable || said.elapsed() < SAY_AGAIN {
                return Noted::Known;
            }
            (*said, *unreadable) = (Instant::now(), true);
            return Noted::New;
        }
        if named.len() >= MAX_NAMED {
            named.retain(|_, (said, unreadable)| *unreadable || said.elapsed() < SAY_AGAIN);
        }
        if named.len() >= MAX_NAMED {
            let first = !self.overflowed.swap(true, Ordering::Relaxed);
            return if first { Noted::TooMany } else { Noted::Known };
        }
        named.insert(name.to_owned(), (Instant::now(), true));
        self.count.store(named.len(), Ordering::Relaxed);
        Noted::New
    }

    /// Whether the file was named as unreadable until now.
    fn end(&self, name: &str) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut named = self.named.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        named.get_mut(name).is_some_and(|(_, unreadable)| std::mem::take(unreadable))
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

/// Sends why a request is not answered; the connection goes on.
async fn refuse<S: Stream>(
    connection: &mut Connection<S>,
    problem: &str,
    name: Option<&str>,
) -> Result<(), ServeError> {
    connection.send(document::refusal(problem, name).as_bytes()).await
}

impl Service for Arc<FolderService> {
    async fn serve(&self, connection: &mut Connection<LazySocket>) -> Result<(), ServeError> {
        self.answer(connection).await
    }

    async fn background(&self) {
        self.follow().await;
    }

    fn problem(&self) -> Option<String> {
        self.trouble()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_files_are_named_once_and_in_bounded_memory() {
        let unreadable = Unreadable::default();
        assert!(!unreadable.end("a"));
        assert_eq!((unreadable.begin("a"), unreadable.begin("a")), (Noted::New, Noted::Known));
        assert!(unreadable.end("a") && !unreadable.end("a") && !unreadable.end("b"));
        // One that comes and goes is not named each time.
        assert_eq!(unreadable.begin("a"), Noted::Known);
        for number in 1..MAX_NAMED {
            assert_eq!(unreadable.begin(&number.to_string()), Noted::New);
        }
        assert_eq!((unreadable.begin("x"), unreadable.begin("y")), (Noted::TooMany, Noted::Known));
    }

    #[test]
    fn however_many_documents_are_made_at_one_time_they_stay_within_the_limit() {
        let in_memory = Arc::<AtomicU64>::default();
        let reserve = |bytes| Reserved::new(bytes, 100, &in_memory);
        let (first, mut second) = (reserve(60).unwrap(), reserve(40).unwrap());
        assert!(reserve(1).is_none());
        assert!(reserve(u64::MAX).is_none());
        second.shrink_to(30);
        let third = reserve(10).unwrap();
        assert!(reserve(1).is_none());
        drop((first, second, third));
        assert_eq!(in_memory.load(Ordering::Relaxed), 0);
        assert!(reserve(100).is_some());
    }
}
