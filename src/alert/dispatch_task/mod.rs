//! Main loop of the alert dispatcher: groups events, queues notifications and sends what is due.

mod attempt;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::alert::config::{Alert, Settings};
use crate::alert::grouping::{AlertGrouper, HourlyLimit, Notification};
use crate::alert::outbox::{MAX_QUEUED, Message, OpenError, Outbox};
use crate::fs::filename::escape;
use crate::notify::Channel;
use crate::notify::mime;
use crate::notify::outcome::{Failure, Sent};
use crate::telemetry::event::{AlertOutcome, Change, ChannelCounters, Event, EventSender, Kind};
use crate::text::counted;

use attempt::Attempt;

/// Age at which a message is given up.
const MAX_AGE: Duration = Duration::from_hours(72);

/// Interval at which old messages are given up.
const EXPIRE_INTERVAL: Duration = Duration::from_mins(1);

#[derive(Debug, Clone)]
pub(super) struct DispatcherConfig {
    pub(super) settings: Settings,
    /// In the order of the channels.
    pub(super) counters: Vec<Arc<ChannelCounters>>,
}

#[derive(Debug)]
struct ChannelState {
    channel: Channel,
    counters: Arc<ChannelCounters>,
    limit: HourlyLimit,
    /// Number of consecutive failures.
    failures: u32,
    failing_since: Option<Duration>,
    retry_at: Duration,
}

impl ChannelState {
    fn reset_backoff(&mut self) {
        (self.failures, self.retry_at) = (0, Duration::ZERO);
    }
}

pub(super) struct DispatchTask {
    alert: Alert,
    /// Whether events are reported; otherwise only queued messages are sent.
    is_on: bool,
    events: EventSender,
    lost_events: u64,
    stop: CancellationToken,
    /// By the monotonic and the system clock.
    started: (Instant, SystemTime),
    host: String,
    grouper: AlertGrouper,
    outbox: Outbox,
    /// Whether the last write of the outbox succeeded.
    is_saved: bool,
    expired_at: Duration,
    channels: BTreeMap<Arc<str>, ChannelState>,
    /// Channels with an attempt in flight; some may have been removed.
    in_flight: BTreeSet<Arc<str>>,
    attempts: JoinSet<(Attempt, Result<Sent, Failure>)>,
}

impl DispatchTask {
    pub(super) fn new(alert: Alert, events: EventSender, stop: CancellationToken) -> Self {
        let uname = rustix::system::uname();
        Self {
            grouper: AlertGrouper::new(alert.policy.clone()),
            alert,
            is_on: true,
            events,
            lost_events: 0,
            stop,
            started: (Instant::now(), SystemTime::now()),
            host: escape(&uname.nodename().to_string_lossy()),
            outbox: Outbox::default(),
            is_saved: true,
            expired_at: Duration::ZERO,
            channels: BTreeMap::new(),
            in_flight: BTreeSet::new(),
            attempts: JoinSet::new(),
        }
    }

    fn now(&self) -> Duration {
        self.started.0.elapsed()
    }

    /// Returns the time in seconds since 1970 by a clock that is never set.
    fn unix_now(&self) -> i64 {
        unix_seconds(self.started.1 + self.now())
    }

