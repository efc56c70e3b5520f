//! What a service counts, for the log's sums and for the metrics.
//!
//! Plain atomic numbers: counting takes no lock, and whoever reads them asks nobody to wait.
//! They only grow, also across a reload that changes the service.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

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
pub const DURATION_BOUNDS: [f64; 12] =
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
    /// What the log has been told.
    summed_up: Mutex<Sums>,
}

/// When the listeners of a service last had a fault, and when that was last said.
#[derive(Debug, Default)]
struct Trouble {
    last: Option<Instant>,
    said: Option<Instant>,
}

/// What strangers can cause at will, which the log sums up.
#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    answered: u64,
    dropped: u64,
    denied: u64,
    crowded: u64,
    headless: u64,
    aborted: u64,
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

    /// Logs what strangers have caused since the last time, if anything.
    pub fn sum_up(&self, service: &str) {
        let dropped = self.datagrams.each().filter(|(became, _)| *became != Datagram::Answered);
        let now = Sums {
            answered: self.datagrams.get(Datagram::Answered),
            dropped: dropped.map(|(_, number)| number).sum(),
            denied: self.refusals.get(Refusal::Access),
            crowded: self.refusals.get(Refusal::MaxPerClient),
            headless: self.refusals.get(Refusal::ProxyProtocol),
            aborted: self.refusals.get(Refusal::Aborted),
        };
        let mut summed_up = self.summed_up.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *summed_up, now);
        drop(summed_up);

        let (answered, dropped) = (now.answered - before.answered, now.dropped - before.dropped);
        if answered + dropped > 0 {
            let message =
                format_args!("{service}: {answered} datagrams answered, {dropped} dropped");
            tracing::info!(service, answered, dropped, "{message}");
        }
        let (denied, crowded) = (now.denied - before.denied, now.crowded - before.crowded);
        if denied + crowded > 0 {
            let message = format_args!(
                "{service}: connections reset: {denied} not permitted, {crowded} over max-per-client"
            );
            tracing::info!(service, denied, crowded, "{message}");
        }
        let headless = now.headless - before.headless;
        if headless > 0 {
            let message = format_args!(
                "{service}: {headless} connections reset: no PROXY header of a balancer"
            );
            tracing::info!(service, headless, "{message}");
        }
        let aborted = now.aborted - before.aborted;
        if aborted > 0 {
            let message = format_args!("{service}: {aborted} connections given up in the queue");
            tracing::info!(service, aborted, "{message}");
        }
    }

    /// A listener ran into a fault that is not its clients'. True if it is time to say so.
    pub fn note_trouble(&self) -> bool {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
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
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.last.is_some_and(|last| last.elapsed() < TROUBLE_LASTS)
    }
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
}
