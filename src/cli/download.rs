//! `handout download`: saves URLs or the entries of a listing, with the engine of mirrors.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::CommandFactory;
use clap::error::ErrorKind;
use indicatif::{HumanBytes, MultiProgress, ProgressBar};
use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use tokio_util::sync::CancellationToken;

use super::output::{fail, print};
use super::runtime::{interrupted, run_client};
use crate::cli::args::{Cli, Download};
use crate::cli::progress::{draw_target, style};
use crate::client::fetch::destination::join_folder;
use crate::fs::atomic::OverwritePolicy;
use crate::fs::filename::escape;
use crate::http::egress::{self, shown};
use crate::http::tls::CaFile;
use crate::http::{headers, pointer};
use crate::mirror::download::{self, Done, DownloadLimits, Outcome};
use crate::mirror::listing::{Entry, InvalidEntry, Pointers};
use crate::mirror::sync::{self, Error, Observer, Source, Summary, SyncOptions};

/// Maximum number of entries of a listing.
const MAX_FILES: usize = 100_000;

/// Maximum size of a file of headers, in bytes.
const MAX_HEADERS: u64 = 64 << 10;

pub(super) fn run(arguments: &Download) -> ExitCode {
    let options = match sync_options(arguments) {
        Ok(options) => options,
        Err(problem) => Cli::command().error(ErrorKind::ValueValidation, problem).exit(),
    };
    run_client(async |stop| {
        let progress = Arc::new(Progress::new(&options.folder, arguments.quiet));
        let result = if arguments.dry_run {
            dry_run(&options, &progress, &stop).await
        } else {
            let observer: Arc<dyn Observer> = Arc::clone(&progress) as _;
            let summary = sync::sync(&options, &observer, &mut None, &stop).await;
            summary.map(|summary| progress.finish(&summary))
        };
        match result {
            _ if stop.is_cancelled() => interrupted(),
            Ok(code) => code,
            Err(error) => fail(&error),
        }
    })
}

fn sync_options(arguments: &Download) -> Result<SyncOptions, String> {
    Ok(SyncOptions {
        source: source(arguments)?,
        folder: arguments.output.clone(),
        limits: DownloadLimits {
            max_file: arguments.max_size,
            max_file_key: "--max-size",
            max_duration: arguments.max_duration,
            retries: arguments.retries,
            content_types: Vec::new(),
            overwrite: OverwritePolicy::from_flags(arguments.force, arguments.update),
        },
        jobs: usize::try_from(arguments.jobs).expect("the argument is limited"),
        timeout: arguments.timeout,
        max_files: MAX_FILES,
        max_total: u64::MAX,
        delete: false,
        keep_manifest: arguments.update,
        owns_folder: false,
        hosts: Vec::new(),
        allow_any_public: true,
        headers: read_headers(&arguments.headers)?,
        bearer_token: None,
        ca_file: CaFile::of_option(arguments.ca_file.clone()),
        proxy: arguments.proxy.as_deref().map(parse_url).transpose()?,
    })
}

fn source(arguments: &Download) -> Result<Source, String> {
    let urls: Vec<_> = arguments.urls.iter().map(|url| parse_url(url)).collect::<Result<_, _>>()?;
    let Some(list) = &arguments.list else { return Ok(Source::Urls(urls)) };
    let [url] = urls.as_slice() else {
        return Err("--list needs exactly one URL, that of the listing".to_owned());
    };
    let parse = |name: &str, text: &String| {
        pointer::parse(text).map_err(|error| format!("--{name} {text:?}: {error}"))
    };
    let parse_optional =
        |name, text: &Option<String>| text.as_ref().map(|text| parse(name, text)).transpose();
    let pointers = Pointers {
        list: parse("list", list)?,
        url: parse_optional("url", &arguments.url)?.unwrap_or_default(),
        filename: parse_optional("filename", &arguments.filename)?,
        sha256: parse_optional("sha256", &arguments.sha256)?,
    };
    Ok(Source::Listing { url: url.clone(), pointers })
}

fn parse_url(text: &str) -> Result<Url, String> {
    egress::url(text).map_err(|error| {
        // The rest may be secret: a password or a query.
        let shown = text.split(['?', '#']).next().filter(|shown| !shown.contains('@'));
        format!("{}: {error}", escape(shown.unwrap_or("URL")))
    })
}

/// Reads headers as `Name: value`, or `@FILE` for those in a file.
fn read_headers(arguments: &[String]) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for argument in arguments {
        let Some(file) = argument.strip_prefix('@') else {
            headers.extend([parse_header(argument)?]);
            continue;
        };
        let file_error = |error: io::Error| format!("--header @{}: {error}", escape(file));
        let mut text = String::new();
        let opened = fs::File::open(file).map_err(file_error)?;
        opened.take(MAX_HEADERS).read_to_string(&mut text).map_err(file_error)?;
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            // The line itself may be a secret.
            let header = parse_header(line).map_err(|_| {
                format!("--header @{}: line {}: expected NAME: VALUE", escape(file), index + 1)
            })?;
            headers.extend([header]);
        }
    }
    Ok(headers)
}

