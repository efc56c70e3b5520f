//! What of all that happens is told, and when: grouped, damped, repeated, bounded.
//!
//! Only arithmetic on times, which count from any beginning. What happens within `wait` is told in one
//! message. What lasts is told again after `repeat`, and its end once. What comes and goes is told to
//! do so, and then only when it stays one way. A restart changes nothing of what is told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::daemon::health::{Change, Event, Kind};
use crate::fs::filename::escape;
use crate::telemetry::counters::Label;
use crate::text::{agree, counted};

/// What begins so often within [`FLAPPING_TIME`] comes and goes.
const FLAPPING: usize = 4;

/// In so many times `wait`.
const FLAPPING_TIME: u32 = 20;

/// What has come and gone stays one way when it has done so for so many times `wait`.
const CALM_TIME: u32 = 10;

/// How many lines a message has; more are counted.
const MAX_LINES: usize = 50;

/// How many files are attached, or how often something happens that is told by itself, in a message.
const MAX_HAPPENED: usize = 100;

/// The longest line, in characters.
const MAX_LINE: usize = 300;

/// The longest subject, in characters.
const MAX_SUBJECT: usize = 150;

/// How many lines are kept of messages that were withheld.
const MAX_WITHHELD: usize = 20;

/// Messages are counted over this time.
const HOUR: i64 = 3600;

/// What is told, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    /// Of what.
    pub on: BTreeSet<Kind>,
    /// What happens within is told in one message.
    pub wait: Duration,
    /// What lasts is told again so often.
    pub repeat: Duration,
}

/// What has begun and has not been forgotten yet.
#[derive(Debug)]
struct Incident {
    what: String,
    since: Timestamp,
    /// None while it lasts.
    until: Option<Timestamp>,
    /// There is something to be told at the end of the group.
    pending: bool,
    /// That it lasts was told, and when it is told again.
    told: Option<Duration>,
    /// When it began, lately.
    begins: VecDeque<Duration>,
    /// It comes and goes.
    flapping: Option<Flapping>,
}

#[derive(Debug)]
struct Flapping {
    /// When it last came or went.
    changed: Duration,
    since: Timestamp,
    times: u64,
    told: bool,
}

/// What is kept of all that goes on, so that a restart changes nothing of what is told. That something
/// comes and goes is not: after a restart it is told once how it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    #[serde(default)]
    known: Vec<KeptIncident>,
    #[serde(default)]
    happened: Vec<KeptEvent>,
}

/// What has begun. Times are in seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptIncident {
    /// By its name, as another version may have others.
    kind: String,
    subject: String,
    what: String,
    since: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<i64>,
    /// When it is told again if it lasts, if it was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    again: Option<i64>,
    pending: bool,
}

/// What has happened, and waits to be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptEvent {
    kind: String,
    subject: String,
    at: i64,
    what: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    files: Vec<PathBuf>,
}

#[derive(Debug)]
struct Happened {
    kind: Kind,
    subject: Arc<str>,
    at: Timestamp,
    what: String,
    files: Vec<PathBuf>,
}

/// Everything that goes on.
#[derive(Debug)]
pub(crate) struct Incidents {
    policy: Policy,
    known: BTreeMap<(Kind, Arc<str>), Incident>,
    happened: Vec<Happened>,
    /// What has happened and is only counted.
    uncounted: u64,
    /// When the group is told that is being gathered.
    group: Option<Duration>,
}

/// What is to be told in one message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Report {
    entries: Vec<Entry>,
    /// How much more has happened.
    more: u64,
    /// What goes with it.
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// What of what, in a few words.
    subject: String,
    /// In full.
    line: String,
    /// The channel that it is about, which does not tell it.
    channel: Option<Arc<str>>,
}

impl Incidents {
    /// Nothing has happened yet.
    pub(crate) fn new(policy: Policy) -> Self {
        let (known, happened) = (BTreeMap::new(), Vec::new());
        Self { policy, known, happened, uncounted: 0, group: None }
    }

    /// This is told from now on. What lasts and was told stays so.
    pub(crate) fn set_policy(&mut self, policy: Policy) {
        self.known.retain(|(kind, _), _| policy.on.contains(kind));
        self.happened.retain(|happened| policy.on.contains(&happened.kind));
        self.policy = policy;
    }

