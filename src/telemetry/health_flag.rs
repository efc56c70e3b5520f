//! Why a service cannot read what it serves, if so.

use std::sync::{Mutex, PoisonError};

/// The trouble that a service is in, for the log, which says it once, and for monitoring.
#[derive(Debug, Default)]
pub(crate) struct Trouble(Mutex<Option<String>>);

impl Trouble {
    /// It is in trouble; true if it was not, or for another cause.
    pub(crate) fn begin(&self, cause: &str) -> bool {
        let mut trouble = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = trouble.as_deref() != Some(cause);
        if new {
            *trouble = Some(cause.to_owned());
        }
        new
    }

    /// It is in trouble no more; true if it was.
    pub(crate) fn end(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }

    /// What the trouble is.
    pub(crate) fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
