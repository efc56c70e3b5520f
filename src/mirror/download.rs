//! One file: asked for if it changed, resumed, checked, and here when it is whole.
//!
//! What is small is received in memory and written at once; what is larger grows in a hidden file,
//! which is kept when the transfer ends too early, so that the next can go on from there.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use reqwest::Response;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName, HeaderValue,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE, RETRY_AFTER,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::fs::atomic::{OverwritePolicy, SaveError};
use crate::fs::filename::escape;
use crate::http::client;
use crate::http::client::Client;
use crate::http::codings;
use crate::http::codings::{Codings, codings};
use crate::http::retry;
use crate::mirror::listing::Entry;
use crate::mirror::manifest;
use crate::mirror::manifest::{CachedFile, Precondition, Validators, source_id};
use crate::mirror::target_dir::{Local, Part, Place, There};
use crate::text::counted;

/// How much is received before it is written.
const PIECE: usize = 256 << 10;

/// How long what was received may wait in memory to be written, if the server is slow.
const UNWRITTEN: Duration = Duration::from_secs(1);

/// A transfer that gets further by so much is not a failed attempt, even if it ends too early.
const PROGRESS: u64 = 1 << 20;

/// What may be received, and what becomes of files that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    /// The largest file, in bytes.
    pub max_file: u64,
    /// What the operator calls that.
    pub max_file_key: &'static str,
    /// How long a file may take, with all attempts.
    pub max_duration: Duration,
    /// How often it is tried again.
    pub retries: u32,
    /// Which types are taken, as `image/png` or `image/*`; none: every.
    pub content_types: Vec<String>,
    /// The treatment of files that exist.
    pub overwrite: OverwritePolicy,
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was not here before.
    New,
    /// It replaced another content.
    Changed,
    /// It is as it was.
    Unchanged,
}

/// A file that is here as it should be.
#[derive(Debug)]
pub(crate) struct Done {
    /// What became of it.
    pub outcome: Outcome,
    /// What is known of it now.
    pub known: CachedFile,
}

/// Why a file is not here, or is as it was before.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// No reply, or no end of it.
    #[error(transparent)]
    Http(#[from] client::Error),
    /// The server does not send it.
    #[error("the server answers {status}{}", reason(*.status))]
    Status {
        /// Which it answered instead of 200.
        status: u16,
        /// What it asked to wait for.
        retry_after: Option<Duration>,
    },
    /// A part that was not asked for.
    #[error("the server sent another part than the one that was asked for")]
    Part,
    /// It is encoded.
    #[error("the server sent it encoded ({0}), which was not asked for")]
    Encoded(String),
    /// It is of another type.
    #[error("it is of the type {0}, which is not among those that are taken (content-types)")]
    Type(String),
    /// It is too large.
    #[error("it is larger than {} ({key})", ByteSize(*.limit))]
    Large {
        /// In bytes.
        limit: u64,
        /// What sets it.
        key: &'static str,
    },
    /// All files together are too large.
    #[error("all files together would be larger than max-total")]
    Total,
    /// It is shorter or longer than announced.
    #[error("the server announced {} and sent {received}", counted(*promised, "byte"))]
    Length {
        /// What was announced.
        promised: u64,
        /// What came.
        received: u64,
    },
    /// It is not what the listing says.
    #[error("the digest does not hold: it is not what the listing says")]
    Digest,
    /// It took too long.
    #[error("it took longer than {0:?} (max-duration)")]
    Slow(Duration),
    /// It is there and stays.
    #[error("it is there already; --force replaces it, --update does if it has changed")]
    Exists,
    /// Something else has its name.
    #[error("a folder, a link or another thing that is no file has its name")]
    NotAFile,
    /// Another process is at it.
    #[error("another process is at it")]
    Busy,
    /// It could not be written.
    #[error("cannot be written: {0}")]
    Write(#[from] io::Error),
    /// It was ended from outside.
    #[error("it was interrupted")]
    Interrupted,
}

impl From<SaveError> for Error {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Exists => Self::Exists,
            SaveError::SpecialFile => Self::NotAFile,
            SaveError::Io(error) if error.kind() == io::ErrorKind::IsADirectory => Self::NotAFile,
            SaveError::Io(error) if error.kind() == io::ErrorKind::WouldBlock => Self::Busy,
            SaveError::Io(error) => Self::Write(error),
            rejected @ SaveError::NameRejected(_) => Self::Write(io::Error::other(rejected)),
        }
    }
}

