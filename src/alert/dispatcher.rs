//! The job of the daemon that tells the operator what happens.
//!
//! It runs on a thread and an event loop of its own: neither a dead mail server nor the disk delays a
//! service. What a channel itself fails with is logged, counted, and told over the other channels.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::alert::config::{Alert, Settings};
use crate::alert::grouping::{Hour, Incidents, Report, Withheld};
use crate::alert::outbox::{MAX_WAITING, Message, OpenError, Queue};
use crate::daemon::health::{Change, Counts, Event, Events, Kind, Outcome, Reporter};
use crate::fs::file::OpenFile;
use crate::fs::filename::escape;
use crate::http::retry;
use crate::notify::channel::{Channel, Failure, Lasting, Sent};
use crate::notify::mime;
use crate::notify::mime::{Attachment, Letter};
use crate::notify::{mail, sms};
use crate::runtime::EventLoop;
use crate::text::counted;

/// How long is waited after the first failure of a channel, and at most after the next.
const PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(15));

/// How often a message is tried that is refused, or may have been taken, for each recipient: an SMS is
/// paid for each time. With the pauses it takes three quarters of an hour.
const MAX_TRIES: u32 = 10;

/// What could not be sent for so long is not sent.
const EXPIRES: Duration = Duration::from_hours(72);

/// A channel that has sent nothing for so long has failed. Shorter is what servers do to strangers,
/// who have to come again (greylisting).
const PATIENCE: Duration = Duration::from_mins(10);

/// How often it is looked at what has expired.
const TIDY_EVERY: Duration = Duration::from_mins(1);

/// Who tells the operator.
#[derive(Debug, Default)]
pub(crate) struct Alerts {
    reporter: Reporter,
    /// None before there was anything to do.
    event_loop: Option<EventLoop>,
    job: Option<Handle>,
    counts: Vec<Arc<Counts>>,
}

/// What is said to the job.
#[derive(Debug)]
struct Handle {
    wanted: watch::Sender<Wanted>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// What the job is to do.
#[derive(Debug, Clone)]
struct Wanted {
    settings: Settings,
    /// One for each channel.
    counts: Vec<Arc<Counts>>,
}

impl Alerts {
    /// Starts the thread if it is the first time that there is something to do for it.
    ///
    /// # Errors
    /// If it cannot be had.
    pub(crate) fn prepare(&mut self, settings: &Settings) -> io::Result<()> {
        if settings.is_on() && self.event_loop.is_none() {
            self.event_loop = Some(EventLoop::start("alerts")?);
        }
        Ok(())
    }

    /// Tells what is wanted from now on, as is wanted. What waits to be sent goes on waiting.
    pub(crate) fn change(&mut self, settings: &Settings) {
        let counts = settings.channels.iter().map(|channel| {
            let before = self.counts.iter().find(|counts| counts.channel == *channel.name());
            before.map_or_else(|| Arc::new(Counts::new(Arc::clone(channel.name()))), Arc::clone)
        });
        self.counts = counts.collect();
        let wanted = Wanted { settings: settings.clone(), counts: self.counts.clone() };
        if let Some(job) = &self.job {
            job.wanted.send_replace(wanted);
        } else if let (Some(event_loop), Some(alert)) = (&self.event_loop, &settings.alert)
            && let Some(events) = self.reporter.connect()
        {
            let (sender, receiver) = watch::channel(wanted);
            let stop = CancellationToken::new();
            let job = Job::new(alert.clone(), self.reporter.clone(), stop.clone());
            let task = event_loop.handle.spawn(job.run(events, receiver));
            self.job = Some(Handle { wanted: sender, stop, task });
        }
    }

    /// Where events are handed over.
    pub(crate) fn reporter(&self) -> Reporter {
        self.reporter.clone()
    }

    /// What the channels count that are told, or have something to send.
    pub(crate) fn counts(&self) -> Vec<Arc<Counts>> {
        if self.job.is_some() { self.counts.clone() } else { Vec::new() }
    }

    /// Tells at once what there is to be told, and then ends.
    pub(crate) fn stop(&self) {
        if let Some(job) = &self.job {
            job.stop.cancel();
        }
    }

