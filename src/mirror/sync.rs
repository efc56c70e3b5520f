//! Syncs a folder once: requests the listing, downloads its files in parallel, removes unlisted
//! files, and saves the manifest.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet, spawn_blocking};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::fs::created_dirs::CreatedDirs;
use crate::http::client::{BuildError, Client, Options};
use crate::http::egress::{EgressPolicy, Host, shown};
use crate::http::tls;
use crate::http::tls::{CaFile, CaFileError};
use crate::mirror::download::{self, Budget, Done, DownloadLimits, Outcome, Shared, transfer};
use crate::mirror::listing::{self, Entry, InvalidEntry, Listing, ListingRequest, Pointers};
use crate::mirror::manifest::{self, CachedFile, Manifest};
use crate::mirror::target_dir::{DirEntryKind, Folding, TargetDir};
use crate::secret::Secret;

/// Maximum number of files that are synced to the disk at the same time.
const MAX_FINISHING: usize = 16;

/// Age at which partial files of other commands are removed.
const MAX_PARTIAL_AGE: Duration = Duration::from_hours(7 * 24);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Listing { url: Url, pointers: Pointers },
    Urls(Vec<Url>),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SyncOptions {
    pub source: Source,
    pub folder: PathBuf,
    pub limits: DownloadLimits,
    /// Maximum number of parallel downloads.
    pub jobs: usize,
    /// Maximum time without a byte from the server.
    pub timeout: Duration,
    /// Maximum number of entries of the listing.
    pub max_files: usize,
    /// Maximum total size of the files, in bytes.
    pub max_total: u64,
    /// Whether files that left the listing are removed.
    pub delete: bool,
    pub keep_manifest: bool,
    /// Whether no other process downloads into the folder, so unused partial files are removed at
    /// once.
    pub owns_folder: bool,
    /// Hosts that may be asked in addition to the source.
    pub hosts: Vec<Host>,
    /// Whether every host with public addresses may be asked.
    pub allow_any_public: bool,
    /// Sent only to the origin of the source.
    pub headers: HeaderMap,
    pub bearer_token: Option<PathBuf>,
    pub ca_file: CaFile,
    pub proxy: Option<Url>,
}

/// The reason why nothing was mirrored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("bearer-token-file {}: {problem}", .path.display())]
    BearerToken { path: PathBuf, problem: String },
    #[error(transparent)]
    CaFile(#[from] CaFileError),
    #[error(transparent)]
    Client(#[from] BuildError),
    #[error("{}: {cause}", .path.display())]
    Folder { path: PathBuf, cause: io::Error },
    #[error("{url}: {cause}")]
    Listing { url: String, cause: listing::Error },
    #[error("a fault of handout itself: {0}")]
    Panicked(#[from] JoinError),
}

/// The outcome of a sync.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    pub new: u64,
    pub changed: u64,
    pub unchanged: u64,
    pub failed: u64,
    pub removed: u64,
    /// Received bytes of files.
    pub bytes: u64,
    pub duration: Duration,
    pub interrupted: bool,
}

/// Receives the progress of a sync. `id` is the position of the entry in the listing.
pub(crate) trait Observer: Send + Sync {
    fn started(&self, _id: usize, _entry: &Entry) {}
    /// `length` bytes of the file are here.
    fn advanced(&self, _id: usize, _length: u64, _size: Option<u64>) {}
    fn finished(&self, id: usize, entry: &Entry, result: &Result<Done, download::Error>);
    fn invalid(&self, entry: &InvalidEntry);
    fn removed(&self, _name: &str, _result: io::Result<()>) {}
    /// Reports a problem that affects no file.
    fn warn(&self, problem: &str);
}

/// Reads a bearer token from its file, as the value of `Authorization`.
pub(crate) fn read_token(path: &Path) -> Result<HeaderValue, String> {
    let token = Secret::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    if !token.reveal().bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("expected one line of visible characters".to_owned());
    }
    let value = HeaderValue::try_from(format!("Bearer {}", token.reveal()));
    let mut value = value.expect("visible ASCII characters are valid in a header");
    value.set_sensitive(true);
    Ok(value)
}

/// Builds the HTTP client; blocks while it reads the CA certificates and the token.
fn build_client(options: &SyncOptions) -> Result<(Client, Arc<EgressPolicy>), Error> {
    let sources = match &options.source {
        Source::Listing { url, .. } => std::slice::from_ref(url),
        Source::Urls(urls) => urls,
    };
    let egress_policy =
        Arc::new(EgressPolicy::new(sources, &options.hosts, options.allow_any_public));
    let mut headers = options.headers.clone();
    if let Some(path) = &options.bearer_token {
        let token = read_token(path)
            .map_err(|problem| Error::BearerToken { path: path.clone(), problem })?;
        headers.insert(AUTHORIZATION, token);
    }
    let client_options = Options {
        tls: tls::client_config(&options.ca_file)?,
        proxy: options.proxy.clone(),
        headers,
        sources: sources.to_vec(),
        timeout: Some(options.timeout),
        connections: options.jobs,
    };
    Ok((Client::new(client_options, Arc::clone(&egress_policy))?, egress_policy))
}

