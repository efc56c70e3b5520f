//! Mirrors: copies of the files of HTTP(S) servers, and the engine of `handout download`.
//!
//! A sync passes through [`listing`] (JSON to entries) → [`sync`] (downloads in parallel) →
//! [`download`] (one file: request, resume, verify) → [`target_dir`] (names, partial files) →
//! [`manifest`] (metadata of the files). [`config`] reads `[mirror.NAME]`; this file repeats the
//! syncs. Requests and retries belong to `http`; nothing here serves a file.

pub(crate) mod config;
pub(crate) mod download;
pub(crate) mod listing;
pub(crate) mod manifest;
pub(crate) mod sync;
pub(crate) mod target_dir;

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::fs::filename::escape;
use crate::http::retry;
use crate::mirror::config::Settings;
use crate::mirror::download::{Done, Outcome};
use crate::mirror::listing::{Entry, InvalidEntry};
use crate::mirror::sync::{Error, Observer, Summary};
use crate::runtime::EventLoop;
use crate::telemetry::event::{Change, Event, EventSender, Kind};
use crate::telemetry::mirror_stats::{FileOutcome, MirrorStats, SyncOutcome};
use crate::text::{counted, error_chain, tally};

/// The interval after the first failed sync, unless `every` is shorter. It doubles with each
/// further failure.
const FIRST_RETRY: Duration = Duration::from_secs(30);

/// Maximum `Retry-After` between two syncs, even if longer than `every`.
const MAX_RETRY_AFTER: Duration = Duration::from_hours(24);

/// Maximum number of file names in an event.
const MAX_NAMES: usize = 100;

/// The running mirrors, on a thread of their own: neither TLS nor digests delay a service.
#[derive(Debug, Default)]
pub(crate) struct Mirrors {
    event_loop: Option<EventLoop>,
    jobs: Vec<Job>,
    /// Finishes when all removed jobs have ended.
    ending: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Job {
    settings: Settings,
    stats: Arc<MirrorStats>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    started: usize,
    changed: usize,
    ended: usize,
    unchanged: usize,
}

impl Mirrors {
    /// Starts the thread before the first mirror.
    pub(crate) fn prepare(&mut self, wanted: &[Settings]) -> io::Result<()> {
        if !wanted.is_empty() && self.event_loop.is_none() {
            self.event_loop = Some(EventLoop::start("mirrors")?);
        }
        Ok(())
    }

    /// Starts, restarts and ends mirrors. Unchanged ones are not disturbed.
    pub(crate) fn apply_config(&mut self, wanted: &[Settings], events: &EventSender) {
        let Some(Changes { started, changed, ended, unchanged }) = self.update(wanted, events)
        else {
            return;
        };
        let counts = [
            (started, "started"),
            (changed, "changed"),
            (ended, "ended"),
            (unchanged, "unchanged"),
        ];
        tracing::info!(started, changed, ended, unchanged, "mirrors: {}", tally("mirror", &counts));
    }

    /// Returns `None` if there are no mirrors, and were none.
    fn update(&mut self, wanted: &[Settings], events: &EventSender) -> Option<Changes> {
        let handle = self.event_loop.as_ref()?.handle.clone();
        let mut changes = Changes::default();
        let mut kept = std::mem::take(&mut self.jobs);
        let mut removed: Vec<_> =
            kept.extract_if(.., |job| !wanted.contains(&job.settings)).collect();
        if removed.is_empty() && kept.is_empty() && wanted.is_empty() {
            return None;
        }
        for job in &removed {
            job.stop.cancel();
        }
        // A removed job may have the folder of any new one, so new ones wait for all of them.
        let all_ended = CancellationToken::new();
        let mut tasks: Vec<_> = self.ending.take().into_iter().collect();
        let mut stats = Vec::new();
        for Job { stats: removed, task, .. } in removed.drain(..) {
            stats.push(removed);
            tasks.push(task);
        }
        let guard = all_ended.clone().drop_guard();
        self.ending = Some(handle.spawn(async move {
            wait_for(tasks).await;
            drop(guard);
        }));
        for settings in wanted {
            if let Some(at) = kept.iter().position(|job| job.settings == *settings) {
                changes.unchanged += 1;
                self.jobs.push(kept.swap_remove(at));
                continue;
            }
            let previous = stats.iter().position(|stats| stats.name == settings.name);
            let stats = if let Some(at) = previous {
                changes.changed += 1;
                stats.swap_remove(at)
            } else {
                changes.started += 1;
                Arc::new(MirrorStats::new(Arc::clone(&settings.name)))
            };
            let (settings, stop) = (settings.clone(), CancellationToken::new());
            let (all_ended, events) = (all_ended.clone(), events.clone());
            let mirror = (settings.clone(), Arc::clone(&stats), stop.clone());
            let task = handle.spawn(async move {
                all_ended.cancelled().await;
                run_mirror(mirror, events).await;
            });
            self.jobs.push(Job { settings, stats, stop, task });
        }
        changes.ended = stats.len();
        Some(changes)
    }

