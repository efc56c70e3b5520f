//! The alert dispatcher: turns events into messages and sends them.
//!
//! Runs on its own thread and event loop, so neither a dead mail server nor a slow disk delays a
//! service. A failing channel is logged, counted and reported over the other channels.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::alert::config::{Alert, Settings};
use crate::alert::delivery::deliver;
use crate::alert::grouping::{AlertGrouper, HourlyLimit, Notification};
use crate::alert::outbox::{MAX_QUEUED, Message, OpenError, Outbox};
use crate::fs::filename::escape;
use crate::http::retry;
use crate::notify::Channel;
use crate::notify::mime;
use crate::notify::outcome::{Failure, FailureKind, Sent};
use crate::runtime::EventLoop;
use crate::telemetry::event::{AlertOutcome, Change, ChannelCounters, Event, EventSender, Kind};
use crate::text::counted;

/// First and maximum backoff after a failed attempt.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(15));

/// Maximum number of attempts that the server rejects or leaves unconfirmed: each SMS is paid for.
/// With the backoff they take three quarters of an hour.
const MAX_REJECTIONS: u32 = 10;

/// Age at which a message is given up.
const MAX_AGE: Duration = Duration::from_hours(72);

/// Time without success after which a channel has failed; greylisting takes less.
const FAILED_AFTER: Duration = Duration::from_mins(10);

/// Interval at which old messages are given up.
const EXPIRE_INTERVAL: Duration = Duration::from_mins(1);

/// The handle of the daemon to the dispatcher.
#[derive(Debug, Default)]
pub(crate) struct AlertDispatcher {
    events: EventSender,
    /// Created when `[alert]` is first configured.
    event_loop: Option<EventLoop>,
    task: Option<TaskHandle>,
    counters: Vec<Arc<ChannelCounters>>,
}

#[derive(Debug)]
struct TaskHandle {
    config: watch::Sender<DispatcherConfig>,
    stop: CancellationToken,
    task: JoinHandle<()>,
    /// Folder of the outbox, which cannot change.
    folder: Option<PathBuf>,
}

#[derive(Debug, Clone)]
struct DispatcherConfig {
    settings: Settings,
    /// In the order of the channels.
    counters: Vec<Arc<ChannelCounters>>,
}

impl AlertDispatcher {
    /// Checks that settings can be applied, and starts the thread if it is needed for the first
    /// time.
    pub(crate) fn prepare(&mut self, settings: &Settings) -> io::Result<()> {
        if let (Some(task), Some(alert)) = (&self.task, &settings.alert)
            && task.folder != alert.folder()
        {
            return Err(io::Error::other(
                "alert.state cannot change in a running daemon: restart it, and move \
                 .handout-alerts.json to the new folder before",
            ));
        }
        if settings.is_on() && self.event_loop.is_none() {
            self.event_loop = Some(EventLoop::start("alerts")?);
        }
        Ok(())
    }

    /// Applies settings; queued messages are kept.
    pub(crate) fn change(&mut self, settings: &Settings) {
        let counters = settings.channels.iter().map(|channel| {
            let before = self.counters.iter().find(|counters| counters.channel == *channel.name());
            before
                .cloned()
                .unwrap_or_else(|| Arc::new(ChannelCounters::new(channel.name().clone())))
        });
        self.counters = counters.collect();
        let config =
            DispatcherConfig { settings: settings.clone(), counters: self.counters.clone() };
        if let Some(task) = &self.task {
            task.config.send_replace(config);
        } else if let (Some(event_loop), Some(alert)) = (&self.event_loop, &settings.alert)
            && let Some(events) = self.events.connect()
        {
            let (config, receiver) = watch::channel(config);
            let (stop, folder) = (CancellationToken::new(), alert.folder());
            let task = DispatchTask::new(alert.clone(), self.events.clone(), stop.clone());
            let task = event_loop.handle.spawn(task.run(folder.clone(), events, receiver));
            self.task = Some(TaskHandle { config, stop, task, folder });
        }
    }

    pub(crate) fn events(&self) -> EventSender {
        self.events.clone()
    }

    pub(crate) fn counters(&self) -> Vec<Arc<ChannelCounters>> {
        if self.task.is_some() { self.counters.clone() } else { Vec::new() }
    }

    /// Reports pending events at once and stops.
    pub(crate) fn stop(&self) {
        if let Some(task) = &self.task {
            task.stop.cancel();
        }
    }

