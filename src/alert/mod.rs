//! Alerts: collects events, groups them into notifications and sends these to channels.
//!
//! An event of the daemon passes through [`grouping`] (one notification per `wait`) → [`outbox`]
//! (stored until sent, across restarts) → [`dispatcher`] (retries) → [`delivery`] → a channel of
//! `notify`. [`config`] reads `[alert]`. Nothing here speaks SMTP or HTTP.

pub(crate) mod config;
mod delivery;
pub(crate) mod dispatcher;
mod grouping;
mod outbox;
