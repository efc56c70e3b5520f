//! The sources of a configuration, and the origin of each value.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt::{self, Display};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use crate::config_reader::diagnostic::{Diagnostic, Position};
use crate::config_reader::probe::{Probe, Question};

/// Proof that a diagnostic was reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reported;

/// The origin of a value.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    /// The position of the value; for a default, the position of its table.
    pub position: Position,
    /// The key with the tables around it, such as `time.clock.format`.
    pub key: String,
    pub is_default: bool,
}

impl Origin {
    /// Returns a permanent fault of the value.
    pub(crate) fn diagnostic(&self, message: impl Display) -> Diagnostic {
        Diagnostic {
            position: self.position.clone(),
            key: self.key.clone(),
            message: message.to_string(),
            is_transient: false,
        }
    }
}

/// A value with its origin. Comparisons ignore the origin: a moved line changes nothing.
#[derive(Debug, Clone)]
pub(crate) struct Spanned<T> {
    pub value: T,
    pub origin: Origin,
}

impl<T> Spanned<T> {
    pub(crate) fn map<U>(self, map: impl FnOnce(T) -> U) -> Spanned<U> {
        Spanned { value: map(self.value), origin: self.origin }
    }
}

impl<T> Deref for Spanned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: PartialEq> PartialEq for Spanned<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<T: fmt::Display> fmt::Display for Spanned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}

/// Removes the origins of a list, which is empty if the key is missing.
pub(crate) fn values_of<T>(spanned: Option<Vec<Spanned<T>>>) -> Vec<T> {
    spanned.into_iter().flatten().map(|spanned| spanned.value).collect()
}

/// A file or the arguments, with the diagnostics and the probes that its tables raise.
pub(crate) struct Source {
    kind: SourceKind,
    /// Offsets of the line feeds in the text.
    line_ends: Vec<usize>,
    base_dir: PathBuf,
    diagnostics: RefCell<Vec<Diagnostic>>,
    probes: RefCell<Vec<Probe>>,
}

enum SourceKind {
    File(String),
    /// In the order of the lines.
    Arguments(Vec<String>),
}

impl Source {
    /// Creates the source of a file, whose relative paths begin at `base_dir`.
    pub(crate) fn file(name: String, text: &str, base_dir: PathBuf) -> Self {
        Self::new(SourceKind::File(name), text, base_dir)
    }

    /// Creates the source of command-line arguments, one for each line of `text`; relative paths
    /// begin at the working directory.
    pub(crate) fn arguments(arguments: Vec<String>, text: &str) -> Self {
        Self::new(SourceKind::Arguments(arguments), text, PathBuf::new())
    }

    fn new(kind: SourceKind, text: &str, base_dir: PathBuf) -> Self {
        let line_ends = text.match_indices('\n').map(|(end, _)| end).collect();
        let (diagnostics, probes) = (RefCell::default(), RefCell::default());
        Self { kind, line_ends, base_dir, diagnostics, probes }
    }

    pub(crate) fn base_dir(&self) -> &Path {
        &self.base_dir
    }

    pub(super) fn origin(&self, offset: usize, key: String, is_default: bool) -> Origin {
        let line = self.line_ends.partition_point(|end| *end < offset);
        let position = match &self.kind {
            SourceKind::File(name) => Position::Line(name.clone(), line + 1),
            SourceKind::Arguments(arguments) => {
                let argument = arguments.get(line).expect("each line has an argument");
                Position::Argument(argument.clone())
            }
        };
        Origin { position, key, is_default }
    }

    /// Parses the text of this source, and reports each error.
    pub(crate) fn parse<'a>(&self, text: &'a str) -> DeTable<'a> {
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let offset = error.span().unwrap_or_default().start;
            let origin = self.origin(offset, String::new(), false);
            self.report(&origin, format_args!("not TOML: {}", error.message()));
        }
        table.into_inner()
    }

    pub(super) fn report(&self, origin: &Origin, message: impl Display) -> Reported {
        self.diagnostics.borrow_mut().push(origin.diagnostic(message));
        Reported
    }

    pub(super) fn probe(&self, origin: Origin, text: &str, question: Question) {
        self.probes.borrow_mut().push(Probe { origin, text: text.to_owned(), question });
    }

    /// Returns the collected diagnostics and probes.
    pub(crate) fn into_parts(self) -> (Vec<Diagnostic>, Vec<Probe>) {
        let mut diagnostics = self.diagnostics.into_inner();
        let is_syntax = |diagnostic: &Diagnostic| diagnostic.key.is_empty();
        // The keys and values of a line that is not TOML are not reliable.
        let broken: HashSet<_> = diagnostics
            .iter()
            .filter(|diagnostic| is_syntax(diagnostic))
            .map(|diagnostic| diagnostic.position.clone())
            .collect();
        let is_sound = |origin: &Position| !broken.contains(origin);
        diagnostics.retain(|diagnostic| is_syntax(diagnostic) || is_sound(&diagnostic.position));
        let mut probes = self.probes.into_inner();
        probes.retain(|probe| is_sound(&probe.origin.position));
        (diagnostics, probes)
    }
}
