//! The received part of a file: in memory, in a partial file, and published when it is complete.
//!
//! A small file stays in memory until it is complete. A larger one grows in a hidden file, which is
//! kept with its metadata if the download ends early, so that it can be resumed.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::task::{JoinHandle, spawn_blocking};

use super::{Error, Outcome};
use crate::fs::atomic::OverwritePolicy;
use crate::mirror::manifest::Validators;
use crate::mirror::target_dir::{LocalFile, PartialFile, TargetDir};

/// Size of the buffer of received bytes.
const BUFFER: usize = 256 << 10;

/// Metadata of a partial file, stored beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PartialMeta {
    /// The [`source_id`](crate::mirror::manifest::source_id) of the file.
    pub source: String,
    /// A strong validator, for `If-Range`.
    pub validator: String,
    pub validators: Validators,
    /// The announced length of the whole file, in bytes.
    #[serde(default)]
    pub total: Option<u64>,
}

/// A partial file that a download can continue.
pub(super) struct Resume {
    partial: PartialFile,
    pub length: u64,
    pub meta: PartialMeta,
}

impl Resume {
    /// Opens the partial file of an earlier download from `source`. Removes an unusable one.
    pub(super) fn find(
        dir: &TargetDir,
        name: &str,
        source: &str,
        max_file: u64,
    ) -> Result<Option<Self>, Error> {
        let Some(meta) = dir.read_partial_meta(name) else { return Ok(None) };
        let mut partial = dir.open_partial(name).map_err(Error::of_partial)?;
        let metadata = partial.pending.file.metadata()?;
        // Bytes that were written before a crash of the machine may be missing.
        let is_on_disk = || {
            let modified = metadata.modified().ok();
            modified.zip(boot_time()).is_some_and(|(modified, booted)| modified > booted)
        };
        let meta = serde_json::from_slice(&meta).ok().filter(|meta: &PartialMeta| {
            meta.source == source && (1..=max_file).contains(&metadata.len()) && is_on_disk()
        });
        let Some(meta) = meta else {
            dir.remove_partial(partial, name);
            return Ok(None);
        };
        partial.pending.keep_on_drop = true;
        Ok(Some(Self { partial, length: metadata.len(), meta }))
    }

    /// Returns a writer behind the partial content, which is read if it needs a digest.
    pub(super) fn into_writer(self, has_digest: bool) -> Result<PartialWriter, Error> {
        let Self { mut partial, length, .. } = self;
        let digest = if has_digest {
            Some(digest_of(&mut partial.pending.file, length)?)
        } else {
            partial.pending.file.seek(SeekFrom::Start(length))?;
            None
        };
        Ok(PartialWriter { partial, digest })
    }

    pub(super) fn remove(self, dir: &TargetDir, name: &str) {
        dir.remove_partial(self.partial, name);
    }
}

fn boot_time() -> Option<SystemTime> {
    let since = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    SystemTime::now().checked_sub(Duration::from_secs(since.tv_sec.try_into().ok()?))
}

/// Returns the digest of the first `length` bytes of a file.
pub(super) fn digest_of(file: &mut File, length: u64) -> Result<Sha256, Error> {
    file.seek(SeekFrom::Start(0))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; BUFFER];
    let mut file = file.take(length);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(digest),
            read => digest.update(buffer.get(..read).unwrap_or_default()),
        }
    }
}

/// Runs file operations on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Writes to a partial file.
pub(super) struct PartialWriter {
    partial: PartialFile,
    digest: Option<Sha256>,
}

impl PartialWriter {
    fn create(dir: &TargetDir, name: &str) -> Result<Self, Error> {
        let partial = dir.create_partial(name).map_err(Error::of_partial)?;
        Ok(Self { partial, digest: None })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.partial.pending.file.write_all(bytes)?;
        if let Some(digest) = &mut self.digest {
            digest.update(bytes);
        }
        Ok(())
    }
}

/// The state of the partial file of a body. Writes run while further bytes are received.
enum WriteState {
    None,
    Idle(PartialWriter),
    Busy(JoinHandle<Result<PartialWriter, Error>>),
}

impl WriteState {
    async fn done(self) -> Result<Option<PartialWriter>, Error> {
        match self {
            Self::None => Ok(None),
            Self::Idle(writer) => Ok(Some(writer)),
            Self::Busy(writing) => writing.await.map_err(io::Error::other)?.map(Some),
        }
    }
}

/// A body that is being received.
pub(super) struct BodyWriter {
    dir: Arc<TargetDir>,
    name: String,
    /// Received bytes that are not written yet.
    buffer: Vec<u8>,
    writer: WriteState,
    /// Written beside the partial file; `None` if it could not be resumed.
    meta: Option<PartialMeta>,
    has_digest: bool,
}

impl BodyWriter {
    /// Starts with `writer`, that of a resumed download.
    pub(super) fn new(
        dir: Arc<TargetDir>,
        name: String,
        writer: Option<PartialWriter>,
        meta: Option<PartialMeta>,
        has_digest: bool,
    ) -> Self {
        let writer = writer.map_or(WriteState::None, WriteState::Idle);
        Self { dir, name, buffer: Vec::new(), writer, meta, has_digest }
    }

    pub(super) async fn append(&mut self, piece: &[u8]) -> Result<(), Error> {
        if !self.buffer.is_empty() && self.buffer.len() + piece.len() > BUFFER {
            self.write().await?;
        }
        self.buffer.extend_from_slice(piece);
        Ok(())
    }

