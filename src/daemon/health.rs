//! Derives alert events from the health of services, mirrors, the clock and the last reload.
//!
//! [`HealthMonitor::check`] compares the current problems with the reported ones and sends the
//! differences. An event that does not fit into the channel is sent by the next check.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::clock::Health;
use crate::daemon::manager::ServiceInstance;
use crate::net::service::Service as _;
use crate::telemetry::counters::ConnectionOutcome;
use crate::telemetry::event::{Change, Event, EventSender, Kind};
use crate::telemetry::mirror_stats::MirrorStats;
use crate::text::counted;

/// Interval between two checks of everything.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Time at the connection limit after which a service is overloaded.
const OVERLOADED_AFTER: Duration = Duration::from_secs(10);

/// Time for which a service counts as failed after a panic in a connection.
const FAILED_AFTER_PANIC: Duration = Duration::from_mins(1);

/// Interval between queries of the clock state.
const CLOCK_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Problem {
    kind: Kind,
    /// The affected object, such as `file.picture`.
    subject: Arc<str>,
    description: String,
}

/// The conditions that were reported as begun.
#[derive(Debug, Default)]
pub(crate) struct HealthMonitor {
    events: EventSender,
    /// With the reported description.
    reported: BTreeMap<(Kind, Arc<str>), String>,
    /// Services at their connection limit, with the time when it was reached.
    full_since: HashMap<Arc<str>, Instant>,
    /// Number of panics of each service, and the time of its last increase.
    panics: HashMap<Arc<str>, (u64, Option<Instant>)>,
    /// Time and result of the last check of the clock.
    clock: Option<(Instant, Option<String>)>,
}

impl HealthMonitor {
    pub(crate) fn new(events: EventSender) -> Self {
        Self { events, ..Self::default() }
    }

    /// Forgets conditions of other kinds, so that they are new if their kind is configured later.
    pub(crate) fn retain_kinds(&mut self, kinds: &BTreeSet<Kind>) {
        self.reported.retain(|(kind, _), _| kinds.contains(kind));
    }

