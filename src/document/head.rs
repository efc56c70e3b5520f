//! The members of a document other than its data.

use jiff::Timestamp;
use serde::de::{Deserialize, Deserializer, Error};

use crate::text::from_hex;

/// Maximum length of `filename` and `error`, in bytes.
const MAX_TEXT: usize = 4096;

/// Maximum length of `modified`, in bytes.
const MAX_TIME: usize = 64;

/// The content of a document without its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    /// The document carried a file.
    File(File),
    /// The server refused the request.
    Refusal(Refusal),
}

/// The server's claims about a file, and the length that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Any text of at most 4096 bytes.
    pub filename: String,
    /// Announced length in bytes.
    pub size: Option<u64>,
    /// Time of the last change.
    pub modified: Option<Timestamp>,
    /// Announced SHA-256 digest of the data.
    pub sha256: Option<[u8; 32]>,
    /// Received length in bytes.
    pub length: u64,
}

/// The reason why the server sent no file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Any text of at most 4096 bytes.
    pub error: String,
    /// The requested name, if the server repeats it.
    pub filename: Option<String>,
}

/// The known members; others are ignored, as clients must tolerate later versions.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(super) struct Members {
    #[serde(deserialize_with = "filename")]
    pub(super) filename: Option<String>,
    #[serde(deserialize_with = "size")]
    pub(super) size: Option<u64>,
    #[serde(deserialize_with = "modified")]
    modified: Option<Timestamp>,
    #[serde(deserialize_with = "sha256")]
    sha256: Option<[u8; 32]>,
    #[serde(deserialize_with = "error")]
    error: Option<String>,
    /// Always empty: the reader removes the data.
    #[serde(deserialize_with = "filedata")]
    filedata: Option<String>,
}

impl Members {
    /// Combines the members with the received length of the data.
    pub(super) fn into_head(self, length: u64) -> Result<Head, &'static str> {
        let Self { filename, size, modified, sha256, error, filedata } = self;
        match (error, filedata, filename) {
            (Some(_), Some(_), _) => Err("both filedata and error"),
            (Some(error), None, filename) => Ok(Head::Refusal(Refusal { error, filename })),
            (None, _, None) => Err("filename is missing"),
            (None, None, _) => Err("filedata is missing"),
            (None, Some(_), Some(filename)) => {
                Ok(Head::File(File { filename, size, modified, sha256, length }))
            }
        }
    }
}

// serde does not name the member in its errors, and takes `null` for a missing one.

fn filename<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text(deserializer, "filename")
}

fn error<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text(deserializer, "error")
}

fn filedata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text(deserializer, "filedata")
}

fn text<'de, D: Deserializer<'de>>(deserializer: D, key: &str) -> Result<Option<String>, D::Error> {
    let problem = |error| D::Error::custom(format_args!("{key}: {error}"));
    let text = String::deserialize(deserializer).map_err(problem)?;
    if text.len() > MAX_TEXT {
        return Err(D::Error::custom(format_args!("{key}: longer than {MAX_TEXT} bytes")));
    }
    Ok(Some(text))
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let problem = |error| D::Error::custom(format_args!("size: {error}"));
    u64::deserialize(deserializer).map(Some).map_err(problem)
}

fn modified<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let text = text(deserializer, "modified")?.filter(|text| text.len() <= MAX_TIME);
    let time = text.and_then(|text| text.parse().ok());
    let problem = "modified: expected a time such as \"2026-11-22T05:46:01Z\"";
    time.map(Some).ok_or_else(|| D::Error::custom(problem))
}

fn sha256<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<[u8; 32]>, D::Error> {
    let digest = text(deserializer, "sha256")?.and_then(|text| from_hex(&text));
    digest.map(Some).ok_or_else(|| D::Error::custom("sha256: expected 64 hexadecimal digits"))
}
