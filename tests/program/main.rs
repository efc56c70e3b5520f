//! Tests of the real program, with the clients that people have.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod activation;
mod ask;
mod check;
mod clients;
mod common;
mod cost;
mod delivery;
mod documents;
mod fetch;
mod file;
mod folder;
mod limits;
mod logs;
mod manual;
mod metrics;
mod monitoring;
mod package;
mod reload;
mod servers;
mod shutdown;
mod soak;
mod systemd;
mod time;
