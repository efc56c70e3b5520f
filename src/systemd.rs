//! What the service manager is told: ready, stopping, a line of status, signs of life.
//!
//! Without a manager (`NOTIFY_SOCKET` is not set) all of this does nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// The longest status in bytes. The manager ignores messages of 4096 bytes and more, and nobody
/// reads as much on one line.
const MAX_STATUS: usize = 1024;

/// Everything is bound and opened.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(short(status))]);
}

fn short(status: &str) -> &str {
    status.get(..status.floor_char_boundary(MAX_STATUS)).unwrap_or(status)
}

/// A reload begins; [`ready`] ends it.
pub fn reloading() {
    // Without a clock there is nothing to say, and the manager does not wait for it.
    let Ok(now) = NotifyState::monotonic_usec_now() else { return };
    tell(&[NotifyState::Reloading, now]);
}

/// The order to stop has come.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// The event loop turns.
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// How often the manager wants to hear [`alive`]: half of what it waits for, if it does.
pub fn alive_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|half| !half.is_zero())
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(cause = %error, "the service manager cannot be told (NOTIFY_SOCKET): {error}");
    }
}
