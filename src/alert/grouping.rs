//! Groups events into notifications and decides when they are due.
//!
//! Events within `wait` of the first are reported together. A condition that persists is reported
//! again every `repeat`, and its end once. Pure arithmetic: times are durations since any fixed moment.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::fs::filename::escape;
use crate::telemetry::counters::Label;
use crate::telemetry::event::{Change, Event, Kind};
use crate::text::{agree, counted};

/// Maximum number of lines per notification; the rest is counted.
const MAX_LINES: usize = 50;

/// Maximum number of one-shot events and of attached files per notification.
const MAX_ONE_SHOTS: usize = 100;

/// Maximum length of a line, in characters.
const MAX_LINE: usize = 300;

/// Maximum length of a subject, in characters.
const MAX_SUBJECT: usize = 150;

const HOUR_SECONDS: i64 = 3600;

/// The keys of `[alert]` that decide about notifications.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) on: BTreeSet<Kind>,
    pub(crate) wait: Duration,
    pub(crate) repeat: Duration,
}

#[derive(Debug)]
struct Incident {
    description: String,
    since: Timestamp,
    /// `None` while the condition persists.
    until: Option<Timestamp>,
    /// To be reported with the current group.
    is_pending: bool,
    /// Time of the next report, once the beginning was reported.
    repeat_at: Option<Duration>,
}

#[derive(Debug)]
struct OneShotEvent {
    kind: Kind,
    subject: Arc<str>,
    at: Timestamp,
    description: String,
    files: Vec<PathBuf>,
}

/// Open incidents and the group of events to report next.
#[derive(Debug)]
pub(crate) struct AlertGrouper {
    policy: Policy,
    incidents: BTreeMap<(Kind, Arc<str>), Incident>,
    one_shots: Vec<OneShotEvent>,
    /// Number of one-shot events above [`MAX_ONE_SHOTS`].
    excess: u64,
    /// Time at which the current group is reported.
    group_due: Option<Duration>,
}

impl AlertGrouper {
    pub(crate) fn new(policy: Policy) -> Self {
        let (incidents, one_shots) = (BTreeMap::new(), Vec::new());
        Self { policy, incidents, one_shots, excess: 0, group_due: None }
    }

    /// Changes the policy and keeps the incidents of the kinds that are still reported.
    pub(crate) fn set_policy(&mut self, policy: Policy) {
        self.incidents.retain(|(kind, _), _| policy.on.contains(kind));
        self.one_shots.retain(|event| policy.on.contains(&event.kind));
        self.policy = policy;
    }

    pub(crate) fn add(&mut self, event: Event, now: Duration) {
        let Event { kind, subject, at, change } = event;
        if !self.policy.on.contains(&kind) {
            return;
        }
        let is_news = match change {
            Change::OneShot { description, files } => {
                if self.one_shots.len() < MAX_ONE_SHOTS {
                    self.one_shots.push(OneShotEvent { kind, subject, at, description, files });
                } else {
                    self.excess += 1;
                }
                true
            }
            Change::Begun(description) => self.begin((kind, subject), at, description),
            Change::Ended => self.end(&(kind, subject), at),
        };
        if is_news && self.group_due.is_none() {
            self.group_due = Some(now.saturating_add(self.policy.wait));
        }
    }

    /// Returns whether the condition is new. The description of a known one is updated for its
    /// next report.
    fn begin(&mut self, key: (Kind, Arc<str>), at: Timestamp, description: String) -> bool {
        match self.incidents.get_mut(&key) {
            Some(known) if known.until.is_none() => {
                known.description = description;
                false
            }
            _ => {
                let incident = Incident {
                    description,
                    since: at,
                    until: None,
                    is_pending: true,
                    repeat_at: None,
                };
                self.incidents.insert(key, incident);
                true
            }
        }
    }

