//! The configuration: from a file and arguments to checked values, or to every fault at once.
//!
//! Behind this module nothing is a string that should be an address, a duration or a zone.
//! Reading touches nothing: files are opened to see that they can be, and closed again.

use std::fmt::Display;
use std::fs;
use std::io::{self, Read};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::daemon::health;
use crate::daemon::mirrors;
use crate::net::connection::Deadlines;
use crate::net::limits::{Access, DatagramLimits, Limits, network};
use crate::services;
use crate::services::{KINDS, Kind, METRICS, Settings};
use crate::telemetry::logging;

use crate::config_reader::diagnostic::{Fault, Faults, Place};
use crate::config_reader::table::{Located, Noted, Source, Table};
use crate::config_reader::values::{Endpoint, Listen, duration};

/// The largest file that is taken for a configuration.
const MAX_FILE: u64 = 1 << 20;

/// How many addresses all services together may listen on; far more than anybody has.
const MAX_ADDRESSES: usize = 1024;

/// The longest name of a service.
const MAX_NAME: usize = 64;

/// A whole configuration, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `[log]`
    pub log: Log,
    /// `[daemon]`
    pub daemon: Daemon,
    /// Every service, in the order of the file.
    pub services: Vec<Service>,
    /// Every mirror.
    pub mirrors: Vec<mirrors::Settings>,
    /// How the operator is told. There is a service, a mirror or a channel.
    pub alerts: health::Settings,
}

/// How the daemon logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// A level or a filter that tracing-subscriber understands.
    pub level: String,
    /// The form of the lines.
    pub format: LogFormat,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// The journal's own protocol where standard error is the journal, else text.
    Auto,
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
    /// The journal's own protocol.
    Journald,
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "journald" => Ok(Self::Journald),
            _ => Err("expected auto, text, json or journald"),
        }
    }
}

/// How the daemon as a whole behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Daemon {
    /// How long connections may finish after the order to stop.
    pub grace: Duration,
}

/// One service.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// Its kind and name, as `time.clock`.
    pub name: Arc<str>,
    /// Where it listens; at least one.
    pub listen: Vec<Listen>,
    /// What it may take.
    pub limits: Limits,
    /// What it serves.
    pub settings: Settings,
}

/// What a service may need to know to read its table.
#[derive(Debug)]
pub struct Context<'a> {
    /// The folder that relative paths are relative to.
    pub folder: &'a Path,
    /// The folders that mirrors fill, and create if they are not there.
    pub mirrored: &'a [PathBuf],
    /// What is served already.
    pub running: &'a [Settings],
}

/// What is to be configured: a file, services from the command line, or both.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The configuration file.
    pub file: Option<PathBuf>,
    /// Where to tell the time, from `--time`.
    pub time: Vec<String>,
    /// Where to hand out which file, from `--file`.
    pub files: Vec<(String, String)>,
    /// What is served already: a path of it whose file system does not answer is taken for what it
    /// was.
    pub running: Vec<Settings>,
}

/// Services with the places that said where they listen.
type Found<'a> = Vec<(Service, Vec<Located<'a, Listen>>)>;

