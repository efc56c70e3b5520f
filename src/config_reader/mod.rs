//! Reads tables, keys and values of a TOML file and reports faults with their lines.
//!
//! Every module reads its own section through a [`table::Table`]; faults are collected as
//! [`diagnostic`]s, so that all are reported at once. Knows no section.

pub(crate) mod diagnostic;
pub(crate) mod table;
pub(crate) mod values;
