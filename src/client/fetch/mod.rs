//! Client of file services: receives documents and saves their files.
//!
//! A document is read, decoded and hashed while it arrives. The data goes into a temporary file
//! that is published after size and digest have been verified. The server is untrusted: its names
//! are checked, and size and duration of its replies are bounded.
//!
//! | file | subject |
//! |---|---|
//! | `destination` | output paths, and checks of existing files |
//! | `error` | reasons why a fetch fails |
//! | `listing` | listings of folder services |
//! | `session` | connections: buffering, timeouts, pipelined requests |
//! | `sink` | writers: temporary files, standard output, devices and FIFOs |

pub(crate) mod destination;
mod error;
mod listing;
mod session;
mod sink;

use std::collections::{HashSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout_at};

use self::destination::{NamedFile, pushed_path, requested_path};
pub(crate) use self::error::Error;
pub(crate) use self::listing::ListedFile;
use self::session::{BUFFER, Session};
use self::sink::Sink;
use crate::client::HostPort;
use crate::document::{File, Head, ReadError, Reader};
use crate::fs::atomic::OverwritePolicy;
use crate::fs::filename::escape;

/// Default port of file services.
pub(crate) const PORT: u16 = 5566;

/// Parameters of a fetch.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// Server to connect to.
    pub server: HostPort,
    /// Files to fetch.
    pub selection: Selection,
    /// Destination of the files.
    pub output: Output,
    /// Treatment of existing files.
    pub overwrite: OverwritePolicy,
    /// Maximum size of a file, in bytes.
    pub max_size: u64,
    /// Maximum duration of the whole fetch.
    pub timeout: Duration,
    /// Maximum time without progress by the server.
    pub idle_timeout: Duration,
}

/// Files to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// The document that the server pushes without a request.
    Pushed,
    /// Files of a folder, by name.
    Names(Vec<String>),
    /// All files of a folder.
    All,
}

/// Destination of fetched files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// A file, device or FIFO.
    File(PathBuf),
    /// A folder, in which the files keep their names.
    Folder(PathBuf),
}

/// A file that was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SavedFile {
    /// Output path; `None` for standard output.
    pub path: Option<PathBuf>,
    /// Length in bytes.
    pub length: u64,
    /// Whether the file existed with the same content and was not replaced.
    pub is_unchanged: bool,
}

/// Receiver of progress events.
pub(crate) trait FetchObserver {
    /// A file is about to be received; `name` is `None` for a pushed document.
    fn started(&mut self, name: Option<&str>);
    /// The server (host and port) has not sent any data for `duration`.
    fn stalled(&mut self, server: &str, duration: Duration);
    /// `length` bytes have been received, of `size` if the document declares it.
    fn advanced(&mut self, length: u64, size: Option<u64>);
    /// The file was saved.
    fn saved(&mut self, file: &SavedFile);
    /// The fetch of a file failed; `name` is the requested name.
    fn failed(&mut self, name: Option<&str>, error: &Error);
}

/// Fetches the listing of a folder.
///
/// # Errors
/// If the connection fails, or the server does not send a listing.
pub(crate) async fn list(options: &FetchOptions) -> Result<Vec<ListedFile>, Error> {
    list_until(options, Instant::now() + options.timeout).await
}

async fn list_until(options: &FetchOptions, deadline: Instant) -> Result<Vec<ListedFile>, Error> {
    listing::read_listing(&mut Session::connect(options, deadline).await?).await
}

/// Fetches the selected files and reports each to `observer`. Returns whether all were saved.
pub(crate) async fn fetch(options: &FetchOptions, observer: &mut impl FetchObserver) -> bool {
    let deadline = Instant::now() + options.timeout;
    let names = match &options.selection {
        Selection::Pushed => {
            observer.started(None);
            let result = fetch_pushed(options, deadline, observer).await;
            return report_result(result, None, observer);
        }
        Selection::Names(names) => names.clone(),
        Selection::All => match list_until(options, deadline).await {
            Ok(files) => files.into_iter().map(|file| file.filename).collect(),
            Err(error) => {
                observer.failed(None, &error);
                return false;
            }
        },
    };
    let (queue, is_complete) = build_queue(&names, options, observer);
    fetch_queue(queue, options, deadline, observer).await && is_complete
}

/// Reports `result` to `observer`. Returns whether the file was saved.
fn report_result(
    result: Result<SavedFile, Error>,
    name: Option<&str>,
    observer: &mut impl FetchObserver,
) -> bool {
    match result {
        Ok(file) => {
            observer.saved(&file);
            true
        }
        Err(error) => {
            observer.failed(name, &error);
            false
        }
    }
}

/// Fetches the document that the server sends without a request.
async fn fetch_pushed(
    options: &FetchOptions,
    deadline: Instant,
    observer: &mut impl FetchObserver,
) -> Result<SavedFile, Error> {
    let mut session = Session::connect(options, deadline).await?;
    let server = options.server.with_port(PORT);
    session
        .receive_first(&server, observer)
        .await
        .map_err(|cause| Error::NothingSent { server, cause: Box::new(cause) })?;
    receive(&mut session, None, options, observer).await
}