    /// Waits until that is done. What could not be sent stays in the queue.
    pub(crate) async fn ended(&mut self) {
        if let Some(job) = self.job.take() {
            // A panic of it has been logged.
            let _ = job.task.await;
        }
    }
}

/// A channel as the job has it.
#[derive(Debug)]
struct Outlet {
    channel: Channel,
    counts: Arc<Counts>,
    hour: Hour,
    /// One after the other, without a success in between.
    failures: u32,
    /// Since when.
    failing: Option<Duration>,
    /// When it is tried again.
    next: Duration,
}

impl Outlet {
    fn try_at_once(&mut self) {
        (self.failures, self.next) = (0, Duration::ZERO);
    }
}

/// A message that is on its way over a channel.
#[derive(Debug)]
struct Attempt {
    channel: Arc<str>,
    id: String,
    /// The message's subject, escaped for the log.
    subject: String,
    tries: u32,
}

/// What became of an attempt.
#[derive(Debug)]
struct Delivery {
    sent: Result<Sent, Failure>,
    /// Who is to be tried next, if not everybody once more.
    rest: Option<Vec<String>>,
}

impl From<Failure> for Delivery {
    fn from(failure: Failure) -> Self {
        Self { sent: Err(failure), rest: None }
    }
}

struct Job {
    alert: Alert,
    /// Whether anything is told by itself; if not, only what waits is sent.
    on: bool,
    reporter: Reporter,
    lost: u64,
    stop: CancellationToken,
    /// When it began, by both clocks.
    begun: (Instant, SystemTime),
    host: String,
    incidents: Incidents,
    queue: Queue,
    /// Where the queue is kept, if anywhere.
    folder: Option<PathBuf>,
    /// Whether the queue could be written the last time.
    saved: bool,
    tidied: Duration,
    outlets: BTreeMap<Arc<str>, Outlet>,
    /// One message at a time for each channel, also for one that has gone and come back meanwhile.
    under_way: BTreeSet<Arc<str>>,
    sending: JoinSet<(Attempt, Delivery)>,
}

impl Job {
    fn new(alert: Alert, reporter: Reporter, stop: CancellationToken) -> Self {
        let uname = rustix::system::uname();
        Self {
            incidents: Incidents::new(alert.policy.clone()),
            alert,
            on: true,
            reporter,
            lost: 0,
            stop,
            begun: (Instant::now(), SystemTime::now()),
            host: escape(&uname.nodename().to_string_lossy()),
            queue: Queue::default(),
            folder: None,
            saved: true,
            tidied: Duration::ZERO,
            outlets: BTreeMap::new(),
            under_way: BTreeSet::new(),
            sending: JoinSet::new(),
        }
    }

    /// How long it has run.
    fn now(&self) -> Duration {
        self.begun.0.elapsed()
    }

    /// The time of day in seconds, by a clock that nobody sets.
    fn second(&self) -> i64 {
        unix(self.begun.1 + self.now())
    }

    async fn run(mut self, mut events: Events, mut wanted: watch::Receiver<Wanted>) {
        self.folder = self.alert.folder();
        // In memory at least.
        self.queue = Self::open(self.folder.as_deref()).unwrap_or_default();
        let (now, second) = (self.now(), self.second());
        self.incidents.take_up(self.queue.incidents().clone(), now, second);
        // Whether a channel works is not seen by whoever looks at the rest.
        let seen = self.incidents.lasting().filter(|(kind, _)| *kind != Kind::ChannelFailed);
        self.reporter.resume(seen);
        let first = wanted.borrow_and_update().clone();
        self.adopt(first);
        let stop = self.stop.clone();
        loop {
            self.act(false);
            let next = self.begun.0 + self.next();
            tokio::select! {
                // Events that come after an order are told as it says.
                biased;
                changed = wanted.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let wanted = wanted.borrow_and_update().clone();
                    self.adopt(wanted);
                }
                () = stop.cancelled() => break,
                Some(Ok((attempt, delivery))) = self.sending.join_next() => {
                    self.conclude(&attempt, delivery);
                }
                Some(event) = events.recv() => self.take(event),
                () = sleep_until(next) => {}
            }
        }
        // What has been said before the order is told, too.
        while let Ok(event) = events.try_recv() {
            self.take(event);
        }
        self.act(true);
        while let Some(Ok((attempt, delivery))) = self.sending.join_next().await {
            self.conclude(&attempt, delivery);
            self.act(true);
        }
        let waiting = self.waiting();
        if waiting > 0 {
            tracing::info!(waiting, "{} left in the queue", counted(waiting, "alert"));
        }
    }

