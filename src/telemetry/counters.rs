//! Counters of a service, for the metrics and for summaries in the log.
//!
//! They are atomic and never decrease, not even when a reload changes the service.

use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::telemetry::peer::Peer;
use crate::text::counted;

/// Time for which a service is unhealthy after a fault of a listener. It exceeds the longest
/// backoff.
const FAULT_DURATION: Duration = Duration::from_secs(5);

/// Minimum time between two log messages about faults.
const FAULT_LOG_INTERVAL: Duration = Duration::from_mins(1);

/// The outcome of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionOutcome {
    /// The client received the whole reply.
    Complete,
    /// The client or the network ended it.
    Reset,
    /// The client acknowledged no byte for `idle-timeout`.
    IdleTimeout,
    MaxDuration,
    /// The daemon or the service ended first.
    Shutdown,
    /// The service or this machine failed.
    Failed,
    /// A bug of handout.
    Panic,
}

/// The reason why a connection was not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectReason {
    /// The access lists do not permit the client.
    Access,
    MaxPerClient,
    /// A load balancer sent no valid PROXY header.
    ProxyProtocol,
    /// The client left the accept queue.
    Aborted,
}

/// The outcome of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datagram {
    Answered,
    /// A reply could be part of a loop, or reach more than one host.
    Unanswerable,
    /// The access lists do not permit the client.
    Access,
    /// Too many from this client or in total.
    Rate,
    /// The reply could not be sent.
    Failed,
}

/// A label of a counter, with its name in the log and in the metrics.
pub trait Label: Copy + PartialEq + 'static {
    /// All values and their names.
    const NAMED: &'static [(Self, &'static str)];

    /// Returns the name in the log and in the metrics.
    fn name(self) -> &'static str {
        Self::NAMED.iter().find(|(label, _)| *label == self).map_or("", |(_, name)| name)
    }
}

