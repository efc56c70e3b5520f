//! Downloads one file: requests it if it changed, resumes, verifies and saves it.
//!
//! [`reply`] holds the headers, [`partial`] the received bytes.

mod error;
mod partial;
mod reply;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use reqwest::Response;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::fs::atomic::OverwritePolicy;
use crate::http::client::Client;
use crate::http::retry::Retries;
use crate::mirror::listing::Entry;
use crate::mirror::manifest::{self, CachedFile, Precondition, Validators, source_id};
use crate::mirror::target_dir::{DirEntryKind, LocalFile, TargetDir};
use partial::{BodyWriter, PartialMeta, Resume, Target, blocking, digest_of};
use reply::{check_headers, continues, request_headers};

pub(crate) use error::Error;
pub(crate) use reply::{date_of, failure, if_changed, validators_of};

/// Time for which received bytes stay in memory while the server is silent.
const MAX_BUFFERED: Duration = Duration::from_secs(1);

/// Bytes after which an attempt does not count as failed, even if it ends early.
const PROGRESS: u64 = 1 << 20;

/// Limits of a download, and the treatment of existing files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DownloadLimits {
    /// Maximum size of a file, in bytes.
    pub max_file: u64,
    /// The key or option that sets `max_file`.
    pub max_file_key: &'static str,
    /// Maximum time for a file, with all attempts.
    pub max_duration: Duration,
    pub retries: u32,
    /// Accepted media types, such as `image/png` or `image/*`. Empty accepts all.
    pub content_types: Vec<String>,
    pub overwrite: OverwritePolicy,
}

/// The outcome of a successful download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    New,
    /// The file replaced other content.
    Changed,
    Unchanged,
}

/// A file that is up to date.
#[derive(Debug)]
pub(crate) struct Done {
    pub outcome: Outcome,
    /// Its metadata for the manifest.
    pub known: CachedFile,
}

/// The remaining bytes of all files together.
#[derive(Debug)]
pub(crate) struct Budget(AtomicU64);

impl Budget {
    pub(crate) fn new(bytes: u64) -> Self {
        Self(AtomicU64::new(bytes))
    }

    /// Takes `bytes`, unless less remains.
    pub(crate) fn try_take(&self, bytes: u64) -> bool {
        let taken = |left: u64| left.checked_sub(bytes);
        self.0.try_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }

    /// Takes `bytes`, or the rest.
    pub(crate) fn charge(&self, bytes: u64) {
        self.0.update(Ordering::Relaxed, Ordering::Relaxed, |left| left.saturating_sub(bytes));
    }

    pub(crate) fn refund(&self, bytes: u64) {
        self.0.update(Ordering::Relaxed, Ordering::Relaxed, |left| left.saturating_add(bytes));
    }
}

/// The state that the downloads of one sync share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub client: Client,
    pub dir: Arc<TargetDir>,
    pub limits: DownloadLimits,
    pub budget: Budget,
    /// Number of received bytes of bodies.
    pub received: AtomicU64,
    /// Limits the files that are synced at the same time.
    pub finishing: Arc<Semaphore>,
    /// Interrupts all downloads when it is cancelled.
    pub cancel: CancellationToken,
}

/// A callback that gets the received and the announced length of a file, in bytes.
pub(crate) type Progress<'a> = &'a (dyn Fn(u64, Option<u64>) + Send + Sync);

/// Downloads one file. `permit` is released when everything is received.
pub(crate) async fn transfer(
    shared: &Arc<Shared>,
    entry: &Entry,
    known: Option<&CachedFile>,
    permit: OwnedSemaphorePermit,
    progress: Progress<'_>,
) -> Result<Done, Error> {
    let local = match shared.dir.stat(&entry.name)? {
        DirEntryKind::Other => return Err(Error::NotAFile),
        DirEntryKind::Missing => None,
        DirEntryKind::File(_) if shared.limits.overwrite == OverwritePolicy::Refuse => {
            return Err(Error::Exists);
        }
        DirEntryKind::File(local) => Some(local),
    };
    let source = source_id(&entry.url);
    let deadline = Instant::now() + shared.limits.max_duration;
    let permit = Some(permit);
    Transfer { shared, entry, local, source, deadline, permit, progress, taken: 0, furthest: 0 }
        .run(known)
        .await
}

struct Transfer<'a> {
    shared: &'a Arc<Shared>,
    entry: &'a Entry,
    local: Option<LocalFile>,
    source: String,
    deadline: Instant,
    permit: Option<OwnedSemaphorePermit>,
    progress: Progress<'a>,
    /// Bytes of the budget that this attempt has taken.
    taken: u64,
    /// Length that the best attempt reached, including the partial file of an earlier sync.
    furthest: u64,
}