    /// Something has happened.
    pub(crate) fn add(&mut self, event: Event, now: Duration) {
        let Event { kind, subject, at, change } = event;
        if !self.policy.on.contains(&kind) {
            return;
        }
        let told = match change {
            Change::Happened { what, files } => {
                if self.happened.len() < MAX_HAPPENED {
                    self.happened.push(Happened { kind, subject, at, what, files });
                } else {
                    self.uncounted += 1;
                }
                true
            }
            Change::Begun(what) => self.begin((kind, subject), at, what, now),
            Change::Ended => self.end(&(kind, subject), at, now),
        };
        if told && self.group.is_none() {
            self.group = Some(now.saturating_add(self.policy.wait));
        }
    }

    /// True if it is to be told.
    fn begin(&mut self, key: (Kind, Arc<str>), at: Timestamp, what: String, now: Duration) -> bool {
        let window = self.policy.wait.saturating_mul(FLAPPING_TIME);
        let incident = self.known.entry(key).or_insert_with(|| Incident {
            what: String::new(),
            since: at,
            until: Some(at),
            pending: false,
            told: None,
            begins: VecDeque::new(),
            flapping: None,
        });
        incident.what = what;
        if incident.until.is_none() {
            return false;
        }
        incident.until = None;
        incident.since = at;
        incident.begins.push_back(now);
        let old = |begun: &Duration| now.saturating_sub(*begun) > window;
        while incident.begins.len() > FLAPPING || incident.begins.front().is_some_and(old) {
            incident.begins.pop_front();
        }
        match &mut incident.flapping {
            Some(flapping) => {
                flapping.changed = now;
                flapping.times += 1;
                return false;
            }
            None if incident.begins.len() >= FLAPPING => {
                let times = incident.begins.len() as u64;
                let flapping = Flapping { changed: now, since: at, times, told: false };
                incident.flapping = Some(flapping);
            }
            None => {}
        }
        incident.pending = true;
        true
    }

    fn end(&mut self, key: &(Kind, Arc<str>), at: Timestamp, now: Duration) -> bool {
        let Some(incident) = self.known.get_mut(key) else { return false };
        if incident.until.is_some() {
            return false;
        }
        incident.until = Some(at);
        if let Some(flapping) = &mut incident.flapping {
            flapping.changed = now;
            return false;
        }
        incident.pending = true;
        true
    }

    /// When there is something to be told, unless something else happens before.
    pub(crate) fn next(&self) -> Option<Duration> {
        let calm = self.policy.wait.saturating_mul(CALM_TIME);
        let each = self.known.values().filter_map(|incident| match &incident.flapping {
            Some(flapping) if flapping.told => Some(flapping.changed.saturating_add(calm)),
            Some(_) => None,
            None => incident.told.filter(|_| incident.until.is_none() && !incident.pending),
        });
        each.chain(self.group).min()
    }

    /// What is to be kept; `second` says when a time is, in seconds since 1970.
    pub(crate) fn kept(&self, second: impl Fn(Duration) -> i64) -> Kept {
        let known = self.known.iter().map(|((kind, subject), incident)| KeptIncident {
            kind: kind.name().to_owned(),
            subject: subject.to_string(),
            what: incident.what.clone(),
            since: incident.since.as_second(),
            until: incident.until.map(Timestamp::as_second),
            again: incident.told.map(&second),
            pending: incident.pending || incident.flapping.is_some(),
        });
        let happened = self.happened.iter().map(|happened| KeptEvent {
            kind: happened.kind.name().to_owned(),
            subject: happened.subject.to_string(),
            at: happened.at.as_second(),
            what: happened.what.clone(),
            files: happened.files.clone(),
        });
        Kept {
            known: known.filter(|known| known.until.is_none() || known.pending).collect(),
            happened: happened.collect(),
        }
    }

