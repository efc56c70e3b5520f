//! Reasons why a fetch fails.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::client::ConnectError;
use crate::document::ReadError;
use crate::fs::filename::NameError;
use crate::text::counted;
use crate::text::error_chain;

/// Failure to fetch a document or listing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The established connection failed.
    #[error("the connection failed")]
    Network(#[source] io::Error),
    /// The server made no progress within the idle timeout.
    #[error("the server sent nothing for {0:?} (--idle-timeout)")]
    IdleTimedOut(Duration),
    /// The server sent no data although no file was requested by name.
    #[error(
        "{server} sent nothing: {}: a folder service waits for requests: try --list or --all",
        error_chain(.cause)
    )]
    NothingSent {
        /// Host and port of the server.
        server: String,
        /// End of the connection.
        cause: Box<Error>,
    },
    /// The overall deadline passed.
    #[error("it took longer than {0:?} (--timeout)")]
    TimedOut(Duration),
    /// The document is malformed or exceeds a limit.
    #[error("the document is invalid")]
    InvalidDocument(#[from] ReadError),
    /// The server replied with an error message.
    #[error("the server says: {0}")]
    Refused(String),
    /// The server sent a different file from the requested one.
    #[error("the server sent \"{0}\" instead: it may serve a single file: fetch without a name")]
    WrongName(String),
    /// The file name is unsafe.
    #[error("unsafe file name \"{name}\": {cause}: choose a name with -o FILE")]
    UnsafeName {
        /// Escaped name.
        name: String,
        /// Violated rule.
        cause: NameError,
    },
    /// The document contains more or less data than it declares.
    #[error("the server promised {} and sent {sent}", counted(*declared, "byte"))]
    SizeMismatch {
        /// Size in the document, in bytes.
        declared: u64,
        /// Length of the received data, in bytes.
        sent: u64,
    },
    /// The data does not match the SHA-256 digest in the document.
    #[error("the SHA-256 digest in the document does not match the received data")]
    DigestMismatch,
    /// The output file exists, and overwriting is not allowed.
    #[error("{} is there already; --force replaces it, -o FILE saves elsewhere", .0.display())]
    Exists(PathBuf),
    /// Two requested files map to the same path.
    #[error("{} is the path of another requested file, too", .0.display())]
    DuplicatePath(PathBuf),
    /// The output path is a device, FIFO or socket that the user did not name.
    #[error(
        "{} is a device, FIFO or socket, which is never replaced: choose another name with -o FILE",
        .0.display()
    )]
    SpecialFile(PathBuf),
    /// The user named a socket, which cannot be opened for writing.
    #[error("{} is a socket: choose a file, a FIFO, a device or a folder with -o", .0.display())]
    Socket(PathBuf),
    /// Writing the output failed.
    #[error("cannot write {}", .path.display())]
    Write {
        /// Output file or folder.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The reply to a listing request is not a listing.
    #[error("the server sent no list: it may serve a single file: fetch without a name")]
    NotAListing,
}