    /// Takes up the queue of a folder; without one, it is in memory.
    ///
    /// # Errors
    /// Has been said.
    fn open(folder: Option<&Path>) -> Result<Queue, OpenError> {
        let Some(folder) = folder else {
            tracing::warn!(
                "alerts that wait to be sent are lost at a restart: there is no folder for them \
                 (StateDirectory= of the unit, or `state` of [alert])"
            );
            return Ok(Queue::default());
        };
        let path = escape(&folder.to_string_lossy());
        let complain = |error: &OpenError| {
            let cause = error.to_string();
            tracing::error!(path, cause, "the queue of alerts in {path}: {cause}");
        };
        Queue::open(folder).inspect_err(complain).or_else(|error| match error {
            OpenError::Unreadable(_) => Queue::begin_anew(folder).inspect_err(complain),
            OpenError::Taken => Err(error),
        })
    }

    /// Does what is wanted from now on.
    fn adopt(&mut self, wanted: Wanted) {
        let Wanted { settings, counts } = wanted;
        self.on = settings.is_on();
        if let Some(alert) = &settings.alert {
            self.incidents.set_policy(alert.policy.clone());
            self.alert = alert.clone();
            let folder = alert.folder();
            // One that cannot be had is no reason to give up the one that is.
            if folder != self.folder
                && let Ok(queue) = Self::open(folder.as_deref())
            {
                self.folder = folder;
                let before = std::mem::replace(&mut self.queue, queue);
                if let Err(error) = self.queue.take_over(before) {
                    let cause = error.to_string();
                    tracing::error!(cause, "alerts that wait cannot be taken along: {cause}");
                }
            }
        } else {
            self.incidents = Incidents::new(self.alert.policy.clone());
        }
        let mut before = std::mem::take(&mut self.outlets);
        let now = self.second();
        for (channel, counts) in settings.channels.iter().zip(counts) {
            let name = Arc::clone(channel.name());
            let outlet = match before.remove(&name) {
                Some(before) => {
                    // Somebody may have mended it.
                    let mended = before.channel != *channel;
                    let mut outlet = Outlet { channel: channel.clone(), counts, ..before };
                    if mended {
                        outlet.try_at_once();
                    }
                    outlet
                }
                None => Outlet {
                    channel: channel.clone(),
                    counts,
                    // A clock that was set back makes no time of the future.
                    hour: Hour::new(self.queue.made(&name).into_iter().map(|at| at.min(now))),
                    failures: 0,
                    failing: None,
                    next: Duration::ZERO,
                },
            };
            self.outlets.insert(name, outlet);
        }
        // Of who is told nothing any more, nobody will see that it works again.
        let failed: Vec<_> = self.incidents.lasting().collect();
        for (kind, channel) in failed {
            let is_told = self.outlets.contains_key(&channel) && settings.is_told(&channel);
            if kind == Kind::ChannelFailed && !is_told {
                self.take(channel_failed(channel, Change::Ended));
            }
        }
        for channel in self.queue.channels() {
            let waiting = self.queue.waiting(channel);
            if !self.outlets.contains_key(channel) {
                tracing::warn!(
                    channel,
                    waiting,
                    "{channel}: no such channel any more: {} in its queue, to be given up unless \
                     the channel comes back within three days",
                    counted(waiting, "alert")
                );
            }
        }
        let told: Vec<_> =
            self.outlets.keys().filter(|name| settings.is_told(name)).map(|name| &**name).collect();
        let waiting = self.waiting();
        let to = told.join(", ");
        let queued = counted(waiting, "alert");
        if self.on {
            tracing::info!(to, waiting, "alerts to {to}; {queued} waiting");
        } else {
            tracing::info!(waiting, "no alerts any more; {queued} waiting");
        }
    }

    /// How many messages wait, for all channels.
    fn waiting(&self) -> usize {
        self.outlets.keys().map(|name| self.queue.waiting(name)).sum()
    }

    /// Takes what has happened, if anybody is to be told.
    fn take(&mut self, event: Event) {
        if self.on {
            self.incidents.add(event, self.now());
        }
    }

    /// Until when there is nothing to do.
    fn next(&self) -> Duration {
        let max = self.alert.max_per_hour;
        let outlets = self.outlets.iter().filter_map(|(name, outlet)| {
            let waits = !self.under_way.contains(name) && self.queue.waiting(name) > 0;
            waits.then_some(outlet.next)
        });
        let withheld = self.alert.to.iter().filter_map(|name| {
            let outlet = self.outlets.get(&**name)?;
            let waits = self.queue.withheld(name).count > 0
                && self.queue.waiting(name) < MAX_WAITING
                && self.on;
            let free = outlet.hour.free_at(max).saturating_sub(self.second()).max(0);
            waits.then(|| self.now() + Duration::from_secs(u64::try_from(free).unwrap_or(0)))
        });
        let tidy = self.tidied + TIDY_EVERY;
        outlets.chain(withheld).chain(self.incidents.next()).chain([tidy]).min().unwrap_or(tidy)
    }

