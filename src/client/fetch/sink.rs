//! Writers of received data: temporary files that are published when complete, and streams.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout_at};

use super::destination::{NamedFile, is_stream};
use super::error::Error;
use super::session::BUFFER;
use super::{FetchOptions, Output, SavedFile, Selection};
use crate::document::ReadError;
use crate::fs::atomic::{DirHandle, NEW_FILE, PendingFile, SaveError, is_special, sync_data};
use crate::fs::created_dirs::CreatedDirs;

/// Writer of the data of one document.
pub(super) enum Sink {
    /// Standard output, a device or a FIFO; written to while the data arrives.
    Stream {
        file: Arc<fs::File>,
        /// Path for error messages.
        label: PathBuf,
        /// Path of the device or FIFO; `None` for standard output.
        path: Option<PathBuf>,
    },
    /// A temporary file, published after the document has been verified.
    File { pending: PendingFile, dir: DirHandle, folder: CreatedDirs },
}

impl Sink {
    /// Opens the output. `requested` is `None` for a pushed document.
    pub(super) async fn open(
        requested: Option<&NamedFile<'_>>,
        options: &FetchOptions,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let folder = match (&options.output, requested.and_then(|file| file.path.as_deref())) {
            (Output::Stdout, _) => return Self::stdout(),
            (Output::File(path), _) if is_stream(path)? => {
                return Self::open_stream(path, deadline).await;
            }
            (_, Some(path)) => parent_of(path),
            (Output::File(path), None) => parent_of(path),
            (Output::Folder(folder), None) => folder.clone(),
        };
        let open = || {
            let folder = match options.selection {
                // Names in a listing may contain sub-folders.
                Selection::All => CreatedDirs::create(&folder)?,
                Selection::Pushed | Selection::Names(_) => CreatedDirs::existing(&folder),
            };
            let dir = DirHandle::open(folder.path())?;
            let pending = PendingFile::create(dir.clone(), NEW_FILE)?;
            Ok(Self::File { pending, dir, folder })
        };
        open().map_err(|source| Error::Write { path: folder.clone(), source })
    }

    fn stdout() -> Result<Self, Error> {
        let label = PathBuf::from("standard output");
        match io::stdout().as_fd().try_clone_to_owned() {
            Ok(stdout) => Ok(Self::Stream { file: Arc::new(stdout.into()), label, path: None }),
            Err(source) => Err(Error::Write { path: label, source }),
        }
    }

    /// Opens a device or FIFO. Opening a FIFO blocks until a process reads it.
    async fn open_stream(path: &Path, deadline: Instant) -> Result<Self, Error> {
        let path = path.to_owned();
        let opening = path.clone();
        let open = run_blocking(move || {
            let flags = OFlags::NOCTTY.bits().cast_signed();
            let file = fs::OpenOptions::new().write(true).custom_flags(flags).open(&opening)?;
            // The path may have been replaced since its type was read.
            match FileType::from_raw_mode(file.metadata()?.mode()) {
                kind if is_special(kind) => Ok(file),
                _ => Err(io::Error::other("it is no longer a device or FIFO")),
            }
        });
        let unread = || io::Error::new(io::ErrorKind::TimedOut, "no process reads it (--timeout)");
        match timeout_at(deadline, open).await.unwrap_or_else(|_| Err(unread())) {
            Ok(file) => {
                Ok(Self::Stream { file: Arc::new(file), label: path.clone(), path: Some(path) })
            }
            Err(source) => Err(Error::Write { path, source }),
        }
    }

    pub(super) async fn append(&mut self, data: &[u8]) -> Result<(), Error> {
        match self {
            Self::Stream { file, label, .. } => {
                let (file, data) = (Arc::clone(file), data.to_vec());
                let written = run_blocking(move || (&*file).write_all(&data)).await;
                written.map_err(|source| Error::Write { path: label.clone(), source })
            }
            Self::File { pending, folder, .. } => pending
                .file
                .write_all(data)
                .map_err(|source| Error::Write { path: folder.path().to_owned(), source }),
        }
    }

    /// Publishes the file at `path`. With `--all`, keeps an existing file with the same content.
    pub(super) async fn finish(
        self,
        path: Option<PathBuf>,
        length: u64,
        digest: &[u8; 32],
        options: &FetchOptions,
    ) -> Result<SavedFile, Error> {
        let (folder, dir, pending) = match self {
            Self::File { pending, dir, folder } => (folder, dir, pending),
            Self::Stream { path: None, .. } => {
                return Ok(SavedFile { path: None, length, is_unchanged: false });
            }
            Self::Stream { file, label, path } => {
                let synced = run_blocking(move || sync_data(&file)).await;
                synced.map_err(|source| Error::Write { path: label, source })?;
                return Ok(SavedFile { path, length, is_unchanged: false });
            }
        };
        // Unreachable: only standard output has no path, and it is a stream.
        let path = path.ok_or(ReadError::Empty)?;
        if options.selection == Selection::All && has_content(&path, length, digest) {
            return Ok(SavedFile { path: Some(path), length, is_unchanged: true });
        }
        let name = path.file_name().unwrap_or(path.as_os_str());
        match pending.publish(Path::new(name), options.overwrite, None) {
            Ok(_) => {
                folder.keep();
                dir.sync();
                Ok(SavedFile { path: Some(path), length, is_unchanged: false })
            }
            Err(SaveError::Exists) => Err(Error::Exists(path)),
            Err(SaveError::SpecialFile) => Err(Error::SpecialFile(path)),
            Err(error) => Err(Error::Write { path, source: io::Error::other(error) }),
        }
    }
}

/// Returns the folder that contains `path`.
fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Runs `work` on a blocking thread, because a device or FIFO can hang, which must not delay
/// signals.
async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Whether the file at `path` has this length and SHA-256 digest; false if it cannot be read.
fn has_content(path: &Path, length: u64, digest: &[u8; 32]) -> bool {
    let compare = || -> io::Result<bool> {
        // Checked before opening, because opening a FIFO blocks.
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() || metadata.len() != length {
            return Ok(false);
        }
        let mut file = fs::File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(<[u8; 32]>::from(hasher.finalize()) == *digest),
                read => hasher.update(buffer.get(..read).unwrap_or_default()),
            }
        }
    };
    compare().unwrap_or(false)
}