impl Label for ConnectionOutcome {
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

impl Label for RejectReason {
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

/// A counter for each value of a label.
#[derive(Debug)]
pub struct Counter<L: Label> {
    /// In the order of [`Label::NAMED`].
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
    /// Increments the counter of `label`.
    pub fn add(&self, label: L) {
        let mut counted = L::NAMED.iter().zip(&self.numbers);
        if let Some((_, number)) = counted.find(|((counted, _), _)| *counted == label) {
            number.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the value of each counter.
    pub fn each(&self) -> impl Iterator<Item = (L, u64)> {
        L::NAMED
            .iter()
            .zip(&self.numbers)
            .map(|((label, _), n)| (*label, n.load(Ordering::Relaxed)))
    }

    /// Returns the increments since the last call with the same `before`.
    fn take_new(&self, before: &mut Vec<u64>) -> Vec<(L, u64)> {
        before.resize(self.numbers.len(), 0);
        let new = self
            .each()
            .zip(before)
            .map(|((label, now), before)| (label, now - std::mem::replace(before, now)));
        new.collect()
    }

    /// Returns the counter of `label`.
    pub fn get(&self, label: L) -> u64 {
        self.each().find(|(counted, _)| *counted == label).map_or(0, |(_, number)| number)
    }

    /// Returns the sum of all counters.
    pub fn total(&self) -> u64 {
        self.each().map(|(_, number)| number).sum()
    }
}

/// Upper bounds of the histogram of durations, in seconds: from a reply of one packet to the
/// default `max-duration`.
pub(crate) const DURATION_BOUNDS: [f64; 12] =
    [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0];

/// Histogram of the durations of connections.
#[derive(Debug, Default)]
pub struct Durations {
    /// A bucket for each bound, and one for longer durations.
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

    /// Returns the sum in seconds, and the upper bound and count of each bucket (not cumulative).
    pub fn read(&self) -> (f64, Vec<(f64, u64)>) {
        let sum = Duration::from_micros(self.microseconds.load(Ordering::Relaxed)).as_secs_f64();
        let bounds = DURATION_BOUNDS.into_iter().chain([f64::INFINITY]);
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
        (sum, bounds.zip(counts).collect())
    }
}

/// The counters of one service.
#[derive(Debug, Default)]
pub struct Counts {
    begun: AtomicU64,
    /// Ended connections by outcome.
    pub outcomes: Counter<ConnectionOutcome>,
    /// Connections that were not served.
    pub rejections: Counter<RejectReason>,
    /// Received datagrams by outcome.
    pub datagrams: Counter<Datagram>,
    /// Durations of ended connections.
    pub durations: Durations,
    sent: AtomicU64,
    fault: Mutex<ListenerFault>,
    /// Connections that ended before the client read anything, mostly health checks and port scans.
    /// `outcomes` includes them.
    unserved: Counter<ConnectionOutcome>,
    /// An example peer for the log.
    unserved_peer: Mutex<Option<Peer>>,
    summarized: Mutex<Summarized>,
    limit: LimitState,
}

/// Whether clients wait because the connection limit is reached.
#[derive(Debug, Default)]
struct LimitState {
    /// A client had to wait since the last check.
    waited: AtomicBool,
    /// The log reports that the limit is reached.
    reported: AtomicBool,
}

/// The last fault of a listener, such as a lack of descriptors.
#[derive(Debug, Default)]
struct ListenerFault {
    last: Option<Instant>,
    logged: Option<Instant>,
}

/// The counts that the log contains already, in the order of their labels.
#[derive(Debug, Default)]
struct Summarized {
    datagrams: Vec<u64>,
    rejections: Vec<u64>,
    unserved: Vec<u64>,
}

impl Counts {
    /// Counts a started connection.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a started connection back, which is counted as rejected.
    pub fn take_back(&self) {
        self.begun.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts an ended connection.
    pub fn end(&self, outcome: ConnectionOutcome, duration: Duration) {
        self.outcomes.add(outcome);
        self.durations.add(duration);
    }

    /// Returns the number of open connections.
    pub fn active(&self) -> u64 {
        // In this order: a connection that begins and ends meanwhile must not count as ended only.
        let ended = self.outcomes.total();
        self.begun.load(Ordering::Relaxed).saturating_sub(ended)
    }

    /// Counts bytes that the kernel accepted for a client.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Returns the number of bytes that the kernel accepted for clients.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Counts a connection that ended before its client read anything, and is not logged itself.
    pub fn add_unserved(&self, outcome: ConnectionOutcome, peer: Peer) {
        self.unserved.add(outcome);
        // Any example will do, so none is worth a wait.
        if let Some(mut example) = self.unserved_peer.try_lock() {
            *example = Some(peer);
        }
    }

    /// Logs sums of rejected and unserved clients and of datagrams since the last call.
    pub fn log_summary(&self, service: &str, max_per_client: NonZeroU32) {
        let mut before = self.summarized.lock();
        let datagrams = self.datagrams.take_new(&mut before.datagrams);
        let rejections = self.rejections.take_new(&mut before.rejections);
        let unserved = self.unserved.take_new(&mut before.unserved);
        drop(before);
        log_datagrams(service, &datagrams);
        log_rejections(service, &rejections, max_per_client);
        let example = self.unserved_peer.lock().take();
        log_unserved(service, &unserved, example);
    }

    /// Records that a client waits for a permit. Returns whether to log it.
    pub fn note_limit_reached(&self) -> bool {
        self.limit.waited.store(true, Ordering::Relaxed);
        !self.limit.reported.swap(true, Ordering::Relaxed)
    }

    /// Returns whether to log that the limit is no longer reached: no client had to wait since the
    /// last call, so that a service at its limit does not fill the log. `is_full`: all permits are
    /// in use.
    pub fn take_limit_recovered(&self, is_full: bool) -> bool {
        let waited = self.limit.waited.swap(false, Ordering::Relaxed);
        !is_full && !waited && self.limit.reported.swap(false, Ordering::Relaxed)
    }

    /// Records a fault of a listener that no client caused. Returns whether to log it.
    pub fn note_fault(&self) -> bool {
        let mut fault = self.fault.lock();
        let now = Instant::now();
        fault.last = Some(now);
        let is_recent = |logged| now.duration_since(logged) < FAULT_LOG_INTERVAL;
        let must_log = !fault.logged.is_some_and(is_recent);
        if must_log {
            fault.logged = Some(now);
        }
        must_log
    }

    /// Whether a listener had a fault recently.
    pub fn has_recent_fault(&self) -> bool {
        let fault = self.fault.lock();
        fault.last.is_some_and(|last| last.elapsed() < FAULT_DURATION)
    }
}

fn log_datagrams(service: &str, new: &[(Datagram, u64)]) {
    let (answered, dropped): (Vec<_>, Vec<_>) =
        new.iter().partition(|(outcome, _)| *outcome == Datagram::Answered);
    let reasons = list_reasons(&dropped, |outcome| match outcome {
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

fn log_rejections(service: &str, new: &[(RejectReason, u64)], max_per_client: NonZeroU32) {
    let of = |reason| total(&new.iter().filter(|(label, _)| *label == reason).collect::<Vec<_>>());
    let (denied, over_client_limit) = (of(RejectReason::Access), of(RejectReason::MaxPerClient));
    let (missing_proxy_header, aborted) =
        (of(RejectReason::ProxyProtocol), of(RejectReason::Aborted));
    let connections = |count| counted(count, "connection");
    if denied + over_client_limit > 0 {
        let reasons = [(denied, "not permitted"), (over_client_limit, "over max-per-client")];
        let occurred = reasons.iter().filter(|(count, _)| *count > 0);
        let reasons: Vec<_> = occurred.map(|(count, why)| format!("{count} {why}")).collect();
        let limit =
            if over_client_limit > 0 { format!(" ({max_per_client})") } else { String::new() };
        let (connections, reasons) = (connections(denied + over_client_limit), reasons.join(", "));
        let message = format_args!("{service}: {connections} reset: {reasons}{limit}");
        tracing::info!(service, denied, over_client_limit, max_per_client, "{message}");
    }
    if missing_proxy_header > 0 {
        let connections = connections(missing_proxy_header);
        let message = format_args!("{service}: {connections} reset: no PROXY header");
        tracing::info!(service, missing_proxy_header, "{message}");
    }
    if aborted > 0 {
        let connections = connections(aborted);
        let message = format_args!("{service}: {connections} aborted by the client while queued");
        tracing::info!(service, aborted, "{message}");
    }
}

fn log_unserved(service: &str, new: &[(ConnectionOutcome, u64)], example: Option<Peer>) {
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
    fn counts_each_label_under_its_name() {
        let counter = Counter::default();
        counter.add(ConnectionOutcome::IdleTimeout);
        counter.add(ConnectionOutcome::IdleTimeout);
        counter.add(ConnectionOutcome::Panic);
        assert_eq!((counter.get(ConnectionOutcome::IdleTimeout), counter.total()), (2, 3));
        assert_eq!(ConnectionOutcome::IdleTimeout.name(), "idle-timeout");
    }

    #[test]
    fn counts_each_duration_in_one_bucket() {
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
    fn counts_connections_as_active_until_they_end() {
        let counts = Counts::default();
        counts.begin();
        counts.begin();
        assert_eq!(counts.active(), 2);
        counts.end(ConnectionOutcome::Reset, Duration::ZERO);
        assert_eq!((counts.active(), counts.outcomes.get(ConnectionOutcome::Reset)), (1, 1));
    }

    #[test]
    fn summarizes_new_counts_only() {
        let counter = Counter::default();
        let mut before = Vec::new();
        let mut new = || counter.take_new(&mut before).into_iter().map(|(_, new)| new).sum::<u64>();
        assert_eq!(new(), 0);
        counter.add(RejectReason::Access);
        counter.add(RejectReason::Aborted);
        assert_eq!((new(), new()), (2, 0));
    }

    #[test]
    fn reports_a_limit_once_until_no_client_waited_for_an_interval() {
        let counts = Counts::default();
        assert!(counts.note_limit_reached() && !counts.note_limit_reached());
        // Clients waited in this interval; in the next, all connections are still in use.
        assert!(!counts.take_limit_recovered(false) && !counts.take_limit_recovered(true));
        assert!(counts.take_limit_recovered(false) && !counts.take_limit_recovered(false));
        assert!(counts.note_limit_reached());
    }
}
