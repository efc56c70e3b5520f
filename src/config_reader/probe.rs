//! Questions about the machine that a configuration raises. The reader only collects them; the
//! probe stage of `config` answers them.

use std::fmt;
use std::path::PathBuf;

use crate::config_reader::source::Origin;

/// A question with the value that raised it.
#[derive(Debug)]
pub(crate) struct Probe {
    pub origin: Origin,
    /// The value as it is written, for diagnostics.
    pub text: String,
    pub question: Question,
}

/// The kind of a path that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathKind {
    File,
    Folder,
}

/// A question about the machine.
pub(crate) enum Question {
    /// The addresses of a host.
    Resolve { host: String, port: u16 },
    /// Whether a path to serve is a file or a folder, and can be opened.
    PathKind(PathBuf),
    /// The canonical path of a folder that exists or can be created.
    Folder(PathBuf),
    /// Any other check. Its error names the expected value.
    Check(Box<dyn FnOnce() -> Result<(), String> + Send>),
}

impl fmt::Debug for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resolve { host, port } => write!(f, "Resolve({host}:{port})"),
            Self::PathKind(path) => write!(f, "PathKind({})", path.display()),
            Self::Folder(path) => write!(f, "Folder({})", path.display()),
            Self::Check(_) => f.write_str("Check"),
        }
    }
}
