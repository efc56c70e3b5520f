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

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

use crate::config_reader::{Findings, PathKind, Question, Reported, Table, values};
use crate::fs::folder::Folder;
use crate::net::connection::{Connection, ServeError};
use crate::net::service as net;
use crate::net::stream::LazySocket;
use crate::telemetry::counters::Datagram;
use crate::telemetry::metrics::Monitor;

/// The checked settings of a service.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Settings {
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
    pub(crate) fn datagrams(&self) -> bool {
        matches!(self, Self::Time(_))
    }

    /// The path that is served, and its kind.
    pub(crate) fn served_path(&self) -> Option<(&Path, PathKind)> {
        match self {
            Self::File(file) => Some((&file.path, PathKind::File)),
            Self::Folder(folder) => Some((folder.folder.path(), PathKind::Folder)),
            Self::Time(_) | Self::Metrics => None,
        }
    }

    /// Completes the settings by the answers to their probes; `None` if one is missing.
    pub(crate) fn complete(self, findings: &Findings) -> Option<Self> {
        Some(match self {
            Self::Time(time) => {
                let zone = findings.time_zones.get(&time.timezone)?.clone();
                Self::Time(time::Settings { zone, ..time })
            }
            Self::File(file) => match findings.path_kinds.get(&file.path)? {
                PathKind::File => Self::File(file),
                PathKind::Folder => Self::Folder(folder::Settings {
                    folder: Folder::expected(&file.path),
                    cache_limit: file.cache_limit,
                    max_files: file.max_files,
                }),
            },
            settings @ (Self::Folder(_) | Self::Metrics) => settings,
        })
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
    pub read: fn(&mut Table<'_>) -> Result<Settings, Reported>,
}

/// `[time.NAME]`
pub(crate) static TIME: Kind = Kind {
    name: "time",
    default_listen: "127.0.0.1:6789",
    datagrams: true,
    read: |table| time::Settings::read(table).map(Settings::Time),
};

/// `[file.NAME]`
pub(crate) static FILE: Kind =
    Kind { name: "file", default_listen: "127.0.0.1:5566", datagrams: false, read: read_file };

/// `[metrics]`, of which there is one at most.
pub(crate) static METRICS: Kind = Kind {
    name: "metrics",
    default_listen: "127.0.0.1:9467",
    datagrams: false,
    read: |_| Ok(Settings::Metrics),
};

/// Every kind of service of which there can be many.
pub(crate) static KINDS: [&Kind; 2] = [&TIME, &FILE];

/// Reads the settings of a file, which may turn out to be a folder.
fn read_file(table: &mut Table<'_>) -> Result<Settings, Reported> {
    let base_dir = table.base_dir();
    let path = table.required("path", "the file or the folder to hand out", |text| {
        Ok::<_, Infallible>((text.to_owned(), base_dir.join(text)))
    });
    if let Ok((text, path)) = &path {
        table.probe("path", text, Question::PathKind(path.clone()));
    }
    let newline = table.boolean_or("newline", true);
    let cache_limit = table.text_or("cache-limit", "64MiB", values::size);
    let max_files = table.number_or("max-files", folder::DEFAULT_MAX_FILES);
    let (_, path) = path?;
    // Only folders have paths without a last component.
    let filename = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (newline, cache_limit, max_files) = (newline?, cache_limit?, max_files?);
    Ok(Settings::File(file::Settings { path, filename, newline, cache_limit, max_files }))
}

/// A service that is ready to answer.
#[derive(Debug, Clone)]
pub(crate) enum Service {
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
    pub(crate) fn start(
        name: Arc<str>,
        settings: Settings,
        monitor: Arc<Monitor>,
    ) -> io::Result<Self> {
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

    /// Applies what a reload has found outside of the configuration.
    pub(crate) fn refresh(&self, settings: &Settings) {
        if let (Self::Time(time), Settings::Time(settings)) = (self, settings) {
            time.use_zone(settings.zone.clone());
        }
    }
}

/// Calls a method of the service of whichever kind.
macro_rules! delegate {
    ($self:ident, $service:ident => $call:expr) => {
        match $self {
            Service::Time($service) => $call,
            Service::File($service) => $call,
            Service::Folder($service) => $call,
            Service::Metrics($service) => $call,
        }
    };
}

impl net::Service for Service {
    async fn serve(&self, connection: &mut Connection<LazySocket>) -> Result<(), ServeError> {
        match self {
            Self::Time(time) => time.answer(connection).await,
            // Boxed, so that connections of the time service do not have the size of the others.
            Self::File(file) => Box::pin(file.answer(connection)).await,
            Self::Folder(folder) => Box::pin(folder.answer(connection)).await,
            Self::Metrics(metrics) => Box::pin(metrics.answer(connection)).await,
        }
    }

    fn answers_datagrams(&self) -> bool {
        delegate!(self, service => service.answers_datagrams())
    }

    fn resembles_reply(&self, datagram: &[u8]) -> bool {
        delegate!(self, service => service.resembles_reply(datagram))
    }

    fn reply(&self, datagram: &[u8], reply: &mut Vec<u8>) -> Result<(), Datagram> {
        delegate!(self, service => service.reply(datagram, reply))
    }

    async fn background(&self) {
        delegate!(self, service => service.background().await);
    }

    fn problem(&self) -> Option<String> {
        delegate!(self, service => service.problem())
    }

    fn file_version(&self) -> Option<Timestamp> {
        delegate!(self, service => service.file_version())
    }

    fn is_monitoring(&self) -> bool {
        delegate!(self, service => service.is_monitoring())
    }
}
