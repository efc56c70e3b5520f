//! What is wrong with a configuration: every fault, each with its place, its key and what was
//! expected.

use std::fmt;

use crate::fs::blocking_pool::UNANSWERED;
use crate::text::counted;

/// Where a fault is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The file as a whole.
    File(String),
    /// A line of the file, counted from 1.
    Line(String, usize),
    /// An argument of the command line.
    Argument(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File(file) => f.write_str(file),
            Place::Line(file, line) => write!(f, "{file}:{line}"),
            Place::Argument(argument) => f.write_str(argument),
        }
    }
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// Where it is.
    pub place: Place,
    /// The key with the tables around it, as `time.clock.format`; empty if it is about no key.
    pub key: String,
    /// What is wrong, and what was expected.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.problem)
    }
}

/// How many faults are printed: beyond that, the file is no configuration but junk.
const MAX_TOLD: usize = 1000;

/// Every fault of a configuration; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Faults(pub Vec<Fault>);

impl Faults {
    /// Whether nothing is wrong but that a file system hangs, which is a fault of the machine and not of
    /// the configuration, so that it may be well later. The problem ends with that.
    pub fn may_pass(&self) -> bool {
        self.0.iter().all(|fault| fault.problem.ends_with(UNANSWERED))
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, fault) in self.0.iter().take(MAX_TOLD).enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        match self.0.len().saturating_sub(MAX_TOLD) {
            0 => Ok(()),
            more => write!(f, "\nand {}", counted(more, "more fault")),
        }
    }
}
