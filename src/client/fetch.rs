//! Asks a file service, and saves what it hands out.
//!
//! The document is read, decoded and digested as it arrives, into a file that gets its name when
//! everything holds. Nothing that the server says is believed: not the name, not the size, not
//! that there is an end.

use std::collections::{HashSet, VecDeque};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, OFlags};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::client::{ConnectError, Server};
use crate::document::{File, Head, ReadError, Reader, Tail, without_bom};
use crate::fs::atomic::{
    DirHandle, NEW_FILE, OverwritePolicy, PendingFile, SaveError, is_special, sync_data,
};
use crate::fs::created_dirs::CreatedDirs;
use crate::fs::filename;
use crate::fs::filename::{NameError, escape};
use crate::net::idle_timer::{IdleTimer, ready_within};
use crate::sys::unacknowledged;
use crate::text::counted;
use crate::text::error_chain;

/// The port of file services, by custom.
pub(crate) const PORT: u16 = 5566;

/// How much is received at one time.
const BUFFER: usize = 256 << 10;

/// How many requests may be on their way before the first is answered.
const AHEAD: usize = 16;

/// The longest list that is taken, in bytes.
const MAX_LIST: usize = 16 << 20;

/// How long a server may send nothing before the user is told the likely cause.
const SILENCE: Duration = Duration::from_secs(2);

/// How long the end of a connection is waited for when the document is there.
const WAIT_FOR_END: Duration = Duration::from_secs(1);

/// What to fetch, and where to.
#[derive(Debug, Clone)]
pub struct Order {
    /// Whom to ask.
    pub server: Server,
    /// What is wanted.
    pub wanted: Wanted,
    /// Where it goes.
    pub output: Output,
    /// The treatment of files that exist.
    pub overwrite: OverwritePolicy,
    /// The largest file that is taken, in bytes.
    pub max_size: u64,
    /// How long all may take.
    pub timeout: Duration,
    /// How long the server may be silent.
    pub idle_timeout: Duration,
}

/// What is wanted of a file service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The one document that it pushes.
    Pushed,
    /// Files by name, out of a folder.
    Names(Vec<String>),
    /// Every file of a folder.
    All,
}

/// Where files go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// To standard output.
    Stdout,
    /// To this file.
    File(PathBuf),
    /// Into this folder, under the names that they have.
    Folder(PathBuf),
}

/// Why something was not fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection failed.
    #[error("the connection failed")]
    Network(#[source] io::Error),
    /// The server was silent for too long.
    #[error("the server sent nothing for {0:?} (--idle-timeout)")]
    Silent(Duration),
    /// The server sent nothing at all though no file was asked for by name.
    #[error(
        "{server} sent nothing: {}: a folder service waits for requests: try --list or --all",
        error_chain(.cause)
    )]
    NothingSent {
        /// The server, with its port.
        server: String,
        /// How the connection ended.
        cause: Box<Error>,
    },
    /// The time for all is over.
    #[error("it took longer than {0:?} (--timeout)")]
    Timeout(Duration),
    /// The document is wrong.
    #[error("the document is wrong")]
    Document(#[from] ReadError),
    /// The server refused.
    #[error("the server says: {0}")]
    Refused(String),
    /// The server sent another file than the one that was asked for.
    #[error("the server sent \"{0}\" instead; it may hand out one file only, without a name")]
    WrongName(String),
    /// The name that the server chose is not taken.
    #[error(
        "the server calls it \"{name}\", which is not taken: {cause}; choose a name with -o FILE"
    )]
    Name {
        /// The name, escaped.
        name: String,
        /// Why.
        cause: NameError,
    },
    /// The document is shorter or longer than it said.
    #[error("the server promised {} and sent {sent}", counted(*promised, "byte"))]
    Size {
        /// What it said.
        promised: u64,
        /// What it was.
        sent: u64,
    },
    /// The data is not what the server said it was.
    #[error("the digest does not hold: what arrived is not what was sent")]
    Digest,
    /// There is a file already.
    #[error("{} is there already; --force replaces it, -o FILE saves elsewhere", .0.display())]
    Exists(PathBuf),
    /// Another file that was asked for goes there.
    #[error("{} is the place of another file that was asked for", .0.display())]
    SamePlace(PathBuf),
    /// A device, FIFO or socket is in its place.
    #[error(
        "{} is a device, FIFO or socket, which is never replaced: choose another name with -o FILE",
        .0.display()
    )]
    SpecialFile(PathBuf),
    /// A socket cannot be written to.
    #[error("{} is a socket: choose a file, a FIFO, a device or a folder with -o", .0.display())]
    Socket(PathBuf),
    /// It could not be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The server did not send a list.
    #[error("the server sent no list; it may hand out one file only: ask without a name")]
    NotAList,
}

