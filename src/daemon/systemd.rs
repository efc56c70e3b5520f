//! Notifications to the service manager (`sd_notify(3)`): readiness, reloads, the stop, a status
//! line and the keep-alives of the watchdog.
//!
//! Nothing here blocks if the manager does not read its socket: failed messages are retried, and
//! only the newest state is pending. Without `NOTIFY_SOCKET` nothing is sent.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

use parking_lot::Mutex;
use sd_notify::NotifyState;
use tokio::sync::Notify;
use tokio::time::sleep;

/// Maximum length of a status in bytes. The manager ignores messages of 4096 bytes and more.
const MAX_STATUS: usize = 1024;

/// Interval between two attempts to send pending messages.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
pub(crate) struct Notifier {
    manager: Option<Manager>,
    state: Mutex<State>,
    /// Signals [`Self::retry_pending`] that a message is pending.
    failed: Notify,
}

#[derive(Debug)]
struct Manager {
    /// Non-blocking, and opened once, as descriptors may run out later.
    socket: UnixDatagram,
    address: SocketAddr,
}

#[derive(Debug, Default)]
struct State {
    pending: Pending,
    is_failing: bool,
    /// The first failure and the first recovery are logged, no others.
    logged_failure: bool,
    logged_recovery: bool,
}

/// Messages to send, in this order.
#[derive(Debug, Default)]
struct Pending {
    reloading: Option<String>,
    /// READY or STOPPING with its status.
    lifecycle: Option<String>,
    watchdog: Option<String>,
}

impl Pending {
    fn set_reloading(&mut self, message: String) {
        // `Type=notify-reload` needs RELOADING before READY; the READY of an earlier reload is
        // stale.
        *self = Self { reloading: Some(message), lifecycle: None, watchdog: self.watchdog.take() };
    }

    fn set_stopping(&mut self, message: String) {
        *self = Self { lifecycle: Some(message), ..Self::default() };
    }

    fn first(&mut self) -> Option<&mut Option<String>> {
        let slots = [&mut self.reloading, &mut self.lifecycle, &mut self.watchdog];
        slots.into_iter().find(|slot| slot.is_some())
    }
}

impl Notifier {
    /// Opens the socket that the environment names, and logs a failure.
    pub(crate) fn from_env() -> Self {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Self::default();
        };
        let manager = Manager::open(&name)
            .inspect_err(|error| {
                tracing::warn!(
                    cause = %error,
                    "cannot notify the service manager (NOTIFY_SOCKET): {error}"
                );
            })
            .ok();
        Self { manager, ..Self::default() }
    }

    /// Reports readiness, or the end of a reload.
    pub(crate) fn ready(&self, status: &str) {
        let message = message(&[NotifyState::Ready, NotifyState::Status(truncate(status))]);
        self.update(|pending| pending.lifecycle = Some(message));
    }

    /// Reports the start of a reload, which [`Self::ready`] ends.
    pub(crate) fn reloading(&self) {
        // Without a clock the message cannot be built, and the manager does not wait for it.
        let Ok(now) = NotifyState::monotonic_usec_now() else { return };
        let message = message(&[NotifyState::Reloading, now]);
        self.update(|pending| pending.set_reloading(message));
    }

    pub(crate) fn stopping(&self, status: &str) {
        let message = message(&[NotifyState::Stopping, NotifyState::Status(truncate(status))]);
        self.update(|pending| pending.set_stopping(message));
    }

    pub(crate) fn keep_alive(&self) {
        let message = message(&[NotifyState::Watchdog]);
        self.update(|pending| pending.watchdog = Some(message));
    }

    /// Retries failed messages until this future is dropped.
    pub(crate) async fn retry_pending(&self) {
        loop {
            self.failed.notified().await;
            sleep(RETRY_INTERVAL).await;
            self.update(|_| {});
        }
    }

    fn update(&self, change: impl FnOnce(&mut Pending)) {
        let Some(manager) = &self.manager else { return };
        let mut state = self.state.lock();
        change(&mut state.pending);
        while let Some(slot) = state.pending.first() {
            let message = slot.as_deref().expect("the first slot has a message");
            if let Err(error) = manager.socket.send_to_addr(message.as_bytes(), &manager.address) {
                state.fail(&error);
                self.failed.notify_one();
                return;
            }
            *slot = None;
        }
        state.recover();
    }
}

impl Manager {
    fn open(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] if !name.is_empty() => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(Path::new(name))?,
            _ => return Err(io::Error::other("expected an absolute path or @NAME")),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, address })
    }
}

impl State {
    fn fail(&mut self, error: &io::Error) {
        self.is_failing = true;
        if !std::mem::replace(&mut self.logged_failure, true) {
            let cause = match error.kind() {
                io::ErrorKind::WouldBlock => "it does not read its socket".to_owned(),
                _ => error.to_string(),
            };
            tracing::warn!(
                cause,
                "cannot notify the service manager (NOTIFY_SOCKET): {cause}: trying again, without \
                 further messages"
            );
        }
    }

    fn recover(&mut self) {
        if std::mem::take(&mut self.is_failing)
            && !std::mem::replace(&mut self.logged_recovery, true)
        {
            tracing::info!("the service manager takes notifications again");
        }
    }
}

/// Interval of [`Notifier::keep_alive`]: half of the manager's time limit, if it has one.
pub(crate) fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|half| !half.is_zero())
}

fn message(states: &[NotifyState<'_>]) -> String {
    let lines: Vec<_> = states.iter().map(ToString::to_string).collect();
    lines.join("\n") + "\n"
}

fn truncate(status: &str) -> &str {
    status.get(..status.floor_char_boundary(MAX_STATUS)).unwrap_or(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(pending: &mut Pending) -> Vec<String> {
        std::iter::from_fn(|| pending.first()?.take()).collect()
    }

    #[test]
    fn sends_only_the_newest_state() {
        let mut pending = Pending::default();
        for number in 0..3 {
            pending.set_reloading(format!("reloading {number}"));
            pending.lifecycle = Some(format!("ready {number}"));
            pending.watchdog = Some("watchdog".to_owned());
        }
        assert_eq!(take_all(&mut pending), ["reloading 2", "ready 2", "watchdog"]);
    }

    #[test]
    fn discards_the_outcome_of_the_last_reload_at_the_next() {
        let mut pending = Pending { lifecycle: Some("ready".to_owned()), ..Pending::default() };
        pending.set_reloading("reloading".to_owned());
        assert_eq!(take_all(&mut pending), ["reloading"]);
    }

    #[test]
    fn discards_everything_pending_at_the_stop() {
        let mut pending = Pending::default();
        pending.set_reloading("reloading".to_owned());
        pending.lifecycle = Some("ready".to_owned());
        pending.set_stopping("stopping".to_owned());
        assert_eq!(take_all(&mut pending), ["stopping"]);
    }

    #[test]
    fn accepts_paths_and_abstract_names_only() {
        for good in ["/run/systemd/notify", "@abstract", "@/run/looks/like/a/path"] {
            assert!(Manager::open(OsStr::new(good)).is_ok(), "{good}");
        }
        for bad in ["", "@", "notify", "vsock:2:1234"] {
            assert!(Manager::open(OsStr::new(bad)).is_err(), "{bad}");
        }
    }
}