    pub(super) async fn run(
        mut self,
        folder: Option<PathBuf>,
        mut events: mpsc::Receiver<Event>,
        mut config: watch::Receiver<DispatcherConfig>,
    ) {
        self.outbox = open_outbox(folder.as_deref());
        let first = config.borrow_and_update().clone();
        self.apply_config(first);
        let stop = self.stop.clone();
        loop {
            self.dispatch(false);
            let wakeup = self.started.0 + self.next_wakeup();
            tokio::select! {
                // Events after a change of the configuration are reported as it says.
                biased;
                changed = config.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let config = config.borrow_and_update().clone();
                    self.apply_config(config);
                }
                () = stop.cancelled() => break,
                Some(Ok((attempt, result))) = self.attempts.join_next() => {
                    self.finish_attempt(&attempt, result);
                }
                Some(event) = events.recv() => self.add(event),
                () = sleep_until(wakeup) => {}
            }
        }
        while let Ok(event) = events.try_recv() {
            self.add(event);
        }
        self.dispatch(true);
        while let Some(Ok((attempt, result))) = self.attempts.join_next().await {
            self.finish_attempt(&attempt, result);
            self.dispatch(true);
        }
        let waiting = self.queued();
        if waiting > 0 {
            tracing::info!(waiting, "{} left in the queue", counted(waiting, "alert"));
        }
    }

    fn apply_config(&mut self, config: DispatcherConfig) {
        let DispatcherConfig { settings, counters } = config;
        self.is_on = settings.is_on();
        if let Some(alert) = &settings.alert {
            self.grouper.set_policy(alert.policy.clone());
            self.alert = alert.clone();
        } else {
            self.grouper = AlertGrouper::new(self.alert.policy.clone());
        }
        let mut before = std::mem::take(&mut self.channels);
        for (channel, counters) in settings.channels.into_iter().zip(counters) {
            let name = Arc::clone(channel.name());
            self.outbox.readdress(&name, &recipients(&channel));
            let state = self.channel_state(before.remove(&name), channel, counters);
            self.channels.insert(name, state);
        }
        // Without alerts over a channel, its recovery would not be noticed.
        let open: Vec<_> = self.grouper.open().cloned().collect();
        for (kind, channel) in open {
            let is_used = self.channels.contains_key(&channel)
                && self.alert.to.iter().any(|to| **to == *channel);
            if kind == Kind::ChannelFailed && !(is_used && self.is_on) {
                self.add(channel_failed(channel, Change::Ended));
            }
        }
        self.log_config();
    }

    fn channel_state(
        &self,
        before: Option<ChannelState>,
        channel: Channel,
        counters: Arc<ChannelCounters>,
    ) -> ChannelState {
        if let Some(before) = before {
            let is_changed = before.channel != channel;
            let mut state = ChannelState { channel, counters, ..before };
            if is_changed {
                state.reset_backoff();
            }
            return state;
        }
        // A system clock that was set back must not extend the limit.
        let now = self.unix_now();
        let sent = self.outbox.sent(channel.name()).into_iter().map(|at| at.min(now));
        ChannelState {
            channel,
            counters,
            limit: HourlyLimit::new(sent),
            failures: 0,
            failing_since: None,
            retry_at: Duration::ZERO,
        }
    }

    fn log_config(&self) {
        for channel in
            self.outbox.channels().into_iter().filter(|it| !self.channels.contains_key(*it))
        {
            let waiting = self.outbox.len(channel);
            tracing::warn!(
                channel,
                waiting,
                "{channel}: the channel was removed: {} in its queue will be given up unless it is \
                 configured again within three days",
                counted(waiting, "alert")
            );
        }
        let waiting = self.queued();
        let queued = counted(waiting, "alert");
        if self.is_on {
            let to = self.alert.to.join(", ");
            tracing::info!(to, waiting, "alerts to {to}; {queued} waiting");
        } else {
            tracing::info!(waiting, "no alerts any more; {queued} waiting");
        }
    }

    /// Returns the number of messages of all channels.
    fn queued(&self) -> usize {
        self.channels.keys().map(|name| self.outbox.len(name)).sum()
    }

    fn add(&mut self, event: Event) {
        if self.is_on {
            self.grouper.add(event, self.now());
        }
    }

    fn next_wakeup(&self) -> Duration {
        let attempts = self.channels.iter().filter_map(|(name, state)| {
            let message = self.outbox.next(name).filter(|_| !self.in_flight.contains(name))?;
            Some(state.retry_at.max(message.retry_at))
        });
        let suppressed = self.alert.to.iter().filter_map(|name| {
            let state = self.channels.get(&**name)?;
            let is_waiting = self.outbox.suppressed(name) > 0
                && self.outbox.len(name) < MAX_QUEUED
                && self.is_on;
            let free = state.limit.free_at(self.alert.max_per_hour).saturating_sub(self.unix_now());
            is_waiting.then(|| self.now() + Duration::from_secs(free.max(0).unsigned_abs()))
        });
        let expire = self.expired_at + EXPIRE_INTERVAL;
        attempts.chain(suppressed).chain(self.grouper.next_due()).fold(expire, Duration::min)
    }

    /// Does everything that is due. On shutdown, `flush` reports pending events at once.
    fn dispatch(&mut self, flush: bool) {
        let now = self.now();
        if now >= self.expired_at + EXPIRE_INTERVAL {
            self.expired_at = now;
            self.expire_old();
        }
        let due = self.grouper.take_due(now, flush).filter(|_| self.is_on);
        for name in self.alert.to.clone() {
            let Some(state) = self.channels.get(&*name) else { continue };
            let is_free = state.limit.free_at(self.alert.max_per_hour) <= self.unix_now();
            if let Some(notification) = due.as_ref().and_then(|due| due.for_channel(&name)) {
                self.enqueue(&name, &notification, self.outbox.suppressed(&name));
            } else if self.outbox.suppressed(&name) > 0 && is_free && self.is_on {
                let notification = Notification::of_suppressed(self.outbox.suppressed(&name));
                self.enqueue(&name, &notification, 0);
            }
        }
        // Messages are on the disk before they are sent.
        self.save();
        for name in self.channels.keys().cloned().collect::<Vec<_>>() {
            self.send_next(&name, now, flush);
        }
        for (name, state) in &self.channels {
            state.counters.set_queued(self.outbox.len(name));
        }
    }

    /// Queues a notification for every recipient of a channel, or counts it as suppressed.
    fn enqueue(&mut self, name: &str, notification: &Notification, suppressed: u64) {
        let now = self.unix_now();
        let Some(state) = self.channels.get_mut(name) else { return };
        let has_room = self.outbox.len(name) < MAX_QUEUED;
        if !has_room || !state.limit.try_acquire(now, self.alert.max_per_hour) {
            state.counters.outcomes.add(AlertOutcome::Withheld);
            self.outbox.set_suppressed(name, self.outbox.suppressed(name) + 1);
            return;
        }
        self.outbox.set_sent(name, state.limit.times().collect());
        let has_files = self.alert.attach && matches!(state.channel, Channel::Mail(_));
        let message = Message {
            id: String::new(),
            channel: name.to_owned(),
            to: String::new(),
            subject: notification.subject(&self.host),
            text: notification.text(&self.host, suppressed),
            // By the system clock, which people read.
            date: unix_seconds(SystemTime::now()),
            files: if has_files { notification.files.clone() } else { Vec::new() },
            rejections: 0,
            queued_at: self.started.0.elapsed(),
            retry_at: Duration::ZERO,
        };
        for to in recipients(&state.channel) {
            let id = match &state.channel {
                Channel::Mail(mail) => mime::new_id(&mail.from),
                Channel::Sms(_) => format!("{:032x}", fastrand::u128(..)),
            };
            self.outbox.add(Message { id, to, ..message.clone() });
        }
        if self.outbox.suppressed(name) > 0 {
            self.outbox.set_suppressed(name, 0);
        }
    }

    fn save(&mut self) {
        match self.outbox.save() {
            Ok(()) => self.is_saved = true,
            Err(error) => {
                if std::mem::replace(&mut self.is_saved, false) {
                    let cause = error.to_string();
                    tracing::error!(cause, "the queue of alerts cannot be written: {cause}");
                }
            }
        }
    }

    /// Gives up old messages and logs lost events.
    fn expire_old(&mut self) {
        for message in self.outbox.expire(self.now().saturating_sub(MAX_AGE)) {
            if let Some(state) = self.channels.get(&*message.channel) {
                state.counters.outcomes.add(AlertOutcome::Expired);
            }
            let (channel, subject) = (message.channel, escape(&message.subject));
            tracing::error!(channel, subject, "alert given up, it could not be sent: {subject}");
        }
        let lost = self.events.lost();
        let events = lost - std::mem::replace(&mut self.lost_events, lost);
        if events > 0 {
            let many = counted(events, "event");
            tracing::warn!(events, "too many alerts at once: {many} delayed or lost");
        }
    }
}