    /// Returns whether the condition was known.
    fn end(&mut self, key: &(Kind, Arc<str>), at: Timestamp) -> bool {
        let Some(incident) = self.incidents.get_mut(key) else { return false };
        if incident.until.is_some() {
            return false;
        }
        (incident.until, incident.is_pending) = (Some(at), true);
        true
    }

    /// Returns the time of the next notification.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        let persisting = self.incidents.values().filter(|it| it.until.is_none() && !it.is_pending);
        persisting.filter_map(|incident| incident.repeat_at).chain(self.group_due).min()
    }

    /// Returns the persisting conditions.
    pub(crate) fn open(&self) -> impl Iterator<Item = &(Kind, Arc<str>)> {
        self.incidents.iter().filter(|(_, it)| it.until.is_none()).map(|(key, _)| key)
    }

    /// Returns the notification due at `now`. On shutdown, `flush` reports a group before its time.
    pub(crate) fn take_due(&mut self, now: Duration, flush: bool) -> Option<Notification> {
        let group_is_due = self.group_due.is_some_and(|due| due <= now || flush);
        let mut notification = Notification::default();
        for ((kind, subject), incident) in &mut self.incidents {
            let is_pending = group_is_due && std::mem::take(&mut incident.is_pending);
            let is_repeated =
                incident.until.is_none() && incident.repeat_at.is_some_and(|at| at <= now);
            let since = display_time(incident.since);
            let (prefix, period) = match incident.until {
                Some(until) if is_pending => {
                    let duration = display_duration(until.duration_since(incident.since));
                    ("over: ", format!("since {since}, until {} ({duration})", display_time(until)))
                }
                None if is_pending => ("", format!("since {since}")),
                None if is_repeated => ("still: ", format!("since {since}")),
                _ => continue,
            };
            incident.repeat_at = Some(now.saturating_add(self.policy.repeat));
            let name = format!("{prefix}{}: {subject}", kind.name());
            let line = format!("{name}, {period}: {}", escape(&incident.description));
            let channel = (*kind == Kind::ChannelFailed).then(|| Arc::clone(subject));
            notification.add(format!("{name}, since {since}"), &line, channel);
        }
        self.incidents.retain(|_, incident| incident.until.is_none() || incident.is_pending);
        if group_is_due {
            self.group_due = None;
            for event in std::mem::take(&mut self.one_shots) {
                notification.add_one_shot(event);
            }
            notification.excess = std::mem::take(&mut self.excess);
            notification.files.truncate(MAX_ONE_SHOTS);
        }
        (!notification.is_empty()).then_some(notification)
    }
}

/// The content of one message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Notification {
    entries: Vec<Entry>,
    /// Events that are only counted.
    excess: u64,
    /// Files to attach to a mail.
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    subject: String,
    line: String,
    /// The failed channel, over which this entry is not sent.
    channel: Option<Arc<str>>,
}

impl Notification {
    fn add(&mut self, subject: String, line: &str, channel: Option<Arc<str>>) {
        self.entries.push(Entry { subject, line: shorten(line, MAX_LINE), channel });
    }

    fn add_one_shot(&mut self, event: OneShotEvent) {
        let OneShotEvent { kind, subject, at, description, files } = event;
        let name = format!("{}: {subject}, at {}", kind.name(), display_time(at));
        let line = format!("{name}: {}", escape(&description));
        self.add(name, &line, (kind == Kind::ChannelFailed).then_some(subject));
        self.files.extend(files);
    }

    /// Returns a notification that messages were suppressed.
    pub(crate) fn of_suppressed(count: u64) -> Self {
        let mut notification = Self::default();
        let line = format!("{} withheld (max-per-hour)", counted(count, "message"));
        notification.add(line.clone(), &line, None);
        notification
    }

    fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.excess == 0
    }

    /// Returns the notification without entries about the failure of `channel` itself.
    pub(crate) fn for_channel(&self, channel: &str) -> Option<Self> {
        let mut notification = self.clone();
        notification.entries.retain(|entry| entry.channel.as_deref() != Some(channel));
        (!notification.is_empty()).then_some(notification)
    }

    fn lines(&self) -> Vec<String> {
        let lines = self.entries.iter().map(|entry| &entry.line).take(MAX_LINES);
        let more = self.excess + self.entries.len().saturating_sub(MAX_LINES) as u64;
        let more = (more > 0).then(|| format!("and {more} more"));
        lines.cloned().chain(more).collect()
    }

    pub(crate) fn subject(&self, host: &str) -> String {
        let first = self.entries.first().map_or("", |entry| &entry.subject);
        let others = self.entries.len().saturating_sub(1);
        let more = if others > 0 { format!(" and {others} more") } else { String::new() };
        format!("{}{more}", shorten(&format!("{host}: {first}"), MAX_SUBJECT))
    }

    /// Returns the text of a message; `suppressed` messages preceded it.
    pub(crate) fn text(&self, host: &str, suppressed: u64) -> String {
        let mut text = format!("{host}: {}\n", self.lines().join("\n"));
        if suppressed > 0 {
            let (messages, were) =
                (counted(suppressed, "message"), agree(suppressed, "was", "were"));
            text.push_str(&format!(
                "\n{messages} {were} withheld before this one (max-per-hour)\n"
            ));
        }
        text
    }
}

/// Times of the messages of a channel in the last hour, in seconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HourlyLimit(VecDeque<i64>);

impl HourlyLimit {
    pub(crate) fn new(times: impl IntoIterator<Item = i64>) -> Self {
        Self(times.into_iter().collect())
    }

    pub(crate) fn times(&self) -> impl Iterator<Item = i64> {
        self.0.iter().copied()
    }

    /// Records a message at `now`, unless there were `max` in the last hour.
    pub(crate) fn try_acquire(&mut self, now: i64, max: usize) -> bool {
        while self.0.front().is_some_and(|at| *at <= now - HOUR_SECONDS) {
            self.0.pop_front();
        }
        let is_free = self.0.len() < max;
        if is_free {
            self.0.push_back(now);
        }
        is_free
    }

    /// Returns the time from which a message is allowed.
    pub(crate) fn free_at(&self, max: usize) -> i64 {
        let last = self.0.len().checked_sub(max).and_then(|index| self.0.get(index));
        last.map_or(i64::MIN, |at| at.saturating_add(HOUR_SECONDS))
    }
}

fn shorten(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", text.split_at(end).0),
    }
}

fn display_time(at: Timestamp) -> String {
    at.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S %:z").to_string()
}

