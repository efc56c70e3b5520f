//! `[mirror.NAME]`: its table, and the jobs of the daemon that keep a folder as a listing has it.
//!
//! All mirrors run on a thread and an event loop of their own: neither TLS nor digests delay a
//! service. What goes wrong with one, be it a panic, is logged and counted, and tried again.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, HeaderMap};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config_reader::{Question, Reported, Table, values, values_of};

use crate::daemon::mirrors::{Counts, File, Run, Summary};
use crate::fs::atomic::OverwritePolicy;
use crate::fs::filename::escape;
use crate::http::ca_certs;
use crate::http::egress;
use crate::http::egress::Host;
use crate::http::headers;
use crate::http::pointer::Pointer;
use crate::http::retry;
use crate::http::tls::CaFile;
use crate::mirror::download;
use crate::mirror::download::{Done, Outcome, Terms};
use crate::mirror::listing::{Entry, InvalidEntry, Pointers};
use crate::mirror::sync;
use crate::mirror::sync::{Error, Observer, Source, SyncOptions};
use crate::runtime::EventLoop;
use crate::secret;
use crate::telemetry::event::{Change, Event, EventSender, Kind};
use crate::text::counted;
use crate::text::error_chain;

/// How many downloads there may be at one time.
const MAX_JOBS: u32 = 256;

/// How long after the first failure of a whole run the next begins, unless it would anyway.
const SOON: Duration = Duration::from_secs(30);

/// How long a server may have us wait between two runs, also if that is longer than `every`.
const MAX_ASKED_FOR: Duration = Duration::from_hours(24);

/// How many files that a run has brought are told by their names.
const MAX_TOLD: usize = 100;

/// The checked settings of a mirror.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    name: Arc<str>,
    every: Duration,
    order: SyncOptions,
}

impl Settings {
    /// Reads `[mirror.NAME]`, and reports what is wrong to the table.
    ///
    /// # Errors
    /// If something is.
    pub(crate) fn read(name: &str, mut table: Table<'_>) -> Result<Self, Reported> {
        let source = read_source(&mut table);
        let into = read_folder(&mut table);
        let every = table.text_or("every", "10m", |text| match values::duration(text) {
            Ok(every) if every < Duration::from_secs(1) => {
                Err("expected at least \"1s\"".to_owned())
            }
            every => every,
        });
        let jobs = table.integer_or("jobs", 8, 1..=MAX_JOBS);
        let timeout = table.text_or("timeout", "30s", values::duration);
        let max_duration = table.text_or("max-duration", "1h", values::duration);
        let retries = table.integer_or("retries", 4, 0..=100);
        let max_file = table.text_or("max-file", "64MiB", values::size);
        let max_total = table.text_or("max-total", "1GiB", values::size);
        let max_files = table.integer_or("max-files", 1000, 1..=1_000_000);
        let delete = table.boolean_or("delete", false);
        let content_types = table.texts("content-types", media_type);
        let hosts = table.texts("hosts", Host::parse);
        let headers = table.entries("header", |name, value| {
            let (name, value) = headers::read(name, value)?;
            if name == AUTHORIZATION {
                return Err("a secret does not belong here: bearer-token-file".to_owned());
            }
            Ok((name, value))
        });
        let bearer_token = secret::checked_path(&mut table, "bearer-token-file", |path| {
            sync::read_token(path).map(drop)
        });
        let ca_file = table.checked_path("ca-file", ca_certs::read);
        let proxy = url(&mut table, "proxy");
        table.finish();
        let source = source?;
        Ok(Self {
            name: name.into(),
            every: every?,
            order: SyncOptions {
                source,
                into: into?,
                terms: Terms {
                    max_file: max_file?,
                    max_file_key: "max-file",
                    max_duration: max_duration?,
                    retries: retries?,
                    content_types: values_of(content_types?),
                    overwrite: OverwritePolicy::Update,
                },
                jobs: usize::try_from(jobs?).unwrap_or(1),
                timeout: timeout?,
                max_files: usize::try_from(max_files?).unwrap_or(usize::MAX),
                max_total: max_total?,
                delete: delete?,
                keep_state: true,
                owns_folder: true,
                hosts: values_of(hosts?),
                anybody: false,
                headers: headers?.into_iter().collect::<HeaderMap>(),
                bearer_token: bearer_token?,
                ca_file: CaFile::of_key(ca_file?),
                proxy: proxy?,
            },
        })
    }