    pub(crate) fn stats(&self) -> Vec<Arc<MirrorStats>> {
        self.jobs.iter().map(|job| Arc::clone(&job.stats)).collect()
    }

    /// Ends all syncs. Partial files are kept.
    pub(crate) fn stop(&self) {
        for job in &self.jobs {
            job.stop.cancel();
        }
    }

    /// Waits until all stopped mirrors have ended.
    pub(crate) async fn ended(&mut self) {
        let jobs = self.jobs.drain(..).map(|job| job.task);
        wait_for(self.ending.take().into_iter().chain(jobs)).await;
    }
}

async fn wait_for(tasks: impl IntoIterator<Item = JoinHandle<()>>) {
    for task in tasks {
        // The panic hook has logged a panic.
        let _ = task.await;
    }
}

/// Repeats the sync until the mirror is stopped.
async fn run_mirror(
    (settings, stats, stop): (Settings, Arc<MirrorStats>, CancellationToken),
    events: EventSender,
) {
    let Settings { name, every, .. } = &settings;
    let options = Arc::new(settings.sync.clone());
    let listing = Arc::new(tokio::sync::Mutex::new(None));
    let mut failures = 0_u32;
    while !stop.is_cancelled() {
        let started = Instant::now();
        let log = Arc::new(SyncLog { stats: Arc::clone(&stats), seen: Mutex::default() });
        let observer: Arc<dyn Observer> = Arc::clone(&log) as _;
        let (cancel, listing, options) = (stop.clone(), Arc::clone(&listing), Arc::clone(&options));
        // A panic ends only this sync.
        let sync = tokio::spawn(async move {
            sync::sync(&options, &observer, &mut *listing.lock().await, &cancel).await
        });
        let wait = match sync.await.map_err(Error::from).flatten() {
            Ok(summary) => {
                log.finish(&events, &summary, &settings);
                failures = if is_futile(&summary) { failures.saturating_add(1) } else { 0 };
                interval(failures, *every, None, fastrand::f64())
            }
            Err(Error::Listing { cause, .. }) if cause.is_interruption() => return,
            Err(error) => {
                failures = failures.saturating_add(1);
                let (mirror, text) = (&**name, error_chain(&error));
                let retry_after = match &error {
                    Error::Listing { cause, .. } => cause.retry_after(),
                    _ => None,
                };
                let wait = interval(failures, *every, retry_after, fastrand::f64());
                let next = wait.as_secs_f64();
                tracing::warn!(mirror, error = text, next, "mirror.{mirror}: failed: {text}");
                stats.record_sync(SyncOutcome::Failed, started.elapsed(), Some(text));
                wait
            }
        };
        stop.run_until_cancelled(tokio::time::sleep(wait)).await;
    }
}

/// Whether a sync had something to do and all of it failed.
fn is_futile(summary: &Summary) -> bool {
    summary.failed > 0 && summary.new + summary.changed + summary.unchanged == 0
}

/// Returns the time until the next sync after `failures` failed ones in a row. `random` is between
/// 0 and 1.
fn interval(
    failures: u32,
    every: Duration,
    retry_after: Option<Duration>,
    random: f64,
) -> Duration {
    let interval = match failures.checked_sub(1) {
        None => every,
        Some(failures) => retry::backoff(failures, FIRST_RETRY, every),
    };
    retry::around(interval, random).max(retry_after.unwrap_or_default().min(MAX_RETRY_AFTER))
}

/// Logs and counts the files of one sync.
struct SyncLog {
    stats: Arc<MirrorStats>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Names of new and changed files, at most [`MAX_NAMES`].
    updated: Vec<String>,
    first_failure: Option<String>,
}

impl SyncLog {
    /// Logs and counts the sync, and sends an event about new files.
    fn finish(&self, events: &EventSender, summary: &Summary, settings: &Settings) {
        let Summary { new, changed, unchanged, failed, removed, bytes, duration, interrupted } =
            *summary;
        let name = &*self.stats.name;
        let seen = std::mem::take(&mut *self.seen.lock());
        self.stats.received.fetch_add(bytes, Ordering::Relaxed);
        self.send_event(events, &seen.updated, summary, settings);
        let duration_s = duration.as_secs_f64();
        if interrupted {
            tracing::info!(
                mirror = name,
                new,
                changed,
                bytes,
                duration = duration_s,
                "mirror.{name}: interrupted: {new} new, {changed} changed"
            );
            return;
        }
        let failure = seen.first_failure.map(|first| match failed {
            1 => first,
            failed => format!("{} failed, first {first}", counted(failed, "file")),
        });
        let outcome = if failed == 0 { SyncOutcome::Complete } else { SyncOutcome::Partial };
        self.stats.record_sync(outcome, duration, failure);
        tracing::info!(
            mirror = name,
            new,
            changed,
            unchanged,
            failed,
            removed,
            bytes,
            duration = duration_s,
            "mirror.{name}: mirrored: {new} new, {changed} changed, {unchanged} unchanged, \
             {failed} failed, {removed} removed"
        );
    }

