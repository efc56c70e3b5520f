//! `handout download`: saves URLs or the entries of a listing, with the engine of mirrors.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use clap::CommandFactory;
use clap::error::ErrorKind;
use indicatif::{HumanBytes, MultiProgress, ProgressBar};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use tokio_util::sync::CancellationToken;

use super::output::{fail, print};
use super::runtime::{interrupted, run_client};
use crate::cli::args::{Cli, Download};
use crate::cli::progress::{draw_target, style};
use crate::client::fetch::within;
use crate::fs::atomic::OverwritePolicy;
use crate::fs::filename::escape;
use crate::http::egress;
use crate::http::egress::shown;
use crate::http::headers;
use crate::http::pointer::Pointer;
use crate::http::tls::CaFile;
use crate::mirror::download;
use crate::mirror::download::{Done, Outcome, Terms};
use crate::mirror::listing::{Entry, InvalidEntry, Pointers};
use crate::mirror::sync;
use crate::mirror::sync::{Error, Observer, Source, Summary, SyncOptions};

/// The longest listing that is taken.
const MAX_FILES: usize = 100_000;

/// The largest file of headers, in bytes.
const MAX_HEADERS: u64 = 64 << 10;

pub(super) fn run(arguments: &Download) -> ExitCode {
    let order = match order(arguments) {
        Ok(order) => order,
        Err(error) => error.exit(),
    };
    run_client(async |stop| {
        let downloaded = if arguments.dry_run {
            dry_run(&order, &stop).await
        } else {
            download(&order, arguments.quiet, &stop).await
        };
        match downloaded {
            _ if stop.is_cancelled() => interrupted(),
            Ok(downloaded) => {
                let printed = print(downloaded.lines.as_bytes());
                if downloaded.complete { printed } else { ExitCode::FAILURE }
            }
            Err(error) => fail(&error),
        }
    })
}

/// What was done.
#[derive(Debug)]
pub(crate) struct Downloaded {
    /// What is to be printed as the result.
    pub lines: String,
    /// Nothing failed.
    pub complete: bool,
}

/// What a command line orders.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn order(arguments: &Download) -> Result<SyncOptions, clap::Error> {
    let wrong = |problem: String| Cli::command().error(ErrorKind::ValueValidation, problem);
    let url = |text: &String| {
        egress::url(text).map_err(|error| {
            // There may be a password in it, or a secret in its query.
            let shown = text.split(['?', '#']).next().filter(|shown| !shown.contains('@'));
            wrong(format!("{}: {error}", escape(shown.unwrap_or("URL"))))
        })
    };
    let pointer = |name: &str, text: &String| {
        text.parse::<Pointer>().map_err(|error| wrong(format!("--{name} {text:?}: {error}")))
    };
    let urls = arguments.urls.iter().map(url).collect::<Result<Vec<_>, _>>()?;
    let source = match (&arguments.list, urls.as_slice()) {
        (None, _) => Source::Urls(urls),
        (Some(list), [url]) => {
            let optional = |name, text: &Option<String>| {
                text.as_ref().map(|text| pointer(name, text)).transpose()
            };
            let pointers = Pointers {
                list: pointer("list", list)?,
                url: optional("url", &arguments.url)?.unwrap_or_default(),
                filename: optional("filename", &arguments.filename)?,
                sha256: optional("sha256", &arguments.sha256)?,
            };
            Source::Listing { url: url.clone(), pointers }
        }
        (Some(_), _) => {
            return Err(wrong("--list needs one URL, which is that of the listing".to_owned()));
        }
    };
    let proxy = arguments.proxy.as_ref().map(url).transpose()?;
    Ok(SyncOptions {
        source,
        into: arguments.output.clone(),
        terms: Terms {
            max_file: arguments.max_size,
            max_file_key: "--max-size",
            max_duration: arguments.max_duration,
            retries: arguments.retries,
            content_types: Vec::new(),
            overwrite: OverwritePolicy::from_flags(arguments.force, arguments.update),
        },
        jobs: usize::try_from(arguments.jobs).unwrap_or(1),
        timeout: arguments.timeout,
        max_files: MAX_FILES,
        max_total: u64::MAX,
        delete: false,
        keep_state: arguments.update,
        owns_folder: false,
        hosts: Vec::new(),
        anybody: true,
        headers: read_headers(&arguments.headers).map_err(wrong)?,
        bearer_token: None,
        ca_file: CaFile::of_option(arguments.ca_file.clone()),
        proxy,
    })
}

/// Headers as `Name: value`, or `@FILE` for those of a file.
fn read_headers(arguments: &[String]) -> Result<HeaderMap, String> {
    let mut read = HeaderMap::new();
    for argument in arguments {
        let Some(file) = argument.strip_prefix('@') else {
            let (name, value) = header(argument)?;
            read.append(name, value);
            continue;
        };
        let cannot = |error: io::Error| format!("--header @{}: {error}", escape(file));
        let mut text = String::new();
        let opened = fs::File::open(file).map_err(cannot)?;
        opened.take(MAX_HEADERS).read_to_string(&mut text).map_err(cannot)?;
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            // The line itself may be a secret.
            let (name, value) = header(line).map_err(|_| {
                format!("--header @{}: line {}: expected NAME: VALUE", escape(file), number + 1)
            })?;
            read.append(name, value);
        }
    }
    Ok(read)
}