/// Opens the outbox; one that cannot be used is replaced by one in memory.
fn open_outbox(folder: Option<&Path>) -> Outbox {
    let Some(folder) = folder else {
        tracing::warn!(
            "alerts that wait to be sent are lost at a restart: there is no folder for them \
             (StateDirectory= of the unit, or `state` of [alert])"
        );
        return Outbox::default();
    };
    let path = escape(&folder.to_string_lossy());
    let log = |error: &OpenError| {
        let cause = error.to_string();
        tracing::error!(path, cause, "the queue of alerts in {path}: {cause}");
    };
    let opened = Outbox::open(folder).inspect_err(log).or_else(|error| match error {
        OpenError::Unreadable(_) => Outbox::create(folder).inspect_err(log),
        OpenError::InUse => Err(error),
    });
    opened.unwrap_or_default()
}

fn recipients(channel: &Channel) -> Vec<String> {
    match channel {
        Channel::Mail(mail) => mail.to.iter().map(|to| to.address.to_string()).collect(),
        Channel::Sms(sms) => sms.to.iter().map(ToString::to_string).collect(),
    }
}

fn channel_failed(subject: Arc<str>, change: Change) -> Event {
    Event { kind: Kind::ChannelFailed, subject, at: Timestamp::now(), change }
}