    fn send_event(
        &self,
        events: &EventSender,
        updated: &[String],
        summary: &Summary,
        settings: &Settings,
    ) {
        if updated.is_empty() {
            return;
        }
        let Summary { new, changed, .. } = summary;
        let names: Vec<_> = updated.iter().map(|name| escape(name)).collect();
        let more = match new + changed - updated.len() as u64 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let description = format!("{new} new, {changed} changed: {}{more}", names.join(", "));
        let files = updated.iter().map(|name| settings.folder().join(name)).collect();
        events.send(Event {
            kind: Kind::MirrorUpdated,
            subject: format!("mirror.{}", self.stats.name).into(),
            at: Timestamp::now(),
            change: Change::OneShot { description, files },
        });
    }

    fn fail(&self, name: &str, error: &dyn Display) {
        self.stats.files.add(FileOutcome::Failed);
        let mirror = &*self.stats.name;
        tracing::warn!(mirror, name, %error, "mirror.{mirror}: {name}: not mirrored: {error}");
        self.seen.lock().first_failure.get_or_insert_with(|| format!("{name}: {error}"));
    }
}

impl Observer for SyncLog {
    fn finished(&self, _: usize, entry: &Entry, result: &Result<Done, download::Error>) {
        let outcome = match result {
            Ok(Done { outcome: Outcome::Unchanged, .. }) => FileOutcome::Unchanged,
            Ok(Done { outcome: Outcome::New, .. }) => FileOutcome::New,
            Ok(Done { outcome: Outcome::Changed, .. }) => FileOutcome::Changed,
            Err(download::Error::Interrupted) => return,
            Err(error) => return self.fail(&escape(&entry.name), error),
        };
        self.stats.files.add(outcome);
        let mut seen = self.seen.lock();
        if outcome != FileOutcome::Unchanged && seen.updated.len() < MAX_NAMES {
            seen.updated.push(entry.name.clone());
        }
    }

    fn invalid(&self, entry: &InvalidEntry) {
        self.fail(&entry.label, &entry.error);
    }

    fn removed(&self, name: &str, result: io::Result<()>) {
        match result {
            Ok(()) => self.stats.files.add(FileOutcome::Removed),
            Err(error) => self.fail(&escape(name), &format_args!("cannot be removed: {error}")),
        }
    }

