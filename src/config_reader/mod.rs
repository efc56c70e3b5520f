//! Reads tables, keys and values of a TOML file and reports faults with their lines.
//!
//! Every module reads its own section through a [`Table`]. Faults are collected as
//! [`Diagnostics`], so that all are reported at once; questions that need the machine are collected
//! as [`Probe`]s. Knows no section and performs no I/O.

pub(crate) mod diagnostic;
mod probe;
mod source;
mod table;
pub(crate) mod values;

pub(crate) use diagnostic::{Diagnostic, Diagnostics, Position};
pub(crate) use probe::{Findings, PathKind, Probe, Question};
pub(crate) use source::{Origin, Reported, Source, Spanned, values_of};
pub(crate) use table::Table;
