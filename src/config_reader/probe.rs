//! Questions about the machine that a configuration raises, and their answers. The reader only
//! collects the questions; the probe stage of `config` answers them.

use core::net::SocketAddr;
use std::collections::HashMap;
use std::path::PathBuf;

use jiff::tz::TimeZone;

use crate::config_reader::source::Origin;

/// A question with the value that raised it.
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
    /// The time zone of a name.
    TimeZone(String),
    /// The canonical path of a folder that exists or can be created.
    Folder(PathBuf),
    /// Any other check. Its error names the expected value.
    Check(Box<dyn FnOnce() -> Result<(), String> + Send>),
}

/// The answers to all probes. Each section takes those to its questions.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// By host and port.
    pub addresses: HashMap<(String, u16), Vec<SocketAddr>>,
    pub path_kinds: HashMap<PathBuf, PathKind>,
    pub time_zones: HashMap<String, TimeZone>,
    /// Canonical paths of folders.
    pub folders: HashMap<PathBuf, PathBuf>,
}