    /// Takes up what was kept, as far as it is told. `second` is the time of day at `now`.
    pub(crate) fn take_up(&mut self, kept: Kept, now: Duration, second: i64) {
        let Policy { on, wait, repeat } = &self.policy;
        let told = |name: &str| on.iter().copied().find(|kind| kind.name() == name);
        let time = |second| Timestamp::from_second(second).unwrap_or_default();
        for KeptIncident { kind, subject, what, since, until, again, pending } in kept.known {
            let Some(kind) = told(&kind) else { continue };
            // A clock that was set puts nothing off.
            let left = |again: i64| u64::try_from(again.saturating_sub(second)).unwrap_or(0);
            // Whoever looks has to have the time to see that it is over.
            let soonest = wait.saturating_mul(CALM_TIME);
            let left = |again| Duration::from_secs(left(again)).max(soonest).min(*repeat);
            let due = |again| now.saturating_add(left(again));
            let incident = Incident {
                what,
                since: time(since),
                until: until.map(time),
                pending,
                told: again.map(due),
                begins: VecDeque::new(),
                flapping: None,
            };
            self.known.insert((kind, subject.into()), incident);
        }
        for KeptEvent { kind, subject, at, what, files } in kept.happened {
            let Some(kind) = told(&kind) else { continue };
            let (subject, at) = (subject.into(), time(at));
            self.happened.push(Happened { kind, subject, at, what, files });
        }
        if !self.happened.is_empty() || self.known.values().any(|incident| incident.pending) {
            self.group = Some(now.saturating_add(*wait));
        }
    }

    /// What lasts.
    pub(crate) fn lasting(&self) -> impl Iterator<Item = (Kind, Arc<str>)> {
        let lasting = self.known.iter().filter(|(_, incident)| incident.until.is_none());
        lasting.map(|((kind, subject), _)| (*kind, Arc::clone(subject)))
    }

    /// What is to be told at `now`, if anything. At the `end`, also what would be told a little later.
    pub(crate) fn due(&mut self, now: Duration, end: bool) -> Option<Report> {
        let Policy { wait, repeat, .. } = self.policy;
        let (calm, window) = (wait.saturating_mul(CALM_TIME), wait.saturating_mul(FLAPPING_TIME));
        let group = self.group.is_some_and(|due| due <= now || end);
        let mut report = Report::default();
        for ((kind, subject), incident) in &mut self.known {
            let channel = (*kind == Kind::ChannelFailed).then(|| Arc::clone(subject));
            let again = now.saturating_add(repeat);
            let (name, since) = (format!("{}: {subject}", kind.name()), time(incident.since));
            let what = escape(&incident.what);
            let mut tell = |prefix: &str, when: &str| {
                let line = format!("{prefix}{name}, {when}: {what}");
                report.add(format!("{prefix}{name}, since {since}"), &line, channel.clone());
            };
            let flapping_is_over = match &incident.flapping {
                Some(flapping) => flapping.told && flapping.changed.saturating_add(calm) <= now,
                None => false,
            };
            if flapping_is_over && let Some(flapping) = incident.flapping.take() {
                let times = flapping.times;
                incident.begins.clear();
                if let Some(until) = incident.until {
                    let until = time(until);
                    tell("over: ", &format!("after {times} times, until {until}"));
                    incident.told = None;
                } else {
                    tell("", &format!("since {since}, after {times} times"));
                    incident.told = Some(again);
                }
                incident.pending = false;
            } else if let Some(flapping) = &mut incident.flapping {
                if group && !flapping.told {
                    flapping.told = true;
                    incident.pending = false;
                    let (times, since) = (flapping.times, time(flapping.since));
                    tell(
                        "comes and goes: ",
                        &format!("{times} times until {since}, told again when it stays one way"),
                    );
                }
            } else if group && std::mem::take(&mut incident.pending) {
                match (incident.until, incident.told) {
                    (None, _) => {
                        tell("", &format!("since {since}"));
                        incident.told = Some(again);
                    }
                    (Some(until), _) => {
                        let lasted = until.duration_since(incident.since);
                        let (until, lasted) = (time(until), seconds(lasted));
                        tell("over: ", &format!("since {since}, until {until} ({lasted})"));
                        incident.told = None;
                    }
                }
            } else if let (None, Some(due)) = (incident.until, incident.told)
                && due <= now
            {
                tell("still: ", &format!("since {since}"));
                incident.told = Some(again);
            }
        }
        if group {
            self.group = None;
            for happened in std::mem::take(&mut self.happened) {
                let Happened { kind, subject, at, what, files } = happened;
                let name = format!("{}: {subject}", kind.name());
                let name = format!("{name}, at {}", time(at));
                let line = format!("{name}: {}", escape(&what));
                let channel = (kind == Kind::ChannelFailed).then_some(subject);
                report.add(name, &line, channel);
                report.files.extend(files);
            }
            report.more = std::mem::take(&mut self.uncounted);
            report.files.truncate(MAX_HAPPENED);
        }
        // What is over, and did not begin lately, is forgotten.
        self.known.retain(|_, incident| {
            let lately = incident.begins.back().is_some_and(|at| *at + window > now);
            incident.until.is_none() || incident.pending || incident.flapping.is_some() || lately
        });
        (!report.is_empty()).then_some(report)
    }
}

