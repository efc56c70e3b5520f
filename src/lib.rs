//! handout hands out the time and files over plain TCP, UDP and Unix sockets.
//!
//! # The map
//!
//! | file | subject |
//! |---|---|
//! | [`cli`] | the command line as types |
//! | [`manual`] | the manual pages, from the command line and from the shipped configuration |
//! | [`client`] | the clients: ask the time, fetch files, trust no server |
//! | [`config`] | file and arguments to a checked [`config::Config`], every fault at once |
//! | [`daemon`] | the supervisor: ready, serve, reload, drain |
//! | [`running`] | what runs, and how it becomes what another configuration says |
//! | [`reload`] | the difference between what runs and what is configured |
//! | [`workers`] | an event loop for each core |
//! | [`sockets`] | sockets inherited or bound, with the options that they need |
//! | [`listener`] | the only accept loop, the only datagram loop |
//! | [`accepted`] | the socket of a connection, which is registered only when it has to wait |
//! | [`connection`] | deliver every byte or reset; deadlines; the log line of a connection |
//! | [`proxy_protocol`] | whom a balancer says that it speaks for |
//! | [`linger`] | connections that have been answered, until their end |
//! | [`limits`] | what a service may take; the rates of datagrams |
//! | [`places`] | one for each connection that a service may have |
//! | [`served`] | a running service with what its listeners share |
//! | [`counts`], [`metrics`] | what services count, and what monitoring is told of it |
//! | [`datagram`] | which datagrams are answered |
//! | [`services`] | one file for each service, and their registry |
//! | [`mirrors`] | the mirrors as the daemon knows them, in every build |
//! | [`alerts`] | what the operator is told of, as the daemon knows it, in every build |
//! | `outbound` | what is done to the outside: with the feature `mirror`, mirrors and `download`; with the feature `alert`, mail, SMS and alerts |
//! | `notify` | with the feature `alert`, the SMTP client |
//! | [`secret`] | secrets, which are read from files and not printed |
//! | [`document`] | the document that carries a file: written here, read by the client |
//! | [`readers`] | the threads that read files, and may be kept waiting |
//! | [`fs`] | files written whole, on any file system |
//! | [`files`] | regular files, and folders that no name leads out of |
//! | [`memory_file`] | files that are only in memory, and are sent without being copied |
//! | [`errors`] | errors as people read them |
//! | `text` | wording shared by messages, such as counts with their nouns |
//! | [`clock`] | the forms of the time, and the health of the kernel's clock |
//! | [`kernel`] | the only unsafe code: what no safe function exists for |
//! | [`logging`], [`systemd`] | what the operator and the service manager are told |
//!
//! A connection's way: [`sockets::bind`] → [`listener::Listener::accept`] → [`services::Service::answer`]
//! → [`connection::Connection::send`] → [`linger::see_to_the_end`], until every byte has arrived.
// Not `forbid`, which would not let `kernel` have its exception.
#![deny(unsafe_code, missing_docs)]
#![warn(clippy::pedantic, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
#![allow(clippy::must_use_candidate, clippy::struct_excessive_bools)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing))]

pub mod accepted;
pub mod alerts;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod connection;
pub mod counts;
pub mod daemon;
pub mod datagram;
pub mod document;
pub mod errors;
pub mod files;
pub mod fs;
#[cfg(any(feature = "alert", feature = "mirror"))]
pub mod http;
pub mod idle_timer;
pub mod kernel;
pub mod limits;
pub mod linger;
pub mod listener;
pub mod logging;
pub mod manual;
pub mod memory_file;
pub mod metrics;
pub mod mirrors;
#[cfg(feature = "alert")]
pub mod notify;
#[cfg(any(feature = "alert", feature = "mirror"))]
pub mod outbound;
pub mod places;
pub mod proxy_protocol;
pub mod readers;
pub mod reload;
pub mod running;
pub mod secret;
pub mod served;
pub mod services;
pub mod sockets;
pub mod systemd;
mod text;
pub mod workers;