    fn warn(&self, problem: &str) {
        let mirror = &*self.stats.name;
        tracing::warn!(mirror, error = problem, "mirror.{mirror}: not saved completely: {problem}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Sources};

    #[test]
    fn retries_soon_and_honours_retry_after() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let wait = |failures, retry_after| interval(failures, minutes(10), retry_after, 0.5);
        let near = |a: Duration, b: Duration| a.abs_diff(b) < Duration::from_millis(1);
        assert!(near(wait(1, None), FIRST_RETRY));
        assert!(near(wait(2, None), 2 * FIRST_RETRY));
        assert!(near(wait(u32::MAX, None), minutes(10)));
        assert!(near(wait(1, Some(Duration::from_secs(1))), FIRST_RETRY));
        assert_eq!(wait(1, Some(minutes(60))), minutes(60), "longer than `every`");
        assert_eq!(wait(1, Some(Duration::MAX)), MAX_RETRY_AFTER);
    }

    #[test]
    fn a_sync_is_futile_if_all_of_it_failed() {
        let run = |failed, unchanged| Summary { unchanged, failed, ..Default::default() };
        assert!(is_futile(&run(1, 0)));
        assert!(!is_futile(&run(1, 1)));
        assert!(!is_futile(&run(0, 0)));
    }

    fn settings(name: &str, every: u64) -> Settings {
        // No server listens there.
        let text = format!(
            "[mirror.{name}]\nurls = [\"http://127.0.0.1:1/a\"]\ninto = \"{name}\"\nevery = \"{every}h\""
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("handout.toml");
        std::fs::write(&file, text).unwrap();
        let sources = Sources { file: Some(file), ..Sources::default() };
        Config::load(&sources).unwrap().mirrors.remove(0)
    }

    #[tokio::test]
    async fn a_reload_starts_changes_ends_and_keeps_mirrors() {
        let mut mirrors = Mirrors::default();
        let (a, b, c) = (settings("a", 1), settings("b", 1), settings("c", 1));
        // They fill no folder, because its parent was removed.
        let mut change = |wanted: &[Settings]| {
            mirrors.prepare(wanted).unwrap();
            let changes = mirrors.update(wanted, &EventSender::default()).unwrap_or_default();
            let Changes { started, changed, ended, unchanged } = changes;
            let names: Vec<_> =
                mirrors.stats().iter().map(|stats| stats.name.to_string()).collect();
            assert_eq!(names.len(), wanted.len());
            [started, changed, ended, unchanged]
        };
        assert_eq!(change(&[]), [0, 0, 0, 0]);
        assert_eq!(change(&[a.clone(), b.clone()]), [2, 0, 0, 0]);
        let other_b = Settings { every: Duration::from_secs(7), ..b.clone() };
        assert_eq!(change(&[c.clone(), other_b.clone(), a.clone()]), [1, 1, 0, 1]);
        assert_eq!(change(&[a.clone(), other_b, c]), [0, 0, 0, 3]);
        assert_eq!(change(&[a]), [0, 0, 2, 1]);
        assert_eq!(change(&[]), [0, 0, 1, 0]);
        mirrors.ended().await;
    }

    #[tokio::test]
    async fn new_jobs_wait_for_removed_ones() {
        let mut mirrors = Mirrors::default();
        let wanted = [settings("a", 1), settings("b", 1)];
        mirrors.prepare(&wanted).unwrap();
        let release = CancellationToken::new();
        let slow = release.clone();
        let slow = async move { slow.cancelled().await };
        mirrors.ending = Some(mirrors.event_loop.as_ref().unwrap().handle.spawn(slow));
        mirrors.apply_config(&wanted[..1], &EventSender::default());
        // Another reload before the removed job has ended.
        mirrors.apply_config(&wanted, &EventSender::default());
        let stats = mirrors.stats();
        // A sync fails, because the parent of its folder was removed.
        let failed = || stats.iter().filter(|stats| stats.last().failure.is_some()).count();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(failed(), 0);
        release.cancel();
        let all = async {
            while failed() < 2 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), all).await.unwrap();
        mirrors.stop();
        mirrors.ended().await;
    }
}
