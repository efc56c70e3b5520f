//! Tests of the executable with real clients.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod activation;
#[cfg(feature = "gateway")]
mod alerts;
mod ask;
mod bare;
mod check;
mod clients;
mod clock_jumps;
mod common;
mod control;
mod cost;
#[cfg(feature = "gateway")]
mod crash;
mod delivery;
mod documents;
#[cfg(feature = "gateway")]
mod download;
mod faults;
mod fetch;
mod file;
mod file_systems;
mod folder;
#[cfg(feature = "gateway")]
mod gateway;
mod good;
#[cfg(feature = "gateway")]
mod http;
mod hung_fs;
mod layers;
mod limits;
mod load;
mod logs;
mod lost_logs;
#[cfg(feature = "gateway")]
mod mail;
mod man;
mod metrics;
#[cfg(feature = "gateway")]
mod mirror;
#[cfg(feature = "gateway")]
mod monitoring;
mod mounts;
#[cfg(not(feature = "gateway"))]
mod no_gateway;
mod package;
mod probes;
#[cfg(feature = "gateway")]
mod smtp_server;

mod proxy_protocol;
mod reload;
mod save_faults;
mod scale_out;
mod servers;
mod shutdown;
mod slow_peers;
#[cfg(feature = "gateway")]
mod sms;
mod soak;
mod strace;
mod supply;
mod systemd;
mod terminal;
mod time;
#[cfg(feature = "gateway")]
mod tls;
mod traceability;
#[cfg(feature = "gateway")]
mod web;
