//! One run: the listing, its files so many at a time, what has left it, and the sum of it all.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytesize::ByteSize;
use flate2::write::GzDecoder;
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Response, Url};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::fs::created_dirs::CreatedDirs;
use crate::fs::filename::escape;
use crate::http::client::{BuildError, Client, Options};
use crate::http::codings;
use crate::http::codings::{Codings, codings};
use crate::http::egress::{Host, Reach, shown};
use crate::http::retry;
use crate::http::tls;
use crate::http::tls::{CaFile, CaFileError};
use crate::mirror::download;
use crate::mirror::download::{Budget, Done, Outcome, Shared, Terms, transfer};
use crate::mirror::listing;
use crate::mirror::listing::{Entry, EntryError, InvalidEntry, Pointers};
use crate::mirror::manifest;
use crate::mirror::manifest::{CachedFile, Manifest, Validators};
use crate::mirror::target_dir::{Folding, Place, There};
use crate::secret::Secret;

/// The largest listing that is taken, in bytes, as it comes and as it is decoded.
pub(crate) const MAX_LISTING: usize = 16 << 20;

/// How many files may be forced to the disk at one time.
const MAX_FINISHING: usize = 16;

/// How long parts are kept that another command may go on from.
const KEEP_PARTS: Duration = Duration::from_hours(7 * 24);

/// Where files are from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A JSON listing.
    Listing {
        /// Where it is.
        url: Url,
        /// Where everything is in it.
        pointers: Pointers,
    },
    /// These.
    Urls(Vec<Url>),
}

impl Source {
    /// The URLs that the operator has named.
    pub(crate) fn urls(&self) -> &[Url] {
        match self {
            Self::Listing { url, .. } => std::slice::from_ref(url),
            Self::Urls(urls) => urls,
        }
    }
}

/// What a run is to do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SyncOptions {
    /// Where the files are from.
    pub source: Source,
    /// The folder that they go to.
    pub into: PathBuf,
    /// What may be received, and what becomes of files that are there.
    pub terms: Terms,
    /// How many downloads there are at one time.
    pub jobs: usize,
    /// How long a server may be silent.
    pub timeout: Duration,
    /// The longest listing.
    pub max_files: usize,
    /// What all files together may take, in bytes.
    pub max_total: u64,
    /// Whether files that have left the listing are removed.
    pub delete: bool,
    /// Whether it is kept in the folder what is known of the files.
    pub keep_state: bool,
    /// Whether nobody else brings files into the folder, and what is left there of no use is ours.
    pub owns_folder: bool,
    /// Who may be asked besides the source.
    pub hosts: Vec<Host>,
    /// Whether every other host with public addresses may be asked.
    pub anybody: bool,
    /// What is said besides to the source's own origin; those that are secret are marked so.
    pub headers: HeaderMap,
    /// Where the token is that shows who asks.
    pub bearer_token: Option<PathBuf>,
    /// Certificates that are trusted besides those of the system.
    pub ca_file: CaFile,
    /// Whom to ask to ask.
    pub proxy: Option<Url>,
}

/// A listing that was read, so that it need not be sent again if it has not changed.
#[derive(Debug, Clone)]
pub(crate) struct Listing {
    validators: Validators,
    /// Its entries, each of which may have a fault of its own.
    pub entries: Arc<Entries>,
}

