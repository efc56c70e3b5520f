//! The services, one file each, and their registry.
//!
//! A service is given a connection or a datagram and answers on it. It knows nothing of where the
//! socket came from, of limits, of signals. A new service is a file and a row in each table here.

pub mod file;
pub mod time;

use std::sync::Arc;

use crate::config::{Context, Noted, Table};
use crate::connection::{Broken, Connection, Stream};

/// The checked settings of a service.
#[derive(Debug, Clone, PartialEq)]
pub enum Settings {
    /// `[time.NAME]`
    Time(time::Settings),
    /// `[file.NAME]`
    File(file::Settings),
}

/// A kind of service as the configuration knows it.
pub struct Kind {
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
pub static TIME: Kind = Kind {
    name: "time",
    default_listen: "127.0.0.1:6789",
    datagrams: true,
    read: |table, _| time::Settings::read(table).map(Settings::Time),
};

/// `[file.NAME]`
pub static FILE: Kind = Kind {
    name: "file",
    default_listen: "127.0.0.1:5566",
    datagrams: false,
    read: |table, context| file::Settings::read(table, context).map(Settings::File),
};

/// Every kind of service.
pub static KINDS: [&Kind; 2] = [&TIME, &FILE];

/// A service that is ready to answer.
#[derive(Debug, Clone)]
pub enum Service {
    /// Tells the time.
    Time(Arc<time::Time>),
    /// Hands out a file.
    File(Arc<file::File>),
}

impl Service {
    /// Opens and prepares all that the service needs. `name` is its name in the log.
    ///
    /// # Errors
    /// If what it serves cannot be opened.
    pub fn start(name: &Arc<str>, settings: &Settings) -> Result<Self, file::OpenError> {
        Ok(match settings {
            Settings::Time(settings) => Self::Time(Arc::new(time::Time::new(settings.clone()))),
            Settings::File(settings) => {
                Self::File(Arc::new(file::File::open(Arc::clone(name), settings.clone())?))
            }
        })
    }

    /// Answers one connection.
    ///
    /// # Errors
    /// If the client went away, or the service cannot finish what it began.
    pub async fn answer<S: Stream>(&self, connection: &mut Connection<S>) -> Result<(), Broken> {
        match self {
            Self::Time(time) => time.answer(connection).await,
            Self::File(file) => file.answer(connection).await,
        }
    }

    /// What answers datagrams, if this service does.
    pub fn datagrams(&self) -> Option<Arc<time::Time>> {
        match self {
            Self::Time(time) => Some(Arc::clone(time)),
            Self::File(_) => None,
        }
    }

    /// What the service does by itself while it runs; it does not end.
    pub async fn work(&self) {
        match self {
            Self::Time(_) => std::future::pending().await,
            Self::File(file) => file.follow().await,
        }
    }
}
