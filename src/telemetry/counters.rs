//! What a service counts, for the log's sums and for the metrics.
//!
//! Plain atomic numbers: counting takes no lock, and whoever reads them asks nobody to wait.
//! They only grow, also across a reload that changes the service.

use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::telemetry::peer::Peer;
use crate::text::counted;

/// After a listener's fault, the service is called not well for so long; longer than the longest
/// pause after which it tries again.
const TROUBLE_LASTS: Duration = Duration::from_secs(5);

/// A fault that comes and goes is said so often at most.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Everything was delivered.
    Complete,
    /// The client, or the way to it, ended it.
    Reset,
    /// The client took no byte for too long.
    IdleTimeout,
    /// It lasted too long.
    MaxDuration,
    /// The daemon, or its service, ended before it.
    Shutdown,
    /// The service, or this machine, could not go on.
    Failed,
    /// A fault of the program.
    Panic,
}

/// Why a connection ended before anything was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The access lists do not permit the client.
    Access,
    /// The client has as many connections as it may.
    MaxPerClient,
    /// A balancer did not say whom it speaks for.
    ProxyProtocol,
    /// The client gave up in the queue.
    Aborted,
}

/// What became of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datagram {
    /// It was answered.
    Answered,
    /// An answer could be part of a loop, or go to more than one host.
    Unanswerable,
    /// The access lists do not permit the client.
    Access,
    /// There were too many, from this client or in all.
    Rate,
    /// The answer could not be sent.
    Failed,
}

/// What has a name in the log and in the metrics, and is counted by it.
pub trait Label: Copy + PartialEq + 'static {
    /// All of them, each with its name.
    const NAMED: &'static [(Self, &'static str)];

    /// Its name.
    fn name(self) -> &'static str {
        Self::NAMED.iter().find(|(label, _)| *label == self).map_or("", |(_, name)| name)
    }
}

impl Label for Ending {
    const NAMED: &'static [(Self, &'static str)] = &[
        (Self::Complete, "complete"),
        (Self::Reset, "reset"),
        (Self::IdleTimeout, "idle-timeout"),
        (Self::MaxDuration, "max-duration"),
        (Self::Shutdown, "shutdown"),
        (Self::Failed, "failed"),
        (Self::Panic, "panic"),
    ];
}

impl Label for Refusal {
    const NAMED: &'static [(Self, &'static str)] = &[
        (Self::Access, "access"),
        (Self::MaxPerClient, "max-per-client"),
        (Self::ProxyProtocol, "proxy-protocol"),
        (Self::Aborted, "aborted"),
    ];
}

impl Label for Datagram {
    const NAMED: &'static [(Self, &'static str)] = &[
        (Self::Answered, "answered"),
        (Self::Unanswerable, "unanswerable"),
        (Self::Access, "access"),
        (Self::Rate, "rate"),
        (Self::Failed, "failed"),
    ];
}

/// One number for each of a set of labels.
#[derive(Debug)]
pub struct Counter<L: Label> {
    /// In the order of the labels.
    numbers: Box<[AtomicU64]>,
    labels: PhantomData<L>,
}

impl<L: Label> Default for Counter<L> {
    fn default() -> Self {
        let numbers = L::NAMED.iter().map(|_| AtomicU64::new(0)).collect();
        Self { numbers, labels: PhantomData }
    }
}