    /// Does all that is due.
    fn act(&mut self, end: bool) {
        let now = self.now();
        if now >= self.tidied + TIDY_EVERY {
            self.tidied = now;
            self.tidy();
        }
        let report = self.incidents.due(now, end).filter(|_| self.on);
        for name in self.alert.to.clone() {
            let Some(outlet) = self.outlets.get(&*name) else { continue };
            let withheld = self.queue.withheld(&name);
            let free = outlet.hour.free_at(self.alert.max_per_hour) <= self.second();
            match report.as_ref().and_then(|report| report.over(&name)) {
                Some(report) => self.tell(&name, &report),
                // There is a place again for what was not told.
                None if withheld.count > 0 && free && self.on => {
                    self.tell(&name, &withheld.report());
                }
                None => {}
            }
        }
        let begun = self.begun.1;
        let second = |at| begun.checked_add(at).map_or(i64::MAX, unix);
        self.queue.set_incidents(self.incidents.kept(second));
        // Before anything of it is sent.
        self.save();
        for name in self.outlets.keys().cloned().collect::<Vec<_>>() {
            self.send_next(&name, now, end);
        }
        for (name, outlet) in &self.outlets {
            outlet.counts.set_queued(self.queue.waiting(name));
        }
    }

    /// Makes a message for a channel, or counts that there are too many.
    fn tell(&mut self, name: &str, report: &Report) {
        let second = self.second();
        let Some(outlet) = self.outlets.get_mut(name) else { return };
        let mut withheld = self.queue.withheld(name);
        let places = self.queue.waiting(name) < MAX_WAITING;
        if !places || !outlet.hour.take(second, self.alert.max_per_hour) {
            // What was withheld itself is still counted.
            if withheld.report() != *report {
                outlet.counts.outcomes.add(Outcome::Withheld);
                withheld.add(report);
                self.queue.set_withheld(name, withheld);
            }
            return;
        }
        let (id, files) = match &outlet.channel {
            Channel::Mail(mail) => {
                let files = if self.alert.attach { report.files.clone() } else { Vec::new() };
                (mime::new_id(&mail.from), files)
            }
            Channel::Sms(_) => (format!("{:032x}", fastrand::u128(..)), Vec::new()),
        };
        self.queue.set_made(name, outlet.hour.times().collect());
        self.queue.add(Message {
            id,
            channel: name.to_owned(),
            subject: report.subject(&self.host),
            text: report.text(&self.host, &withheld),
            // By the clock of the day, as people read it.
            date: unix(SystemTime::now()),
            files,
            to: None,
            tries: 0,
            since: self.now(),
        });
        if withheld.count > 0 {
            self.queue.set_withheld(name, Withheld::default());
        }
    }

    fn save(&mut self) {
        match self.queue.save() {
            Ok(()) => self.saved = true,
            Err(error) => {
                if std::mem::replace(&mut self.saved, false) {
                    let cause = error.to_string();
                    tracing::error!(cause, "the queue of alerts cannot be written: {cause}");
                }
            }
        }
    }

    fn send_next(&mut self, name: &Arc<str>, now: Duration, end: bool) {
        let Some(outlet) = self.outlets.get(name) else { return };
        // At the end, who does not answer is not waited for.
        if outlet.next > now || end && outlet.failures > 0 {
            return;
        }
        let Some(message) = self.queue.first(name).cloned() else { return };
        if !self.under_way.insert(Arc::clone(name)) {
            return;
        }
        let channel = outlet.channel.clone();
        let attempt = Attempt {
            channel: Arc::clone(name),
            id: message.id.clone(),
            subject: escape(&message.subject),
            tries: message.tries,
        };
        self.sending.spawn(async move {
            // Apart, so that a fault of the program ends an attempt and not the job.
            let delivery = tokio::spawn(async move { deliver(&channel, message).await }).await;
            let lost = |_| Failure::temporary("a fault of the program; see the log").into();
            (attempt, delivery.unwrap_or_else(lost))
        });
    }

