//! The reason why a service cannot read its files.

use parking_lot::Mutex;

/// The current problem of a service, for the log, which reports changes only, and for monitoring.
#[derive(Debug, Default)]
pub(crate) struct HealthFlag(Mutex<Option<String>>);

impl HealthFlag {
    /// Sets the problem. Returns whether it is new.
    pub(crate) fn set(&self, problem: &str) -> bool {
        let mut current = self.0.lock();
        let is_new = current.as_deref() != Some(problem);
        if is_new {
            *current = Some(problem.to_owned());
        }
        is_new
    }

    /// Clears the problem. Returns whether there was one.
    pub(crate) fn clear(&self) -> bool {
        self.0.lock().take().is_some()
    }

    pub(crate) fn problem(&self) -> Option<String> {
        self.0.lock().clone()
    }
}