/// Returns the files to request, and whether these are all of `names`. Files that cannot be saved
/// are reported to `observer` and not requested.
fn build_queue<'a>(
    names: &'a [String],
    options: &FetchOptions,
    observer: &mut impl FetchObserver,
) -> (VecDeque<NamedFile<'a>>, bool) {
    let mut is_complete = true;
    let mut queue = VecDeque::new();
    let mut paths = HashSet::new();
    for name in names {
        let path = requested_path(name, options).and_then(|path| match path {
            Some(path) if !paths.insert(path.clone()) => Err(Error::DuplicatePath(path)),
            path => Ok(path),
        });
        match path {
            Ok(path) => queue.push_back(NamedFile { name, path }),
            Err(error) => {
                observer.failed(Some(name), &error);
                is_complete = false;
            }
        }
    }
    (queue, is_complete)
}

/// Fetches files by name over one connection, which is replaced after a failure. Returns whether
/// all were saved.
async fn fetch_queue(
    mut queue: VecDeque<NamedFile<'_>>,
    options: &FetchOptions,
    deadline: Instant,
    observer: &mut impl FetchObserver,
) -> bool {
    let mut all_saved = true;
    let mut session: Option<Session> = None;
    while let Some(file) = queue.front() {
        observer.started(Some(file.name));
        let is_reused = session.is_some();
        let fetching = async {
            let open = match session.take() {
                Some(open) => open,
                None => Session::connect(options, deadline).await?,
            };
            let session = session.insert(open);
            session.pipeline_requests(&queue).await?;
            receive(session, Some(file), options, observer).await
        };
        let result = fetching.await;
        if let Some(session) = &mut session {
            session.finish_request();
        }
        // After any other error, the position in the stream of replies is unknown.
        if !matches!(result, Ok(_) | Err(Error::Refused(_))) {
            session = None;
        }
        // A server may close the connection after each reply: retry on a new connection.
        if is_reused
            && matches!(result, Err(Error::Network(_) | Error::InvalidDocument(ReadError::Empty)))
        {
            continue;
        }
        let is_fatal = matches!(result, Err(Error::Connect(_) | Error::TimedOut(_)));
        all_saved &= report_result(result, Some(file.name), observer);
        queue.pop_front();
        if is_fatal {
            for file in &queue {
                let error = io::Error::other("not attempted after the previous failure");
                observer.failed(Some(file.name), &Error::Network(error));
            }
            return false;
        }
    }
    all_saved
}

/// Receives one document and saves its file. `requested` is `None` for a pushed document.
async fn receive(
    session: &mut Session,
    requested: Option<&NamedFile<'_>>,
    options: &FetchOptions,
    observer: &mut impl FetchObserver,
) -> Result<SavedFile, Error> {
    let output_path = |name: &str| match requested {
        Some(file) if file.name != name => Err(Error::WrongName(escape(name))),
        Some(file) => Ok(file.path.clone()),
        None => pushed_path(name, options),
    };
    let deadline = session.limits().deadline;
    let mut sink = Sink::open(requested, options, deadline).await?;
    let mut reader = Reader::new(options.max_size);
    let mut hasher = Sha256::new();
    let mut data = Vec::with_capacity(BUFFER);
    let (mut length, mut is_name_checked) = (0, false);
    while !reader.is_complete() && (!session.received().is_empty() || session.receive().await?) {
        let consumed = reader.feed(session.received(), &mut data)?;
        session.consume(consumed);
        hasher.update(&data);
        length += data.len() as u64;
        // Only the deadline applies: the idle timeout of the server must not include slow output.
        let appended = timeout_at(deadline, sink.append(&data)).await;
        appended.map_err(|_| Error::TimedOut(options.timeout))??;
        data.clear();
        observer.advanced(length, reader.size());
        // Fails early instead of receiving `max_size` bytes first.
        if reader.size().is_some_and(|size| size > options.max_size) {
            return Err(ReadError::TooMuchData { limit: options.max_size }.into());
        }
        // Fails early if the file cannot be saved under its name.
        if !is_name_checked && let Some(name) = reader.filename() {
            output_path(name)?;
            is_name_checked = true;
        }
    }
    let file = match reader.finish()? {
        Head::Refusal(refusal) => return Err(Error::Refused(escape(&refusal.error))),
        Head::File(file) => file,
    };
    if requested.is_none() {
        session.expect_end().await?;
    }
    let digest = hasher.finalize().into();
    verify(&file, &digest)?;
    sink.finish(output_path(&file.filename)?, length, &digest, options).await
}

/// Compares size and digest of the received data with those in the document.
fn verify(file: &File, digest: &[u8; 32]) -> Result<(), Error> {
    match file {
        File { size: Some(declared), length, .. } if declared != length => {
            Err(Error::SizeMismatch { declared: *declared, sent: *length })
        }
        File { sha256: Some(expected), .. } if expected != digest => Err(Error::DigestMismatch),
        _ => Ok(()),
    }
}