impl Config {
    /// Reads and checks everything.
    ///
    /// # Errors
    /// Every fault of the file and of the arguments.
    pub fn load(sources: &Sources) -> Result<Self, Faults> {
        let (name, text, mut faults) = match sources.file.as_deref().map(read_file) {
            None => (String::new(), String::new(), Vec::new()),
            Some(Ok((name, text))) => (name, text, Vec::new()),
            Some(Err(fault)) => return Err(Faults(vec![fault])),
        };
        let source = Source::file(name.clone(), &text);
        let folder = folder_of(sources.file.as_deref());
        let (root, errors) = DeTable::parse_recoverable(&text);
        for error in &errors {
            not_toml(&source, error);
        }
        let mut root = Table::root(&source, root.get_ref());
        let log = root.table("log").map_or_else(|| Ok(Log::default()), Log::read);
        let daemon = root.table("daemon").map_or_else(|| Ok(Daemon::default()), Daemon::read);
        let limits = match root.table("limits") {
            None => Ok(Limits::default()),
            Some(mut table) => {
                let limits = read_limits(&mut table, &Limits::default());
                table.finish();
                limits
            }
        };
        // A fault there is noted; the rest is checked as if it had not been said.
        let limits_or_default = limits.unwrap_or_default();
        let mut found: Found<'_> = Vec::new();
        let mut named = 0;
        // First, as services may hand out what they bring.
        let mut mirrors = Vec::new();
        let running = &sources.running;
        let context = Context { folder: &folder, mirrored: &[], running };
        for (name, table) in root.tables("mirror") {
            named += 1;
            mirrors.extend(read_mirror(name, table, &context, &mirrors).ok());
        }
        let mirrored: Vec<_> = mirrors.iter().map(|mirror| mirror.folder().to_owned()).collect();
        let context = Context { folder: &folder, mirrored: &mirrored, running };
        for kind in KINDS {
            for (name, table) in root.tables(kind.name) {
                named += 1;
                found.extend(read_named(kind, name, table, &context, &limits_or_default).ok());
            }
        }
        let alerts = health::Settings::read(&mut root, &context);
        named += alerts.as_ref().map_or(0, health::Settings::channels);
        let metrics = root.table(METRICS.name).map(|table| {
            let limits = metrics_limits(&limits_or_default);
            read_service(&METRICS, METRICS.name.into(), table, &context, &limits)
        });
        found.extend(metrics.and_then(Result::ok));
        root.finish();

        let arguments = Arguments::new(sources);
        for (number, argument) in arguments.0.iter().enumerate() {
            named += 1;
            found.extend(argument.read(number, &limits_or_default, running).ok());
        }
        note_conflicts(&found);

        let services: Vec<_> = found.into_iter().map(|(service, _)| service).collect();
        faults.extend(source.into_faults());
        faults.extend(arguments.into_faults());
        if named == 0 && faults.is_empty() {
            faults.push(no_service(name));
        }
        match (log, daemon, alerts) {
            (Ok(log), Ok(daemon), Ok(alerts)) if faults.is_empty() => {
                Ok(Self { log, daemon, services, mirrors, alerts })
            }
            _ => Err(Faults(faults)),
        }
    }

    /// The same for a daemon, which has to have something to do.
    ///
    /// # Errors
    /// Every fault, or that there is neither a service nor a mirror.
    pub fn load_to_serve(sources: &Sources) -> Result<Self, Faults> {
        let config = Self::load(sources)?;
        if config.services.is_empty() && config.mirrors.is_empty() {
            let file = sources.file.as_deref().map(|path| path.display().to_string());
            return Err(Faults(vec![no_service(file.unwrap_or_default())]));
        }
        Ok(config)
    }
}

fn no_service(file: String) -> Fault {
    let problem = "no service; expected a table such as [time.clock] or [file.picture]";
    Fault { place: Place::File(file), key: String::new(), problem: problem.to_owned() }
}

/// Reads a part of a configuration file, and does not look at the rest.
///
/// # Errors
/// Every fault of that part, or that the file is no TOML.
pub fn load_part<T>(
    file: &Path,
    read: impl FnOnce(&mut Table<'_>, &Context<'_>) -> Result<T, Noted>,
) -> Result<T, Faults> {
    let (name, text) = read_file(file).map_err(|fault| Faults(vec![fault]))?;
    let source = Source::file(name, &text);
    let folder = folder_of(Some(file));
    let (root, errors) = DeTable::parse_recoverable(&text);
    for error in &errors {
        not_toml(&source, error);
    }
    let read = read(
        &mut Table::root(&source, root.get_ref()),
        &Context { folder: &folder, mirrored: &[], running: &[] },
    );
    match (read, source.into_faults()) {
        (Ok(read), faults) if faults.is_empty() => Ok(read),
        (_, faults) => Err(Faults(faults)),
    }
}

fn not_toml(source: &Source, error: &toml::de::Error) {
    let offset = error.span().map_or(0, |span| span.start);
    source.fault(offset, String::new(), format_args!("not TOML: {}", error.message()));
}

