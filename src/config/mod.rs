//! The whole configuration; the only module that knows every section.
//!
//! [`Config::load`] runs three stages: *parse* reads the tables of the file and the arguments
//! ([`arguments`]), *validate* turns them into settings ([`service`] and each module's own
//! section), both without I/O; [`probe`] resolves names, opens paths and reads secrets,
//! concurrently and within a time limit. Every fault is reported at once, with its line.

mod arguments;
mod gateway;
mod probe;
mod service;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::config::probe::ConfigText;
use crate::config::service::ServiceSpec;
use crate::config_reader::{
    Diagnostic, Diagnostics, Origin, Probe, Reported, Source, Table, values,
};
use crate::net::limits::Limits;
use crate::runtime;
use crate::services::{KINDS, METRICS};
use crate::telemetry::logging::LogSettings;

pub(crate) use gateway::{AlertSettings, MirrorSettings};
pub(crate) use service::Service;

/// The settings of the daemon.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub(crate) log: LogSettings,
    pub(crate) daemon: DaemonSettings,
    /// In the order of the file.
    pub(crate) services: Vec<Service>,
    pub(crate) mirrors: Vec<MirrorSettings>,
    pub(crate) alerts: AlertSettings,
}

/// The settings of `[daemon]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DaemonSettings {
    /// Maximum duration of a drain.
    pub grace: Duration,
}

impl Default for DaemonSettings {
    fn default() -> Self {
        Self { grace: Duration::from_secs(30) }
    }
}

impl DaemonSettings {
    fn read(mut table: Table<'_>) -> Result<Self, Reported> {
        let grace = table.text("grace", values::duration);
        table.finish();
        Ok(Self { grace: grace?.unwrap_or(Self::default().grace) })
    }
}

/// The sources of a configuration: a file, services from the command line, or both.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Path of the configuration file.
    pub file: Option<PathBuf>,
    /// Addresses of time services, from `--time`.
    pub time: Vec<String>,
    /// Addresses and paths of file services, from `--file`.
    pub files: Vec<(String, String)>,
}

/// A configuration that passed the first two stages, or the diagnostics of those.
pub(crate) struct Validated {
    /// The settings except for the services.
    config: Config,
    services: Vec<ServiceSpec>,
    /// The origins of the mirrors' folders.
    folders: Vec<Origin>,
    diagnostics: Vec<Diagnostic>,
    probes: Vec<Probe>,
    no_service: Diagnostic,
}

impl Config {
    /// Loads the configuration and blocks until all probes have ended.
    ///
    /// # Errors
    /// Every fault of the file and of the arguments.
    pub fn load(sources: &Sources) -> Result<Self, Diagnostics> {
        let validated = Validated::read(sources)?;
        block_on(validated.probe(&Arc::default(), &[]))
    }

    /// Like [`Self::load`], but requires a service or a mirror.
    pub(crate) fn load_to_serve(sources: &Sources) -> Result<Self, Diagnostics> {
        let validated = Validated::read(sources)?;
        block_on(validated.probe_to_serve(&Arc::default(), &[]))
    }
}

impl Validated {
    /// Reads the file, and parses and validates it with the arguments. Fails only if the file
    /// cannot be read; other diagnostics wait for those of the probe stage.
    pub(crate) fn read(sources: &Sources) -> Result<Self, Diagnostics> {
        let file = sources.file.as_deref().map(ConfigText::read).transpose()?;
        Ok(Self::parse(file.unwrap_or_default(), sources))
    }