    /// Its name, without its kind.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The folder that it fills.
    pub(crate) fn folder(&self) -> &Path {
        &self.order.into
    }

    /// Replaces the folder by its canonical path.
    pub(crate) fn set_folder(&mut self, canonical: PathBuf) {
        self.order.into = canonical;
    }
}

fn read_folder(table: &mut Table<'_>) -> Result<PathBuf, Reported> {
    let text = table.required("into", "the folder for the files", |text| match text {
        "" => Err("expected a folder"),
        text => Ok(text.to_owned()),
    })?;
    let path = table.base_dir().join(&text);
    table.probe("into", &text, Question::Folder(path.clone()));
    Ok(path)
}

/// A URL, which is not repeated in the fault, as there may be a password in it.
fn url(table: &mut Table<'_>, key: &'static str) -> Result<Option<Url>, Reported> {
    let text = table.text(key, |text| Ok::<_, String>(text.to_owned()))?;
    text.map(|text| egress::url(&text).map_err(|error| table.report(key, error))).transpose()
}

fn read_source(table: &mut Table<'_>) -> Result<Source, Reported> {
    let source = url(table, "source");
    let urls = table.texts("urls", |text| Ok::<_, String>(text.to_owned()));
    let pointer = |text: &str| text.parse::<Pointer>();
    let list = table.text("list", pointer);
    let url = table.text("url", pointer);
    let filename = table.text("filename", pointer);
    let sha256 = table.text("sha256", pointer);
    let urls = urls?.map(|urls| {
        let urls = urls.into_iter().map(|text| {
            egress::url(&text.value).map_err(|error| table.report_at(&text.origin, error))
        });
        urls.collect::<Vec<_>>().into_iter().collect::<Result<Vec<_>, _>>()
    });
    let (source, urls) = (source?, urls.transpose()?);
    let (list, url, filename, sha256) = (list?, url?, filename?, sha256?);
    match (source, urls) {
        (Some(source), None) => {
            let missing = || {
                let expected = "missing; expected the JSON pointer to the URL in an entry of the \
                                listing, as \"/url\", or \"\" if an entry is the URL itself";
                table.report("url", expected)
            };
            let url = url.ok_or_else(missing)?;
            let pointers = Pointers { list: list.unwrap_or_default(), url, filename, sha256 };
            Ok(Source::Listing { url: source, pointers })
        }
        (None, Some(urls)) if urls.is_empty() => {
            Err(table.report("urls", "empty; expected at least one URL"))
        }
        (None, Some(urls)) => {
            let pointers =
                [("list", list), ("url", url), ("filename", filename), ("sha256", sha256)];
            match pointers.iter().find(|(_, pointer)| pointer.is_some()) {
                None => Ok(Source::Urls(urls)),
                Some((key, _)) => Err(table.report(key, "is for a listing, which `source` names")),
            }
        }
        (Some(_), Some(_)) => Err(table.report("urls", "expected either `source` or `urls`")),
        (None, None) => {
            Err(table.report_here("expected `source`, the URL of a JSON listing, or `urls`"))
        }
    }
}

fn media_type(text: &str) -> Result<String, String> {
    let token = |part: &str| {
        let special = |c: char| matches!(c, '!' | '#' | '$' | '&' | '^' | '_' | '.' | '+' | '-');
        !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || special(c))
    };
    match text.split_once('/') {
        Some((kind, of)) if token(kind) && (of == "*" || token(of)) => Ok(text.to_owned()),
        _ => Err("expected a media type, as \"image/png\" or \"image/*\"".to_owned()),
    }
}