/// The folder that relative paths of a file are relative to; absolute, as the address of a socket is
/// the same however the file was named.
fn folder_of(file: Option<&Path>) -> PathBuf {
    let folder = file.and_then(Path::parent).unwrap_or(Path::new(""));
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

/// The text of the configuration file, and its name as messages say it.
fn read_file(path: &Path) -> Result<(String, String), Fault> {
    let name = path.display().to_string();
    let fault = |problem: &dyn Display| Fault {
        place: Place::File(name.clone()),
        key: String::new(),
        problem: problem.to_string(),
    };
    let mut bytes = Vec::new();
    let read = |bytes: &mut Vec<u8>| -> io::Result<usize> {
        fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(bytes)
    };
    read(&mut bytes).map_err(|error| fault(&format_args!("cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(fault(&format_args!(
            "larger than {} KiB: not a configuration",
            MAX_FILE >> 10
        )));
    }
    match str::from_utf8(&bytes) {
        Ok(text) => Ok((name, text.to_owned())),
        Err(error) => {
            let valid = bytes.get(..error.valid_up_to()).unwrap_or_default();
            let line = 1 + String::from_utf8_lossy(valid).matches('\n').count();
            let problem = "not UTF-8; expected a TOML file, which is UTF-8 throughout".to_owned();
            Err(Fault { place: Place::Line(name, line), key: String::new(), problem })
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Auto }
    }
}

impl Log {
    fn read(mut table: Table<'_>) -> Result<Self, Noted> {
        let level = table
            .text_or("level", "info", |text| logging::check_filter(text).map(|()| text.to_owned()));
        let format = table.text_or("format", "auto", str::parse);
        table.finish();
        Ok(Self { level: level?, format: format? })
    }
}

impl Default for Daemon {
    fn default() -> Self {
        Self { grace: Duration::from_secs(30) }
    }
}

impl Daemon {
    fn read(mut table: Table<'_>) -> Result<Self, Noted> {
        let grace = table.text("grace", duration);
        table.finish();
        Ok(Self { grace: grace?.unwrap_or(Self::default().grace) })
    }
}

/// The keys of `[limits]`, which every service may set for itself; `base` is what holds otherwise.
fn read_limits(table: &mut Table<'_>, base: &Limits) -> Result<Limits, Noted> {
    let max_connections = table.number_or("max-connections", base.max_connections);
    let max_per_client = table.number_or("max-per-client", base.max_per_client);
    let allow = table.texts("allow", network);
    let deny = table.texts("deny", network);
    let idle = table.text("idle-timeout", duration);
    let total = table.text("max-duration", duration);
    let datagrams = table.number_or("max-datagrams", base.datagrams.total);
    let per_client = table.number_or("max-datagrams-per-client", base.datagrams.per_client);
    Ok(Limits {
        max_connections: max_connections?,
        max_per_client: max_per_client?,
        balancers: base.balancers.clone(),
        access: Access {
            allow: allow?.map_or_else(|| base.access.allow.clone(), values_of),
            deny: deny?.map_or_else(|| base.access.deny.clone(), values_of),
        },
        deadlines: Deadlines {
            idle: idle?.unwrap_or(base.deadlines.idle),
            total: total?.unwrap_or(base.deadlines.total),
        },
        datagrams: DatagramLimits { total: datagrams?, per_client: per_client? },
    })
}

fn values_of<T>(located: Vec<Located<'_, T>>) -> Vec<T> {
    located.into_iter().map(|located| located.value).collect()
}

/// The limits of `[metrics]` unless it sets its own: those who monitor are few and quick.
fn metrics_limits(limits: &Limits) -> Limits {
    let places = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
    Limits {
        max_connections: places(64),
        max_per_client: places(32),
        deadlines: Deadlines { idle: Duration::from_secs(5), total: Duration::from_secs(10) },
        ..limits.clone()
    }
}

fn read_named<'a>(
    kind: &Kind,
    name: &str,
    table: Table<'a>,
    context: &Context<'_>,
    limits: &Limits,
) -> Result<(Service, Vec<Located<'a, Listen>>), Noted> {
    let named = check_name(name).map_err(|expected| table.fault_here(expected));
    let read = read_service(kind, format!("{}.{name}", kind.name).into(), table, context, limits);
    named.and(read)
}

fn read_mirror(
    name: &str,
    table: Table<'_>,
    context: &Context<'_>,
    others: &[mirrors::Settings],
) -> Result<mirrors::Settings, Noted> {
    let named = check_name(name).map_err(|expected| table.fault_here(expected));
    let into = table.place("into");
    let settings = mirrors::Settings::read(name, table, context);
    let settings = named.and(settings)?;
    match others.iter().find(|other| other.folder() == settings.folder()) {
        None => Ok(settings),
        Some(other) => Err(into.fault(format_args!(
            "the folder of mirror.{}; expected a folder of its own",
            other.name()
        ))),
    }
}