fn reason(status: u16) -> String {
    let reason = reqwest::StatusCode::from_u16(status).ok();
    let reason = reason.and_then(|status| status.canonical_reason());
    reason.map(|reason| format!(" ({reason})")).unwrap_or_default()
}

impl Error {
    /// Whether it may be better a little later.
    pub(crate) fn is_temporary(&self) -> bool {
        match self {
            Self::Http(error) => error.is_temporary(),
            Self::Status { status, .. } => retry::is_temporary(*status),
            Self::Length { .. } => true,
            _ => false,
        }
    }

    /// What the server asked to wait for.
    pub(crate) fn asked_for(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// What all files together may take.
#[derive(Debug)]
pub(crate) struct Budget(AtomicU64);

impl Budget {
    /// So many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        Self(AtomicU64::new(bytes))
    }

    /// Takes some of it; false if there is not as much left.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        let taken = |left: u64| left.checked_sub(bytes);
        self.0.try_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }

    /// Takes some of it, or what is left.
    pub(crate) fn take_what_is_left(&self, bytes: u64) {
        self.0.update(Ordering::Relaxed, Ordering::Relaxed, |left| left.saturating_sub(bytes));
    }

    /// Gives some of it back.
    pub(crate) fn give(&self, bytes: u64) {
        self.0.update(Ordering::Relaxed, Ordering::Relaxed, |left| left.saturating_add(bytes));
    }
}

/// What the transfers of one run share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Who asks.
    pub client: Client,
    /// Where the files go.
    pub place: Arc<Place>,
    /// What may be received.
    pub terms: Terms,
    /// What all files may take.
    pub budget: Budget,
    /// How many bytes of bodies have been received.
    pub received: AtomicU64,
    /// How many files may be forced to the disk at one time: the disk does many as quickly as one.
    pub finishing: Arc<Semaphore>,
    /// Ends all.
    pub cancel: CancellationToken,
}

/// Is told how a transfer goes: so much is here, of so much if that is known.
pub(crate) type Progress<'a> = &'a (dyn Fn(u64, Option<u64>) + Send + Sync);

/// What is known about a part of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    /// As [`source_id`] has it.
    source: String,
    /// What makes it a part of the same content: for `If-Range`.
    validator: String,
    validators: Validators,
    /// How long all of it is, if that was said, in bytes.
    #[serde(default)]
    total: Option<u64>,
}

/// A part that a transfer can go on from.
struct Resume {
    part: Part,
    length: u64,
    about: About,
}

/// Transfers one file. `permit` is given back when nothing more is to be received.
///
/// # Errors
/// Why it is not here, or is as it was before.
pub(crate) async fn transfer(
    shared: &Arc<Shared>,
    entry: &Entry,
    known: Option<&CachedFile>,
    permit: OwnedSemaphorePermit,
    progress: Progress<'_>,
) -> Result<Done, Error> {
    let local = match shared.place.look(&entry.name)? {
        There::Other => return Err(Error::NotAFile),
        There::Nothing => None,
        There::File(_) if shared.terms.overwrite == OverwritePolicy::Refuse => {
            return Err(Error::Exists);
        }
        There::File(local) => Some(local),
    };
    let source = source_id(&entry.url);
    let deadline = Instant::now() + shared.terms.max_duration;
    let permit = Some(permit);
    Transfer { shared, entry, local, source, deadline, permit, progress, taken: 0, furthest: 0 }
        .run(known)
        .await
}

struct Transfer<'a> {
    shared: &'a Arc<Shared>,
    entry: &'a Entry,
    local: Option<Local>,
    source: String,
    deadline: Instant,
    permit: Option<OwnedSemaphorePermit>,
    progress: Progress<'a>,
    /// How much of the budget this attempt has taken.
    taken: u64,
    /// How much of the file the best attempt has got to, an earlier run's part included.
    furthest: u64,
}