fn parse_header(line: &str) -> Result<(HeaderName, HeaderValue), String> {
    let header = line.split_once(':').ok_or("expected NAME: VALUE, such as \"Accept: image/*\"")?;
    headers::parse(header.0.trim(), header.1.trim())
}

/// Prints the files that would be requested. Requests only the listing.
async fn dry_run(
    options: &SyncOptions,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<ExitCode, Error> {
    let (_, listing) = sync::list(options, None, stop).await?;
    let mut lines = String::new();
    let mut is_complete = true;
    for entry in &listing.entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(invalid) => {
                is_complete = false;
                progress.invalid(invalid);
                continue;
            }
        };
        let path = join_folder(&options.folder, Path::new(&entry.name));
        let exists = path.symlink_metadata().is_ok();
        let path = escape(&path.to_string_lossy());
        if exists && options.limits.overwrite == OverwritePolicy::Refuse {
            is_complete = false;
            progress.warn(&format!("{path}: {}", download::Error::Exists));
        } else {
            lines.push_str(&format!("{path} from {}\n", shown(&entry.url)));
        }
    }
    let printed = print(lines.as_bytes());
    Ok(if is_complete { printed } else { ExitCode::FAILURE })
}

/// Reports to standard error: bars on a terminal, and a line for each file.
struct Progress {
    folder: PathBuf,
    quiet: bool,
    bars: MultiProgress,
    running: Mutex<HashMap<usize, (Instant, ProgressBar)>>,
}

impl Progress {
    fn new(folder: &Path, quiet: bool) -> Self {
        let bars = MultiProgress::with_draw_target(draw_target(quiet));
        Self { folder: folder.to_owned(), quiet, bars, running: Mutex::default() }
    }

    /// Prints a line above the bars.
    fn line(&self, line: &str) {
        self.bars.suspend(|| {
            // One write, so that lines of several processes do not mix.
            let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
        });
    }

    fn finish(&self, summary: &Summary) -> ExitCode {
        let Summary { new, changed, unchanged, failed, bytes, duration, .. } = summary;
        if !self.quiet {
            let (size, seconds) = (HumanBytes(*bytes), duration.as_secs_f64());
            self.line(&format!(
                "{new} new, {changed} changed, {unchanged} unchanged, {failed} failed, \
                 {size} in {seconds:.1} s"
            ));
        }
        if *failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

impl Observer for Progress {
    fn started(&self, id: usize, entry: &Entry) {
        let mut bar = ProgressBar::hidden();
        if !self.bars.is_hidden() {
            bar = self.bars.add(ProgressBar::no_length());
            bar.set_style(style("{msg} {spinner} {bytes} {bytes_per_sec}"));
            bar.set_message(escape(&entry.name));
        }
        self.running.lock().insert(id, (Instant::now(), bar));
    }

    fn advanced(&self, id: usize, length: u64, size: Option<u64>) {
        let running = self.running.lock();
        let Some((_, bar)) = running.get(&id).filter(|(_, bar)| !bar.is_hidden()) else { return };
        if let Some(size) = size.filter(|_| bar.length().is_none()) {
            bar.set_length(size);
            bar.set_style(style(
                "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
            ));
        }
        bar.set_position(length);
    }

    fn finished(&self, id: usize, entry: &Entry, result: &Result<Done, download::Error>) {
        let (started, bar) = self.running.lock().remove(&id).expect("the download has started");
        bar.finish_and_clear();
        self.bars.remove(&bar);
        let path = join_folder(&self.folder, Path::new(&entry.name));
        let path = escape(&path.to_string_lossy());
        match result {
            Err(download::Error::Interrupted) => {}
            Err(error) => self.warn(&format!("{path}: {error}")),
            Ok(_) if self.quiet => {}
            Ok(Done { outcome: Outcome::Unchanged, known }) => {
                self.line(&format!("{path}: {}, unchanged", HumanBytes(known.size)));
            }
            Ok(Done { known, .. }) => {
                let (size, seconds) = (HumanBytes(known.size), started.elapsed().as_secs_f64());
                self.line(&format!("{path}: {size} in {seconds:.1} s"));
            }
        }
    }

    fn invalid(&self, entry: &InvalidEntry) {
        self.warn(&format!("{}: {}", entry.label, entry.error));
    }

    fn warn(&self, problem: &str) {
        self.line(&format!("handout: {problem}"));
    }
}