impl<L: Label> Counter<L> {
    /// Counts one more.
    pub fn add(&self, label: L) {
        let mut counted = L::NAMED.iter().zip(&self.numbers);
        if let Some((_, number)) = counted.find(|((counted, _), _)| *counted == label) {
            number.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many there have been of each.
    pub fn each(&self) -> impl Iterator<Item = (L, u64)> {
        L::NAMED
            .iter()
            .zip(&self.numbers)
            .map(|((label, _), n)| (*label, n.load(Ordering::Relaxed)))
    }

    /// How many there have been of each since the last call with the same `before`.
    fn take_new(&self, before: &mut Vec<u64>) -> Vec<(L, u64)> {
        before.resize(self.numbers.len(), 0);
        let new = self
            .each()
            .zip(before)
            .map(|((label, now), before)| (label, now - std::mem::replace(before, now)));
        new.collect()
    }

    /// How many there have been of one.
    pub fn get(&self, label: L) -> u64 {
        self.each().find(|(counted, _)| *counted == label).map_or(0, |(_, number)| number)
    }

    /// How many there have been of all together.
    pub fn total(&self) -> u64 {
        self.each().map(|(_, number)| number).sum()
    }
}

/// The upper bounds of the histogram of durations, in seconds: from an answer that fits one packet
/// to the default `max-duration`.
pub(crate) const DURATION_BOUNDS: [f64; 12] =
    [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0];

/// How long connections lasted.
#[derive(Debug, Default)]
pub struct Durations {
    /// One for each bound, and one for what is above them.
    buckets: [AtomicU64; DURATION_BOUNDS.len() + 1],
    microseconds: AtomicU64,
}

impl Durations {
    fn add(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = DURATION_BOUNDS.partition_point(|bound| *bound < seconds);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        let microseconds = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.microseconds.fetch_add(microseconds, Ordering::Relaxed);
    }

    /// All of them together in seconds; and how many there were in each bucket alone, with its
    /// upper bound.
    pub fn read(&self) -> (f64, Vec<(f64, u64)>) {
        let sum = Duration::from_micros(self.microseconds.load(Ordering::Relaxed)).as_secs_f64();
        let bounds = DURATION_BOUNDS.into_iter().chain([f64::INFINITY]);
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
        (sum, bounds.zip(counts).collect())
    }
}

/// What one service counts.
#[derive(Debug, Default)]
pub struct Counts {
    begun: AtomicU64,
    /// Connections that ended, by how.
    pub endings: Counter<Ending>,
    /// Connections that never were served.
    pub refusals: Counter<Refusal>,
    /// Datagrams that arrived.
    pub datagrams: Counter<Datagram>,
    /// How long the connections that ended have lasted.
    pub durations: Durations,
    sent: AtomicU64,
    trouble: Mutex<Trouble>,
    /// Connections that ended before the client took anything, as a rule health checks and port
    /// scans. They are counted among `endings`, too.
    unserved: Counter<Ending>,
    /// An example peer for the log.
    unserved_peer: Mutex<Option<Peer>>,
    /// What the log has been told.
    summed_up: Mutex<SummedUp>,
    limit: LimitState,
}

/// Whether clients have to wait because all of a service's connections are in use.
#[derive(Debug, Default)]
struct LimitState {
    /// A client had to wait since the last look.
    waited: AtomicBool,
    /// The log says that the limit is reached.
    reported: AtomicBool,
}

/// When the listeners of a service last had a fault, and when that was last said.
#[derive(Debug, Default)]
struct Trouble {
    last: Option<Instant>,
    said: Option<Instant>,
}

/// The counts that are in the log already, in the order of their labels.
#[derive(Debug, Default)]
struct SummedUp {
    datagrams: Vec<u64>,
    refusals: Vec<u64>,
    unserved: Vec<u64>,
}

impl Counts {
    /// A connection begins.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// One that began is not served, and is counted as a refusal.
    pub fn take_back(&self) {
        self.begun.fetch_sub(1, Ordering::Relaxed);
    }

    /// A connection has ended.
    pub fn end(&self, ending: Ending, duration: Duration) {
        self.endings.add(ending);
        self.durations.add(duration);
    }

    /// How many connections there are at this moment.
    pub fn active(&self) -> u64 {
        // In this order, one that begins meanwhile is not counted as ended only.
        let ended = self.endings.total();
        self.begun.load(Ordering::Relaxed).saturating_sub(ended)
    }

    /// The kernel has taken so many bytes for a client.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many bytes the kernel has taken for clients.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Counts a connection that ended before its client took anything. It has no line of its own.
    pub fn add_unserved(&self, ending: Ending, peer: Peer) {
        self.unserved.add(ending);
        // Any of them will do: no connection waits for another's.
        if let Some(mut example) = self.unserved_peer.try_lock() {
            *example = Some(peer);
        }
    }

    /// Logs what strangers have caused since the last time, if anything.
    pub fn log_summary(&self, service: &str, max_per_client: NonZeroU32) {
        let mut before = self.summed_up.lock();
        let datagrams = self.datagrams.take_new(&mut before.datagrams);
        let refusals = self.refusals.take_new(&mut before.refusals);
        let unserved = self.unserved.take_new(&mut before.unserved);
        drop(before);
        sum_up_datagrams(service, &datagrams);
        sum_up_refusals(service, &refusals, max_per_client);
        let example = self.unserved_peer.lock().take();
        sum_up_unserved(service, &unserved, example);
    }

    /// A client has to wait, as all connections are in use. True if it is time to say so.
    pub fn note_limit_reached(&self) -> bool {
        self.limit.waited.store(true, Ordering::Relaxed);
        !self.limit.reported.swap(true, Ordering::Relaxed)
    }

    /// Whether the log is to say that the limit is not reached any more: no client had to wait
    /// since the last call, so that a service at its limit does not fill the log. `is_full` is
    /// whether all connections are in use now.
    pub fn take_limit_recovered(&self, is_full: bool) -> bool {
        let waited = self.limit.waited.swap(false, Ordering::Relaxed);
        !is_full && !waited && self.limit.reported.swap(false, Ordering::Relaxed)
    }

    /// A listener ran into a fault that is not its clients'. True if it is time to say so.
    pub fn note_trouble(&self) -> bool {
        let mut trouble = self.trouble.lock();
        let now = Instant::now();
        trouble.last = Some(now);
        let said_lately = trouble.said.is_some_and(|said| now.duration_since(said) < SAY_AGAIN);
        if !said_lately {
            trouble.said = Some(now);
        }
        !said_lately
    }

    /// Whether a listener has had such a fault just now.
    pub fn in_trouble(&self) -> bool {
        let trouble = self.trouble.lock();
        trouble.last.is_some_and(|last| last.elapsed() < TROUBLE_LASTS)
    }
}

fn sum_up_datagrams(service: &str, new: &[(Datagram, u64)]) {
    let (answered, dropped): (Vec<_>, Vec<_>) =
        new.iter().partition(|(became, _)| *became == Datagram::Answered);
    let reasons = list_reasons(&dropped, |became| match became {
        Datagram::Unanswerable => "without a safe reply",
        Datagram::Access => "by the access lists",
        Datagram::Rate => "over the rate",
        Datagram::Answered | Datagram::Failed => "failed",
    });
    let (answered, dropped) = (total(&answered), total(&dropped));
    if answered + dropped > 0 {
        let reasons = if dropped > 0 { format!(" ({reasons})") } else { String::new() };
        let message =
            format_args!("{service}: datagrams answered: {answered}, dropped: {dropped}{reasons}");
        tracing::info!(service, answered, dropped, "{message}");
    }
}

fn sum_up_refusals(service: &str, new: &[(Refusal, u64)], max_per_client: NonZeroU32) {
    let of = |reason| total(&new.iter().filter(|(label, _)| *label == reason).collect::<Vec<_>>());
    let (denied, crowded) = (of(Refusal::Access), of(Refusal::MaxPerClient));
    let (headless, aborted) = (of(Refusal::ProxyProtocol), of(Refusal::Aborted));
    let connections = |count| counted(count, "connection");
    if denied + crowded > 0 {
        let reasons = [(denied, "not permitted"), (crowded, "over max-per-client")];
        let occurred = reasons.iter().filter(|(count, _)| *count > 0);
        let reasons: Vec<_> = occurred.map(|(count, why)| format!("{count} {why}")).collect();
        let limit = if crowded > 0 { format!(" ({max_per_client})") } else { String::new() };
        let (connections, reasons) = (connections(denied + crowded), reasons.join(", "));
        let message = format_args!("{service}: {connections} reset: {reasons}{limit}");
        tracing::info!(service, denied, crowded, max_per_client, "{message}");
    }
    if headless > 0 {
        let connections = connections(headless);
        let message = format_args!("{service}: {connections} reset: no PROXY header");
        tracing::info!(service, headless, "{message}");
    }
    if aborted > 0 {
        let connections = connections(aborted);
        let message = format_args!("{service}: {connections} aborted by the client while queued");
        tracing::info!(service, aborted, "{message}");
    }
}

fn sum_up_unserved(service: &str, new: &[(Ending, u64)], example: Option<Peer>) {
    let new: Vec<_> = new.iter().collect();
    let unserved = total(&new);
    if unserved > 0 {
        let connections = counted(unserved, "connection");
        let reasons = list_reasons(&new, Label::name);
        let peer = example.map(tracing::field::display);
        let from = example.map_or(String::new(), |peer| format!(", one from {peer}"));
        let message = format_args!(
            "{service}: {connections} ended before the client took anything ({reasons}{from})"
        );
        tracing::info!(service, unserved, peer, "{message}");
    }
}

fn total<L>(counts: &[&(L, u64)]) -> u64 {
    counts.iter().map(|(_, count)| count).sum()
}

/// Lists the reasons that occurred with their counts: `3 reset, 1 complete`.
fn list_reasons<L: Label>(counts: &[&(L, u64)], name: impl Fn(L) -> &'static str) -> String {
    let occurred = counts.iter().filter(|(_, count)| *count > 0);
    occurred
        .map(|(label, count)| format!("{count} {}", name(*label)))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_label_is_counted_by_itself_under_its_name() {
        let counter = Counter::default();
        counter.add(Ending::IdleTimeout);
        counter.add(Ending::IdleTimeout);
        counter.add(Ending::Panic);
        assert_eq!((counter.get(Ending::IdleTimeout), counter.total()), (2, 3));
        assert_eq!(Ending::IdleTimeout.name(), "idle-timeout");
    }

    #[test]
    fn a_duration_is_counted_once_and_within_its_bound() {
        let durations = Durations::default();
        for milliseconds in [0, 1, 2, 1_000, 3_600_000, 3_600_001] {
            durations.add(Duration::from_millis(milliseconds));
        }
        let (sum, buckets) = durations.read();
        let counted: Vec<_> = buckets.into_iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [(0.001, 2), (0.005, 1), (1.0, 1), (3600.0, 1), (f64::INFINITY, 1)]);
        assert!((sum - 7201.004).abs() < 1e-6);
    }

    #[test]
    fn connections_are_active_from_their_beginning_to_their_end() {
        let counts = Counts::default();
        counts.begin();
        counts.begin();
        assert_eq!(counts.active(), 2);
        counts.end(Ending::Reset, Duration::ZERO);
        assert_eq!((counts.active(), counts.endings.get(Ending::Reset)), (1, 1));
    }

    #[test]
    fn only_what_is_new_is_summed_up() {
        let counter = Counter::default();
        let mut before = Vec::new();
        let mut new = || counter.take_new(&mut before).into_iter().map(|(_, new)| new).sum::<u64>();
        assert_eq!(new(), 0);
        counter.add(Refusal::Access);
        counter.add(Refusal::Aborted);
        assert_eq!((new(), new()), (2, 0));
    }

    #[test]
    fn a_limit_is_reported_once_until_a_whole_interval_without_waiting_clients() {
        let counts = Counts::default();
        assert!(counts.note_limit_reached() && !counts.note_limit_reached());
        // Clients waited in this interval; in the next, all connections are still in use.
        assert!(!counts.take_limit_recovered(false) && !counts.take_limit_recovered(true));
        assert!(counts.take_limit_recovered(false) && !counts.take_limit_recovered(false));
        assert!(counts.note_limit_reached());
    }
}