impl Transfer<'_> {
    async fn run(&mut self, known: Option<&CachedFile>) -> Result<Done, Error> {
        let mut condition = Precondition::Always;
        if let (Some(local), OverwritePolicy::Update) = (self.local, self.shared.limits.overwrite) {
            match self.entry.sha256 {
                // The listing itself shows whether the file changed.
                Some(sha256) if self.has_digest(sha256).await? => {
                    let known = known.filter(|known| known.source == self.source);
                    let validators = known.map(|known| known.validators.clone());
                    return Ok(self.unchanged(local, validators.unwrap_or_default()));
                }
                Some(_) => {}
                None => condition = manifest::precondition(known, &local, &self.source),
            }
        }
        // The new file replaces the stored one.
        let stored = known.map_or(0, |known| known.size);
        self.shared.budget.refund(stored);
        let done = self.attempts(&condition).await;
        if !matches!(done, Ok(Done { outcome: Outcome::New | Outcome::Changed, .. })) {
            self.refund_taken();
            self.shared.budget.charge(stored);
        }
        done
    }

    /// Whether this or an earlier sync may have left a partial file.
    fn may_have_partial(&self) -> bool {
        self.furthest > 0 || self.shared.dir.had_partial(&self.entry.name)
    }

    fn take(&mut self, bytes: u64) -> Result<(), Error> {
        if !self.shared.budget.try_take(bytes) {
            return Err(Error::TotalTooLarge);
        }
        self.taken += bytes;
        Ok(())
    }

    fn refund_taken(&mut self) {
        self.shared.budget.refund(std::mem::take(&mut self.taken));
    }

    async fn attempts(&mut self, condition: &Precondition) -> Result<Done, Error> {
        let mut retries = Retries::new(self.shared.limits.retries);
        if self.may_have_partial() {
            self.furthest = self.shared.dir.partial_size(&self.entry.name);
        }
        loop {
            let before = self.furthest;
            let error = match self.attempt(condition).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if !error.is_temporary() {
                return Err(error);
            }
            if self.furthest - before >= PROGRESS {
                retries.reset();
            }
            let delay = retries.next_delay(error.retry_after());
            let Some(delay) = delay.filter(|delay| Instant::now() + *delay < self.deadline) else {
                return Err(error);
            };
            let waited = self.shared.cancel.run_until_cancelled(tokio::time::sleep(delay)).await;
            waited.ok_or(Error::Interrupted)?;
        }
    }

    async fn attempt(&mut self, condition: &Precondition) -> Result<Done, Error> {
        self.refund_taken();
        let (mut response, resume) = match self.request(condition).await? {
            Requested::Body(response, resume) => (response, resume),
            Requested::NotModified(done) => return Ok(done),
        };
        let mut validators = validators_of(&response);
        let meta = validators.strong(date_of(&response)).map(|validator| PartialMeta {
            source: self.source.clone(),
            validator,
            validators: validators.clone(),
            total: response.content_length(),
        });
        // A resumed file keeps the metadata of its beginning.
        let meta = resume.as_ref().map(|resume| resume.meta.clone()).or(meta);
        if let (Some(_), Some(meta)) = (&resume, &meta) {
            validators = validators.or(&meta.validators);
        }
        let (length, has_digest) =
            (resume.as_ref().map_or(0, |resume| resume.length), self.entry.sha256.is_some());
        let writer = match resume {
            Some(resume) => {
                Some(self.within(blocking(move || resume.into_writer(has_digest))).await?)
            }
            None => None,
        };
        let dir = Arc::clone(&self.shared.dir);
        let mut body = BodyWriter::new(dir, self.entry.name.clone(), writer, meta, has_digest);
        if let Err(error) = self.receive(&mut response, &mut body, length).await {
            body.abandon(&error).await;
            return Err(error);
        }
        let (outcome, local) = self.publish(body, validators.modified()).await?;
        Ok(Done { outcome, known: self.known(local, validators) })
    }

    /// Requests the file until a reply has a body or 304: the rest of the partial file, otherwise
    /// the whole file.
    async fn request(&self, mut condition: &Precondition) -> Result<Requested, Error> {
        let Self { shared, entry, .. } = self;
        let mut resume = None;
        if self.may_have_partial() {
            let max_file = shared.limits.max_file;
            resume = Resume::find(&shared.dir, &entry.name, &self.source, max_file)?;
        }
        loop {
            let headers = request_headers(condition, resume.as_ref());
            let mut response = self.within(shared.client.get(&entry.url, &headers)).await?;
            match (response.status().as_u16(), &resume) {
                (206, Some(partial)) if continues(&response, partial) => {
                    return Ok(Requested::Body(response, resume));
                }
                // The partial file is useless.
                (206 | 416, Some(_)) => resume = None,
                (200 | 203, _) => return Ok(Requested::Body(response, None)),
                (304, None) if *condition != Precondition::Always => {
                    if let Some(done) = self.not_modified(condition, &response)? {
                        return Ok(Requested::NotModified(done));
                    }
                    condition = &Precondition::Always;
                }
                (206, None) => return Err(Error::UnexpectedRange),
                _ => {
                    let error = failure(&response);
                    if let Some(resume) = resume.filter(|_| !error.is_temporary()) {
                        resume.remove(&shared.dir, &entry.name);
                    }
                    shared.client.drain(&mut response).await;
                    return Err(error);
                }
            }
            shared.client.drain(&mut response).await;
        }
    }

    /// Returns the outcome of a reply 304; `None` if the file must be requested without condition.
    fn not_modified(
        &self,
        condition: &Precondition,
        response: &Response,
    ) -> Result<Option<Done>, Error> {
        let validators = validators_of(response);
        match condition {
            Precondition::IfChanged(known) => {
                let local = self.local.ok_or(Error::UnexpectedRange)?;
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

    /// Runs `work` until the deadline or an interruption.
    async fn within<T, E>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T, Error>
    where
        Error: From<E>,
    {
        let work = timeout_at(self.deadline, work);
        match self.shared.cancel.run_until_cancelled(work).await {
            None => Err(Error::Interrupted),
            Some(Err(_)) => Err(Error::TimedOut(self.shared.limits.max_duration)),
            Some(Ok(done)) => Ok(done?),
        }
    }

    fn known(&self, local: LocalFile, validators: Validators) -> CachedFile {
        let LocalFile { size, modified } = local;
        CachedFile { source: self.source.clone(), validators, size, modified }
    }

    fn unchanged(&self, local: LocalFile, validators: Validators) -> Done {
        Done { outcome: Outcome::Unchanged, known: self.known(local, validators) }
    }

    async fn has_digest(&self, sha256: [u8; 32]) -> Result<bool, Error> {
        let (dir, name) = (Arc::clone(&self.shared.dir), self.entry.name.clone());
        let digest = self.within(blocking(move || digest_of(&mut dir.read(&name)?, u64::MAX)));
        // An unreadable file differs.
        match digest.await {
            Ok(digest) => Ok(<[u8; 32]>::from(sha2::Digest::finalize(digest)) == sha256),
            Err(Error::Write(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Receives the body, behind `length` bytes of a partial file.
    async fn receive(
        &mut self,
        response: &mut Response,
        body: &mut BodyWriter,
        mut length: u64,
    ) -> Result<(), Error> {
        let shared = self.shared;
        let DownloadLimits { max_file, max_file_key, content_types, .. } = &shared.limits;
        let promised = check_headers(response, content_types)?;
        let too_large = || Error::TooLarge { limit: *max_file, key: max_file_key };
        if promised.is_some_and(|promised| promised > *max_file) {
            return Err(too_large());
        }
        self.take(promised.unwrap_or(length))?;
        (self.progress)(length, promised);
        loop {
            let piece = {
                let mut next = std::pin::pin!(self.within(shared.client.piece(response)));
                if let Ok(piece) = timeout(MAX_BUFFERED, next.as_mut()).await {
                    piece?
                } else {
                    // The server is slow; a crash must not lose the received bytes.
                    body.write().await?;
                    next.await?
                }
            };
            let Some(piece) = piece else { break };
            let received = piece.len() as u64;
            shared.received.fetch_add(received, Ordering::Relaxed);
            length += received;
            self.furthest = self.furthest.max(length);
            if length > *max_file {
                return Err(too_large());
            }
            if let Some(more) = length.checked_sub(self.taken) {
                self.take(more)?;
            }
            (self.progress)(length, promised);
            body.append(&piece).await?;
        }
        match promised {
            Some(promised) if promised != length => {
                Err(Error::LengthMismatch { promised, received: length })
            }
            _ => Ok(()),
        }
    }

    /// Verifies and saves the complete body.
    async fn publish(
        &mut self,
        body: BodyWriter,
        modified: Option<SystemTime>,
    ) -> Result<(Outcome, LocalFile), Error> {
        let _finishing = Arc::clone(&self.shared.finishing).acquire_owned().await;
        // The next file is received while this one is written to the disk.
        self.permit = None;
        let (sha256, local) = (self.entry.sha256, self.local);
        let overwrite = self.shared.limits.overwrite;
        body.publish(Target { sha256, local, modified, overwrite }).await
    }
}

/// The reply to a request for a file.
#[expect(clippy::large_enum_variant, reason = "a download has one at a time")]
enum Requested {
    /// The whole file, or the rest of the partial one.
    Body(Response, Option<Resume>),
    NotModified(Done),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_exceeds_the_budget() {
        let budget = Budget::new(10);
        assert!(budget.try_take(6) && !budget.try_take(5) && budget.try_take(4));
        budget.refund(3);
        budget.charge(5);
        assert!(!budget.try_take(1));
    }
}
