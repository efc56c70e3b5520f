//! Tests of the real program, with the clients that people have.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod check;
mod clients;
mod common;
mod delivery;
mod documents;
mod file;
mod folder;
mod limits;
mod logs;
mod shutdown;
mod systemd;
mod time;
