//! What the operator is told of, as the rest of the daemon knows it: in builds with the feature
//! `alert` and in those without it.
//!
//! What is not well is looked at here, now and then; what begins and what ends goes as a value to who
//! tells it, who never keeps anybody waiting. What does not fit is said at the next look.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::mpsc;

use crate::clock::Health;
use crate::daemon::mirrors;
use crate::net::instance::Served;
use crate::telemetry::counters::{Counter, Ending, Label};
use crate::text::counted;

/// How often it is looked at what is not well.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How many events may wait to be taken.
const WAITING: usize = 1024;

/// A service whose places are all taken for so long is overloaded.
const FULL_FOR: Duration = Duration::from_secs(10);

/// After a fault of the program in a connection, its service is called failed for so long.
const PANIC_LASTS: Duration = Duration::from_mins(1);

/// How often the kernel is asked about its clock.
const ASK_CLOCK_EVERY: Duration = Duration::from_secs(5);

/// What may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// A service cannot accept its clients, or failed by a fault of the program.
    ServiceFailed,
    /// What a service hands out cannot be read.
    FileMissing,
    /// A mirror is not as its source.
    MirrorFailed,
    /// A mirror has new files. This has no end.
    MirrorUpdated,
    /// The kernel says that nobody keeps its clock.
    ClockUnsynchronized,
    /// A service has been at its limit for some time.
    Overloaded,
    /// A reload changed nothing.
    ReloadFailed,
    /// What is told cannot be sent over a channel. It is told over the others.
    ChannelFailed,
}

impl Label for Kind {
    const NAMED: &'static [(Self, &'static str)] = &[
        (Self::ServiceFailed, "service-failed"),
        (Self::FileMissing, "file-missing"),
        (Self::MirrorFailed, "mirror-failed"),
        (Self::MirrorUpdated, "mirror-updated"),
        (Self::ClockUnsynchronized, "clock-unsynchronized"),
        (Self::Overloaded, "overloaded"),
        (Self::ReloadFailed, "reload-failed"),
        (Self::ChannelFailed, "channel-failed"),
    ];
}

/// Something that is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// What it is.
    pub kind: Kind,
    /// Of what, as `file.picture`.
    pub subject: Arc<str>,
    /// Since when.
    pub at: Timestamp,
    /// How it goes on.
    pub change: Change,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// It begins, or is known in other words; these.
    Begun(String),
    /// It is over.
    Ended,
    /// It has happened, and nothing of it lasts.
    Happened {
        /// In words.
        what: String,
        /// Files that it has brought.
        files: Vec<PathBuf>,
    },
}

/// What is not well, and of what.
type Lasting = BTreeSet<(Kind, Arc<str>)>;

/// Where events are handed over. As long as there is nobody at the other end, they are not.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reporter {
    sender: Arc<OnceLock<mpsc::Sender<Event>>>,
    lost: Arc<AtomicU64>,
    /// What lasted when the daemon before this one ended.
    resumed: Arc<Mutex<Lasting>>,
}

/// The other end of a [`Reporter`].
pub(crate) type Events = mpsc::Receiver<Event>;

impl Reporter {
    /// Its other end, which there is only once.
    pub(crate) fn connect(&self) -> Option<Events> {
        let (sender, events) = mpsc::channel(WAITING);
        self.sender.set(sender).ok().map(|()| events)
    }

    /// Hands an event over; never waits. False if there is no place for it, which is counted.
    pub(crate) fn report(&self, event: Event) -> bool {
        let Some(sender) = self.sender.get() else { return true };
        let taken = sender.try_send(event).is_ok();
        if !taken {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// This lasted when the daemon before this one ended: it has begun, and may be over.
    pub(crate) fn resume(&self, lasting: impl Iterator<Item = (Kind, Arc<str>)>) {
        self.resumed.lock().unwrap_or_else(PoisonError::into_inner).extend(lasting);
    }

    fn take_resumed(&self) -> Lasting {
        std::mem::take(&mut *self.resumed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many events there was no place for.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// What became of an alert, or of an attempt to send it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was taken.
    Sent,
    /// It was not taken, and is tried again.
    Failed,
    /// It will never be taken.
    Refused,
    /// There were too many; it is counted in the next.
    Withheld,
    /// It could not be sent for too long.
    Expired,
}

impl Label for Outcome {
    const NAMED: &'static [(Self, &'static str)] = &[
        (Self::Sent, "sent"),
        (Self::Failed, "failed"),
        (Self::Refused, "refused"),
        (Self::Withheld, "withheld"),
        (Self::Expired, "expired"),
    ];
}

/// What a channel counts, also across reloads.
#[derive(Debug)]
pub struct Counts {
    /// The channel's name, as `mail.ops`.
    pub channel: Arc<str>,
    /// Alerts, by what became of them.
    pub outcomes: Counter<Outcome>,
    queued: AtomicU64,
}

impl Counts {
    /// Of a channel that has done nothing yet.
    pub fn new(channel: Arc<str>) -> Self {
        Self { channel, outcomes: Counter::default(), queued: AtomicU64::new(0) }
    }

    /// So many alerts wait to be sent.
    pub fn set_queued(&self, queued: usize) {
        self.queued.store(queued as u64, Ordering::Relaxed);
    }

    /// How many alerts wait to be sent.
    pub fn queued(&self) -> u64 {
        self.queued.load(Ordering::Relaxed)
    }
}

/// Something that is not well at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// What it is.
    pub kind: Kind,
    /// Of what.
    pub subject: Arc<str>,
    /// In words.
    pub what: String,
}

/// Sees what begins and what ends.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    reporter: Reporter,
    /// What has begun, as far as it was told, and in which words.
    begun: BTreeMap<(Kind, Arc<str>), String>,
    /// Services all of whose places are taken, since when.
    full: HashMap<Arc<str>, Instant>,
    /// How many connections of a service have ended by a fault of the program, and when it was seen
    /// that there are more.
    panics: HashMap<Arc<str>, (u64, Option<Instant>)>,
    clock: Option<(Instant, Option<String>)>,
}