    /// Waits for the end. Messages that could not be sent remain in the outbox.
    pub(crate) async fn ended(&mut self) {
        if let Some(task) = self.task.take() {
            // The panic hook has logged a panic.
            let _ = task.task.await;
        }
    }
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

/// A message that is being sent.
#[derive(Debug)]
struct Attempt {
    channel: Arc<str>,
    id: String,
    /// Escaped for the log.
    subject: String,
    rejections: u32,
}

struct DispatchTask {
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
    fn new(alert: Alert, events: EventSender, stop: CancellationToken) -> Self {
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

    async fn run(
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
        for to in recipients(&state.channel) {
            let (id, files) = match &state.channel {
                Channel::Mail(mail) if self.alert.attach => {
                    (mime::new_id(&mail.from), notification.files.clone())
                }
                Channel::Mail(mail) => (mime::new_id(&mail.from), Vec::new()),
                Channel::Sms(_) => (format!("{:032x}", fastrand::u128(..)), Vec::new()),
            };
            self.outbox.add(Message {
                id,
                channel: name.to_owned(),
                to,
                subject: notification.subject(&self.host),
                text: notification.text(&self.host, suppressed),
                // By the system clock, which people read.
                date: unix_seconds(SystemTime::now()),
                files,
                rejections: 0,
                queued_at: self.started.0.elapsed(),
                retry_at: Duration::ZERO,
            });
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

    fn send_next(&mut self, name: &Arc<str>, now: Duration, flush: bool) {
        let Some(state) = self.channels.get(name) else { return };
        // On shutdown, a failing channel is not waited for.
        if state.retry_at > now || flush && state.failures > 0 {
            return;
        }
        let next = self.outbox.next(name).filter(|message| message.retry_at <= now);
        let Some(message) = next.cloned() else { return };
        if !self.in_flight.insert(Arc::clone(name)) {
            return;
        }
        let channel = state.channel.clone();
        let attempt = Attempt {
            channel: Arc::clone(name),
            id: message.id.clone(),
            subject: escape(&message.subject),
            rejections: message.rejections,
        };
        self.attempts.spawn(async move {
            // A separate task, so that a panic fails the attempt only.
            let result = tokio::spawn(async move { deliver(&channel, message).await }).await;
            let panicked = |_| Err(Failure::transient("a fault of the program; see the log"));
            (attempt, result.unwrap_or_else(panicked))
        });
    }

    fn finish_attempt(&mut self, attempt: &Attempt, result: Result<Sent, Failure>) {
        self.in_flight.remove(&attempt.channel);
        match result {
            Ok(sent) => self.finish_sent(attempt, &sent),
            Err(failure) => self.finish_failed(attempt, failure),
        }
        self.save();
    }

    fn finish_sent(&mut self, attempt: &Attempt, sent: &Sent) {
        let Attempt { channel: name, id, subject, .. } = attempt;
        let (channel, ids) = (&**name, sent.ids.join(" "));
        tracing::info!(channel, id = ids, subject, "alert sent over {channel}: {subject}");
        self.outbox.remove(id);
        // The channel may have been removed meanwhile.
        let Some(state) = self.channels.get_mut(name) else { return };
        state.reset_backoff();
        state.failing_since = None;
        state.counters.outcomes.add(AlertOutcome::Sent);
        self.add(channel_failed(Arc::clone(name), Change::Ended));
    }

    fn finish_failed(&mut self, attempt: &Attempt, failure: Failure) {
        let Attempt { channel: name, id, subject, rejections } = attempt;
        let Failure { kind, message: error } = failure;
        let (now, channel) = (self.now(), &**name);
        let rejections = rejections + u32::from(kind.limits_attempts());
        let backoff = |failures: u32| {
            let longest = BACKOFF.0.saturating_mul(2_u32.saturating_pow(failures)).min(BACKOFF.1);
            retry::around(longest, fastrand::f64())
        };
        if rejections >= MAX_REJECTIONS {
            self.outbox.remove(id);
            tracing::error!(
                channel,
                error,
                subject,
                "alert given up over {channel}: {error} ({subject})"
            );
            if let Some(state) = self.channels.get_mut(name) {
                state.counters.outcomes.add(AlertOutcome::Refused);
                state.reset_backoff();
            }
            // A one-shot event: the next message may be accepted.
            let description = format!("an alert is given up: {error}");
            let change = Change::OneShot { description, files: Vec::new() };
            self.add(channel_failed(Arc::clone(name), change));
            return;
        }
        let Some(state) = self.channels.get_mut(name) else { return };
        state.counters.outcomes.add(AlertOutcome::Failed);
        // A rejection concerns the message, every other failure the channel.
        let pause = if kind.limits_attempts() {
            let pause = backoff(rejections - 1);
            self.outbox.update(id, |message| {
                (message.rejections, message.retry_at) = (rejections, now + pause);
            });
            pause
        } else {
            let pause = backoff(state.failures);
            (state.failures, state.retry_at) = (state.failures.saturating_add(1), now + pause);
            pause
        };
        let next = pause.as_secs_f64();
        tracing::warn!(
            channel,
            error,
            subject,
            next,
            "alert not sent over {channel}: {error} ({subject})"
        );
        let failing_for = now.saturating_sub(*state.failing_since.get_or_insert(now));
        let is_failed = kind == FailureKind::ChannelBroken || failing_for >= FAILED_AFTER;
        if is_failed && !kind.limits_attempts() {
            let event = channel_failed(Arc::clone(name), Change::Begun(error));
            let at = event.at.checked_sub(failing_for).unwrap_or(event.at);
            self.add(Event { at, ..event });
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

    fn event(change: Change) -> Event {
        let at = Timestamp::now();
        Event { kind: Kind::FileMissing, subject: "file.a".into(), at, change }
    }

    fn settings() -> Settings {
        load(&format!("{MAIL}[alert]\nto = [\"mail.a\"]")).unwrap()
    }

    fn config(settings: Settings) -> DispatcherConfig {
        let counters = vec![Arc::new(ChannelCounters::new("mail.a".into()))];
        DispatcherConfig { settings, counters }
    }

    fn message() -> Message {
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
    fn task_with_message() -> DispatchTask {
        let settings = settings();
        let alert = settings.alert.clone().unwrap();
        let stop = CancellationToken::new();
        let mut task = DispatchTask::new(alert, EventSender::default(), stop);
        task.apply_config(config(settings));
        assert!(task.outbox.add(message()));
        task
    }

    #[tokio::test]
    async fn unsent_messages_remain_in_the_outbox() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings();
        settings.alert.as_mut().unwrap().state = Some(folder.path().to_owned());
        let run = async |settings: &Settings, events: Vec<Event>| {
            let mut alerts = AlertDispatcher::default();
            alerts.prepare(settings).unwrap();
            alerts.change(settings);
            for event in events {
                assert!(alerts.events().send(event));
            }
            alerts.stop();
            alerts.ended().await;
        };
        // Nothing listens at the address of the channel.
        run(&settings, vec![event(Change::Begun("gone".to_owned()))]).await;
        let outbox = || Outbox::open(folder.path()).unwrap();
        let message = outbox().next("mail.a").unwrap().clone();
        assert!(message.subject.contains("file-missing: file.a, since 20"), "{message:?}");
        assert!(message.text.ends_with(": gone\n"), "{message:?}");
        run(&settings, Vec::new()).await;
        assert_eq!(outbox().next("mail.a"), Some(&message));
        assert_eq!(outbox().len("mail.a"), 1);
    }

    #[tokio::test]
    async fn refuses_another_folder_while_running() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut settings = settings();
        settings.alert.as_mut().unwrap().state = Some(first.path().to_owned());
        let mut alerts = AlertDispatcher::default();
        alerts.prepare(&settings).unwrap();
        alerts.change(&settings);
        assert!(alerts.prepare(&settings).is_ok());
        settings.alert.as_mut().unwrap().state = Some(second.path().to_owned());
        let error = alerts.prepare(&settings).unwrap_err().to_string();
        assert!(error.starts_with("alert.state cannot change in a running daemon"), "{error}");
        alerts.stop();
        alerts.ended().await;
    }

    #[tokio::test]
    async fn bounds_the_attempts_of_rejected_and_unconfirmed_messages_only() {
        for (failure, is_bounded) in [
            (Failure::unconfirmed("late"), true),
            (Failure::rejected("no"), true),
            (Failure::transient("later"), false),
            (Failure::channel_broken("no login"), false),
        ] {
            let mut task = task_with_message();
            let mut attempts = 0;
            while let Some(Message { rejections, .. }) = task.outbox.next("mail.a").cloned() {
                let (id, subject) = ("1".to_owned(), "gone".to_owned());
                let attempt = Attempt { channel: "mail.a".into(), id, subject, rejections };
                task.finish_attempt(&attempt, Err(failure.clone()));
                attempts += 1;
                if attempts > 100 {
                    break;
                }
            }
            assert_eq!(attempts == MAX_REJECTIONS, is_bounded, "{failure}: {attempts}");
            let refused = task.channels["mail.a"].counters.outcomes.get(AlertOutcome::Refused);
            assert_eq!(refused, u64::from(is_bounded));
        }
    }

    #[tokio::test]
    async fn a_rejected_message_does_not_delay_others() {
        let mut task = task_with_message();
        assert!(task.outbox.add(Message { id: "2".to_owned(), ..message() }));
        let (id, subject) = ("1".to_owned(), "gone".to_owned());
        let attempt = Attempt { channel: "mail.a".into(), id, subject, rejections: 0 };
        task.finish_attempt(&attempt, Err(Failure::rejected("no")));
        assert_eq!(task.outbox.next("mail.a").unwrap().id, "2");
        task.send_next(&"mail.a".into(), task.now(), false);
        assert_eq!(task.attempts.len(), 1);
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
    async fn sends_nothing_twice_when_a_channel_is_removed_and_added() {
        let mut task = task_with_message();
        let name: Arc<str> = "mail.a".into();
        task.send_next(&name, Duration::ZERO, false);
        assert_eq!(task.attempts.len(), 1);
        let none = DispatcherConfig { settings: Settings::default(), counters: Vec::new() };
        task.apply_config(none);
        task.apply_config(config(settings()));
        task.send_next(&name, Duration::ZERO, false);
        assert_eq!(task.attempts.len(), 1);
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

    #[tokio::test]
    async fn starts_no_thread_without_alerts() {
        let settings = load(MAIL).unwrap();
        let mut alerts = AlertDispatcher::default();
        alerts.prepare(&settings).unwrap();
        alerts.change(&settings);
        assert!(alerts.event_loop.is_none() && alerts.counters().is_empty());
        assert!(alerts.events().send(event(Change::Ended)));
        alerts.stop();
        alerts.ended().await;
    }
}
