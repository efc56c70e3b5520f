//! The time service: on connect, the time; to a datagram, the time in a datagram.

use std::io;
use std::time::SystemTime;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::clock::{Format, Health, ReplyShapes, find_zone};
use crate::config::{Noted, Table};
use crate::connection::{Broken, Connection, Stream};

/// The settings of one time service.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How the time is told.
    pub format: Format,
    /// The zone in which it is told.
    pub zone: TimeZone,
    /// Whether text ends with a newline.
    pub newline: bool,
}

impl Settings {
    /// Reads the keys of `[time.NAME]` that are its own.
    ///
    /// # Errors
    /// If a fault was noted.
    pub fn read(table: &mut Table<'_>) -> Result<Self, Noted> {
        let format = table.text_or("format", "python", str::parse);
        let zone = table.text_or("timezone", "local", find_zone);
        let newline = table.boolean_or("newline", true);
        Ok(Self { format: format?, zone: zone?, newline: newline? })
    }
}

/// A time service that is ready to answer.
#[derive(Debug)]
pub struct TimeService {
    settings: Settings,
    shapes: ReplyShapes,
}

impl TimeService {
    /// Prepares what does not change from reply to reply.
    pub fn new(settings: Settings) -> Self {
        let shapes = ReplyShapes::new(&settings.format, &settings.zone);
        Self { settings, shapes }
    }

    /// Says it in the log if the format tells how the clock is kept but the kernel may not be asked,
    /// so that every reply will say that the clock is not synchronized. `service` is the service's
    /// name there.
    pub fn warn_of_unknown_health(&self, service: &str) {
        let format = &self.settings.format;
        if format.tells_health()
            && let Err(error) = Health::read()
        {
            tracing::warn!(
                service,
                cause = %error,
                "{service}: cannot tell whether the clock is synchronized, and format {format} \
                 will say that it is not: the kernel may not be asked ({error}); \
                 under systemd, see clock-state.conf"
            );
        }
    }

    /// Appends the reply of this moment.
    ///
    /// # Errors
    /// If the clock is set to a year that cannot be told.
    pub fn tell(&self, reply: &mut Vec<u8>) -> io::Result<()> {
        let now = Timestamp::try_from(SystemTime::now()).map_err(io::Error::other)?;
        let Settings { format, zone, newline } = &self.settings;
        format.write(now, zone, *newline, reply)
    }

    /// Whether a datagram could be the reply of another time service.
    pub fn resembles_reply(&self, datagram: &[u8]) -> bool {
        self.shapes.match_datagram(datagram)
    }

    /// Whether `reply` may be the answer to a datagram that resembles none: see [`ReplyShapes`].
    pub fn outranks(&self, reply: &[u8], datagram: &[u8]) -> bool {
        self.shapes.outranks(reply, datagram)
    }

    /// Sends the time.
    ///
    /// # Errors
    /// If the client went away, or the time cannot be told.
    pub async fn answer<S: Stream>(&self, connection: &mut Connection<S>) -> Result<(), Broken> {
        let mut reply = Vec::with_capacity(64);
        self.tell(&mut reply).map_err(Broken::Service)?;
        connection.send_part(&reply).await
    }
}