/// All mirrors that run.
#[derive(Debug, Default)]
pub(crate) struct Mirrors {
    /// None before there is a mirror.
    event_loop: Option<EventLoop>,
    jobs: Vec<Job>,
    /// Waits for the jobs that have been ended, and may not have noticed yet.
    ending: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Job {
    settings: Settings,
    counts: Arc<Counts>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Mirrors {
    /// Starts the thread if it is the first time that there is something to do for it.
    ///
    /// # Errors
    /// If it cannot be had.
    pub(crate) fn prepare(&mut self, wanted: &[Settings]) -> io::Result<()> {
        if wanted.is_empty() || self.event_loop.is_some() {
            return Ok(());
        }
        self.event_loop = Some(EventLoop::start("mirrors")?);
        Ok(())
    }

    /// Becomes what is wanted: a mirror that stays as it is goes on undisturbed. Those that are new or
    /// other ones tell `events` what they bring.
    pub(crate) fn change(&mut self, wanted: &[Settings], events: &EventSender) -> Summary {
        let mut summary = Summary::default();
        let mut before = std::mem::take(&mut self.jobs);
        let mut gone = Vec::new();
        let mut ending: Vec<_> = self.ending.take().into_iter().collect();
        // Those first that end, as another may be about to fill their folder.
        for job in before.extract_if(.., |job| !wanted.contains(&job.settings)) {
            job.stop.cancel();
            gone.push((job.settings.name, job.counts));
            ending.push(job.task);
        }
        let all_ended = CancellationToken::new();
        self.ending = self.event_loop.as_ref().map(|event_loop| {
            let told = all_ended.clone();
            event_loop.handle.spawn(async move {
                wait_for(ending).await;
                told.cancel();
            })
        });
        for settings in wanted {
            if let Some(at) = before.iter().position(|job| job.settings == *settings) {
                summary.kept += 1;
                self.jobs.push(before.swap_remove(at));
                continue;
            }
            let Some(event_loop) = &self.event_loop else { continue };
            let same = gone.iter().position(|(name, _)| *name == settings.name);
            let counts = if let Some((_, counts)) = same.map(|at| gone.swap_remove(at)) {
                summary.changed += 1;
                counts
            } else {
                summary.started += 1;
                Arc::new(Counts::new(Arc::clone(&settings.name)))
            };
            let stop = CancellationToken::new();
            let told = (Arc::clone(&counts), events.clone());
            // Each waits for all that end, as any of them may have its folder: they do so quickly.
            let keep = keep(settings.clone(), told, stop.clone(), all_ended.clone());
            let task = event_loop.handle.spawn(keep);
            self.jobs.push(Job { settings: settings.clone(), counts, stop, task });
        }
        summary.ended = gone.len();
        summary
    }

    /// What the mirrors count.
    pub(crate) fn counts(&self) -> Vec<Arc<Counts>> {
        self.jobs.iter().map(|job| Arc::clone(&job.counts)).collect()
    }

    /// Ends all runs. What they have received is kept for the next.
    pub(crate) fn stop(&self) {
        for job in &self.jobs {
            job.stop.cancel();
        }
    }

    /// Waits until all that were told to end have done so.
    pub(crate) async fn ended(&mut self) {
        let jobs = std::mem::take(&mut self.jobs).into_iter().map(|job| job.task);
        wait_for(self.ending.take().into_iter().chain(jobs)).await;
    }
}

async fn wait_for(tasks: impl IntoIterator<Item = JoinHandle<()>>) {
    for task in tasks {
        // A panic of theirs has been logged.
        let _ = task.await;
    }
}

/// Keeps a folder as its source has it, from when it may begin until it is stopped.
async fn keep(
    settings: Settings,
    (counts, events): (Arc<Counts>, EventSender),
    stop: CancellationToken,
    may_begin: CancellationToken,
) {
    may_begin.cancelled().await;
    let Settings { name, every, order } = settings;
    let folder = order.into.clone();
    let mut failures = 0_u32;
    let listing = Arc::new(tokio::sync::Mutex::new(None));
    while !stop.is_cancelled() {
        let begun = Instant::now();
        let log = Arc::new(Log {
            name: Arc::clone(&name),
            counts: Arc::clone(&counts),
            brought: Mutex::default(),
            failed: Mutex::default(),
        });
        let observer: Arc<dyn Observer> = Arc::clone(&log) as _;
        let (order, end, listing) = (order.clone(), stop.clone(), Arc::clone(&listing));
        // Apart, so that a fault of the program ends a run and not the mirror.
        let run = tokio::spawn(async move {
            sync::sync(&order, &observer, &mut *listing.lock().await, &end).await
        });
        let next = match run.await.map_err(Error::from).and_then(|run| run) {
            Ok(summary) => {
                conclude(&name, &counts, &summary);
                log.report(&events, &summary, &folder);
                if is_vain(&summary) {
                    failures = failures.saturating_add(1);
                    wait_after(failures, every, None, fastrand::f64())
                } else {
                    failures = 0;
                    retry::around(every, fastrand::f64())
                }
            }
            Err(error) if error.is_interruption() => return,
            Err(error) => {
                counts.end_run(Run::Failed, begun.elapsed());
                failures = failures.saturating_add(1);
                let wait = wait_after(failures, every, error.asked_for(), fastrand::f64());
                let (mirror, next) = (&*name, wait.as_secs_f64());
                let error = error_chain(&error);
                counts.set_trouble(Some(error.clone()));
                tracing::warn!(mirror, error, next, "mirror.{mirror}: failed: {error}");
                wait
            }
        };
        stop.run_until_cancelled(tokio::time::sleep(next)).await;
    }
}

/// Whether there was something to do in a run, and nothing of it could be done.
fn is_vain(summary: &sync::Summary) -> bool {
    summary.failed > 0 && summary.new + summary.changed + summary.unchanged == 0
}

/// How long to wait after so many runs in a row have failed: what is broken is looked at again soon,
/// and then less and less often, but not before the server wants it. `random` is between 0 and 1.
fn wait_after(
    failures: u32,
    every: Duration,
    asked_for: Option<Duration>,
    random: f64,
) -> Duration {
    let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
    let own = retry::around(SOON.saturating_mul(doubled).min(every), random);
    own.max(asked_for.unwrap_or_default().min(MAX_ASKED_FOR))
}

/// Logs and counts what a run has done.
fn conclude(name: &str, counts: &Counts, summary: &sync::Summary) {
    let sync::Summary { new, changed, unchanged, failed, removed, bytes, duration, interrupted } =
        *summary;
    counts.add_received(bytes);
    let seconds = duration.as_secs_f64();
    // One that the operator has ended says nothing about the source.
    if interrupted {
        tracing::info!(
            mirror = name,
            new,
            changed,
            bytes,
            duration = seconds,
            "mirror.{name}: interrupted: {new} new, {changed} changed"
        );
        return;
    }
    counts.end_run(if failed == 0 { Run::Complete } else { Run::Partial }, duration);
    tracing::info!(
        mirror = name,
        new,
        changed,
        unchanged,
        failed,
        removed,
        bytes,
        duration = seconds,
        "mirror.{name}: mirrored: {new} new, {changed} changed, {unchanged} unchanged, {failed} failed, \
         {removed} removed"
    );
}

/// Logs and counts what fails, and counts what does not.
struct Log {
    name: Arc<str>,
    counts: Arc<Counts>,
    /// The names of files that are new or have changed, as many as are told.
    brought: Mutex<Vec<String>>,
    /// What failed first.
    failed: Mutex<Option<String>>,
}

impl Log {
    /// Notes what has failed in a run, and tells which files it has brought.
    fn report(&self, events: &EventSender, summary: &sync::Summary, folder: &Path) {
        let first = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        if !summary.interrupted {
            let trouble = |first| match summary.failed {
                1 => first,
                failed => format!("{} failed, first {first}", counted(failed, "file")),
            };
            self.counts.set_trouble(first.filter(|_| summary.failed > 0).map(trouble));
        }
        let brought =
            std::mem::take(&mut *self.brought.lock().unwrap_or_else(PoisonError::into_inner));
        if brought.is_empty() {
            return;
        }
        let sync::Summary { new, changed, .. } = summary;
        let names: Vec<_> = brought.iter().map(|name| escape(name)).collect();
        let more = new + changed - u64::try_from(brought.len()).unwrap_or_default();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let what = format!("{new} new, {changed} changed: {}{more}", names.join(", "));
        let files = brought.iter().map(|name| folder.join(name)).collect();
        events.send(Event {
            kind: Kind::MirrorUpdated,
            subject: format!("mirror.{}", self.name).into(),
            at: Timestamp::now(),
            change: Change::OneShot { description: what, files },
        });
    }

    fn fail(&self, name: &str, error: &dyn Display) {
        self.counts.files.add(File::Failed);
        let mirror = &*self.name;
        tracing::warn!(mirror, name, %error, "mirror.{mirror}: {name}: not mirrored: {error}");
        let mut first = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| format!("{name}: {error}"));
    }
}

impl Observer for Log {
    fn begin(&self, _: usize, _: &Entry) {}