/// What became of a file that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Saved {
    /// Where it is; nowhere for standard output.
    pub place: Option<PathBuf>,
    /// How long it is, in bytes.
    pub length: u64,
    /// It was there already, and stays as it was.
    pub unchanged: bool,
}

/// Is told how the fetching goes.
pub(crate) trait Report {
    /// A file is begun; `name` is known if it was asked for by name.
    fn begin(&mut self, name: Option<&str>);
    /// The server, named with its port, has sent nothing for this long.
    fn silent(&mut self, server: &str, duration: Duration);
    /// So much of it has arrived, of so much, if that is known.
    fn advance(&mut self, length: u64, size: Option<u64>);
    /// It was saved.
    fn saved(&mut self, saved: &Saved);
    /// It was not; `name` is what was asked for.
    fn failed(&mut self, name: Option<&str>, error: &Error);
}

/// A file in a list.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Listed {
    /// The server's name for it: any text at all.
    pub filename: String,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last changed: any text at all.
    pub modified: Option<String>,
}

/// Fetches the list of a folder.
///
/// # Errors
/// If the server does not send one.
pub(crate) async fn list(order: &Order) -> Result<Vec<Listed>, Error> {
    list_until(order, Instant::now() + order.timeout).await
}

async fn list_until(order: &Order, deadline: Instant) -> Result<Vec<Listed>, Error> {
    read_list(&mut Session::connect(order, deadline).await?).await
}

/// Fetches what is wanted, and reports; true if everything was saved.
pub(crate) async fn fetch(order: &Order, report: &mut impl Report) -> bool {
    let deadline = Instant::now() + order.timeout;
    let names = match &order.wanted {
        Wanted::Pushed => {
            report.begin(None);
            let fetched = async {
                let mut session = Session::connect(order, deadline).await?;
                let server = order.server.with_port(PORT);
                session
                    .receive_first(&server, report)
                    .await
                    .map_err(|cause| Error::NothingSent { server, cause: Box::new(cause) })?;
                receive(&mut session, None, order, report).await
            };
            return told(fetched.await, None, report);
        }
        Wanted::Names(names) => names.clone(),
        Wanted::All => match list_until(order, deadline).await {
            Ok(files) => files.into_iter().map(|file| file.filename).collect(),
            Err(error) => {
                report.failed(None, &error);
                return false;
            }
        },
    };
    fetch_names(&names, order, deadline, report).await
}

fn told(fetched: Result<Saved, Error>, name: Option<&str>, report: &mut impl Report) -> bool {
    match fetched {
        Ok(saved) => {
            report.saved(&saved);
            true
        }
        Err(error) => {
            report.failed(name, &error);
            false
        }
    }
}