    /// A message was sent, or not.
    fn conclude(&mut self, attempt: &Attempt, Delivery { sent, rest }: Delivery) {
        self.under_way.remove(&attempt.channel);
        match sent {
            Ok(sent) => self.conclude_sent(attempt, sent, rest),
            Err(failure) => self.conclude_failed(attempt, failure, rest),
        }
        self.save();
    }

    fn conclude_sent(
        &mut self,
        attempt: &Attempt,
        Sent { ids, refused }: Sent,
        rest: Option<Vec<String>>,
    ) {
        let Attempt { channel: name, id, subject, .. } = attempt;
        let (channel, ids) = (&**name, ids.join(" "));
        tracing::info!(channel, id = ids, subject, "alert sent over {channel}: {subject}");
        let (never, later): (Vec<_>, Vec<_>) =
            refused.into_iter().partition(|(_, failure)| failure.lasting.is_bounded());
        for (to, failure) in never {
            let error = failure.words;
            tracing::error!(channel, to, error, "{channel}: {to} is refused: {error}");
        }
        if !later.is_empty() {
            return self.conclude_failed(attempt, Failure::of_all(&later), rest);
        }
        let is_whole = rest.is_none();
        match rest {
            None => self.queue.remove(name, id),
            Some(rest) => self.queue.go_on(name, id, rest),
        }
        // The channel may be gone, and may come back.
        let Some(outlet) = self.outlets.get_mut(name) else { return };
        outlet.try_at_once();
        outlet.failing = None;
        if is_whole {
            outlet.counts.outcomes.add(Outcome::Sent);
            self.take(channel_failed(Arc::clone(name), Change::Ended));
        }
    }

    fn conclude_failed(
        &mut self,
        Attempt { channel: name, id, subject, tries }: &Attempt,
        Failure { lasting, words: error }: Failure,
        rest: Option<Vec<String>>,
    ) {
        let now = self.now();
        let channel = &**name;
        let tries = if lasting.is_bounded() { tries.saturating_add(1) } else { *tries };
        let recipients = rest.as_ref().map_or(1, Vec::len).try_into().unwrap_or(u32::MAX);
        let given_up = tries >= MAX_TRIES.saturating_mul(recipients);
        if given_up {
            self.queue.remove(name, id);
        } else {
            self.queue.put_back(name, id, rest, tries);
        }
        let Some(outlet) = self.outlets.get_mut(name) else { return };
        if given_up {
            outlet.counts.outcomes.add(Outcome::Refused);
            let message = format_args!("alert given up over {channel}: {error} ({subject})");
            tracing::error!(channel, error, subject, "{message}");
            // This is about that message, and says nothing of the next.
            outlet.try_at_once();
        } else {
            outlet.counts.outcomes.add(Outcome::Failed);
            let pause = PAUSE.0.saturating_mul(2_u32.saturating_pow(outlet.failures)).min(PAUSE.1);
            let pause = retry::around(pause, fastrand::f64());
            outlet.failures = outlet.failures.saturating_add(1);
            outlet.next = now + pause;
            let next = pause.as_secs_f64();
            let message = format_args!("alert not sent over {channel}: {error} ({subject})");
            tracing::warn!(channel, error, subject, next, "{message}");
        }
        let failing_for = now.saturating_sub(*outlet.failing.get_or_insert(now));
        if given_up {
            // The next message may be taken: this has no end.
            let what = format!("an alert is given up: {error}");
            let change = Change::Happened { what, files: Vec::new() };
            self.take(channel_failed(Arc::clone(name), change));
        } else if !lasting.is_bounded() && (lasting == Lasting::Unusable || failing_for >= PATIENCE)
        {
            let event = channel_failed(Arc::clone(name), Change::Begun(error));
            let since = event.at.checked_sub(failing_for).unwrap_or(event.at);
            self.take(Event { at: since, ..event });
        }
    }

    /// Gives up what has become old, and says what was lost.
    fn tidy(&mut self) {
        let oldest = self.now().saturating_sub(EXPIRES);
        for message in self.queue.expire(oldest) {
            if let Some(outlet) = self.outlets.get(&*message.channel) {
                outlet.counts.outcomes.add(Outcome::Expired);
            }
            let (channel, subject) = (message.channel, escape(&message.subject));
            tracing::error!(channel, subject, "alert given up, it could not be sent: {subject}");
        }
        let lost = self.reporter.lost();
        let more = lost - std::mem::replace(&mut self.lost, lost);
        if more > 0 {
            let events = counted(more, "event");
            tracing::warn!(events = more, "too many alerts at once: {events} delayed or lost");
        }
    }
}

