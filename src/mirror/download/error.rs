//! The reasons why a file is not downloaded.

use std::io;
use std::time::Duration;

use bytesize::ByteSize;

use crate::fs::atomic::SaveError;
use crate::http::{client, retry};
use crate::text::counted;

/// The reason why a download failed; an existing file is unchanged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Http(#[from] client::Error),
    #[error("the server replied {status}{}", reason(*.status))]
    Status {
        /// Any status but 200, 203, 206 and 304.
        status: u16,
        /// Delay from the `Retry-After` header.
        retry_after: Option<Duration>,
    },
    #[error("the server sent a different byte range from the requested one")]
    UnexpectedRange,
    #[error("the server sent an unrequested content coding: {0}")]
    UnexpectedCoding(String),
    #[error("the media type is not among the accepted content-types: {0}")]
    MediaTypeRejected(String),
    #[error("the file is larger than {} ({key})", ByteSize(*.limit))]
    TooLarge {
        /// In bytes.
        limit: u64,
        /// The key or option that sets the limit.
        key: &'static str,
    },
    #[error("the files together would be larger than max-total")]
    TotalTooLarge,
    #[error("the server announced {} and sent {received}", counted(*promised, "byte"))]
    LengthMismatch { promised: u64, received: u64 },
    #[error("the SHA-256 digest of the file does not match that in the listing")]
    DigestMismatch,
    #[error("the download took longer than {0:?} (max-duration)")]
    TimedOut(Duration),
    #[error("the file exists already: --force replaces it, --update replaces it if it has changed")]
    Exists,
    #[error("a folder, link or special file has this name: only regular files are replaced")]
    NotAFile,
    #[error("another process is downloading this file")]
    Busy,
    #[error("cannot write the file: {0}")]
    Write(#[from] io::Error),
    #[error("the download was interrupted")]
    Interrupted,
}

impl From<SaveError> for Error {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Exists => Self::Exists,
            SaveError::SpecialFile => Self::NotAFile,
            SaveError::Io(error) if error.kind() == io::ErrorKind::IsADirectory => Self::NotAFile,
            SaveError::Io(error) => Self::of_partial(error),
            rejected @ SaveError::NameRejected(_) => Self::Write(io::Error::other(rejected)),
        }
    }
}

impl Error {
    /// Converts an error of a partial file, which another process may have locked.
    pub(super) fn of_partial(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::WouldBlock { Self::Busy } else { Self::Write(error) }
    }

    /// Whether a retry may succeed.
    pub(crate) fn is_temporary(&self) -> bool {
        match self {
            Self::Http(error) => error.is_temporary(),
            Self::Status { status, .. } => retry::is_temporary(*status),
            Self::LengthMismatch { .. } => true,
            _ => false,
        }
    }

    /// Returns the time that the server asked to wait.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

fn reason(status: u16) -> String {
    let reason = reqwest::StatusCode::from_u16(status).ok();
    let reason = reason.and_then(|status| status.canonical_reason());
    reason.map(|reason| format!(" ({reason})")).unwrap_or_default()
}