impl Transfer<'_> {
    async fn run(&mut self, known: Option<&CachedFile>) -> Result<Done, Error> {
        let mut ask = Precondition::Always;
        if let (Some(local), OverwritePolicy::Update) = (self.local, self.shared.terms.overwrite) {
            match self.entry.sha256 {
                // The listing says itself whether it changed.
                Some(wanted) if self.has_digest(wanted).await? => {
                    let known = known.filter(|known| known.source == self.source);
                    let validators = known.map(|known| known.validators.clone());
                    return Ok(self.unchanged(local, validators.unwrap_or_default()));
                }
                Some(_) => {}
                None => ask = manifest::precondition(known, &local, &self.source),
            }
        }
        // The stored file makes room for its successor.
        let stored = known.map_or(0, |known| known.size);
        self.shared.budget.give(stored);
        let done = self.attempts(&ask).await;
        if !matches!(done, Ok(Done { outcome: Outcome::New | Outcome::Changed, .. })) {
            self.give_back();
            self.shared.budget.take_what_is_left(stored);
        }
        done
    }

    /// Whether this or an earlier run may have left a part.
    fn may_have_part(&self) -> bool {
        self.furthest > 0 || self.shared.place.has_left(&self.entry.name)
    }

    fn take(&mut self, bytes: u64) -> Result<(), Error> {
        if !self.shared.budget.take(bytes) {
            return Err(Error::Total);
        }
        self.taken += bytes;
        Ok(())
    }

    fn give_back(&mut self) {
        self.shared.budget.give(std::mem::take(&mut self.taken));
    }

    async fn attempts(&mut self, ask: &Precondition) -> Result<Done, Error> {
        let mut retry = 0;
        if self.may_have_part() {
            self.furthest = self.shared.place.part_size(&self.entry.name);
        }
        loop {
            let before = self.furthest;
            let error = match self.attempt(ask).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if !error.is_temporary() {
                return Err(error);
            }
            if self.furthest - before >= PROGRESS {
                retry = 0;
            }
            let retries = self.shared.terms.retries;
            let wait = retry::wait(retry, retries, error.asked_for(), fastrand::f64());
            let Some(wait) = wait.filter(|wait| Instant::now() + *wait < self.deadline) else {
                return Err(error);
            };
            retry += 1;
            let waited = self.shared.cancel.run_until_cancelled(tokio::time::sleep(wait)).await;
            waited.ok_or(Error::Interrupted)?;
        }
    }

    /// Returns the outcome of a reply 304, or `None` if the file must be requested without condition.
    fn not_modified(&self, ask: &Precondition, response: &Response) -> Result<Option<Done>, Error> {
        let validators = validators_of(response);
        match ask {
            Precondition::IfChanged(known) => {
                let local = self.local.ok_or(Error::Part)?;
                Ok(Some(self.unchanged(local, validators.or(known))))
            }
            // Most servers reply 304 for any older file, too.
            Precondition::IfModifiedAtOtherTime(time) => Ok(self
                .local
                .filter(|_| validators.last_modified.as_ref() == Some(time))
                .map(|local| self.unchanged(local, validators))),
            Precondition::Always => Ok(None),
        }
    }

    async fn attempt(&mut self, ask: &Precondition) -> Result<Done, Error> {
        self.give_back();
        let mut resume = self.resume()?;
        let mut ask = ask;
        let mut response = loop {
            let headers = conditions(ask, resume.as_ref());
            let shared = self.shared;
            let mut response = self.within(shared.client.get(&self.entry.url, &headers)).await?;
            match (response.status().as_u16(), &resume) {
                (206, Some(resume)) if continues(&response, resume) => break response,
                // The part is of no use.
                (206 | 416, Some(_)) => resume = None,
                (200 | 203, _) => {
                    resume = None;
                    break response;
                }
                (304, None) if *ask != Precondition::Always => {
                    if let Some(done) = self.not_modified(ask, &response)? {
                        return Ok(done);
                    }
                    ask = &Precondition::Always;
                }
                (206, None) => return Err(Error::Part),
                _ => {
                    let error = failure(&response);
                    if !error.is_temporary() {
                        self.drop_part(resume);
                    }
                    shared.client.drain(&mut response).await;
                    return Err(error);
                }
            }
            shared.client.drain(&mut response).await;
        };
        let mut said = validators_of(&response);
        let validator = said.strong(date_of(&response));
        let about = validator.map(|validator| About {
            source: self.source.clone(),
            validator,
            validators: said.clone(),
            total: response.content_length(),
        });
        // A part keeps what was said of its beginning.
        let about = resume.as_ref().map(|resume| resume.about.clone()).or(about);
        if let (Some(_), Some(about)) = (&resume, &about) {
            said = said.or(&about.validators);
        }
        let mut incoming = Incoming::begin(self, resume, about).await?;
        let received = self.receive(&mut response, &mut incoming).await;
        if let Err(error) = received {
            incoming.settle(&error).await;
            return Err(error);
        }
        let (outcome, local) = self.conclude(incoming, said.modified()).await?;
        Ok(Done { outcome, known: self.known(local, said) })
    }

    /// What ends when the time is over, or from outside.
    async fn within<T, E>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T, Error>
    where
        Error: From<E>,
    {
        let work = timeout_at(self.deadline, work);
        match self.shared.cancel.run_until_cancelled(work).await {
            None => Err(Error::Interrupted),
            Some(Err(_)) => Err(Error::Slow(self.shared.terms.max_duration)),
            Some(Ok(done)) => Ok(done?),
        }
    }

    fn known(&self, local: Local, validators: Validators) -> CachedFile {
        let Local { size, modified } = local;
        CachedFile { source: self.source.clone(), validators, size, modified }
    }

    fn unchanged(&self, local: Local, validators: Validators) -> Done {
        Done { outcome: Outcome::Unchanged, known: self.known(local, validators) }
    }

    async fn has_digest(&self, wanted: [u8; 32]) -> Result<bool, Error> {
        let (place, name) = (Arc::clone(&self.shared.place), self.entry.name.clone());
        let digest = self.within(blocking(move || digest_of(&mut place.read(&name)?, u64::MAX)));
        // What cannot be read is not the same.
        match digest.await {
            Ok(digest) => Ok(<[u8; 32]>::from(digest.finalize()) == wanted),
            Err(Error::Write(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What an earlier transfer has left to go on from, if it can be.
    fn resume(&self) -> Result<Option<Resume>, Error> {
        let (place, name) = (&self.shared.place, &self.entry.name);
        let about = if self.may_have_part() { place.about(name) } else { None };
        let Some(about) = about else { return Ok(None) };
        let mut part = place.part(name).map_err(busy)?;
        let metadata = part.pending.file.metadata()?;
        let about = serde_json::from_slice(&about).ok().filter(|about: &About| {
            about.source == self.source
                && metadata.len() > 0
                && metadata.len() <= self.shared.terms.max_file
                // What was written before a crash of the machine may not be there.
                && metadata.modified().is_ok_and(|modified| started().is_some_and(|started| modified > started))
        });
        let Some(about) = about else {
            place.drop_part(part, name);
            return Ok(None);
        };
        part.pending.keep_on_drop = true;
        Ok(Some(Resume { part, length: metadata.len(), about }))
    }

    fn drop_part(&self, resume: Option<Resume>) {
        if let Some(Resume { part, .. }) = resume {
            self.shared.place.drop_part(part, &self.entry.name);
        }
    }

    /// Receives the body.
    async fn receive(
        &mut self,
        response: &mut Response,
        incoming: &mut Incoming,
    ) -> Result<(), Error> {
        let shared = self.shared;
        let Terms { max_file, max_file_key, content_types, .. } = &shared.terms;
        if codings(response.headers()) != Codings::Gzip(0) {
            return Err(Error::Encoded(codings::shown(response.headers())));
        }
        let kinds = response.headers().get_all(CONTENT_TYPE).iter();
        let kinds: Vec<_> = kinds.map(|kind| kind.to_str().unwrap_or_default()).collect();
        // What goes on may leave out the type, which was looked at in the beginning.
        let goes_on = response.status() == reqwest::StatusCode::PARTIAL_CONTENT;
        if !(goes_on && kinds.is_empty() || are_wanted(&kinds, content_types)) {
            let kind = if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") };
            return Err(Error::Type(escape(&kind)));
        }
        let mut length = incoming.length;
        let promised = if goes_on {
            header(response, &CONTENT_RANGE).and_then(content_range).and_then(|range| range.total)
        } else {
            response.content_length()
        };
        let large = || Error::Large { limit: *max_file, key: max_file_key };
        // What is promised to be too large need not be received.
        if promised.is_some_and(|promised| promised > *max_file) {
            return Err(large());
        }
        self.take(promised.unwrap_or(length))?;
        (self.progress)(length, promised);
        loop {
            let piece = {
                let mut next = std::pin::pin!(self.within(shared.client.piece(response)));
                if let Ok(piece) = timeout(UNWRITTEN, next.as_mut()).await {
                    piece?
                } else {
                    // The next may take long, and this must not be lost.
                    incoming.write().await?;
                    next.await?
                }
            };
            let Some(piece) = piece else { break };
            let came = piece.len() as u64;
            shared.received.fetch_add(came, Ordering::Relaxed);
            length += came;
            self.furthest = self.furthest.max(length);
            if length > *max_file {
                return Err(large());
            }
            if let Some(more) = length.checked_sub(self.taken) {
                self.take(more)?;
            }
            (self.progress)(length, promised);
            incoming.append(&piece).await?;
        }
        match promised {
            Some(promised) if promised != length => {
                Err(Error::Length { promised, received: length })
            }
            _ => Ok(()),
        }
    }

    /// Checks what has come, and gives it its name.
    async fn conclude(
        &mut self,
        incoming: Incoming,
        modified: Option<SystemTime>,
    ) -> Result<(Outcome, Local), Error> {
        let finishing = Arc::clone(&self.shared.finishing).acquire_owned().await;
        // The next file is received while this one goes to the disk.
        self.permit = None;
        let place = Arc::clone(&self.shared.place);
        let name = self.entry.name.clone();
        let (wanted, local) = (self.entry.sha256, self.local);
        let overwrite = self.shared.terms.overwrite;
        let Incoming { rest, writer, .. } = incoming;
        let writer = writer.done().await?;
        let concluded = blocking(move || {
            conclude(&place, &name, writer, &rest, wanted, local, modified, overwrite)
        });
        let concluded = concluded.await;
        drop(finishing);
        concluded
    }
}

/// What is left of a transfer when everything has come: nothing of the network.
#[expect(clippy::too_many_arguments, reason = "of one call, which hands them to another thread")]
fn conclude(
    place: &Place,
    name: &str,
    writer: Option<Writer>,
    rest: &[u8],
    wanted: Option<[u8; 32]>,
    local: Option<Local>,
    modified: Option<SystemTime>,
    overwrite: OverwritePolicy,
) -> Result<(Outcome, Local), Error> {
    let (writer, outcome) = match writer {
        None => {
            if wanted.is_some_and(|wanted| <[u8; 32]>::from(Sha256::digest(rest)) != wanted) {
                return Err(Error::Digest);
            }
            if let Some(local) = local.filter(|local| local.size == rest.len() as u64)
                && is_same(place, name, &mut &*rest)
            {
                return Ok((Outcome::Unchanged, local));
            }
            (Writer::begin(place, name, rest)?, local.map_or(Outcome::New, |_| Outcome::Changed))
        }
        Some(mut writer) => {
            let mut check = || {
                writer.write(rest)?;
                let digest = writer.digest.take().map(|digest| <[u8; 32]>::from(digest.finalize()));
                if digest.zip(wanted).is_some_and(|(digest, wanted)| digest != wanted) {
                    return Err(Error::Digest);
                }
                let Some(local) = local else { return Ok(Outcome::New) };
                if writer.part.pending.file.metadata()?.len() != local.size {
                    return Ok(Outcome::Changed);
                }
                writer.part.pending.file.seek(SeekFrom::Start(0))?;
                let same = is_same(place, name, &mut writer.part.pending.file);
                Ok(if same { Outcome::Unchanged } else { Outcome::Changed })
            };
            match (check(), local) {
                (Ok(Outcome::Unchanged), Some(local)) => {
                    place.drop_part(writer.part, name);
                    return Ok((Outcome::Unchanged, local));
                }
                (Ok(outcome), _) => (writer, outcome),
                (Err(error), _) => {
                    place.drop_part(writer.part, name);
                    return Err(error);
                }
            }
        }
    };
    let has_about = writer.part.pending.keep_on_drop;
    let finished = place.finish(writer.part, name, modified, overwrite);
    if has_about {
        place.drop_about(name);
    }
    Ok((outcome, finished?))
}

/// Whether a file is there with exactly this content. What cannot be read is not the same.
fn is_same(place: &Place, name: &str, content: &mut impl Read) -> bool {
    let mut same = || -> io::Result<bool> {
        let mut file = place.read(name)?;
        let (mut one, mut other) = (vec![0; 64 << 10], vec![0; 64 << 10]);
        loop {
            let length = file.read(&mut one)?;
            let other = other.get_mut(..length).unwrap_or_default();
            content.read_exact(other)?;
            if one.get(..length) != Some(&*other) {
                return Ok(false);
            }
            if length == 0 {
                return Ok(content.read(&mut [0])? == 0);
            }
        }
    };
    same().unwrap_or(false)
}

/// What has come of a file.
struct Incoming {
    place: Arc<Place>,
    name: String,
    /// How much there was at the beginning.
    length: u64,
    /// What has not been written.
    rest: Vec<u8>,
    writer: Writing,
    /// What is to be known of a part, if it is of use.
    about: Option<About>,
    digest: bool,
}

/// Writes to a part; it is not waited for until there is more.
enum Writing {
    Nothing,
    Idle(Writer),
    Busy(tokio::task::JoinHandle<Result<Writer, Error>>),
}

impl Writing {
    async fn done(self) -> Result<Option<Writer>, Error> {
        match self {
            Self::Nothing => Ok(None),
            Self::Idle(writer) => Ok(Some(writer)),
            Self::Busy(writing) => writing.await.map_err(io::Error::other)?.map(Some),
        }
    }
}

struct Writer {
    part: Part,
    digest: Option<Sha256>,
}

impl Writer {
    /// A new part with this beginning.
    fn begin(place: &Place, name: &str, beginning: &[u8]) -> Result<Self, Error> {
        let part = place.new_part(name).map_err(busy)?;
        let mut writer = Self { part, digest: None };
        writer.write(beginning)?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.part.pending.file.write_all(bytes)?;
        if let Some(digest) = &mut self.digest {
            digest.update(bytes);
        }
        Ok(())
    }
}

impl Incoming {
    async fn begin(
        transfer: &Transfer<'_>,
        resume: Option<Resume>,
        about: Option<About>,
    ) -> Result<Self, Error> {
        let digest = transfer.entry.sha256.is_some();
        let (mut length, mut writer) = (0, Writing::Nothing);
        if let Some(Resume { mut part, length: so_far, .. }) = resume {
            length = so_far;
            writer = Writing::Idle(
                transfer
                    .within(blocking(move || {
                        let digest = if digest {
                            Some(digest_of(&mut part.pending.file, length)?)
                        } else {
                            part.pending.file.seek(SeekFrom::Start(length))?;
                            None
                        };
                        Ok(Writer { part, digest })
                    }))
                    .await?,
            );
        }
        let place = Arc::clone(&transfer.shared.place);
        let name = transfer.entry.name.clone();
        Ok(Self { place, name, length, rest: Vec::new(), writer, about, digest })
    }

    async fn append(&mut self, piece: &[u8]) -> Result<(), Error> {
        if !self.rest.is_empty() && self.rest.len() + piece.len() > PIECE {
            self.write().await?;
        }
        self.rest.extend_from_slice(piece);
        Ok(())
    }

    /// Begins to write what has come.
    async fn write(&mut self) -> Result<(), Error> {
        if self.rest.is_empty() {
            return Ok(());
        }
        let writer = std::mem::replace(&mut self.writer, Writing::Nothing).done().await?;
        let rest = std::mem::take(&mut self.rest);
        let (place, name) = (Arc::clone(&self.place), self.name.clone());
        let (about, digest) = (self.about.clone(), self.digest);
        self.writer = Writing::Busy(tokio::task::spawn_blocking(move || {
            let mut writer = if let Some(writer) = writer {
                writer
            } else {
                let mut writer = Writer::begin(&place, &name, &[])?;
                writer.digest = digest.then(Sha256::new);
                if let Some(about) = about {
                    // Without it, the part cannot be gone on from, and no more.
                    let about = serde_json::to_vec(&about).unwrap_or_default();
                    writer.part.pending.keep_on_drop = place.write_about(&name, &about).is_ok();
                }
                writer
            };
            match writer.write(&rest) {
                Ok(()) => Ok(writer),
                Err(error) => {
                    place.drop_part(writer.part, &name);
                    Err(error.into())
                }
            }
        }));
        Ok(())
    }

    /// After an end that came too early, keeps what is of use.
    async fn settle(mut self, error: &Error) {
        let keep = match error {
            Error::Http(error) => error.is_temporary(),
            Error::Interrupted | Error::Slow(_) => true,
            _ => false,
        };
        if keep && self.about.is_some() && self.write().await.is_err() {
            return;
        }
        let writer = std::mem::replace(&mut self.writer, Writing::Nothing).done().await;
        if let Ok(Some(writer)) = writer
            && !(keep && writer.part.pending.keep_on_drop)
        {
            self.place.drop_part(writer.part, &self.name);
        }
    }
}

fn busy(error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::WouldBlock { Error::Busy } else { error.into() }
}

/// Works on another thread, as the disk may have to be waited for.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// The digest of the first `length` bytes of a file.
fn digest_of(file: &mut File, length: u64) -> Result<Sha256, Error> {
    file.seek(SeekFrom::Start(0))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; PIECE];
    let mut file = file.take(length);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(digest),
            read => digest.update(buffer.get(..read).unwrap_or_default()),
        }
    }
}

