//! The services, one file each, and their registry.
//!
//! A service is given a connection or a datagram and answers on it. It knows nothing of where the
//! socket came from, of limits, of signals. A new service is a file and a row in each table here.

mod cached_document;
mod encoder;
pub(crate) mod file;
pub(crate) mod folder;
pub(crate) mod metrics;
pub(crate) mod time;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use jiff::Timestamp;

use crate::config::Context;
use crate::config_reader::table::{Noted, Table};
use crate::config_reader::values;
use crate::fs::blocking_pool::UNANSWERED;
use crate::fs::file::{OpenFile, canonical};
use crate::fs::folder::Folder;
use crate::net::connection::{Broken, Connection, Stream};
use crate::telemetry::metrics::Monitor;

/// The checked settings of a service.
#[derive(Debug, Clone, PartialEq)]
pub enum Settings {
    /// `[time.NAME]`
    Time(time::Settings),
    /// `[file.NAME]` whose path is a file.
    File(file::Settings),
    /// `[file.NAME]` whose path is a folder.
    Folder(folder::Settings),
    /// `[metrics]`, where there is nothing to set but what every service has.
    Metrics,
}

impl Settings {
    /// Whether such a service answers datagrams.
    pub fn datagrams(&self) -> bool {
        matches!(self, Self::Time(_))
    }
}

/// A kind of service as the configuration knows it.
pub(crate) struct Kind {
    /// The name of its table.
    pub name: &'static str,
    /// Where it listens if the configuration does not say.
    pub default_listen: &'static str,
    /// Whether it answers datagrams.
    pub datagrams: bool,
    /// Reads what is its own of `[KIND.NAME]`, and reports what is wrong to the table.
    pub read: fn(&mut Table<'_>, &Context<'_>) -> Result<Settings, Noted>,
}

/// `[time.NAME]`
pub(crate) static TIME: Kind = Kind {
    name: "time",
    default_listen: "127.0.0.1:6789",
    datagrams: true,
    read: |table, _| time::Settings::read(table).map(Settings::Time),
};

/// `[file.NAME]`
pub(crate) static FILE: Kind = Kind {
    name: "file",
    default_listen: "127.0.0.1:5566",
    datagrams: false,
    read: read_file_or_folder,
};

/// `[metrics]`, of which there is one at most.
pub(crate) static METRICS: Kind = Kind {
    name: "metrics",
    default_listen: "127.0.0.1:9467",
    datagrams: false,
    read: |_, _| Ok(Settings::Metrics),
};

/// Every kind of service of which there can be many.
pub(crate) static KINDS: [&Kind; 2] = [&TIME, &FILE];

fn read_file_or_folder(table: &mut Table<'_>, context: &Context<'_>) -> Result<Settings, Noted> {
    let read = table.required("path", "the file or the folder to hand out", |text| {
        open_path(&context.folder.join(text), context)
    });
    let newline = table.boolean_or("newline", true);
    let cache_limit = table.text_or("cache-limit", "64MiB", values::size);
    let max_files = table.number_or("max-files", folder::DEFAULT_MAX_FILES);
    let (newline, cache_limit, max_files) = (newline?, cache_limit?, max_files?);
    Ok(match read? {
        Opened::File { path, filename } => {
            Settings::File(file::Settings { path, filename, newline, cache_limit })
        }
        Opened::Folder(folder) => {
            Settings::Folder(folder::Settings { folder, cache_limit, max_files })
        }
    })
}

enum Opened {
    File { path: PathBuf, filename: String },
    Folder(Folder),
}

/// How long a path may be looked at in vain: a file system may first have to be mounted. One that is
/// served already need not, and where another hangs, there is no hope either.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(2));

/// How many threads may look at one path: those that hang stay, and there are reloads.
const MAX_LOOKS: usize = 8;

/// The looks that have not ended. Each takes a moment, unless it hangs.
static LOOKS: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

/// A look at a path, until it has ended.
struct Look(PathBuf);

impl Look {
    /// Begins one, if not too many hang there; and whether others have not ended.
    fn begin(path: &Path) -> Option<(Self, bool)> {
        let mut looks = LOOKS.lock().unwrap_or_else(PoisonError::into_inner);
        let others = !looks.is_empty();
        let count = looks.entry(path.to_owned()).or_default();
        *count += 1;
        let look = Self(path.to_owned());
        let few = *count <= MAX_LOOKS;
        drop(looks);
        few.then_some((look, others))
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        let mut looks = LOOKS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = looks.get_mut(&self.0) {
            *count -= 1;
            if *count == 0 {
                looks.remove(&self.0);
            }
        }
    }
}

/// Looks whether what is at `path` can be handed out; if its file system does not answer, and it is
/// handed out already, it goes on being what it was.
fn open_path(path: &Path, context: &Context<'_>) -> Result<Opened, String> {
    let running = context.running.iter().find_map(|settings| Opened::of(settings, path));
    let in_vain =
        |running: Option<Opened>| running.ok_or_else(|| format!("cannot be opened: {UNANSWERED}"));
    let Some((look, others)) = Look::begin(path) else { return in_vain(running) };
    let patience = if running.is_some() || others { PATIENCE.1 } else { PATIENCE.0 };
    let mirrored = context.mirrored.to_vec();
    let (tell, told) = mpsc::channel();
    let looking = thread::Builder::new().name("look".to_owned());
    let looking = looking.spawn(move || {
        let opened = look_at(&look.0, &mirrored);
        drop(look);
        // Who has lost patience does not want to know.
        let _ = tell.send(opened);
    });
    looking.map_err(|error| cannot(&error))?;
    told.recv_timeout(patience).unwrap_or_else(|_| in_vain(running))
}