    fn advance(&self, _: usize, _: u64, _: Option<u64>) {}

    fn end(&self, _: usize, entry: &Entry, result: &Result<Done, download::Error>) {
        match result {
            Ok(done) => {
                self.counts.files.add(match done.outcome {
                    Outcome::New => File::New,
                    Outcome::Changed => File::Changed,
                    Outcome::Unchanged => File::Unchanged,
                });
                if done.outcome != Outcome::Unchanged {
                    let mut brought = self.brought.lock().unwrap_or_else(PoisonError::into_inner);
                    if brought.len() < MAX_TOLD {
                        brought.push(entry.name.clone());
                    }
                }
            }
            Err(download::Error::Interrupted) => {}
            Err(error) => self.fail(&escape(&entry.name), error),
        }
    }

    fn invalid(&self, invalid: &InvalidEntry) {
        self.fail(&invalid.what, &invalid.fault);
    }

    fn removed(&self, name: &str, result: io::Result<()>) {
        match result {
            Ok(()) => self.counts.files.add(File::Removed),
            Err(error) => self.fail(&escape(name), &format_args!("cannot be removed: {error}")),
        }
    }

    fn trouble(&self, problem: &str) {
        let mirror = &*self.name;
        tracing::warn!(mirror, error = problem, "mirror.{mirror}: not all is kept: {problem}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::{Config, Sources};

    const SHIPPED: &str = include_str!("../../config/handout.toml");

    /// What a configuration says, or its faults.
    fn load(text: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in [("handout.toml", text), ("token", "hush\n"), ("picture.jpg", "x")] {
            fs::write(folder.path().join(name), content).unwrap();
        }
        let file = Some(folder.path().join("handout.toml"));
        Config::load(&Sources { file, ..Sources::default() }).map_err(|faults| faults.to_string())
    }

    /// The mirror of the shipped configuration, without what comments it out.
    fn shipped() -> Vec<&'static str> {
        let lines = SHIPPED
            .lines()
            .skip_while(|line| *line != "[metrics]" && !line.starts_with("#[mirror."))
            .take_while(|line| !line.starts_with("# A channel"));
        let lines = lines.filter_map(|line| line.strip_prefix('#'));
        // It names roots, which are not here.
        lines.filter(|line| !line.starts_with(' ') && !line.starts_with("ca-file")).collect()
    }

    #[test]
    fn the_shipped_configuration_says_every_key_and_the_defaults() {
        let lines = shipped();
        let said = load(&lines.join("\n")).unwrap();
        let without_default = ["source", "url", "filename", "sha256", "into", "bearer", "proxy"];
        let bare: Vec<_> = lines
            .iter()
            .filter(|line| {
                line.starts_with('[') || without_default.iter().any(|key| line.starts_with(key))
            })
            .copied()
            .collect();
        let Ok(bare) = load(&bare.join("\n")) else { panic!("{bare:?}") };
        let (said, bare) = (&said.mirrors[0], &bare.mirrors[0]);
        assert_eq!(said.every, bare.every);
        assert_eq!(said.order.terms, bare.order.terms);
        // Every key that is known is said.
        let fault = load(&format!("{}\njunk = 1", lines.join("\n"))).unwrap_err();
        assert!(fault.contains("mirror.pictures.junk: unknown key"), "{fault}");
        let (_, known) = fault.split_once("expected one of ").unwrap();
        for key in known.split(", ").map(str::trim) {
            assert!(SHIPPED.contains(&format!("\n#{key} ")) || key == "urls", "{key}");
        }
    }

    #[test]
    fn a_secret_is_neither_in_the_faults_nor_in_what_is_printed() {
        let mirror = "[mirror.a]\ninto = \"x\"\nurl = \"\"\n";
        for wrong in [
            "source = \"https://me:hush@example.org/\"",
            "urls = [\"https://me:hush@example.org/\"]",
            "source = \"https://a/\"\nproxy = \"http://me:hush@example.org/\"",
            "source = \"https://a/\"\nheader = { X = \"hush\\n\" }",
            "source = \"https://a/\"\nheader = { Authorization = \"hush\" }",
        ] {
            let faults = load(&format!("{mirror}{wrong}")).unwrap_err();
            assert!(!faults.contains("hush"), "{faults}");
        }
        let config = load(&format!(
            "{mirror}source = \"https://a/\"\nheader = {{ X = \"hush\" }}\nbearer-token-file = \"token\""
        ));
        assert!(!format!("{:?}", config.unwrap()).contains("hush"));
    }

    #[test]
    fn a_media_type_has_two_parts() {
        for good in ["image/png", "image/*", "application/vnd.a+json"] {
            assert!(media_type(good).is_ok(), "{good}");
        }
        for bad in ["", "image", "image/", "/png", "*/*", "image/png; q=1", "a/b/c"] {
            assert!(media_type(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_fails_is_tried_again_soon_and_when_the_server_wants_it() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let wait = |failures, asked_for| wait_after(failures, minutes(10), asked_for, 0.5);
        let near = |a: Duration, b: Duration| a.abs_diff(b) < Duration::from_millis(1);
        assert!(near(wait(1, None), SOON));
        assert!(near(wait(2, None), 2 * SOON));
        assert!(near(wait(u32::MAX, None), minutes(10)));
        assert!(near(wait(1, Some(Duration::from_secs(1))), SOON));
        assert_eq!(wait(1, Some(minutes(60))), minutes(60), "longer than `every`");
        assert_eq!(wait(1, Some(Duration::MAX)), MAX_ASKED_FOR);
    }

    #[test]
    fn a_run_is_vain_if_all_of_it_failed() {
        let run = |failed, unchanged| sync::Summary { unchanged, failed, ..Default::default() };
        assert!(is_vain(&run(1, 0)));
        assert!(!is_vain(&run(1, 1)));
        assert!(!is_vain(&run(0, 0)));
    }

    fn settings(name: &str, every: u64) -> Settings {
        // Nobody answers there.
        let text = format!(
            "[mirror.{name}]\nurls = [\"http://127.0.0.1:1/a\"]\ninto = \"{name}\"\nevery = \"{every}h\""
        );
        load(&text).unwrap().mirrors.remove(0)
    }

    #[tokio::test]
    async fn a_change_starts_changes_ends_and_leaves_alone() {
        let mut mirrors = Mirrors::default();
        let (a, b, c) = (settings("a", 1), settings("b", 1), settings("c", 1));
        // They fill no folder here, as the one that they name is gone.
        let mut change = |wanted: &[Settings]| {
            mirrors.prepare(wanted).unwrap();
            let summary = mirrors.change(wanted, &EventSender::default());
            let Summary { started, changed, ended, kept } = summary;
            let names: Vec<_> =
                mirrors.counts().iter().map(|counts| counts.name.to_string()).collect();
            assert_eq!(names.len(), wanted.len());
            [started, changed, ended, kept]
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
    async fn every_new_job_waits_for_all_that_end() {
        let mut mirrors = Mirrors::default();
        let wanted = [settings("a", 1), settings("b", 1)];
        mirrors.prepare(&wanted).unwrap();
        let release = CancellationToken::new();
        let slow = release.clone();
        let slow = async move { slow.cancelled().await };
        mirrors.ending = Some(mirrors.event_loop.as_ref().unwrap().handle.spawn(slow));
        mirrors.change(&wanted[..1], &EventSender::default());
        // One more change while it still ends.
        mirrors.change(&wanted, &EventSender::default());
        let counts = mirrors.counts();
        // A run cannot have its folder, as the one above is gone.
        let begun = || counts.iter().filter(|counts| counts.trouble().is_some()).count();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(begun(), 0);
        release.cancel();
        let all = async {
            while begun() < 2 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), all).await.unwrap();
        mirrors.stop();
        mirrors.ended().await;
    }
}