/// Returns the files of the source. Reuses `cached` if the server answers 304.
pub(crate) async fn list(
    options: &SyncOptions,
    cached: Option<Listing>,
    cancel: &CancellationToken,
) -> Result<(Client, Listing), Error> {
    let cloned = options.clone();
    let (client, egress_policy) = spawn_blocking(move || build_client(&cloned)).await??;
    let (url, pointers) = match &options.source {
        Source::Urls(urls) => return Ok((client, Listing::of_urls(urls))),
        Source::Listing { url, pointers } => (url, pointers),
    };
    let DownloadLimits { retries, max_duration, .. } = options.limits;
    let max_entries = options.max_files;
    let request = ListingRequest {
        client: &client,
        egress_policy: &egress_policy,
        url,
        pointers,
        retries,
        max_entries,
    };
    let listing =
        match cancel.run_until_cancelled(timeout(max_duration, request.send(cached))).await {
            None => Err(download::Error::Interrupted.into()),
            Some(Err(_)) => Err(download::Error::TimedOut(max_duration).into()),
            Some(Ok(received)) => received,
        };
    let listing = listing.map_err(|cause| Error::Listing { url: shown(url), cause })?;
    Ok((client, listing))
}

/// Syncs the folder and reports each file to `observer`. Partial files are kept when `cancel` ends
/// the sync. `cached` is the listing of the sync before, and is replaced.
pub(crate) async fn sync(
    options: &SyncOptions,
    observer: &Arc<dyn Observer>,
    cached: &mut Option<Listing>,
    cancel: &CancellationToken,
) -> Result<Summary, Error> {
    let started = Instant::now();
    let (client, listing) = list(options, cached.take(), cancel).await?;
    let listing = cached.insert(listing);
    let names = listing.names().map(str::to_owned).collect();
    let (folder, keep_manifest) = (options.folder.clone(), options.keep_manifest);
    let target = spawn_blocking(move || open_target(&folder, keep_manifest, names)).await?;
    let target = target.map_err(|cause| Error::Folder { path: options.folder.clone(), cause })?;
    listing::reject_duplicates(&mut listing.entries, |name| target.folding.fold(name));
    let mut sync = SyncRun {
        shared: Arc::new(Shared {
            client,
            dir: Arc::new(target.dir),
            limits: options.limits.clone(),
            budget: Budget::new(options.max_total),
            received: AtomicU64::new(0),
            finishing: Arc::new(Semaphore::new(MAX_FINISHING)),
            cancel: cancel.clone(),
        }),
        options,
        observer,
        manifest: target.manifest,
        names: target.names,
        summary: Summary::default(),
    };
    sync.reserve_stored();
    sync.download_all(&listing.entries).await?;
    sync.summary.interrupted = cancel.is_cancelled();
    // An entry without a name may be that of any file.
    if options.delete && !sync.summary.interrupted && listing.is_fully_named() {
        sync.remove_unlisted(target.folding);
    }
    if sync.summary.new > 0 {
        target.created.keep();
    }
    sync.finish(started).await
}

struct Target {
    dir: TargetDir,
    manifest: Option<Manifest>,
    created: CreatedDirs,
    folding: Folding,
    /// All file names of the listing.
    names: HashSet<String>,
}

fn open_target(path: &Path, keep_manifest: bool, names: HashSet<String>) -> io::Result<Target> {
    let created = CreatedDirs::create(path)?;
    let dir = TargetDir::open(path)?;
    let has_manifest = keep_manifest || !matches!(dir.stat(manifest::FILE)?, DirEntryKind::Missing);
    let manifest = has_manifest.then(|| Manifest::load(&dir));
    let stored = manifest.iter().flat_map(|manifest| manifest.files.keys());
    let all: HashSet<_> = names.iter().chain(stored).collect();
    // The file system is probed only if it matters.
    let folded: HashSet<_> = all.iter().map(|name| Folding::ALL.fold(name)).collect();
    let folding = if folded.len() < all.len() { dir.folding()? } else { Folding::default() };
    Ok(Target { dir, manifest, created, folding, names })
}