fn read_service<'a>(
    kind: &Kind,
    name: Arc<str>,
    mut table: Table<'a>,
    context: &Context<'_>,
    limits: &Limits,
) -> Result<(Service, Vec<Located<'a, Listen>>), Noted> {
    let listen = table.texts_or("listen", kind.default_listen, |text| {
        let listen = Listen::parse(text, context.folder)?;
        let datagrams = |listen: &Listen| matches!(listen, Listen::At(Endpoint::Udp(_)));
        if !kind.datagrams && listen.iter().any(datagrams) {
            return Err(format!(
                "a {} service answers no datagrams; expected TCP or unix:",
                kind.name
            ));
        }
        Ok(listen)
    });
    let listen = listen.and_then(|listen| match listen.len() {
        0 => Err(table.fault("listen", "empty; expected at least one address")),
        _ => Ok(listen.iter().flat_map(Located::each).collect::<Vec<_>>()),
    });
    let limits = read_limits(&mut table, limits);
    // Not for every service at once: those who look after its health by its metrics send no header.
    let balancers = table.texts("proxy-protocol", network);
    let settings = (kind.read)(&mut table, context);
    table.finish();
    let listen = listen?;
    let service = Service {
        name,
        listen: listen.iter().map(|listen| listen.value.clone()).collect(),
        limits: Limits { balancers: balancers?.map_or_else(Vec::new, values_of), ..limits? },
        settings: settings?,
    };
    Ok((service, listen))
}

/// Whether a name of the operator's can be one.
///
/// # Errors
/// Says what was expected.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let fits = name.len() <= MAX_NAME
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
    if fits {
        return Ok(());
    }
    Err(format!(
        "expected a name of at most {MAX_NAME} letters, digits, '-' and '_', \
         beginning with a letter or a digit"
    ))
}

/// Notes every address that two services, or one twice, want to listen on.
fn note_conflicts(found: &Found<'_>) {
    let mut taken: Vec<(&Service, &Listen)> = Vec::new();
    for (service, listen) in found {
        for endpoint in listen {
            if taken.len() == MAX_ADDRESSES {
                endpoint.fault(format_args!("expected at most {MAX_ADDRESSES} addresses in all"));
                return;
            }
            match taken.iter().find(|(_, taken)| taken.conflicts_with(&endpoint.value)) {
                None => taken.push((service, &endpoint.value)),
                Some((other, taken)) => {
                    let (wanted, other) = (&endpoint.value, &other.name);
                    endpoint.fault(format_args!(
                        "{wanted} is taken by {other}, which listens on {taken}; \
                         expected an address of its own"
                    ));
                }
            }
        }
    }
}

/// Services that the command line asks for, as tables like those of a file.
struct Arguments<'a>(Vec<Argument<'a>>);

struct Argument<'a> {
    source: Source,
    kind: &'static Kind,
    entries: DeTable<'a>,
}

impl<'a> Arguments<'a> {
    fn new(sources: &'a Sources) -> Self {
        let time = sources.time.iter().map(|address| Argument {
            source: Source::argument(format!("--time {address}")),
            kind: &services::TIME,
            entries: table([("listen", list(address))]),
        });
        let files = sources.files.iter().map(|(address, path)| Argument {
            source: Source::argument(format!("--file {address}={path}")),
            kind: &services::FILE,
            entries: table([("listen", list(address)), ("path", DeValue::String(path.into()))]),
        });
        Self(time.chain(files).collect())
    }

    fn into_faults(self) -> impl Iterator<Item = Fault> {
        self.0.into_iter().flat_map(|argument| argument.source.into_faults())
    }
}

impl Argument<'_> {
    fn read(
        &self,
        number: usize,
        limits: &Limits,
        running: &[Settings],
    ) -> Result<(Service, Vec<Located<'_, Listen>>), Noted> {
        let name = format!("argument-{}", number + 1);
        let table = Table::named(&self.source, format!("{}.{name}", self.kind.name), &self.entries);
        // Relative to where the command was typed.
        let context = Context { folder: Path::new(""), mirrored: &[], running };
        read_named(self.kind, &name, table, &context, limits)
    }
}

fn list(text: &str) -> DeValue<'_> {
    let mut list = DeArray::new();
    list.push(Spanned::new(0..0, DeValue::String(text.into())));
    DeValue::Array(list)
}

fn table<'a, const N: usize>(entries: [(&'a str, DeValue<'a>); N]) -> DeTable<'a> {
    let spanned =
        |(key, value): (&'a str, _)| (Spanned::new(0..0, key.into()), Spanned::new(0..0, value));
    entries.into_iter().map(spanned).collect()
}
