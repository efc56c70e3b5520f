//! Alert events and the channel that carries them from the daemon to the alert dispatcher.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use tokio::sync::mpsc;

use crate::telemetry::counters::{Counter, Label};

/// Maximum number of events that wait for the dispatcher.
pub(crate) const CAPACITY: usize = 1024;

/// The kinds of events, named as in `on` of `[alert]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    ServiceFailed,
    FileMissing,
    MirrorFailed,
    /// A mirror has new files; a one-shot event.
    MirrorUpdated,
    ClockUnsynchronized,
    Overloaded,
    ReloadFailed,
    /// A channel cannot send. Reported over the other channels.
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

/// A change that may be reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: Kind,
    /// The affected object, such as `file.picture`.
    pub(crate) subject: Arc<str>,
    pub(crate) at: Timestamp,
    pub(crate) change: Change,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// A condition begins, or its description changes.
    Begun(String),
    Ended,
    /// Something without a duration.
    OneShot {
        description: String,
        files: Vec<PathBuf>,
    },
}

/// The sending side. Without a connected dispatcher, events are discarded.
#[derive(Debug, Clone, Default)]
pub(crate) struct EventSender {
    sender: Arc<OnceLock<mpsc::Sender<Event>>>,
    lost: Arc<AtomicU64>,
}

impl EventSender {
    /// Returns the receiving side, which exists only once.
    pub(crate) fn connect(&self) -> Option<mpsc::Receiver<Event>> {
        let (sender, events) = mpsc::channel(CAPACITY);
        self.sender.set(sender).ok().map(|()| events)
    }

    /// Sends an event without waiting. Returns false if the channel is full, which is counted.
    pub(crate) fn send(&self, event: Event) -> bool {
        let Some(sender) = self.sender.get() else { return true };
        let is_sent = sender.try_send(event).is_ok();
        if !is_sent {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        is_sent
    }

    /// Returns the number of events that the full channel refused.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// The outcome of an alert, or of an attempt to send it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlertOutcome {
    Sent,
    /// Not sent; tried again.
    Failed,
    /// Given up after the maximum number of attempts.
    Refused,
    /// Suppressed by `max-per-hour`, and counted in the next message.
    Withheld,
    /// Given up because it is too old.
    Expired,
}

impl Label for AlertOutcome {
    const NAMED: &'static [(Self, &'static str)] = &[
        (Self::Sent, "sent"),
        (Self::Failed, "failed"),
        (Self::Refused, "refused"),
        (Self::Withheld, "withheld"),
        (Self::Expired, "expired"),
    ];
}

/// Counters of a channel, which survive reloads.
#[derive(Debug)]
pub struct ChannelCounters {
    /// Name of the channel, such as `mail.ops`.
    pub channel: Arc<str>,
    pub outcomes: Counter<AlertOutcome>,
    queued: AtomicU64,
}

impl ChannelCounters {
    pub(crate) fn new(channel: Arc<str>) -> Self {
        Self { channel, outcomes: Counter::default(), queued: AtomicU64::new(0) }
    }

    pub(crate) fn set_queued(&self, queued: usize) {
        self.queued.store(queued as u64, Ordering::Relaxed);
    }

    pub(crate) fn queued(&self) -> u64 {
        self.queued.load(Ordering::Relaxed)
    }
}