/// Fetches files by name over one connection, or over a new one after a failure.
async fn fetch_names(
    names: &[String],
    order: &Order,
    deadline: Instant,
    report: &mut impl Report,
) -> bool {
    let mut all_saved = true;
    // What cannot be saved is not asked for.
    let mut wanted = VecDeque::new();
    let mut places = HashSet::new();
    for name in names {
        let place = place_for(name, order).and_then(|place| match place {
            Some(place) if !places.insert(place.clone()) => Err(Error::SamePlace(place)),
            place => Ok(place),
        });
        match place {
            Ok(place) => wanted.push_back(Named { name, place }),
            Err(error) => all_saved = told(Err(error), Some(name), report),
        }
    }
    let mut session: Option<Session> = None;
    while let Some(named) = wanted.front() {
        report.begin(Some(named.name));
        let reused = session.is_some();
        let fetched = async {
            let open = match session.take() {
                Some(open) => open,
                None => Session::connect(order, deadline).await?,
            };
            let session = session.insert(open);
            session.request_ahead(&wanted).await?;
            receive(session, Some(named), order, report).await
        };
        let fetched = fetched.await;
        if let Some(session) = &mut session {
            session.requested = session.requested.saturating_sub(1);
        }
        // After a refusal the next reply follows; after anything else, nothing is certain.
        if !matches!(fetched, Ok(_) | Err(Error::Refused(_))) {
            session = None;
        }
        // A server may end a connection after every reply: that costs no file.
        if reused && matches!(fetched, Err(Error::Network(_) | Error::Document(ReadError::Empty))) {
            continue;
        }
        let hopeless = matches!(fetched, Err(Error::Connect(_) | Error::Timeout(_)));
        all_saved &= told(fetched, Some(named.name), report);
        wanted.pop_front();
        if hopeless {
            for named in &wanted {
                let error = io::Error::other("given up after the failure before");
                all_saved = told(Err(Error::Network(error)), Some(named.name), report);
            }
            break;
        }
    }
    all_saved
}

/// A file that is asked for by name.
struct Named<'a> {
    name: &'a str,
    /// Where it goes, unless to standard output.
    place: Option<PathBuf>,
}

/// Where a file that is asked for by name goes.
fn place_for(name: &str, order: &Order) -> Result<Option<PathBuf>, Error> {
    let not_taken = |cause| Error::Name { name: escape(name), cause };
    // A line cannot ask for it.
    if name.is_empty() || name.contains(['\n', '\r']) {
        return Err(not_taken(if name.is_empty() {
            NameError::Empty
        } else {
            NameError::ControlCharacter
        }));
    }
    let place = match &order.output {
        Output::Stdout => return Ok(None),
        Output::File(path) => path.clone(),
        Output::Folder(folder) if order.wanted == Wanted::All => {
            within(folder, &filename::relative_path(name).map_err(not_taken)?)
        }
        Output::Folder(folder) => {
            within(folder, Path::new(filename::last_component(name).map_err(not_taken)?))
        }
    };
    // A file of the list that is there already may be the same.
    if order.wanted != Wanted::All {
        refuse_taken(&place, order)?;
    }
    Ok(Some(place))
}

/// A path below a folder, as a person would write it.
pub(crate) fn within(folder: &Path, name: &Path) -> PathBuf {
    if folder == Path::new(".") { name.to_owned() } else { folder.join(name) }
}

fn refuse_taken(place: &Path, order: &Order) -> Result<(), Error> {
    match FileType::from_raw_mode(place.metadata().map_or(0, |metadata| metadata.mode())) {
        FileType::Socket if is_output(place, order) => Err(Error::Socket(place.to_owned())),
        kind if is_special(kind) && is_output(place, order) => Ok(()),
        kind if is_special(kind) => Err(Error::SpecialFile(place.to_owned())),
        _ if order.overwrite == OverwritePolicy::Refuse && place.symlink_metadata().is_ok() => {
            Err(Error::Exists(place.to_owned()))
        }
        _ => Ok(()),
    }
}

/// Whether the user named this path, rather than a server.
fn is_output(place: &Path, order: &Order) -> bool {
    matches!(&order.output, Output::File(path) if path == place)
}

/// Where a file goes that the server pushed under a name of its own choice.
fn place_for_pushed(name: &str, order: &Order) -> Result<Option<PathBuf>, Error> {
    let place = match &order.output {
        Output::Stdout => return Ok(None),
        Output::File(path) => path.clone(),
        Output::Folder(folder) => {
            let not_taken = |cause| Error::Name { name: escape(name), cause };
            within(folder, Path::new(filename::file_name(name).map_err(not_taken)?))
        }
    };
    refuse_taken(&place, order)?;
    Ok(Some(place))
}