impl Report {
    fn add(&mut self, subject: String, line: &str, channel: Option<Arc<str>>) {
        self.entries.push(Entry { subject, line: short(line, MAX_LINE), channel });
    }

    fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.more == 0
    }

    /// What of it is told over a channel, if anything: not what is about the channel itself.
    #[must_use]
    pub(crate) fn over(&self, channel: &str) -> Option<Self> {
        let mut report = self.clone();
        report.entries.retain(|entry| entry.channel.as_deref() != Some(channel));
        (!report.is_empty()).then_some(report)
    }

    /// A line each, of which there are not too many.
    fn lines(&self) -> Vec<String> {
        let lines = self.entries.iter().map(|entry| &entry.line).take(MAX_LINES);
        let left = self.entries.len().saturating_sub(MAX_LINES) as u64;
        let more = self.more.saturating_add(left);
        let more = (more > 0).then(|| format!("and {more} more"));
        lines.cloned().chain(more).collect()
    }

    /// The subject of its message: where, and what.
    pub(crate) fn subject(&self, host: &str) -> String {
        let first = self.entries.first().map_or("", |entry| &entry.subject);
        let others = self.entries.len().saturating_sub(1);
        let more = if others > 0 { format!(" and {others} more") } else { String::new() };
        // What everything is about stands in front, as subjects are cut.
        format!("{}{more}", short(&format!("{host}: {first}"), MAX_SUBJECT))
    }

    /// The text of its message; its first line says where, what, and since when. `withheld` is what
    /// was not told before.
    pub(crate) fn text(&self, host: &str, withheld: &Withheld) -> String {
        let mut text = format!("{host}: {}\n", self.lines().join("\n"));
        let Withheld { count, lines } = withheld;
        if *count > 0 {
            let messages = counted(*count, "message");
            let were = agree(*count, "was", "were");
            // Writing to a string does not fail.
            let _ = writeln!(text, "\n{messages} {were} withheld before this one:");
            for line in lines {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }
}

/// Messages that were not sent, as there were too many: how many, and the last lines of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Withheld {
    /// How many.
    pub count: u64,
    /// What they said, as far as it is kept.
    pub lines: VecDeque<String>,
}

impl Withheld {
    /// One more.
    pub(crate) fn add(&mut self, report: &Report) {
        self.count += 1;
        self.lines.extend(report.lines());
        let too_many = self.lines.len().saturating_sub(MAX_WITHHELD);
        self.lines.drain(..too_many);
    }

    /// A report of nothing else, to be told when there is a place for it.
    pub(crate) fn report(&self) -> Report {
        let Self { count, lines } = self;
        let subject = format!("{} withheld (max-per-hour)", counted(*count, "message"));
        let last = lines.back().map_or(String::new(), |last| format!("; the last: {last}"));
        let mut report = Report::default();
        report.add(subject.clone(), &format!("{subject}{last}"), None);
        report
    }
}

/// How many messages a channel has had in the last hour.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hour(VecDeque<i64>);

impl Hour {
    /// Those at these times, in seconds.
    pub(crate) fn new(times: impl IntoIterator<Item = i64>) -> Self {
        Self(times.into_iter().collect())
    }

    /// When they were.
    pub(crate) fn times(&self) -> impl Iterator<Item = i64> {
        self.0.iter().copied()
    }

    /// Takes a place for one at `now`, if there is one.
    pub(crate) fn take(&mut self, now: i64, max: usize) -> bool {
        while self.0.front().is_some_and(|at| *at <= now - HOUR) {
            self.0.pop_front();
        }
        let free = self.0.len() < max;
        if free {
            self.0.push_back(now);
        }
        free
    }

