//! Mirrors: copies files of HTTP(S) servers into a folder.
//!
//! A run passes through [`listing`] (JSON to entries) → [`sync`] (what to copy, in parallel) →
//! [`download`] (one file: request, resume, verify) → [`target_dir`] (names, partial files) →
//! [`manifest`] (what is known of the files). [`config`] reads `[mirror.NAME]` and runs the jobs.
//! Requests and retries belong to `http`; nothing here serves a file.

pub(crate) mod config;
pub(crate) mod download;
pub(crate) mod listing;
pub(crate) mod manifest;
pub(crate) mod sync;
pub(crate) mod target_dir;
