//! Alerts: collects events, groups them into notifications and sends these to channels.
//!
//! An event of the daemon passes through [`grouping`] (what is told, and when) → [`outbox`] (stored
//! until sent, across restarts) → [`dispatcher`] (one task; sends and retries) → a channel of
//! `notify`. [`config`] reads `[alert]`. Nothing here speaks SMTP or HTTP.

pub(crate) mod config;
pub(crate) mod dispatcher;
pub(crate) mod grouping;
pub(crate) mod outbox;
