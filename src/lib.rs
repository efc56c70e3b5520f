//! Serves the time and files over plain TCP, UDP and Unix sockets.
//!
//! | folder | subject |
//! |---|---|
//! | [`cli`] | the command line: one file per subcommand |
//! | [`daemon`] | the supervisor: start, reload, drain, health |
//! | [`config`] | the whole configuration: parse, validate, probe |
//! | `mirror` | mirrors and `download` |
//! | `alert` | alerts: grouping, outbox, dispatcher |
//! | `notify` | mail and SMS channels |
//! | `http` | the HTTP(S) client |
//! | [`services`] | one file per kind of service, and their registry |
//! | [`client`] | the clients `time` and `fetch` |
//! | [`net`] | sockets, connections and limits, for any service |
//! | [`telemetry`] | logs, counters and metrics |
//! | [`document`] | the JSON document that carries a file |
//! | [`clock`] | time formats and the health of the kernel's clock |
//! | [`fs`] | files and folders on any file system |
//! | [`config_reader`] | tables, keys, values and diagnostics of the configuration file |
//!
//! Single files: [`secret`] (secrets from files and credentials), [`text`] (wording shared by
//! messages), [`sys`] (the only unsafe code), [`runtime`] (an event loop for each core).
//!
//! `docs/architecture.md` follows a connection, a configuration value, an alert and a mirrored file
//! through the folders.
// Not `forbid`, which would not let `kernel` have its exception.
#![deny(unsafe_code, missing_docs)]
#![warn(clippy::pedantic, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
#![allow(clippy::must_use_candidate, clippy::struct_excessive_bools)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing))]

#[cfg(feature = "gateway")]
pub mod alert;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod config_reader;
pub mod daemon;
pub mod document;
pub mod fs;
#[cfg(feature = "gateway")]
pub mod http;
#[cfg(feature = "gateway")]
pub mod mirror;
pub mod net;
#[cfg(feature = "gateway")]
pub mod notify;
pub mod runtime;
pub mod secret;
pub mod services;
pub mod sys;
pub mod telemetry;
pub mod text;
