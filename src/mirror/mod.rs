//! Mirrors: copies files of HTTP(S) servers into a folder.
//!
//! A run passes through [`listing`] (JSON to entries) → [`sync`] (what to copy, in parallel) →
//! [`download`] (one file: request, resume, verify) → [`target_dir`] (names, partial files) →
//! [`manifest`] (what is known of the files). [`config`] reads `[mirror.NAME]` and runs the jobs.
//! Requests and retries belong to `http`; nothing here serves a file.

pub mod config;
pub mod download;
pub mod listing;
pub mod manifest;
pub mod sync;
pub mod target_dir;