/// When this machine was started.
fn started() -> Option<SystemTime> {
    let since = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    SystemTime::now().checked_sub(Duration::from_secs(since.tv_sec.try_into().ok()?))
}

fn header<'a>(response: &'a Response, name: &HeaderName) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// What a reply with another status than was hoped for means.
pub(crate) fn failure(response: &Response) -> Error {
    let retry_after = header(response, &RETRY_AFTER)
        .and_then(|value| retry::retry_after(value, SystemTime::now()));
    Error::Status { status: response.status().as_u16(), retry_after }
}

/// When a reply was sent, as it says.
pub(crate) fn date_of(response: &Response) -> Option<&str> {
    header(response, &DATE)
}

/// The identity of the content of a reply.
pub(crate) fn validators_of(response: &Response) -> Validators {
    Validators::new(header(response, &ETAG), header(response, &LAST_MODIFIED))
}

/// What is said of what is here.
fn conditions(ask: &Precondition, resume: Option<&Resume>) -> HeaderMap {
    let mut headers = match (resume, ask) {
        (Some(Resume { length, about, .. }), _) => {
            let mut headers = HeaderMap::new();
            say(&mut headers, RANGE, &format!("bytes={length}-"));
            say(&mut headers, IF_RANGE, &about.validator);
            headers
        }
        (None, Precondition::IfChanged(validators)) => if_changed(validators),
        (None, Precondition::IfModifiedAtOtherTime(time)) => {
            let mut headers = HeaderMap::new();
            say(&mut headers, IF_MODIFIED_SINCE, time);
            headers
        }
        (None, Precondition::Always) => HeaderMap::new(),
    };
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers
}