impl Opened {
    /// What these settings have opened, if it is at `path`.
    fn of(settings: &Settings, path: &Path) -> Option<Self> {
        match settings {
            Settings::File(file) if file.path == path => {
                Some(Self::File { path: file.path.clone(), filename: file.filename.clone() })
            }
            Settings::Folder(folder) if folder.folder == Folder::expected(path) => {
                Some(Self::Folder(folder.folder.clone()))
            }
            _ => None,
        }
    }
}

fn cannot(error: &io::Error) -> String {
    format!("cannot be opened: {error}")
}

/// Whether a mirror will create this folder, or one in it. `mirrored` are canonical paths, and the
/// configured one may lead through links, as below `/var/lib/handout` under `DynamicUser=`.
fn will_be_created(path: &Path, mirrored: &[PathBuf]) -> bool {
    let path = canonical(path);
    mirrored.iter().any(|mirrored| mirrored.starts_with(&path))
}

fn look_at(path: &Path, mirrored: &[PathBuf]) -> Result<Opened, String> {
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound && will_be_created(path, mirrored) => {
            return Ok(Opened::Folder(Folder::expected(path)));
        }
        metadata => metadata.map_err(|error| cannot(&error))?,
    };
    if metadata.is_dir() {
        return Folder::open(path).map(Opened::Folder).map_err(|error| cannot(&error));
    }
    let filename = path.file_name().and_then(|name| name.to_str());
    let filename = filename.ok_or("expected a path that ends with a file's name")?.to_owned();
    OpenFile::open(path).map_err(|error| cannot(&error))?;
    Ok(Opened::File { path: path.to_owned(), filename })
}

/// A service that is ready to answer.
#[derive(Debug, Clone)]
pub enum Service {
    /// Tells the time.
    Time(Arc<time::TimeService>),
    /// Hands out one file.
    File(Arc<file::FileService>),
    /// Hands out the files of a folder.
    Folder(Arc<folder::FolderService>),
    /// Tells how the others are.
    Metrics(Arc<metrics::MetricsService>),
}

impl Service {
    /// Opens and prepares all that the service needs. `name` is its name in the log, `monitor` what
    /// it tells of if it is there for monitoring.
    ///
    /// # Errors
    /// If what it serves cannot be opened.
    pub fn start(name: Arc<str>, settings: Settings, monitor: Arc<Monitor>) -> io::Result<Self> {
        Ok(match settings {
            Settings::Time(settings) => {
                let time = time::TimeService::new(name, settings);
                time.warn_of_unknown_health();
                Self::Time(Arc::new(time))
            }
            Settings::File(settings) => {
                Self::File(Arc::new(file::FileService::open(name, settings)?))
            }
            Settings::Folder(settings) => {
                Self::Folder(Arc::new(folder::FolderService::new(name, settings)))
            }
            Settings::Metrics => Self::Metrics(Arc::new(metrics::MetricsService::new(monitor))),
        })
    }

    /// Answers one connection.
    ///
    /// # Errors
    /// If the client went away, or the service cannot finish what it began.
    pub async fn answer<S: Stream>(&self, connection: &mut Connection<S>) -> Result<(), Broken> {
        match self {
            Self::Time(time) => time.answer(connection).await,
            // Apart, so that the time's connections are not as large as theirs.
            Self::File(file) => Box::pin(file.answer(connection)).await,
            Self::Folder(folder) => Box::pin(folder.answer(connection)).await,
            Self::Metrics(metrics) => Box::pin(metrics.answer(connection)).await,
        }
    }

    /// What answers datagrams, if this service does.
    pub fn datagrams(&self) -> Option<&time::TimeService> {
        match self {
            Self::Time(time) => Some(time),
            Self::File(_) | Self::Folder(_) | Self::Metrics(_) => None,
        }
    }

    /// Whether it tells of the daemon, as long as that lives, and is no part of what it is there
    /// for.
    pub fn is_for_monitoring(&self) -> bool {
        matches!(self, Self::Metrics(_))
    }

    /// Why it cannot read what it serves, if so.
    pub fn trouble(&self) -> Option<String> {
        match self {
            Self::Time(_) | Self::Metrics(_) => None,
            Self::File(file) => file.trouble(),
            Self::Folder(folder) => folder.trouble(),
        }
    }

    /// When the content of the file that it serves was last modified.
    pub fn version(&self) -> Option<Timestamp> {
        match self {
            Self::Time(_) | Self::Folder(_) | Self::Metrics(_) => None,
            Self::File(file) => Some(file.version()),
        }
    }

    /// Applies what a reload has found outside of the configuration.
    pub fn refresh(&self, settings: &Settings) {
        if let (Self::Time(time), Settings::Time(settings)) = (self, settings) {
            time.use_zone(settings.zone.clone());
        }
    }

    /// What the service does by itself while it runs; it does not end.
    pub async fn work(&self) {
        match self {
            Self::Metrics(_) => std::future::pending().await,
            Self::Time(time) => time.follow().await,
            Self::File(file) => file.follow().await,
            Self::Folder(folder) => folder.follow().await,
        }
    }
}
