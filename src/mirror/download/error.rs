//! The reasons why a file is not downloaded.

use std::io;
use std::time::Duration;

use bytesize::ByteSize;

use crate::fs::atomic::SaveError;
use crate::http::{client, retry};
use crate::text::counted;

/// The reason why a file is missing, or is as it was before.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Http(#[from] client::Error),
    #[error("the server answers {status}{}", reason(*.status))]
    Status {
        /// Any status but 200, 203, 206 and 304.
        status: u16,
        /// The parsed `Retry-After`.
        retry_after: Option<Duration>,
    },
    #[error("the server sent another part than the one that was asked for")]
    UnexpectedRange,
    #[error("the server sent it encoded ({0}), which was not asked for")]
    Encoded(String),
    #[error("it is of the type {0}, which is not among those that are taken (content-types)")]
    Type(String),
    #[error("it is larger than {} ({key})", ByteSize(*.limit))]
    TooLarge {
        /// In bytes.
        limit: u64,
        /// The key or option that sets the limit.
        key: &'static str,
    },
    #[error("all files together would be larger than max-total")]
    TotalTooLarge,
    #[error("the server announced {} and sent {received}", counted(*promised, "byte"))]
    Length { promised: u64, received: u64 },
    #[error("the digest does not hold: it is not what the listing says")]
    Digest,
    #[error("it took longer than {0:?} (max-duration)")]
    TimedOut(Duration),
    #[error("it is there already; --force replaces it, --update does if it has changed")]
    Exists,
    #[error("a folder, a link or another thing that is no file has its name")]
    NotAFile,
    #[error("another process is at it")]
    Busy,
    #[error("cannot be written: {0}")]
    Write(#[from] io::Error),
    #[error("it was interrupted")]
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
            Self::Length { .. } => true,
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