struct SyncRun<'a> {
    options: &'a SyncOptions,
    shared: Arc<Shared>,
    observer: &'a Arc<dyn Observer>,
    manifest: Option<Manifest>,
    /// All file names of the listing.
    names: HashSet<String>,
    summary: Summary,
}

impl SyncRun<'_> {
    /// Charges `max-total` for the stored files, except unlisted ones that `delete` removes.
    fn reserve_stored(&self) {
        let files = self.manifest.iter().flat_map(|manifest| &manifest.files);
        let kept = files.filter(|(name, _)| !self.options.delete || self.names.contains(*name));
        self.shared.budget.charge(kept.map(|(_, file)| file.size).sum());
    }

    async fn download_all(&mut self, entries: &listing::Entries) -> Result<(), Error> {
        let jobs = Arc::new(Semaphore::new(self.options.jobs));
        let mut downloads = JoinSet::new();
        for (id, entry) in entries.iter().enumerate() {
            let entry = match entry {
                Ok(entry) => entry.clone(),
                Err(invalid) => {
                    self.summary.failed += 1;
                    self.observer.invalid(invalid);
                    continue;
                }
            };
            let permit = Arc::clone(&jobs).acquire_owned();
            let Some(permit) = self.shared.cancel.run_until_cancelled(permit).await else { break };
            let permit = permit.expect("the semaphore is never closed");
            while let Some(finished) = downloads.try_join_next() {
                self.record(finished?);
            }
            let manifest = self.manifest.as_ref();
            let cached = manifest.and_then(|manifest| manifest.files.get(&entry.name)).cloned();
            let (shared, observer) = (Arc::clone(&self.shared), Arc::clone(self.observer));
            downloads.spawn(async move {
                observer.started(id, &entry);
                let progress = |length, size| observer.advanced(id, length, size);
                let result = transfer(&shared, &entry, cached.as_ref(), permit, &progress).await;
                observer.finished(id, &entry, &result);
                (entry.name, result.ok())
            });
        }
        while let Some(finished) = downloads.join_next().await {
            self.record(finished?);
        }
        Ok(())
    }

    fn record(&mut self, (name, done): (String, Option<Done>)) {
        let Some(Done { outcome, known }) = done else {
            self.summary.failed += 1;
            return;
        };
        match outcome {
            Outcome::New => self.summary.new += 1,
            Outcome::Changed => self.summary.changed += 1,
            Outcome::Unchanged => self.summary.unchanged += 1,
        }
        if let Some(manifest) = &mut self.manifest {
            manifest.files.insert(name, known);
        }
    }

    fn remove_unlisted(&mut self, folding: Folding) {
        let Some(manifest) = &mut self.manifest else { return };
        let folded: HashSet<_> = self.names.iter().map(|name| folding.fold(name)).collect();
        let is_listed = |name: &String, _: &mut CachedFile| !self.names.contains(name);
        let unlisted: Vec<_> = manifest.files.extract_if(.., is_listed).collect();
        for (name, file) in unlisted {
            // The same file may have another spelling in the listing now.
            if folded.contains(&folding.fold(&name)) {
                continue;
            }
            let result = match self.shared.dir.stat(&name) {
                Ok(DirEntryKind::File(local)) if file.matches(&local) => {
                    self.shared.dir.unlink(&name)
                }
                // Another program has replaced or removed it.
                Ok(_) => continue,
                Err(error) => Err(error),
            };
            if result.is_ok() {
                self.summary.removed += 1;
            } else {
                self.summary.failed += 1;
                manifest.files.insert(name.clone(), file);
            }
            self.observer.removed(&name, result);
        }
    }

    /// Syncs the folder, saves the manifest and removes unused partial files.
    async fn finish(self, started: Instant) -> Result<Summary, Error> {
        let Self { options, shared, observer, manifest, names, mut summary } = self;
        let age = if options.owns_folder { Duration::ZERO } else { MAX_PARTIAL_AGE };
        let has_changed = summary.new + summary.changed + summary.removed > 0;
        let dir = Arc::clone(&shared.dir);
        let finished = spawn_blocking(move || -> io::Result<()> {
            if has_changed {
                dir.sync();
            }
            if let Some(mut manifest) = manifest {
                let exists = |name: &str| !matches!(dir.stat(name), Ok(DirEntryKind::Missing));
                manifest.files.retain(|name, _| names.contains(name) || exists(name));
                manifest.save_if_changed(&dir).map_err(io::Error::other)?;
            }
            dir.clean(names.iter().map(String::as_str), age)
        });
        if let Err(error) = finished.await? {
            observer.warn(&format!("{}: {error}", options.folder.display()));
        }
        summary.bytes = shared.received.load(Ordering::Relaxed);
        summary.duration = started.elapsed();
        Ok(summary)
    }
}
