//! The time service: sends the current time on connect, and in reply to datagrams.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use parking_lot::{RwLock, RwLockReadGuard};
use tokio::time::{MissedTickBehavior, interval};

use crate::clock::{Format, Health, LoopGuard, current_zone, find_zone};
use crate::config_reader::{Question, Reported, Table};
use crate::fs::blocking_pool::{BlockingPool, UNANSWERED, if_slow};
use crate::net::connection::{Connection, ServeError, Stream};
use crate::net::service::Service;
use crate::net::stream::LazySocket;
use crate::telemetry::counters::Datagram;
use crate::telemetry::health_flag::HealthFlag;

/// Interval of the checks of the zone's files: `/etc/localtime` and the zone database.
const ZONE_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Settings of a time service.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Format of the replies.
    pub format: Format,
    /// Name of the time zone of the replies, or `local`.
    pub timezone: String,
    /// The zone of that name, as read by the probe.
    pub zone: TimeZone,
    /// Whether text formats end with a newline.
    pub newline: bool,
}

impl Settings {
    /// Reads the keys of `[time.NAME]` that only time services have.
    ///
    /// # Errors
    /// If a fault was reported to the table.
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

/// A running time service.
#[derive(Debug)]
pub struct TimeService {
    name: Arc<str>,
    settings: Settings,
    current: RwLock<ZoneState>,
    readers: BlockingPool,
    health: HealthFlag,
}

/// The current zone and the values that depend on it.
#[derive(Debug)]
struct ZoneState {
    zone: TimeZone,
    loop_guard: LoopGuard,
}

impl ZoneState {
    fn new(format: &Format, zone: TimeZone) -> Self {
        Self { loop_guard: LoopGuard::new(format, &zone), zone }
    }
}

impl TimeService {
    /// Creates the service. `name` identifies it in the log.
    pub fn new(name: Arc<str>, settings: Settings) -> Self {
        let current = RwLock::new(ZoneState::new(&settings.format, settings.zone.clone()));
        Self {
            name,
            settings,
            current,
            readers: BlockingPool::default(),
            health: HealthFlag::default(),
        }
    }

    fn current(&self) -> RwLockReadGuard<'_, ZoneState> {
        self.current.read()
    }

    /// Checks the zone at intervals and applies changes, such as by `timedatectl set-timezone` or
    /// an update of tzdata. While the zone cannot be read, the last one remains current.
    async fn monitor_zone(&self) {
        let mut ticks = interval(ZONE_CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let name = self.settings.timezone.clone();
            // Without `/etc/localtime`, the zone of the machine is UTC: see `find_zone`. A service
            // in another zone keeps it while the file is missing, because an update may replace the
            // file.
            let is_utc = self.current().zone == TimeZone::UTC;
            let read_zone = if is_utc { find_zone } else { current_zone };
            let check = self.readers.run("", move || read_zone(&name));
            match if_slow(check, || self.log_unreadable(UNANSWERED)).await {
                Ok(Ok(zone)) => self.use_zone(zone),
                Ok(Err(cause)) => self.log_unreadable(&cause),
                Err(error) => self.log_unreadable(&error.to_string()),
            }
        }
    }

    /// Makes `zone` current. Logs if it differs, or could not be read before.
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
        let state = ZoneState::new(&self.settings.format, zone);
        *self.current.write() = state;
        let message =
            format_args!("{service}: time zone changed: \"{timezone}\" is now {zone_name}");
        tracing::info!(service, timezone, zone = zone_name, "{message}");
    }

    /// Logs once that the zone cannot be read.
    fn log_unreadable(&self, cause: &str) {
        let (service, timezone) = (&*self.name, &*self.settings.timezone);
        if self.health.set(cause) {
            let message = format_args!(
                "{service}: time zone \"{timezone}\" cannot be read: {cause}: still using the last \
                 one"
            );
            tracing::warn!(service, timezone, cause, "{message}");
        }
    }

    /// Warns if the format contains the state of the clock, but the sandbox forbids reading it.
    /// Every reply then reports the clock as not synchronized.
    pub fn warn_if_clock_state_is_unreadable(&self) {
        let service = &*self.name;
        let format = &self.settings.format;
        if format.includes_health()
            && let Err(error) = Health::read()
        {
            tracing::warn!(
                service,
                cause = %error,
                "{service}: cannot tell whether the clock is synchronized: {error}: format \
                 {format} reports it as not synchronized; under systemd, see clock-state.conf"
            );
        }
    }

    /// Appends the current time to `reply`.
    ///
    /// # Errors
    /// If the clock is set to a year that the format cannot express.
    pub fn write_reply(&self, reply: &mut Vec<u8>) -> io::Result<()> {
        let now = Timestamp::try_from(SystemTime::now()).map_err(io::Error::other)?;
        let Settings { format, newline, .. } = &self.settings;
        format.write(now, &self.current().zone, *newline, reply)
    }

    /// Sends the current time.
    ///
    /// # Errors
    /// If the connection fails, or the format cannot express the time.
    pub async fn answer<S: Stream>(
        &self,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let mut reply = Vec::with_capacity(64);
        self.write_reply(&mut reply).map_err(ServeError::Service)?;
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
        self.current().loop_guard.resembles_reply(datagram)
    }

    fn reply(&self, datagram: &[u8], reply: &mut Vec<u8>) -> Result<(), Datagram> {
        self.write_reply(reply).map_err(|_| Datagram::Failed)?;
        if self.current().loop_guard.breaks_loop(reply, datagram) {
            return Ok(());
        }
        Err(Datagram::Unanswerable)
    }

    async fn background(&self) {
        self.monitor_zone().await;
    }
}
