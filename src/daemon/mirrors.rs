//! Counters and results of mirrors.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::telemetry::counters::{Counter, Label};

/// What became of a file of a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum File {
    /// It was not here before.
    New,
    /// It replaced another content.
    Changed,
    /// It is as it was.
    Unchanged,
    /// It is not here, or as it was before.
    Failed,
    /// It had left the listing.
    Removed,
}

impl Label for File {
    const NAMED: &'static [(Self, &'static str)] = &[
        (Self::New, "new"),
        (Self::Changed, "changed"),
        (Self::Unchanged, "unchanged"),
        (Self::Failed, "failed"),
        (Self::Removed, "removed"),
    ];
}

/// How a run of a mirror ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// Everything is here.
    Complete,
    /// Something failed.
    Partial,
    /// Nothing could be done.
    Failed,
}

impl Label for Run {
    const NAMED: &'static [(Self, &'static str)] =
        &[(Self::Complete, "complete"), (Self::Partial, "partial"), (Self::Failed, "failed")];
}

/// What a mirror counts, also across a reload that changes it.
#[derive(Debug)]
pub struct Counts {
    /// The mirror's name, without its kind.
    pub name: Arc<str>,
    /// Files, by what became of them.
    pub files: Counter<File>,
    /// Runs, by how they ended.
    pub runs: Counter<Run>,
    received: AtomicU64,
    /// In seconds since 1970; 0 if there was none.
    last_success: AtomicU64,
    /// In microseconds, and one more; 0 if there was no run.
    last_duration: AtomicU64,
    /// Whether a run has come to its end, and what went wrong in the last.
    trouble: Mutex<(bool, Option<String>)>,
}

impl Counts {
    /// Of a mirror that has done nothing yet.
    pub fn new(name: Arc<str>) -> Self {
        Self {
            name,
            files: Counter::default(),
            runs: Counter::default(),
            received: AtomicU64::new(0),
            last_success: AtomicU64::new(0),
            last_duration: AtomicU64::new(0),
            trouble: Mutex::default(),
        }
    }

    /// So many bytes of files have been received.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many bytes of files have been received.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// A run has ended.
    pub fn end_run(&self, run: Run, duration: Duration) {
        self.runs.add(run);
        let microseconds = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.last_duration.store(microseconds.saturating_add(1), Ordering::Relaxed);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        if let (Run::Complete, Ok(now)) = (run, now) {
            self.last_success.store(now.as_secs(), Ordering::Relaxed);
        }
    }

    /// What went wrong in the last run, if anything.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// Whether a run has come to its end, so that it is known how it is.
    pub fn is_known(&self) -> bool {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// The last run went wrong in this way, or in none.
    pub fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = (true, trouble);
    }

    /// When everything was here the last time, in seconds since 1970.
    pub fn last_success(&self) -> Option<u64> {
        Some(self.last_success.load(Ordering::Relaxed)).filter(|seconds| *seconds > 0)
    }

    /// How long the last run took.
    pub fn last_duration(&self) -> Option<Duration> {
        let microseconds = self.last_duration.load(Ordering::Relaxed).checked_sub(1)?;
        Some(Duration::from_micros(microseconds))
    }
}

/// How many mirrors a change starts, changes, ends and leaves alone.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    /// New ones.
    pub started: usize,
    /// Those that do something else.
    pub changed: usize,
    /// Those that are gone.
    pub ended: usize,
    /// Those that stay as they are.
    pub kept: usize,
}
