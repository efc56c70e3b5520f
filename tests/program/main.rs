//! Tests of the real program, with the clients that people have.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod activation;
#[cfg(all(feature = "alert", feature = "mirror"))]
mod alerts;
mod ask;
mod bare;
mod check;
mod clients;
mod clock_jumps;
mod common;
mod control;
mod cost;
#[cfg(all(feature = "alert", feature = "mirror"))]
mod crash;
mod delivery;
mod documents;
#[cfg(feature = "mirror")]
mod download;
mod faults;
mod fetch;
mod file;
mod file_systems;
mod folder;
#[cfg(feature = "mirror")]
mod gateway;
mod good;
#[cfg(feature = "mirror")]
mod http;
mod limits;
mod load;
mod logs;
mod lost_logs;
#[cfg(all(feature = "alert", feature = "mirror"))]
mod mail;
mod manual;
mod metrics;
#[cfg(feature = "mirror")]
mod mirror;
#[cfg(all(feature = "alert", feature = "mirror"))]
mod monitoring;
mod mounts;
#[cfg(not(feature = "alert"))]
mod no_alert;
#[cfg(not(feature = "mirror"))]
mod no_mirror;
mod package;
#[cfg(all(feature = "alert", feature = "mirror"))]
mod postbox;
mod probes;
mod promises;
mod proxy_protocol;
mod reload;
mod save_faults;
mod scale_out;
mod servers;
mod shutdown;
mod slow_peers;
#[cfg(all(feature = "alert", feature = "mirror"))]
mod sms;
mod soak;
mod strace;
mod stuck;
mod supply;
mod systemd;
mod terminal;
mod time;
#[cfg(feature = "mirror")]
mod tls;
#[cfg(feature = "mirror")]
mod web;
