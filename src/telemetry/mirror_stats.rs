//! Counters and the last result of a mirror, for metrics and health.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use crate::telemetry::counters::{Counter, Label};

/// The outcome for a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileOutcome {
    New,
    Changed,
    Unchanged,
    Failed,
    /// The file had left the listing.
    Removed,
}

impl Label for FileOutcome {
    const NAMED: &'static [(Self, &'static str)] = &[
        (Self::New, "new"),
        (Self::Changed, "changed"),
        (Self::Unchanged, "unchanged"),
        (Self::Failed, "failed"),
        (Self::Removed, "removed"),
    ];
}

/// The outcome of a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SyncOutcome {
    Complete,
    /// At least one file failed.
    Partial,
    /// The listing or the folder failed.
    Failed,
}

impl Label for SyncOutcome {
    const NAMED: &'static [(Self, &'static str)] =
        &[(Self::Complete, "complete"), (Self::Partial, "partial"), (Self::Failed, "failed")];
}

/// Counters of a mirror, kept when a reload changes its settings.
#[derive(Debug)]
pub(crate) struct MirrorStats {
    /// The name without its kind.
    pub name: Arc<str>,
    pub files: Counter<FileOutcome>,
    pub syncs: Counter<SyncOutcome>,
    /// Received bytes of files.
    pub received: AtomicU64,
    last: Mutex<LastSync>,
}

/// The last sync that was not interrupted.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastSync {
    /// `None` before the first sync has ended.
    pub duration: Option<Duration>,
    pub failure: Option<String>,
    /// The end of the last complete sync, in seconds since 1970.
    pub success: Option<u64>,
}

impl MirrorStats {
    pub(crate) fn new(name: Arc<str>) -> Self {
        Self {
            name,
            files: Counter::default(),
            syncs: Counter::default(),
            received: AtomicU64::new(0),
            last: Mutex::default(),
        }
    }

    pub(crate) fn record_sync(
        &self,
        outcome: SyncOutcome,
        duration: Duration,
        failure: Option<String>,
    ) {
        self.syncs.add(outcome);
        let mut last = self.last.lock();
        last.duration = Some(duration);
        last.failure = failure;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        if let (SyncOutcome::Complete, Ok(now)) = (outcome, now) {
            last.success = Some(now.as_secs());
        }
    }

    pub(crate) fn last(&self) -> LastSync {
        self.last.lock().clone()
    }
}