    /// Checks everything and sends events of these kinds.
    pub(crate) fn check<'a>(
        &mut self,
        services: impl Iterator<Item = &'a Arc<ServiceInstance>>,
        mirrors: &[Arc<MirrorStats>],
        failed_reload: Option<&str>,
        kinds: &BTreeSet<Kind>,
    ) {
        let now = Instant::now();
        let mut problems = self.check_services(services, now);
        let mut add = |kind, subject: String, description| {
            problems.push(Problem { kind, subject: subject.into(), description });
        };
        for mirror in mirrors {
            let subject = format!("mirror.{}", mirror.name);
            let reported = self.reported.get(&(Kind::MirrorFailed, subject.as_str().into()));
            let last = mirror.last();
            // Until its first sync has ended, a changed mirror keeps its condition.
            let unchanged = reported.filter(|_| last.duration.is_none()).cloned();
            if let Some(description) = unchanged.or(last.failure) {
                add(Kind::MirrorFailed, subject, description);
            }
        }
        if kinds.contains(&Kind::ClockUnsynchronized)
            && let Some(description) = self.check_clock(now)
        {
            add(Kind::ClockUnsynchronized, "clock".to_owned(), description);
        }
        if let Some(description) = failed_reload {
            add(Kind::ReloadFailed, "configuration".to_owned(), description.to_owned());
        }
        problems.retain(|problem| kinds.contains(&problem.kind));
        self.report(problems);
    }

    fn check_services<'a>(
        &mut self,
        services: impl Iterator<Item = &'a Arc<ServiceInstance>>,
        now: Instant,
    ) -> Vec<Problem> {
        let mut problems = Vec::new();
        let full_before = std::mem::take(&mut self.full_since);
        let panics_before = std::mem::take(&mut self.panics);
        for instance in services {
            let name = instance.name();
            let mut add = |kind, description| {
                problems.push(Problem { kind, subject: Arc::clone(name), description });
            };
            if let Some(description) = instance.listener_problem() {
                add(Kind::ServiceFailed, description);
            }
            let panics = instance.counts().outcomes.get(ConnectionOutcome::Panic);
            let (before, at) = panics_before.get(name).copied().unwrap_or((panics, None));
            let at = if panics > before { Some(now) } else { at };
            let at = at.filter(|at| now.duration_since(*at) < FAILED_AFTER_PANIC);
            self.panics.insert(Arc::clone(name), (panics, at));
            if at.is_some() {
                let connections = counted(panics, "connection");
                let problem = format!("{connections} ended by a bug of handout: see the log");
                add(Kind::ServiceFailed, problem);
            }
            if let Some(description) = instance.service.problem() {
                add(Kind::FileMissing, description);
            }
            if instance.is_full() {
                let since = full_before.get(name).copied().unwrap_or(now);
                self.full_since.insert(Arc::clone(name), since);
                if now.duration_since(since) >= OVERLOADED_AFTER {
                    let limit = instance.limits.max_connections;
                    let problem =
                        format!("its connection limit is reached ({limit}): new clients wait");
                    add(Kind::Overloaded, problem);
                }
            }
        }
        problems
    }

    fn check_clock(&mut self, now: Instant) -> Option<String> {
        if let Some((checked, problem)) = &self.clock
            && now.duration_since(*checked) < CLOCK_INTERVAL
        {
            return problem.clone();
        }
        let health = Health::read().ok().filter(|health| !health.synchronized);
        let before = self.clock.take().and_then(|(_, problem)| problem);
        // The maximum error grows all the time; a changed description would be another report.
        let problem = health.map(|health| {
            before.unwrap_or_else(|| {
                let seconds =
                    Duration::from_micros(health.max_error_us.unsigned_abs()).as_secs_f64();
                format!("the kernel clock is not synchronized: its maximum error is {seconds} s")
            })
        });
        self.clock = Some((now, problem.clone()));
        problem
    }

    /// Sends an event for each difference from the reported conditions.
    fn report(&mut self, problems: Vec<Problem>) {
        let at = Timestamp::now();
        let mut ended: BTreeSet<_> = self.reported.keys().cloned().collect();
        for Problem { kind, subject, description } in problems {
            let key = (kind, Arc::clone(&subject));
            ended.remove(&key);
            if self.reported.get(&key) != Some(&description) {
                let change = Change::Begun(description.clone());
                if self.events.send(Event { kind, subject, at, change }) {
                    self.reported.insert(key, description);
                }
            }
        }
        for key in ended {
            let (kind, subject) = key.clone();
            if self.events.send(Event { kind, subject, at, change: Change::Ended }) {
                self.reported.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::event::CAPACITY;
    use tokio::sync::mpsc;

    fn problem(subject: &str) -> Problem {
        let description = "gone".to_owned();
        Problem { kind: Kind::FileMissing, subject: subject.into(), description }
    }

    fn monitor() -> (HealthMonitor, mpsc::Receiver<Event>) {
        let sender = EventSender::default();
        let events = sender.connect().unwrap();
        (HealthMonitor::new(sender), events)
    }

    /// Returns the subjects of received events, and whether they ended.
    fn received(events: &mut mpsc::Receiver<Event>) -> Vec<(String, bool)> {
        std::iter::from_fn(|| events.try_recv().ok())
            .map(|event| (event.subject.to_string(), event.change == Change::Ended))
            .collect()
    }

    #[test]
    fn reports_beginnings_and_ends_once() {
        let (mut monitor, mut events) = monitor();
        monitor.report(vec![problem("a")]);
        monitor.report(vec![problem("a"), problem("b")]);
        assert_eq!(received(&mut events), [("a".to_owned(), false), ("b".to_owned(), false)]);
        monitor.report(vec![problem("b")]);
        monitor.report(vec![problem("b")]);
        assert_eq!(received(&mut events), [("a".to_owned(), true)]);
        monitor.report(Vec::new());
        assert_eq!(received(&mut events), [("b".to_owned(), true)]);
    }

    #[test]
    fn reports_changed_descriptions() {
        let (mut monitor, mut events) = monitor();
        let other = || Problem { description: "forbidden".to_owned(), ..problem("a") };
        monitor.report(vec![problem("a")]);
        monitor.report(vec![other()]);
        monitor.report(vec![other()]);
        let changes: Vec<_> =
            std::iter::from_fn(|| events.try_recv().ok()).map(|event| event.change).collect();
        assert_eq!(changes, ["gone", "forbidden"].map(|text| Change::Begun(text.to_owned())));
    }

    #[test]
    fn counts_events_that_do_not_fit_and_sends_them_later() {
        let sender = EventSender::default();
        let mut events = sender.connect().unwrap();
        let mut monitor = HealthMonitor::new(sender.clone());
        let problems: Vec<_> = (0..=CAPACITY).map(|number| problem(&number.to_string())).collect();
        monitor.report(problems.clone());
        assert_eq!((sender.lost(), received(&mut events).len()), (1, CAPACITY));
        monitor.report(problems);
        assert_eq!(received(&mut events).len(), 1);
    }

    #[test]
    fn discards_events_without_a_dispatcher() {
        let sender = EventSender::default();
        let event = Event {
            kind: Kind::Overloaded,
            subject: "a".into(),
            at: Timestamp::UNIX_EPOCH,
            change: Change::Ended,
        };
        assert!((0..2 * CAPACITY).all(|_| sender.send(event.clone())));
        assert_eq!(sender.lost(), 0);
    }
}