/// What becomes of a channel at this moment.
fn channel_failed(subject: Arc<str>, change: Change) -> Event {
    Event { kind: Kind::ChannelFailed, subject, at: Timestamp::now(), change }
}

fn unix(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Sends a message over a channel.
async fn deliver(channel: &Channel, message: Message) -> Delivery {
    match channel {
        Channel::Mail(mail) => deliver_mail(mail, message).await,
        Channel::Sms(sms) => deliver_sms(sms, message).await,
    }
}

/// Sends an SMS to the first who has not got it. So it is noted who has before the next is asked for,
/// and nobody pays twice for a restart.
async fn deliver_sms(sms: &sms::Settings, message: Message) -> Delivery {
    let is_first = message.to.is_none();
    let all = || sms.to.iter().map(ToString::to_string).collect();
    let mut rest: VecDeque<_> = message.to.unwrap_or_else(all).into();
    let Some(first) = rest.pop_front() else {
        return Failure::refused("there is no number").into();
    };
    let number = match sms::Number::from_str(&first) {
        Ok(number) => number,
        Err(problem) => return Failure::refused(problem).into(),
    };
    let sent = sms.send(&[number], &sms.shorten(&message.text)).await;
    // As long as nobody has got it, it is for whoever the configuration says.
    if sent.is_err() && !(is_first && rest.is_empty()) {
        // The others come before it is tried again.
        rest.push_back(first);
    }
    Delivery { sent, rest: Some(rest.into()).filter(|rest: &Vec<_>| !rest.is_empty()) }
}

async fn deliver_mail(mail: &mail::Settings, message: Message) -> Delivery {
    let Message { id, subject, mut text, date, files, to, .. } = message;
    let max = mail.max_attachment;
    let attach = tokio::task::spawn_blocking(move || attachments(&files, max));
    let (attachments, not_attached) = match attach.await {
        Ok(attached) => attached,
        Err(error) => return Failure::temporary(error.to_string()).into(),
    };
    for problem in not_attached {
        text.push_str("\nNot attached: ");
        text.push_str(&problem);
    }
    let attached = attachments.len();
    let date = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(date).unwrap_or(0));
    let letter = |text: &str, attachments| {
        let mail::Settings { from, to, .. } = mail;
        let id = &id;
        mime::compose(Letter {
            from,
            to,
            subject: &subject,
            text,
            attachments,
            id,
            date,
            automatic: true,
        })
    };
    let attempt = async |composed: Result<Vec<u8>, String>| {
        let composed = composed.map_err(Failure::refused)?;
        let to: Vec<_> = match &to {
            Some(rest) => rest.iter().map(|to| to.parse()).collect::<Result<_, _>>(),
            None => Ok(mail.to.iter().map(|to| to.address.clone()).collect()),
        }
        .map_err(Failure::refused)?;
        mail.send(&id, &to, &composed).await
    };
    let mut sent = attempt(letter(&text, attachments)).await;
    if let Err(Failure { lasting: Lasting::Refused, words }) = &sent
        && attached > 0
    {
        // What happened is told, rather than nothing.
        let files = counted(attached, "file");
        let _ = write!(text, "\nNot attached: {files}, which the server refuses: {words}");
        sent = attempt(letter(&text, Vec::new())).await;
    }
    let refused = sent.iter().flat_map(|sent| &sent.refused);
    let later = refused.filter(|(_, failure)| !failure.lasting.is_bounded());
    let later: Vec<_> = later.map(|(to, _)| to.clone()).collect();
    Delivery { sent, rest: Some(later).filter(|later| !later.is_empty()) }
}

/// The files, as far as they fit, and what is wrong with the others.
fn attachments(files: &[PathBuf], max: u64) -> (Vec<Attachment>, Vec<String>) {
    let (mut attachments, mut problems) = (Vec::new(), Vec::new());
    let mut left = max;
    for path in files {
        match attachment(path, left) {
            Ok(attachment) => {
                left = left.saturating_sub(attachment.content.len() as u64);
                attachments.push(attachment);
            }
            Err(problem) => {
                let name = path.file_name().unwrap_or(path.as_os_str());
                problems.push(format!("{}: {problem}", escape(&name.to_string_lossy())));
            }
        }
    }
    (attachments, problems)
}