fn header(line: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) =
        line.split_once(':').ok_or("expected NAME: VALUE, as \"Accept: image/*\"")?;
    headers::read(name.trim(), value.trim())
}

/// Saves everything, and reports to standard error.
///
/// # Errors
/// If nothing could be done.
pub(crate) async fn download(
    order: &SyncOptions,
    quiet: bool,
    stop: &CancellationToken,
) -> Result<Downloaded, Error> {
    let progress = Arc::new(Progress::new(&order.into, quiet));
    let observer: Arc<dyn Observer> = Arc::clone(&progress) as _;
    let summary = sync::sync(order, &observer, &mut None, stop).await?;
    progress.summary(&summary);
    Ok(Downloaded { lines: String::new(), complete: summary.failed == 0 })
}

/// Says what would be asked for, and asks for nothing but the listing.
///
/// # Errors
/// If there is no listing.
pub(crate) async fn dry_run(
    order: &SyncOptions,
    stop: &CancellationToken,
) -> Result<Downloaded, Error> {
    let progress = Progress::new(&order.into, false);
    let (client, reach) = sync::prepare(order)?;
    let listing = sync::list(order, &client, &reach, None, stop).await?;
    let mut lines = String::new();
    let mut complete = true;
    for entry in listing.entries.iter() {
        match entry {
            Ok(entry) => {
                let place = within(&order.into, Path::new(&entry.name));
                let there = place.symlink_metadata().is_ok();
                let place = escape(&place.to_string_lossy());
                if there && order.terms.overwrite == OverwritePolicy::Refuse {
                    progress.fail(&place, &download::Error::Exists.to_string());
                    complete = false;
                    continue;
                }
                // Writing to a string does not fail.
                let _ = writeln!(lines, "{place} from {}", shown(&entry.url));
            }
            Err(invalid) => {
                progress.invalid(invalid);
                complete = false;
            }
        }
    }
    Ok(Downloaded { lines, complete })
}

/// Reports to standard error: bars on a terminal, and a line for each file.
struct Progress {
    folder: PathBuf,
    quiet: bool,
    bars: MultiProgress,
    under_way: Mutex<HashMap<usize, (Instant, ProgressBar)>>,
}

impl Progress {
    fn new(folder: &Path, quiet: bool) -> Self {
        let bars = MultiProgress::with_draw_target(draw_target(quiet));
        Self { folder: folder.to_owned(), quiet, bars, under_way: Mutex::default() }
    }

    /// Prints a line above the bars, if there are any.
    fn line(&self, line: &str) {
        self.bars.suspend(|| {
            // In one piece. If standard error is closed, the exit code has to do.
            let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
        });
    }

    fn fail(&self, what: &str, why: &str) {
        self.line(&format!("handout: {what}: {why}"));
    }

    fn summary(&self, summary: &Summary) {
        if !self.quiet {
            let Summary { new, changed, unchanged, failed, bytes, duration, .. } = summary;
            let (size, seconds) = (HumanBytes(*bytes), duration.as_secs_f64());
            self.line(&format!(
                "{new} new, {changed} changed, {unchanged} unchanged, {failed} failed, \
                 {size} in {seconds:.1} s"
            ));
        }
    }

    fn under_way(&self) -> std::sync::MutexGuard<'_, HashMap<usize, (Instant, ProgressBar)>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Progress {
    fn begin(&self, id: usize, entry: &Entry) {
        let bar = if self.bars.is_hidden() {
            ProgressBar::hidden()
        } else {
            let bar = self.bars.add(ProgressBar::no_length());
            bar.set_style(style("{msg} {spinner} {bytes} {bytes_per_sec}"));
            bar.set_message(escape(&entry.name));
            bar
        };
        self.under_way().insert(id, (Instant::now(), bar));
    }

    fn advance(&self, id: usize, length: u64, size: Option<u64>) {
        if self.bars.is_hidden() {
            return;
        }
        if let Some((_, bar)) = self.under_way().get(&id) {
            if let Some(size) = size
                && bar.length().is_none()
            {
                bar.set_length(size);
                bar.set_style(style(
                    "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
                ));
            }
            bar.set_position(length);
        }
    }

    fn end(&self, id: usize, entry: &Entry, result: &Result<Done, download::Error>) {
        let begun = self.under_way().remove(&id).map(|(begun, bar)| {
            bar.finish_and_clear();
            self.bars.remove(&bar);
            begun
        });
        let place = within(&self.folder, Path::new(&entry.name));
        let place = escape(&place.to_string_lossy());
        match result {
            Err(download::Error::Interrupted) => {}
            Err(error) => self.fail(&place, &error.to_string()),
            Ok(_) if self.quiet => {}
            Ok(Done { outcome, known }) => {
                let size = HumanBytes(known.size);
                let seconds = begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64());
                match outcome {
                    Outcome::Unchanged => self.line(&format!("{place}: {size}, unchanged")),
                    Outcome::New | Outcome::Changed => {
                        self.line(&format!("{place}: {size} in {seconds:.1} s"));
                    }
                }
            }
        }
    }

    fn invalid(&self, invalid: &InvalidEntry) {
        self.fail(&invalid.what, &invalid.fault.to_string());
    }

    fn removed(&self, _: &str, _: io::Result<()>) {}

    fn trouble(&self, problem: &str) {
        self.line(&format!("handout: {problem}"));
    }
}