/// That something is wanted only if it is not this any more.
pub(crate) fn if_changed(validators: &Validators) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Some(etag) = &validators.etag {
        say(&mut headers, IF_NONE_MATCH, etag);
    }
    if let Some(last_modified) = &validators.last_modified {
        say(&mut headers, IF_MODIFIED_SINCE, last_modified);
    }
    headers
}

fn say(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    // What a server has sent can be sent back, or is left out.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Whether a part that was sent goes on where ours ends, to the end of the same content.
fn continues(response: &Response, resume: &Resume) -> bool {
    let range = header(response, &CONTENT_RANGE).and_then(content_range);
    let said = validators_of(response);
    let About { validator, validators: Validators { etag, last_modified }, total, .. } =
        &resume.about;
    let is_other = |now: &Option<String>, then: &Option<String>| now.is_some() && now != then;
    // A server that heeds If-Range says the ETag again, and may leave out the rest.
    let is_same = etag.as_ref() != Some(validator) || said.etag == *etag;
    is_same
        && !is_other(&said.etag, etag)
        && !is_other(&said.last_modified, last_modified)
        && range.is_some_and(|range| {
            range.goes_on_from(resume.length, response.content_length())
                && (total.is_none() || range.total == *total)
        })
}

/// A `Content-Range` (RFC 9110, 14.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ContentRange {
    first: u64,
    last: u64,
    total: Option<u64>,
}