/// Entries, each of which may have a fault of its own.
pub(crate) type Entries = Vec<Result<Entry, InvalidEntry>>;

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file that is needed cannot be used.
    #[error("{key} {}: {problem}", .path.display())]
    File {
        /// The key that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The trusted certificates cannot be used.
    #[error(transparent)]
    CaFile(#[from] CaFileError),
    /// There is no client.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The folder cannot be used.
    #[error("{}: {cause}", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The listing is of no use.
    #[error("{url}: {cause}")]
    Source {
        /// Where it is, without its query.
        url: String,
        /// Why.
        cause: SourceError,
    },
    /// A fault of the program.
    #[error("a fault of handout itself: {0}")]
    Lost(#[from] JoinError),
}

/// Why a listing is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// It did not come.
    #[error(transparent)]
    Transfer(#[from] download::Error),
    /// The listing is too large.
    #[error("the listing is larger than {}", ByteSize(MAX_LISTING as u64))]
    Large,
    /// The listing's encoding is broken.
    #[error("the listing cannot be decoded: {0}")]
    Gzip(io::Error),
    /// The listing is none.
    #[error(transparent)]
    Listing(#[from] listing::Error),
}

impl Error {
    /// Whether it was ended from outside.
    pub(crate) fn is_interruption(&self) -> bool {
        let Self::Source { cause: SourceError::Transfer(error), .. } = self else { return false };
        matches!(error, download::Error::Interrupted)
    }

    /// How long the server asked to be left alone.
    pub(crate) fn asked_for(&self) -> Option<Duration> {
        match self {
            Self::Source { cause: SourceError::Transfer(error), .. } => error.asked_for(),
            _ => None,
        }
    }
}

/// What a run has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Files that were not here before.
    pub new: u64,
    /// Files with another content than before.
    pub changed: u64,
    /// Files that are as they were.
    pub unchanged: u64,
    /// Entries that failed.
    pub failed: u64,
    /// Files that had left the listing.
    pub removed: u64,
    /// Bytes of files that were received.
    pub bytes: u64,
    /// How long it took.
    pub duration: Duration,
    /// It was ended before its end.
    pub interrupted: bool,
}

/// Is told what happens.
pub(crate) trait Observer: Send + Sync {
    /// A transfer begins; `id` is its own.
    fn begin(&self, id: usize, entry: &Entry);
    /// So much of it is here, of so much if that is known.
    fn advance(&self, id: usize, length: u64, size: Option<u64>);
    /// It has ended.
    fn end(&self, id: usize, entry: &Entry, result: &Result<Done, download::Error>);
    /// An entry cannot be used.
    fn invalid(&self, invalid: &InvalidEntry);
    /// A file that had left the listing was removed, or could not be.
    fn removed(&self, name: &str, result: io::Result<()>);
    /// Something else is wrong, which did not hinder.
    fn trouble(&self, problem: &str);
}

/// Reads the token of a file, as the header that shows who asks.
///
/// # Errors
/// Says what is wrong.
pub(crate) fn read_token(path: &Path) -> Result<HeaderValue, String> {
    let expected = || "expected one line of visible characters".to_owned();
    let token = Secret::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    if !token.reveal().bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(expected());
    }
    let mut value =
        HeaderValue::try_from(format!("Bearer {}", token.reveal())).map_err(|_| expected())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Prepares to ask, as `order` says.
///
/// # Errors
/// If a file that is needed cannot be used.
pub(crate) fn prepare(order: &SyncOptions) -> Result<(Client, Arc<Reach>), Error> {
    let urls = order.source.urls();
    let reach = Arc::new(Reach::new(urls, &order.hosts, order.anybody));
    let mut headers = order.headers.clone();
    if let Some(path) = &order.bearer_token {
        let token = read_token(path).map_err(|problem| Error::File {
            key: "bearer-token-file",
            path: path.clone(),
            problem,
        })?;
        headers.insert(AUTHORIZATION, token);
    }
    let options = Options {
        tls: tls::client_config(&order.ca_file)?,
        proxy: order.proxy.clone(),
        headers,
        sources: urls.to_vec(),
        timeout: Some(order.timeout),
        connections: order.jobs,
    };
    let client = Client::new(options, Arc::clone(&reach))?;
    Ok((client, reach))
}

/// What `order` is about; `before` is what it was the last time.
///
/// # Errors
/// If there is no listing.
pub(crate) async fn list(
    order: &SyncOptions,
    client: &Client,
    reach: &Reach,
    before: Option<Listing>,
    cancel: &CancellationToken,
) -> Result<Listing, Error> {
    match &order.source {
        Source::Urls(urls) => Ok(Listing {
            validators: Validators::default(),
            entries: Arc::new(listing::of_urls(urls)),
        }),
        Source::Listing { url, pointers } => {
            let longest = order.terms.max_duration;
            let asked =
                timeout_at(Instant::now() + longest, ask(order, client, url, before.as_ref()));
            let listed = match cancel.run_until_cancelled(asked).await {
                None => Err(download::Error::Interrupted.into()),
                Some(Err(_)) => Err(download::Error::Slow(longest).into()),
                Some(Ok(Err(error))) => Err(error),
                Some(Ok(Ok(Asked::Unchanged))) => before.ok_or_else(|| status(304)),
                Some(Ok(Ok(Asked::Listing { json, base, validators }))) => {
                    let read = listing::read(&json, pointers, order.max_files, &base, reach);
                    read.map(|entries| Listing { validators, entries: Arc::new(entries) })
                        .map_err(SourceError::from)
                }
            };
            listed.map_err(|cause| Error::Source { url: shown(url), cause })
        }
    }
}

fn status(status: u16) -> SourceError {
    download::Error::Status { status, retry_after: None }.into()
}

/// What a server has sent for a listing.
enum Asked {
    /// It is as it was.
    Unchanged,
    Listing {
        json: Vec<u8>,
        /// Where it was found, after redirects.
        base: Url,
        validators: Validators,
    },
}

/// Asks for a listing until it comes, or is not worth another try.
async fn ask(
    order: &SyncOptions,
    client: &Client,
    url: &Url,
    before: Option<&Listing>,
) -> Result<Asked, SourceError> {
    let validators = before.map(|before| &before.validators);
    let mut headers = validators.map(download::if_changed).unwrap_or_default();
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    let mut retry = 0;
    loop {
        let error = match client.get(url, &headers).await {
            Err(error) => error.into(),
            Ok(mut response) => match response.status().as_u16() {
                304 if before.is_some() => return Ok(Asked::Unchanged),
                200 | 203 => match receive(client, &mut response).await {
                    Err(SourceError::Transfer(error)) => error,
                    Err(error) => return Err(error),
                    Ok(json) => {
                        let validators = download::validators_of(&response);
                        // What may have changed after it was sent is asked for again.
                        let sure = validators.etag.is_some()
                            || validators.strong(download::date_of(&response)).is_some();
                        let validators = if sure { validators } else { Validators::default() };
                        return Ok(Asked::Listing {
                            json,
                            base: response.url().clone(),
                            validators,
                        });
                    }
                },
                _ => {
                    let error = download::failure(&response);
                    client.drain(&mut response).await;
                    error
                }
            },
        };
        let (retries, random) = (order.terms.retries, fastrand::f64());
        let wait = retry::wait(retry, retries, error.asked_for(), random);
        match wait.filter(|_| error.is_temporary()) {
            Some(wait) => tokio::time::sleep(wait).await,
            None => return Err(error.into()),
        }
        retry += 1;
    }
}

/// Receives a listing, bounded before and after it is decoded.
async fn receive(client: &Client, response: &mut Response) -> Result<Vec<u8>, SourceError> {
    let mut listing = match codings(response.headers()) {
        Codings::Gzip(times) => Decoder::new(times),
        Codings::Unsupported => {
            let codings = codings::shown(response.headers());
            return Err(SourceError::Transfer(download::Error::Encoded(codings)));
        }
    };
    let mut came = 0;
    while let Some(piece) =
        client.piece(response).await.map_err(|error| SourceError::Transfer(error.into()))?
    {
        came += piece.len();
        if came > MAX_LISTING {
            return Err(SourceError::Large);
        }
        listing.write_all(&piece).map_err(decoding)?;
    }
    listing.finish()
}

enum Decoder {
    Identity(Bounded),
    Gzip(Box<GzDecoder<Decoder>>),
}

impl Decoder {
    /// A decoder of what was compressed so many times.
    fn new(times: usize) -> Self {
        let source_id = Self::Identity(Bounded::default());
        (0..times).fold(source_id, |inner, _| Self::Gzip(Box::new(GzDecoder::new(inner))))
    }

    fn finish(self) -> Result<Vec<u8>, SourceError> {
        match self {
            Self::Identity(bounded) => Ok(bounded.0),
            Self::Gzip(gzip) => gzip.finish().map_err(decoding)?.finish(),
        }
    }
}

impl Write for Decoder {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        match self {
            Self::Identity(bounded) => bounded.write(piece),
            Self::Gzip(gzip) => gzip.write(piece),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn decoding(error: io::Error) -> SourceError {
    if error.kind() == io::ErrorKind::FileTooLarge {
        SourceError::Large
    } else {
        SourceError::Gzip(error)
    }
}

/// Memory that holds no more than a listing may be.
#[derive(Default)]
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_LISTING {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Does what `order` says, and tells `observer`; `listing` is what it was about the last time. When `cancel` ends it, what has come is kept.
///
/// # Errors
/// If nothing could be done.
pub(crate) async fn sync(
    order: &SyncOptions,
    observer: &Arc<dyn Observer>,
    listing: &mut Option<Listing>,
    cancel: &CancellationToken,
) -> Result<Summary, Error> {
    let begun = Instant::now();
    let prepare_order = order.clone();
    // Roots are read, which can take its time.
    let (client, reach) = tokio::task::spawn_blocking(move || prepare(&prepare_order)).await??;
    let listed = list(order, &client, &reach, listing.take(), cancel).await?;
    let entries = Arc::clone(&listed.entries);
    *listing = Some(listed);
    let into = order.into.clone();
    let keep_state = order.keep_state;
    let listed = Arc::clone(&entries);
    let opened = tokio::task::spawn_blocking(move || open(&into, keep_state, &listed)).await?;
    let (place, state, created, folding) =
        opened.map_err(|cause| Error::Folder { path: order.into.clone(), cause })?;
    let shared = Arc::new(Shared {
        client,
        place: Arc::new(place),
        terms: order.terms.clone(),
        budget: Budget::new(order.max_total),
        received: AtomicU64::new(0),
        finishing: Arc::new(Semaphore::new(MAX_FINISHING)),
        cancel: cancel.clone(),
    });
    let mut run = Run { order, shared, observer, state, folding, summary: Summary::default() };
    run.transfer_all(&entries).await?;
    run.summary.interrupted = cancel.is_cancelled();
    if !run.summary.interrupted {
        run.remove(&entries);
    }
    run.conclude(&entries).await?;
    let Run { mut summary, shared, .. } = run;
    if summary.new > 0 {
        created.keep();
    }
    summary.bytes = shared.received.load(Ordering::Relaxed);
    summary.duration = begun.elapsed();
    Ok(summary)
}

type Opened = (Place, Option<Manifest>, CreatedDirs, Folding);

fn open(into: &Path, keep_state: bool, entries: &Entries) -> io::Result<Opened> {
    let created = CreatedDirs::create(into)?;
    let place = Place::open(into)?;
    let has_state = keep_state || !matches!(place.look(manifest::FILE)?, There::Nothing);
    let state = has_state.then(|| Manifest::load(&place));
    let mut names = listing::names(entries);
    names.extend(state.iter().flat_map(|state| state.files.keys()).map(String::as_str));
    let folded: HashSet<_> = names.iter().map(|name| Folding::ALL.fold(name)).collect();
    let folding = if folded.len() < names.len() { place.folding()? } else { Folding::default() };
    Ok((place, state, created, folding))
}

fn alias_of(entry: &Entry, same: &Entry) -> InvalidEntry {
    InvalidEntry {
        what: format!("{} ({})", escape(&entry.name), shown(&entry.url)),
        fault: EntryError::Alias(escape(&same.name)),
        name: Some(entry.name.clone()),
    }
}

struct Run<'a> {
    order: &'a SyncOptions,
    shared: Arc<Shared>,
    observer: &'a Arc<dyn Observer>,
    state: Option<Manifest>,
    folding: Folding,
    summary: Summary,
}

impl Run<'_> {
    async fn transfer_all(&mut self, entries: &Entries) -> Result<(), Error> {
        if self.order.max_total < u64::MAX {
            self.count_what_is_here(entries);
        }
        let jobs = Arc::new(Semaphore::new(self.order.jobs));
        let mut transfers = JoinSet::new();
        let mut first = HashMap::new();
        for (id, entry) in entries.iter().enumerate() {
            let entry = match entry {
                Ok(entry) => {
                    let same = first.insert(self.folding.fold(&entry.name), entry);
                    if let Some(same) = same {
                        first.insert(self.folding.fold(&entry.name), same);
                        self.summary.failed += 1;
                        self.observer.invalid(&alias_of(entry, same));
                        continue;
                    }
                    entry.clone()
                }
                Err(invalid) => {
                    self.summary.failed += 1;
                    self.observer.invalid(invalid);
                    continue;
                }
            };
            let cancelled = self.shared.cancel.cancelled();
            let permit = tokio::select! {
                permit = Arc::clone(&jobs).acquire_owned() => permit,
                () = cancelled => break,
            };
            // A semaphore that is never closed.
            let Ok(permit) = permit else { break };
            while let Some(ended) = transfers.try_join_next() {
                self.count(ended?);
            }
            let known = self.state.as_ref().and_then(|state| state.files.get(&entry.name)).cloned();
            let (shared, observer) = (Arc::clone(&self.shared), Arc::clone(self.observer));
            transfers.spawn(async move {
                observer.begin(id, &entry);
                let progress = |length, size| observer.advance(id, length, size);
                let result = transfer(&shared, &entry, known.as_ref(), permit, &progress).await;
                observer.end(id, &entry, &result);
                (entry.name, result.map(|Done { outcome, known }| (outcome, known)).ok())
            });
        }
        while let Some(ended) = transfers.join_next().await {
            self.count(ended?);
        }
        Ok(())
    }

    /// What is here counts for `max-total` until something takes its place, and what has left the
    /// listing and stays.
    fn count_what_is_here(&self, entries: &Entries) {
        let Shared { place, budget, .. } = &*self.shared;
        let mut names: HashSet<&str> = entries.iter().flatten().map(|entry| &*entry.name).collect();
        if let (Some(state), false) = (&self.state, self.order.delete) {
            let listed = listing::names(entries);
            let known = state.files.keys().map(String::as_str);
            names.extend(known.filter(|name| !listed.contains(name)));
        }
        for name in names {
            if let Ok(There::File(local)) = place.look(name) {
                budget.take_what_is_left(local.size);
            }
            if place.has_left(name) {
                budget.take_what_is_left(place.part_size(name));
            }
        }
    }

    fn count(&mut self, (name, done): (String, Option<(Outcome, CachedFile)>)) {
        let Some((outcome, known)) = done else {
            self.summary.failed += 1;
            return;
        };
        match outcome {
            Outcome::New => self.summary.new += 1,
            Outcome::Changed => self.summary.changed += 1,
            Outcome::Unchanged => self.summary.unchanged += 1,
        }
        if let Some(state) = &mut self.state {
            state.files.insert(name, known);
        }
    }

    /// Removes what has left the listing: of the files that are known to be from it.
    fn remove(&mut self, entries: &Entries) {
        let (Some(state), true) = (&mut self.state, self.order.delete) else { return };
        // An entry without a name may be that of any file.
        if entries.iter().any(|entry| matches!(entry, Err(InvalidEntry { name: None, .. }))) {
            return;
        }
        let listed = listing::names(entries);
        let folded: HashSet<_> = listed.iter().map(|name| self.folding.fold(name)).collect();
        let gone: Vec<_> =
            state.files.keys().filter(|name| !listed.contains(name.as_str())).cloned().collect();
        for name in gone {
            // The same file under the name that it has in the listing now.
            if folded.contains(&self.folding.fold(&name)) {
                state.files.remove(&name);
                continue;
            }
            // What somebody has put there since is not ours.
            let is_ours = |local| state.files.get(&name).is_some_and(|known| known.is_of(&local));
            let there = self.shared.place.look(&name);
            let result = match there {
                Ok(There::File(local)) if is_ours(local) => self.shared.place.unlink(&name),
                Ok(_) => {
                    state.files.remove(&name);
                    continue;
                }
                Err(error) => Err(error),
            };
            if result.is_ok() {
                state.files.remove(&name);
                self.summary.removed += 1;
            } else {
                self.summary.failed += 1;
            }
            self.observer.removed(&name, result);
        }
    }

    /// Forces the names to the disk, writes the state, and removes parts that are of no use.
    async fn conclude(&mut self, entries: &Entries) -> Result<(), Error> {
        let place = Arc::clone(&self.shared.place);
        let state = self.state.take();
        let keep: Vec<_> = listing::names(entries).into_iter().map(str::to_owned).collect();
        // Where others may be at work, what is left is theirs for a while.
        let age = if self.order.owns_folder { Duration::ZERO } else { KEEP_PARTS };
        let anything = self.summary.new + self.summary.changed + self.summary.removed > 0;
        let concluded = tokio::task::spawn_blocking(move || -> io::Result<()> {
            if anything {
                place.sync();
            }
            let keep: HashSet<&str> = keep.iter().map(String::as_str).collect();
            if let Some(mut state) = state {
                let here = |name: &str| !matches!(place.look(name), Ok(There::Nothing));
                state.files.retain(|name, _| keep.contains(name.as_str()) || here(name));
                state.save_if_changed(&place).map_err(io::Error::other)?;
            }
            place.clean(keep, age)
        });
        if let Err(error) = concluded.await? {
            self.observer.trouble(&format!("{}: {error}", self.order.into.display()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn decoder() -> Decoder {
        Decoder::new(1)
    }

    #[test]
    fn a_listing_is_decoded() {
        let mut listing = decoder();
        for piece in gzip(b"[1, 2]").chunks(3) {
            listing.write_all(piece).unwrap();
        }
        assert_eq!(listing.finish().unwrap(), b"[1, 2]");
        let mut twice = Decoder::new(2);
        twice.write_all(&gzip(&gzip(b"[3]"))).unwrap();
        assert_eq!(twice.finish().unwrap(), b"[3]");
    }

    #[test]
    fn a_listing_that_explodes_is_given_up() {
        let small = gzip(&vec![0; 2 * MAX_LISTING]);
        assert!(small.len() < 64 << 10);
        let mut listing = decoder();
        let written = small.chunks(1024).try_for_each(|piece| listing.write_all(piece));
        assert!(matches!(written.map_err(decoding), Err(SourceError::Large)));
    }

    #[test]
    fn a_listing_that_is_cut_or_junk_is_no_listing() {
        let encoded = gzip(b"[1, 2]");
        let mut listing = decoder();
        listing.write_all(&encoded[..encoded.len() - 3]).unwrap();
        assert!(matches!(listing.finish(), Err(SourceError::Gzip(_))));
        let mut junk = decoder();
        let written = junk.write_all(b"no gzip at all").map_err(decoding);
        assert!(written.and_then(|()| junk.finish().map(drop)).is_err());
    }
}