fn attachment(path: &Path, left: u64) -> Result<Attachment, String> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or("its name is not UTF-8")?;
    mime::attachment_name(name)?;
    let file = OpenFile::open(path).map_err(|error| error.to_string())?;
    if file.stamp.size > left {
        return Err("with the others it is larger than max-attachment".to_owned());
    }
    let mut content = Vec::new();
    file.into_file().take(left).read_to_end(&mut content).map_err(|error| error.to_string())?;
    Ok(Attachment { name: name.to_owned(), content })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::alert::config::tests::{MAIL, load};

    fn event(change: Change) -> Event {
        let at = Timestamp::now();
        Event { kind: Kind::FileMissing, subject: "file.a".into(), at, change }
    }

    #[tokio::test]
    async fn what_nobody_takes_stays_in_the_queue_for_the_next_time() {
        let folder = tempfile::tempdir().unwrap();
        // Nobody answers there.
        let mut settings = load(&format!("{MAIL}[alert]\nto = [\"mail.a\"]")).unwrap();
        let Some(alert) = &mut settings.alert else { panic!() };
        alert.state = Some(folder.path().to_owned());
        let run = async |settings: &Settings, events: Vec<Event>| {
            let mut alerts = Alerts::default();
            alerts.prepare(settings).unwrap();
            alerts.change(settings);
            for event in events {
                assert!(alerts.reporter().report(event));
            }
            alerts.stop();
            alerts.ended().await;
            alerts.counts().iter().map(|counts| counts.queued()).sum::<u64>()
        };
        run(&settings, vec![event(Change::Begun("gone".to_owned()))]).await;
        let kept = || Queue::open(folder.path()).unwrap();
        let message = kept().first("mail.a").unwrap().clone();
        assert!(message.subject.contains("file-missing: file.a, since 20"), "{message:?}");
        assert!(message.text.ends_with(": gone\n"), "{message:?}");
        // It is the same afterwards, and under a configuration that tells of nothing.
        run(&settings, Vec::new()).await;
        assert_eq!(kept().first("mail.a"), Some(&message));
        assert_eq!(kept().waiting("mail.a"), 1);
    }

    /// One whose channel has this message under way.
    fn job_with(message: Message) -> Job {
        let settings = load(&format!("{MAIL}[alert]\nto = [\"mail.a\"]")).unwrap();
        let alert = settings.alert.clone().unwrap();
        let mut job = Job::new(alert, Reporter::default(), CancellationToken::new());
        let counts = vec![Arc::new(Counts::new("mail.a".into()))];
        job.adopt(Wanted { settings, counts });
        assert!(job.queue.add(message));
        job
    }

    fn message() -> Message {
        Message {
            id: "1".to_owned(),
            channel: "mail.a".to_owned(),
            subject: "gone".to_owned(),
            text: "gone".to_owned(),
            date: 0,
            files: Vec::new(),
            to: None,
            tries: 0,
            since: Duration::ZERO,
        }
    }

    #[tokio::test]
    async fn what_may_have_been_taken_or_is_refused_is_tried_a_few_times_and_what_may_pass_always()
    {
        for (failure, bounded) in [
            (Failure::doubtful("late"), true),
            (Failure::refused("no"), true),
            (Failure::temporary("later"), false),
            (Failure::unusable("no login"), false),
        ] {
            let mut job = job_with(message());
            let mut times = 0;
            while let Some(Message { tries, .. }) = job.queue.first("mail.a").cloned() {
                let attempt = Attempt {
                    channel: "mail.a".into(),
                    id: "1".to_owned(),
                    subject: "gone".to_owned(),
                    tries,
                };
                job.conclude(&attempt, failure.clone().into());
                times += 1;
                if times > 100 {
                    break;
                }
            }
            assert_eq!(times == MAX_TRIES, bounded, "{failure}: {times}");
            let given_up = job.outlets["mail.a"].counts.outcomes.get(Outcome::Refused);
            assert_eq!(given_up, u64::from(bounded));
        }
    }

    #[tokio::test]
    async fn what_was_written_when_the_clock_was_wrong_is_no_older_for_that() {
        let mut job = job_with(message());
        job.tidy();
        assert_eq!(job.queue.waiting("mail.a"), 1);
        job.begun.0 -= EXPIRES + TIDY_EVERY;
        job.tidy();
        assert_eq!(job.queue.waiting("mail.a"), 0);
    }

    #[tokio::test]
    async fn a_channel_that_goes_and_comes_back_meanwhile_sends_nothing_twice() {
        let mut job = job_with(message());
        let name: Arc<str> = "mail.a".into();
        job.send_next(&name, Duration::ZERO, false);
        assert_eq!(job.sending.len(), 1);
        let settings = load(&format!("{MAIL}[alert]\nto = [\"mail.a\"]")).unwrap();
        let counts = vec![Arc::new(Counts::new("mail.a".into()))];
        job.adopt(Wanted { settings: Settings::default(), counts: Vec::new() });
        job.adopt(Wanted { settings, counts });
        job.send_next(&name, Duration::ZERO, false);
        assert_eq!(job.sending.len(), 1);
    }

    #[tokio::test]
    async fn a_channel_that_is_told_nothing_any_more_does_not_wake_it() {
        let mut job = job_with(message());
        let mut withheld = Withheld::default();
        withheld.add(&Report::default());
        job.queue.remove("mail.a", "1");
        job.queue.set_withheld("mail.a", withheld);
        assert_eq!(job.next().as_secs(), 0);
        job.alert.to = Vec::new();
        assert!(job.next() > Duration::from_secs(10));
    }

    #[tokio::test]
    async fn every_recipient_has_its_attempts_before_a_message_is_given_up() {
        let mut job = job_with(message());
        let rest = Some(vec!["a".to_owned(), "b".to_owned(), "c".to_owned()]);
        let mut times = 0;
        while let Some(Message { tries, .. }) = job.queue.first("mail.a").cloned() {
            let attempt = Attempt {
                channel: "mail.a".into(),
                id: "1".to_owned(),
                subject: "gone".to_owned(),
                tries,
            };
            let failed = Delivery { sent: Err(Failure::refused("no")), rest: rest.clone() };
            job.conclude(&attempt, failed);
            times += 1;
        }
        assert_eq!(times, 3 * MAX_TRIES);
        // What is told of it has no end to wait for.
        assert_eq!(job.incidents.lasting().count(), 0);
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_had_takes_nothing_from_the_one_that_is() {
        let (had, taken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut job = job_with(message());
        job.folder = Some(had.path().to_owned());
        let mut queue = Queue::open(had.path()).unwrap();
        assert!(queue.add(message()));
        queue.save().unwrap();
        job.queue = queue;
        let _other = Queue::open(taken.path()).unwrap();
        let mut settings = load(&format!("{MAIL}[alert]\nto = [\"mail.a\"]")).unwrap();
        let Some(alert) = &mut settings.alert else { panic!() };
        alert.state = Some(taken.path().to_owned());
        job.adopt(Wanted { settings, counts: vec![Arc::new(Counts::new("mail.a".into()))] });
        assert_eq!((job.queue.waiting("mail.a"), job.folder), (1, Some(had.path().to_owned())));
        drop(job.queue);
        assert_eq!(Queue::open(had.path()).unwrap().waiting("mail.a"), 1);
    }

    #[tokio::test]
    async fn the_failure_of_a_channel_that_is_told_nothing_any_more_is_over() {
        let mut job = job_with(message());
        for gone in ["mail.gone", "mail.a"] {
            job.take(channel_failed(gone.into(), Change::Begun("no login".to_owned())));
        }
        let settings = load(&format!("{MAIL}[alert]\nto = [\"mail.a\"]")).unwrap();
        job.adopt(Wanted { settings, counts: vec![Arc::new(Counts::new("mail.a".into()))] });
        let lasting: Vec<_> = job.incidents.lasting().collect();
        assert_eq!(lasting, [(Kind::ChannelFailed, "mail.a".into())]);
    }

    #[tokio::test]
    async fn who_tells_nobody_needs_no_thread() {
        let settings = load(MAIL).unwrap();
        let mut alerts = Alerts::default();
        alerts.prepare(&settings).unwrap();
        alerts.change(&settings);
        assert!(alerts.event_loop.is_none() && alerts.counts().is_empty());
        assert!(alerts.reporter().report(event(Change::Ended)));
        alerts.stop();
        alerts.ended().await;
    }

    #[test]
    fn files_are_attached_as_far_as_they_fit() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            path
        };
        let files = [file("a", "1234"), file("b", "12345"), file("c", ""), folder.path().into()];
        let (attached, problems) = attachments(&files, 8);
        let names: Vec<_> = attached.iter().map(|attachment| &*attachment.name).collect();
        assert_eq!(names, ["a", "c"]);
        assert_eq!(problems[0], "b: with the others it is larger than max-attachment");
        assert_eq!(problems.len(), 2);
    }
}
