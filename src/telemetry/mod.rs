//! Logs, counters and metrics of the daemon.
//!
//! Services and connections increment [`counters`]; [`metrics`] encodes them for monitoring.
//! [`logging`] formats log lines and hands them to [`log_queue`], whose thread writes to standard
//! error or to the journal ([`journald`]). Alerts belong to `alert`.

pub(crate) mod counters;
pub(crate) mod event;
pub(crate) mod health_flag;
mod journald;
mod log_queue;
pub(crate) mod logging;
pub(crate) mod metrics;
pub(crate) mod mirror_stats;
pub(crate) mod peer;