fn display_duration(duration: SignedDuration) -> String {
    format!("{:#}", SignedDuration::from_secs(duration.as_secs().max(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WAIT: u64 = 30;

    fn policy() -> Policy {
        let on = Kind::NAMED.iter().map(|(kind, _)| *kind).collect();
        Policy { on, wait: Duration::from_secs(WAIT), repeat: Duration::from_hours(4) }
    }

    fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    fn event(subject: &str, second: u64, change: Change) -> Event {
        let at = Timestamp::from_second(1_800_000_000 + i64::try_from(second).unwrap()).unwrap();
        Event { kind: Kind::FileMissing, subject: subject.into(), at, change }
    }

    /// Returns the subjects without times.
    fn subjects(notification: &Notification) -> Vec<String> {
        let subject = |entry: &Entry| entry.subject.split_once(", ").unwrap().0.to_owned();
        notification.entries.iter().map(subject).collect()
    }

    /// A grouper with a clock.
    struct Clocked {
        grouper: AlertGrouper,
        now: u64,
        /// Times with the subjects of their notification.
        messages: Vec<(u64, Vec<String>)>,
    }

    impl Clocked {
        fn new() -> Self {
            Self { grouper: AlertGrouper::new(policy()), now: 0, messages: Vec::new() }
        }

        fn until(&mut self, second: u64) {
            while let Some(next) = self.grouper.next_due().filter(|next| *next <= at(second)) {
                self.now = self.now.max(next.as_secs());
                if let Some(notification) = self.grouper.take_due(at(self.now), false) {
                    self.messages.push((self.now, subjects(&notification)));
                }
            }
            self.now = second;
        }

        fn begin(&mut self, subject: &str) {
            let change = Change::Begun("gone".to_owned());
            self.grouper.add(event(subject, self.now, change), at(self.now));
        }

        fn end(&mut self, subject: &str) {
            self.grouper.add(event(subject, self.now, Change::Ended), at(self.now));
        }

        fn take(&mut self) -> Vec<(u64, Vec<String>)> {
            std::mem::take(&mut self.messages)
        }
    }

    fn one(second: u64, text: &str) -> (u64, Vec<String>) {
        (second, vec![text.to_owned()])
    }

    #[test]
    fn reports_a_condition_within_wait_and_its_end_once() {
        let mut clocked = Clocked::new();
        clocked.begin("a");
        clocked.begin("a");
        clocked.until(100);
        assert_eq!(clocked.take(), [one(WAIT, "file-missing: a")]);
        clocked.end("a");
        clocked.end("a");
        clocked.end("b");
        clocked.until(100_000);
        assert_eq!(clocked.take(), [one(100 + WAIT, "over: file-missing: a")]);
        assert!(clocked.grouper.take_due(at(100_000), false).is_none());
        assert!(clocked.grouper.incidents.is_empty());
    }

    #[test]
    fn groups_events_within_wait() {
        let mut clocked = Clocked::new();
        clocked.begin("a");
        clocked.until(10);
        clocked.begin("b");
        clocked.end("a");
        clocked.until(29);
        let change =
            Change::OneShot { description: "2 new".to_owned(), files: vec!["/x/y".into()] };
        let happened = Event { kind: Kind::MirrorUpdated, ..event("m", 29, change) };
        clocked.grouper.add(happened, at(29));
        let notification = clocked.grouper.take_due(at(WAIT), false).unwrap();
        assert_eq!(
            subjects(&notification),
            ["over: file-missing: a", "file-missing: b", "mirror-updated: m"]
        );
        assert_eq!(notification.files, [PathBuf::from("/x/y")]);
        let subject = notification.subject("host");
        assert!(subject.starts_with("host: over: file-missing: a, since 2027-01-15 "), "{subject}");
        assert!(subject.ends_with(" and 2 more"), "{subject}");
        let text = notification.text("host", 0);
        assert!(text.starts_with("host: over: file-missing: a, since 2027-01-15 "), "{text}");
        assert!(text.contains("(10s): gone\nfile-missing: b, since "), "{text}");
    }

    #[test]
    fn repeats_persisting_conditions() {
        let mut clocked = Clocked::new();
        clocked.begin("a");
        clocked.until(9 * 3600);
        let four_hours = 4 * 3600;
        assert_eq!(
            clocked.take(),
            [
                one(WAIT, "file-missing: a"),
                one(WAIT + four_hours, "still: file-missing: a"),
                one(WAIT + 2 * four_hours, "still: file-missing: a"),
            ]
        );
    }

    #[test]
    fn repeats_with_the_latest_description() {
        let mut clocked = Clocked::new();
        clocked.begin("a");
        clocked.until(100);
        clocked.grouper.add(event("a", 100, Change::Begun("forbidden".to_owned())), at(100));
        let notification = clocked.grouper.take_due(at(WAIT + 4 * 3600), false).unwrap();
        assert_eq!(subjects(&notification), ["still: file-missing: a"]);
        assert!(notification.lines()[0].ends_with(": forbidden"), "{notification:?}");
    }

    #[test]
    fn flushes_the_group_on_shutdown() {
        let mut clocked = Clocked::new();
        clocked.begin("a");
        assert!(clocked.grouper.take_due(at(1), false).is_none());
        assert!(clocked.grouper.take_due(at(1), true).is_some());
        assert!(clocked.grouper.take_due(at(1), true).is_none());
    }

    #[test]
    fn reports_a_failed_channel_over_the_others() {
        let mut grouper = AlertGrouper::new(policy());
        let begun = |subject, kind| Event {
            kind,
            ..event(subject, 0, Change::Begun("the login is refused".to_owned()))
        };
        grouper.add(begun("mail.ops", Kind::ChannelFailed), at(0));
        let notification = grouper.take_due(at(WAIT), false).unwrap();
        assert_eq!(notification.for_channel("mail.ops"), None);
        assert_eq!(
            subjects(&notification.for_channel("sms.ops").unwrap()),
            ["channel-failed: mail.ops"]
        );
        // A file of the same name is reported over every channel.
        grouper.add(begun("mail.ops", Kind::FileMissing), at(WAIT));
        let notification = grouper.take_due(at(2 * WAIT), false).unwrap();
        assert_eq!(
            subjects(&notification.for_channel("mail.ops").unwrap()),
            ["file-missing: mail.ops"]
        );
    }

    #[test]
    fn reports_only_configured_kinds() {
        let mut clocked = Clocked::new();
        clocked.begin("a");
        clocked.grouper.set_policy(Policy { on: BTreeSet::from([Kind::Overloaded]), ..policy() });
        clocked.begin("b");
        clocked.until(1000);
        assert!(clocked.take().is_empty());
    }

    #[test]
    fn bounds_messages_and_their_lines() {
        let mut clocked = Clocked::new();
        for number in 0..10_000 {
            let what = format!("gone\r\n{}", "x".repeat(5000));
            clocked.grouper.add(event(&number.to_string(), 0, Change::Begun(what)), at(0));
            let change =
                Change::OneShot { description: "new".to_owned(), files: vec!["x".into(); 100] };
            clocked.grouper.add(event("m", 0, change), at(0));
        }
        let notification = clocked.grouper.take_due(at(WAIT), false).unwrap();
        assert_eq!(notification.lines().len(), MAX_LINES + 1);
        assert!(notification.files.len() <= MAX_ONE_SHOTS);
        assert!(notification.lines().iter().all(|line| !line.contains(['\r', '\n'])));
        assert!(notification.text("host", 0).len() < 200_000);
        assert!(notification.subject("host").chars().count() < MAX_SUBJECT + 20);
    }

    #[test]
    fn limits_messages_per_hour() {
        let mut hour = HourlyLimit::default();
        let taken = (0..100).filter(|minute| hour.try_acquire(minute * 60, 10)).count();
        assert_eq!(taken, 20);
        assert_eq!(hour.free_at(10), 3600 + 3600);
        assert_eq!(HourlyLimit::default().free_at(1), i64::MIN);
    }

    proptest! {
        #[test]
        fn the_last_report_is_right_and_reports_are_few(
            steps in prop::collection::vec((0_u64..200, 0_usize..3, any::<bool>()), 1..200),
        ) {
            let mut clocked = Clocked::new();
            let subjects = ["a", "b", "c"];
            let mut lasts = [false; 3];
            let mut now = 0;
            for (pause, subject, begins) in steps {
                now += pause;
                clocked.until(now);
                if begins { clocked.begin(subjects[subject]) } else { clocked.end(subjects[subject]) }
                lasts[subject] = begins;
            }
            clocked.until(now + 3 * 3600);
            let times: Vec<_> = clocked.messages.iter().map(|(at, _)| *at).collect();
            for (subject, lasts) in subjects.iter().zip(lasts) {
                let name = format!("file-missing: {subject}");
                let of_it = |line: &&String| line.ends_with(&name);
                let last = clocked.messages.iter().flat_map(|(_, lines)| lines).rfind(of_it);
                let last = last.map(|line| !line.starts_with("over: "));
                prop_assert_eq!(last.unwrap_or_default(), lasts);
            }
            // Groups do not overlap.
            prop_assert!(times.len() as u64 <= 3 + 2 * (now / WAIT + 3));
        }
    }
}