fn unix_seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alert::config::tests::{MAIL, load};

    pub(super) fn settings() -> Settings {
        load(&format!("{MAIL}[alert]\nto = [\"mail.a\"]")).unwrap()
    }

    pub(super) fn config(settings: Settings) -> DispatcherConfig {
        let counters = vec![Arc::new(ChannelCounters::new("mail.a".into()))];
        DispatcherConfig { settings, counters }
    }

    pub(super) fn message() -> Message {
        Message {
            id: "1".to_owned(),
            channel: "mail.a".to_owned(),
            to: "b@example.org".to_owned(),
            subject: "gone".to_owned(),
            text: "gone".to_owned(),
            date: 0,
            files: Vec::new(),
            rejections: 0,
            queued_at: Duration::ZERO,
            retry_at: Duration::ZERO,
        }
    }

    /// Returns a dispatcher with one queued message.
    pub(super) fn task_with_message() -> DispatchTask {
        let settings = settings();
        let alert = settings.alert.clone().unwrap();
        let stop = CancellationToken::new();
        let mut task = DispatchTask::new(alert, EventSender::default(), stop);
        task.apply_config(config(settings));
        assert!(task.outbox.add(message()));
        task
    }

    #[tokio::test]
    async fn expires_messages_by_their_time_in_the_outbox() {
        let mut task = task_with_message();
        task.expire_old();
        assert_eq!(task.outbox.len("mail.a"), 1);
        task.started.0 -= MAX_AGE + EXPIRE_INTERVAL;
        task.expire_old();
        assert_eq!(task.outbox.len("mail.a"), 0);
    }

    #[tokio::test]
    async fn suppressed_alerts_of_an_unused_channel_cause_no_wakeup() {
        let mut task = task_with_message();
        task.outbox.remove("1");
        task.outbox.set_suppressed("mail.a", 1);
        assert_eq!(task.next_wakeup().as_secs(), 0);
        task.alert.to = Vec::new();
        assert!(task.next_wakeup() > Duration::from_secs(10));
    }

    #[tokio::test]
    async fn readdresses_messages_of_removed_recipients_once() {
        let mut task = task_with_message();
        for (id, to) in [("2", "gone@example.org"), ("3", "left@example.org")] {
            assert!(task.outbox.add(Message { id: id.to_owned(), to: to.to_owned(), ..message() }));
        }
        task.outbox.remove("1");
        task.apply_config(config(settings()));
        assert_eq!(task.outbox.len("mail.a"), 1);
        assert_eq!(task.outbox.next("mail.a").unwrap().to, "b@example.org");
    }

    #[tokio::test]
    async fn the_failure_of_an_unused_channel_ends() {
        let mut task = task_with_message();
        for name in ["mail.gone", "mail.a"] {
            task.add(channel_failed(name.into(), Change::Begun("no login".to_owned())));
        }
        task.apply_config(config(settings()));
        let open: Vec<_> = task.grouper.open().cloned().collect();
        assert_eq!(open, [(Kind::ChannelFailed, "mail.a".into())]);
    }
}
