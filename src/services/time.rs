//! The time service: on connect, the time; to a datagram, the time in a datagram.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use parking_lot::{RwLock, RwLockReadGuard};
use tokio::time::{MissedTickBehavior, interval};

use crate::clock::{Format, Health, ReplyShapes, current_zone, find_zone};
use crate::config_reader::{Question, Reported, Table};
use crate::fs::blocking_pool::{BlockingPool, UNANSWERED, if_slow};
use crate::net::connection::{Connection, ServeError, Stream};
use crate::net::service::Service;
use crate::net::stream::LazySocket;
use crate::telemetry::counters::Datagram;

use crate::telemetry::health_flag::HealthFlag;

/// How often the files of a zone are checked: `/etc/localtime` and the system's zone database.
const CHECK_ZONE_EVERY: Duration = Duration::from_secs(5);

/// The settings of one time service.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How the time is told.
    pub format: Format,
    /// The name of the zone in which it is told.
    pub timezone: String,
    /// The zone of that name when the settings were read.
    pub zone: TimeZone,
    /// Whether text ends with a newline.
    pub newline: bool,
}

impl Settings {
    /// Reads the keys of `[time.NAME]` that are its own.
    ///
    /// # Errors
    /// If a fault was noted.
    pub fn read(table: &mut Table<'_>) -> Result<Self, Reported> {
        let format = table.text_or("format", "python", str::parse);
        let timezone =
            table.text_or("timezone", "local", |name| Ok::<_, Infallible>(name.to_owned()));
        if let Ok(name) = &timezone {
            table.probe("timezone", name, Question::TimeZone(name.clone()));
        }
        let newline = table.boolean_or("newline", true);
        // The probe stage replaces the zone.
        let zone = TimeZone::UTC;
        Ok(Self { format: format?, timezone: timezone?, zone, newline: newline? })
    }
}

/// A time service that is ready to answer.
#[derive(Debug)]
pub struct TimeService {
    name: Arc<str>,
    settings: Settings,
    current: RwLock<Current>,
    readers: BlockingPool,
    health: HealthFlag,
}

/// The zone at the moment, and what depends on it.
#[derive(Debug)]
struct Current {
    zone: TimeZone,
    shapes: ReplyShapes,
}

impl Current {
    fn new(format: &Format, zone: TimeZone) -> Self {
        Self { shapes: ReplyShapes::new(format, &zone), zone }
    }
}

impl TimeService {
    /// Prepares what does not change from reply to reply. `name` is the service's in the log.
    pub fn new(name: Arc<str>, settings: Settings) -> Self {
        let current = RwLock::new(Current::new(&settings.format, settings.zone.clone()));
        Self {
            name,
            settings,
            current,
            readers: BlockingPool::default(),
            health: HealthFlag::default(),
        }
    }

    fn current(&self) -> RwLockReadGuard<'_, Current> {
        // The value is replaced as a whole.
        self.current.read()
    }

    /// Follows the zone: after `timedatectl set-timezone` or an update of tzdata, replies are in the
    /// new one. While it cannot be read, the last one is used.
    pub async fn follow(&self) {
        let mut checks = interval(CHECK_ZONE_EVERY);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            checks.tick().await;
            let name = self.settings.timezone.clone();
            // Without `/etc/localtime`, UTC is the zone of the machine: see `find_zone`. A service in
            // another zone keeps that while the file is missing, which may be for a moment only.
            let is_utc = self.current().zone == TimeZone::UTC;
            let read_zone = if is_utc { find_zone } else { current_zone };
            let check = self.readers.run("", move || read_zone(&name));
            match if_slow(check, || self.complain(UNANSWERED)).await {
                Ok(Ok(zone)) => self.use_zone(zone),
                Ok(Err(cause)) => self.complain(&cause),
                Err(error) => self.complain(&error.to_string()),
            }
        }
    }

    /// Replies in this zone from now on.
    pub fn use_zone(&self, zone: TimeZone) {
        let (service, timezone) = (&*self.name, &*self.settings.timezone);
        if self.health.clear() {
            tracing::info!(
                service,
                timezone,
                "{service}: time zone \"{timezone}\" can be read again"
            );
        }
        let is_same = {
            let current = self.current();
            current.zone == zone && current.zone.iana_name() == zone.iana_name()
        };
        if is_same {
            return;
        }
        let zone_name = zone.iana_name().unwrap_or("a zone without a name").to_owned();
        let current = Current::new(&self.settings.format, zone);
        *self.current.write() = current;
        let message =
            format_args!("{service}: time zone changed: \"{timezone}\" is now {zone_name}");
        tracing::info!(service, timezone, zone = zone_name, "{message}");
    }

    /// Logs once why the zone cannot be read.
    fn complain(&self, cause: &str) {
        let (service, timezone) = (&*self.name, &*self.settings.timezone);
        if self.health.set(cause) {
            let message = format_args!(
                "{service}: time zone \"{timezone}\" cannot be read: {cause}; keeping the last one"
            );
            tracing::warn!(service, timezone, cause, "{message}");
        }
    }

    /// Says it in the log if the format tells how the clock is kept but the kernel may not be asked,
    /// so that every reply will say that the clock is not synchronized.
    pub fn warn_of_unknown_health(&self) {
        let service = &*self.name;
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
        let Settings { format, newline, .. } = &self.settings;
        format.write(now, &self.current().zone, *newline, reply)
    }

    /// Sends the time.
    ///
    /// # Errors
    /// If the client went away, or the time cannot be told.
    pub async fn answer<S: Stream>(
        &self,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let mut reply = Vec::with_capacity(64);
        self.tell(&mut reply).map_err(ServeError::Service)?;
        connection.send_part(&reply).await
    }
}
impl Service for TimeService {
    async fn serve(&self, connection: &mut Connection<LazySocket>) -> Result<(), ServeError> {
        self.answer(connection).await
    }

    fn answers_datagrams(&self) -> bool {
        true
    }

    fn resembles_reply(&self, datagram: &[u8]) -> bool {
        self.current().shapes.match_datagram(datagram)
    }

    fn reply(&self, datagram: &[u8], reply: &mut Vec<u8>) -> Result<(), Datagram> {
        self.tell(reply).map_err(|_| Datagram::Failed)?;
        if self.current().shapes.outranks(reply, datagram) {
            return Ok(());
        }
        Err(Datagram::Unanswerable)
    }

    async fn background(&self) {
        self.follow().await;
    }
}