    fn parse(file: ConfigText, sources: &Sources) -> Self {
        let ConfigText { name, text, base_dir } = file;
        let no_service = "no service; expected a table such as [time.clock] or [file.picture]";
        let no_service = Diagnostic::of_file(name.clone(), no_service);
        let source = Source::file(name, &text, base_dir);
        let entries = source.parse(&text);
        let mut root = Table::root(&source, &entries);

        // A section with a fault counts as missing for the rest.
        let log = root.table("log").map(LogSettings::read);
        let daemon = root.table("daemon").map(DaemonSettings::read);
        let limits = root.table("limits").map(|mut table| {
            let limits = Limits::read(&mut table, &Limits::default());
            table.finish();
            limits
        });
        let limits = limits.and_then(Result::ok).unwrap_or_default();
        let (mut mirrors, mut folders) = (Vec::new(), Vec::new());
        for (name, table) in root.tables("mirror") {
            let folder = table.origin("into");
            if let Ok(mirror) = read_mirror(name, table) {
                mirrors.push(mirror);
                folders.push(folder);
            }
        }
        let mut services = read_services(&mut root, &limits);
        let alerts = AlertSettings::read(&mut root);
        if let Some(table) = root.table(METRICS.name) {
            services.extend(ServiceSpec::read_metrics(&METRICS, table, &limits));
        }
        root.finish();
        let (mut diagnostics, mut probes) = source.into_parts();
        let (text, source) = arguments::document(sources);
        let entries = source.parse(&text);
        services.extend(read_services(&mut Table::root(&source, &entries), &limits));
        let of_arguments = source.into_parts();
        diagnostics.extend(of_arguments.0);
        probes.extend(of_arguments.1);
        let config = Config {
            log: log.and_then(Result::ok).unwrap_or_default(),
            daemon: daemon.and_then(Result::ok).unwrap_or_default(),
            services: Vec::new(),
            mirrors,
            alerts: alerts.unwrap_or_default(),
        };
        Self { config, services, folders, diagnostics, probes, no_service }
    }
}

/// Reads a part of a configuration file, and ignores the rest.
///
/// # Errors
/// Every fault of that part, or that the file is no TOML.
pub fn load_part<T: Send>(
    file: &Path,
    read: impl FnOnce(&mut Table<'_>) -> Result<T, Reported>,
) -> Result<T, Diagnostics> {
    let ConfigText { name, text, base_dir } = ConfigText::read(file)?;
    let source = Source::file(name, &text, base_dir);
    let value = read(&mut Table::root(&source, &source.parse(&text)));
    let (mut diagnostics, probes) = source.into_parts();
    block_on(async {
        let served = service::served_paths(&[]);
        let (_, faults) = probe::run(probes, &Arc::default(), &served, &Arc::default()).await;
        diagnostics.extend(faults);
        Ok(finish(value, diagnostics)?.expect("a reported fault has a diagnostic"))
    })
}

fn read_services(root: &mut Table<'_>, limits: &Limits) -> Vec<ServiceSpec> {
    let mut services = Vec::new();
    for kind in KINDS {
        for (name, table) in root.tables(kind.name) {
            services.extend(ServiceSpec::read_named(kind, name, table, limits));
        }
    }
    services
}

/// Returns `value` if there is no diagnostic.
fn finish<T>(value: T, mut diagnostics: Vec<Diagnostic>) -> Result<T, Diagnostics> {
    if diagnostics.is_empty() {
        return Ok(value);
    }
    diagnostics.sort();
    diagnostics.dedup();
    Err(Diagnostics(diagnostics))
}

/// Runs the last stage on a thread of its own, because this thread may already run an event loop.
fn block_on<T: Send>(
    stage: impl Future<Output = Result<T, Diagnostics>> + Send,
) -> Result<T, Diagnostics> {
    let no_thread = |error: io::Error| Diagnostic {
        is_transient: true,
        ..Diagnostic::of_file("configuration".to_owned(), format!("cannot be checked: {error}"))
    };
    let run = || runtime::event_loop().map_err(no_thread)?.block_on(stage);
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, run).map_err(no_thread)?;
        thread.join().expect("no stage panics")
    })
}

fn read_mirror(name: &str, table: Table<'_>) -> Result<MirrorSettings, Reported> {
    let checked = table.check_name(name);
    let settings = MirrorSettings::read(name, table);
    checked.and(settings)
}

/// Finds mirrors that fill the folder of another.
fn find_shared_folders(mirrors: &[MirrorSettings], origins: &[Origin]) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for (index, (mirror, origin)) in mirrors.iter().zip(origins).enumerate() {
        let other = mirrors.iter().take(index).find(|other| other.folder() == mirror.folder());
        diagnostics.extend(other.map(|other| {
            let name = other.name();
            origin.diagnostic(format_args!(
                "the folder of mirror.{name}; expected a folder of its own"
            ))
        }));
    }
    diagnostics
}
