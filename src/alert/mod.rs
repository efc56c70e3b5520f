//! Alerts: collects events, groups them into notifications and sends these to channels.
//!
//! An event of the daemon passes through [`grouping`] (one notification per `wait`) → [`outbox`]
//! (stored until sent, across restarts) → [`dispatch_task`] (retries) → [`delivery`] → a channel of
//! `notify`. [`dispatcher`] starts and stops the thread; [`config`] reads `[alert]`. Nothing here
//! speaks SMTP or HTTP.

pub(crate) mod config;
mod delivery;
mod dispatch_task;
pub(crate) mod dispatcher;
mod grouping;
mod outbox;