/// Receives one document and saves its file.
async fn receive(
    session: &mut Session,
    named: Option<&Named<'_>>,
    order: &Order,
    report: &mut impl Report,
) -> Result<Saved, Error> {
    let place = |name: &str| match named {
        Some(named) if named.name != name => Err(Error::WrongName(escape(name))),
        Some(named) => Ok(named.place.clone()),
        None => place_for_pushed(name, order),
    };
    let mut sink = Sink::begin(named, order, session.limits.deadline).await?;
    let mut reader = Reader::new(order.max_size);
    let mut digest = Sha256::new();
    let mut data = Vec::with_capacity(BUFFER);
    let (mut length, mut name_checked) = (0, false);
    while !reader.is_complete() && (!session.received().is_empty() || session.receive().await?) {
        let taken = reader.feed(session.received(), &mut data)?;
        session.take(taken);
        digest.update(&data);
        length += data.len() as u64;
        // A slow reader of the output is not the server's silence.
        let appended = timeout_at(session.limits.deadline, sink.append(&data)).await;
        appended.map_err(|_| Error::Timeout(order.timeout))??;
        data.clear();
        report.advance(length, reader.size());
        // Nor need what is promised to be too large.
        if reader.size().is_some_and(|size| size > order.max_size) {
            return Err(ReadError::TooMuchData { limit: order.max_size }.into());
        }
        // As soon as the name is known: what cannot be saved need not be received.
        if !name_checked && let Some(name) = reader.filename() {
            place(name)?;
            name_checked = true;
        }
    }
    let file = match reader.finish()? {
        Head::Refusal(refusal) => return Err(Error::Refused(escape(&refusal.error))),
        Head::File(file) => file,
    };
    if named.is_none() {
        session.expect_end().await?;
    }
    let digest = digest.finalize().into();
    check(&file, &digest)?;
    sink.finish(place(&file.filename)?, length, &digest, order).await
}

/// Checks what the document said of its data.
fn check(file: &File, digest: &[u8; 32]) -> Result<(), Error> {
    match file {
        File { size: Some(promised), length, .. } if promised != length => {
            Err(Error::Size { promised: *promised, sent: *length })
        }
        File { sha256: Some(said), .. } if said != digest => Err(Error::Digest),
        _ => Ok(()),
    }
}

/// The destination of the data.
enum Sink {
    /// Standard output, a device or a FIFO, written to as the data arrives.
    Stream {
        file: Arc<fs::File>,
        path: PathBuf,
        place: Option<PathBuf>,
    },
    File {
        pending: PendingFile,
        dir: DirHandle,
        folder: CreatedDirs,
    },
}

impl Sink {
    async fn begin(
        named: Option<&Named<'_>>,
        order: &Order,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let folder = match (&order.output, named.and_then(|named| named.place.as_deref())) {
            (Output::Stdout, _) => return Self::stdout(),
            (Output::File(path), _) if is_stream(path)? => {
                return Self::open_stream(path, deadline).await;
            }
            (_, Some(place)) => folder_of(place),
            (Output::File(file), None) => folder_of(file),
            (Output::Folder(folder), None) => folder.clone(),
        };
        let begin = || {
            let folder = match order.wanted {
                // Its sub-folders come with it.
                Wanted::All => CreatedDirs::create(&folder)?,
                Wanted::Pushed | Wanted::Names(_) => CreatedDirs::existing(&folder),
            };
            let dir = DirHandle::open(folder.path())?;
            let pending = PendingFile::create(dir.clone(), NEW_FILE)?;
            Ok(Self::File { pending, dir, folder })
        };
        begin().map_err(|source| Error::Write { path: folder.clone(), source })
    }

    fn stdout() -> Result<Self, Error> {
        let path = PathBuf::from("standard output");
        match io::stdout().as_fd().try_clone_to_owned() {
            Ok(stdout) => Ok(Self::Stream { file: Arc::new(stdout.into()), path, place: None }),
            Err(source) => Err(Error::Write { path, source }),
        }
    }

    /// Opens a device or FIFO, which waits until a process reads the FIFO.
    async fn open_stream(path: &Path, deadline: Instant) -> Result<Self, Error> {
        let place = path.to_owned();
        let open = blocking(move || {
            let flags = OFlags::NOCTTY.bits().cast_signed();
            let file = fs::OpenOptions::new().write(true).custom_flags(flags).open(&place)?;
            // Another file may have taken the name.
            match FileType::from_raw_mode(file.metadata()?.mode()) {
                kind if is_special(kind) => Ok(file),
                _ => Err(io::Error::other("it is no longer a device or FIFO")),
            }
        });
        let unread = || io::Error::new(io::ErrorKind::TimedOut, "no process reads it (--timeout)");
        let opened = timeout_at(deadline, open).await.unwrap_or_else(|_| Err(unread()));
        let place = path.to_owned();
        match opened {
            Ok(file) => {
                Ok(Self::Stream { file: Arc::new(file), path: place.clone(), place: Some(place) })
            }
            Err(source) => Err(Error::Write { path: place, source }),
        }
    }