impl ContentRange {
    /// Whether it goes on from `length` to the end, in a body of this length, if that is known.
    fn goes_on_from(self, length: u64, body: Option<u64>) -> bool {
        let Self { first, last, total } = self;
        first == length
            && last >= first
            && total.is_some()
            && last.checked_add(1) == total
            && body.is_none_or(|body| (last - first).checked_add(1) == Some(body))
    }
}

fn content_range(value: &str) -> Option<ContentRange> {
    let (range, total) = value.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some(ContentRange { first: first.parse().ok()?, last: last.parse().ok()?, total })
}

/// Whether media types that were sent, of which there should be one, are those that are taken.
fn are_wanted(kinds: &[&str], wanted: &[String]) -> bool {
    wanted.is_empty() || !kinds.is_empty() && kinds.iter().all(|kind| is_wanted(kind, wanted))
}

/// Whether a media type is one of those that are taken, by its name or by its kind.
fn is_wanted(kind: &str, wanted: &[String]) -> bool {
    let kind = kind.split(';').next().unwrap_or_default().trim();
    wanted.iter().any(|wanted| match wanted.strip_suffix("/*") {
        Some(of) => kind.split_once('/').is_some_and(|(kind, _)| kind.eq_ignore_ascii_case(of)),
        None => kind.eq_ignore_ascii_case(wanted),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_part_goes_on_where_ours_ends_to_the_end_or_is_not_taken() {
        let fits =
            |value, length| content_range(value).is_some_and(|range| range.goes_on_from(5, length));
        assert!(fits("bytes 5-9/10", Some(5)));
        assert!(fits("bytes 5-9/10", None));
        for (bad, length) in [
            ("bytes 0-9/10", None),
            ("bytes 4-9/10", None),
            ("bytes 6-9/10", None),
            ("bytes 5-8/10", None),
            ("bytes 5-9/11", None),
            ("bytes 5-4/5", None),
            ("bytes 5-9/10", Some(6)),
            ("bytes */10", None),
            ("bytes 5-9/*", Some(5)),
            ("5-9/10", None),
            ("bytes 5-18446744073709551615/18446744073709551615", None),
            ("", None),
        ] {
            assert!(!fits(bad, length), "{bad} {length:?}");
        }
    }

    #[test]
    fn types_are_taken_by_name_or_kind() {
        let wanted = ["image/*".to_owned(), "Text/Plain".to_owned()];
        for good in ["image/png", "IMAGE/jpeg", "image/svg+xml; charset=utf-8", "text/plain;x"] {
            assert!(are_wanted(&[good], &wanted), "{good}");
        }
        for bad in [
            &["text/html"][..],
            &["imagex/png"],
            &[""],
            &["image"],
            &[],
            &["image/png", "text/html"],
        ] {
            assert!(!are_wanted(bad, &wanted), "{bad:?}");
        }
        assert!(are_wanted(&[], &[]) && are_wanted(&["text/html"], &[]));
    }

    #[test]
    fn a_budget_is_never_overdrawn() {
        let budget = Budget::new(10);
        assert!(budget.take(6) && !budget.take(5) && budget.take(4));
        budget.give(3);
        budget.take_what_is_left(5);
        assert!(!budget.take(1));
    }

    proptest! {
        #[test]
        fn a_part_that_is_taken_has_exactly_what_is_missing(
            first in 0_u64..20, last in 0_u64..20, total in prop::option::of(0_u64..20),
            ours in 0_u64..20, body in 0_u64..20,
        ) {
            let range = ContentRange { first, last, total };
            if range.goes_on_from(ours, Some(body)) {
                prop_assert_eq!(first, ours);
                prop_assert_eq!(ours + body, last + 1);
                prop_assert!(total.is_none_or(|total| ours + body == total));
            }
        }

        #[test]
        fn no_content_range_is_a_panic(value in "(bytes )?[0-9*/-]{0,50}|.{0,20}", ours: u64, body: u64) {
            if let Some(range) = content_range(&value) {
                range.goes_on_from(ours, Some(body));
            }
        }
    }
}