    /// Starts to write the buffer to the partial file.
    pub(super) async fn write(&mut self) -> Result<(), Error> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let writer = std::mem::replace(&mut self.writer, WriteState::None).done().await?;
        let buffer = std::mem::take(&mut self.buffer);
        let (dir, name) = (Arc::clone(&self.dir), self.name.clone());
        let (meta, has_digest) = (self.meta.clone(), self.has_digest);
        self.writer = WriteState::Busy(spawn_blocking(move || {
            let mut writer = if let Some(writer) = writer {
                writer
            } else {
                let mut writer = PartialWriter::create(&dir, &name)?;
                writer.digest = has_digest.then(Sha256::new);
                if let Some(meta) = meta {
                    // Without it, the partial file cannot be resumed.
                    let meta = serde_json::to_vec(&meta).unwrap_or_default();
                    writer.partial.pending.keep_on_drop =
                        dir.write_partial_meta(&name, &meta).is_ok();
                }
                writer
            };
            match writer.write(&buffer) {
                Ok(()) => Ok(writer),
                Err(error) => {
                    dir.remove_partial(writer.partial, &name);
                    Err(error.into())
                }
            }
        }));
        Ok(())
    }

    /// Ends after an error, and keeps the partial file if it can be resumed.
    pub(super) async fn abandon(mut self, error: &Error) {
        let keep = match error {
            Error::Http(error) => error.is_temporary(),
            Error::Interrupted | Error::TimedOut(_) => true,
            _ => false,
        };
        if keep && self.meta.is_some() && self.write().await.is_err() {
            return;
        }
        let writer = std::mem::replace(&mut self.writer, WriteState::None).done().await;
        if let Ok(Some(writer)) = writer
            && !(keep && writer.partial.pending.keep_on_drop)
        {
            self.dir.remove_partial(writer.partial, &self.name);
        }
    }

    /// Publishes the complete body, unless the existing file has the same content.
    pub(super) async fn publish(self, target: Target) -> Result<(Outcome, LocalFile), Error> {
        let Self { dir, name, buffer, writer, .. } = self;
        let writer = writer.done().await?;
        blocking(move || target.save(&dir, &name, &buffer, writer)).await
    }
}

/// The expected content of a file, and the file that it replaces.
pub(super) struct Target {
    pub sha256: Option<[u8; 32]>,
    pub local: Option<LocalFile>,
    /// The modification time to set.
    pub modified: Option<SystemTime>,
    pub overwrite: OverwritePolicy,
}

impl Target {
    fn save(
        &self,
        dir: &TargetDir,
        name: &str,
        buffer: &[u8],
        writer: Option<PartialWriter>,
    ) -> Result<(Outcome, LocalFile), Error> {
        let (writer, outcome) = if let Some(mut writer) = writer {
            match self.complete(dir, name, &mut writer, buffer) {
                Ok(outcome) if outcome != Outcome::Unchanged => (writer, outcome),
                result => {
                    dir.remove_partial(writer.partial, name);
                    return result.map(|outcome| (outcome, self.existing()));
                }
            }
        } else {
            let outcome = self.compare(dir, name, buffer)?;
            if outcome == Outcome::Unchanged {
                return Ok((outcome, self.existing()));
            }
            let mut writer = PartialWriter::create(dir, name)?;
            writer.write(buffer)?;
            (writer, outcome)
        };
        let has_meta = writer.partial.pending.keep_on_drop;
        let finished = dir.finish(writer.partial, name, self.modified, self.overwrite);
        if has_meta {
            dir.remove_partial_meta(name);
        }
        Ok((outcome, finished?))
    }

    fn existing(&self) -> LocalFile {
        self.local.expect("only an existing file is unchanged")
    }

    /// Verifies a body that is completely in memory.
    fn compare(&self, dir: &TargetDir, name: &str, body: &[u8]) -> Result<Outcome, Error> {
        if self.sha256.is_some_and(|sha256| <[u8; 32]>::from(Sha256::digest(body)) != sha256) {
            return Err(Error::DigestMismatch);
        }
        Ok(self.outcome(body.len() as u64, || has_content(dir, name, &mut &*body)))
    }

    /// Writes the rest of a body, and verifies it.
    fn complete(
        &self,
        dir: &TargetDir,
        name: &str,
        writer: &mut PartialWriter,
        rest: &[u8],
    ) -> Result<Outcome, Error> {
        writer.write(rest)?;
        let digest = writer.digest.take().map(|digest| <[u8; 32]>::from(digest.finalize()));
        if digest.zip(self.sha256).is_some_and(|(digest, sha256)| digest != sha256) {
            return Err(Error::DigestMismatch);
        }
        let file = &mut writer.partial.pending.file;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(0))?;
        Ok(self.outcome(size, || has_content(dir, name, file)))
    }

    fn outcome(&self, size: u64, is_same: impl FnOnce() -> bool) -> Outcome {
        match self.local {
            None => Outcome::New,
            Some(local) if local.size == size && is_same() => Outcome::Unchanged,
            Some(_) => Outcome::Changed,
        }
    }
}

/// Whether a file exists with exactly this content. An unreadable file differs.
fn has_content(dir: &TargetDir, name: &str, content: &mut impl Read) -> bool {
    let mut compare = || -> io::Result<bool> {
        let mut file = dir.read(name)?;
        let (mut one, mut other) = (vec![0; 64 << 10], vec![0; 64 << 10]);
        loop {
            let length = file.read(&mut one)?;
            let other = other.get_mut(..length).unwrap_or_default();
            content.read_exact(other)?;
            if one.get(..length) != Some(&*other) {
                return Ok(false);
            }
            if length == 0 {
                return Ok(content.read(&mut [0])? == 0);
            }
        }
    };
    compare().unwrap_or(false)
}