    /// When there is a place again.
    pub(crate) fn free_at(&self, max: usize) -> i64 {
        let last = self.0.len().checked_sub(max).and_then(|index| self.0.get(index));
        last.map_or(i64::MIN, |at| at.saturating_add(HOUR))
    }
}

fn short(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
    }
}

/// A time as people read it, with its zone.
fn time(at: Timestamp) -> String {
    at.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S %:z").to_string()
}

fn seconds(duration: SignedDuration) -> String {
    let whole = SignedDuration::from_secs(duration.as_secs().max(0));
    format!("{whole:#}")
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

    /// What a report is about, without since when.
    fn whats(report: &Report) -> Vec<String> {
        let what = |entry: &Entry| entry.subject.split_once(", ").unwrap().0.to_owned();
        report.entries.iter().map(what).collect()
    }

    /// The incidents with a clock.
    struct Told {
        incidents: Incidents,
        now: u64,
        /// When, and what.
        messages: Vec<(u64, Vec<String>)>,
    }

    impl Told {
        fn new() -> Self {
            Self { incidents: Incidents::new(policy()), now: 0, messages: Vec::new() }
        }

        fn until(&mut self, second: u64) {
            while let Some(next) = self.incidents.next().filter(|next| *next <= at(second)) {
                self.now = self.now.max(next.as_secs());
                if let Some(report) = self.incidents.due(at(self.now), false) {
                    self.messages.push((self.now, whats(&report)));
                }
            }
            self.now = second;
        }

        fn begin(&mut self, subject: &str) {
            let change = Change::Begun("gone".to_owned());
            self.incidents.add(event(subject, self.now, change), at(self.now));
        }

        fn end(&mut self, subject: &str) {
            self.incidents.add(event(subject, self.now, Change::Ended), at(self.now));
        }

        fn take(&mut self) -> Vec<(u64, Vec<String>)> {
            std::mem::take(&mut self.messages)
        }
    }

    fn one(second: u64, text: &str) -> (u64, Vec<String>) {
        (second, vec![text.to_owned()])
    }

    #[test]
    fn a_fault_is_told_within_wait_and_its_end_once() {
        let mut told = Told::new();
        told.begin("a");
        told.begin("a");
        told.until(100);
        assert_eq!(told.take(), [one(WAIT, "file-missing: a")]);
        told.end("a");
        told.end("a");
        told.end("b");
        told.until(100_000);
        assert_eq!(told.take(), [one(100 + WAIT, "over: file-missing: a")]);
        assert!(told.incidents.due(at(100_000), false).is_none());
        assert!(told.incidents.known.is_empty());
    }

    #[test]
    fn what_happens_within_wait_is_told_in_one_message() {
        let mut told = Told::new();
        told.begin("a");
        told.until(10);
        told.begin("b");
        told.end("a");
        told.until(29);
        let change = Change::Happened { what: "2 new".to_owned(), files: vec!["/x/y".into()] };
        let happened = Event { kind: Kind::MirrorUpdated, ..event("m", 29, change) };
        told.incidents.add(happened, at(29));
        let report = told.incidents.due(at(WAIT), false).unwrap();
        assert_eq!(
            whats(&report),
            ["over: file-missing: a", "file-missing: b", "mirror-updated: m"]
        );
        assert_eq!(report.files, [PathBuf::from("/x/y")]);
        let subject = report.subject("host");
        assert!(subject.starts_with("host: over: file-missing: a, since 2027-01-15 "), "{subject}");
        assert!(subject.ends_with(" and 2 more"), "{subject}");
        let text = report.text("host", &Withheld::default());
        assert!(text.starts_with("host: over: file-missing: a, since 2027-01-15 "), "{text}");
        assert!(text.contains("(10s): gone\nfile-missing: b, since "), "{text}");
    }

    #[test]
    fn what_lasts_is_told_again() {
        let mut told = Told::new();
        told.begin("a");
        told.until(9 * 3600);
        let four_hours = 4 * 3600;
        assert_eq!(
            told.take(),
            [
                one(WAIT, "file-missing: a"),
                one(WAIT + four_hours, "still: file-missing: a"),
                one(WAIT + 2 * four_hours, "still: file-missing: a"),
            ]
        );
    }

    #[test]
    fn what_lasts_is_told_again_in_the_words_of_now() {
        let mut told = Told::new();
        told.begin("a");
        told.until(100);
        told.incidents.add(event("a", 100, Change::Begun("forbidden".to_owned())), at(100));
        let report = told.incidents.due(at(WAIT + 4 * 3600), false).unwrap();
        assert_eq!(whats(&report), ["still: file-missing: a"]);
        assert!(report.lines()[0].ends_with(": forbidden"), "{report:?}");
    }

    #[test]
    fn what_comes_and_goes_is_told_to_do_so_and_then_when_it_stays() {
        let mut told = Told::new();
        for round in 0..50 {
            told.until(round * 60);
            told.begin("a");
            told.until(round * 60 + 30);
            told.end("a");
        }
        let during = told.take();
        assert!(during.len() <= 8, "{during:?}");
        assert_eq!(during.last().unwrap().1, ["comes and goes: file-missing: a"]);
        told.until(10_000);
        let last_change = 49 * 60 + 30;
        let calm = WAIT * u64::from(CALM_TIME);
        assert_eq!(told.take(), [one(last_change + calm, "over: file-missing: a")]);
        assert!(told.incidents.known.is_empty());
    }

    #[test]
    fn at_the_end_nothing_waits() {
        let mut told = Told::new();
        told.begin("a");
        assert!(told.incidents.due(at(1), false).is_none());
        assert!(told.incidents.due(at(1), true).is_some());
        assert!(told.incidents.due(at(1), true).is_none());
    }

    /// As it is after a restart, `downtime` seconds later, with what was kept.
    fn restarted(told: &Told, downtime: u64) -> Told {
        let second = |at: Duration| i64::try_from(at.as_secs()).unwrap();
        let kept = serde_json::to_string(&told.incidents.kept(second)).unwrap();
        let mut next = Told::new();
        let now = told.now + downtime;
        next.incidents.take_up(serde_json::from_str(&kept).unwrap(), at(0), second(at(now)));
        next
    }

    #[test]
    fn what_is_kept_is_told_as_if_nothing_had_been_in_between() {
        let mut before = Told::new();
        before.begin("told");
        before.until(100);
        before.begin("pending");
        before.begin("over");
        before.end("over");
        before.begin("lasts");
        let (what, files) = ("1 new".to_owned(), vec!["/a".into()]);
        let happened = event("happened", 100, Change::Happened { what, files });
        before.incidents.add(happened, at(100));

        let mut after = restarted(&before, 0);
        let lasting: Vec<_> = after.incidents.lasting().map(|(_, subject)| subject).collect();
        assert_eq!(
            lasting.iter().map(|it| &**it).collect::<Vec<_>>(),
            ["lasts", "pending", "told"]
        );
        after.end("pending");
        after.until(WAIT);
        before.end("pending");
        before.until(100 + WAIT);
        let (before, after) = (before.take(), after.take());
        assert_eq!(before.last().unwrap().1, after[0].1);
        assert_eq!(after.len(), 1);
    }

    #[test]
    fn what_lasts_beyond_a_restart_is_not_told_as_new() {
        let mut told = Told::new();
        told.begin("a");
        told.until(3600);
        let mut next = restarted(&told, 60);
        next.begin("a");
        next.until(3 * 3600);
        assert_eq!(next.take(), [one(WAIT + 3 * 3600 - 60, "still: file-missing: a")]);
        next.end("a");
        next.until(5 * 3600);
        assert_eq!(next.take(), [one(3 * 3600 + WAIT, "over: file-missing: a")]);
        assert_eq!(next.incidents.kept(|_| 0), Kept::default());
    }

    #[test]
    fn a_clock_that_was_set_back_puts_nothing_off() {
        let mut told = Told::new();
        told.begin("a");
        told.until(100);
        let kept = told.incidents.kept(|_| i64::MAX);
        let mut next = Told::new();
        next.incidents.take_up(kept, at(0), 0);
        next.until(5 * 3600);
        assert_eq!(next.take(), [one(4 * 3600, "still: file-missing: a")]);
    }

    #[test]
    fn the_failure_of_a_channel_is_told_over_the_others() {
        let mut incidents = Incidents::new(policy());
        let begun = |subject, kind| Event {
            kind,
            ..event(subject, 0, Change::Begun("the login is refused".to_owned()))
        };
        incidents.add(begun("mail.ops", Kind::ChannelFailed), at(0));
        let report = incidents.due(at(WAIT), false).unwrap();
        assert_eq!(report.over("mail.ops"), None);
        assert_eq!(whats(&report.over("sms.ops").unwrap()), ["channel-failed: mail.ops"]);
        // Of a file, even if it is called so, everybody is told.
        incidents.add(begun("mail.ops", Kind::FileMissing), at(WAIT));
        let report = incidents.due(at(2 * WAIT), false).unwrap();
        assert_eq!(whats(&report.over("mail.ops").unwrap()), ["file-missing: mail.ops"]);
    }

    #[test]
    fn only_what_is_wanted_is_told() {
        let mut told = Told::new();
        told.begin("a");
        told.incidents.set_policy(Policy { on: BTreeSet::from([Kind::Overloaded]), ..policy() });
        told.begin("b");
        told.until(1000);
        assert!(told.take().is_empty());
    }

    #[test]
    fn a_message_is_bounded_and_one_line_each() {
        let mut told = Told::new();
        for number in 0..10_000 {
            let what = format!("gone\r\n{}", "x".repeat(5000));
            told.incidents.add(event(&number.to_string(), 0, Change::Begun(what)), at(0));
            let change = Change::Happened { what: "new".to_owned(), files: vec!["x".into(); 100] };
            told.incidents.add(event("m", 0, change), at(0));
        }
        let report = told.incidents.due(at(WAIT), false).unwrap();
        assert_eq!(report.lines().len(), MAX_LINES + 1);
        assert!(report.files.len() <= MAX_HAPPENED);
        assert!(report.lines().iter().all(|line| !line.contains(['\r', '\n'])));
        assert!(report.text("host", &Withheld::default()).len() < 200_000);
        assert!(report.subject("host").chars().count() < MAX_SUBJECT + 20);
    }

    #[test]
    fn a_channel_has_so_many_messages_in_an_hour() {
        let mut hour = Hour::default();
        let taken = (0..100).filter(|minute| hour.take(minute * 60, 10)).count();
        assert_eq!(taken, 20);
        assert_eq!(hour.free_at(10), 3600 + 3600);
        assert_eq!(Hour::default().free_at(1), i64::MIN);
    }

    #[test]
    fn what_is_withheld_is_counted_in_the_next_message() {
        let report = |line: &str| {
            let mut report = Report::default();
            report.add(line.to_owned(), line, None);
            report
        };
        let mut withheld = Withheld::default();
        for number in 0..100 {
            withheld.add(&report(&number.to_string()));
        }
        assert_eq!(withheld.lines.len(), MAX_WITHHELD);
        let text = report("now").text("host", &withheld);
        assert!(text.contains("\n100 messages were withheld before this one:\n80\n81\n"), "{text}");
        assert_eq!(
            withheld.report().lines(),
            ["100 messages withheld (max-per-hour); the last: 99"]
        );
    }

    proptest! {
        #[test]
        fn whatever_happens_the_last_word_is_right_and_words_are_few(
            steps in prop::collection::vec((0_u64..200, 0_usize..3, any::<bool>()), 1..200),
        ) {
            let mut told = Told::new();
            let subjects = ["a", "b", "c"];
            let mut lasts = [false; 3];
            let mut now = 0;
            for (pause, subject, begins) in steps {
                now += pause;
                told.until(now);
                if begins { told.begin(subjects[subject]) } else { told.end(subjects[subject]) }
                lasts[subject] = begins;
            }
            told.until(now + 3 * 3600);
            let times: Vec<_> = told.messages.iter().map(|(at, _)| *at).collect();
            for (subject, lasts) in subjects.iter().zip(lasts) {
                let name = format!("file-missing: {subject}");
                let of_it = |line: &&String| line.ends_with(&name);
                let last = told.messages.iter().flat_map(|(_, lines)| lines).rfind(of_it);
                let last = last.map(|line| !line.starts_with("over: "));
                prop_assert_eq!(last.unwrap_or_default(), lasts);
            }
            // Groups do not overlap, but for the calm that ends flapping.
            prop_assert!(times.len() as u64 <= 3 + 2 * (now / WAIT + 3));
        }
    }
}
