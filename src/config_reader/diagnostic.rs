//! Diagnostics: every fault of a configuration with its position, its key and the remedy.

use std::fmt;

use crate::text::counted;

/// Maximum number of diagnostics that are printed: a file with more is no configuration but junk.
const MAX_PRINTED: usize = 1000;

/// A position in the sources of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Position {
    /// The file as a whole.
    File(String),
    /// A line of the file, counted from 1.
    Line(String, usize),
    /// An argument of the command line.
    Argument(String),
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => f.write_str(file),
            Self::Line(file, line) => write!(f, "{file}:{line}"),
            Self::Argument(argument) => f.write_str(argument),
        }
    }
}

/// A fault of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Diagnostic {
    pub position: Position,
    /// The key with the tables around it, such as `time.clock.format`; may be empty.
    pub key: String,
    /// The fault, and the expected value.
    pub message: String,
    /// Whether the machine is at fault, not the configuration: a retry may succeed.
    pub is_transient: bool,
}

impl Diagnostic {
    /// Returns a permanent fault of a whole file.
    pub(crate) fn of_file(file: String, message: impl Into<String>) -> Self {
        Self {
            position: Position::File(file),
            key: String::new(),
            message: message.into(),
            is_transient: false,
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.position)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// Every fault of a configuration; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// Whether a retry may succeed without a change of the configuration.
    pub(crate) fn is_transient(&self) -> bool {
        self.0.iter().all(|diagnostic| diagnostic.is_transient)
    }
}

impl From<Diagnostic> for Diagnostics {
    fn from(diagnostic: Diagnostic) -> Self {
        Self(vec![diagnostic])
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, diagnostic) in self.0.iter().take(MAX_PRINTED).enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            diagnostic.fmt(f)?;
        }
        match self.0.len().saturating_sub(MAX_PRINTED) {
            0 => Ok(()),
            more => write!(f, "\nand {}", counted(more, "more fault")),
        }
    }
}
