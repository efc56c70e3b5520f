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
// Not `forbid`, because `sys` needs an exception.
#![deny(unsafe_code, missing_docs)]
#![warn(unreachable_pub)]
#![warn(clippy::pedantic, clippy::unwrap_used, clippy::indexing_slicing)]
#![allow(clippy::missing_errors_doc, clippy::missing_panics_doc, clippy::must_use_candidate)]
#![allow(clippy::format_push_string, clippy::struct_excessive_bools)]
// Shared code that only the gateway calls is checked in the full build.
#![cfg_attr(
    not(feature = "gateway"),
    allow(dead_code, clippy::unnecessary_wraps, clippy::unused_self)
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing))]

#[cfg(feature = "gateway")]
mod alert;
pub mod cli;
mod client;
mod clock;
mod config;
mod config_reader;
mod daemon;
mod document;
mod fs;
#[cfg(feature = "gateway")]
mod http;
#[cfg(feature = "gateway")]
mod mirror;
mod net;
#[cfg(feature = "gateway")]
mod notify;
mod runtime;
mod secret;
mod services;
mod sys;
mod telemetry;
mod text;

/// Items for fuzz targets, benchmarks and tests; not an interface.
#[doc(hidden)]
pub mod internals {
    pub use crate::client::time_reply::{ParsedTime, read_rfc868, read_text};
    pub use crate::clock::Format;
    pub use crate::config::{Config, Sources, load_part};
    pub use crate::config_reader::diagnostic::Position;
    pub use crate::document::{File, Head, ReadError, Reader, Refusal, file_closing};
    pub use crate::fs::filename::{escape, escape_bytes, file_name, last_component, relative_path};
    pub use crate::fs::folder::{Folder, MAX_NAME};
    pub use crate::net::connection::{
        Connection, ConnectionContext, Deadlines, MoreToCome, Peer, ServeError, Shutdown, Stream,
    };
    pub use crate::net::memfd::MemoryFile;
    pub use crate::net::proxy_protocol::{MAX_HEADER, ParsedHeader};
    pub use crate::net::service::Service;
    pub use crate::net::udp_filter::may_be_answered;
    pub use crate::secret::{Secret, Secrets};
    pub use crate::services::folder::{FolderService, Settings as FolderSettings};
    pub use crate::services::metrics::MetricsService;
    pub use crate::services::time::{Settings as TimeSettings, TimeService};
    pub use crate::telemetry::metrics::Monitor;

    #[cfg(feature = "gateway")]
    pub use gateway::*;
    #[cfg(feature = "gateway")]
    mod gateway {
        pub use crate::http::egress::{EgressPolicy, Host};
        pub use crate::http::pointer::parse as parse_pointer;
        pub use crate::mirror::listing::{
            Entry, InvalidEntry, ParseError, Pointers, read as read_listing,
        };
        pub use crate::notify::address::EmailAddress;
        pub use crate::notify::mail::Settings as MailSettings;
        pub use crate::notify::outcome::{Failure, printable};
        pub use crate::notify::sms::Settings as SmsSettings;
        pub use crate::notify::smtp::start_tls;
        pub use crate::notify::smtp_client::{SharedStage, SmtpClient};
    }
}