    async fn append(&mut self, data: &[u8]) -> Result<(), Error> {
        match self {
            Self::Stream { file, path, .. } => {
                let (file, data) = (Arc::clone(file), data.to_vec());
                let written = blocking(move || (&*file).write_all(&data)).await;
                written.map_err(|source| Error::Write { path: path.clone(), source })
            }
            Self::File { pending, folder, .. } => pending
                .file
                .write_all(data)
                .map_err(|source| Error::Write { path: folder.path().to_owned(), source }),
        }
    }

    async fn finish(
        self,
        place: Option<PathBuf>,
        length: u64,
        digest: &[u8; 32],
        order: &Order,
    ) -> Result<Saved, Error> {
        let (folder, dir, pending) = match self {
            Self::File { pending, dir, folder } => (folder, dir, pending),
            Self::Stream { place: None, .. } => {
                return Ok(Saved { place: None, length, unchanged: false });
            }
            Self::Stream { file, path, place } => {
                let synced = blocking(move || sync_data(&file)).await;
                synced.map_err(|source| Error::Write { path, source })?;
                return Ok(Saved { place, length, unchanged: false });
            }
        };
        // A file without a name does not come about.
        let place = place.ok_or(ReadError::Empty)?;
        if order.wanted == Wanted::All && is_same(&place, length, digest) {
            return Ok(Saved { place: Some(place), length, unchanged: true });
        }
        let name = place.file_name().unwrap_or(place.as_os_str());
        match pending.publish(Path::new(name), order.overwrite, None) {
            Ok(_) => {
                folder.keep();
                dir.sync();
                Ok(Saved { place: Some(place), length, unchanged: false })
            }
            Err(SaveError::Exists) => Err(Error::Exists(place)),
            Err(SaveError::SpecialFile) => Err(Error::SpecialFile(place)),
            Err(error) => Err(Error::Write { path: place, source: io::Error::other(error) }),
        }
    }
}

/// The folder that a path is in.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Whether a path of the user's choice is written to instead of being replaced.
fn is_stream(path: &Path) -> Result<bool, Error> {
    match FileType::from_raw_mode(path.metadata().map_or(0, |metadata| metadata.mode())) {
        FileType::Socket => Err(Error::Socket(path.to_owned())),
        kind => Ok(is_special(kind)),
    }
}

/// Runs on another thread, because a device or reader may hang, which must not delay signals.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Whether a file is there with this content. What cannot be read is not the same.
fn is_same(place: &Path, length: u64, digest: &[u8; 32]) -> bool {
    let same = || -> io::Result<bool> {
        // Opening a FIFO would wait.
        let metadata = fs::metadata(place)?;
        if !metadata.is_file() || metadata.len() != length {
            return Ok(false);
        }
        let mut file = fs::File::open(place)?;
        let mut own = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(<[u8; 32]>::from(own.finalize()) == *digest),
                read => own.update(buffer.get(..read).unwrap_or_default()),
            }
        }
    };
    same().unwrap_or(false)
}

/// Receives a list.
async fn read_list(session: &mut Session) -> Result<Vec<Listed>, Error> {
    #[derive(Deserialize)]
    struct Reply {
        files: Option<Vec<Listed>>,
        error: Option<String>,
    }
    session.send(b"\n").await?;
    let mut line = Vec::new();
    loop {
        let received = session.received();
        let end = received.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(received.len());
        line.extend_from_slice(received.get(..taken).unwrap_or_default());
        session.take(taken);
        if line.len() > MAX_LIST {
            return Err(Error::NotAList);
        }
        if end.is_some() || !session.receive().await? {
            break;
        }
    }
    match serde_json::from_slice(without_bom(&line)) {
        Ok(Reply { files: Some(files), .. }) => Ok(files),
        Ok(Reply { error: Some(error), .. }) => Err(Error::Refused(escape(&error))),
        Ok(Reply { .. }) | Err(_) => Err(Error::NotAList),
    }
}