impl Watch {
    /// One that hands over to `reporter`.
    pub(crate) fn new(reporter: Reporter) -> Self {
        Self { reporter, ..Self::default() }
    }

    /// Only these kinds are told from now on. Of the others, what lasts is new to whoever wants to be
    /// told later.
    pub(crate) fn forget_all_but(&mut self, kinds: &BTreeSet<Kind>) {
        self.begun.retain(|(kind, _), _| kinds.contains(kind));
    }

    /// Looks at everything, and hands over what is different from the last time, of these kinds.
    pub(crate) fn look<'a>(
        &mut self,
        services: impl Iterator<Item = &'a Arc<Served>>,
        mirrors: &[Arc<mirrors::Counts>],
        reload: Option<&str>,
        kinds: &BTreeSet<Kind>,
    ) {
        let now = Instant::now();
        for key in self.reporter.take_resumed() {
            // In which words it was told is known there.
            self.begun.entry(key).or_default();
        }
        let mut troubles = self.of_services(services, now);
        troubles.extend(mirrors.iter().filter_map(|mirror| {
            let key = (Kind::MirrorFailed, format!("mirror.{}", mirror.name).into());
            // As long as nobody knows better, it is as it was before.
            let before = self.begun.get(&key).filter(|_| !mirror.is_known()).cloned();
            let (kind, subject) = key;
            Some(Trouble { kind, subject, what: before.or_else(|| mirror.trouble())? })
        }));
        let clock =
            kinds.contains(&Kind::ClockUnsynchronized).then(|| self.of_clock(now)).flatten();
        troubles.extend(clock.map(|what| Trouble {
            kind: Kind::ClockUnsynchronized,
            subject: "clock".into(),
            what,
        }));
        troubles.extend(reload.map(|what| Trouble {
            kind: Kind::ReloadFailed,
            subject: "configuration".into(),
            what: what.to_owned(),
        }));
        troubles.retain(|trouble| kinds.contains(&trouble.kind));
        self.tell(troubles);
    }

    fn of_services<'a>(
        &mut self,
        services: impl Iterator<Item = &'a Arc<Served>>,
        now: Instant,
    ) -> Vec<Trouble> {
        let mut troubles = Vec::new();
        let full_before = std::mem::take(&mut self.full);
        let panics_before = std::mem::take(&mut self.panics);
        for served in services {
            let name = served.name();
            let mut add = |kind, what| {
                troubles.push(Trouble { kind, subject: Arc::clone(name), what });
            };
            if let Some(what) = served.listener_trouble() {
                add(Kind::ServiceFailed, what);
            }
            let panics = served.counts().endings.get(Ending::Panic);
            let (before, at) = panics_before.get(name).copied().unwrap_or((panics, None));
            let at = if panics > before { Some(now) } else { at };
            let at = at.filter(|at| now.duration_since(*at) < PANIC_LASTS);
            self.panics.insert(Arc::clone(name), (panics, at));
            if at.is_some() {
                let connections = counted(panics, "connection");
                let what = format!("{connections} ended by a fault of the program; see the log");
                add(Kind::ServiceFailed, what);
            }
            if let Some(what) = served.service.trouble() {
                add(Kind::FileMissing, what);
            }
            if served.is_full() {
                let since = full_before.get(name).copied().unwrap_or(now);
                self.full.insert(Arc::clone(name), since);
                if now.duration_since(since) >= FULL_FOR {
                    let places = served.limits.max_connections;
                    let what =
                        format!("its connection limit is reached ({places}): new clients wait");
                    add(Kind::Overloaded, what);
                }
            }
        }
        troubles
    }

    fn of_clock(&mut self, now: Instant) -> Option<String> {
        if let Some((asked, answer)) = &self.clock
            && now.duration_since(*asked) < ASK_CLOCK_EVERY
        {
            return answer.clone();
        }
        // Whoever may not ask was told so when the daemon began.
        let health = Health::read().ok();
        let before = self.clock.take().and_then(|(_, answer)| answer);
        let answer = health.filter(|health| !health.synchronized).map(|health| {
            // How far it may be wrong grows all the time, and is nothing new.
            if let Some(before) = before {
                return before;
            }
            let seconds = Duration::from_micros(health.max_error_us.unsigned_abs()).as_secs_f64();
            format!("the kernel says that nobody keeps its clock; it may be wrong by {seconds} s")
        });
        self.clock = Some((now, answer.clone()));
        answer
    }

    /// Hands over what has begun and what has ended since the last time.
    fn tell(&mut self, troubles: Vec<Trouble>) {
        let at = Timestamp::now();
        let mut over: Lasting = self.begun.keys().cloned().collect();
        for Trouble { kind, subject, what } in troubles {
            let key = (kind, subject);
            over.remove(&key);
            // In other words it is told again: they are those that are right now.
            if self.begun.get(&key) != Some(&what) {
                let subject = Arc::clone(&key.1);
                let event = Event { kind, subject, at, change: Change::Begun(what.clone()) };
                // What is not taken is told at the next look.
                if self.reporter.report(event) {
                    self.begun.insert(key, what);
                }
            }
        }
        for key in over {
            let subject = Arc::clone(&key.1);
            if self.reporter.report(Event { kind: key.0, subject, at, change: Change::Ended }) {
                self.begun.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(subject: &str) -> Trouble {
        let what = "gone".to_owned();
        Trouble { kind: Kind::FileMissing, subject: subject.into(), what }
    }

    fn taken(events: &mut Events) -> Vec<(String, bool)> {
        std::iter::from_fn(|| events.try_recv().ok())
            .map(|event| (event.subject.to_string(), event.change == Change::Ended))
            .collect()
    }

    #[test]
    fn what_begins_and_what_ends_is_told_once() {
        let reporter = Reporter::default();
        let mut events = reporter.connect().unwrap();
        let mut watch = Watch::new(reporter);
        watch.tell(vec![trouble("a")]);
        watch.tell(vec![trouble("a"), trouble("b")]);
        assert_eq!(taken(&mut events), [("a".to_owned(), false), ("b".to_owned(), false)]);
        watch.tell(vec![trouble("b")]);
        watch.tell(vec![trouble("b")]);
        assert_eq!(taken(&mut events), [("a".to_owned(), true)]);
        watch.tell(Vec::new());
        assert_eq!(taken(&mut events), [("b".to_owned(), true)]);
    }

    #[test]
    fn what_lasted_before_is_over_when_it_is_known_not_to_last() {
        let kinds = BTreeSet::from([Kind::FileMissing, Kind::MirrorFailed]);
        let reporter = Reporter::default();
        let mut events = reporter.connect().unwrap();
        let mut watch = Watch::new(reporter.clone());
        let mirror = Arc::new(mirrors::Counts::new("m".into()));
        let lasted = [(Kind::FileMissing, "file.a"), (Kind::MirrorFailed, "mirror.m")];
        reporter.resume(lasted.into_iter().map(|(kind, subject)| (kind, subject.into())));
        let mut look = || {
            watch.look([].iter(), std::slice::from_ref(&mirror), None, &kinds);
            taken(&mut events)
        };
        assert_eq!(look(), [("file.a".to_owned(), true)]);
        // It is still so, in these words.
        mirror.set_trouble(Some("404".to_owned()));
        assert_eq!(look(), [("mirror.m".to_owned(), false)]);
        mirror.set_trouble(None);
        assert_eq!(look(), [("mirror.m".to_owned(), true)]);
    }

    #[test]
    fn what_goes_on_in_other_words_is_told_in_them() {
        let reporter = Reporter::default();
        let mut events = reporter.connect().unwrap();
        let mut watch = Watch::new(reporter);
        watch.tell(vec![trouble("a")]);
        watch.tell(vec![Trouble { what: "forbidden".to_owned(), ..trouble("a") }]);
        watch.tell(vec![Trouble { what: "forbidden".to_owned(), ..trouble("a") }]);
        let changes: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).collect();
        let words = |event: &Event| match &event.change {
            Change::Begun(what) => what.clone(),
            change => panic!("{change:?}"),
        };
        assert_eq!(changes.iter().map(words).collect::<Vec<_>>(), ["gone", "forbidden"]);
    }

    #[test]
    fn what_is_not_taken_is_counted_and_told_later() {
        let reporter = Reporter::default();
        let mut events = reporter.connect().unwrap();
        let mut watch = Watch::new(reporter.clone());
        let troubles: Vec<_> = (0..=WAITING).map(|number| trouble(&number.to_string())).collect();
        watch.tell(troubles.clone());
        assert_eq!((reporter.lost(), taken(&mut events).len()), (1, WAITING));
        watch.tell(troubles);
        assert_eq!(taken(&mut events).len(), 1);
    }

    #[test]
    fn without_anybody_to_tell_nothing_waits() {
        let reporter = Reporter::default();
        let event = Event {
            kind: Kind::Overloaded,
            subject: "a".into(),
            at: Timestamp::UNIX_EPOCH,
            change: Change::Ended,
        };
        assert!((0..2 * WAITING).all(|_| reporter.report(event.clone())));
        assert_eq!(reporter.lost(), 0);
    }
}
