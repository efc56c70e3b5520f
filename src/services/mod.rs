//! The services, one file per kind, and their registry.
//!
//! A service answers on a given connection or to a given datagram. It does not know listeners,
//! limits or signals. A new kind of service needs a file and a row in each table of this module.

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

/// The validated settings of a service.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Settings {
    /// `[time.NAME]`
    Time(time::Settings),
    /// `[file.NAME]` whose path is a file.
    File(file::Settings),
    /// `[file.NAME]` whose path is a folder.
    Folder(folder::Settings),
    /// `[metrics]`, which has no keys but those of every service.
    Metrics,
}

impl Settings {
    /// Whether a service with these settings answers datagrams.
    pub(crate) fn answers_datagrams(&self) -> bool {
        matches!(self, Self::Time(_))
    }

    /// Returns the served path and its kind; `None` if the service does not read files.
    pub(crate) fn served_path(&self) -> Option<(&Path, PathKind)> {
        match self {
            Self::File(file) => Some((&file.path, PathKind::File)),
            Self::Folder(folder) => Some((folder.folder.path(), PathKind::Folder)),
            Self::Time(_) | Self::Metrics => None,
        }
    }

    /// Completes the settings with the findings of their probes; `None` if one is missing.
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

/// A kind of service, as the configuration defines it.
pub(crate) struct Kind {
    /// Name of its table.
    pub name: &'static str,
    /// Address to listen on if the configuration has none.
    pub default_listen: &'static str,
    /// Whether such services answer datagrams.
    pub answers_datagrams: bool,
    /// Reads the keys of `[KIND.NAME]` that only this kind has. Faults are reported to the table.
    pub read: fn(&mut Table<'_>) -> Result<Settings, Reported>,
}

/// `[time.NAME]`
pub(crate) static TIME: Kind = Kind {
    name: "time",
    default_listen: "127.0.0.1:6789",
    answers_datagrams: true,
    read: |table| time::Settings::read(table).map(Settings::Time),
};

/// `[file.NAME]`
pub(crate) static FILE: Kind = Kind {
    name: "file",
    default_listen: "127.0.0.1:5566",
    answers_datagrams: false,
    read: read_file,
};

/// `[metrics]`, a table that occurs at most once.
pub(crate) static METRICS: Kind = Kind {
    name: "metrics",
    default_listen: "127.0.0.1:9467",
    answers_datagrams: false,
    read: |_| Ok(Settings::Metrics),
};

/// The kinds of services that can occur more than once.
pub(crate) static KINDS: [&Kind; 2] = [&TIME, &FILE];

/// Reads `[file.NAME]`. The probe of its path decides whether it becomes a folder service.
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

/// A running service of any kind.
#[derive(Debug, Clone)]
pub(crate) enum Service {
    /// Sends the current time.
    Time(Arc<time::TimeService>),
    /// Sends one file to every client.
    File(Arc<file::FileService>),
    /// Sends the requested files of a folder.
    Folder(Arc<folder::FolderService>),
    /// Reports metrics and health of all services.
    Metrics(Arc<metrics::MetricsService>),
}

impl Service {
    /// Creates the service. `name` identifies it in the log; a metrics service reports the state of
    /// `monitor`.
    ///
    /// # Errors
    /// If the served file cannot be opened.
    pub(crate) fn start(
        name: Arc<str>,
        settings: Settings,
        monitor: Arc<Monitor>,
    ) -> io::Result<Self> {
        Ok(match settings {
            Settings::Time(settings) => {
                let time = time::TimeService::new(name, settings);
                time.warn_if_clock_state_is_unreadable();
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

    /// Applies findings of a reload that are not part of the configuration, such as a new time
    /// zone.
    pub(crate) fn refresh(&self, settings: &Settings) {
        if let (Self::Time(time), Settings::Time(settings)) = (self, settings) {
            time.use_zone(settings.zone.clone());
        }
    }
}

/// Evaluates an expression with the service of the variant.
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
            // Boxed to keep the futures of the time service small.
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