/// A connection to a file service, with what has been received and not been taken.
struct Session {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// What is between has been received and not been taken.
    start: usize,
    end: usize,
    /// Requests that have not been answered.
    requested: usize,
    limits: TimeLimits,
}

/// When a session ends.
#[derive(Clone, Copy)]
struct TimeLimits {
    deadline: Instant,
    timeout: Duration,
    idle_timeout: Duration,
}

impl TimeLimits {
    /// Repeats `io` until it is ready, while the server sends or acknowledges bytes. `io` must be
    /// safe to cancel.
    async fn apply(
        self,
        stream: &mut TcpStream,
        mut io: impl AsyncFnMut(&mut TcpStream) -> io::Result<usize>,
    ) -> Result<usize, Error> {
        let mut timer = IdleTimer::new(self.idle_timeout);
        loop {
            let ready = timeout_at(self.deadline, ready_within(timer.interval(), io(stream))).await;
            match ready.map_err(|_| Error::Timeout(self.timeout))? {
                Ok(done) => return done.map_err(Error::Network),
                Err(waited) => {
                    let bytes = unacknowledged(stream.as_fd()).map_err(Error::Network)?;
                    if timer.is_expired_after(waited, bytes) {
                        return Err(Error::Silent(self.idle_timeout));
                    }
                }
            }
        }
    }
}

impl Session {
    async fn connect(order: &Order, deadline: Instant) -> Result<Self, Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        let connecting = order.server.connect(PORT, left.min(order.idle_timeout));
        let stream = timeout_at(deadline, connecting);
        let stream = stream.await.map_err(|_| Error::Timeout(order.timeout))??;
        Ok(Self {
            stream,
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
            requested: 0,
            limits: TimeLimits {
                deadline,
                timeout: order.timeout,
                idle_timeout: order.idle_timeout,
            },
        })
    }

    fn received(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    fn take(&mut self, length: usize) {
        self.start += length;
    }

    /// Receives more, when all was taken; false at the end.
    async fn receive(&mut self) -> Result<bool, Error> {
        let buffer = &mut self.buffer;
        let read = async |stream: &mut TcpStream| stream.read(buffer).await;
        let read = self.limits.apply(&mut self.stream, read).await?;
        (self.start, self.end) = (0, read);
        Ok(read > 0)
    }

    /// Receives the beginning of what the server pushes. One that waits for requests sends nothing.
    async fn receive_first(&mut self, server: &str, report: &mut impl Report) -> Result<(), Error> {
        let mut receiving = pin!(self.receive());
        let received = if let Ok(received) = timeout(SILENCE, &mut receiving).await {
            received
        } else {
            report.silent(server, SILENCE);
            receiving.await
        };
        if received? { Ok(()) } else { Err(ReadError::Empty.into()) }
    }

    async fn send(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let write = async |stream: &mut TcpStream| stream.write(bytes).await;
            let written = self.limits.apply(&mut self.stream, write).await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// Asks for the next files before their turn, so that the way there and back is not waited
    /// for with every file.
    async fn request_ahead(&mut self, wanted: &VecDeque<Named<'_>>) -> Result<(), Error> {
        if self.requested > AHEAD / 2 {
            return Ok(());
        }
        let mut lines = String::new();
        for named in wanted.iter().take(AHEAD).skip(self.requested) {
            lines.push_str(named.name);
            lines.push('\n');
            self.requested += 1;
        }
        self.send(lines.as_bytes()).await
    }

    /// Behind a document that was pushed comes a newline at most. A server that forgets to close
    /// the connection is not waited for long.
    async fn expect_end(&mut self) -> Result<(), Error> {
        let mut tail = Tail::default();
        loop {
            tail.feed(self.received())?;
            self.take(self.received().len());
            match timeout(WAIT_FOR_END, self.receive()).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return Ok(tail.finish()?),
                // The document was whole; how the connection ends does not matter any more.
                Ok(Err(_)) | Err(_) => return Ok(()),
            }
        }
    }
}
