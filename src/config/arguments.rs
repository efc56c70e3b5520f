//! Services that the command line requests, as tables like those of a file.

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::config::Sources;
use crate::config_reader::Source;
use crate::services::{self, Kind};

/// A service from the command line.
pub(super) struct Argument<'a> {
    pub source: Source,
    pub kind: &'static Kind,
    pub entries: DeTable<'a>,
}

impl<'a> Argument<'a> {
    pub(super) fn all(sources: &'a Sources) -> Vec<Self> {
        let time = sources.time.iter().map(|address| Self {
            source: Source::argument(format!("--time {address}")),
            kind: &services::TIME,
            entries: table([("listen", list(address))]),
        });
        let files = sources.files.iter().map(|(address, path)| Self {
            source: Source::argument(format!("--file {address}={path}")),
            kind: &services::FILE,
            entries: table([("listen", list(address)), ("path", DeValue::String(path.into()))]),
        });
        time.chain(files).collect()
    }
}

fn list(text: &str) -> DeValue<'_> {
    let mut list = DeArray::new();
    list.push(Spanned::new(0..0, DeValue::String(text.into())));
    DeValue::Array(list)
}

fn table<'a, const N: usize>(entries: [(&'a str, DeValue<'a>); N]) -> DeTable<'a> {
    let spanned =
        |(key, value): (&'a str, _)| (Spanned::new(0..0, key.into()), Spanned::new(0..0, value));
    entries.into_iter().map(spanned).collect()
}
